"""Certified robustness: how far a point can move before the network can decide otherwise.

f is L-Lipschitz for the norm p, so f(x') has the sign of f(x) wherever ||x' - x||_p < |f(x)| / L. Of several
outputs the largest one decides, f_c, and stays the largest wherever ||x' - x||_p < (f_c(x) - f_j(x)) / L_cj for
every other j, with L_cj the constant of f_c - f_j (see `pairs`). That is a fact about the stored weights in real
arithmetic. Two things stand between it and a number, and `rounding` bounds both: f(x) is only known in float64,
and a network that is used evaluates f(x') in float32.

Shapes: N points, D inputs, H features, C outputs, of one network, K = 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lipexp import record
from lipexp.datasets import Data
from lipexp.networks import BakedNetwork
from lipexp.norms import UNIT_ROUNDOFF, norm_name
from lipexp.proven import Certificate, local
from lipexp.proven.pairs import pair_constants
from lipexp.proven.rounding import float32_error, followed, outputs, why_no_float32, why_no_radii
from lipexp.tasks import decision

FloatArray = npt.NDArray[np.float64]


class Radii(NamedTuple):
    """What is predicted at N points, and certified radii, rounded down; 0 where the class itself is uncertain."""

    prediction: npt.NDArray[np.int64]
    runner_up: npt.NDArray[np.int64] | None  # the class whose margin gives the radius; None for one output
    f: FloatArray  # f(x), of several outputs the margin f_c - f_j to the runner-up, in float64
    radius: FloatArray  # in real arithmetic
    radius_float32: FloatArray | None  # for a network that is evaluated in float32, as torch does; None: unknown


def certified_radii(network: BakedNetwork, x: Tensor, constants: float | FloatArray) -> Radii:
    """|f(x)| / L at points x (N, D), less the rounding errors, rounded down.

    With several outputs, the smallest (f_c(x) - f_j(x)) / L_cj over all j but the predicted class c.

    `radius`: every real x' with ||x' - x||_p <= radius has the class of x. From |f(x)|, or f_c(x) - f_j(x), as
    float64 finds it, the errors of finding it are taken off.

    `radius_float32`: so has what a float32 network returns for every float32 vector x' within it. The largest
    errors of such an evaluation anywhere within `radius` are taken off as well.

    Args:
        network: K = 1, float32, with the proven norms of its layers, p -> h and then h -> h, with h the norm of
            the hidden spaces, which is 2 for residual layers. `why_no_radii` must be None; without
            `why_no_float32` there is no `radius_float32`.
        x: float64; the numbers themselves count, as exact.
        constants: L, or (C, C) L_ij of f_i - f_j for several outputs; proven for the norm p.
    """
    features = followed(network, x)
    f, error = outputs(features)
    margin, unsure = margins(f, error)
    known = _less(margin, unsure)
    prediction = predicted(f)
    divisor = _divisor(f, constants)
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
    _, wrong = margins(f, float32_error(network, features, radius))
    return radii._replace(radius_float32=_quotient(_less(known, wrong), divisor).min(axis=1))


def local_radii(
    network: BakedNetwork, x: Tensor, constants: float | FloatArray, norms: tuple[float, float]
) -> FloatArray:
    """Radii (N,) as `certified_radii` finds them, in real arithmetic, by constants of the balls; see `local`.

    At least those by the given constants, and these where there are no local ones for the network.

    Args:
        norms: p and that of the hidden spaces.
    """
    f, error = outputs(followed(network, x))
    known, divisor = _less(*margins(f, error)), _divisor(f, constants)
    if not len(x) or local.why_not_applicable(network, len(x)) is not None:
        return _quotient(known, divisor).min(axis=1)
    return np.maximum(local.radii(network, x, known, divisor, norms), _quotient(known, divisor).min(axis=1))


def _divisor(f: FloatArray, constants: float | FloatArray) -> FloatArray:
    """(N, 1) or (N, C) what the margins are divided by: L, or L_cj for the class c of each point."""
    return np.asarray(constants)[predicted(f)] if f.shape[1] > 1 else np.full((len(f), 1), constants)


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

    @property
    def largest(self) -> str:
        """The column of the largest radii that are proven in real arithmetic."""
        assert self.columns is not None
        return "radius_exact" if "radius_exact" in self.columns else "radius_local"

    def summary(self, radii: Iterable[float]) -> record.Robustness:
        """Certified accuracy within each radius: the fraction of points that are right and proven to stay so.

        The median radius counts 0 for a point whose class is wrong: half of all points are right, and stay so.
        """
        radii = list(radii)
        parts = {split: self._certified(split, radii) for split in ("val", "test")}
        return record.Robustness(
            norm_name(self.p),
            self.lipschitz,
            **parts,
            reason=self.reason,
            pairs=self.pairs,
            exact=self._tightness(),
        )

    def of(self, split: str) -> dict[str, npt.NDArray[Any]]:
        """The columns of the points of one part of the data."""
        assert self.columns is not None
        return {name: column[self.columns["split"] == split] for name, column in self.columns.items()}

    def _certified(self, split: str, radii: Sequence[float]) -> record.Certified:
        if self.columns is None:
            return record.Certified(None, None)
        own, found = self.of(split), list[Any]()
        if not len(own["radius"]):
            return record.Certified(None, None)
        for name in ("radius", "radius_local"):
            held = np.where(own["correct"] == 1, own[name], 0.0)
            median = float(np.median(held))
            found.append({record.radius_name(radius): float((held >= radius).mean()) for radius in radii})
            found.append(median if math.isfinite(median) else None)
        return record.Certified(*found)

    def _tightness(self) -> record.Tightness | None:
        """How close to the exact distances the radii of test points come; None where these are not known."""
        if self.columns is None or "radius_exact" not in self.columns:
            return None
        own = self.of("test")
        chosen = (own["radius_exact"] > 0) & np.isfinite(own["radius_exact"])
        if not chosen.any():
            return None
        distance, *radii = (own[name][chosen] for name in ("radius_exact", "radius", "radius_local"))
        return record.Tightness(float(np.median(distance)), *(float(np.median(r / distance)) for r in radii))


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
    exact = certificate.proofs["exact"].constants if "exact" in certificate.proofs else None
    tables = []
    for split, radii in found.items():
        x, y = points[split]
        near = local_radii(network, x, constants, (p, certificate.chain.hidden_p))
        columns = {"radius_local": near}
        if exact is not None and exact.boundary is not None:
            distance = np.where(radii.radius > 0, exact.boundary.distances(x.numpy(), p), 0)
            columns["radius_exact"] = np.maximum(distance, near)  # whose own rounding may leave it a little below
        tables.append(_table(split, x, y, radii) | columns)
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
