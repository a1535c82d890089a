"""From the rows of a table to the points of a network, by numbers that are kept with the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import numpy.typing as npt

from lipexp.config import ConfigError
from lipexp.reading import read_record

if TYPE_CHECKING:
    import pandas as pd

FILE = "preprocessing.json"
NUMBER, BOOLEAN, CATEGORY = KINDS = ("number", "boolean", "category")
TRUTH = {"false": 0.0, "true": 1.0, "0": 0.0, "1": 1.0}
NAN = float("nan")

Floats = npt.NDArray[np.float64]


def spelled(value: Any) -> str:
    """A category, or a class, as text: 1.0 is 1, as in a column of whole numbers of which some are missing."""
    whole = isinstance(value, float | np.floating) and float(value).is_integer() and abs(float(value)) < 2**53
    return str(int(value)) if whole else str(value)


@dataclass(frozen=True)
class Column:
    """A column of a table, and the one or more inputs of the network that it becomes.

    | kind       | inputs                                                      |
    |------------|-------------------------------------------------------------|
    | `number`   | (value - mean) / scale                                      |
    | `boolean`  | 0 or 1                                                      |
    | `category` | one for each category: 1 for that of the row, 0 for others  |
    """

    name: str
    kind: Annotated[str, KINDS]
    mean: float = 0.0
    scale: float = 1.0
    categories: list[str] = field(default_factory=list)
    fill: float | None = None  # stands for a missing value: a number, or the place of a category; None: refused

    def __post_init__(self) -> None:
        if self.scale <= 0 or (self.kind == CATEGORY) != bool(self.categories):
            raise ValueError(f"column {self.name!r} needs a scale above 0, and categories if it has that kind")

    @property
    def features(self) -> list[str]:
        """The names of its inputs."""
        return [f"{self.name}={one}" for one in self.categories] or [self.name]

    def read(self, column: pd.Series[Any]) -> tuple[Floats, dict[int, str]]:
        """A number for each row (N,), and what is wrong with some, by their place.

        It is the value itself, 0 or 1 for false and true, and the place of a category. A missing value is filled
        in, or is NaN and wrong.
        """
        import pandas as pd
        from pandas.api import types

        if self.kind == NUMBER and types.is_numeric_dtype(column) and not types.is_bool_dtype(column):
            values = column.to_numpy(dtype=np.float64, na_value=np.nan, copy=True)
            missing, wrong = np.isnan(values), np.isinf(values)
        else:
            codes, distinct = pd.factorize(column)  # -1 for a missing value
            values = np.array([*map(self._number, distinct), NAN])[codes]
            missing = codes < 0
            wrong = ~np.isfinite(values) & ~missing
        texts = {int(row): self._complaint(column.iloc[row]) for row in np.flatnonzero(wrong)}
        if self.fill is not None:
            values[missing] = self.fill
        elif missing.any():
            texts |= dict.fromkeys(np.flatnonzero(missing).tolist(), "there is no value")
        return values, texts

    def _number(self, value: Any) -> float:
        """That of a text, or of another object; NaN where it has none."""
        if self.kind == NUMBER:
            try:
                return NAN if isinstance(value, bool | np.bool_) else float(value)
            except (TypeError, ValueError, OverflowError):
                return NAN
        table = TRUTH if self.kind == BOOLEAN else self._places
        return table.get(spelled(value).lower() if self.kind == BOOLEAN else spelled(value), NAN)

    @cached_property
    def _places(self) -> dict[str, float]:
        return {category: float(place) for place, category in enumerate(self.categories)}

    def _complaint(self, value: Any) -> str:
        if self.kind == CATEGORY:
            return f"{shortened(value)} is none of the categories that are known ({listed(self.categories, 5)})"
        return f"{shortened(value)} is " + (
            "no finite number" if self.kind == NUMBER else "neither true nor false"
        )


@dataclass(frozen=True)
class Target:
    """A column that is predicted: for a regression, value = mean + scale * output of the network."""

    name: str
    mean: float = 0.0
    scale: float = 1.0


@dataclass(frozen=True)
class Preprocessing:
    """What turns the rows of a table into points, and outputs into predictions: numbers and text, kept as JSON.

    Means, scales and fill values are those of the training rows. Categories are those of the whole file.
    """

    columns: list[Column]
    targets: list[Target]  # several for a regression only
    task: Annotated[str, ("classification", "multiclass", "regression")]
    classes: list[str]  # in the order of the outputs; empty for a regression
    sha256: str  # of the file that the run was trained on; empty if there was none

    @classmethod
    def of(cls, folder: Path) -> Preprocessing:
        """That of a run; Missing or Unreadable (see reading.py) where there is none that can be used."""
        return read_record(cls, folder, FILE)

    @cached_property
    def features(self) -> list[str]:
        """The names of the inputs."""
        return [feature for column in self.columns for feature in column.features]

    def apply(self, frame: pd.DataFrame) -> npt.NDArray[np.float32]:
        """The rows of a table as points (N, D); its other columns do not matter.

        Raises:
            ConfigError: a column is missing, or a value that it cannot take; the first such row is named.
        """
        points, wrong = self.encoded(frame)
        for row in sorted(wrong)[:1]:
            raise ConfigError("table", None, f"row {row + 1}, {wrong[row]}")
        return points

    def encoded(self, frame: pd.DataFrame) -> tuple[npt.NDArray[np.float32], dict[int, str]]:
        """Points (N, D), and by its place what is wrong with a row whose point is none.

        Raises:
            ConfigError: a column is missing.
        """
        points = np.zeros((len(frame), len(self.features)), dtype=np.float32)
        wrong: dict[int, str] = {}
        start = 0
        for column in self.columns:
            if column.name not in frame:
                there = listed(list(frame.columns))
                raise ConfigError("table", None, f"has no column {column.name!r} (there are {there})")
            values, texts = column.read(frame[column.name])
            if column.kind == CATEGORY:
                known = np.flatnonzero(np.isfinite(values))
                points[known, start + values[known].astype(np.int64)] = 1
            else:
                with np.errstate(over="ignore"):
                    points[:, start] = (values - column.mean) / column.scale
                for row in np.flatnonzero(~np.isfinite(points[:, start])).tolist():
                    texts.setdefault(row, f"{shortened(frame[column.name].iloc[row])} is too large")
            for row, text in texts.items():
                wrong.setdefault(row, f"column {column.name!r}: {text}")
            start += len(column.features)
        return points, wrong


def shortened(value: Any) -> str:
    """A value in a message."""
    text = value if isinstance(value, str) else spelled(value)
    return repr(text if len(text) <= 40 else f"{text[:40]}…")


def listed(names: Sequence[Any], most: int = 12) -> str:
    """Names in a message; of many only the first."""
    return ", ".join(map(str, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")
