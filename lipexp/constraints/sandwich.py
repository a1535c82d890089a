"""The constraint of sandwich layers, which bounds the network as a whole by a matrix inequality.

Shapes: K runs, weights (K, out, in), biases (K, 1, out).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from lipexp.activations import Activation
from lipexp.blocks import Affine, Block
from lipexp.constraints.base import check_slopes
from lipexp.constraints.chains import Spectral
from lipexp.constraints.norms import SPECTRAL_SHRINK, SpectralNorm
from lipexp.constraints.orthogonal import CayleyTransform
from lipexp.constraints.residual import FARTHEST
from lipexp.inequality import Array, Inequality, of_layers, proves
from lipexp.models import Free, Layout, Shapes
from lipexp.networks import BakedNetwork
from lipexp.norms import even_split


class Sandwich(Spectral):
    """Sandwich layers, L-Lipschitz for the 2-norm as a whole: no layer has a bound of its own.

    Hidden layer k is x -> sqrt(2) A^T Psi act(sqrt(2) Psi^-1 B x + b) with A A^T + B B^T = I, by a Cayley
    transform, and a diagonal matrix Psi > 0 that is learnt, stored as log Psi. Two neighbouring matrices are
    merged, so that the network is one of affine layers,

        W_1 = sqrt(2) Psi_1^-1 B_1,  W_k = 2 Psi_k^-1 B_k A_{k-1}^T Psi_{k-1},  W_n = sqrt(2) R A_{n-1}^T
        Psi_{n-1},

    with R R^T = I, or R^T R = I for more outputs than features. For slopes in [0, 1] the multipliers T_k = Psi_k^2
    prove the constant 1: with u_k = Psi_k x_k the form of `lipexp.inequality`, less
    |W_n x_{n-1}|^2 and with L = 1, is

        |x_0 - sqrt(2) B_1^T u_1|^2 + 2 sum_k |A_k^T u_k - B_{k+1}^T u_{k+1}|^2
            + 2 |A_{n-1}^T u_{n-1}|^2 - 2 |R A_{n-1}^T u_{n-1}|^2  >=  0.

    Every network that this inequality can prove has such a form. Each W_k is multiplied by b = L^(1/n), which
    takes T_k to b^(2 (n - k)) T_k. For baking A, B and R are scaled by a number just below 1, until the inequality
    is proven of the stored float32 weights and multipliers.

    Reference: Wang and Manchester 2023, "Direct parameterization of Lipschitz-bounded deep networks" (arXiv
    2301.11526), theorem 3.2.
    """

    def check(self, act: Activation, name: str) -> None:
        check_slopes(act, name, "sandwich layers")

    def layout(self, shapes: Shapes, act: Activation) -> Layout:
        """[B_k A_k] (n_k, n_{k-1} + n_k) and log Psi_k for each hidden layer, and R."""
        *hidden, last = shapes
        widths = [*(n_out for n_out, _ in hidden), 0]
        matrices = [(n_out, n_in + n_out) for n_out, n_in in hidden]
        return Layout.of([*matrices, last], widths, widths, act)

    def names(self, layers: Sequence[Block]) -> tuple[str, ...]:
        return ("spectral norm, not bounded",) * len(layers)

    def layer_bound(self, layers: Sequence[Block]) -> Tensor | None:
        return None

    def start(self, layers: Sequence[Free]) -> None:
        bound = self.bound(len(layers))
        assert bound is not None
        self._scale = bound.to(layers[0].weight).view(-1, 1, 1)

    def apply(self, layers: Sequence[Free]) -> list[Block]:
        merged, scale = _merged(layers, 1.0)[0], self._scale
        assert scale is not None
        return [
            Affine(scale * weight, scale**i * layer.bias)
            for i, (weight, layer) in enumerate(zip(merged, layers, strict=True), start=1)
        ]

    def bake(self, layers: Sequence[Free], act: Activation) -> BakedNetwork:
        runs, n = len(layers[0].weight), len(layers)
        bound = self.bound(n)
        assert bound is not None
        scale = bound.expand(runs).view(-1, 1, 1)
        free = [Free(*(part.detach().cpu().double() for part in layer)) for layer in layers]
        biases = [(scale**i * layer.bias).float() for i, layer in enumerate(free, start=1)]
        shrink, open_runs = 1 - SPECTRAL_SHRINK, list(range(runs))
        merged, multipliers = _merged(free, 1 - shrink)
        weights, stored = [(scale * weight).float() for weight in merged], multipliers.float()
        while open_runs := [k for k in open_runs if not self._proves([w[k] for w in weights], stored[k], k)]:
            shrink *= 2
            if shrink > 0.5:
                raise ArithmeticError("no sandwich layers within the bound could be proven")
            for weight, smaller in zip(weights, _merged(free, 1 - shrink)[0], strict=True):
                weight[open_runs] = (scale * smaller).float()[open_runs]
        blocks = [Affine(weight, bias) for weight, bias in zip(weights, biases, strict=True)]
        return self.prove(replace(self.baked(blocks, layers, act), multipliers=stored))

    def prove(self, network: BakedNetwork) -> BakedNetwork:
        network, multipliers = super().prove(network), network.multipliers
        if multipliers is None:
            return network
        whole = []
        for run in range(network.n_runs):
            proven = self._proves([layer.weight[run] for layer in network.layers], multipliers[run], run)
            whole.append(self._whole(run) if proven else math.inf)
        return replace(network, whole=whole)

    def _whole(self, run: int) -> float:
        """The constant of the layers of one run: L, unless a linear term takes its part."""
        return float(self._budget[run if len(self._budget) > 1 else 0])

    def _proves(self, weights: Sequence[Tensor], multipliers: Tensor, run: int) -> bool:
        """Whether L is proven for one network by multipliers T_k b^(-2 (n - k)), which do not depend on L."""
        lipschitz, n = self._whole(run), len(weights)
        if n == 1:
            return SpectralNorm().proven(weights[0]) <= lipschitz
        if not (all(torch.isfinite(part).all() for part in (*weights, multipliers)) and (multipliers > 0).all()):
            return False
        of_layers = multipliers.double().split([len(weight) for weight in weights[:-1]])
        b = even_split(lipschitz, n)
        numbers = [b ** (2 * (n - k)) * of_layer.numpy() for k, of_layer in enumerate(of_layers, start=1)]
        inequality, scaled, unit = _scaled(lipschitz, [weight.double().numpy() for weight in weights], numbers)
        square = math.nextafter(unit * unit, 0)
        return proves(inequality, scaled / square, square * np.eye(len(weights[-1])))


def _merged(layers: Sequence[Free], rho: float) -> tuple[list[Tensor], Tensor]:
    """The W_k (K, out, in), with A, B and R scaled by `rho`, and Psi^2 (K, H) of all hidden layers."""
    *hidden, last = layers
    cayley = CayleyTransform()
    merged, out, squares = [], None, [last.own]
    for layer in hidden:
        n_out, n_both = layer.weight.shape[1:]
        rows = rho * cayley.within_one(layer.weight, None)
        b, a = rows.split([n_both - n_out, n_out], dim=2)
        psi = layer.own.clamp(-FARTHEST, FARTHEST).exp().unsqueeze(-1)  # (K, n, 1)
        w = math.sqrt(2) * b / psi
        merged.append(w if out is None else w @ out)
        out = math.sqrt(2) * (psi * a).mT
        squares.append(psi.squeeze(-1).square())
    r = rho * cayley.within_one(last.weight, None)
    merged.append(r if out is None else r @ out)
    return merged, torch.cat(squares, dim=1)


def _scaled(
    lipschitz: float, weights: Sequence[Array], multipliers: Sequence[Array]
) -> tuple[Inequality, Array, float]:
    """The inequality, T and L in units in which L, the multipliers and the weights are of a size of about 1.

    Features and outputs are scaled by powers of two, which is exact.
    """
    unit = math.frexp(lipschitz)[1]
    sizes = [np.ldexp(of_layer, -2 * unit) for of_layer in multipliers]
    exponents = [np.frexp(size)[1] // 2 for size in sizes]
    before = [np.zeros(1, dtype=int), *exponents]
    behind = [*(exponent[:, None] for exponent in exponents), np.full((1, 1), -unit)]
    scaled = [np.ldexp(weight, b - a) for weight, a, b in zip(weights, before, behind, strict=True)]
    found = [np.ldexp(size, -2 * exponent) for size, exponent in zip(sizes, exponents, strict=True)]
    return of_layers(scaled, (0.0, 1.0)), np.concatenate(found), math.ldexp(lipschitz, -unit)
