"""Products of features, of which lipexp knows two: SiLU and GELU, in the parts that exporters make of them.

What is only a part of GELU stands in the graph as an activation of its own, until the product that completes it.
"""

from __future__ import annotations

import math

import numpy as np

from lipexp import activations as room
from lipexp.activations import Activation
from lipexp.foreign.features import Rows, Stage, Unread, activated, scaled

CUBE, INSIDE = 0.044715, math.sqrt(2 / math.pi)  # of the approximation by tanh; see `lipexp.activations.GELU`
CLOSE = 2.0**-23  # how much a number of float32 may differ from these, relative


class Part(Activation):
    """A part of GELU, which is no activation by itself."""

    outside = "multiplies features with each other"  # what a network does that has it elsewhere


class Power(Part):
    """x^n."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n


class Cubic(Part):
    """x + 0.044715 x^3."""


class Share(Part):
    """2 P(x) - 1, with P the normal distribution function, which is erf(x / sqrt(2)); or its approximation."""

    def __init__(self, approximate: str) -> None:
        super().__init__()
        self.approximate = approximate
        if approximate == "none":
            self.outside = "takes the error function outside of GELU"


def product(a: Rows, b: Rows) -> Rows:
    """a b, which is SiLU, GELU or a part of it.

    Raises:
        Unread: it is none of these.
    """
    for x, gate in ((a, b), (b, a)):
        base, scale, offset = unscaled(gate)
        act = base.stage.act
        if isinstance(act, room.Sigmoid | Share) and (times := _quotient(x, _above(base))) is not None:
            if isinstance(act, room.Sigmoid) and offset == 0 and act.factor == 4:
                return scaled(activated(_above(base), room.SiLU(scaled=False)), 4 * scale * times)
            if isinstance(act, Share) and offset == scale:  # x s (1 + share) = 2 s x P(x)
                gelu = room.GELU(act.approximate, scaled=False)
                gelu.rounding = 2.0**-24  # the file has numbers of float32 for its irrational ones
                return scaled(activated(_above(base), gelu), 2 * scale * times)
        base, n, factor = _power(gate)
        if n < 3 and (times := _quotient(x, base)) is not None:
            return scaled(activated(base, Power(n + 1)), factor * times)
    raise Unread("multiplies features with each other")


def cubic(a: Rows, b: Rows) -> Rows | None:
    """a + b, where it is x + 0.044715 x^3."""
    for x, cube in ((a, b), (b, a)):
        base, n, factor = _power(cube)
        if n == 3 and same(base, x) and math.isclose(factor, CUBE, rel_tol=CLOSE):
            return activated(x, Cubic())
    return None


def tanh(x: Rows) -> Rows:
    """tanh(x): a part of GELU where x = sqrt(2 / pi) (y + 0.044715 y^3)."""
    base, scale, offset = unscaled(x)
    if is_of(base.stage, Cubic) and offset == 0 and math.isclose(scale, INSIDE, rel_tol=CLOSE):
        return activated(_above(base), Share("tanh"))
    return activated(x, room.Tanh())


def power(x: Rows, n: float) -> Rows:
    """x^n."""
    if n not in (2, 3):
        raise Unread("takes a power of features")
    return activated(x, Power(int(n)))


def _power(x: Rows) -> tuple[Rows, int, float]:
    """(y, n, c) where x = c y^n."""
    base, scale, offset = unscaled(x)
    act = base.stage.act
    return (_above(base), act.n, scale) if isinstance(act, Power) and offset == 0 else (x, 1, 1.0)


def is_of(stage: Stage | None, kind: type[Activation]) -> bool:
    """Whether a stage is an activation of this kind."""
    return stage is not None and isinstance(stage.act, kind)


def same(x: Rows, y: Rows) -> bool:
    """Whether two tensors are the same, entry by entry."""
    return x.stage is y.stage and np.array_equal(x.places, y.places)


def _quotient(x: Rows, y: Rows) -> float | None:
    """c where x = c y, entry by entry."""
    if same(x, y):
        return 1.0
    stage = x.stage
    if stage.weight is None or stage.bias is None or stage.parent is not y.stage or x.shape != y.shape:
        return None
    weight, bias = stage.weight[x.features().ravel()], stage.bias[x.features().ravel()]
    times = float(weight[0].sum()) if len(weight) else 0.0
    expected = times * np.eye(weight.shape[1])[y.features().ravel()]
    rows = np.array_equal(x.rows(), y.rows())
    return times if rows and np.array_equal(weight, expected) and not bias.any() else None


def unscaled(x: Rows) -> tuple[Rows, float, float]:
    """(y, s, o) where x = s y + o, entry by entry, with y of the last activation where there is one."""
    stage, places, scale, offset = x.stage, x.features(), 1.0, 0.0
    while stage.parent is not None and stage.weight is not None and stage.bias is not None and places.size:
        weight, bias = stage.weight[places.ravel()], stage.bias[places.ravel()]
        own = np.argmax(weight != 0, axis=1)
        factor = float(weight[0, own[0]])
        if not (np.array_equal(weight, factor * np.eye(weight.shape[1])[own]) and (bias == bias[0]).all()):
            break
        scale, offset = scale * factor, scale * float(bias[0]) + offset
        stage, places = stage.parent, own.reshape(places.shape)
    return Rows(stage, x.rows() * stage.width + places), scale, offset


def before(kind: type[Activation], y: Rows, scale: float = 1.0, offset: float = 0.0) -> Rows | None:
    """x where y = scale act(x) + offset for an activation of this kind, entry by entry."""
    base, *found = unscaled(y)
    return _above(base) if is_of(base.stage, kind) and found == [scale, offset] else None


def _above(x: Rows) -> Rows:
    """What an activation acts on."""
    assert x.stage.parent is not None
    return Rows(x.stage.parent, x.places)
