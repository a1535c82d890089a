"""Datasets that are drawn from a distribution, as many points as are asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from lipexp.config import ConfigError, norm_order, number, whole
from lipexp.datasets.base import Data, Generated
from lipexp.process import holding_interrupts


class TwoMoons(Generated):
    """Two interleaved half circles, one class each: scikit-learn's make_moons, its points times `scale`.

    Args:
        noise: standard deviation of the Gaussian noise, before scaling.
        scale: the factor; at 2 the noiseless moons are 1 apart at their tips.
    """

    task = "classification"
    n_inputs = 2
    per_run = ("noise",)

    def __init__(
        self,
        noise: float = 0.05,
        scale: float = 2.0,
        n_train: int = 2000,
        n_val: int = 1000,
        n_test: int = 2000,
    ) -> None:
        super().__init__(n_train, n_val, n_test)
        self.noise = number("noise", noise, least=0)
        self.scale = number("scale", scale, above=0)

    def sample(self, n: int, rng: np.random.Generator) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        with holding_interrupts():  # imported here, as it takes half a second and few datasets need it
            from sklearn.datasets import make_moons

        x, y = make_moons(n, noise=self.noise or None, random_state=int(rng.integers(2**32)))
        return self.scale * x, y


class Circles(Generated):
    """Two concentric circles, the inner one of class 1: scikit-learn's make_circles, its points times `scale`.

    Args:
        noise: standard deviation of the Gaussian noise, before scaling.
        factor: the radius of the inner circle over that of the outer one, in [0, 1).
        scale: the radius of the outer circle; without noise the two are `scale` (1 - `factor`) apart.
    """

    task = "classification"
    n_inputs = 2
    per_run = ("noise",)

    def __init__(
        self,
        noise: float = 0.05,
        factor: float = 0.5,
        scale: float = 2.0,
        n_train: int = 2000,
        n_val: int = 1000,
        n_test: int = 2000,
    ) -> None:
        super().__init__(n_train, n_val, n_test)
        self.noise = number("noise", noise, least=0)
        self.factor = number("factor", factor, least=0)
        if self.factor >= 1:
            raise ConfigError("factor", factor, "must be below 1, since the second circle is the inner one")
        self.scale = number("scale", scale, above=0)

    def sample(self, n: int, rng: np.random.Generator) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        with holding_interrupts():
            from sklearn.datasets import make_circles

        state = int(rng.integers(2**32))
        x, y = make_circles(n, noise=self.noise or None, factor=self.factor, random_state=state)
        return self.scale * x, y


class Spirals(Generated):
    """Interleaved arms of Archimedean spirals around the origin, one class each.

    Arm c is the curve of the points with the angle 2 pi (turns t + c / n_classes) at the distance scale t from the
    origin, for t in [0.2, 1]. Two arms are `scale` / (`turns` `n_classes`) apart along a ray. The points of an arm
    have t^2 uniform, which spreads them about evenly along it. Two arms are a classification with one output, more
    are multiclass with an output for each.

    Args:
        n_classes: the number of arms, at least 2.
        turns: of each arm around the origin, from t = 0 to t = 1.
        noise: standard deviation of the Gaussian noise, before scaling.
        scale: the distance of the outer ends from the origin.
    """

    n_inputs = 2
    per_run = ("noise",)

    def __init__(
        self,
        n_classes: int = 3,
        turns: float = 1.0,
        noise: float = 0.02,
        scale: float = 3.0,
        n_train: int = 2000,
        n_val: int = 1000,
        n_test: int = 2000,
    ) -> None:
        super().__init__(n_train, n_val, n_test)
        self.n_classes = whole("n_classes", n_classes, least=2)
        self.task = "classification" if n_classes == 2 else "multiclass"
        self.n_outputs = 1 if n_classes == 2 else n_classes
        self.turns = number("turns", turns, least=0)
        self.noise = number("noise", noise, least=0)
        self.scale = number("scale", scale, above=0)

    def sample(self, n: int, rng: np.random.Generator) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        y = np.arange(n) % self.n_classes
        t = np.sqrt(rng.uniform(0.2**2, 1, size=n))
        angle = 2 * np.pi * (self.turns * t + y / self.n_classes)
        x = np.stack([t * np.cos(angle), t * np.sin(angle)], axis=1)
        return self.scale * (x + self.noise * rng.standard_normal((n, 2))), y


class AbsoluteValue(Generated):
    """The function |x| with x uniform on [-1, 1]."""

    task = "regression"
    n_inputs = 1

    def sample(self, n: int, rng: np.random.Generator) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        x = rng.uniform(-1, 1, size=(n, 1)).astype(np.float32)
        return x, np.abs(x[:, 0])


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


class Cones(Generated):
    """Point masses (y = 1) against unit spheres around them (y = 0), in the norm p.

    All mass has to move by 1, so the Wasserstein-1 distance of the two is 1, and f(x) = -min_i ||x - c_i||_p, a
    landscape of cones, is the 1-Lipschitz function that attains it. The centres c_i lie on the first axis. Every
    point on a sphere comes with its opposite, since a sample that leans to one side would reward a linear f.

    Args:
        n_inputs: D.
        n_cones: the number of centres.
        spacing: between two centres; at least 2, so that no sphere comes closer than 1 to another centre.
        p: the norm of the spheres, 1, 2 or inf; it must be the one in which the constraint bounds f.

    Reference: Anil, Lucas and Grosse 2019, "Sorting out Lipschitz function approximation", section 5.1.
    """

    task = "transport"

    def __init__(
        self,
        n_inputs: int = 2,
        n_cones: int = 3,
        spacing: float = 2.0,
        p: float | str = 2,
        n_train: int = 2000,
        n_val: int = 1000,
        n_test: int = 2000,
    ) -> None:
        super().__init__(n_train, n_val, n_test)
        self.n_inputs = whole("n_inputs", n_inputs, least=1)
        self.n_cones = whole("n_cones", n_cones, least=1)
        self.spacing = number("spacing", spacing, least=2)
        self.p: float = norm_order("p", p)

    def sample(self, n: int, rng: np.random.Generator) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        y = np.arange(n) % 2
        x = np.zeros((n, self.n_inputs))
        # The rows come in fours, one centre after the other: the centre, a point of its sphere, the centre again,
        # and the opposite point of the sphere.
        x[:, 0] = self.spacing * (np.arange(n) // 4 % self.n_cones - (self.n_cones - 1) / 2)
        x[y == 0] += _with_opposites(on_sphere((n + 3) // 4, self.n_inputs, self.p, rng))[: n - n // 2]
        return x, y


def _with_opposites(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """(2n, D) each row of x (n, D) and its negative, in turn."""
    return np.stack([x, -x], axis=1).reshape(-1, x.shape[1])


def on_sphere(n: int, dims: int, p: float, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """(n, D) points with ||x||_p = 1: uniform on the sphere for p = 2, on the faces for p = 1 and inf."""
    if p == 2:
        x = rng.standard_normal((n, dims))
        return x / np.linalg.norm(x, axis=1, keepdims=True)
    signs = rng.choice([-1.0, 1.0], size=(n, dims))
    if p == 1:
        return signs * rng.dirichlet(np.ones(dims), size=n)
    x = rng.uniform(-1, 1, size=(n, dims))
    face = rng.integers(dims, size=n)
    x[np.arange(n), face] = signs[np.arange(n), face]
    return x
