"""Measured gradient norms: rigorous lower bounds on the Lipschitz constant.

Shapes: K runs, N points, D inputs, C outputs, H features. Points are (K, N, D) in float64, weights the stored
float32 numbers. The gradients of all outputs at a point are the rows of the Jacobian J (C, D). It is measured in
its operator norm from the p-norm of the inputs to the h-norm of the outputs, the norm of the hidden spaces; for
one output that is ||grad f||_q, with 1/p + 1/q = 1.

Points are scanned in float64. The largest value found is then confirmed at its point, so that what is reported
is never above the true constant, not even by rounding:

- *exact arithmetic*, where all activations declare their active linear map: the point and the weights are rational
  numbers, so the gradient is known exactly, and only the last step, the norm, is rounded: down. A point on a
  breakpoint, where autograd can return a value that no gradient takes, is moved off it.
- *interval arithmetic*, where some are smooth, and know the hull of their slopes between two inputs: the Jacobian
  at the point lies within proven bounds, see `jacobians`, and of these the smallest norm counts: some 1e-11 less.

For other activations the value is an estimate in float64, and is called one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lipexp.blocks import Affine, Block
from lipexp.exact import ExactArray, add, integers, norm_above, norm_below, spectral_norm_below
from lipexp.jacobians import IntervalNetwork, why_not_applicable
from lipexp.networks import BakedNetwork
from lipexp.norms import UNIT_ROUNDOFF, dual, round_down

GRID_POINTS = {1: 2001, 2: 64}  # number of inputs -> points per axis
_CANDIDATES = 8  # points tried in exact arithmetic before a source is given up; more than one is rarely needed
_CHUNK = 2**18  # features of one layer held at once while scanning: 2 MB in float64, which fit the cache


Points = dict[str, tuple[Tensor, Tensor]]  # source -> points (K, N, D) and the gradients (K, N, C, D) there


EXACT, INTERVAL, ESTIMATE = "exact arithmetic", "interval arithmetic", "float64 estimate"  # how sure it is


class Maximum(NamedTuple):
    """A lower bound on the Lipschitz constant and the point that shows it."""

    value: float
    point: tuple[float, ...]
    by: str = EXACT


class Scan(NamedTuple):
    """Outputs and Jacobians at points, in float64."""

    f: Tensor  # (K, N, C)
    gradient: Tensor  # (K, N, C, D) of each output to x
    hidden: list[Tensor]  # (K, N) each, the norms of the Jacobians from the input of each later layer to f


def scan(network: BakedNetwork, x: Tensor, hidden_p: float | None = None, output_p: float | None = None) -> Scan:
    """f and its gradients at points x (K, N, D), by one backward pass for each output.

    Args:
        hidden_p: the norm of the hidden spaces, if the Jacobians there are to be measured as well.
        output_p: the norm of several outputs; None: the same.
    """
    double = network.double
    features = max([1, *network.hidden_widths]) * (1 if hidden_p is None else network.n_outputs)
    parts = [
        _scan_part(double, part, hidden_p, hidden_p if output_p is None else output_p)
        for part in x.double().split(max(1, _CHUNK // (features * x.shape[0])), dim=1)
    ]
    f, gradient, hidden = zip(*parts, strict=True)
    along = [torch.cat(part, dim=1) for part in zip(*hidden, strict=True)]
    return Scan(torch.cat(f, dim=1), torch.cat(gradient, dim=1), along)


def _scan_part(network: BakedNetwork, x: Tensor, hidden_p: float | None, output_p: float | None) -> Scan:
    with torch.enable_grad():
        inputs, f = network.inputs_and_output(x.requires_grad_())
        wanted, last = inputs[:1] if hidden_p is None else inputs, f.shape[-1] - 1
        rows = [torch.autograd.grad(f[..., c].sum(), wanted, retain_graph=c < last) for c in range(last + 1)]
    gradient, *others = (torch.stack(each, dim=2) for each in zip(*rows, strict=True))
    hidden = []
    if hidden_p is not None and output_p is not None:
        hidden = [operator_norms(each, dual(hidden_p), output_p) for each in others]
    return Scan(f.detach(), gradient, hidden)


def operator_norms(jacobians: Tensor, q: float, h: float = math.inf) -> Tensor:
    """The norms (...) of Jacobians (..., C, D) from the p-norm to the h-norm, where q is the dual of p.

    For C = 1 and for h = inf, the largest q-norm of a row; for p = h = 1, the largest 1-norm of a column; for
    p = h = 2, the largest singular value, as the root of the largest eigenvalue of J J^T or J^T J, whichever is
    smaller. NaN where a Jacobian is not finite.

    Raises:
        ArithmeticError: for several outputs no such formula is known in these norms.
    """
    if jacobians.shape[-2] == 1 or math.isinf(h):
        return norms(jacobians, q).amax(dim=-1)
    if h == 1 and math.isinf(q):
        return norms(jacobians.mT, 1).amax(dim=-1)
    if not q == h == 2:
        raise ArithmeticError(f"no operator norm from the {dual(q):g}-norm to the {h:g}-norm is known")
    wide = jacobians.shape[-2] <= jacobians.shape[-1]
    gram = jacobians @ jacobians.mT if wide else jacobians.mT @ jacobians
    finite = torch.isfinite(gram).all(dim=-1).all(dim=-1)
    largest = torch.linalg.eigvalsh(gram.where(finite[..., None, None], 0.0))[..., -1]
    return largest.clamp_min(0).sqrt().where(finite, math.nan)


def norms(gradients: Tensor, q: float) -> Tensor:
    """||.||_q along the last axis; torch's own vector_norm is slow for q = 1 and inf."""
    if q == 2:
        return torch.linalg.vector_norm(gradients, dim=-1)
    sizes = gradients.abs()
    return sizes.sum(dim=-1) if q == 1 else sizes.amax(dim=-1)


def grid(low: Tensor, high: Tensor, generators: Sequence[torch.Generator]) -> Tensor | None:
    """Jittered grid points (K, N, D) in the boxes low..high (K, D); None in more than two dimensions.

    Each point is moved at random within its cell, as breakpoints of networks often lie at round numbers.
    """
    dims = low.shape[1]
    if dims not in GRID_POINTS:
        return None
    n = GRID_POINTS[dims]
    axes = [torch.arange(n, dtype=torch.float64)] * dims
    cells = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, dims)  # (N, D)
    jitter = torch.stack([torch.rand(cells.shape, generator=g, dtype=torch.float64) for g in generators])
    return low.unsqueeze(1) + (high - low).unsqueeze(1) * (cells + jitter) / n


def largest(
    network: BakedNetwork, points: Tensor, gradients: Tensor, q: float, h: float = math.inf
) -> Maximum | None:
    """The largest norm of a Jacobian, K = 1, over points (N, D): at most the true constant, or an estimate.

    Args:
        gradients: (N, C, D) float64, as scanned.
        q, h: see `operator_norms`.

    Returns:
        None if every candidate lies on a breakpoint even after it was moved, or has no finite gradient.
    """
    values = operator_norms(gradients, q, h).nan_to_num(nan=-1, posinf=-1)
    candidates = [i for i in values.topk(min(_CANDIDATES, len(values))).indices.tolist() if values[i] >= 0]
    if not candidates:
        return None
    if network.is_piecewise_linear:
        confirmed = _exactly
    elif why_not_applicable(network) is None:
        confirmed = _enclosed
    else:
        return _estimate(network, points[candidates[0]], q, h)
    best = None
    for i in candidates:
        found = confirmed(network, points[i], q, h)
        if found is not None and (best is None or found.value > best.value):
            best = found
        # Rounding can put float64 on the other side of a breakpoint, and another candidate may be steeper then.
        if best is not None and best.value >= float(values[i]) * (1 - 1e-6):
            break
    return best


def _exactly(network: BakedNetwork, point: Tensor, q: float, h: float) -> Maximum | None:
    """The norm of the Jacobian at `point` (D,), or next to it if it lies on a breakpoint, rounded down."""
    for near in _nearby(point):
        region = network.linear_region(near.numpy())
        if region is not None:
            return Maximum(_norm_below(region.gradient, region.exponent, q, h), tuple(near.tolist()))
    return None


def _enclosed(network: BakedNetwork, point: Tensor, q: float, h: float) -> Maximum | None:
    """At most the norm of the Jacobian at `point` (D,), or of another one there if it lies on a breakpoint."""
    centre, radius = (part[0].numpy() for part in IntervalNetwork(network).over(point[None], point[None]).jacobian)
    if not (np.isfinite(centre).all() and np.isfinite(radius).all()):
        return None
    if q == h == 2 and len(centre) > 1:
        off = norm_above(*integers(radius.ravel()), 2)
        value = Fraction(_norm_below(*integers(centre), q, h)) - Fraction(off)
        return Maximum(round_down(max(value, Fraction(0))), tuple(point.tolist()), INTERVAL)
    least, exponent = add(integers(np.abs(centre)), integers(-radius))
    return Maximum(_norm_below(np.maximum(least, 0), exponent, q, h), tuple(point.tolist()), INTERVAL)


def _norm_below(jacobian: ExactArray, exponent: int, q: float, h: float) -> float:
    """The operator norm of a Jacobian (C, D) * 2^exponent, rounded down."""
    if len(jacobian) == 1 or math.isinf(h):
        return max(norm_below(row, exponent, q) for row in jacobian)
    if h == 1:
        return max(norm_below(column, exponent, 1) for column in jacobian.T)
    return spectral_norm_below(jacobian, exponent)


def _nearby(point: Tensor) -> Iterator[Tensor]:
    """`point` (D,) itself, then two points so close that only a breakpoint at the point itself can lie between."""
    yield point
    for shift in (2.0**-40, -(2.0**-36)):
        yield point + shift * (1 + point.abs()) * torch.linspace(1.0, 0.6, len(point), dtype=point.dtype)


def _norm_product(network: BakedNetwork) -> float:
    """About what rounding errors in the gradient are relative to, in the 2-norm and in the inf-norm."""
    product = max(math.prod(_size(layer, q) for layer in network.layers) for q in (None, math.inf))
    return product + (0.0 if network.linear is None else float(network.linear.abs().sum()))


def _size(layer: Block, q: float | None) -> float:
    """At least the norm of a layer with the absolute values of its numbers, for slopes of at most 1."""
    matrix = layer.weight[0].double().numpy()
    norm = float(np.linalg.norm(matrix, q))
    if isinstance(layer, Affine):
        return norm
    return 1 + norm * float(layer.t.max()) * float(np.linalg.norm(matrix.T, q))


def _estimate(network: BakedNetwork, point: Tensor, q: float, h: float) -> Maximum:
    """The smallest norm of a Jacobian at and next to `point`, less rounding errors, for an unknown activation.

    The neighbours unmask a breakpoint, where autograd may return what no gradient is. The value is lowered by a
    bound on the rounding error of backpropagation through n matrices of at most H columns, gamma_{n (H + 2)} times
    the product of their norms. The derivative of the activation itself is taken on trust, so this is an estimate.
    """
    around = torch.stack(list(_nearby(point)))
    jacobians = scan(network, around.unsqueeze(0)).gradient[0]
    value = float(operator_norms(jacobians, q, h).nan_to_num(nan=0).min())
    widest = max(network.n_inputs, *network.hidden_widths, 1)
    entries = math.sqrt(network.n_outputs * len(point))
    error = 4 * len(network.layers) * (widest + 2) * UNIT_ROUNDOFF * _norm_product(network) * entries
    return Maximum(max(0.0, value - error), tuple(point.tolist()), ESTIMATE)
