"""A user's own NumPy arrays as a dataset."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np
import numpy.typing as npt

from lipexp.config import ConfigError, one_of, whole
from lipexp.datasets.base import MOST_CLASSES, Array, Data, Finite

TOGETHER = ("x", "y")
APART = ("x_train", "y_train", "x_val", "y_val", "x_test", "y_test")
BROKEN = (ValueError, RuntimeError, EOFError, zipfile.BadZipFile, zlib.error)  # what NumPy raises at a bad file


def read_npz(path: str, layouts: Sequence[Sequence[str]]) -> dict[str, npt.NDArray[Any]]:
    """The arrays of the first of these sets of names that an .npz file has.

    Raises:
        ConfigError: it is none, has no such set, or Python objects; the option is `path`.
    """
    try:
        with Path(path).open("rb") as stream:
            return _arrays(path, stream, layouts)
    except OSError as error:
        raise ConfigError("path", path, f"cannot be read: {error.strerror or error}") from None


def _arrays(path: str, stream: IO[bytes], layouts: Sequence[Sequence[str]]) -> dict[str, npt.NDArray[Any]]:
    try:
        file = np.load(stream, allow_pickle=False)
    except BROKEN:
        raise ConfigError("path", path, "is no .npz file") from None
    if not isinstance(file, np.lib.npyio.NpzFile):
        raise ConfigError("path", path, "is no .npz file, but a single array")
    keys = next((keys for keys in layouts if set(keys) <= set(file.files)), None)
    if keys is None:
        needed = ", or ".join(f"{', '.join(keys[:-1])} and {keys[-1]}" for keys in layouts)
        raise ConfigError("path", path, f"has {', '.join(file.files) or 'nothing'}; it needs {needed}")
    found = {}
    for key in keys:
        try:
            found[key] = file[key]
        except BROKEN:
            known = f"save {key}.astype(float) or .astype(str)"
            text = f"its {key} is damaged, or holds Python objects ({known})"
            raise ConfigError("path", path, text) from None
    return found


class Arrays(Finite):
    """The arrays of an .npz file, as numpy.savez writes it.

    Either x and y, which the stream of a run splits, a classification by the shares of its classes, or x_train,
    y_train, x_val, y_val, x_test and y_test, which are the same for every run. Points x are (N, D). Targets y are
    (N,), or (N, C) for a regression with several targets. Both are used as they are: nothing is scaled. The values
    of a classification, numbers or texts, are numbered in their sorted order, and `classes` has their names.

    Args:
        path: the file; it may not hold Python objects.
        task: `classification` (two classes), `multiclass`, `regression`, or `auto`: y of floating-point numbers or
            with several columns is a regression, anything else has two classes or several.
        n_train: None: all rows, but those of validation and test if the file does not keep them apart.
        n_val: None: all rows, or a fifth if the file does not keep them apart. Of a file that does, a smaller
            number takes the first rows.
        n_test: the same.

    Raises:
        ConfigError: the file cannot be read or does not fit; one line says why.
    """

    def __init__(
        self,
        path: str,
        task: str = "auto",
        n_train: int | None = None,
        n_val: int | None = None,
        n_test: int | None = None,
    ) -> None:
        if not isinstance(path, str):
            raise ConfigError("path", path, "must be the name of a file")
        one_of("task", task, ["auto", "classification", "multiclass", "regression"])
        self.path = path
        arrays = read_npz(path, (TOGETHER, APART))
        x = {key: self._points(key, array) for key, array in arrays.items() if key.startswith("x")}
        for key in x:
            of_y = key.replace("x", "y")
            if arrays[of_y].shape[:1] != x[key].shape[:1]:
                self._refuse(f"{key} has {len(x[key]):,} rows, but {of_y} has the shape {arrays[of_y].shape}")
            if arrays[of_y].dtype.kind == "f":
                self._numbers(of_y, arrays[of_y])
        self.x = self._joined(x)
        self.y = self._targets(self._joined({key: array for key, array in arrays.items() if key not in x}), task)
        self.n_points, self.n_inputs = self.x.shape
        self._sizes = [len(array) for array in x.values()]
        if len(x) == 1:
            n_val, n_test = (max(1, self.n_points // 5) if n is None else n for n in (n_val, n_test))
            rest = self.n_points - whole("n_val", n_val, least=1) - whole("n_test", n_test, least=1)
            super().__init__(max(1, rest) if n_train is None else n_train, n_val, n_test)
            return
        self.n_train, self.n_val, self.n_test = (
            size if n is None else whole(option, n, least=1, most=size)
            for option, n, size in zip(
                ("n_train", "n_val", "n_test"), (n_train, n_val, n_test), self._sizes, strict=True
            )
        )

    def load(self) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        return self.x, self.y

    def draw(self, stream: np.random.SeedSequence) -> Data:
        if len(self._sizes) == 1:
            return super().draw(stream)
        starts = np.cumsum([0, *self._sizes[:2]])
        parts = zip(starts, (self.n_train, self.n_val, self.n_test), strict=True)
        return Data(*(array[start : start + n] for start, n in parts for array in (self.x, self.y)))

    def _refuse(self, text: str) -> NoReturn:
        raise ConfigError("path", self.path, text)

    def _joined(self, parts: dict[str, npt.NDArray[Any]]) -> npt.NDArray[Any]:
        """The rows of all parts."""
        first, *others = parts
        for key in others:
            if parts[key].shape[1:] != parts[first].shape[1:]:
                self._refuse(f"{first} has the shape {parts[first].shape}, but {key} {parts[key].shape}")
        return np.concatenate(list(parts.values()))

    def _points(self, key: str, array: npt.NDArray[Any]) -> Array:
        if array.ndim != 2 or 0 in array.shape:
            self._refuse(f"{key} has the shape {array.shape}; it must be (N, D), a row for each point")
        return self._numbers(key, array)

    def _numbers(self, key: str, array: npt.NDArray[Any]) -> Array:
        if array.dtype.kind not in "biuf":
            self._refuse(f"{key} is of type {array.dtype}; it must be numbers")
        with np.errstate(over="ignore"):
            numbers = array.astype(np.float32)
        for place in np.argwhere(~np.isfinite(numbers))[:1].tolist():
            self._refuse(f"{key}{place} is {array[tuple(place)]}, which is no finite number in float32")
        return numbers

    def _targets(self, y: npt.NDArray[Any], task: str) -> npt.NDArray[Any]:
        """y as targets; sets the task, the classes and the number of outputs."""
        if y.ndim == 2 and y.shape[1] == 1:
            y = y[:, 0]
        if y.ndim not in (1, 2) or 0 in y.shape or y.dtype.kind not in "biufU":
            self._refuse(f"y has the shape {y.shape} and the type {y.dtype}; it must be (N,) or (N, C)")
        if task == "regression" or (task == "auto" and (y.dtype.kind == "f" or y.ndim == 2)):
            self.task, self.n_outputs = "regression", y[0].size
            return self._numbers("y", y)
        if y.ndim == 2:
            self._refuse(f"y has the shape {y.shape}; {task} needs (N,)")
        names, places = np.unique(y, return_inverse=True)
        self.task = ("classification" if len(names) == 2 else "multiclass") if task == "auto" else task
        if len(names) < 2 or len(names) > (2 if self.task == "classification" else MOST_CLASSES):
            needed = "two" if self.task == "classification" else f"2 to {MOST_CLASSES:,}"
            self._refuse(
                f"y has {len(names):,} different values; {self.task} needs {needed} "
                "(dataset.task=regression takes them for numbers)"
            )
        self.classes = tuple(map(str, names.tolist()))
        self.n_outputs = 1 if self.task == "classification" else len(names)
        return places
