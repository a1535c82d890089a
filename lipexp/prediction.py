"""Predictions of a finished run for the rows of a table: what they are, and how far they hold.

Shapes: N rows, D inputs, C outputs, of one network, K = 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from lipexp.config import ConfigError
from lipexp.datasets.preprocessing import NUMBER, Floats, Preprocessing
from lipexp.networks import BakedNetwork
from lipexp.proven import Certificate
from lipexp.proven.pairs import Pairs, feature_constants, pair_constants
from lipexp.proven.radii import certified_radii, margins, predicted
from lipexp.proven.rounding import why_no_radii

ROUNDING = 2.0**-22  # of the two float32 numbers that a value of the table and a changed one become, relative


@dataclass
class Predictor:
    """Turns rows into predictions.

    Of a classifier each row has the columns

    | column         | what it says                                                                             |
    |----------------|------------------------------------------------------------------------------------------|
    | `prediction`   | the class                                                                                |
    | `runner_up`    | of several classes: the one whose constant and output give the radius; without radii,    |
    |                | the one with the second largest output                                                   |
    | `score`        | f, whose sign decides; of several classes: how far the largest output is above that of   |
    |                | the runner-up                                                                            |
    | `radius`       | the certified radius: the prediction holds for every point within it, in the norm p of   |
    |                | the constraint, after preprocessing (a distance of 1 is a standard deviation)            |
    | `reach:age`    | if asked for: how far `age` may change alone, in its own unit                            |

    and of a regression the `prediction` in the unit of the file, or `prediction:cost` for each of several targets.
    """

    network: BakedNetwork  # with its proven norms
    certificate: Certificate
    preprocessing: Preprocessing

    def __post_init__(self) -> None:
        found = self.preprocessing
        outputs = len(found.targets) if found.task == "regression" else len(found.classes)
        outputs = 1 if found.task == "classification" else outputs
        expected = (self.network.n_inputs, self.network.n_outputs)
        if (len(found.features), outputs) != expected:
            sizes = (
                f"{len(found.features)} inputs and {outputs} outputs, the network {expected[0]} and {expected[1]}"
            )
            raise ConfigError("preprocessing.json", None, f"has {sizes}")
        self.reason = self.certificate.reason or why_no_radii(self.network)  # why there are no radii

    @cached_property
    def pairs(self) -> Pairs | None:
        """The constants of the differences of outputs, if each stands for a class."""
        several = self.preprocessing.task == "multiclass"
        return pair_constants(self.network, self.certificate) if several else None

    @cached_property
    def gains(self) -> Floats:
        """How much farther one input may move alone, for each class (C, D), or (1, D) for one output.

        The radius is the smallest m_j / L_cj over other classes j, with the margins m_j = f_c - f_j. Input k alone
        may move by the smallest m_j / L^k_cj, which is at least the radius times the smallest L_cj / L^k_cj.
        """
        alone = feature_constants(self.network, self.certificate, self.pairs)  # (D,) or (C, C, D)
        constants: Any = self.certificate.value if self.pairs is None else self.pairs.constants[:, :, None]
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            found = np.nan_to_num(constants / alone, nan=0.0)
        # Infinity says that nothing depends on the input, and is no quotient that overflows.
        found = np.where(alone == 0, np.inf, np.nextafter(found, 0))
        return found[None] if self.pairs is None else found.min(axis=1)

    def __call__(self, frame: pd.DataFrame, reach: bool = False) -> pd.DataFrame:
        """The predictions for the rows of a table, with its index.

        Raises:
            ConfigError: a column is missing, or a value that it cannot take; the first such row is named.
        """
        if not isinstance(frame, pd.DataFrame):
            raise ConfigError(
                "frame", type(frame).__name__, "must be a pandas DataFrame with the columns of the table"
            )
        return self.of_points(self.preprocessing.apply(frame), reach).set_index(frame.index)

    def of_points(self, points: npt.NDArray[np.float32], reach: bool = False) -> pd.DataFrame:
        """The predictions for points (N, D)."""
        x, task = torch.from_numpy(points).double(), self.preprocessing.task
        if task == "regression":
            f, targets = self.network.double(x.unsqueeze(0))[0].numpy(), self.preprocessing.targets  # (N, C)
            names = [f"prediction:{target.name}" for target in targets] if len(targets) > 1 else ["prediction"]
            values = zip(names, targets, f.T, strict=True)
            return pd.DataFrame({name: target.mean + target.scale * own for name, target, own in values})
        classes = np.array(self.preprocessing.classes, dtype=object)
        if self.reason is None:
            constants = self.certificate.value if self.pairs is None else self.pairs.constants
            assert constants is not None
            radii = certified_radii(self.network, x, constants)
            prediction, runner_up, score, radius = radii[:4]
        else:
            f, radius = self.network.double(x.unsqueeze(0))[0].numpy(), None
            prediction, (margin, _) = predicted(f), margins(f, np.zeros_like(f))
            runner_up = margin.argmin(axis=1) if task == "multiclass" else None
            score = margin.min(axis=1) if task == "multiclass" else f[:, 0]
        found = {"prediction": classes[prediction]}
        found |= {} if runner_up is None else {"runner_up": classes[runner_up]}
        found |= {"score": score} | ({} if radius is None else {"radius": radius})
        if reach and radius is not None:
            found |= self.reaches(points, radius, prediction)
        return pd.DataFrame(found)

    def reaches(
        self, points: npt.NDArray[np.float32], radius: Floats, prediction: npt.NDArray[np.int64]
    ) -> dict[str, Floats]:
        """`reach:NAME` of each column of numbers: how far it may change alone, in its own unit, rounded down.

        The input is a float32 number, and so is the changed one, whose rounding is taken off.
        """
        gains = self.gains[prediction if self.pairs is not None else 0]  # (N, D), or (D,)
        found, place = {}, 0
        for column in self.preprocessing.columns:
            if column.kind == NUMBER:
                size = np.abs(points[:, place].astype(np.float64))
                alone = np.multiply(radius, gains[..., place], out=np.zeros_like(radius), where=radius > 0)
                change = np.maximum(alone * (1 - ROUNDING) - ROUNDING * size, 0)
                reach = np.nextafter(change * column.scale * (1 - 2.0**-50), 0)
                unbounded = np.isinf(gains[..., place]) & (radius > 0)
                found[f"reach:{column.name}"] = np.where(unbounded, np.inf, reach)
            place += len(column.features)
        return found

    def slopes(self) -> pd.DataFrame:
        """Of a regression: the largest change of each target, in its unit, per unit of each column of numbers.

        A row for each column of numbers, a column for each target, rounded up. Empty where no constant is proven.
        """
        if self.certificate.value is None:
            return pd.DataFrame()
        constants = np.atleast_2d(feature_constants(self.network, self.certificate)) * (1 + 2.0**-50)  # (C, D)
        found: dict[str, list[float]] = {target.name: [] for target in self.preprocessing.targets}
        names, place = [], 0
        for column in self.preprocessing.columns:
            if column.kind == NUMBER:
                names.append(column.name)
                for target, constant in zip(self.preprocessing.targets, constants[:, place], strict=True):
                    found[target.name].append(float(constant * target.scale / column.scale))
            place += len(column.features)
        return pd.DataFrame(found, index=names)


def in_units(predictor: Predictor, radii: dict[str, Any] | None) -> tuple[dict[str, Floats], dict[str, Any]]:
    """What certified bounds mean in the units of a table: new columns of radii.csv, and one number a column of it.

    For a classifier that is its reach in each row, and the median of the test rows; for a regression there are no
    rows, and a number for each target: see `Predictor.slopes`.

    Args:
        radii: the columns of radii.csv; None where there are none.
    """
    if predictor.preprocessing.task == "regression":
        slopes: Any = predictor.slopes().to_dict("index")
        return {}, slopes
    if radii is None:
        return {}, {}
    points = np.stack([radii[f"x{i}"] for i in range(predictor.network.n_inputs)], axis=1).astype(np.float32)
    reaches = predictor.reaches(points, radii["radius"], radii["prediction"])
    test = radii["split"] == "test"
    medians = {name.removeprefix("reach:"): float(np.median(reach[test])) for name, reach in reaches.items()}
    return reaches, {name: {"reach": value} for name, value in medians.items() if np.isfinite(value)}
