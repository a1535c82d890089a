"""Losses: how far the outputs f(x) are from the targets y, sample by sample.

Shapes: K runs, B points. Outputs f and targets y are (K, B); a loss returns (K, B), and the loop takes the mean
over B for each run. Targets are {0, 1} for classification and transport, any number for regression.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lipexp.config import lipschitz_constant, number


class Loss(nn.Module):
    """Base of the losses. `task` is the kind of target a loss fits, as in datasets.py."""

    task = ""
    per_run: tuple[str, ...] = ()


def _per_run(value: Any, like: Tensor) -> Any:
    """A float or a (K,) tensor as something that broadcasts against `like` (K, B)."""
    return value.to(like).view(-1, 1) if isinstance(value, Tensor) else value


class BCE(Loss):
    """Binary cross-entropy of logits with a temperature: BCE(T f, y) / T with y in {0, 1}.

    It falls for ever as margins grow, so under a gradient bound it trades errors for margins. A large T makes it
    attend to small margins: at T -> infinity it is the hinge loss with margin 0.

    Reference: Bethune et al. 2022, "Pay attention to your loss" (arXiv 2104.05097).
    """

    task = "classification"
    per_run = ("temperature",)

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = number("temperature", temperature, above=0)

    def forward(self, f: Tensor, y: Tensor) -> Tensor:
        temperature = _per_run(self.temperature, f)
        return functional.binary_cross_entropy_with_logits(temperature * f, y, reduction="none") / temperature


class Hinge(Loss):
    """max(0, m - s f) / L with s = 2 y - 1 and m = margin * L, y in {0, 1}.

    It stops at its margin, so a bounded network can spend its slope on the decision line. `margin` is a distance
    in input space: a point with no loss is at least `margin` away from every point where f has the other sign.
    Dividing by L makes training the same for every L up to the scale of f.

    Args:
        margin: the radius asked for, in the units of the input.
        lipschitz: L.
    """

    task = "classification"
    per_run = ("margin", "lipschitz")

    def __init__(self, margin: float = 0.5, lipschitz: float = 1.0) -> None:
        super().__init__()
        self.margin = number("margin", margin, least=0)
        self.lipschitz = lipschitz_constant("lipschitz", lipschitz)

    def forward(self, f: Tensor, y: Tensor) -> Tensor:
        return torch.relu(_per_run(self.margin, f) - (2 * y - 1) * f / _per_run(self.lipschitz, f))


class Kantorovich(Loss):
    """-(mean of f where y = 1 - mean of f where y = 0) / L: the dual of the Wasserstein-1 distance of the classes.

    Over all L-Lipschitz f the largest difference of means is L times that distance (Kantorovich and Rubinstein).
    A batch holds any number of points of each class, so a sample counts as one part of its own class: the mean
    over the batch is the loss above exactly, and a constant added to f changes nothing. Of a class without a point
    the mean is 0.

    Reference: Anil, Lucas and Grosse 2019, "Sorting out Lipschitz function approximation", section 2.3.
    """

    task = "transport"
    per_run = ("lipschitz",)

    def __init__(self, lipschitz: float = 1.0) -> None:
        super().__init__()
        self.lipschitz = lipschitz_constant("lipschitz", lipschitz)

    def forward(self, f: Tensor, y: Tensor) -> Tensor:
        return -_shares(y) * f * (y.shape[1] / _per_run(self.lipschitz, f))


def difference_of_means(f: Tensor, y: Tensor) -> Tensor:
    """(K,) mean of f where y = 1 - mean of f where y = 0, for f and y (K, B)."""
    return (_shares(y) * f).sum(dim=1)


def _shares(y: Tensor) -> Tensor:
    """(K, B) 1 / n_1 where y = 1 and -1 / n_0 where y = 0, with n_1 and n_0 of each run's B samples."""
    ones = y.sum(dim=1, keepdim=True)
    zeros = y.shape[1] - ones
    return y / ones.clamp_min(1) - (1 - y) / zeros.clamp_min(1)


class MSE(Loss):
    """(f - y)^2."""

    task = "regression"

    def forward(self, f: Tensor, y: Tensor) -> Tensor:
        return (f - y).square()
