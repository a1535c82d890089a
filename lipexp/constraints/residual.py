"""Constraints with residual layers x -> x - W diag(t) act(W^T x + b), 1-Lipschitz by a matrix inequality.

Shapes: K runs, weights (K, out, in), biases (K, 1, out).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from lipexp.activations import Activation
from lipexp.blocks import Affine, Block, Residual
from lipexp.constraints.base import check_slopes
from lipexp.constraints.chains import Spectral
from lipexp.constraints.norms import (
    SPECTRAL_SHRINK,
    OperatorNorm,
    SpectralNorm,
    is_contraction,
    spectral_norm_estimate,
)
from lipexp.constraints.orthogonal import PolarFactor
from lipexp.models import Free, Layout, Shapes
from lipexp.networks import BakedNetwork

SMALLEST = 1e-30  # of 2 / t
FARTHEST = 20.0  # a learnt scale is within exp(-20) and exp(20), so that float32 holds what is made of it


class ResidualLayers(Spectral):
    """Affine layers at the ends, orthogonal times b, and a residual layer of norm 1 for each hidden layer.

    Between hidden layers of different widths stands another affine layer. With b = L^(1/n) for the n affine layers
    the network is L-Lipschitz for the 2-norm. See `lipexp.blocks.Residual` for the bound of a residual layer,
    which is proven of the stored numbers W and t by a Cholesky factorisation of 2 diag(1/t) - W^T W.
    """

    own_numbers = False  # whether a residual layer has a number of its own for each feature

    @abstractmethod
    def inverse_of_half(self, weight: Tensor, own: Tensor, state: Any) -> Tensor:
        """(K, 1, H) 2 / t with which 2 diag(1/t) - W^T W is positive semidefinite, or nearly so.

        Args:
            weight: W (K, H, H).
            own: (K, H), or (K, 0).
            state: what `start_layer` has returned; None: to be computed without.
        """

    def start_layer(self, weight: Tensor) -> Any:
        """What `inverse_of_half` is handed at every step."""
        return None

    def check(self, act: Activation, name: str) -> None:
        check_slopes(act, name, "residual layers")

    def layout(self, shapes: Shapes, act: Activation) -> Layout:
        """A square matrix for each hidden layer, behind the affine layer that leads to its width."""
        found, n_in = [], shapes[0][1]
        for i, (n_out, _) in enumerate(shapes[:-1]):
            found += [(n_out, n_in)] * (i == 0 or n_out != n_in) + [(n_out, n_out)]
            n_in = n_out
        found.append((shapes[-1][0], n_in))
        inside = [
            n_out if n_out == n_in and 0 < i < len(found) - 1 else 0 for i, (n_out, n_in) in enumerate(found)
        ]
        own = [width if self.own_numbers else 0 for width in inside]
        return Layout.of(found, own, inside, act)

    def layer_norm(self) -> OperatorNorm:
        return PolarFactor("newton_schulz", 4)

    def depths(self, layers: Sequence[Free]) -> Sequence[int]:
        return [*accumulate(int(not residual) for residual in _residual(layers))]

    def start(self, layers: Sequence[Free]) -> None:
        depths = self.depths(layers)
        bound = self.bound(depths[-1])
        assert bound is not None
        self._norms = self.norms(len(layers))
        self._scale = bound.to(layers[0].weight).view(-1, 1, 1)
        self._state = [self.start_layer(layer.weight.detach()) for layer in layers]

    def apply(self, layers: Sequence[Free]) -> list[Block]:
        scale, out = self._scale, list[Block]()
        assert scale is not None
        is_residual, depths = _residual(layers), self.depths(layers)
        for norm, layer, inside in zip(self._norms, layers, is_residual, strict=True):
            if not inside:
                norm.restore(layer.weight)
        for i, layer in enumerate(layers):
            bias = scale ** depths[i] * layer.bias
            if is_residual[i]:
                half = self.inverse_of_half(layer.weight, layer.own, self._state[i])
                out.append(Residual(layer.weight, bias, 2 / half))
            else:
                out.append(Affine(scale * self._norms[i].within_one(layer.weight, None), bias))
        return out

    def bake(self, layers: Sequence[Free], act: Activation) -> BakedNetwork:
        runs, depths = len(layers[0].weight), self.depths(layers)
        bound = self.bound(depths[-1])
        assert bound is not None
        bound = bound.expand(runs)
        blocks: list[Block] = []
        for layer, depth, is_residual in zip(layers, depths, _residual(layers), strict=True):
            weight = layer.weight.detach().cpu()
            bias = (bound.view(-1, 1, 1) ** depth * layer.bias.detach().cpu().double()).float()
            if is_residual:
                weight = weight.float().clone()
                half = self.inverse_of_half(weight.double(), layer.own.detach().cpu().double(), None)
                t = torch.stack([_largest_t(w, h) for w, h in zip(weight, half, strict=True)])
                blocks.append(Residual(weight, bias, t))
            else:
                blocks.append(Affine(self.layer_norm().bake(weight, bound)[0], bias))
        return self.prove(self.baked(blocks, layers, act))


def _residual(layers: Sequence[Free]) -> list[bool]:
    """Whether each layer is a residual one: between the ends, no affine layer leads from one width to the same."""
    inside = [layer.weight.shape[1] == layer.weight.shape[2] for layer in layers[1:-1]]
    return [False, *inside, False][: len(layers)]


def _largest_t(weight: Tensor, half: Tensor) -> Tensor:
    """(1, M) float32 t just below 2 / `half` with which the layer is proven to be 1-Lipschitz.

    Raises:
        ArithmeticError: there is no such proof.
    """
    shrink = 1 - SPECTRAL_SHRINK
    while shrink < 0.5:
        t = (2 * (1 - shrink) / half.clamp_min(SMALLEST)).float()
        if is_contraction(weight, t[0]):
            return t
        shrink *= 2
    raise ArithmeticError("no residual layer of norm 1 could be proven")


class SLL(ResidualLayers):
    """Residual layers with 2 / t_i = sum_j |W^T W|_ij q_j / q_i and learnable q > 0, stored as log q.

    diag(2/t) - W^T W is diagonally dominant once it is scaled by q.

    Reference: Araujo, Havens, Delattre, Allauzen and Hu 2023, "A unified algebraic perspective on Lipschitz neural
    networks" (arXiv 2303.03169).
    """

    own_numbers = True

    def inverse_of_half(self, weight: Tensor, own: Tensor, state: Any) -> Tensor:
        q = own.clamp(-FARTHEST, FARTHEST).exp()
        sums = (weight.mT @ weight).abs() @ q.unsqueeze(-1)  # (K, H, 1)
        return (sums.squeeze(-1) / q).clamp_min(SMALLEST).unsqueeze(1)


class CPL(ResidualLayers):
    """Residual layers with 2 / t_i = ||W||_2^2 for all i: convex potential layers.

    Training estimates ||W||_2 by one warm-started step of power iteration per optimiser step.

    Reference: Meunier, Delattre, Araujo and Allauzen 2022, "A dynamical system perspective for Lipschitz neural
    networks" (arXiv 2110.12690).
    """

    def start_layer(self, weight: Tensor) -> Any:
        return SpectralNorm().start(weight)

    def inverse_of_half(self, weight: Tensor, own: Tensor, state: Any) -> Tensor:
        if state is None:
            square = torch.linalg.matrix_norm(weight, ord=2, keepdim=True).square()
        else:
            square = spectral_norm_estimate(weight, state).square()
        return square.clamp_min(SMALLEST).expand(-1, 1, weight.shape[2])
