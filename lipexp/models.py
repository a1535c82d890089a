"""Models: the shape of a network, and where its training starts.

Shapes: D inputs, C outputs, H width, P parameters of a run. All parameters of a run lie in one row of a (K, P)
tensor, so that an optimiser makes one pass over them.

To add one: a class derived from `Model`, and one file in conf/model/.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lipexp.activations import Activation
from lipexp.config import ConfigError, no_such, whole

Shapes = Sequence[tuple[int, int]]  # (out, in) of each weight matrix


class Model(ABC):
    """A fully connected network.

    | member                       | what it is                                                             |
    |------------------------------|------------------------------------------------------------------------|
    | `shapes(n_inputs, n_outputs)`| (out, in) of each weight matrix; the activation stands between two     |
    | `initial(shapes, generator)` | (P,) the parameters of one run before training: weight and bias of     |
    |                              | each layer in turn, flattened                                          |
    | `monotone`                   | 1 for the inputs along which f may only rise, -1 for those along which |
    |                              | it may only fall, by the name of the feature or as x0, x1, ...         |
    """

    monotone: Mapping[str, int] = {}

    @abstractmethod
    def shapes(self, n_inputs: int, n_outputs: int) -> list[tuple[int, int]]: ...

    @abstractmethod
    def initial(self, shapes: Shapes, generator: torch.Generator) -> Tensor: ...


class MLP(Model):
    """`depth` hidden layers of `width` features each, so depth + 1 weight matrices; a linear model without any.

    Args:
        widths: the features of each hidden layer, such as [1024, 256, 32], instead of `width` and `depth`.
        monotone: see `Model`; it needs a constraint and one output, and costs the layers a part of L.
    """

    def __init__(
        self,
        width: int = 64,
        depth: int = 2,
        widths: Sequence[int] | None = None,
        monotone: Mapping[str, int] | None = None,
    ) -> None:
        self.width = whole("width", width, least=1)
        self.depth = whole("depth", depth, least=0)
        if widths is not None and (isinstance(widths, str) or not isinstance(widths, Sequence)):
            raise ConfigError("widths", widths, "must be null, or a list of whole numbers such as [64, 32]")
        given = [self.width] * self.depth if widths is None else widths
        self.widths = [whole("widths", width, least=1) for width in given]
        monotone = {} if monotone is None else monotone
        if not isinstance(monotone, Mapping):
            raise ConfigError("monotone", monotone, "must be a map from features to 1 or -1, such as {age: 1}")
        for name, sign in monotone.items():
            if sign not in (1, -1) or isinstance(sign, bool):
                raise ConfigError(f"monotone.{name}", sign, "must be 1 (rises) or -1 (falls)")
        self.monotone = dict(monotone)

    def shapes(self, n_inputs: int, n_outputs: int) -> list[tuple[int, int]]:
        sizes = [n_inputs, *self.widths, n_outputs]
        return list(zip(sizes[1:], sizes[:-1], strict=True))

    def initial(self, shapes: Shapes, generator: torch.Generator) -> Tensor:
        """Orthogonal weights, all singular values 1, so that no gradient norm is lost before the first step.

        Biases are uniform on +- 1/sqrt(in), so that the breakpoints start at different places.
        """
        rows = []
        for n_out, n_in in shapes:
            rows.append(nn.init.orthogonal_(torch.empty(n_out, n_in), generator=generator).flatten())
            rows.append(torch.empty(n_out).uniform_(-(n_in**-0.5), n_in**-0.5, generator=generator))
        return torch.cat(rows)


def signs(model: Model, features: Sequence[str], n_inputs: int) -> Tensor | None:
    """(D,) 1, -1 or 0 for each input: what `model.monotone` says of it; None where it says nothing.

    Args:
        features: the names of the inputs, if they have any.

    Raises:
        ConfigError: it names no input.
    """
    if not model.monotone:
        return None
    found = torch.zeros(n_inputs)
    places = {f"x{i}": i for i in range(n_inputs)} | {name: i for i, name in enumerate(features)}
    for name, sign in model.monotone.items():
        if name not in places:
            known = list(features) or [f"x{i}" for i in range(n_inputs)]
            more = f" and {len(known) - 20} more" if len(known) > 20 else ""
            raise ConfigError("model.monotone", name, no_such("feature", name, known[:20]) + more)
        if found[places[name]]:
            raise ConfigError("model.monotone", name, "is a feature that has another name there, too")
        found[places[name]] = sign
    return found


# The row of a run's parameters -----------------------------------------------------------------------------------


class Free(NamedTuple):
    """The free parameters of one layer of K networks, of which a constraint makes the layer."""

    weight: Tensor  # (K, out, in)
    bias: Tensor  # (K, 1, out)
    own: Tensor  # (K, m) of the constraint
    theta: Tensor  # (K, n) of the activation behind the layer, or inside it


class Layout(NamedTuple):
    """What lies in the row of a run: weights and biases, then the constraint's numbers, then the activation's."""

    shapes: Shapes
    own: Sequence[int]  # numbers of the constraint for each layer
    widths: Sequence[int]  # features of the activation of each layer; 0: it has none
    theta: Sequence[int]  # its parameters

    @classmethod
    def of(cls, shapes: Shapes, own: Sequence[int], widths: Sequence[int], act: Activation) -> Layout:
        """The layout with what `act` learns for each of these widths."""
        return cls(shapes, own, widths, [act.n_parameters(width) if width else 0 for width in widths])

    @property
    def sizes(self) -> list[int]:
        """The lengths of the parts of a row."""
        return [n for n_out, n_in in self.shapes for n in (n_out * n_in, n_out)] + [*self.own, *self.theta]

    def start(self, model: Model, act: Activation, generator: torch.Generator) -> Tensor:
        """(P,) the parameters of one run before training; those of the constraint are 0."""
        thetas = [act.initial(width) for width, n in zip(self.widths, self.theta, strict=True) if n]
        return torch.cat([model.initial(self.shapes, generator), torch.zeros(sum(self.own)), *thetas])


def unflatten(parameters: Tensor, layout: Layout) -> list[Free]:
    """The layers whose parameters lie in the rows of `parameters` (K, P), as views."""
    runs, n = parameters.shape[0], len(layout.shapes)
    parts = parameters.split(layout.sizes, dim=1)
    return [
        Free(parts[2 * i].view(runs, n_out, n_in), parts[2 * i + 1].view(runs, 1, n_out), *parts[2 * n + i :: n])
        for i, (n_out, n_in) in enumerate(layout.shapes)
    ]


def flattened(layers: Sequence[Free]) -> Iterator[Tensor]:
    """The parts of the layers in the order of a row, those that are not empty."""
    yield from (part for layer in layers for part in layer[:2])
    yield from (part for i in (2, 3) for layer in layers if (part := layer[i]).numel())
