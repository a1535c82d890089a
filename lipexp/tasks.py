"""Tasks: what the targets of a dataset mean, and what follows from that for the whole program.

Shapes: K runs, N points. Outputs f and targets y are (K, N) tensors; nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Task:
    """One kind of problem."""

    metric: str  # its name in metrics.json, under `train` and `test`
    larger_is_better: bool
    score: Callable[[Tensor, Tensor], Tensor]  # f, y -> (K,) the metric
    targets: str  # what y may be, for messages
    has_classes: bool  # y is 0 or 1
    decides: bool  # f > 0 predicts class 1, so that a point has a certified radius


def accuracy(f: Tensor, y: Tensor) -> Tensor:
    """The fraction of points with f > 0 where y = 1 and f <= 0 where y = 0."""
    return ((f > 0) == (y > 0.5)).double().mean(dim=1)


def mean_squared_error(f: Tensor, y: Tensor) -> Tensor:
    return (f - y).square().mean(dim=1)


def difference_of_means(f: Tensor, y: Tensor) -> Tensor:
    """mean of f where y = 1 - mean of f where y = 0."""
    return (class_weights(y) * f).sum(dim=1)


def class_weights(y: Tensor) -> Tensor:
    """(K, N) 1 / n_1 where y = 1 and -1 / n_0 where y = 0, with n_1 and n_0 counted among each run's N targets."""
    ones = y.sum(dim=1, keepdim=True)
    zeros = y.shape[1] - ones
    return y / ones.clamp_min(1) - (1 - y) / zeros.clamp_min(1)


TASKS = {
    "classification": Task("accuracy", True, accuracy, "0 and 1", has_classes=True, decides=True),
    "transport": Task("score", True, difference_of_means, "0 and 1", has_classes=True, decides=False),
    "regression": Task("mse", False, mean_squared_error, "any number", has_classes=False, decides=False),
}
METRICS = {task.metric: task.larger_is_better for task in TASKS.values()}  # -> larger is better
