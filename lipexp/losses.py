"""Losses: how far the outputs f(x) are from the targets y, sample by sample.

Shapes: K runs, B points. Outputs f and targets y are (K, B); a loss returns (K, B), and the loop takes the mean
over B for each run. Targets are {0, 1} for classification and transport, any number for regression.

To add one: a class derived from `Loss`, and one file in conf/loss/. Any other module that returns one number per
sample, such as torch.nn.HuberLoss(reduction="none"), works as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lipexp.config import ConfigError, lipschitz_constant, number, one_line
from lipexp.tasks import class_weights


class Loss(nn.Module):
    """A map `forward(f, y)` from outputs and targets (K, B) to one number per sample (K, B).

    | declaration | what it says                                                                             |
    |-------------|------------------------------------------------------------------------------------------|
    | `task`      | the kind of target that it fits, see tasks.py; "" fits all                               |
    | `per_run`   | the arguments that may differ between the runs of a stack: each is an attribute of the   |
    |             | same name, read in `forward` and nowhere else, where it may be a (K,) tensor (`column`)  |

    It trains in float32 on the device, and is evaluated in float64 on the CPU.
    """

    task = ""
    per_run: tuple[str, ...] = ()

    def forward(self, f: Tensor, y: Tensor) -> Tensor:
        raise NotImplementedError


class Plain(Loss):
    """Any other module or function as a loss, for every task."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, f: Tensor, y: Tensor) -> Tensor:
        return self.function(f, y)


def as_loss(thing: Any, name: str) -> Loss:
    """`thing`, called `name` in the configuration, as a loss that returns one number per sample.

    Raises:
        ConfigError: it cannot be called, or returns something else.
    """
    if not callable(thing):
        raise ConfigError("loss", name, "must be a function of outputs and targets, such as a torch.nn.Module")
    loss = thing if isinstance(thing, Loss) else Plain(thing)
    probe = torch.zeros(1, 2, requires_grad=True)
    try:
        shape = tuple(loss(probe, torch.tensor([[0.0, 1.0]])).shape)
    except Exception as error:  # a user's class may raise anything
        raise ConfigError("loss", name, f"cannot be used: {one_line(error)}") from None
    if shape != (1, 2):
        allowed = f'must return one number per sample, (K, B), not a tensor of shape {shape} (reduction="none"?)'
        raise ConfigError("loss", name, allowed)
    return loss


def column(value: Any, like: Tensor) -> Any:
    """A float or a (K,) tensor as something that broadcasts against `like` (K, B)."""
    return value.to(like).view(-1, 1) if isinstance(value, Tensor) else value


class BCE(Loss):
    """Binary cross-entropy of logits with a temperature: BCE(T f, y) / (T L) with y in {0, 1}.

    It falls for ever as margins grow, so under a gradient bound it trades errors for margins. A large T makes it
    attend to small margins: at T -> infinity it is the hinge loss with margin 0. Dividing by L keeps gradients at
    a size that Adam can use, for every L.

    Reference: Bethune et al. 2022, "Pay attention to your loss" (arXiv 2104.05097).
    """

    task = "classification"
    per_run = ("temperature", "lipschitz")

    def __init__(self, temperature: float = 1.0, lipschitz: float = 1.0) -> None:
        super().__init__()
        self.temperature = number("temperature", temperature, above=0)
        self.lipschitz = lipschitz_constant("lipschitz", lipschitz)

    def forward(self, f: Tensor, y: Tensor) -> Tensor:
        temperature = column(self.temperature, f)
        entropy = functional.binary_cross_entropy_with_logits(temperature * f, y, reduction="none")
        return entropy / temperature / column(self.lipschitz, f)


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
        return torch.relu(column(self.margin, f) - (2 * y - 1) * f / column(self.lipschitz, f))


class Kantorovich(Loss):
    """-(mean of f where y = 1 - mean of f where y = 0) / L: the dual of the Wasserstein-1 distance of the classes.

    Over all L-Lipschitz f the largest difference of means is L times that distance (Kantorovich and Rubinstein).
    Each sample is weighted by the number of samples of its class in the batch, so the mean over the batch is the
    loss above exactly, and a constant added to f changes nothing. The mean of a class without a sample is 0.

    Reference: Anil, Lucas and Grosse 2019, "Sorting out Lipschitz function approximation", section 2.3.
    """

    task = "transport"
    per_run = ("lipschitz",)

    def __init__(self, lipschitz: float = 1.0) -> None:
        super().__init__()
        self.lipschitz = lipschitz_constant("lipschitz", lipschitz)

    def forward(self, f: Tensor, y: Tensor) -> Tensor:
        return -class_weights(y) * f * (y.shape[1] / column(self.lipschitz, f))


class MSE(Loss):
    """(f - y)^2 / (L max(1, L)); the metric `mse` is not divided.

    For targets of a size of about 1, gradients then have a size that Adam can use, for every L.
    """

    task = "regression"
    per_run = ("lipschitz",)

    def __init__(self, lipschitz: float = 1.0) -> None:
        super().__init__()
        self.lipschitz = lipschitz_constant("lipschitz", lipschitz)

    def forward(self, f: Tensor, y: Tensor) -> Tensor:
        lipschitz = torch.as_tensor(column(self.lipschitz, f), dtype=f.dtype, device=f.device)
        # The square of f alone may overflow.
        return ((f - y) / (lipschitz.sqrt() * lipschitz.clamp_min(1).sqrt())).square()
