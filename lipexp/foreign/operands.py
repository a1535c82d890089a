"""What operators take and return, and the operators that only move entries.

An operand is a tensor of features, a constant, or a decision that features were turned into.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lipexp.foreign import features
from lipexp.foreign.features import MOST_WEIGHTS, Numbers, Rows, Tensor, Unread, moved


@dataclass(frozen=True)
class Decided:
    """What comes of the outputs of a classifier without changing its decision: probabilities, or a class."""

    outputs: Rows  # (B, C) whose largest decides, or (B, 1) whose sign does
    is_class: bool
    by: tuple[str, ...]  # the operators

    def then(self, name: str) -> Decided:
        """Behind another operator that leaves the decision as it is."""
        return Decided(self.outputs, self.is_class, (*self.by, name))


@dataclass(frozen=True)
class Compared:
    """Whether features are above a limit, entry by entry."""

    difference: Rows  # features - limit


Operand = Rows | Numbers | Decided | Compared


def constant(value: Any, what: str = "an operand") -> Numbers:
    """A constant operand.

    Raises:
        Unread: it depends on the input.
    """
    if value is None or isinstance(value, Rows | Decided | Compared):
        raise Unread(f"needs {what} that does not depend on the input")
    return np.asarray(value)


def tensor(value: Any) -> Tensor:
    """An operand that is no decision."""
    if isinstance(value, Decided):
        raise Unread(f"works on what {value.by[-1]} has made of the outputs")
    if isinstance(value, Compared):
        raise Unread("works on a comparison of features")
    return value if isinstance(value, Rows) else np.asarray(value)


def numbers_of(value: Any) -> list[int]:
    """A constant operand as a list of integers, such as axes."""
    return [int(part) for part in np.atleast_1d(constant(value))]


# Places ----------------------------------------------------------------------------------------------------------


def reshape(x: Tensor, shape: Sequence[int], zero_is_kept: bool = True) -> Tensor:
    """ONNX's and torch's reshape: -1 is what is left, and 0, if it is kept, the size that is there."""
    kept = [x.shape[i] if n == 0 and zero_is_kept and i < len(x.shape) else n for i, n in enumerate(shape)]
    return moved(x, lambda a: a.reshape(kept))


def squeeze(x: Tensor, axes: Sequence[int] | None) -> Tensor:
    """Without axes of size 1: those named, or all behind the first."""
    if axes is None:
        axes = [i for i, n in enumerate(x.shape) if n == 1 and i > 0]
    axes = [axis for axis in axes if x.shape[axis] == 1]
    return moved(x, lambda a: np.squeeze(a, tuple(axes)))


def unsqueeze(x: Tensor, axes: Sequence[int]) -> Tensor:
    """With axes of size 1 at these places of the result."""
    return moved(x, lambda a: np.expand_dims(a, tuple(axes)))


def flatten(x: Tensor, first: int, last: int = -1) -> Tensor:
    """torch's flatten of the axes from `first` to `last`."""
    n = len(x.shape)
    first, last = first % max(n, 1), last % max(n, 1)
    return moved(x, lambda a: a.reshape(*a.shape[:first], -1, *a.shape[last + 1 :]))


def sliced(
    x: Tensor,
    starts: Sequence[int],
    ends: Sequence[int],
    axes: Sequence[int] | None = None,
    steps: Sequence[int] | None = None,
) -> Tensor:
    """x[start:end:step] along some axes, as in numpy."""
    axes = range(len(starts)) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    parts = [slice(None)] * len(x.shape)
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        last = None if step < 0 and end < -x.shape[axis] else end  # to the first entry
        parts[axis] = slice(start, last, step)
    return moved(x, lambda a: a[tuple(parts)])


def gather(x: Tensor, places: Numbers, axis: int) -> Tensor:
    """Some entries along an axis."""
    return moved(x, lambda a: np.take(a, places.astype(np.int64), axis))


def split(x: Tensor, sizes: Sequence[int], axis: int) -> list[Tensor]:
    """Parts of these sizes along an axis."""
    if sum(sizes) != x.shape[axis]:
        raise Unread(f"splits {x.shape[axis]} entries into {sum(sizes)}")
    ends = np.cumsum(sizes)
    return [gather(x, np.arange(end - n, end), axis) for n, end in zip(sizes, ends, strict=True)]


def concat(values: Sequence[Operand], axis: int) -> Tensor:
    """Tensors of one depth one after the other."""
    parts = [tensor(value) for value in values]
    rows = [part for part in parts if isinstance(part, Rows)]
    if not rows:
        return np.concatenate([np.asarray(part) for part in parts], axis)
    if len(rows) < len(parts):
        raise Unread("joins features and constants")
    same = features.joined(rows)
    return Rows(same[0].stage, np.concatenate([part.places for part in same], axis))


def expand(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Broadcast to a shape, in which -1 and 1 leave what is there."""
    lead = len(shape) - len(x.shape)
    own = (*([1] * lead), *x.shape)
    whole = [m if n in (-1, 1) else n for n, m in zip(shape, own, strict=True)]
    if np.prod([float(n) for n in whole]) > MOST_WEIGHTS:
        raise Unread("makes too many numbers")
    return moved(x, lambda a: np.broadcast_to(a, whole))
