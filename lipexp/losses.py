"""Losses: how far the outputs f(x) are from the targets y, sample by sample.

Shapes: K runs, B points, C outputs. Outputs f and targets y are (K, B), and a loss returns (K, B), of which the
loop takes the mean over B for each run. If the dataset has more than one output, f is (K, B, C), and so is y for a
regression with several targets. Targets are 0 and 1 for classification and transport, 0, 1, ..., C - 1 for
multiclass, any number for regression; all of them come as floating-point numbers.

A network that is trained under a bound L has outputs f, and derivatives of f by its parameters, that are
proportional to L. Each loss is divided by what keeps its own derivatives by the parameters at a size of about 1,
which Adam can use, for every L.

To add one: a class derived from `Loss`, and one file in conf/loss/. Any other module that returns one number per
sample, such as torch.nn.SmoothL1Loss(reduction="none"), works as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hydra.utils import get_class
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn import functional

from lipexp.config import ConfigError, conf_dir, lipschitz_constant, number, one_line
from lipexp.tasks import class_weights


class Loss(nn.Module):
    """A map `forward(f, y)` from outputs and targets to one number per sample (K, B).

    f is (K, B), or (K, B, C) for more than one output; y is (K, B), or as f for a regression with several targets.

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
        return _over_targets(found) if f.shape == y.shape == found.shape else found


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


def losses_for(task: str) -> list[str]:
    """The options of conf/loss/ that are made for `task`."""
    leaves: dict[str, Any] = {path.stem: OmegaConf.load(path) for path in (conf_dir() / "loss").glob("*.yaml")}
    return sorted(name for name, leaf in leaves.items() if getattr(get_class(leaf._target_), "task", "") == task)


def column(value: Any, like: Tensor) -> Any:
    """A float or a (K,) tensor as something that broadcasts against `like`, (K, B) or (K, B, C)."""
    return value.to(like).view(-1, *(1,) * (like.ndim - 1)) if isinstance(value, Tensor) else value


def _over_targets(values: Tensor) -> Tensor:
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


class BCE(Tempered):
    """Binary cross-entropy of logits with a temperature: BCE(T f, y) / (T L) with y in {0, 1}.

    It falls for ever as margins grow, so under a gradient bound it trades errors for margins. A large T makes it
    attend to small margins: at T -> infinity it is the hinge loss with margin 0.

    Reference: Bethune et al. 2022, "Pay attention to your loss" (arXiv 2104.05097).
    """

    task = "classification"

    def forward(self, f: Tensor, y: Tensor) -> Tensor:
        temperature = column(self.temperature, f)
        entropy = functional.binary_cross_entropy_with_logits(temperature * f, y, reduction="none")
        return entropy / temperature / column(self.lipschitz, f)


class Hinge(Scaled):
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
        super().__init__(lipschitz)
        self.margin = number("margin", margin, least=0)

    def forward(self, f: Tensor, y: Tensor) -> Tensor:
        return torch.relu(column(self.margin, f) - (2 * y - 1) * f / column(self.lipschitz, f))


class Kantorovich(Scaled):
    """-(mean of f where y = 1 - mean of f where y = 0) / L: the dual of the Wasserstein-1 distance of the classes.

    Over all L-Lipschitz f the largest difference of means is L times that distance (Kantorovich and Rubinstein).
    Each sample is weighted by the number of samples of its class in the batch, so the mean over the batch is the
    loss above exactly, and a constant added to f changes nothing. The mean of a class without a sample is 0.

    Reference: Anil, Lucas and Grosse 2019, "Sorting out Lipschitz function approximation", section 2.3.
    """

    task = "transport"

    def forward(self, f: Tensor, y: Tensor) -> Tensor:
        return -class_weights(y) * f * (y.shape[1] / column(self.lipschitz, f))


class CrossEntropy(Tempered):
    """Cross-entropy of logits with a temperature: CE(T f, y) / (T L), CE(z, y) = log(sum_j exp(z_j)) - z_y.

    It is for several classes what `BCE` is for two: at T -> infinity it is max_j (f_j - f_y) / L, which is zero as
    soon as the largest output is that of the class. f is (K, B, C) and y (K, B), of 0, 1, ..., C - 1.

    Reference: Bethune et al. 2022, "Pay attention to your loss" (arXiv 2104.05097).
    """

    task = "multiclass"

    def forward(self, f: Tensor, y: Tensor) -> Tensor:
        logits = (column(self.temperature, f) * f).movedim(-1, 1)  # torch wants the classes on axis 1
        entropy = functional.cross_entropy(logits, y.long(), reduction="none")
        return entropy / column(self.temperature, y) / column(self.lipschitz, y)


class MultiMargin(Scaled):
    """The sum over the classes j other than y of max(0, margin - (f_y - f_j) / (2 L)).

    A network with the constant L has f_y - f_j with the constant 2 L at most, whichever norm its outputs live in.
    So `margin` is a distance in input space, as for `Hinge`: a point with no loss is at least `margin` away from
    every point where another class has the largest output. For two classes with the outputs (-f, f) it is `Hinge`
    of f. f is (K, B, C) and y (K, B), of 0, 1, ..., C - 1.

    Where outputs live in the 2-norm (constraint=spectral) the constant of f_y - f_j is sqrt(2) L. A point with no
    loss is then sqrt(2) times as far away, and two points of different classes can only both have no loss if they
    are 2 sqrt(2) times the margin apart.

    Args:
        margin: the radius asked for, in the units of the input.
        lipschitz: L.

    Reference: Weston and Watkins 1999, "Support vector machines for multi-class pattern recognition".
    """

    task = "multiclass"
    per_run = ("margin", "lipschitz")

    def __init__(self, margin: float = 0.25, lipschitz: float = 1.0) -> None:
        super().__init__(lipschitz)
        self.margin = number("margin", margin, least=0)

    def forward(self, f: Tensor, y: Tensor) -> Tensor:
        own = y.long().unsqueeze(-1)  # (K, B, 1)
        gaps = (f.gather(-1, own) - f) / column(self.lipschitz, f) / 2
        return torch.relu(column(self.margin, f) - gaps).scatter(-1, own, 0.0).sum(dim=-1)


class MSE(Scaled):
    """(f - y)^2 / (L max(1, L)), the mean over the targets; the metric `mse` is not divided.

    Its derivative by a parameter is of the size |f - y| L / (L max(1, L)). For targets of a size of about 1,
    |f - y| has the size max(1, L) before training, so this is about 1.
    """

    task = "regression"

    def forward(self, f: Tensor, y: Tensor) -> Tensor:
        lipschitz = torch.as_tensor(column(self.lipschitz, f), dtype=f.dtype, device=f.device)
        # The square of f alone may overflow.
        return _over_targets(((f - y) / (lipschitz.sqrt() * lipschitz.clamp_min(1).sqrt())).square())


class MAE(Scaled):
    """|f - y| / L, the mean over the targets. Its derivative by f is 1 / L in size, however large the error is."""

    task = "regression"

    def forward(self, f: Tensor, y: Tensor) -> Tensor:
        return _over_targets((f - y).abs() / column(self.lipschitz, f))


class Huber(Scaled):
    """H(f - y) / (L min(delta, max(1, L))), the mean over the targets, with H(e) = e^2 / 2 up to |e| = delta.

    Beyond, H(e) = delta (|e| - delta / 2) goes on in a straight line, so a few targets that are far off do not
    outweigh all others. The derivative of H is at most delta in size, and of the size max(1, L) or less before
    training, as for `MSE`: hence the divisor. A large delta makes it half of `MSE`, a small one makes it `MAE`.

    Args:
        delta: the error from which on it is straight, in the units of the target.
        lipschitz: L.

    Reference: Huber 1964, "Robust estimation of a location parameter".
    """

    task = "regression"
    per_run = ("delta", "lipschitz")

    def __init__(self, delta: float = 1.0, lipschitz: float = 1.0) -> None:
        super().__init__(lipschitz)
        self.delta = number("delta", delta, above=0)

    def forward(self, f: Tensor, y: Tensor) -> Tensor:
        delta, lipschitz = (
            torch.as_tensor(column(value, f), dtype=f.dtype, device=f.device)
            for value in (self.delta, self.lipschitz)
        )
        error = (f - y).abs()
        bent = torch.minimum(error, delta)
        # H(e) = bent (|e| - bent / 2), which may overflow before it is divided.
        scaled = bent / torch.minimum(delta, lipschitz.clamp_min(1)) * ((error - bent / 2) / lipschitz)
        return _over_targets(scaled)
