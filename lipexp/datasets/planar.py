"""Classes in the plane, as many points as are asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from lipexp.config import ConfigError, number, whole
from lipexp.datasets.base import Generated
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


class Checkerboard(Generated):
    """The squares of a board with `n_cells` x `n_cells` cells around the origin, of the colours 0 and 1 in turn.

    Points are uniform on the squares of side `cell` - `gap` in the middles of the cells. So the squares of two
    cells side by side, and with them the classes, are `gap` apart in every norm.

    Args:
        n_cells: along each side, at least 2; an odd number gives class 0 one cell more.
        cell: the side of a cell.
        gap: between two squares, below `cell`; at 1 each point can be 0.5 away from the other class.
    """

    task = "classification"
    n_inputs = 2
    per_run = ("gap",)

    def __init__(
        self,
        n_cells: int = 4,
        cell: float = 2.0,
        gap: float = 1.0,
        n_train: int = 2000,
        n_val: int = 1000,
        n_test: int = 2000,
    ) -> None:
        super().__init__(n_train, n_val, n_test)
        self.n_cells = whole("n_cells", n_cells, least=2)
        self.cell = number("cell", cell, above=0)
        self.gap = number("gap", gap, least=0)
        if self.gap >= self.cell:
            raise ConfigError("gap", gap, f"must be below cell={cell}, of which it leaves a square")

    def sample(self, n: int, rng: np.random.Generator) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        cells = rng.integers(self.n_cells, size=(n, 2))
        middles = self.cell * (cells - (self.n_cells - 1) / 2)
        within = rng.uniform(-0.5, 0.5, size=(n, 2)) * (self.cell - self.gap)
        return middles + within, cells.sum(axis=1) % 2
