"""What networks compute, in terms of features: arithmetic, activations and decisions.

All formats have these in common, under different names. Operators on constants alone are computed; they are what
exporters write to find shapes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lipexp import activations as room
from lipexp.activations import Activation
from lipexp.activations.elsewhere import Clip, PReLU
from lipexp.foreign import features, products
from lipexp.foreign.features import Rows, Tensor, Unread, change, scaled
from lipexp.foreign.operands import Compared, Decided, Operand, constant, squeeze, tensor
from lipexp.foreign.products import Share

SELU = 1.6732632423543772, 1.0507009873554805  # alpha and scale; Klambauer et al. 2017 (arXiv 1706.02515)


# Arithmetic ------------------------------------------------------------------------------------------------------


def add(a: Operand, b: Operand, sign: float = 1.0) -> Tensor:
    """a + sign b."""
    a, b = tensor(a), tensor(b)
    if isinstance(a, Rows) and isinstance(b, Rows):
        found = products.cubic(a, b) if sign == 1 else None
        return features.plus(a, b, sign) if found is None else found
    if isinstance(a, Rows):
        return scaled(a, 1.0, sign * np.asarray(b))
    return scaled(b, sign, a) if isinstance(b, Rows) else np.asarray(a + (b if sign == 1 else -b))


def subtract(a: Operand, b: Operand) -> Tensor:
    """a - b."""
    return add(a, b, -1.0)


def multiply(a: Operand, b: Operand) -> Tensor:
    """a b, of which one is constant; or SiLU, or GELU."""
    a, b = tensor(a), tensor(b)
    if isinstance(a, Rows) and isinstance(b, Rows):
        return products.product(a, b)
    if isinstance(a, Rows):
        return scaled(a, b)
    return scaled(b, a) if isinstance(b, Rows) else np.asarray(a * b)


def power(x: Operand, n: Operand) -> Tensor:
    """x^n, for a constant n."""
    x, n = tensor(x), constant(n, "an exponent")
    if not isinstance(x, Rows):
        return np.asarray(np.power(x, n))
    if n.size != 1:
        raise Unread("takes powers of features")
    return products.power(x, float(n.reshape(-1)[0]))


def divide(a: Operand, b: Operand) -> Tensor:
    """a / b for a constant b: the reciprocal of b is rounded."""
    a, b = tensor(a), tensor(b)
    if isinstance(b, Rows):
        raise Unread("divides by features")
    if isinstance(a, Rows):
        with np.errstate(divide="ignore"):
            return scaled(a, 1 / b.astype(np.float64))
    return np.asarray(a / b)


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
        x = _from_end(features.linear(_to_end(x, axis), row), axis)
    return x if keep else squeeze(x, axes)


def _to_end(x: Rows, axis: int) -> Rows:
    return x.moved(lambda places: np.moveaxis(places, axis, -1))


def _from_end(x: Rows, axis: int) -> Rows:
    return x.moved(lambda places: np.moveaxis(places, -1, axis))


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


def activation(name: str, **arguments: Any) -> Activation:
    """An activation of lipexp by the name of its class."""
    found = getattr(room, name, None)
    if found is None:
        raise Unread("is an activation that lipexp does not know")
    return found(**arguments)


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
    return activated(x, activation("SiLU", scaled=False))


def gelu(x: Operand, approximate: str = "none") -> Rows:
    """x Phi(x), with the normal distribution function Phi."""
    return activated(x, activation("GELU", approximate=approximate, scaled=False))


def leaky_relu(x: Operand, slope: float) -> Rows:
    """x above 0 and slope x below."""
    if slope == 0:
        return relu(x)
    own = float(np.float32(slope))
    return _rounded(x, room.LeakyReLU(own), [slope], [own]) if 1e-9 <= own <= 1 else prelu(x, slope)


def _rounded(x: Operand, act: Activation, numbers: Any, rounded: Any) -> Rows:
    """act(x) for an activation with numbers that were rounded to float32."""
    act.rounding = change(np.asarray(numbers, dtype=np.float64), np.asarray(rounded, dtype=np.float32))
    return activated(x, act)


def prelu(x: Operand, slopes: Any) -> Rows:
    """x above 0 and slope x below, with slopes that are broadcast to x."""
    found, own = _of_features(x), np.asarray(slopes, dtype=np.float64)
    if not np.isfinite(own).all():
        raise Unread("has a slope that is not finite")
    if own.size == 1 and 1e-9 <= np.float32(slope := float(own.reshape(-1)[0])) <= 1:
        return leaky_relu(x, slope)
    found = features.separated(found)
    below = np.broadcast_to(own, found.shape)
    below = below[0] if below.ndim > 1 and found.shape[0] > 0 else below
    if own.ndim > 1 and own.ndim == len(found.shape) and own.shape[0] > 1:
        raise Unread("has slopes for each row of a batch")
    below = np.ascontiguousarray(below).reshape(-1)
    act = PReLU(below)
    return _rounded(found, act, below, act.below)


def elu(x: Operand, alpha: float = 1.0, scale: float = 1.0) -> Rows:
    """scale (x above 0 and alpha (exp(x) - 1) below)."""
    return scaled(activated(x, room.ELU(alpha, scaled=False)), scale)


def celu(x: Operand, alpha: float) -> Rows:
    """alpha elu(x / alpha), which is the operator's map where alpha > 0."""
    if not alpha > 0:
        raise Unread(f"has alpha={alpha:g}")
    return scaled(activated(scaled(_of_features(x), 1 / alpha), room.ELU()), alpha)


def log(x: Operand) -> Tensor:
    """log(x): of a constant, or of a sigmoid."""
    x = tensor(x)
    if not isinstance(x, Rows):
        return np.log(x)
    before = products.before(room.Sigmoid, x, 0.25)
    if before is None:
        raise Unread("takes the logarithm of features")
    return ACTIVATIONS["log_sigmoid"](before)


def erf(x: Operand) -> Rows:
    """erf(x), of x = y / sqrt(2) for some features y."""
    found = _of_features(x)
    stage = found.stage
    factors = np.zeros(1) if stage.weight is None or stage.bias is None or stage.bias.any() else stage.weight
    if (
        stage.parent is None
        or not np.isclose(factors.max(axis=1), math.sqrt(0.5), rtol=products.CLOSE, atol=0).all()
    ):
        raise Unread("is read as a part of GELU alone")
    if (np.count_nonzero(factors, axis=1) != 1).any():
        raise Unread("is read as a part of GELU alone")
    own = np.argmax(factors, axis=1)
    before = Rows(stage.parent, found.rows() * stage.parent.width + own[found.features()])
    return features.activated(before, Share("none"))


def softplus_of(condition: Compared | Decided, above: Operand, other: Operand) -> Tensor:
    """Softplus as exporters write torch's, which returns x above 20: the two are the same to 2e-9."""
    x, soft = tensor(above), tensor(other)
    if (
        isinstance(x, Rows)
        and isinstance(soft, Rows)
        and (isinstance(condition, Compared) or len(condition.by) == 1)
    ):
        difference = condition.difference if isinstance(condition, Compared) else condition.outputs
        inside = products.before(room.Softplus, soft)
        if inside is not None and products.same(inside, x) and _is_far_above(difference, x):
            return soft
    raise Unread("chooses between features")


def _is_far_above(difference: Rows, x: Rows) -> bool:
    """Whether difference = x - limit, entry by entry, for limits of at least 20."""
    stage = difference.stage
    if stage.parent is not x.stage or stage.weight is None or stage.bias is None or difference.shape != x.shape:
        return False
    places, own = difference.features().ravel(), x.features().ravel()
    weight = stage.weight[places]
    is_x = np.array_equal(weight, np.eye(weight.shape[1])[own]) and np.array_equal(difference.rows(), x.rows())
    return is_x and bool((stage.bias[places] <= -20).all())


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
        least, most = (float(end.reshape(-1).astype(np.float32)[0]) for end in (low, high))
        if math.isfinite(least) and math.isfinite(most) and least < most:
            limits = [end.reshape(-1)[0] for end in (low, high)]
            return _rounded(found, Clip(least, most), limits, [least, most])
    for end, largest in ((low, True), (high, False)):
        if end is not None:
            found = features.extreme([found, end], largest)
    return found


def hard_sigmoid(x: Operand, slope: float, offset: float) -> Rows:
    """min(max(slope x + offset, 0), 1)."""
    return features.activated(scaled(_of_features(x), slope, offset), Clip(0.0, 1.0))


ACTIVATIONS: Mapping[str, Callable[[Operand], Rows]] = {  # without arguments
    "relu": relu,
    "tanh": lambda x: products.tanh(_of_features(x)),
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


def _decided(x: Decided, axis: int) -> Decided:
    """Probabilities (B, C), of which another decision is taken along their own axis."""
    if x.is_class:
        raise Unread(f"works on what {x.by[-1]} has made of the outputs")
    if axis not in (1, -1):
        raise Unread("decides along another axis than that of the outputs")
    return x


def probabilities(x: Operand, axis: int, name: str) -> Operand:
    """Of a softmax: the outputs themselves, whose largest is that of the probabilities."""
    if isinstance(x, Decided):
        return _decided(x, axis).then(name)
    return Decided(_outputs(x, axis), False, (name,))


def largest(x: Operand, axis: int, name: str) -> Decided:
    """The class with the largest output."""
    if isinstance(x, Decided):
        return Decided(_decided(x, axis).outputs, True, (*x.by, name))
    return Decided(_outputs(x, axis), True, (name,))


def above(a: Operand, b: Operand, name: str) -> Operand:
    """Whether a > b for a constant b: the sign of a - b decides."""
    if isinstance(a, Decided):
        raise Unread(f"works on what {a.by[-1]} has made of the outputs")
    found = subtract(a, b)
    if not isinstance(found, Rows):
        return np.asarray(constant(a) > constant(b))
    if found.places.size != found.shape[0]:
        return Compared(found)
    return Decided(found, True, (name,))
