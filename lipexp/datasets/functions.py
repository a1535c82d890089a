"""Functions with known slopes, as many points as are asked for."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
import numpy.typing as npt

from lipexp.config import ConfigError, number, whole
from lipexp.datasets.base import Data, Generated


class Curve(Generated):
    """Base of the functions of one variable, which is uniform on [`low`, `high`]: `value` has the targets."""

    task = "regression"
    n_inputs = 1
    low = -1.0
    high = 1.0

    @abstractmethod
    def value(self, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """The targets (n,) at x (n,)."""

    def sample(self, n: int, rng: np.random.Generator) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        x = rng.uniform(self.low, self.high, size=(n, 1)).astype(np.float32)
        return x, self.value(x[:, 0])


class AbsoluteValue(Curve):
    """The function |x| with x uniform on [-1, 1]."""

    def value(self, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        return np.abs(x)


class NShape(Curve):
    """The function x - 2 clip(x, -1/2, 1/2), shaped like an N, with x uniform on [-3, 3].

    It is x + 1 up to -1/2, then -x, and x - 1 from 1/2 on, so 1-Lipschitz with the slope 1 or -1 everywhere.

    Reference: Prach and Lampert 2023, "1-Lipschitz neural networks are more expressive with N-activations",
    arXiv 2311.06103, which trains on 1,000 points, and shows that with layers of spectral norm 1 no network of
    MaxMin, or of an activation with two linear pieces, is equal to it.
    """

    low = -3.0
    high = 3.0

    def __init__(self, n_train: int = 1000, n_val: int = 1000, n_test: int = 2000) -> None:
        super().__init__(n_train, n_val, n_test)

    def value(self, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        return x - 2 * x.clip(-0.5, 0.5)


class SquareWave(Curve):
    """1 for x <= -1 and for 0 < x <= 1, else 0, with x uniform on [-2, 2].

    It jumps at -1, 0 and 1. For L >= 1 no L-Lipschitz function has a mean square error below 1 / (16 L), that of
    straight lines with the slope L or -L through the middles of the jumps.

    Reference: Wang and Manchester 2023, "Direct parameterization of Lipschitz-bounded deep networks",
    arXiv 2301.11526, which trains on 300 such points and tests on 200 evenly spaced ones.
    """

    low = -2.0
    high = 2.0

    def __init__(self, n_train: int = 300, n_val: int = 200, n_test: int = 200) -> None:
        super().__init__(n_train, n_val, n_test)

    def value(self, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        return ((x <= -1) | ((x > 0) & (x <= 1))).astype(np.float32)


class Flower(Generated):
    """Three flowers in the plane, one inside the other, with the targets 0, 1/2 and 1.

    They are the curves r (1 - `depth` cos(`petals` t)) (cos t, sin t) over the angles t, for r = 1, 3/2 and 2, and
    have the targets r - 1. Training angles are evenly spaced from 0, and so the same for every seed; those of
    validation and test are random. By default the two outer curves come within 0.266 of each other, so a function
    that is right on all of them has a Lipschitz constant of at least 1.88 in the 2-norm.

    Args:
        petals: the number of each curve.
        depth: of the notches between them, over r; below 1.

    Reference: Kitouni, Nolte and Williams 2023, "Expressive monotonic neural networks", arXiv 2307.07512, and the
    example `flower` of its code: 400 training angles a curve, of which two come twice, the loss |f - y| and L = 3.
    """

    task = "regression"
    n_inputs = 2

    def __init__(
        self,
        petals: int = 20,
        depth: float = 0.1,
        n_train: int = 1200,
        n_val: int = 1000,
        n_test: int = 2000,
    ) -> None:
        super().__init__(n_train, n_val, n_test)
        self.petals = whole("petals", petals, least=0)
        self.depth = number("depth", depth, least=0)
        if self.depth >= 1:
            raise ConfigError("depth", depth, "must be below 1, at which the notches reach the origin")

    def sample(self, n: int, rng: np.random.Generator) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        return self._at(rng.uniform(0, 2 * np.pi, size=n))

    def draw(self, stream: np.random.SeedSequence) -> Data:
        places = np.arange(self.n_train) // 3
        x, y = self._at(2 * np.pi * places / (places[-1] + 1))
        return super().draw(stream)._replace(train_x=x.astype(np.float32), train_y=y.astype(np.float32))

    def _at(self, angle: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Points (n, 2) at these angles (n,) of the three curves in turn, and their targets."""
        y = np.arange(len(angle)) % 3 / 2
        radius = (1 + y) * (1 - self.depth * np.cos(self.petals * angle))
        return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1), y


class LogOutliers(Generated):
    """y = log x + noise with x uniform on [`low`, `high`], and outliers among the training targets.

    The slope 1 / x is above 0 everywhere and at most 1 / `low`, so that a network that may only rise, with the
    constant 1 / `low`, can show log x and cannot follow every outlier. Validation and test targets have none.

    Args:
        noise: standard deviation of the Gaussian noise.
        outliers: the fraction of training targets that are outliers, rounded to a whole number of them.
        offset: how far an outlier lies off, above or below at random.
        low: the smallest x, above 0.
        high: the largest x.
    """

    task = "regression"
    n_inputs = 1
    per_run = ("noise", "outliers", "offset")

    def __init__(
        self,
        noise: float = 0.1,
        outliers: float = 0.1,
        offset: float = 3.0,
        low: float = 0.25,
        high: float = 4.0,
        n_train: int = 200,
        n_val: int = 1000,
        n_test: int = 2000,
    ) -> None:
        super().__init__(n_train, n_val, n_test)
        self.noise = number("noise", noise, least=0)
        self.outliers = number("outliers", outliers, least=0, most=1)
        self.offset = number("offset", offset, least=0)
        self.low = number("low", low, above=0)
        self.high = number("high", high, above=low)

    def sample(self, n: int, rng: np.random.Generator) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        x = rng.uniform(self.low, self.high, size=n)
        return x[:, None], np.log(x) + self.noise * rng.standard_normal(n)

    def draw(self, stream: np.random.SeedSequence) -> Data:
        data = super().draw(stream)
        rng = np.random.default_rng(self._part(stream, 3))  # beside those of the three sets
        rows = rng.choice(self.n_train, round(self.outliers * self.n_train), replace=False)
        targets = data.train_y.copy()
        targets[rows] += self.offset * rng.choice([-1, 1], size=len(rows))
        return data._replace(train_y=targets)
