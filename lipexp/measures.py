"""Measured gradient norms: rigorous lower bounds on the Lipschitz constant.

Shapes: K runs, N points, D inputs. Points are (K, N, D) in float64, weights the stored float32 numbers.

Points are scanned in float64. The largest value found is then computed again at its point in exact integer
arithmetic: the point and the weights are rational numbers, the activations are piecewise linear, so the linear
piece and its gradient are known exactly, and only the last step, the norm, is rounded: down. So what is reported
is never above the true constant, not even by rounding, and a point on a kink, where autograd can return a value
that no gradient takes, is moved off it.

That holds for activations that name their linear pieces, as all of lipexp's do. For a class of the user's the
value is an estimate in float64, and is called one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from lipexp.activations import PiecewiseLinear, is_piecewise_linear
from lipexp.certificates import UNIT_ROUNDOFF
from lipexp.exact import ExactNetwork, norm_below
from lipexp.models import Layer, hidden_inputs, run_layers

GRID_POINTS = {1: 2001, 2: 64}  # per axis, for inputs of so many dimensions
_CANDIDATES = 8  # points tried in exact arithmetic before a source is given up: more than one is rare
_CHUNK = 2**18  # features of one layer held at once while scanning: 2 MB in float64, which stay in the cache


class Maximum(NamedTuple):
    """A lower bound on the Lipschitz constant and the point that shows it."""

    value: float
    point: tuple[float, ...]
    exact: bool = True  # from exact arithmetic; else an estimate in float64


class Scan(NamedTuple):
    """Outputs and gradients at points, in float64."""

    f: Tensor  # (K, N)
    gradient: Tensor  # (K, N, D) of f to x
    hidden: list[Tensor]  # (K, N) each, the norms of the gradients of f to the input of each later layer


def scan(layers: Sequence[Layer], act: nn.Module, x: Tensor, hidden_q: float | None = None) -> Scan:
    """f and its gradient at points x (K, N, D); with `hidden_q`, also the q-norms of the hidden gradients."""
    layers = [Layer(weight.double(), bias.double()) for weight, bias in layers]
    widest = max(layer.weight.shape[1] for layer in layers)
    parts = [
        _scan_part(layers, act, part, hidden_q)
        for part in x.double().split(max(1, _CHUNK // (widest * x.shape[0])), dim=1)
    ]
    f, gradient, hidden = zip(*parts, strict=True)
    along = [torch.cat(part, dim=1) for part in zip(*hidden, strict=True)]
    return Scan(torch.cat(f, dim=1), torch.cat(gradient, dim=1), along)


def _scan_part(layers: Sequence[Layer], act: nn.Module, x: Tensor, hidden_q: float | None) -> Scan:
    with torch.enable_grad():
        out, inputs = hidden_inputs(layers, act, x.requires_grad_())
        f = out.squeeze(-1)
        gradient, *hidden = torch.autograd.grad(f.sum(), inputs[:1] if hidden_q is None else inputs)
    return Scan(f.detach(), gradient, [norms(one, hidden_q) for one in hidden] if hidden_q is not None else [])


def norms(gradients: Tensor, q: float) -> Tensor:
    """||.||_q along the last axis; torch's own vector_norm is slow for q = 1 and inf."""
    if q == 2:
        return torch.linalg.vector_norm(gradients, dim=-1)
    sizes = gradients.abs()
    return sizes.sum(dim=-1) if q == 1 else sizes.amax(dim=-1)


def grid(low: Tensor, high: Tensor, generators: Sequence[torch.Generator]) -> Tensor | None:
    """Jittered grid points (K, N, D) in the boxes low..high (K, D); None in more than two dimensions.

    Each point is moved at random within its cell: a network's kinks like round numbers.
    """
    dims = low.shape[1]
    if dims not in GRID_POINTS:
        return None
    n = GRID_POINTS[dims]
    axes = [torch.arange(n, dtype=torch.float64)] * dims
    cells = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, dims)  # (N, D)
    jitter = torch.stack([torch.rand(cells.shape, generator=g, dtype=torch.float64) for g in generators])
    return low.unsqueeze(1) + (high - low).unsqueeze(1) * (cells + jitter) / n


class MeasuredNetwork:
    """One baked network of a stack, and what all measurements of it need: found when first asked for, and kept."""

    def __init__(self, layers: Sequence[Layer], act: nn.Module, run: int) -> None:
        self.layers, self.act = run_layers(layers, run), act

    @cached_property
    def exact(self) -> ExactNetwork:
        """The same in exact arithmetic; `act` must name its linear pieces."""
        return ExactNetwork(self.layers, cast(PiecewiseLinear, self.act), 0)

    @cached_property
    def norm_product(self) -> float:
        """About what rounding errors in the gradient are relative to, in the 2-norm and in the inf-norm."""
        matrices = [layer.weight[0].double().numpy() for layer in self.layers]
        return max(
            math.prod(float(np.linalg.norm(matrix)) for matrix in matrices),
            math.prod(float(np.linalg.norm(matrix, math.inf)) for matrix in matrices),
        )


def largest(network: MeasuredNetwork, points: Tensor, gradients: Tensor, q: float) -> Maximum | None:
    """The largest ||grad f||_q of a network over points (N, D): at most the true constant, or an estimate.

    Args:
        gradients: (N, D) float64, as scanned.

    Returns:
        None if every candidate lies on a kink even after it was moved, or has no finite gradient.

    Raises:
        ArithmeticError: the activation names a linear piece that contradicts what it computes.
    """
    values = norms(gradients, q).nan_to_num(nan=-1, posinf=-1)
    candidates = [i for i in values.topk(min(_CANDIDATES, len(values))).indices.tolist() if values[i] >= 0]
    if not candidates:
        return None
    if not is_piecewise_linear(network.act):
        return _estimate(network, points[candidates[0]], q)
    contradicted = False
    for i in candidates:
        for moved, point in enumerate(_nearby(points[i])):
            gradient = network.exact.gradient(point.numpy())
            if gradient is None:
                continue
            value, scanned = norm_below(*gradient, q), float(values[i])
            # Rounding can put float64 on the other side of a kink at one candidate, but not at all of them; and
            # where the layers cancel, it is all that float64 sees.
            unseen = 1e-6 * max(value, scanned) + 1e-12 * network.norm_product
            if moved == 0 and abs(value - scanned) > unseen:
                contradicted = True
                break
            return Maximum(value, tuple(point.tolist()))
    if contradicted:
        raise ArithmeticError(f"{type(network.act).__name__}.piece contradicts its forward")
    return None


def _nearby(point: Tensor) -> Iterator[Tensor]:
    """`point` (D,) itself, then two points so near to it that only a kink at the point itself can come between."""
    yield point
    for shift in (2.0**-40, -(2.0**-36)):
        yield point + shift * (1 + point.abs()) * torch.linspace(1.0, 0.6, len(point), dtype=point.dtype)


def _estimate(network: MeasuredNetwork, point: Tensor, q: float) -> Maximum:
    """For a class whose formula lipexp does not know: the smallest of the gradient norms at and next to `point`.

    The neighbours unmask a kink, where autograd may return what no gradient is. What is left is lowered by a bound
    on the rounding error of backpropagation through n matrices of at most H columns, gamma_{n (H + 2)} times the
    product of their norms. The derivative of the activation itself is taken on trust, so this is an estimate.
    """
    layers = network.layers
    around = torch.stack(list(_nearby(point)))
    value = float(norms(scan(layers, network.act, around.unsqueeze(0)).gradient[0], q).nan_to_num(nan=0).min())
    widest = max(max(layer.weight.shape[1:]) for layer in layers)
    error = 4 * len(layers) * (widest + 2) * UNIT_ROUNDOFF * network.norm_product * math.sqrt(len(point))
    return Maximum(max(0.0, value - error), tuple(point.tolist()), exact=False)
