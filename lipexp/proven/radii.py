"""Certified robustness: how far a point can move before the network can decide otherwise.

f is L-Lipschitz for the norm p, so f(x') has the sign of f(x) wherever ||x' - x||_p < |f(x)| / L. Of several
outputs the largest one decides, f_c, and stays the largest wherever ||x' - x||_p < (f_c(x) - f_j(x)) / L_cj for
every other j, with L_cj the constant of f_c - f_j (see `pairs`). That is a fact about the stored weights in real
arithmetic. Two things stand between it and a number, and both are bounded here: f(x) is only known in float64, and
a network that is used evaluates f(x') in float32.

Rounding errors are followed from layer to layer. Affine layers, and activations that declare linear maps without
offsets, have proven bounds. Of another activation, such as torch's tanh, it is assumed that its float64 results
are right but for the last `LOST_BITS` of their 53 bits. Nothing is assumed of its float32 results, so there are no
radii for those.

Shapes: N points, D inputs, H features, C outputs, of one network, K = 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lipexp import record
from lipexp.activations import ALL_NORMS, Activation
from lipexp.blocks import Affine
from lipexp.datasets import Data
from lipexp.networks import BakedNetwork
from lipexp.norms import UNIT_ROUNDOFF, dual, norm_name, row_norm_bound
from lipexp.proven import Certificate
from lipexp.proven.pairs import pair_constants
from lipexp.tasks import decision

FloatArray = npt.NDArray[np.float64]


class Arithmetic(NamedTuple):
    """An IEEE format with gradual underflow."""

    unit_roundoff: float  # u: an operation is off by a factor of at most 1 +- u ...
    smallest: float  # ... or, where its result underflows, by at most this
    largest: float  # what does not overflow


LOST_BITS = 10  # of 53, which an activation that does not declare linear maps may lose to rounding
FLOAT64 = Arithmetic(UNIT_ROUNDOFF, 2.0**-1074, 2.0**1023)
FLOAT32 = Arithmetic(2.0**-24, 2.0**-149, 2.0**127)


class Radii(NamedTuple):
    """What is predicted at N points, and certified radii, rounded down; 0 where the class itself is uncertain."""

    prediction: npt.NDArray[np.int64]
    runner_up: npt.NDArray[np.int64] | None  # the class whose margin gives the radius; None for one output
    f: FloatArray  # f(x), of several outputs the margin f_c - f_j to the runner-up, in float64
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
    if not _has_linear_maps(act):
        return f"nothing is known about the rounding errors of {act.label} in float32"
    if math.inf not in act.norms:
        return f"{act.label} declares no bound in the inf-norm, in which rounding errors are followed"
    return None


def _has_linear_maps(act: Activation) -> bool:
    """Whether it declares linear maps without offsets, so that it adds one rounding error to a feature at most."""
    return act.is_piecewise_linear and act.is_homogeneous


def _spread(act: Activation) -> tuple[float, float] | None:
    """(h, c): the norm h in which errors are followed, and by how much the activation may enlarge them in it."""
    if math.inf in act.norms:
        return math.inf, 1.0
    if act.slopes is not None:
        return math.inf, max(map(abs, act.slopes))
    return (max(act.norms), 1.0) if act.norms else None


def certified_radii(network: BakedNetwork, x: Tensor, constants: float | FloatArray) -> Radii:
    """|f(x)| / L at points x (N, D), less the rounding errors, rounded down.

    With several outputs, the smallest (f_c(x) - f_j(x)) / L_cj over all j but the predicted class c.

    `radius`: every real x' with ||x' - x||_p <= radius has the class of x. From |f(x)|, or f_c(x) - f_j(x), as
    float64 finds it, the errors of finding it are taken off.

    `radius_float32`: so has what a float32 network returns for every float32 vector x' within it. The largest
    errors of such an evaluation anywhere within `radius` are taken off as well.

    Args:
        network: K = 1, float32, with the proven norms of its layers, p -> h and then h -> h, with h the norm of
            the hidden spaces. `why_no_radii` must be None; without `why_no_float32` there is no `radius_float32`.
        x: float64; the numbers themselves count, as exact.
        constants: L, or (C, C) L_ij of f_i - f_j for several outputs; proven for the norm p.
    """
    *inputs, output = _inputs(network, x)
    f, error = _evaluated(output)
    margin, unsure = margins(f, error)
    known = _less(margin, unsure)
    prediction = predicted(f)
    divisor = np.asarray(constants)[prediction] if f.shape[1] > 1 else np.full((1, 1), constants)
    apart = _quotient(known, divisor)
    nearest = np.lexsort((margin, apart), axis=1)[
        :, :1
    ]  # of equal radii, such as infinite ones, the smallest margin
    several = f.shape[1] > 1
    radius = np.take_along_axis(apart, nearest, axis=1)[:, 0]
    radii = Radii(
        prediction,
        nearest[:, 0] if several else None,
        np.take_along_axis(margin, nearest, axis=1)[:, 0] if several else f[:, 0],
        radius,
        None,
    )
    if why_no_float32(network) is not None:
        return radii
    _, wrong = margins(f, _float32_error(network, inputs, radius))
    return radii._replace(radius_float32=_quotient(_less(known, wrong), divisor).min(axis=1))


def predicted(f: FloatArray) -> npt.NDArray[np.int64]:
    """The class (N,) that outputs f (N, C) decide for."""
    return decision(torch.from_numpy(f)).numpy()


def margins(f: FloatArray, error: FloatArray) -> tuple[FloatArray, FloatArray]:
    """What must not become negative if the class is to stay, and bounds on its errors, (N, 1) or (N, C) each.

    |f| for one output; for several f_c - f_j for each j, with c the largest, and infinity for c itself.

    Args:
        error: bounds on those of f (N, C).
    """
    if f.shape[1] == 1:
        return np.abs(f), error
    own = f.argmax(axis=1)[:, None]
    with np.errstate(invalid="ignore"):
        margin = np.take_along_axis(f, own, axis=1) - f
        unsure = np.take_along_axis(error, own, axis=1) + error
    # The rounding of both.
    unsure = (unsure + UNIT_ROUNDOFF * np.abs(margin)) * (1 + 4 * UNIT_ROUNDOFF)
    np.put_along_axis(margin, own, math.inf, axis=1)
    np.put_along_axis(unsure, own, 0.0, axis=1)
    return margin, unsure


def evaluate(network: BakedNetwork, x: Tensor) -> tuple[FloatArray, FloatArray]:
    """f at points x (N, D) as float64 computes it, and bounds on |float64's f(x) - the real f(x)|, both (N, C).

    The bound holds for every order of summation, with or without fused multiply-adds: see `_layer_errors`. For an
    activation that does not declare linear maps without offsets it rests on an assumption: in float64, each
    feature that `forward` returns is off by no more than 2^-43 times the largest of 1, all |z_i| and all
    |act(z)_i|.
    """
    *_, output = _inputs(network, x)
    return _evaluated(output)


def _evaluated(output: tuple[Tensor, Tensor]) -> tuple[FloatArray, FloatArray]:
    f, error = output
    return f.numpy(), _bounded(error)


def _bounded(error: Tensor) -> FloatArray:
    return error.nan_to_num(nan=math.inf, posinf=math.inf).numpy()


def float32_error(network: BakedNetwork, x: Tensor, radius: FloatArray) -> FloatArray:
    """Bounds (N, C) on |float32's f(x') - the real f(x')| over all float32 vectors x' with ||x' - x||_p <= radius.

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
    farthest = moved = torch.from_numpy(radius)
    error = torch.zeros_like(moved)
    for layer, norm, (h, unsure) in zip(_layers(network), proven, inputs, strict=True):
        if network.linear is not None:  # whose term takes the points themselves
            moved = torch.maximum(moved, farthest)
        errors = _layer_errors(FLOAT32, layer, h.abs() + (unsure + moved).unsqueeze(1), error)
        error = _longest(errors, math.inf)
        moved = moved * norm * (1 + 4 * UNIT_ROUNDOFF)
    return _bounded(errors)


def _inputs(network: BakedNetwork, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The input of each layer in float64 (N, in), each with a bound (N,) on its error; at last the outputs (N, C),
    with a bound on the error of each of them.

    Errors are bounded in a norm in which the activation is known to enlarge them no more than c times.
    """
    spread = _spread(network.act)
    assert spread is not None
    norm, factor = spread
    h, error = x, x.new_zeros(len(x))
    for i, (layer, act) in enumerate(zip(_layers(network), network.double.acts, strict=True)):
        if network.linear is not None and i == len(network.layers) - 1:
            h = torch.cat([h, x], dim=1)
        yield h, error
        errors = _layer_errors(FLOAT64, layer, h.abs() + error.unsqueeze(1), error, norm)
        h = torch.addmm(layer.bias[0, 0].double(), h, layer.weight[0].double().T)
        if i < len(network.layers) - 1:
            z, h = h, act(h.unsqueeze(0))[0]
            error = _longest(errors, norm) * factor * (1 + 2 * UNIT_ROUNDOFF)
            if not _has_linear_maps(act):
                own = 2.0**LOST_BITS * UNIT_ROUNDOFF * torch.cat([z, h], dim=1).abs().amax(dim=1).clamp_min(1)
                of_all = h.shape[1] ** (1 / norm)  # the norm of a vector of ones
                error = (error + of_all * own) * (1 + 8 * UNIT_ROUNDOFF)
    yield h, errors


def _layers(network: BakedNetwork) -> Sequence[Affine]:
    """The layers; a linear term A beside them is added as W h + A x + b = [W A] [h x] + b.

    In whatever order that is computed, it is one sum of products.
    """
    if network.linear is None:
        return network.affine
    *hidden, (weight, bias) = network.affine
    return [*hidden, Affine(torch.cat([weight, network.linear], dim=2), bias)]


def _layer_errors(
    arithmetic: Arithmetic, layer: Affine, size: Tensor, error: Tensor, norm: float = math.inf
) -> Tensor:
    """Bounds (N, out) on the errors behind a layer z = W h + b and an activation that follows it.

    With computed inputs h^, a sum of n products and a bias is computed as
    |z^ - z| <= gamma_{n+1} (|W| |h^| + |b|) + |W (h^ - h)|, with gamma_k = k u / (1 - k u), in whatever order;
    |w (h^ - h)| <= ||w||_dual ||h^ - h|| for each row w. An activation that declares linear maps without offsets
    has act(0) = 0 and adds one rounding of a product at most (sorting and ReLU add none), which is allowed for
    here.

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
    return found * (1 + 4 * (n + 8) * UNIT_ROUNDOFF)


def _longest(errors: Tensor, norm: float) -> Tensor:
    """(N,) the norms of errors (N, out), rounded up."""
    length = torch.linalg.vector_norm(errors, ord=norm, dim=1)
    if norm == 2:
        length = length + 2.0**-500  # for squares that underflow
    return length * (1 + 4 * (errors.shape[1] + 2) * UNIT_ROUNDOFF)


def _less(value: FloatArray, error: FloatArray) -> FloatArray:
    """value - error, rounded down; 0 where nothing is left, or the error has no bound."""
    left = np.subtract(value, error, out=np.zeros_like(value), where=np.isfinite(error))
    return np.nextafter(np.maximum(left, 0), 0)


def _quotient(value: FloatArray, constant: FloatArray) -> FloatArray:
    """value / L, rounded down, for values that are not negative; a constant function moves nowhere."""
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        found = np.nextafter(value / constant, 0)
    return np.where(constant > 0, found, np.where(value > 0, np.inf, 0.0))


# What is reported ------------------------------------------------------------------------------------------------


@dataclass
class Robustness:
    """The certified radii of a classifier's validation and test points, or why there are none."""

    p: float
    lipschitz: float | None  # the proven bound of the network; of several outputs each pair has its own
    columns: dict[str, npt.NDArray[Any]] | None  # of radii.csv
    reason: str | None  # why there are none, or why the column `radius_float32` is empty
    pairs: record.Pairs | None = None  # of several outputs

    def summary(self, radii: Iterable[float]) -> record.Robustness:
        """Certified accuracy within each radius: the fraction of points that are right and proven to stay so.

        The median radius counts 0 for a point whose class is wrong: half of all points are right, and stay so.
        """
        radii = list(radii)
        parts = {split: self._certified(split, radii) for split in ("val", "test")}
        return record.Robustness(norm_name(self.p), self.lipschitz, **parts, reason=self.reason, pairs=self.pairs)

    def of(self, split: str) -> dict[str, npt.NDArray[Any]]:
        """The columns of the points of one part of the data."""
        assert self.columns is not None
        return {name: column[self.columns["split"] == split] for name, column in self.columns.items()}

    def _certified(self, split: str, radii: Sequence[float]) -> record.Certified:
        if self.columns is None:
            return record.Certified(None, None)
        own = self.of(split)
        held = np.where(own["correct"] == 1, own["radius"], 0.0)
        median = float(np.median(held))
        accuracy = {record.radius_name(radius): float((held >= radius).mean()) for radius in radii}
        return record.Certified(accuracy, median if math.isfinite(median) else None)


def assess(
    network: BakedNetwork, points: Mapping[str, tuple[Tensor, Tensor]], certificate: Certificate
) -> Robustness:
    """The certified radii of a classifier.

    Args:
        network: K = 1, with its proven norms.
        points: points (N, D) and their classes (N,), float64, of the parts of the data, val and test.
    """
    p, lipschitz = certificate.chain.p, certificate.value
    reason = certificate.reason or why_no_radii(network)
    if lipschitz is None or reason is not None:
        return Robustness(p, None, None, reason)
    pairs = pair_constants(network, certificate) if network.n_outputs > 1 else None
    constants = lipschitz if pairs is None else pairs.constants
    found = {split: certified_radii(network, x, constants) for split, (x, _) in points.items()}
    tables = [_table(split, *points[split], radii) for split, radii in found.items()]
    columns = {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}
    summary = None
    if pairs is not None:
        joint = certified_radii(network, points["test"][0], np.full_like(pairs.constants, pairs.joint)).radius
        summary = pairs.summary(found["test"].radius, joint)
    return Robustness(p, lipschitz, columns, why_no_float32(network), summary)


def decided(data: Data) -> dict[str, tuple[Tensor, Tensor]]:
    """The points and classes of a run that have radii: those of validation and test, in float64."""
    parts = {split: data.part(split) for split in ("val", "test")}
    return {split: (torch.from_numpy(x).double(), torch.from_numpy(y).double()) for split, (x, y) in parts.items()}


def _table(split: str, x: Tensor, y: Tensor, radii: Radii) -> dict[str, npt.NDArray[Any]]:
    """The rows of radii.csv of one part of the data. For several outputs `f` is the margin to the runner-up."""
    columns = {
        "split": np.full(len(x), split),
        "index": np.arange(len(x)),
        **{f"x{i}": x[:, i].numpy() for i in range(x.shape[1])},
        "y": y.numpy().astype(np.int64),
        "prediction": radii.prediction,
        "runner_up": radii.runner_up,
        "correct": (radii.prediction == y.numpy()).astype(np.int64),
        "f": radii.f,
        "radius": radii.radius,
        "radius_float32": np.full(len(x), "") if radii.radius_float32 is None else radii.radius_float32,
    }
    return {name: column for name, column in columns.items() if column is not None}
