"""The points that a network from elsewhere is certified on, and their classes.

Shapes: N points, D inputs, C outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from lipexp.config import ConfigError, no_such
from lipexp.datasets.files import Source
from lipexp.datasets.preprocessing import listed
from lipexp.foreign.weights import texts
from lipexp.wording import count

TARGET = "y"  # the column that is one without being named
NAMED = 8  # columns in a message
Array = npt.NDArray[Any]


@dataclass
class Points:
    """A table of points: a frame with named columns, or an array."""

    path: str
    table: pd.DataFrame | Array
    target: Array | None  # (N,) as it stands in the file
    named: str | None  # the column or file that was named for it

    @classmethod
    def read(cls, path: str, target: str | None) -> Points:
        """The points of a CSV (TSV, Parquet) or .npy file.

        Args:
            target: the column of the classes, in place of `y`; for points in .npy another .npy file.

        Raises:
            ConfigError: it cannot be read, or has no such column.
        """
        if Path(path).suffix.lower() == ".npy":
            table = _array("--data", path)
            if table.ndim < 2 or 0 in table.shape:
                raise ConfigError("--data", path, f"has the shape {table.shape}; it must be (N, D)")
            return cls(path, table, None if target is None else _array("--target", target), target)
        source = Source("--data", path)
        if target is not None and target not in source.names:
            raise ConfigError("--target", target, no_such("column", target, source.names))
        (frame,) = source.frames(source.names)
        if not len(frame):
            raise ConfigError("--data", path, "has no rows")
        frame = frame.drop(columns=[name for name in source.names if name == ""])  # an index, as pandas writes it
        name = target or (TARGET if TARGET in frame.columns else None)
        own = None if name is None else frame.pop(name).to_numpy()
        return cls(path, frame, own, target)

    @property
    def n_columns(self) -> int:
        """D, if all columns are inputs."""
        return int(np.prod(self.table.shape[1:]))

    def x(self, names: Sequence[str], n_inputs: int) -> npt.NDArray[np.float64]:
        """(N, D) in float64: the columns of these names, if they are known and there, or else all in their order.

        Raises:
            ConfigError: their number is not D, or one holds what is no finite number.
        """
        table = self.table
        if isinstance(table, pd.DataFrame) and names and set(names) <= {*table.columns}:
            table = table[list(names)]
        if int(np.prod(table.shape[1:])) != n_inputs:
            columns = f" ({listed(list(table.columns), NAMED)})" if isinstance(table, pd.DataFrame) else ""
            own = count(int(np.prod(table.shape[1:])), "column")
            allowed = f"has {own}{columns}, the network {count(n_inputs, 'input')}"
            raise ConfigError("--data", self.path, allowed)
        if isinstance(table, pd.DataFrame):
            for name, kind in table.dtypes.items():
                if kind.kind not in "biuf":
                    raise ConfigError("--data", self.path, f"its column {name!r} holds no numbers")
            return finite("--data", self.path, np.asarray(table), [repr(name) for name in table.columns])
        return finite("--data", self.path, table)

    def classes(self, n_outputs: int, known: Sequence[Any]) -> npt.NDArray[np.int64] | None:
        """(N,) the numbers of the classes, as `labels` has them; None: the file has none.

        Raises:
            ConfigError: they are no classes of the network.
        """
        if self.target is None:
            return None
        try:
            return labels(self.target, len(self.table), n_outputs, known)
        except ConfigError as error:
            allowed = f"{error.allowed} (--task regression needs no classes)"
            if self.named is not None:
                raise ConfigError("--target", self.named, allowed) from None
            raise ConfigError("--data", self.path, f"its column {TARGET!r} {allowed}") from None


def finite(option: str, value: object, x: Array, names: Sequence[str] = ()) -> npt.NDArray[np.float64]:
    """Points (N, ...) as (N, D) in float64.

    Args:
        names: of the columns, where they have some.

    Raises:
        ConfigError: they are no finite numbers, or none at all.
    """
    if x.dtype.kind not in "biuf":
        raise ConfigError(option, value, f"is of type {x.dtype}; it must be numbers")
    if x.ndim < 2 or 0 in x.shape:
        raise ConfigError(option, value, f"has the shape {x.shape}; it must be (N, D), a row for each point")
    points = np.array(x.reshape(len(x), -1), dtype=np.float64, order="C")  # a copy: x may be mapped
    for row, column in np.argwhere(~np.isfinite(points))[:1].tolist():
        name = names[column] if names else column + 1
        allowed = f"row {row + 1}, column {name} is {points[row, column]}, no finite number"
        raise ConfigError(option, value, allowed)
    return points


def _array(option: str, path: str) -> Array:
    """The array of an .npy file; mapped, so that it cannot be larger than its file."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise ConfigError(option, path, "does not exist") from None
    except OSError as error:
        raise ConfigError(option, path, f"cannot be read: {error.strerror or error}") from None
    except (ValueError, EOFError, SyntaxError, OverflowError):  # whose texts advise to load pickles
        raise ConfigError(option, path, "is no array of numbers in .npy, or not a whole one") from None


def labels(y: Any, n: int, n_outputs: int, classes: Sequence[Any]) -> npt.NDArray[np.int64]:
    """(N,) the numbers of the classes y.

    Args:
        n: the number of points.
        classes: the names of the classes, where the network knows them. Else y is a number of a class, 0, 1, …;
            or one of as many different values as there are classes, which are numbered in sorted order.

    Raises:
        ConfigError: y is something else.
    """
    y = np.asarray(y)
    y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
    if y.shape != (n,):
        raise ConfigError("y", None, f"has the shape {y.shape}; it must be ({n},), a class for each point")
    strange = pd.isna(y) | (np.isinf(y) if y.dtype.kind == "f" else False)
    for row in np.flatnonzero(strange)[:1].tolist():
        raise ConfigError("y", None, f"has no class in row {row + 1}, but {y[row]}")
    n_classes = max(2, n_outputs)
    if y.dtype.kind == "O":
        y = np.array(texts(y.tolist()))
    found, number = np.unique(y, return_inverse=True)
    names = texts(found.tolist())
    if len(classes):
        known = texts(list(classes))
        for name in names:
            if name not in known:
                allowed = f"has the class {name!r}, which the network does not know ({listed(known, NAMED)})"
                raise ConfigError("y", None, allowed)
        return np.array([known.index(name) for name in names], dtype=np.int64)[number.reshape(-1)]
    if y.dtype.kind in "biuf" and (found == np.round(found)).all() and found[0] >= 0 and found[-1] < n_classes:
        return y.astype(np.int64)
    if len(found) != n_classes:
        allowed = f"has {count(len(found), 'different value')}, the network {n_classes} classes"
        raise ConfigError("y", None, f"{allowed}; it must be 0, 1, …, or have a value for each class")
    return number.reshape(-1).astype(np.int64)
