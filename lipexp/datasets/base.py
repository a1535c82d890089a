"""What every dataset is: three parts of points and targets, drawn from a stream."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lipexp.config import ConfigError, whole
from lipexp.tasks import TASKS

if TYPE_CHECKING:
    from lipexp.datasets.preprocessing import Preprocessing

Array = npt.NDArray[np.float32]
MOST_CLASSES = 100  # of a user's file: each pair of classes has a constant of its own


class Data(NamedTuple):
    """The training, validation and test data of one run."""

    train_x: Array  # (N, D)
    train_y: Array  # (N,), or (N, C) for several targets
    val_x: Array
    val_y: Array
    test_x: Array
    test_y: Array

    def part(self, split: str) -> tuple[Array, Array]:
        """The points and targets of `train`, `val` or `test`."""
        return getattr(self, f"{split}_x"), getattr(self, f"{split}_y")

    @property
    def x(self) -> Array:
        """All points, those of the training set first, then validation and test."""
        return np.concatenate([self.train_x, self.val_x, self.test_x])

    @property
    def y(self) -> Array:
        """All targets, in the order of the points."""
        return np.concatenate([self.train_y, self.val_y, self.test_y])


class Dataset(ABC):
    """What a run learns.

    | member         | what it is                                                                            |
    |----------------|---------------------------------------------------------------------------------------|
    | `task`         | classification (two classes, one output), multiclass, regression or transport: see    |
    |                | tasks.py                                                                              |
    | `n_inputs`     | D                                                                                     |
    | `n_outputs`    | C: the number of classes if there are more than two, of targets of a regression, or 1 |
    | `n_train`      | the number of training points that `draw` returns                                     |
    | `n_val`        | the number of validation points, on which settings and checkpoints are chosen         |
    | `n_test`       | the number of test points                                                             |
    | `draw(stream)` | the data of one run, finite; the same for the same stream. Every place of use gets    |
    |                | them checked and in float32 (members.py)                                              |
    | `p`            | the norm in which its points are meant to move, if that is part of the problem; the   |
    |                | constraint must bound the network in the same one. None: any                          |
    | `features`     | a name for each input, if they have any                                               |
    | `classes`      | a name for each class, if they have any                                               |
    | `per_run`      | the arguments that may differ between the runs of a stack                             |
    | `preprocessing`| what has turned a user's rows into the points, which is kept in the run's folder       |
    | `about`        | a line for the screen of a run: what was made of a user's file                        |
    """

    task = ""
    n_inputs = 0
    n_outputs = 1
    n_train = 0
    n_val = 0
    n_test = 0
    p: float | None = None
    features: Sequence[str] = ()
    classes: Sequence[str] = ()
    per_run: tuple[str, ...] = ()
    preprocessing: Preprocessing | None = None
    about = ""

    @abstractmethod
    def draw(self, stream: np.random.SeedSequence) -> Data: ...


class Generated(Dataset):
    """Base of the datasets that can draw any number of points: `sample` draws n of them."""

    def __init__(self, n_train: int = 2000, n_val: int = 1000, n_test: int = 2000) -> None:
        self.n_train = whole("n_train", n_train, least=1)
        self.n_val = whole("n_val", n_val, least=1)
        self.n_test = whole("n_test", n_test, least=1)

    @abstractmethod
    def sample(self, n: int, rng: np.random.Generator) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """n points (n, D) and their targets (n,)."""

    def draw(self, stream: np.random.SeedSequence) -> Data:
        """Each of the three sets comes from a child of its own of the stream."""
        train, test, val = (np.random.default_rng(self._part(stream, part)) for part in range(3))
        with np.errstate(over="ignore"):  # what is infinite then is refused in one line
            parts = [
                np.asarray(array, dtype=np.float32)
                for n, rng in ((self.n_train, train), (self.n_val, val), (self.n_test, test))
                for array in self.sample(n, rng)
            ]
        return Data(*parts)

    @staticmethod
    def _part(stream: np.random.SeedSequence, number: int) -> np.random.SeedSequence:
        """A child of the stream. stream.spawn counts its calls: it would not give the same children again."""
        return np.random.SeedSequence(stream.entropy, spawn_key=(*stream.spawn_key, number))


class Finite(Dataset):
    """Base of the datasets with a fixed number of rows, which a run's stream shuffles and splits.

    The test set comes first, then validation and training, so that neither of the first two depends on the number
    of training points. What the three leave over is not used. If the targets are classes, each part has as many of
    each class as is its share, up to rounding. A derived class sets `n_points` before it calls this constructor,
    and loads the rows in `load`.
    """

    n_points = 0

    def __init__(self, n_train: int, n_val: int, n_test: int) -> None:
        self.n_train = whole("n_train", n_train, least=1)
        self.n_val = whole("n_val", n_val, least=1)
        self.n_test = whole("n_test", n_test, least=1)
        if self.n_train + self.n_val + self.n_test > self.n_points:
            room = f"n_train + n_val + n_test must be at most {self.n_points}, the number of points"
            raise ConfigError("n_train", n_train, f"{room} (n_val={n_val}, n_test={n_test})")

    @abstractmethod
    def load(self) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """All points (n_points, D) and their targets."""

    def draw(self, stream: np.random.SeedSequence) -> Data:
        points, targets = self.load()
        order = shuffled(np.asarray(targets), TASKS[self.task].has_classes, np.random.default_rng(stream))
        ends = np.cumsum([self.n_test, self.n_val, self.n_train])
        test, val, train = np.split(order[: ends[-1]], ends[:-1])
        x, y = np.asarray(points, dtype=np.float32), np.asarray(targets, dtype=np.float32)
        return Data(x[train], y[train], x[val], y[val], x[test], y[test])


def shuffled(targets: npt.NDArray[Any], classes: bool, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """The rows in random order, of which any part has the shares of the `classes`, up to rounding."""
    order = rng.permutation(len(targets))
    return order[np.argsort(_spread(targets[order]), kind="stable")] if classes else order


def _spread(classes: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """(N,) a place in [0, 1] for each row, such that the rows of each class are evenly spaced."""
    places = np.empty(len(classes))
    for value in np.unique(classes):
        (rows,) = np.nonzero(classes == value)
        places[rows] = (np.arange(len(rows)) + 0.5) / len(rows)
    return places
