"""The outputs of a graph that was followed, and what of them is certified."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from lipexp.activations import Sigmoid, Tanh
from lipexp.config import ConfigError, one_line
from lipexp.foreign.features import Rows, Unread, identity_of
from lipexp.foreign.network import IDENTITY, Foreign, Layer, chain, folded, network_of
from lipexp.foreign.operands import Decided, Operand
from lipexp.foreign.products import Part
from lipexp.reading import Unreadable

ROWS = 2, 3  # of the input, where a network leaves their number open, so that what mixes them is seen


@dataclass(frozen=True)
class Graph:
    """The outputs of a graph by their names, and the names of its inputs where each is a column of its own."""

    outputs: Sequence[tuple[str, Operand]]
    names: Sequence[str] = field(default_factory=list)


def for_any_rows(follow: Callable[[int], Graph]) -> Graph:
    """The graph of a network that leaves the number of rows open, which is followed for two of them.

    Raises:
        Unread: the network depends on that number.
    """
    one, other = (follow(n) for n in ROWS)
    if len(one.outputs) != len(other.outputs):
        raise Unread("has other outputs for another number of rows")
    for (name, first), (_, second) in zip(one.outputs, other.outputs, strict=True):
        with at("output", name):
            maps = [
                chain(value.outputs if isinstance(value, Decided) else value)
                for value in (first, second)
                if isinstance(value, Rows | Decided)
            ]
            if type(first) is not type(second) or (maps and not _equal(*maps)):
                raise Unread("depends on the number of rows")
    return one


@contextmanager
def at(operator: str, node: str) -> Iterator[None]:
    """Whatever cannot be read within is said with its operator and its node."""
    try:
        yield
    except (Unread, Unreadable, ConfigError) as error:
        raise Unread(f"{operator} at {node!r}: {error}") from None
    except (ArithmeticError, IndexError, KeyError, MemoryError, OverflowError, TypeError, ValueError) as error:
        raise Unread(f"{operator} at {node!r}: cannot be read: {one_line(error)}") from None


def network(graph: Graph, decides: bool) -> Foreign:
    """The network behind the outputs of a graph.

    Of a classifier the last operators are left off that do not change its decision: softmax, sigmoid, the choice
    of the largest, and names of classes.

    Raises:
        Unread: there is no network, or several.
    """
    found: list[tuple[str, Rows]] = []
    left: list[str] = []  # operators that do not change a decision
    for name, value in graph.outputs:
        if isinstance(value, Rows):
            found.append((name, value))
        elif isinstance(value, Decided):
            if not decides:  # what the operator makes of the outputs belongs to the map
                raise Unread(f"output at {name!r}: {value.by[-1]} is read at the end of a classifier alone")
            found.append((name, value.outputs))
            left += value.by
    if not found:
        raise Unread("has no output that depends on its input")
    with at("output", found[0][0]):
        layers, linear = chain(found[0][1])
        if linear is not None and len(linear) > 1:
            raise Unread("adds an affine map of the input to several outputs")
        for name, other in found[1:]:
            if not _same(chain(other), (layers, linear), decides):
                raise Unread(f"is another one than {name!r}: lipexp certifies one")
        for layer in layers:
            if isinstance(layer.act, Part):
                raise Unread(layer.act.outside)
        layers = folded(layers)
        if decides and linear is None:
            layers, last = _undecided(layers)
            left = [*last, *left]
        own, rounding = network_of(layers, linear)
    notes = [f"left off behind the outputs: {', '.join(dict.fromkeys(left))}"] if left else []
    return Foreign(own, rounding, notes, graph.names)


def _same(a: tuple[list[Layer], object], b: tuple[list[Layer], object], decides: bool) -> bool:
    """Whether both are the same map, but for what does not change a decision."""
    both = []
    for layers, linear in (a, b):
        own = folded(layers)
        both.append((_undecided(own)[0] if decides and linear is None else own, linear))
    return _equal(*both)


def _equal(a: tuple[list[Layer], object], b: tuple[list[Layer], object]) -> bool:
    (one, first), (other, second) = a, b
    return (
        len(one) == len(other)
        and all(
            np.array_equal(x.weight, y.weight)
            and np.array_equal(x.bias, y.bias)
            and identity_of(x.act) == identity_of(y.act)
            for x, y in zip(one, other, strict=True)
        )
        and ((first is None and second is None) or np.array_equal(np.asarray(first), np.asarray(second)))
    )


def _undecided(layers: list[Layer]) -> tuple[list[Layer], list[str]]:
    """The layers without a last sigmoid or tanh, of which the decision is that of what goes into it."""
    if len(layers) < 2 or not isinstance(layers[-2].act, Sigmoid | Tanh):
        return layers, []
    *before, hidden, last = layers
    n, is_sigmoid = len(hidden.weight), isinstance(hidden.act, Sigmoid)
    unit = 0.25 if is_sigmoid else 1.0
    same = np.array_equal(last.weight, unit * np.eye(n))
    half = n == 1 and is_sigmoid and same and last.bias[0] == -0.5  # sigmoid(z) > 1/2
    both = n == 1 and is_sigmoid and np.array_equal(last.weight, [[-unit], [unit]])
    both = both and np.array_equal(last.bias, [1, 0])  # 1 - p and p
    if not (both or half or (same and not last.bias.any())):
        return layers, []
    name = "Sigmoid" if is_sigmoid else "Tanh"
    return [*before, hidden._replace(act=IDENTITY)], [name]
