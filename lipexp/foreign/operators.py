"""The operators that graphs have in common, whatever format they are written in.

An operand is a tensor of features, a constant, or a decision that features were turned into. Operators on constants
alone are computed; they are what exporters write to find shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lipexp import activations as room
from lipexp.activations import Activation
from lipexp.activations.elsewhere import AlphaELU, Clip, PReLU
from lipexp.foreign import features
from lipexp.foreign.features import MOST_WEIGHTS, Numbers, Rows, Stage, Tensor, Unread, moved, scaled

SELU = 1.6732632423543772, 1.0507009873554805  # alpha and scale; Klambauer et al. 2017 (arXiv 1706.02515)


@dataclass(frozen=True)
class Decided:
    """What comes of the outputs of a classifier without changing its decision: probabilities, or a class."""

    outputs: Rows  # (B, C) whose largest decides, or (B, 1) whose sign does
    is_class: bool
    by: tuple[str, ...]  # the operators

    def then(self, name: str) -> Decided:
        """Behind another operator that leaves the decision as it is."""
        return Decided(self.outputs, self.is_class, (*self.by, name))


Operand = Rows | Numbers | Decided


def constant(value: Any, what: str = "an operand") -> Numbers:
    """A constant operand.

    Raises:
        Unread: it depends on the input.
    """
    if value is None or isinstance(value, Rows | Decided):
        raise Unread(f"needs {what} that does not depend on the input")
    return np.asarray(value)


def tensor(value: Any) -> Tensor:
    """An operand that is no decision."""
    if isinstance(value, Decided):
        raise Unread(f"works on what {value.by[-1]} has made of the outputs")
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
        last = None if step < 0 and end < -len(parts) - x.shape[axis] else end  # to the first entry
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


# Arithmetic ------------------------------------------------------------------------------------------------------


def add(a: Operand, b: Operand, sign: float = 1.0) -> Tensor:
    """a + sign b."""
    a, b = tensor(a), tensor(b)
    if isinstance(a, Rows):
        return features.plus(a, b, sign) if isinstance(b, Rows) else scaled(a, 1.0, sign * np.asarray(b))
    return scaled(b, sign, a) if isinstance(b, Rows) else np.asarray(a + (b if sign == 1 else -b))


def subtract(a: Operand, b: Operand) -> Tensor:
    """a - b."""
    return add(a, b, -1.0)


def multiply(a: Operand, b: Operand) -> Tensor:
    """a b, of which one is constant; or x sigmoid(x), which is SiLU."""
    a, b = tensor(a), tensor(b)
    if isinstance(a, Rows) and isinstance(b, Rows):
        for x, gate in ((a, b), (b, a)):
            if _is_sigmoid_of(gate, x):
                return silu(x)
        raise Unread("multiplies features with each other")
    if isinstance(a, Rows):
        return scaled(a, b)
    return scaled(b, a) if isinstance(b, Rows) else np.asarray(a * b)


def _is_sigmoid_of(gate: Rows, x: Rows) -> bool:
    stage, behind = gate.stage, gate.stage.parent
    if stage.weight is None or stage.bias is None or behind is None or not is_of(behind, room.Sigmoid):
        return False
    if behind.parent is not x.stage or gate.shape != x.shape or (gate.rows() != x.rows()).any():
        return False
    quarter = 0.25 * np.eye(x.stage.width)[x.features()]
    return np.array_equal(stage.weight[gate.features()], quarter) and not stage.bias.any()


def divide(a: Operand, b: Operand) -> Tensor:
    """a / b for a constant b: the reciprocal of b is rounded."""
    a, b = tensor(a), tensor(b)
    if isinstance(b, Rows):
        raise Unread("divides by features")
    if isinstance(a, Rows):
        with np.errstate(divide="ignore"):
            return scaled(a, 1 / b.astype(np.float64))
    return np.asarray(a // b if a.dtype.kind in "iu" and b.dtype.kind in "iu" else a / b)


def matmul(a: Operand, b: Operand) -> Tensor:
    """The matrix product, of which one factor is a constant matrix or vector."""
    a, b = tensor(a), tensor(b)
    if isinstance(a, Rows) and isinstance(b, Rows):
        raise Unread("multiplies features with each other")
    if isinstance(a, Rows):
        right = np.asarray(b)
        found = features.linear(a, right.T if right.ndim > 1 else right[None])
        return found if right.ndim > 1 else found.moved(lambda places: places[..., 0])
    if isinstance(b, Rows):
        if b.places.ndim < 2 or a.ndim != 2:
            raise Unread(f"multiplies shapes {a.shape} and {b.shape}")
        turned = features.linear(b.moved(lambda places: places.swapaxes(-1, -2)), a)
        return turned.moved(lambda places: places.swapaxes(-1, -2))
    return np.asarray(a @ b)


def mean(x: Operand, axes: Sequence[int], keep: bool, total: bool = False) -> Tensor:
    """The mean, or sum, along some axes."""
    x = tensor(x)
    if not isinstance(x, Rows):
        return np.asarray((np.sum if total else np.mean)(x, tuple(axes), keepdims=keep))
    for axis in axes:
        n = x.shape[axis]
        row = np.ones((1, n)) if total else np.full((1, n), 1 / n)
        along = features.linear(x.moved(lambda a, axis=axis: np.moveaxis(a, axis, -1)), row)
        x = along.moved(lambda a, axis=axis: np.moveaxis(a, -1, axis))
    return x if keep else squeeze(x, axes)


def normalised(x: Operand, mean: Any, variance: Any, weight: Any, bias: Any, epsilon: float) -> Tensor:
    """Batch normalisation with its recorded statistics: (x - mean) weight / sqrt(variance + epsilon) + bias."""
    x = tensor(x)
    parts = [
        None if part is None else constant(part).astype(np.float64) for part in (mean, variance, weight, bias)
    ]
    around, spread, slope, offset = parts
    if not isinstance(x, Rows) or around is None or spread is None or len(x.shape) != 2:
        raise Unread("normalises no features (B, H) by recorded statistics")
    slope = (1.0 if slope is None else slope) / np.sqrt(spread + epsilon)
    return scaled(scaled(x, 1.0, -around), slope, 0.0 if offset is None else offset)


# Activations -----------------------------------------------------------------------------------------------------


def activation(name: str, *arguments: Any) -> Activation:
    """An activation of lipexp by the name of its class."""
    found = getattr(room, name, None)
    if found is None:
        raise Unread("is an activation that lipexp does not know")
    return found(*arguments)


def activated(x: Operand, act: Activation) -> Rows:
    """act(x)."""
    x = tensor(x)
    if not isinstance(x, Rows):
        raise Unread("activates a constant")
    return features.activated(x, act)


def _of_features(x: Operand) -> Rows:
    x = tensor(x)
    if not isinstance(x, Rows):
        raise Unread("activates a constant")
    return x


def relu(x: Operand) -> Rows:
    """max(x, 0)."""
    return activated(x, room.ReLU())


def sigmoid(x: Operand) -> Rows:
    """1 / (1 + exp(-x)), as a quarter of lipexp's."""
    return scaled(activated(x, room.Sigmoid()), 0.25)


def silu(x: Operand) -> Rows:
    """x sigmoid(x)."""
    return activated(x, activation("SiLU"))


def gelu(x: Operand, approximate: str = "none") -> Rows:
    """x Phi(x), with the normal distribution function Phi."""
    if approximate != "none":
        raise Unread(f"approximates GELU by {approximate}; lipexp knows the exact one")
    return activated(x, activation("GELU"))


def leaky_relu(x: Operand, slope: float) -> Rows:
    """x above 0 and slope x below."""
    slope = float(np.float32(slope))
    if slope == 0:
        return relu(x)
    if 1e-9 <= slope <= 1:
        return activated(x, room.LeakyReLU(slope))
    return prelu(x, slope)


def prelu(x: Operand, slopes: Any) -> Rows:
    """x above 0 and slope x below, with slopes that are broadcast to x."""
    found, own = _of_features(x), np.asarray(slopes, dtype=np.float64)
    if not np.isfinite(own).all():
        raise Unread("has a slope that is not finite")
    if own.size == 1 and 1e-9 <= (slope := float(own.reshape(-1)[0])) <= 1:
        return leaky_relu(x, slope)
    found = features.separated(found)
    below = np.broadcast_to(own, found.shape)
    below = below[0] if below.ndim > 1 and found.shape[0] > 0 else below
    if own.ndim > 1 and own.ndim == len(found.shape) and own.shape[0] > 1:
        raise Unread("has slopes for each row of a batch")
    return features.activated(found, PReLU(np.ascontiguousarray(below).reshape(-1)))


def elu(x: Operand, alpha: float = 1.0, scale: float = 1.0) -> Rows:
    """scale (x above 0 and alpha (exp(x) - 1) below)."""
    return scaled(activated(x, room.ELU() if alpha == 1 else AlphaELU(alpha)), scale)


def celu(x: Operand, alpha: float) -> Rows:
    """alpha elu(x / alpha)."""
    if alpha == 0:
        raise Unread("has alpha=0")
    return scaled(activated(scaled(_of_features(x), 1 / alpha), room.ELU()), alpha)


def softplus(x: Operand, beta: float = 1.0) -> Rows:
    """log(1 + exp(beta x)) / beta."""
    if beta == 0:
        raise Unread("has beta=0")
    return scaled(activated(scaled(_of_features(x), beta), room.Softplus()), 1 / beta)


def clip(x: Operand, low: Any, high: Any) -> Tensor:
    """min(max(x, low), high); either limit may be missing."""
    low, high = (None if end is None else constant(end, "a limit") for end in (low, high))
    found = tensor(x)
    if isinstance(found, Rows) and low is not None and high is not None and low.size == high.size == 1:
        ends = float(low.reshape(-1)[0]), float(high.reshape(-1)[0])
        if np.isfinite(ends).all() and np.float32(ends[0]) < np.float32(ends[1]):
            return features.activated(found, Clip(*map(float, np.float32(ends))))
    for end, largest in ((low, True), (high, False)):
        if end is not None:
            found = features.extreme([found, end], largest)
    return found


def hard_sigmoid(x: Operand, slope: float, offset: float) -> Rows:
    """min(max(slope x + offset, 0), 1)."""
    return features.activated(scaled(_of_features(x), slope, offset), Clip(0.0, 1.0))


ACTIVATIONS: Mapping[str, Callable[[Operand], Rows]] = {  # without arguments
    "relu": relu,
    "tanh": lambda x: activated(x, room.Tanh()),
    "sigmoid": sigmoid,
    "abs": lambda x: activated(x, room.Abs()),
    "silu": silu,
    "log_sigmoid": lambda x: scaled(softplus(scaled(_of_features(x), -1.0)), -1.0),
    "selu": lambda x: elu(x, *SELU),
    "relu6": lambda x: activated(x, Clip(0.0, 6.0)),
}


# Decisions -------------------------------------------------------------------------------------------------------


def _outputs(x: Operand, axis: int) -> Rows:
    found = tensor(x)
    if not isinstance(found, Rows) or len(found.shape) != 2 or axis not in (1, -1):
        raise Unread("decides along another axis than that of the outputs")
    return found


def probabilities(x: Operand, axis: int, name: str) -> Operand:
    """Of a softmax: the outputs themselves, whose largest is that of the probabilities."""
    return x.then(name) if isinstance(x, Decided) else Decided(_outputs(x, axis), False, (name,))


def largest(x: Operand, axis: int, name: str) -> Decided:
    """The class with the largest output."""
    if isinstance(x, Decided):
        return Decided(x.outputs, True, (*x.by, name))
    return Decided(_outputs(x, axis), True, (name,))


def above(a: Operand, b: Operand, name: str) -> Operand:
    """Whether a > b for a constant b: the sign of a - b decides."""
    if isinstance(a, Decided):
        raise Unread(f"works on what {a.by[-1]} has made of the outputs")
    found = subtract(a, b)
    if not isinstance(found, Rows):
        return np.asarray(constant(a) > constant(b))
    if found.places.size != found.shape[0]:
        raise Unread("compares several outputs")
    return Decided(found, True, (name,))


def is_of(stage: Stage | None, kind: type[Activation]) -> bool:
    """Whether a stage is an activation of this kind."""
    return stage is not None and isinstance(stage.act, kind)
