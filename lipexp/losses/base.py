"""What every loss is, what every scaled one shares, and other modules as losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hydra.utils import get_class
from omegaconf import OmegaConf
from torch import Tensor, nn

from lipexp.config import ConfigError, conf_dir, lipschitz_constant, number, one_line


class Loss(nn.Module):
    """A map `forward(f, y)` from outputs and targets to one number per sample (K, B).

    f is (K, B), or (K, B, C) for more than one output; y is (K, B), or as f for a regression with several targets.

    | declaration | what it says                                                                             |
    |-------------|------------------------------------------------------------------------------------------|
    | `task`      | the kind of target that it fits, see tasks.py, or a tuple of several; "" fits all        |
    | `per_run`   | the arguments that may differ between the runs of a stack: each is an attribute of the   |
    |             | same name, read in `forward` and nowhere else, where it may be a (K,) tensor (`column`)  |

    It trains in float32 on the device, and is evaluated in float64 on the CPU.
    """

    task: str | tuple[str, ...] = ""
    per_run: tuple[str, ...] = ()

    def forward(self, f: Tensor, y: Tensor) -> Tensor:
        raise NotImplementedError


class Plain(Loss):
    """Any other module or function as a loss, for every task.

    A regression with several targets gives it f and y of shape (K, B, C), and the mean of what it returns is taken
    over the targets. For multiclass it gets f (K, B, C) and the classes y (K, B), as floating-point numbers, and
    has to return (K, B) itself; torch.nn.CrossEntropyLoss, which wants its axes in another order, does not.
    """

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, f: Tensor, y: Tensor) -> Tensor:
        found = self.function(f, y)
        return over_targets(found) if f.shape == y.shape == found.shape else found


def as_loss(thing: Any, name: str) -> Loss:
    """`thing`, called `name` in the configuration, as a loss.

    Raises:
        ConfigError: it cannot be called.
    """
    if not callable(thing):
        raise ConfigError("loss", name, "must be a function of outputs and targets, such as a torch.nn.Module")
    return thing if isinstance(thing, Loss) else Plain(thing)


def check_loss(loss: Loss, name: str, n_outputs: int, has_classes: bool) -> None:
    """Refuse a loss, called `name`, that does not return one number per sample for these outputs and targets.

    Raises:
        ConfigError: it raises an error, or returns a tensor of another shape.
    """
    of_outputs = () if n_outputs == 1 else (n_outputs,)
    f = torch.zeros(1, 2, *of_outputs, requires_grad=True)
    y = torch.zeros(1, 2, *(() if has_classes else of_outputs))
    y[:, 1] = 1
    try:
        shape = tuple(loss(f, y).shape)
    except Exception as error:  # a user's class may raise anything
        raise ConfigError("loss", name, f"cannot be used: {one_line(error)}") from None
    if shape != (1, 2):
        allowed = f'must return one number per sample, (K, B), not a tensor of shape {shape} (reduction="none"?)'
        raise ConfigError("loss", name, allowed)


def tasks_of(loss: Loss | type[Loss]) -> tuple[str, ...]:
    """The tasks that a loss is made for; none, if it fits all."""
    if isinstance(loss.task, str):
        return (loss.task,) if loss.task else ()
    return tuple(loss.task)


def losses_for(task: str) -> list[str]:
    """The options of conf/loss/ that are made for `task`."""
    leaves: dict[str, Any] = {path.stem: OmegaConf.load(path) for path in (conf_dir() / "loss").glob("*.yaml")}
    return sorted(name for name, leaf in leaves.items() if task in tasks_of(get_class(leaf._target_)))


def column(value: Any, like: Tensor) -> Any:
    """A float or a (K,) tensor as something that broadcasts against `like`, (K, B) or (K, B, C)."""
    return value.to(like).view(-1, *(1,) * (like.ndim - 1)) if isinstance(value, Tensor) else value


def over_targets(values: Tensor) -> Tensor:
    """(K, B) the mean over the targets of (K, B, C); what is (K, B) already stays."""
    return values.mean(dim=-1) if values.ndim == 3 else values


class Scaled(Loss):
    """Base of the losses that are divided by what L asks for.

    Args:
        lipschitz: L.
    """

    per_run: tuple[str, ...] = ("lipschitz",)

    def __init__(self, lipschitz: float = 1.0) -> None:
        super().__init__()
        self.lipschitz = lipschitz_constant("lipschitz", lipschitz)


class Tempered(Scaled):
    """Base of the losses of logits T f with a temperature T, which are divided by T as well."""

    per_run = ("temperature", "lipschitz")

    def __init__(self, temperature: float = 1.0, lipschitz: float = 1.0) -> None:
        super().__init__(lipschitz)
        self.temperature = number("temperature", temperature, above=0)


class Margined(Scaled):
    """Base of the losses with a margin, a distance in input space.

    Args:
        margin: the radius asked for, in the units of the input.
        lipschitz: L.
    """

    per_run: tuple[str, ...] = ("margin", "lipschitz")

    def __init__(self, margin: float = 0.5, lipschitz: float = 1.0) -> None:
        super().__init__(lipschitz)
        self.margin = number("margin", margin, least=0)
