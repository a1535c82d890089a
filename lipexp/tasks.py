"""Tasks: what the targets of a dataset mean, and what follows from that for the whole program.

Shapes: K runs, N points, C outputs. Outputs f and targets y are tensors (K, N). Several outputs are an f of shape
(K, N, C), and so is y for a regression with several targets. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

SPLITS = ("train", "val", "test")  # the parts of the data: learnt from; chosen on; reported once

Score = Callable[["Tensor", "Tensor"], "Tensor"]  # f, y -> (K,)


@dataclass(frozen=True)
class Task:
    """One kind of problem."""

    scores: Mapping[str, Score]  # in metrics.json, beside the loss of each part of the data; first the metric
    larger_is_better: bool
    called: str  # in messages
    targets: str  # what y may be, for messages
    has_classes: bool  # y is 0, 1, ...
    decides: bool  # the outputs predict a class, so that a point has a certified radius
    several: bool = False  # there is an output for each class, of which the largest decides

    @property
    def metric(self) -> str:
        """The name of what is compared and optimised."""
        return next(iter(self.scores))

    def value(self, score: float, loss: float) -> tuple[float, float]:
        """How good a network is, larger is better: by its metric, among equals by its loss."""
        return (score if self.larger_is_better else -score), -loss


def decision(f: Tensor) -> Tensor:
    """(N,) the number of the class that outputs f (N, C) decide for: the largest; a single one by its sign."""
    return f.argmax(dim=1) if f.shape[1] > 1 else (f[:, 0] > 0).long()


def squeezed(f: Tensor) -> Tensor:
    """Outputs (K, N, C) as losses and scores take them: (K, N) where C is 1."""
    return f.squeeze(-1) if f.shape[-1] == 1 else f


def accuracy(f: Tensor, y: Tensor) -> Tensor:
    """The fraction of points with f > 0 where y = 1 and f <= 0 where y = 0."""
    return ((f > 0) == (y > 0.5)).double().mean(dim=1)


def accuracy_of_largest(f: Tensor, y: Tensor) -> Tensor:
    """The fraction of points whose largest output is that of their class."""
    return (f.argmax(dim=-1) == y).double().mean(dim=1)


def mean_squared_error(f: Tensor, y: Tensor) -> Tensor:
    """The mean of (f - y)^2, over the points and over the targets."""
    return (f - y).square().flatten(1).mean(dim=1)


def r2(f: Tensor, y: Tensor) -> Tensor:
    """The coefficient of determination 1 - sum (f - y)^2 / sum (y - mean y)^2, the mean of all targets'.

    As in scikit-learn it is 1 or 0 for a target that is constant, whether that is met or not.
    """
    rest = (f - y).square().sum(dim=1)
    total = (y - y.mean(dim=1, keepdim=True)).square().sum(dim=1)
    share = rest / total.masked_fill(total == 0, 1)
    return (1 - share.where(total > 0, (rest > 0).to(share))).reshape(len(f), -1).mean(dim=1)


def difference_of_means(f: Tensor, y: Tensor) -> Tensor:
    """mean of f where y = 1 - mean of f where y = 0."""
    return (class_weights(y) * f).sum(dim=1)


def class_weights(y: Tensor) -> Tensor:
    """(K, N) 1 / n_1 where y = 1 and -1 / n_0 where y = 0, with n_1 and n_0 counted among each run's N targets."""
    ones = y.sum(dim=1, keepdim=True)
    zeros = y.shape[1] - ones
    return y / ones.clamp_min(1) - (1 - y) / zeros.clamp_min(1)


TASKS = {
    "classification": Task({"accuracy": accuracy}, True, "two classes", "0 and 1", has_classes=True, decides=True),
    "multiclass": Task(
        {"accuracy": accuracy_of_largest},
        True,
        "several classes",
        "0, 1, ..., C - 1",
        has_classes=True,
        decides=True,
        several=True,
    ),
    "transport": Task(
        {"score": difference_of_means},
        True,
        "distributions to transport",
        "0 and 1",
        has_classes=True,
        decides=False,
    ),
    "regression": Task(
        {"mse": mean_squared_error, "r2": r2},
        False,
        "numbers to fit",
        "any number",
        has_classes=False,
        decides=False,
    ),
}
METRICS = {task.metric: task.larger_is_better for task in TASKS.values()}  # -> larger is better
