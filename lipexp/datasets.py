"""Datasets: points and targets, drawn from a run's own random stream.

Shapes: N points, D inputs. Points are (N, D) and targets (N,), both float32; classes are 0 and 1.

To add one: a class derived from `Dataset`, or from `Generated` for one that can draw any number of points, and one
file in conf/dataset/.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lipexp.config import ConfigError, norm_order, number, whole
from lipexp.process import holding_interrupts

Array = npt.NDArray[np.float32]


class Data(NamedTuple):
    """The training and test data of one run."""

    train_x: Array  # (N, D)
    train_y: Array  # (N,)
    test_x: Array
    test_y: Array


class Dataset(ABC):
    """What a run learns.

    | member         | what it is                                                                            |
    |----------------|---------------------------------------------------------------------------------------|
    | `task`         | classification, regression or transport: see tasks.py                                 |
    | `n_inputs`     | D                                                                                     |
    | `n_outputs`    | C; only 1 is supported so far                                                         |
    | `n_train`      | the number of training points that `draw` returns                                     |
    | `n_test`       | the number of test points                                                             |
    | `draw(stream)` | the data of one run, finite; the same for the same stream. Every place of use gets    |
    |                | them checked and in float32 (members.py)                                              |
    | `p`            | the norm in which its points are meant to move, if that is part of the problem; the   |
    |                | constraint must bound the network in the same one. None: any                          |
    | `per_run`      | the arguments that may differ between the runs of a stack                             |
    """

    task = ""
    n_inputs = 0
    n_outputs = 1
    n_train = 0
    n_test = 0
    p: float | None = None
    per_run: tuple[str, ...] = ()

    @abstractmethod
    def draw(self, stream: np.random.SeedSequence) -> Data: ...


class Generated(Dataset):
    """Base of the datasets that can draw any number of points: `sample` draws n of them."""

    def __init__(self, n_train: int, n_test: int) -> None:
        self.n_train = whole("n_train", n_train, least=1)
        self.n_test = whole("n_test", n_test, least=1)

    @abstractmethod
    def sample(self, n: int, rng: np.random.Generator) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """n points (n, D) and their targets (n,)."""

    def draw(self, stream: np.random.SeedSequence) -> Data:
        """The training and the test set come from two children of the stream."""
        # Not stream.spawn(2), which counts its calls: the same stream must draw the same data again.
        keys = [(*stream.spawn_key, part) for part in range(2)]
        train, test = (
            np.random.default_rng(np.random.SeedSequence(stream.entropy, spawn_key=key)) for key in keys
        )
        train_x, train_y = self.sample(self.n_train, train)
        test_x, test_y = self.sample(self.n_test, test)
        with np.errstate(over="ignore"):  # what is infinite then is refused in one line
            return Data(*(np.asarray(a, dtype=np.float32) for a in (train_x, train_y, test_x, test_y)))


class TwoMoons(Generated):
    """Two interleaved half circles, one class each: scikit-learn's make_moons, its points times `scale`.

    Args:
        noise: standard deviation of the Gaussian noise, before scaling.
        scale: the factor; at 2 the noiseless moons are 1 apart at their tips.
    """

    task = "classification"
    n_inputs = 2
    per_run = ("noise",)

    def __init__(self, noise: float = 0.05, scale: float = 2.0, n_train: int = 2000, n_test: int = 2000) -> None:
        super().__init__(n_train, n_test)
        self.noise = number("noise", noise, least=0)
        self.scale = number("scale", scale, above=0)

    def sample(self, n: int, rng: np.random.Generator) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        with holding_interrupts():  # imported here, as it takes half a second and few datasets need it
            from sklearn.datasets import make_moons

        x, y = make_moons(n, noise=self.noise or None, random_state=int(rng.integers(2**32)))
        return self.scale * x, y


class AbsoluteValue(Generated):
    """The function |x| with x uniform on [-1, 1]."""

    task = "regression"
    n_inputs = 1

    def __init__(self, n_train: int = 2000, n_test: int = 2000) -> None:
        super().__init__(n_train, n_test)

    def sample(self, n: int, rng: np.random.Generator) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        x = rng.uniform(-1, 1, size=(n, 1)).astype(np.float32)
        return x, np.abs(x[:, 0])


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
        n_test: int = 2000,
    ) -> None:
        super().__init__(n_train, n_test)
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


class DigitsParity(Dataset):
    """Handwritten digits in 64 dimensions, odd (1) against even (0): scikit-learn's 8 x 8 images, in [0, 1].

    There are 1,797 of them, all different. A run's stream shuffles them; the test set comes first, then the
    training set.
    """

    task = "classification"
    n_inputs = 64
    n_points = 1797

    def __init__(self, n_train: int = 1397, n_test: int = 400) -> None:
        self.n_train = whole("n_train", n_train, least=1)
        self.n_test = whole("n_test", n_test, least=1)
        if self.n_train + self.n_test > self.n_points:
            room = f"n_train + n_test must be at most {self.n_points}, the number of digits"
            raise ConfigError("n_train", n_train, f"{room} (n_test={n_test})")

    def draw(self, stream: np.random.SeedSequence) -> Data:
        with holding_interrupts():
            from sklearn.datasets import load_digits

        images, digits = load_digits(return_X_y=True)
        order = np.random.default_rng(stream).permutation(self.n_points)[: self.n_test + self.n_train]
        x = np.asarray(images[order] / 16, dtype=np.float32)
        y = np.asarray(digits[order] % 2, dtype=np.float32)
        return Data(x[self.n_test :], y[self.n_test :], x[: self.n_test], y[: self.n_test])
