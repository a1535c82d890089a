"""Points on spheres and in balls, of any dimension."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from lipexp.config import norm_order, number, whole
from lipexp.datasets.base import Generated


class Annulus(Generated):
    """A ball (class 1) inside a shell (class 0), both filled uniformly: in the plane a disc in a ring.

    The ball is ||x||_2 <= `radius`, the shell `radius` + `gap` <= ||x||_2 <= `radius` + `gap` + `width`. So the
    classes are `gap` apart, and the 1-Lipschitz function `radius` + `gap` / 2 - ||x||_2 tells them apart with the
    margin `gap` / 2.

    Args:
        n_inputs: D.
        radius: of the ball.
        gap: between the ball and the shell; at 1 each point can be 0.5 away from the other class.
        width: of the shell.
    """

    task = "classification"
    per_run = ("gap",)

    def __init__(
        self,
        n_inputs: int = 2,
        radius: float = 1.0,
        gap: float = 1.0,
        width: float = 1.0,
        n_train: int = 2000,
        n_val: int = 1000,
        n_test: int = 2000,
    ) -> None:
        super().__init__(n_train, n_val, n_test)
        self.n_inputs = whole("n_inputs", n_inputs, least=1)
        self.radius = number("radius", radius, above=0)
        self.gap = number("gap", gap, least=0)
        self.width = number("width", width, above=0)

    def sample(self, n: int, rng: np.random.Generator) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        y = np.arange(n) % 2
        inside = self.radius + self.gap
        low, high = np.where(y, 0, inside), np.where(y, self.radius, inside + self.width)
        # A volume grows with the power D of the radius, which is uniform then; low / high keeps it in range.
        radius = high * rng.uniform((low / high) ** self.n_inputs, 1) ** (1 / self.n_inputs)
        return radius[:, None] * on_sphere(n, self.n_inputs, 2, rng), y


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
