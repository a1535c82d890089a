"""Certified robustness: how far a test point can move before the network can decide otherwise.

f is L-Lipschitz for the norm p, so f(x') has the sign of f(x) wherever ||x' - x||_p < |f(x)| / L. That is a fact
about the stored weights in real arithmetic. Two things stand between it and a number, and both are bounded here:
|f(x)| is only known in float64, and a network that is used evaluates f(x') in float32.

Rounding errors are followed from layer to layer. Affine layers, and activations that declare their linear maps,
have proven bounds. Of another activation, such as torch's tanh, it is assumed that its float64 results are right
but for the last `LOST_BITS` of their 53 bits. Nothing is assumed of its float32 results, so there are no radii for
those.

Shapes: N points, D inputs, H features, of one network, K = 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lipexp import record
from lipexp.activations import ALL_NORMS, Activation
from lipexp.networks import Affine, BakedNetwork
from lipexp.norms import UNIT_ROUNDOFF, dual, norm_name, row_norm_bound

FloatArray = npt.NDArray[np.float64]


class Arithmetic(NamedTuple):
    """An IEEE format with gradual underflow."""

    unit_roundoff: float  # u: an operation is off by a factor of at most 1 +- u ...
    smallest: float  # ... or, where its result underflows, by at most this
    largest: float  # what does not overflow


LOST_BITS = 10  # of 53, which an activation that does not declare its linear maps may lose to rounding
FLOAT64 = Arithmetic(UNIT_ROUNDOFF, 2.0**-1074, 2.0**1023)
FLOAT32 = Arithmetic(2.0**-24, 2.0**-149, 2.0**127)


class Radii(NamedTuple):
    """The certified radii of N points, each rounded down; 0 where not even the sign of f(x) is certain."""

    f: FloatArray  # in float64
    radius: FloatArray  # in real arithmetic
    radius_float32: FloatArray | None  # for a network that is evaluated in float32, as torch does; None: unknown


def why_no_radii(network: BakedNetwork) -> str | None:
    """Why no radius can be proven for the network, whatever its Lipschitz constant; None if one can."""
    if not network.is_plain:
        return "rounding errors are followed through affine layers only"
    if _spread(network.act) is None:
        return f"{network.act.label} declares neither norms nor slopes, which would bound its rounding errors"
    return None


def why_no_float32(network: BakedNetwork) -> str | None:
    """Why no radius can be proven for an evaluation in float32, where `why_no_radii` is None; None if one can."""
    act = network.act
    if not act.is_piecewise_linear:
        return f"nothing is known about the rounding errors of {act.label} in float32"
    if math.inf not in act.norms:
        return f"{act.label} declares no bound in the inf-norm, in which rounding errors are followed"
    return None


def _spread(act: Activation) -> tuple[float, float] | None:
    """(h, c): the norm h in which errors are followed, and by how much the activation may enlarge them in it."""
    if math.inf in act.norms:
        return math.inf, 1.0
    if act.slopes is not None:
        return math.inf, max(map(abs, act.slopes))
    return (max(act.norms), 1.0) if act.norms else None


def certified_radii(network: BakedNetwork, x: Tensor, lipschitz: float) -> Radii:
    """|f(x)| / L at points x (N, D), less the rounding errors, rounded down.

    `radius`: f(x') has the sign of f(x) for every real x' with ||x' - x||_p <= radius. From |f(x)|, as float64
    finds it, the error of finding it is taken off.

    `radius_float32`: so has what a float32 network returns for every float32 vector x' within it. The largest
    error of such an evaluation anywhere within `radius` is taken off as well.

    Args:
        network: K = 1, float32, with the proven norms of its layers, p -> h and then h -> h, with h the norm of
            the hidden spaces. `why_no_radii` must be None; without `why_no_float32` there is no `radius_float32`.
        x: float64; the numbers themselves count, as exact.
        lipschitz: L, a proven bound for the norm p.
    """
    *inputs, output = _inputs(network, x)
    f, error = _evaluated(output)
    known = _less(np.abs(f), error)
    radius = _quotient(known, lipschitz)
    if why_no_float32(network) is not None:
        return Radii(f, radius, None)
    wrong = _float32_error(network, inputs, radius)
    return Radii(f, radius, _quotient(_less(known, wrong), lipschitz))


def evaluate(network: BakedNetwork, x: Tensor) -> tuple[FloatArray, FloatArray]:
    """f at points x (N, D) as float64 computes it, and a bound on |float64's f(x) - the real f(x)|, both (N,).

    The bound holds for every order of summation, with or without fused multiply-adds: see `_layer_error`. For an
    activation that does not declare its linear maps it rests on an assumption: in float64, each feature that
    `forward` returns is off by no more than 2^-43 times the largest of 1, all |z_i| and all |act(z)_i|.
    """
    *_, output = _inputs(network, x)
    return _evaluated(output)


def _evaluated(output: tuple[Tensor, Tensor]) -> tuple[FloatArray, FloatArray]:
    f, error = output
    if f.shape[1] != 1:
        raise ValueError(f"a sign needs one output; this network has {f.shape[1]}")
    return f[:, 0].numpy(), error.nan_to_num(nan=math.inf, posinf=math.inf).numpy()


def float32_error(network: BakedNetwork, x: Tensor, radius: FloatArray) -> FloatArray:
    """A bound (N,) on |float32's f(x') - the real f(x')| over all float32 vectors x' with ||x' - x||_p <= radius.

    A coordinate of x' differs by at most `radius` from that of x, whatever p is, and the features behind a layer
    by at most radius times the norms of the layers so far; in the inf-norm, times the first layer's norm and the
    row sums of later ones. The arithmetic is IEEE's float32, as on a CPU; TF32 and
    bfloat16 round more.
    """
    *inputs, _ = _inputs(network, x)
    return _float32_error(network, inputs, radius)


def _float32_error(
    network: BakedNetwork, inputs: Sequence[tuple[Tensor, Tensor]], radius: FloatArray
) -> FloatArray:
    """`float32_error` from the inputs of the layers at x."""
    proven = [norm for (norm,) in network.norms]
    if not set(network.act.norms) >= ALL_NORMS:  # the norm of the hidden spaces may be one of those that it lacks
        proven = [proven[0], *(row_norm_bound(layer.weight[0].numpy(), 1) for layer in network.layers[1:])]
    moved = torch.from_numpy(radius)
    error = torch.zeros_like(moved)
    for layer, norm, (h, unsure) in zip(network.layers, proven, inputs, strict=True):
        error = _layer_error(FLOAT32, layer, h.abs() + (unsure + moved).unsqueeze(1), error)
        moved = moved * norm * (1 + 4 * UNIT_ROUNDOFF)
    return error.nan_to_num(nan=math.inf, posinf=math.inf).numpy()


def _inputs(network: BakedNetwork, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The input of each layer, at last the output, in float64 (N, in), each with a bound (N,) on its error.

    Errors are bounded in a norm in which the activation is known to enlarge them no more than c times.
    """
    spread = _spread(network.act)
    assert spread is not None
    norm, factor = spread
    h, error = x, x.new_zeros(len(x))
    for i, layer in enumerate(network.layers):
        yield h, error
        error = _layer_error(FLOAT64, layer, h.abs() + error.unsqueeze(1), error, norm)
        h = torch.addmm(layer.bias[0, 0].double(), h, layer.weight[0].double().T)
        if i < len(network.layers) - 1:
            z, h = h, network.act(h.unsqueeze(0))[0]
            error = error * factor * (1 + 2 * UNIT_ROUNDOFF)
            if not network.act.is_piecewise_linear:
                own = 2.0**LOST_BITS * UNIT_ROUNDOFF * torch.cat([z, h], dim=1).abs().amax(dim=1).clamp_min(1)
                of_all = h.shape[1] ** (1 / norm)  # the norm of a vector of ones
                error = (error + of_all * own) * (1 + 8 * UNIT_ROUNDOFF)
    yield h, error


def _layer_error(
    arithmetic: Arithmetic, layer: Affine, size: Tensor, error: Tensor, norm: float = math.inf
) -> Tensor:
    """A bound (N,) on the error behind a layer z = W h + b and an activation that follows it, in a norm.

    With computed inputs h^, a sum of n products and a bias is computed as
    |z^ - z| <= gamma_{n+1} (|W| |h^| + |b|) + |W (h^ - h)|, with gamma_k = k u / (1 - k u), in whatever order;
    |w (h^ - h)| <= ||w||_dual ||h^ - h|| for each row w. An activation that declares its linear maps has
    act(0) = 0 and adds one rounding of a product at most (sorting and ReLU add none), which is allowed for here.

    Args:
        size: (N, in), at least |h|.
        error: (N,) of h^ in the norm.
        norm: 1, 2 or inf.

    Reference: Higham 2002, "Accuracy and Stability of Numerical Algorithms", section 3.1.
    """
    unit, n = arithmetic.unit_roundoff, layer.weight.shape[2]
    gamma = (n + 1) * unit / (1 - (n + 1) * unit) if (n + 1) * unit < 1 else math.inf
    weight = layer.weight[0].double().abs()
    terms = torch.addmm(layer.bias[0, 0].double().abs(), size + error.unsqueeze(1), weight.T)  # |W| |h^| + |b|
    lengths = torch.linalg.vector_norm(weight, ord=dual(norm), dim=1)
    found = (gamma + 2 * unit) * terms + torch.outer(error, lengths) + (n + 2) * arithmetic.smallest
    found = found.masked_fill(~(terms <= arithmetic.largest), math.inf)
    # The bound itself is computed in float64, as a sum of n + 1 terms that are not negative and a few others.
    longest = torch.linalg.vector_norm(found, ord=norm, dim=1)
    if norm == 2:
        longest = longest + 2.0**-500  # for squares that underflow
    return longest * (1 + 4 * (n + found.shape[1] + 8) * UNIT_ROUNDOFF)


def _less(value: FloatArray, error: FloatArray) -> FloatArray:
    """value - error, rounded down; 0 where nothing is left, or the error has no bound."""
    left = np.subtract(value, error, out=np.zeros_like(value), where=np.isfinite(error))
    return np.nextafter(np.maximum(left, 0), 0)


def _quotient(value: FloatArray, lipschitz: float) -> FloatArray:
    """value / L, rounded down, for values that are not negative; a constant function moves nowhere."""
    if lipschitz == 0:
        return np.where(value > 0, np.inf, 0.0)
    with np.errstate(over="ignore"):
        return np.nextafter(value / lipschitz, 0)


# What is reported ------------------------------------------------------------------------------------------------


@dataclass
class Robustness:
    """The certified radii of a classifier's test points, or why there are none."""

    p: float
    lipschitz: float | None  # the proven bound behind the radii
    columns: dict[str, npt.NDArray[Any]] | None  # of radii.csv
    reason: str | None  # why there are none, or why the column `radius_float32` is empty

    def summary(self, radii: Iterable[float]) -> record.Robustness:
        """Certified accuracy within each radius: the fraction of points that are right and proven to stay so.

        The median radius counts 0 for a point whose class is wrong: half of all points are right, and stay so.
        """
        if self.columns is None:
            return record.Robustness(norm_name(self.p), self.lipschitz, None, None, self.reason)
        held = np.where(self.columns["correct"] == 1, self.columns["radius"], 0.0)
        median = float(np.median(held))
        return record.Robustness(
            norm_name(self.p),
            self.lipschitz,
            {record.radius_name(radius): float((held >= radius).mean()) for radius in radii},
            median if math.isfinite(median) else None,
            self.reason,
        )


def assess(
    network: BakedNetwork, x: Tensor, y: Tensor, p: float, lipschitz: float | None, reason: str | None
) -> Robustness:
    """The certified radii of a classifier at test points x (N, D) of classes y (N,).

    Args:
        network: K = 1, with its proven norms.
        lipschitz: the proven bound for the norm p; None: there is none, for this `reason`.
    """
    reason = reason or why_no_radii(network)
    if lipschitz is None or reason is not None:
        return Robustness(p, None, None, reason)
    radii = certified_radii(network, x, lipschitz)
    prediction = (radii.f > 0).astype(np.int64)
    columns = {
        "index": np.arange(len(x)),
        **{f"x{i}": x[:, i].numpy() for i in range(x.shape[1])},
        "y": y.numpy().astype(np.int64),
        "prediction": prediction,
        "correct": (prediction == y.numpy()).astype(np.int64),
        **radii._asdict(),
    }
    if radii.radius_float32 is None:
        columns["radius_float32"] = np.full(len(x), "")
    return Robustness(p, lipschitz, columns, why_no_float32(network))
