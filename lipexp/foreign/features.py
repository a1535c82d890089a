"""Networks followed symbolically: every tensor of a graph as features of one row of its input.

Each stage of a network is a vector of features: the input, an affine map of an earlier stage, or an activation of
one. A tensor is an array of places in such a vector, one for each of its entries. So whatever only moves entries
(Reshape, Transpose, Split, Concat, Gather, ...) is done to that array by numpy, and nothing is computed: the
weights in the stages are those of the file.

Shapes: B rows, n features of a stage. An entry of a tensor is feature i of row r, as the number r n + i.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from lipexp.activations import Activation, GroupSort, ReLU

Numbers = npt.NDArray[Any]
Places = npt.NDArray[np.int64]

SMALLEST = 2.0**-126  # number of float32 that has all its digits: the change of smaller ones is relative to it
MOST_ENTRIES = 2**22  # of a tensor ...
MOST_WEIGHTS = 2**27  # ... and of a matrix, whatever a file claims


class Unread(ValueError):
    """Something that no layer stands for. Its text says what, and goes behind the name of an operator."""


@dataclass(eq=False)
class Stage:
    """A vector of features of one row: the input, weight @ parent + bias, or act(parent)."""

    width: int
    parent: Stage | None = None
    weight: Numbers | None = None  # (width, parent.width), float64
    bias: Numbers | None = None  # (width,)
    act: Activation | None = None
    made: dict[Any, Any] = field(default_factory=dict)  # what was already derived from it

    @property
    def depth(self) -> tuple[int, int]:
        """The number of activations so far, and of affine maps since the last of them."""
        if self.parent is None:
            return 0, 0
        acts, maps = self.parent.depth
        return (acts + 1, 0) if self.act is not None else (acts, maps + 1)

    def mapped(self, weight: Numbers, bias: Numbers | None = None) -> Stage:
        """weight @ self + bias."""
        bias = np.zeros(len(weight)) if bias is None else bias
        if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
            raise Unread("holds a number that is not finite")
        return Stage(len(weight), self, weight.astype(np.float64), bias.astype(np.float64))

    def selected(self, features: Sequence[int] | Places) -> Stage:
        """Some of its features, in this order, as features of their own."""
        features = np.asarray(features, dtype=np.int64)
        return self.mapped(_one_hot(features, self.width))

    def activated(self, act: Activation) -> Stage:
        """act(self), which is made once."""
        key = identity_of(act)
        if key not in self.made:
            self.made[key] = Stage(self.width, self, act=act)
        return self.made[key]


def identity_of(act: Activation) -> tuple[Any, ...]:
    """What is the same for two activations only where they are the same map."""
    own = sorted(vars(act).items())
    return type(act), *(
        (name, part.tobytes() if isinstance(part, np.ndarray) else repr(part)) for name, part in own
    )


def change(numbers: Numbers, rounded: Numbers) -> float:
    """The largest relative change of numbers that were rounded to float32."""
    size = np.maximum(np.abs(numbers), SMALLEST)
    return float(np.max(np.abs(rounded.astype(np.float64) - numbers) / size, initial=0.0))


def _one_hot(features: Places, width: int) -> Numbers:
    _limited(len(features) * width, MOST_WEIGHTS)
    rows = np.zeros((len(features), width))
    rows[np.arange(len(features)), features] = 1
    return rows


def _limited(size: int, most: int) -> None:
    if size > most:
        raise Unread(f"makes {size:,} numbers, more than {most:,}")


@dataclass(frozen=True, eq=False)
class Rows:
    """A tensor whose entries are features of a stage; with `beside`, the sums of these and of those of another."""

    stage: Stage
    places: Places  # r n + i of each entry
    beside: Rows | None = None  # an affine map of the input

    @property
    def shape(self) -> tuple[int, ...]:
        return self.places.shape

    def moved(self, move: Callable[[Any], Any]) -> Rows:
        """The tensor of entries that `move` leaves of the array of places."""
        places = move(self.places)
        _limited(places.size, MOST_ENTRIES)
        return Rows(self.stage, places, None if self.beside is None else self.beside.moved(move))

    def rows(self) -> Places:
        """The row of each entry."""
        return self.alone.places // self.stage.width

    def features(self) -> Places:
        """The feature of each entry."""
        return self.alone.places % self.stage.width

    @property
    def alone(self) -> Rows:
        """The tensor itself, which has nothing beside it."""
        if self.beside is not None:
            raise Unread("takes a sum of features of different depths")
        return self

    @property
    def per_row(self) -> Places:
        """(entries of a row,) the features of one row, which are the same for all.

        Raises:
            Unread: the first axis is not that of the rows, or entries of a row come from others.
        """
        n_rows = self.places.shape[0] if self.places.ndim else 1
        places = self.places.reshape(n_rows, -1)
        offsets = self.stage.width * np.arange(n_rows)[:, None]
        features = places - offsets
        if not (
            (features == features[:1]).all() and (features >= 0).all() and (features < self.stage.width).all()
        ):
            raise Unread("mixes the rows of a batch")
        return features[0]


Tensor = Numbers | Rows


def moved(value: Tensor, move: Callable[[Any], Any]) -> Tensor:
    """A tensor, or constant, whose entries are moved."""
    if isinstance(value, Rows):
        return value.moved(move)
    found = np.asarray(move(value))
    _limited(found.size, MOST_WEIGHTS)
    return found


def entry(n_rows: int, shape: Sequence[int]) -> Rows:
    """The input: `n_rows` rows of this shape each."""
    width = int(np.prod(shape, dtype=np.int64))
    _limited(n_rows * width, MOST_ENTRIES)
    return Rows(Stage(width), np.arange(n_rows * width).reshape(n_rows, *shape))


# Maps of features ------------------------------------------------------------------------------------------------


def _distinct(keys: Numbers) -> tuple[Numbers, Places]:
    """The different rows of keys (M, k), in the order in which they come first, and the number of each row's."""
    _, first, inverse = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return keys[first[order]], rank[inverse.reshape(-1)]


def _vectors(x: Rows) -> tuple[Places, Places]:
    """The rows (M,) and features (M, k) of the vectors along the last axis, each of which belongs to one row."""
    k = x.shape[-1] if x.places.ndim else 1
    rows, features = x.rows().reshape(-1, k), x.features().reshape(-1, k)
    if k == 0 or (rows != rows[:, :1]).any():
        raise Unread("mixes the rows of a batch" if k else "takes no features")
    return rows[:, 0], features


def linear(x: Rows, weight: Numbers, bias: Numbers | None = None) -> Rows:
    """(..., k) -> (..., out): x W^T + b, for weight (out, k) and bias (out,)."""
    if weight.ndim != 2 or not x.places.ndim or x.shape[-1] != weight.shape[1]:
        raise Unread(f"multiplies shapes {x.shape} and {weight.T.shape}")
    rows, vectors = _vectors(x)
    distinct, number = _distinct(vectors)
    stage, (out, k) = x.stage, weight.shape
    if any(len(np.unique(features)) < k for features in distinct):  # weights of one feature would be added
        stage = stage.selected(distinct.ravel())
        distinct = np.arange(distinct.size).reshape(distinct.shape)
    _limited(len(distinct) * out * stage.width, MOST_WEIGHTS)
    whole = np.zeros((len(distinct), out, stage.width))
    for own, features in zip(whole, distinct, strict=True):
        own[:, features] = weight
    bias = None if bias is None else np.tile(np.broadcast_to(bias, (out,)), len(distinct))
    made = stage.mapped(whole.reshape(-1, stage.width), bias)
    places = (rows * made.width + number * out)[:, None] + np.arange(out)
    return Rows(made, places.reshape(*x.shape[:-1], out))


def scaled(x: Rows, scale: Any = 1.0, offset: Any = 0.0) -> Rows:
    """scale * x + offset, entry by entry, with numpy's broadcasting."""
    if np.all(np.equal(scale, 1)) and np.all(np.equal(offset, 0)) and np.ndim(scale) == np.ndim(offset) == 0:
        return x
    numbers = (np.asarray(part, dtype=np.float64) for part in (scale, offset))
    rows, features, *entries = np.broadcast_arrays(x.rows(), x.features(), *numbers)
    keys = np.stack([features, *entries], axis=-1).reshape(-1, 3)
    if not np.isfinite(keys).all():
        raise Unread("holds a number that is not finite")
    _limited(len(keys), MOST_ENTRIES)
    distinct, number = _distinct(keys)
    weight = distinct[:, 1:2] * _one_hot(distinct[:, 0].astype(np.int64), x.stage.width)
    made = x.stage.mapped(weight, distinct[:, 2])
    return Rows(made, rows * made.width + number.reshape(rows.shape))


def plus(x: Rows, y: Rows, sign: float = 1.0) -> Rows:
    """x + sign y, for tensors of the same depth; or where y or x is an affine map of the input, with it beside."""
    try:
        x, y = joined([x, y])
    except Unread:
        low, high = sorted((x, y), key=lambda part: part.stage.depth)
        if low.stage.depth[0] or low.beside is not None or high.beside is not None:
            raise
        if high is y:  # x + sign y = sign y + x
            high, sign = scaled(high, sign), 1.0
        places, beside = np.broadcast_arrays(high.places, low.places)
        return Rows(high.stage, places, scaled(Rows(low.stage, beside), sign))
    rows, others, first, second = np.broadcast_arrays(x.rows(), y.rows(), x.features(), y.features())
    if (rows != others).any():
        raise Unread("mixes the rows of a batch")
    distinct, number = _distinct(np.stack([first, second], axis=-1).reshape(-1, 2))
    weight = _one_hot(distinct[:, 0], x.stage.width) + sign * _one_hot(distinct[:, 1], x.stage.width)
    made = x.stage.mapped(weight)
    return Rows(made, rows * made.width + number.reshape(rows.shape))


# Activations -----------------------------------------------------------------------------------------------------


def activated(x: Rows, act: Activation) -> Rows:
    """act(x) for an activation that acts on each feature in the same way."""
    return Rows(x.stage.activated(act), x.alone.places)


def separated(x: Rows) -> Rows:
    """x as a stage of its own, with a feature for each entry of a row."""
    features, n_rows = x.alone.per_row, x.shape[0] if x.places.ndim else 1
    stage = x.stage.selected(features)
    return Rows(stage, np.arange(n_rows * stage.width).reshape(x.shape))


def sort(x: Rows, axis: int) -> Rows:
    """x sorted along an axis, ascending."""
    along = x.moved(lambda places: np.moveaxis(places, axis, -1))
    size = along.shape[-1]
    if size == 1:
        return x
    rows, vectors = _vectors(along)
    groups, number = _distinct(np.sort(vectors, axis=1))
    n = len(groups)
    key = ("sorted", groups.tobytes(), groups.shape)
    made: dict[Any, Stage] = x.stage.made
    if key not in made:  # the smallest of all groups come first, then the second smallest, ...
        made[key] = x.stage.selected(groups.T.ravel()).activated(GroupSort(n_groups=n))
    places = (rows * made[key].width + number)[:, None] + n * np.arange(size)
    return Rows(made[key], np.moveaxis(places.reshape(along.shape), -1, axis))


def extreme(values: Sequence[Tensor], largest: bool) -> Tensor:
    """The largest, or smallest, of several tensors and constants, entry by entry."""
    constants = [value for value in values if not isinstance(value, Rows)]
    tensors = [value for value in values if isinstance(value, Rows)]
    choose = np.maximum if largest else np.minimum
    limit = None
    for constant in constants:
        limit = constant if limit is None else choose(limit, constant)
    if not tensors:
        assert limit is not None
        return limit
    same = joined(tensors)
    places = np.broadcast_arrays(*(part.alone.places for part in same))
    stacked = Rows(same[0].stage, np.stack(places, axis=-1))
    found = sort(stacked, -1).moved(lambda places: places[..., -1 if largest else 0])
    return found if limit is None else limited(found, limit, largest)


def limited(x: Rows, limit: Any, below: bool) -> Rows:
    """max(x, limit) = relu(x - limit) + limit for a limit from below, or min(x, limit) = -max(-x, -limit)."""
    if not below:
        return scaled(limited(scaled(x, -1.0), -np.asarray(limit, dtype=np.float64), True), -1.0)
    limit = np.asarray(limit, dtype=np.float64)
    if np.isneginf(limit).all():
        return x
    return scaled(activated(scaled(x, 1.0, -limit), ReLU()), 1.0, limit)


# Joining ---------------------------------------------------------------------------------------------------------


def joined(tensors: Sequence[Rows]) -> list[Rows]:
    """The same tensors as features of one stage."""
    found = list(tensors)
    for i in range(1, len(found)):
        stage, first, second = _joined(found[0].alone.stage, found[i].alone.stage)
        found[:i] = [_at(part, stage, first) for part in found[:i]]
        found[i] = _at(found[i], stage, second)
    return found


def _at(x: Rows, stage: Stage, places: Places) -> Rows:
    return x if x.stage is stage else Rows(stage, x.rows() * stage.width + places[x.features()])


def _joined(a: Stage, b: Stage) -> tuple[Stage, Places, Places]:
    """A stage that holds the features of both, and where it holds those of each."""
    if a is b:
        return a, np.arange(a.width), np.arange(a.width)
    if (b, "before") in a.made:
        stage, first, second = a.made[b, "before"]
        return stage, second, first
    if b not in a.made:
        a.made[b] = _join(a, b)
        b.made[a, "before"] = a.made[b]
    return a.made[b]


def _join(a: Stage, b: Stage) -> tuple[Stage, Places, Places]:
    if a.depth[0] != b.depth[0]:
        raise Unread("joins features of different depths")
    if a.depth[1] != b.depth[1]:  # the one with fewer affine maps gets another
        lower = min(a, b, key=lambda stage: stage.depth)
        if "same" not in lower.made:
            lower.made["same"] = lower.selected(np.arange(lower.width))
        return _joined(*(stage.made["same"] if stage is lower else stage for stage in (a, b)))
    if a.parent is None or b.parent is None:
        raise Unread("joins two inputs")
    stage, first, second = _joined(a.parent, b.parent)
    if a.act is None or b.act is None:
        _limited((a.width + b.width) * stage.width, MOST_WEIGHTS)
        weight = np.zeros((a.width + b.width, stage.width))
        weight[: a.width, first], weight[a.width :, second] = a.weight, b.weight
        made = stage.mapped(weight, np.concatenate([part.bias for part in (a, b) if part.bias is not None]))
        return made, np.arange(a.width), a.width + np.arange(b.width)
    if isinstance(a.act, GroupSort) and isinstance(b.act, GroupSort):
        groups = [first.reshape(a.act.size(a.width), -1), second.reshape(b.act.size(b.width), -1)]
        if len(groups[0]) == len(groups[1]):
            n, of_a = sum(part.shape[1] for part in groups), groups[0].shape[1]
            made = stage.selected(np.concatenate(groups, axis=1).ravel()).activated(GroupSort(n_groups=n))
            number = np.arange(made.width).reshape(-1, n)
            return made, number[:, :of_a].ravel(), number[:, of_a:].ravel()
    if identity_of(a.act) != identity_of(b.act):
        raise Unread(f"joins features behind {a.act.label} and {b.act.label}")
    return stage.activated(a.act), first, second
