"""Optimisers over K stacked runs, whose parameters lie in one (K, P) tensor: P numbers a run.

torch.optim takes one learning rate for a tensor; here each run has its own.

To add one: a class derived from `Optimiser`, and one file in conf/optim/. Derived from `Scheduled`, which has the
schedules, weight decay and clipping, it only has to say how it moves.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lipexp.config import ConfigError, number, one_of


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


def one_cycle(progress: float) -> float:
    """From 1/25 up to 1 at 0.3 and down to 1/250,000 at 1, each along half a cosine.

    Reference: Smith and Topin 2017, "Super-convergence" (arXiv 1708.07120); the figures are those of
    torch.optim.lr_scheduler.OneCycleLR.
    """
    low, way = (1 / 25, progress / 0.3) if progress < 0.3 else (1 / 250_000, (1 - progress) / 0.7)
    return low + (1 - low) * (1 - math.cos(math.pi * way)) / 2


# The learning rate, in units of lr, when this fraction of the run is done.
SCHEDULES: dict[str, Callable[[float, Scheduled], float]] = {
    "cosine": lambda progress, own: (1 + math.cos(math.pi * progress)) / 2,
    "linear": lambda progress, own: 1 - progress,
    "constant": lambda progress, own: 1.0,
    "one_cycle": lambda progress, own: one_cycle(progress),
    "milestones": lambda progress, own: own.decay ** sum(progress >= mark for mark in own.milestones),
}


@dataclass(eq=False)
class Scheduled(Optimiser):
    """Base of those that follow the gradient g at the rate lr s, where the schedule says s, in [0, 1].

    Before that, g is shortened to the 2-norm `clip` where it is longer, each run's by itself, as by
    torch.nn.utils.clip_grad_norm_. Weight decay then adds weight_decay p to g or, where it is `decoupled`, takes
    lr s weight_decay p from the parameters p.

    | member                              | what it is                                                           |
    |-------------------------------------|----------------------------------------------------------------------|
    | `begin(parameters)`                 | begins new runs, for parameters (K, P)                               |
    | `move(parameters, gradient, scale)` | one step, in place, for g (K, P), at the rate `scale` times `_lr`,   |
    |                                     | which is (K, 1) or (1, 1)                                            |
    | `decoupled`                         | whether weight decay is                                              |

    Args:
        lr: the learning rate, where the schedule is at its largest.
        weight_decay: how strongly parameters are drawn to zero.
        clip: the largest 2-norm of a run's gradient; None: any.
        schedule: `cosine`, `linear` (both fall to zero over the run), `constant`, `one_cycle` (rises until 0.3 of
            the run is done, then falls), or `milestones` (is multiplied by `decay` at each of them).
        milestones: fractions of the run, for schedule=milestones.
        decay: a factor, for schedule=milestones.
    """

    lr: float = 0.01
    weight_decay: float = 0.0
    clip: float | None = None
    schedule: str = "cosine"
    milestones: Sequence[float] = (0.3, 0.6)
    decay: float = 0.1

    per_run: tuple[str, ...] = field(default=("lr", "weight_decay"), init=False)
    decoupled = False

    def __post_init__(self) -> None:
        self.lr = number("lr", self.lr, above=0)
        self.weight_decay = number("weight_decay", self.weight_decay, least=0)
        if self.clip is not None:
            self.clip = number("clip", self.clip, above=0)
            self.per_run = (*self.per_run, "clip")  # runs that clip and runs that do not are of two signatures
        self.schedule = one_of("schedule", self.schedule, list(SCHEDULES))
        self.milestones = _below_one("milestones", self.milestones)
        self.decay = number("decay", self.decay, above=0, most=1)

    @abstractmethod
    def begin(self, parameters: Tensor) -> None: ...

    @abstractmethod
    def move(self, parameters: Tensor, gradient: Tensor, scale: float) -> None: ...

    def start(self, parameters: Tensor) -> None:
        self._lr = _column(self.lr, parameters)
        self._weight_decay = _column(self.weight_decay, parameters)
        self._decays = bool((self._weight_decay != 0).any())
        self._clip = None if self.clip is None else _column(self.clip, parameters)
        self.begin(parameters)

    def step(self, parameters: Tensor, gradient: Tensor, progress: float) -> None:
        scale = SCHEDULES[self.schedule](progress, self)
        if self._clip is not None:
            length = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)  # (K, 1)
            gradient = gradient * (self._clip / (length + 1e-6)).clamp_max(1)
        if self._decays and self.decoupled:
            parameters.mul_(1 - self._lr * scale * self._weight_decay)
        elif self._decays:
            gradient = gradient + self._weight_decay * parameters
        self.move(parameters, gradient, scale)


@dataclass(eq=False)
class Adam(Scheduled):
    """Adam with bias correction, as torch.optim.Adam, each run with its own learning rate.

    m <- b1 m + (1 - b1) g,  v <- b2 v + (1 - b2) g^2,  p <- p - lr s m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)

    Args, beyond those of `Scheduled`:
        betas: b1 and b2.
        eps: keeps the quotient finite.

    Reference: Kingma and Ba 2015, "Adam" (arXiv 1412.6980), algorithm 1.
    """

    betas: Sequence[float] = (0.9, 0.99)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        self.betas = _below_one("betas", self.betas, 2)
        self.eps = number("eps", self.eps, above=0)

    def begin(self, parameters: Tensor) -> None:
        self._steps_done = 0
        self._m = torch.zeros_like(parameters)
        self._v = torch.zeros_like(parameters)

    def move(self, parameters: Tensor, gradient: Tensor, scale: float) -> None:
        self._steps_done += 1
        b1, b2 = self.betas
        self._m.lerp_(gradient, 1 - b1)
        self._v.mul_(b2).addcmul_(gradient, gradient, value=1 - b2)
        # As sqrt(v / c) + eps = (sqrt(v) + eps sqrt(c)) / sqrt(c), the factor moves into the rate: one pass less.
        root_c = math.sqrt(1 - b2**self._steps_done)
        direction = self._v.sqrt().add_(self.eps * root_c)
        torch.div(self._m, direction, out=direction)
        parameters.addcmul_(direction, self._lr * -(scale * root_c / (1 - b1**self._steps_done)))


@dataclass(eq=False)
class AdamW(Adam):
    """Adam with decoupled weight decay, as torch.optim.AdamW: p <- (1 - lr s weight_decay) p before each step.

    `Adam` divides the pull to zero by sqrt(v), with the gradient that it is part of; here it has the same strength
    for every parameter.

    Reference: Loshchilov and Hutter 2019, "Decoupled weight decay regularization" (arXiv 1711.05101), algorithm 2.
    """

    weight_decay: float = 0.01

    decoupled = True


@dataclass(eq=False)
class SGD(Scheduled):
    """Gradient descent with momentum, as torch.optim.SGD: v <- momentum v + g,  p <- p - lr s v.

    With Nesterov's momentum it is p <- p - lr s (g + momentum v), the step from where v is about to lead.

    Args, beyond those of `Scheduled`:
        momentum: 0 is plain gradient descent.
        nesterov: take Nesterov's momentum.

    Reference: Sutskever et al. 2013, "On the importance of initialization and momentum in deep learning".
    """

    lr: float = 0.03
    momentum: float = 0.9
    nesterov: bool = False

    per_run: tuple[str, ...] = field(default=("lr", "weight_decay", "momentum"), init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.momentum = number("momentum", self.momentum, least=0, most=1)
        if not isinstance(self.nesterov, bool):
            raise ConfigError("nesterov", self.nesterov, "must be true or false")

    def begin(self, parameters: Tensor) -> None:
        self._momentum = _column(self.momentum, parameters)
        self._velocity = torch.zeros_like(parameters)

    def move(self, parameters: Tensor, gradient: Tensor, scale: float) -> None:
        self._velocity.mul_(self._momentum).add_(gradient)
        direction = gradient + self._momentum * self._velocity if self.nesterov else self._velocity
        parameters.addcmul_(direction, self._lr * -scale)


@dataclass(eq=False)
class AggMo(Scheduled):
    """Gradient descent with M momenta at once: v_i <- beta_i v_i + g for each,  p <- p - lr s mean_i v_i.

    The small ones damp the oscillations of the large ones. The published v_i have the other sign.

    Args, beyond those of `Scheduled`:
        betas: the momenta.

    Reference: Lucas et al. 2019, "Aggregated momentum: stability through passive damping" (arXiv 1804.00325).
    """

    betas: Sequence[float] = (0.0, 0.9, 0.99)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.betas = _below_one("betas", self.betas)

    def begin(self, parameters: Tensor) -> None:
        self._betas = parameters.new_tensor(self.betas).view(-1, 1, 1)  # (M, 1, 1)
        self._velocities = parameters.new_zeros(len(self.betas), *parameters.shape)  # (M, K, P)

    def move(self, parameters: Tensor, gradient: Tensor, scale: float) -> None:
        self._velocities.mul_(self._betas).add_(gradient)
        parameters.addcmul_(self._velocities.mean(dim=0), self._lr * -scale)


def _column(value: Any, like: Tensor) -> Tensor:
    """A float or a (K,) tensor as (K, 1), or (1, 1), of the type of `like`."""
    return torch.as_tensor(value, dtype=like.dtype, device=like.device).reshape(-1, 1)


def _below_one(option: str, values: Any, count: int | None = None) -> tuple[float, ...]:
    """`values` as numbers in [0, 1): `count` of them, or any number but none.

    Raises:
        ConfigError: they are not.
    """
    try:
        found = tuple(float(value) for value in values)
    except (TypeError, ValueError):
        found = ()
    if not found or len(found) != (count or len(found)) or not all(0 <= value < 1 for value in found):
        raise ConfigError(option, values, f"must be {'two ' if count else ''}numbers in [0, 1)")
    return found
