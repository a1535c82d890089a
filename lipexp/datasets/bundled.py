"""Real data that come with scikit-learn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from lipexp.datasets.base import Data, Finite
from lipexp.process import holding_interrupts


class Bundled(Finite):
    """Base of these datasets: what `source` loads, with its own names of features and classes."""

    source = ""  # a function of sklearn.datasets
    settings: Mapping[str, Any] = {}

    def __init__(self, n_train: int, n_val: int, n_test: int) -> None:
        with holding_interrupts():  # imported here, as it takes half a second and few datasets need it
            from sklearn import datasets

        found = getattr(datasets, self.source)(**self.settings)
        self.points, self.targets = found.data, found.target
        self.n_points, self.n_inputs = found.data.shape
        self.features = tuple(map(str, found.feature_names))
        self.classes = tuple(map(str, found.get("target_names", ())))
        if self.task == "multiclass":
            self.n_outputs = len(self.classes)
        super().__init__(n_train, n_val, n_test)

    def load(self) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        return self.points, self.targets


class Digits(Bundled):
    """Handwritten digits in 64 dimensions, ten classes: scikit-learn's 8 x 8 images, in [0, 1].

    There are 1,797 of them, all different.
    """

    task = "multiclass"
    source = "load_digits"

    def __init__(self, n_train: int = 1197, n_val: int = 200, n_test: int = 400) -> None:
        super().__init__(n_train, n_val, n_test)
        self.points = self.points / 16


class DigitsParity(Digits):
    """The images of `Digits`, odd (1) against even (0)."""

    task = "classification"

    def __init__(self, n_train: int = 1197, n_val: int = 200, n_test: int = 400) -> None:
        super().__init__(n_train, n_val, n_test)
        self.targets = self.targets % 2
        self.classes = ("even", "odd")


class Standardised(Bundled):
    """Base of those whose features have different units: each is standardised by the training rows of the run.

    From every value of a feature the mean of the training rows is subtracted, and the rest is divided by their
    standard deviation. So distances, margins and radii are in units of that standard deviation. Validation and
    test rows have no part in the mean and the standard deviation.
    """

    def draw(self, stream: np.random.SeedSequence) -> Data:
        from sklearn.preprocessing import StandardScaler

        data = super().draw(stream)
        by_x = StandardScaler().fit(data.train_x)
        x = [by_x.transform(part) for part in (data.train_x, data.val_x, data.test_x)]
        y = [data.train_y, data.val_y, data.test_y]
        if self.task == "regression":
            by_y = StandardScaler().fit(data.train_y[:, None])
            y = [by_y.transform(part[:, None])[:, 0] for part in y]
        return Data(x[0], y[0], x[1], y[1], x[2], y[2])


class Wine(Standardised):
    """Wines of three growers by 13 results of a chemical analysis, such as alcohol and colour: 178 rows.

    Features are standardised by the training rows, see `Standardised`.
    """

    task = "multiclass"
    source = "load_wine"

    def __init__(self, n_train: int = 106, n_val: int = 36, n_test: int = 36) -> None:
        super().__init__(n_train, n_val, n_test)


class BreastCancer(Standardised):
    """Tumours, benign (1) or malignant (0), by 30 measures of the nuclei of their cells: 569 rows.

    Features are standardised by the training rows, see `Standardised`.
    """

    task = "classification"
    source = "load_breast_cancer"

    def __init__(self, n_train: int = 341, n_val: int = 114, n_test: int = 114) -> None:
        super().__init__(n_train, n_val, n_test)


class Diabetes(Standardised):
    """How far diabetes has gone in a year, by 10 features such as age, body mass index and blood values: 442 rows.

    Features and the target are standardised by the training rows, see `Standardised`. So `mse` is in units of the
    variance of the target, of which a constant prediction reaches about 1.
    """

    task = "regression"
    source = "load_diabetes"
    settings = {"scaled": False}  # else scikit-learn scales the features by all rows

    def __init__(self, n_train: int = 266, n_val: int = 88, n_test: int = 88) -> None:
        super().__init__(n_train, n_val, n_test)
