"""What is exported of a run: from points in the units of the data to outputs and predictions.

Shapes: N points, D inputs of the network, C outputs. What a file takes is x, float32 (N, columns): the D inputs
themselves or, for a run that was trained on a table, its columns as they are before they are preprocessed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lipexp.datasets.preprocessing import CATEGORY, Preprocessing
from lipexp.networks import BakedNetwork
from lipexp.tasks import Task, decision

LARGEST = float(np.finfo(np.float32).max)


class Outputs(NamedTuple):
    """What is said of N points."""

    f: Tensor  # (N, C), in the unit of the target
    prediction: Tensor | None  # (N,) int64, the number of the class; None where nothing is classified


class Encoding(NamedTuple):
    """Preprocessing as arithmetic on x (N, columns), of which a category is its place in the list of them.

    A missing value is NaN, and becomes `fill`. A row is encodable if |x - middle| <= half in every column. With
    v = x[column[j]], input j of the network is (v - mean[j]) / scale[j] or, where `is_category`, 1 if v = place[j]
    and else 0.
    """

    fill: Tensor  # (columns,) float32; NaN where a missing value stays missing
    middle: Tensor
    half: Tensor
    column: Tensor  # (D,) int64
    is_category: Tensor  # (D,) bool
    place: Tensor  # (D,) float32
    mean: Tensor  # (D,) float64
    scale: Tensor

    @classmethod
    def of(cls, preprocessing: Preprocessing) -> Encoding:
        columns = preprocessing.columns
        inputs = [
            (j, column.kind == CATEGORY, place, column.mean, column.scale)
            for j, column in enumerate(columns)
            for place in range(len(column.features))
        ]
        column, is_category, place, mean, scale = zip(*inputs, strict=True)
        ends = [(len(c.categories) - 1) / 2 if c.kind == CATEGORY else None for c in columns]
        return cls(
            torch.tensor([np.nan if c.fill is None else c.fill for c in columns]),
            torch.tensor([end or 0.0 for end in ends]),
            torch.tensor([LARGEST if end is None else end for end in ends]),
            torch.tensor(column),
            torch.tensor(is_category),
            torch.tensor(place, dtype=torch.float32),
            torch.tensor(mean, dtype=torch.float64),
            torch.tensor(scale, dtype=torch.float64),
        )


@dataclass(frozen=True)
class Model:
    """A network, K = 1, and what stands before and behind it."""

    network: BakedNetwork
    task: Task
    features: Sequence[str] = ()  # the names of the inputs, if they have any
    preprocessing: Preprocessing | None = None

    @cached_property
    def encoding(self) -> Encoding | None:
        """The preprocessing as arithmetic."""
        return None if self.preprocessing is None else Encoding.of(self.preprocessing)

    @property
    def columns(self) -> list[str]:
        """The names of the columns of x."""
        if self.preprocessing is not None:
            return [column.name for column in self.preprocessing.columns]
        return [*self.features] or [f"x{i}" for i in range(self.network.n_inputs)]

    @property
    def has_categories(self) -> bool:
        """Whether some columns hold text."""
        return self.encoding is not None and bool(self.encoding.is_category.any())

    @property
    def classes(self) -> Sequence[str]:
        """The names of the classes, where a table has them."""
        return () if self.preprocessing is None else self.preprocessing.classes

    @property
    def unit(self) -> tuple[Tensor, Tensor] | None:
        """(C,) mean and scale of the targets of a regression on a table, float64: f = mean + scale * output."""
        if self.preprocessing is None or self.task.decides:
            return None
        targets = self.preprocessing.targets
        return (
            torch.tensor([target.mean for target in targets], dtype=torch.float64),
            torch.tensor([target.scale for target in targets], dtype=torch.float64),
        )

    def __call__(self, x: Tensor) -> Outputs:
        """The outputs at x as lipexp itself computes them in float64: what a file is compared with."""
        points = x if self.preprocessing is None else torch.from_numpy(self.preprocessing.apply(self.frame(x)))
        f = self.network.double(points.double()[None])[0]
        if self.unit is not None:
            mean, scale = self.unit
            f = mean + scale * f
        return Outputs(f, decision(f) if self.task.decides else None)

    def frame(self, x: Tensor) -> pd.DataFrame:
        """x as the rows of the table that it stands for."""
        assert self.preprocessing is not None
        frame = {}
        for column, values in zip(self.preprocessing.columns, x.double().numpy().T, strict=True):
            if column.kind == CATEGORY:
                names = np.array([*column.categories, None], dtype=object)
                values = names[np.nan_to_num(values, nan=-1).astype(np.int64)]
            frame[column.name] = values
        return pd.DataFrame(frame)

    def rows(self, points: Tensor) -> Tensor:
        """The x (N, columns) of inputs of the network (N, D)."""
        if self.preprocessing is None:
            return points
        parts, start = [], 0
        for column in self.preprocessing.columns:
            own = points[:, start : start + len(column.features)].double()
            parts.append(own.argmax(dim=1) if column.kind == CATEGORY else column.mean + column.scale * own[:, 0])
            start += own.shape[1]
        return torch.stack(parts, dim=1).float()
