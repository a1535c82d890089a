"""A user's own table as a dataset."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import numpy.typing as npt

from lipexp.config import ConfigError, no_such, number, one_line, one_of, whole
from lipexp.datasets.base import MOST_CLASSES, Data, Dataset
from lipexp.datasets.files import Source, sha256
from lipexp.datasets.preprocessing import (
    BOOLEAN,
    CATEGORY,
    NAN,
    NUMBER,
    Column,
    Floats,
    Preprocessing,
    Target,
    listed,
    shortened,
    spelled,
)
from lipexp.process import holding_interrupts

if TYPE_CHECKING:
    import pandas as pd

MOST_INPUTS = 1000
MOST_BYTES = 2**31  # of the file
MOST_NUMBERS = 50_000_000  # rows x inputs, of which training and evaluation hold 115 bytes each
DATE = re.compile(r"(\d{4}[-/]\d{1,2}[-/]\d{1,2}|\d{1,2}[-/]\d{1,2}[-/]\d{2,4}|\d{1,2}\.\d{1,2}\.\d{4})([ T].*)?")
GROUPED = re.compile(r"[-+]?(\d{1,3}([ ,'.]\d{3})+|\d+)([.,]\d+)?")  # 1,234.5 or 1.234,5 or 1,5

Ints = npt.NDArray[np.int64]


class Table(Dataset):
    """The rows of a CSV, TSV or Parquet file, split once into training, validation and test rows.

    Columns of numbers become (value - mean) / scale, with the mean and the standard deviation of the training
    rows; true and false become 1 and 0; text becomes one input per category, 0 or 1, with the categories of the
    whole file. The targets of a regression are standardised like numbers, so the loss and `mse` are in units of
    their standard deviation; `lipexp predict` gives predictions in the units of the file. The split keeps the
    shares of classes. It is the same for every seed of a run. A first column without a name is taken for the
    numbers of the rows, and left out.

    A file may have 2 GiB, and a table 1,000 inputs and 50 million numbers (rows x inputs). One run at that limit
    takes about 6 GB.

    Args:
        path: .csv, .tsv or .txt, also with .gz, or .parquet.
        target: the column to be predicted, or a list of several for a regression.
        task: `classification` (two classes), `multiclass`, `regression`, or `auto`: a target with two values has
            two classes, another one of numbers is a regression, text is multiclass.
        columns: the columns to predict it from; None: all others.
        drop: columns to leave out.
        categorical: columns of numbers that stand for categories.
        missing: what to do with missing values: `refuse` them, or `impute` the median, or the most frequent
            category, of the training rows. Rows without a target are refused.
        n_train: None: all rows that are not in the other two parts.
        n_val: a number of rows, or a fraction of them.
        n_test: the same.
        split_seed: another one gives another split.

    Raises:
        ConfigError: the file cannot be read or does not fit; one line says why, and what can be done.
    """

    def __init__(
        self,
        path: str,
        target: str | Sequence[str],
        task: str = "auto",
        columns: str | Sequence[str] | None = None,
        drop: str | Sequence[str] = (),
        categorical: str | Sequence[str] = (),
        missing: str = "refuse",
        n_train: int | None = None,
        n_val: float = 0.2,
        n_test: float = 0.2,
        split_seed: int = 0,
    ) -> None:
        if not isinstance(path, str):
            raise ConfigError("path", path, "must be the name of a file")
        one_of("task", task, ["auto", "classification", "multiclass", "regression"])
        one_of("missing", missing, ["refuse", "impute"])
        whole("split_seed", split_seed, least=0, most=2**32 - 1)
        self.path, self._impute = path, missing == "impute"
        with holding_interrupts():  # it takes a second, and no other dataset needs it
            import pandas  # noqa: F401
            import sklearn.preprocessing  # noqa: F401

        source = Source("path", path)
        if Path(path).stat().st_size > MOST_BYTES:
            self._refuse(f"is larger than {MOST_BYTES / 2**30:.0f} GiB; take a sample of its rows")
        targets = _names("target", target, source.names)
        if not targets:
            raise ConfigError("target", None, "must be set")
        categories = _names("categorical", categorical, source.names)
        inputs = self._inputs(source.names, targets, columns, drop)
        self._dropped = _names("drop", drop, source.names)
        (frame,) = source.frames([*inputs, *targets], [name for name in categories if name in inputs])
        if frame.empty:
            self._refuse("has no rows")
        y, self.task, classes = self._targets(frame[targets], task)
        self.n_outputs = len(classes) if self.task == "multiclass" else len(targets)
        self.train, self.val, self.test = self._split(
            y if classes else None, len(frame), n_train, n_val, n_test, split_seed
        )
        self.n_train, self.n_val, self.n_test = map(len, (self.train, self.val, self.test))
        found = [self._column(frame[name], name in categories) for name in inputs]
        n_inputs = sum(len(column.features) for column in found)
        if n_inputs > MOST_INPUTS:
            widest = max(found, key=lambda column: len(column.features))
            self._refuse(
                f"gives {n_inputs:,} inputs, more than {MOST_INPUTS:,}: column {widest.name!r} alone has "
                f"{len(widest.features):,} categories; leave it out with dataset.drop"
            )
        if n_inputs * len(frame) > MOST_NUMBERS:
            self._refuse(f"gives {len(frame):,} x {n_inputs:,} numbers, more than {MOST_NUMBERS:,}")
        means, scales = [0.0] * len(targets), [1.0] * len(targets)
        if not classes:
            y, means, scales = self._standardised(y, targets)
        self.preprocessing = Preprocessing(
            found,
            [Target(*each) for each in zip(targets, means, scales, strict=True)],
            self.task,
            classes,
            sha256(path),
        )
        self.features, self.classes, self.n_inputs = self.preprocessing.features, classes, n_inputs
        try:
            x = self.preprocessing.apply(frame)
        except ConfigError as error:
            self._refuse(error.allowed)
        parts = (self.train, self.val, self.test)
        self._data = Data(*(array[rows] for rows in parts for array in (x, y.astype(np.float32))))
        self.about = self._about(int(frame[inputs].isna().to_numpy().sum()))

    def draw(self, stream: np.random.SeedSequence) -> Data:
        """The same rows for every stream."""
        return self._data

    def _about(self, n_filled: int) -> str:
        """What was made of the file."""
        rows = f"{self.n_train:,} + {self.n_val:,} + {self.n_test:,} rows (train, val, test)"
        parts = [f"{Path(self.path).name}: {rows}, {_counted(self.n_inputs, 'input')}"]
        if self.task == "classification":
            parts.append(f"{self.classes[1]} where f > 0, else {self.classes[0]}")
        if self.task == "regression":
            parts.append("targets and losses in standard deviations")
        if n_filled:
            parts.append(f"{_counted(n_filled, 'missing value')} filled in")
        return "; ".join(parts)

    def _refuse(self, text: str) -> NoReturn:
        raise ConfigError("path", self.path, text)

    def _inputs(self, names: Sequence[str], targets: Sequence[str], columns: Any, drop: Any) -> list[str]:
        """The columns that a prediction is made from, in the order of the file."""
        chosen = names[1:] if names[0] == "" else names
        if columns is not None:
            chosen = _names("columns", columns, names)
            for target in set(targets) & set(chosen):
                raise ConfigError("columns", target, "is the target, which cannot be predicted from itself")
        dropped = {*_names("drop", drop, names), *targets}
        inputs = [name for name in names if name in chosen and name not in dropped]
        if "" in inputs:
            self._refuse(f"has no name for its column {names.index('') + 1}")
        if not inputs:
            self._refuse(f"has no column to predict {', '.join(targets)} from")
        return inputs

    # Targets -----------------------------------------------------------------------------------------------------

    def _targets(self, frame: pd.DataFrame, task: str) -> tuple[Floats, str, list[str]]:
        """Targets (N,) or (N, C) before they are standardised, the task, and the names of the classes."""
        if task == "auto":
            task = "regression" if frame.shape[1] > 1 else _task(frame.iloc[:, 0])
        columns = [frame[name] for name in frame]
        for column in columns:
            for row in np.flatnonzero(column.isna())[:1]:
                self._refuse(f"row {row + 1}: there is no target {column.name!r}; leave such rows out")
        if task == "regression":
            values = np.stack([self._numbers(column) for column in columns], axis=1)
            return (values if len(columns) > 1 else values[:, 0]), task, []
        if len(columns) > 1:
            raise ConfigError(
                "target", listed(list(frame.columns)), f"several targets are for regression, not for {task}"
            )
        distinct = sorted(columns[0].unique(), key=lambda value: (isinstance(value, str), value))
        classes = [spelled(value) for value in distinct]
        enough = {"classification": len(classes) == 2, "multiclass": 2 <= len(classes) <= MOST_CLASSES}
        if not enough[task]:
            needed = "two" if task == "classification" else f"2 to {MOST_CLASSES:,}"
            seen = listed([shortened(one) for one in classes], 5)
            allowed = f"has {_counted(len(classes), 'value')} ({seen}); {task} needs {needed}"
            if task == "classification" and len(classes) > 2:
                allowed += " (dataset.task=multiclass takes more)"
            raise ConfigError("target", columns[0].name, allowed)
        counts = columns[0].value_counts()
        if counts.iloc[-1] < 3:
            rare = f"class {shortened(counts.index[-1])} has {_counted(int(counts.iloc[-1]), 'row')}"
            raise ConfigError("target", columns[0].name, f"{rare}; each needs 3, one for each part of the data")
        places = {value: place for place, value in enumerate(distinct)}
        return columns[0].map(places).to_numpy(dtype=np.float64), task, classes

    def _numbers(self, column: pd.Series[Any]) -> Floats:
        """A target of a regression."""
        values, wrong = Column(str(column.name), NUMBER).read(column)
        for row in sorted(wrong)[:1]:
            self._refuse(f"row {row + 1}, column {column.name!r}: {wrong[row]}, and so no target of a regression")
        if len(np.unique(values)) == 1:
            raise ConfigError("target", column.name, "has the same value in every row")
        return values

    def _standardised(self, y: Floats, names: Sequence[str]) -> tuple[Floats, list[float], list[float]]:
        columns = y.reshape(len(y), -1)
        found = [self._scale(name, columns[self.train, i]) for i, name in enumerate(names)]
        means, scales = map(list, zip(*found, strict=True))
        return ((columns - means) / scales).reshape(y.shape), means, scales

    def _split(
        self, classes: Floats | None, n_rows: int, n_train: int | None, n_val: float, n_test: float, seed: int
    ) -> tuple[Ints, Ints, Ints]:
        """The rows of training, validation and test; the shares of the classes are the same in all."""
        from sklearn.model_selection import train_test_split

        rest, parts = np.arange(n_rows), []
        for option, size in (("n_test", n_test), ("n_val", n_val)):
            count = _count(option, size, n_rows)
            if count >= len(rest):
                raise ConfigError(option, size, f"leaves no rows for training: there are {n_rows:,}")
            try:
                rest, part = train_test_split(
                    rest, test_size=count, random_state=seed, stratify=None if classes is None else classes[rest]
                )
            except ValueError as error:
                reason = one_line(error).removeprefix("ValueError: ")
                raise ConfigError(option, size, f"the classes cannot be split in these shares: {reason}") from None
            parts.append(part)
        if n_train is not None and whole("n_train", n_train, least=1) > len(rest):
            raise ConfigError(
                "n_train", n_train, f"is more than the {len(rest):,} rows that the other parts leave"
            )
        test, val = parts
        return rest[:n_train], val, test

    # Inputs ------------------------------------------------------------------------------------------------------

    def _column(self, column: pd.Series[Any], categorical: bool) -> Column:
        """What a column becomes, by the numbers of its training rows."""
        from pandas.api import types
        from sklearn.impute import SimpleImputer

        name, here = str(column.name), column.notna()
        if not here.any():
            self._refuse(f"column {name!r} has no values; leave it out with dataset.drop")
        kind = BOOLEAN if types.is_bool_dtype(column) else NUMBER
        if categorical or not types.is_numeric_dtype(column):
            kind = CATEGORY if categorical else self._kind(column)
        categories = sorted({spelled(value) for value in column.dropna().unique()}) if kind == CATEGORY else []
        found = Column(name, kind, categories=categories, fill=NAN if self._impute else None)
        values, wrong = found.read(column)
        for row in sorted(wrong)[:1]:
            hint = "; dataset.missing=impute fills it in" if not here.iloc[row] else ""
            self._refuse(f"row {row + 1}, column {name!r}: {wrong[row]}{hint}")
        train, fill = values[self.train].reshape(-1, 1), None
        if self._impute:
            if np.isnan(train).all():
                self._refuse(f"column {name!r} has no values in the training rows; leave it out with dataset.drop")
            imputer = SimpleImputer(strategy="median" if kind == NUMBER else "most_frequent").fit(train)
            fill, train = float(imputer.statistics_[0]), imputer.transform(train)
        mean, scale = self._scale(name, train[:, 0]) if kind == NUMBER else (0.0, 1.0)
        return Column(name, kind, mean, scale, categories, fill)

    def _kind(self, column: pd.Series[Any]) -> str:
        """That of a column which does not hold numbers."""
        from pandas import Categorical, to_numeric
        from pandas.api import types

        name, values = column.name, column.dropna()
        leave_out = f"leave it out with dataset.drop=[{','.join([*self._dropped, str(name)])}]"
        distinct = list(values.unique())
        if all(isinstance(value, bool) for value in distinct):
            return BOOLEAN
        if isinstance(column.array, Categorical) and len(distinct) < len(column):
            return CATEGORY
        if types.is_datetime64_any_dtype(column) or all(DATE.fullmatch(str(value).strip()) for value in distinct):
            self._refuse(f"column {name!r} holds dates, such as {shortened(str(distinct[0]))}; {leave_out}")
        for value in distinct:
            if not isinstance(value, str | int | float):
                self._refuse(f"column {name!r} holds {type(value).__name__} objects; {leave_out}")
        readable = to_numeric(values, errors="coerce").notna()
        if readable.mean() > 0.5:
            if readable.all():
                return NUMBER
            row = readable.index[~readable][0]
            self._refuse(
                f"row {row + 1}, column {name!r}: {shortened(values[row])} stands among numbers; correct it, "
                f"or take all for categories with dataset.categorical=[{name}]"
            )
        if all(GROUPED.fullmatch(str(value).strip()) for value in distinct):
            self._refuse(
                f"column {name!r} holds numbers such as {shortened(str(distinct[0]))}; write them as 1234.5"
            )
        if len(distinct) == len(column):
            self._refuse(f"column {name!r} holds another text in every row; {leave_out}")
        return CATEGORY

    def _scale(self, name: str, values: Floats) -> tuple[float, float]:
        """The mean and the standard deviation, which is 1 for a constant."""
        from sklearn.preprocessing import StandardScaler

        with np.errstate(over="ignore", invalid="ignore"):
            scaler = StandardScaler().fit(values.reshape(-1, 1))
        mean, scale = float(scaler.mean_[0]), float(scaler.scale_[0])
        if not np.isfinite([mean, scale]).all():
            largest = values[np.abs(values).argmax()]
            self._refuse(f"column {name!r} holds numbers as large as {largest:g}, whose squares overflow")
        return mean, scale


def _names(option: str, value: Any, known: Sequence[str]) -> list[str]:
    """Columns, of which there may be one or several."""
    names: list[Any] = (
        [value] if isinstance(value, str) else list(value) if isinstance(value, list | tuple) else [0]
    )
    for name in names:
        if not isinstance(name, str):
            raise ConfigError(option, value, "must be the name of a column, or a list of some")
        if name not in known:
            few = f" ({', '.join(known)})" if len(known) <= 12 else ""
            raise ConfigError(option, name, no_such("column", name, known).partition(" (")[0] + few)
    return names


def _task(column: pd.Series[Any]) -> str:
    """What a target is taken for."""
    from pandas.api import types

    if column.nunique() <= 2:
        return "classification"
    return "regression" if types.is_numeric_dtype(column) else "multiclass"


def _count(option: str, size: Any, n_rows: int) -> int:
    """The size of a part, in rows."""
    if isinstance(size, float):
        number(option, size, above=0)
        if size >= 1:
            raise ConfigError(option, size, "must be a whole number of rows, or a fraction below 1")
        return max(1, round(size * n_rows))
    return whole(option, size, least=1)


def _counted(n: int, word: str) -> str:
    return f"{n:,} {word}" + "s" * (n != 1)
