"""Optimisers over K stacked runs, whose parameters lie in one (K, P) tensor: P numbers a run.

torch.optim takes one learning rate for a tensor; here each run has its own.

To add one: a class derived from `Optimiser`, and one file in conf/optim/.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lipexp.config import ConfigError, number, one_of

SCHEDULES = {
    "cosine": lambda progress: (1 + math.cos(math.pi * progress)) / 2,
    "linear": lambda progress: 1 - progress,
    "constant": lambda progress: 1.0,
}


class Optimiser(ABC):
    """Updates the parameters of K runs.

    | member                                | what it is                                                         |
    |---------------------------------------|--------------------------------------------------------------------|
    | `start(parameters)`                   | begins new runs at step 0, for parameters (K, P)                   |
    | `step(parameters, gradient, progress)`| one step, in place; `progress` in [0, 1) is the fraction of the    |
    |                                       | run that is done, for schedules; called without gradients          |
    | `per_run`                             | the arguments that may differ between the runs of a stack: each is |
    |                                       | an attribute of the same name, read in `start` and nowhere else,   |
    |                                       | where it may be a (K,) tensor                                      |
    """

    per_run: tuple[str, ...] = ()

    @abstractmethod
    def start(self, parameters: Tensor) -> None: ...

    @abstractmethod
    def step(self, parameters: Tensor, gradient: Tensor, progress: float) -> None: ...


class Adam(Optimiser):
    """Adam with bias correction, as torch.optim.Adam, each run with its own learning rate.

    m <- b1 m + (1 - b1) g,  v <- b2 v + (1 - b2) g^2,  p <- p - lr m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)

    Args:
        lr: the learning rate at the start.
        betas: b1 and b2.
        eps: keeps the quotient finite.
        weight_decay: adds weight_decay * p to the gradient.
        schedule: how the learning rate falls from lr towards zero over the run: `cosine`, `linear`, or `constant`.

    Reference: Kingma and Ba 2015, "Adam" (arXiv 1412.6980), algorithm 1.
    """

    per_run = ("lr", "weight_decay")

    def __init__(
        self,
        lr: float = 0.01,
        betas: Sequence[float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        schedule: str = "cosine",
    ) -> None:
        self.lr = number("lr", lr, above=0)
        self.betas = _decay_rates(betas)
        self.eps = number("eps", eps, above=0)
        self.weight_decay = number("weight_decay", weight_decay, least=0)
        self.schedule = one_of("schedule", schedule, list(SCHEDULES))

    def start(self, parameters: Tensor) -> None:
        self._steps_done = 0
        self._m = torch.zeros_like(parameters)
        self._v = torch.zeros_like(parameters)
        self._lr = _column(self.lr, parameters)
        self._weight_decay = _column(self.weight_decay, parameters)
        self._decays = bool((self._weight_decay != 0).any())

    def step(self, parameters: Tensor, gradient: Tensor, progress: float) -> None:
        self._steps_done += 1
        b1, b2 = self.betas
        if self._decays:
            gradient = gradient + self._weight_decay * parameters
        self._m.lerp_(gradient, 1 - b1)
        self._v.mul_(b2).addcmul_(gradient, gradient, value=1 - b2)
        # As sqrt(v / c) + eps = (sqrt(v) + eps sqrt(c)) / sqrt(c), the factor moves into the rate: one pass less.
        root_c = math.sqrt(1 - b2**self._steps_done)
        direction = self._v.sqrt().add_(self.eps * root_c)
        torch.div(self._m, direction, out=direction)
        rate = SCHEDULES[self.schedule](progress) * root_c / (1 - b1**self._steps_done)
        parameters.addcmul_(direction, self._lr * -rate)


def _column(value: Any, like: Tensor) -> Tensor:
    """A float or a (K,) tensor as (K, 1), or (1, 1), of the type of `like`."""
    return torch.as_tensor(value, dtype=like.dtype, device=like.device).reshape(-1, 1)


def _decay_rates(betas: Any) -> tuple[float, float]:
    try:
        b1, b2 = (float(b) for b in betas)
    except (TypeError, ValueError):
        b1 = b2 = -1.0
    if not (0 <= b1 < 1 and 0 <= b2 < 1):
        raise ConfigError("betas", betas, "must be two numbers in [0, 1)")
    return b1, b2
