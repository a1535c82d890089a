"""What every activation is, and what it may declare.

Shapes: K runs, B points, H features; every map takes and returns (K, B, H).
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lipexp.config import ConfigError

Array = np.ndarray[Any, Any]

ALL_NORMS = frozenset({1.0, 2.0, math.inf})
LOST_BITS = (
    10  # of 53, which an activation may lose to rounding that says nothing of it: see `Activation.enclosed`
)


@dataclass(frozen=True)
class ActiveMap:
    """The affine map of an activation near each of some points: out[j] = factor[j] z[index[j]] + offset[j].

    The numbers are exact, as whole numbers or in float64.
    """

    index: Array  # (..., H) int64
    factor: Array  # (..., H)
    offset: Array | None = None  # (..., H); None: 0

    def take(self, points: Array | int) -> ActiveMap:
        """The maps near some of the points."""
        offset = None if self.offset is None else self.offset[points]
        return ActiveMap(self.index[points], self.factor[points], offset)

    def put(self, points: Array, some: ActiveMap) -> None:
        """Write the maps near some of the points."""
        self.index[points], self.factor[points] = some.index, some.factor
        if self.offset is not None:
            self.offset[points] = 0 if some.offset is None else some.offset


class Activation(nn.Module):
    """A map between layers, `forward`: (K, B, H) -> (K, B, H).

    | declaration          | what it says                                             | what it buys             |
    |----------------------|----------------------------------------------------------|--------------------------|
    | `norms`              | the p-norms, of 1, 2 and inf, in which it is 1-Lipschitz | training under a bound,  |
    |                      |                                                          | the bound `product`, and |
    |                      |                                                          | certified radii          |
    | `slopes`             | it acts feature by feature, and its difference quotients | `rows`, `eclipse` and    |
    |                      | lie between these two numbers                            | `lipsdp`, and radii      |
    | `groups(width)`      | it sorts the features within these groups, ascending     | the same, but for radii  |
    | `active_map(z)`      | it is piecewise linear, and this is its affine map at z  | exact measurement, and   |
    |                      |                                                          | radii in float32, too    |
    | `breakpoints(width)` | where that map changes                                   | `exact`; `bnb` with      |
    |                      |                                                          | `slopes` or `groups`     |
    | `thresholds(width)`  | its breakpoints are not those of z_i = z_j and z_i = 0,  | the same; no radii in    |
    |                      | but at these distances, and its maps may have offsets    | float32                  |
    | `slopes_between(low, | its slopes between these inputs, where that is not yet   | `bnb`, and rigorous      |
    | high)`               | known from `breakpoints`                                 | measurement              |
    | `enclosed(z)`        | its values in float64, with bounds on their errors       | the same, with nothing   |
    |                      |                                                          | assumed of `forward`     |
    | `onnx(add, z, theta)`| how it is written with the operators of ONNX             | `lipexp export`          |
    | `check_width(width)` | which numbers of features suit it                        | one clear line otherwise |
    | `n_parameters(width)`| it has so many parameters of its own in a layer, which   | they are trained, each   |
    |                      | lie in `self.theta` (K, n)                               | layer has its own        |
    | `initial(width)`     | what they start from, (n,)                               |                          |
    | `within(theta, s)`   | any numbers (K, n) as parameters with which all that is  |                          |
    |                      | declared holds, differentiably; those that are lengths   |                          |
    |                      | of features are multiplied by s (K or 1, 1)              |                          |

    Of `forward` is asked: it treats every run and point alone, works in float32 and float64, leaves its input as
    it is, and has no parameters or buffers of torch. Certified radii rely on how it rounds: with an `active_map`
    and no `thresholds`, on `forward(0) = 0` and no more than one rounding error in each feature; otherwise on 43
    correct bits in float64, see `rounding.evaluate`. A class that declares nothing trains with constraint=none,
    and is measured in float64. An ONNX file holds no code: without `onnx`, `lipexp export` writes into it what is
    declared, either `groups`, or the three `slopes`, `active_map` and `breakpoints` where all features have the
    same slopes below and above 0. `slopes_between` and `enclosed` are proofs: their numbers are rounded outwards,
    see `Smooth` for how. `norms`, `slopes`, `groups` and `breakpoints` hold for any parameters, and are
    asked for without them. What a class inherits describes the map of its base: a class that overrides `forward`
    therefore starts without declarations, and repeats those that are still true.
    """

    rounding = 0.0  # the largest relative change of its own numbers, where they were rounded to float32
    norms: Collection[float] = frozenset()
    theta: Tensor = torch.empty(1, 0)  # (K, n) its own parameters

    @property
    def slopes(self) -> tuple[float, float] | None:
        return None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        own: set[str] = set()
        for ancestor in cls.__mro__:
            own |= vars(ancestor).keys()
            if "forward" in vars(ancestor):
                break
        declared = ("norms", "slopes", "groups", "active_map", "breakpoints", "thresholds", "onnx", "n_parameters")
        for name in (*declared, "slopes_between", "enclosed"):
            if name not in own:
                setattr(cls, name, vars(Activation)[name])

    def forward(self, z: Tensor) -> Tensor:
        raise NotImplementedError

    def groups(self, width: int) -> Array | None:
        """(groups, size) the features that are sorted among themselves, in their order; None: it does not sort."""
        return None

    def active_map(self, z: Array) -> ActiveMap | None:
        """The affine map around pre-activations `z` (..., H) of any exact number type; None at a breakpoint.

        Without `thresholds` it is linear, and the same for all c z with c > 0. Then `z` may be in any unit.
        """
        raise NotImplementedError

    def breakpoints(self, width: int) -> Array | None:
        """(M, 2) pairs of features (i, j): the map changes where z_i = z_j, or where z_i = 0 for j = -1.

        None: they are not known.
        """
        return None

    def thresholds(self, width: int) -> Array | None:
        """(M,) c of each breakpoint, exact in float64: it lies where z_i - z_j = c, or z_i = c for j = -1."""
        return None

    def slopes_between(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor] | None:
        """Bounds on all difference quotients of each feature between inputs low <= high, (..., H) in float64.

        The least and the largest slope of the linear pieces between them, where these are known; else `slopes`.
        Slopes that jump at an input count there. Inputs may be infinite or NaN, which stands for any input.

        Returns:
            (least, most), (..., H) each; None: it does not act feature by feature.
        """
        if self.slopes is None:
            return None
        pieces = self.pieces(low.shape[-1])
        if pieces is None:
            return torch.full_like(low, self.slopes[0]), torch.full_like(high, self.slopes[1])
        knots, slopes = (torch.from_numpy(part) for part in pieces)
        end = torch.full_like(slopes[:1], math.inf)
        first, last = torch.cat([-end, knots]), torch.cat([knots, end])  # of each piece
        low, high = low.unsqueeze(-2), high.unsqueeze(-2)
        apart = (low >= last) | (high <= first)
        apart = apart & ~((low == high) & (low <= last) & (high >= first))
        return slopes.masked_fill(apart, math.inf).amin(dim=-2), slopes.masked_fill(apart, -math.inf).amax(dim=-2)

    def enclosed(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """act(z) in float64 for z (..., H), and bounds on the errors of these numbers, (..., H) each.

        Those of linear maps without offsets have one rounding error. Of another `forward` it is assumed that each
        feature is off by no more than 2^-43 times the largest of 1, all |z_i| and all |act(z)_i|.
        """
        out = self(z.reshape(1, -1, z.shape[-1])).view(z.shape)
        if self.is_piecewise_linear and self.is_homogeneous:
            return out, 2.0**-52 * out.abs()
        largest = torch.maximum(z.abs(), out.abs()).amax(dim=-1, keepdim=True).clamp_min(1)
        return out, (2.0 ** (LOST_BITS - 53) * largest).expand_as(out)

    def onnx(self, add: Callable[..., str], z: str, theta: str) -> str | None:
        """The name of its output, computed by ONNX operators from z (N, H); None: they are not known.

        Args:
            add: add(operator, *inputs, **attributes) adds a node and returns the name of its output. Inputs are
                names, or constants as numpy arrays.
            theta: the name of its parameters (n,).
        """
        return None

    def lipschitz(self, p: float) -> float | None:
        """A proven Lipschitz constant in the p-norm, as `norms` and `slopes` say; None: they say nothing."""
        steepest = math.inf if self.slopes is None else max(map(abs, self.slopes))
        constant = min(1.0, steepest) if p in self.norms else steepest
        return constant if math.isfinite(constant) else None

    def check_width(self, width: int) -> None:
        """Raise ConfigError if a layer of `width` features does not suit."""

    def n_parameters(self, width: int) -> int:
        """The number of its own parameters for a layer of `width` features."""
        return 0

    def initial(self, width: int) -> Tensor:
        """(n,) the parameters before training."""
        return torch.zeros(self.n_parameters(width))

    def within(self, theta: Tensor, scale: Tensor) -> Tensor:
        """(K, n) parameters with which the declarations hold, for any numbers `theta` (K, n).

        Args:
            scale: (K, 1) or (1, 1), the unit of lengths of features in this layer.
        """
        return theta

    def at(self, theta: Tensor) -> Activation:
        """This activation with the parameters `theta` (K, n) of one layer."""
        if not theta.shape[1]:
            return self
        one = copy.copy(self)
        one.theta = theta
        return one

    @property
    def label(self) -> str:
        """What messages call it."""
        return type(self).__name__

    @property
    def has_unit_slopes(self) -> bool:
        """Whether it declares slopes in [0, 1], which the inequalities of residual and sandwich layers need."""
        return self.slopes is not None and 0 <= self.slopes[0] <= self.slopes[1] <= 1

    @property
    def is_piecewise_linear(self) -> bool:
        """Whether it declares its active map."""
        return type(self).active_map is not Activation.active_map

    @property
    def is_homogeneous(self) -> bool:
        """Whether act(c z) = c act(z) for c > 0, where it is piecewise linear."""
        return type(self).thresholds is Activation.thresholds

    def has_local_slopes(self, width: int) -> bool:
        """Whether `slopes_between` says more than `slopes` does."""
        kind = type(self).slopes_between
        return self.slopes is not None and (
            kind is not Activation.slopes_between or self.pieces(width) is not None
        )

    def pieces(self, width: int) -> tuple[Array, Array] | None:
        """Knots (M, H) and the slopes (M + 1, H) before, between and behind them, ascending, of each feature.

        None: it does not act on each feature alone, is not piecewise linear, or features differ in their number.
        """
        breakpoints = self.breakpoints(width)
        if self.slopes is None or not self.is_piecewise_linear or breakpoints is None:
            return None
        features, others = breakpoints.T
        counts = np.bincount(features, minlength=width)
        if (others >= 0).any() or np.ptp(counts):
            return None
        at = self.thresholds(width)
        at = np.zeros(len(features)) if at is None else at
        knots = at[np.lexsort((at, features))].reshape(width, -1).T
        inside = [(a + b) / 2 for a, b in itertools.pairwise(knots)]
        places = [knots[0] - 1, *inside, knots[-1] + 1] if len(knots) else [np.zeros(width)]
        maps = [self.active_map(place) for place in places]
        slopes = [np.asarray(found.factor, dtype=np.float64) for found in maps if found is not None]
        return (knots, np.stack(slopes)) if len(slopes) == len(maps) else None

    def two_slopes(self, width: int) -> tuple[float, float] | None:
        """The slopes of all features below and above 0, if it acts on each alone, with no other breakpoint."""
        breakpoints = self.breakpoints(width)
        if (
            self.slopes is None
            or not (self.is_piecewise_linear and self.is_homogeneous)
            or breakpoints is None
            or (breakpoints[:, 1] >= 0).any()
        ):
            return None
        below, above = (self.active_map(np.full(width, sign)) for sign in (-1.0, 1.0))
        if below is None or above is None or np.ptp([below.factor, above.factor], axis=1).any():
            return None  # features may differ in their slopes
        return float(below.factor[0]), float(above.factor[0])


class Undeclared(Activation):
    """Any other module or function, such as torch.nn.Tanh: of its attributes only `norms` and `slopes` count."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.norms = getattr(function, "norms", frozenset())

    @property
    def slopes(self) -> tuple[float, float] | None:
        return getattr(self.function, "slopes", None)

    def forward(self, z: Tensor) -> Tensor:
        return self.function(z)

    @property
    def label(self) -> str:
        return getattr(self.function, "__name__", type(self.function).__name__)


def as_activation(thing: Any) -> Activation:
    """`thing` as an activation whose declarations have been checked.

    Raises:
        ConfigError: it is no function, or a declaration makes no sense.
    """
    if not callable(thing):
        raise ConfigError("act", type(thing).__name__, "must be a map of features, such as a torch.nn.Module")
    act = thing if isinstance(thing, Activation) else Undeclared(thing)
    try:
        norms = frozenset(float(p) for p in act.norms)
    except (TypeError, ValueError):
        norms = frozenset({math.nan})
    if not norms <= ALL_NORMS:
        raise ConfigError("act", act.label, f"declares norms = {act.norms}; a p-norm is 1, 2 or inf")
    if set(act.norms) != norms:
        act.norms = norms  # with numbers for words such as "inf"
    if act.state_dict():
        names = ", ".join(act.state_dict())
        wanted = f"has parameters or buffers of torch ({names}); its own are declared by n_parameters"
        raise ConfigError("act", act.label, wanted)
    if act.slopes is not None:
        try:
            low, high = (float(slope) for slope in act.slopes)
        except (TypeError, ValueError):
            low = high = math.nan
        if not (math.isfinite(low) and math.isfinite(high) and low <= high):
            raise ConfigError(
                "act", act.label, f"declares slopes = {act.slopes}; they are the least and the largest"
            )
    return act
