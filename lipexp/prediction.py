"""Predictions of a finished run for the rows of a table: what they are, and how far they hold.

Shapes: N rows, D inputs, C outputs, of one network, K = 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from lipexp.config import ConfigError
from lipexp.datasets.preprocessing import NUMBER, Floats, Preprocessing
from lipexp.networks import BakedNetwork
from lipexp.proven.radii import certified_radii, why_no_radii

ROUNDING = 2.0**-22  # of the two float32 numbers that a value of the table and a changed one become, relative


@dataclass
class Predictor:
    """Turns rows into predictions.

    Of a classifier each row has the columns

    | column         | what it says                                                                             |
    |----------------|------------------------------------------------------------------------------------------|
    | `prediction`   | the class                                                                                |
    | `runner_up`    | of several classes: the one that comes second                                            |
    | `score`        | f, whose sign decides; of several classes: how far the largest output is above the second|
    | `radius`       | the certified radius: the prediction holds for every point within it, in the norm p of   |
    |                | the constraint, after preprocessing (a distance of 1 is a standard deviation)            |
    | `reach:age`    | if asked for: how far `age` may change alone, in its own unit                            |

    and of a regression the `prediction` in the unit of the file, or `prediction:cost` for each of several targets.
    """

    network: BakedNetwork  # with its proven norms
    lipschitz: float | None  # a proven bound for the norm p
    reason: str | None  # why there are no radii
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
        self.reason = self.reason or why_no_radii(self.network)

    def __call__(self, frame: pd.DataFrame, reach: bool = False) -> pd.DataFrame:
        """The predictions for the rows of a table, with its index.

        Raises:
            ConfigError: a column is missing, or a value that it cannot take; the first such row is named.
        """
        return self.of_points(self.preprocessing.apply(frame), reach).set_index(frame.index)

    def of_points(self, points: npt.NDArray[np.float32], reach: bool = False) -> pd.DataFrame:
        """The predictions for points (N, D)."""
        x, task = torch.from_numpy(points).double(), self.preprocessing.task
        classes = np.array(self.preprocessing.classes, dtype=object)
        if task == "classification" and self.lipschitz is not None and self.reason is None:
            radii = certified_radii(self.network, x, self.lipschitz)
            found = {
                "prediction": classes[(radii.f > 0).astype(np.int64)],
                "score": radii.f,
                "radius": radii.radius,
            }
            return pd.DataFrame(found | (self.reaches(points, radii.radius) if reach else {}))
        f = self.network.double(x.unsqueeze(0))[0].numpy()  # (N, C)
        if task == "classification":
            return pd.DataFrame({"prediction": classes[(f[:, 0] > 0).astype(np.int64)], "score": f[:, 0]})
        if task == "multiclass":
            second, first = np.argsort(f, axis=1, kind="stable")[:, -2:].T
            score = f[np.arange(len(f)), first] - f[np.arange(len(f)), second]
            return pd.DataFrame({"prediction": classes[first], "runner_up": classes[second], "score": score})
        targets = self.preprocessing.targets
        names = [f"prediction:{target.name}" for target in targets] if len(targets) > 1 else ["prediction"]
        values = {
            name: each.mean + each.scale * f[:, i]
            for i, (name, each) in enumerate(zip(names, targets, strict=True))
        }
        return pd.DataFrame(values)

    def reaches(self, points: npt.NDArray[np.float32], radius: Floats) -> dict[str, Floats]:
        """`reach:NAME` of each column of numbers: how far it may change alone, in its own unit, rounded down.

        A change of one input by d moves the point by d in every norm, so the prediction holds for d <= radius. The
        input is a float32 number, and so is the changed one, whose rounding is taken off.
        """
        found, place = {}, 0
        for column in self.preprocessing.columns:
            if column.kind == NUMBER:
                size = np.abs(points[:, place].astype(np.float64))
                change = np.maximum(radius * (1 - ROUNDING) - ROUNDING * size, 0)
                found[f"reach:{column.name}"] = np.nextafter(change * column.scale * (1 - 2.0**-50), 0)
            place += len(column.features)
        return found

    def slopes(self) -> pd.DataFrame:
        """Of a regression: the largest change of each target, in its unit, per unit of each column of numbers.

        A row for each column of numbers, a column for each target, rounded up: L times the scale of the target
        over that of the column. Empty where no Lipschitz constant is proven.
        """
        if self.lipschitz is None:
            return pd.DataFrame()
        columns = {column.name: column.scale for column in self.preprocessing.columns if column.kind == NUMBER}
        constant = self.lipschitz * (1 + 2.0**-50)
        return pd.DataFrame(
            {
                target.name: [constant * target.scale / scale for scale in columns.values()]
                for target in self.preprocessing.targets
            },
            index=list(columns),
        )
