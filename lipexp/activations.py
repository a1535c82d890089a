"""Activations: maps between layers, 1-Lipschitz in the norms that they declare.

Shapes: K runs, B points, H features; every map takes and returns (K, B, H).

To add one: a class derived from `Activation` with a `forward`, and one file in conf/act/. The table in
`Activation` says what else it may declare, and what each declaration buys.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lipexp.config import ConfigError, number, whole

Array = np.ndarray[Any, Any]

ALL_NORMS = frozenset({1.0, 2.0, math.inf})


@dataclass(frozen=True)
class ActiveMap:
    """The linear map that an activation is near each of some points: out[j] = factor[j] 2^exponent z[index[j]]."""

    index: Array  # (..., H) int64
    factor: Array  # (..., H) int64
    exponent: int = 0  # the same at all points


class Activation(nn.Module):
    """A map between layers, `forward`: (K, B, H) -> (K, B, H).

    | declaration          | what it says                                             | what it buys             |
    |----------------------|----------------------------------------------------------|--------------------------|
    | `norms`              | the p-norms, of 1, 2 and inf, in which it is 1-Lipschitz | training under a bound,  |
    |                      |                                                          | the bound `product`, and |
    |                      |                                                          | certified radii          |
    | `slopes`             | it acts feature by feature, and its difference quotients | `rows`, `eclipse` and    |
    |                      | lie between these two numbers                            | `lipsdp`, and radii      |
    | `groups(width)`      | it sorts the features within these groups, ascending     | `rows`                   |
    | `active_map(z)`      | it is piecewise linear, and this is its linear map at z  | exact measurement, and   |
    |                      |                                                          | radii in float32, too    |
    | `breakpoints(width)` | where that linear map changes                            | `exact`; `bnb` where it  |
    |                      |                                                          | sorts or has two slopes  |
    | `check_width(width)` | which numbers of features suit it                        | one clear line otherwise |
    | `n_parameters(width)`| it has so many parameters of its own in a layer, which   | they are trained, each   |
    |                      | lie in `self.theta` (K, n)                               | layer has its own        |
    | `initial(width)`     | what they start from, (n,)                               |                          |
    | `within(theta, s)`   | any numbers (K, n) as parameters with which all that is  |                          |
    |                      | declared holds, differentiably; those that are lengths   |                          |
    |                      | of features are multiplied by s (K or 1, 1)              |                          |

    Of `forward` is asked: it treats every run and point alone, works in float32 and float64, leaves its input as
    it is, and has no parameters or buffers of torch. Certified radii rely on how it rounds: with an `active_map`,
    on `forward(0) = 0` and no more than one rounding error in each feature; without one, on 43 correct bits in
    float64, see `radii.evaluate`. A class that declares nothing trains with constraint=none, and is measured in
    float64. An ONNX file holds no code: `lipexp export` writes into it what is declared, either `groups`, or the
    three `slopes`, `active_map` and `breakpoints` where all features have the same slopes below and above 0. What
    a class inherits describes the map of its base: a class that overrides `forward` therefore starts without
    declarations, and repeats those that are still true.
    """

    norms: Collection[float] = frozenset()
    theta: Tensor  # (K, n) its own parameters, if it has any

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
        for name in ("norms", "slopes", "groups", "active_map", "breakpoints", "n_parameters"):
            if name not in own:
                setattr(cls, name, vars(Activation)[name])

    def forward(self, z: Tensor) -> Tensor:
        raise NotImplementedError

    def groups(self, width: int) -> Array | None:
        """(groups, size) the features that are sorted among themselves, in their order; None: it does not sort."""
        return None

    def active_map(self, z: Array) -> ActiveMap | None:
        """The linear map around pre-activations `z` (..., H) of any exact number type; None at a breakpoint."""
        raise NotImplementedError

    def breakpoints(self, width: int) -> Array | None:
        """(M, 2) pairs of features (i, j): the map changes where z_i = z_j, or where z_i = 0 for j = -1.

        None: they are not known.
        """
        return None

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
    def is_piecewise_linear(self) -> bool:
        """Whether it declares its active linear map."""
        return type(self).active_map is not Activation.active_map

    def two_slopes(self, width: int) -> tuple[float, float] | None:
        """The slopes of all features below and above 0, if it acts on each alone, with no other breakpoint."""
        breakpoints = self.breakpoints(width)
        if (
            self.slopes is None
            or not self.is_piecewise_linear
            or breakpoints is None
            or (breakpoints[:, 1] >= 0).any()
        ):
            return None
        below, above = (self.active_map(np.full(width, sign)) for sign in (-1.0, 1.0))
        if below is None or above is None or np.ptp([below.factor, above.factor], axis=1).any():
            return None  # features may differ in their slopes
        return float(below.factor[0] * 2.0**below.exponent), float(above.factor[0] * 2.0**above.exponent)


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


class Elementwise(Activation):
    """x above 0 and slope x below, feature by feature: 1-Lipschitz in every p-norm.

    The slope is rounded to float32.

    Args:
        slope: from -1 to 1, and 0 or at least 1e-9 in size.

    Raises:
        ConfigError: it lies outside.
    """

    norms = ALL_NORMS

    def __init__(self, slope: float) -> None:
        super().__init__()
        # Smaller ones do not fit `active_map`, whose factors are 64-bit integers.
        if not 1e-9 <= abs(number("slope", slope)) <= 1 and slope != 0:
            raise ConfigError("slope", slope, "must be a number from -1 to 1, and 0 or at least 1e-9 in size")
        self.slope = float(np.float32(slope))
        self.below, self.above = self.slope.as_integer_ratio()
        self.exponent = 1 - self.above.bit_length()

    @property
    def slopes(self) -> tuple[float, float]:
        return self.slope, 1.0

    def forward(self, z: Tensor) -> Tensor:
        return nn.functional.leaky_relu(z, self.slope)

    def active_map(self, z: Array) -> ActiveMap | None:
        if np.any(z == 0):
            return None
        index = np.broadcast_to(np.arange(z.shape[-1]), z.shape)
        return ActiveMap(index, np.where(z > 0, self.above, self.below), self.exponent)

    def breakpoints(self, width: int) -> Array:
        return np.stack([np.arange(width), np.full(width, -1)], axis=1)


class ReLU(Elementwise):
    """max(0, x): its gradient is 0 wherever x < 0."""

    def __init__(self) -> None:
        super().__init__(slope=0)


class LeakyReLU(Elementwise):
    """max(slope x, x): it keeps a little of the gradient where x < 0.

    Args:
        slope: from 1e-9 to 1.

    Raises:
        ConfigError: it lies outside.

    Reference: Maas, Hannun and Ng 2013, "Rectifier nonlinearities improve neural network acoustic models".
    """

    def __init__(self, slope: float = 0.01) -> None:
        if not 1e-9 <= number("slope", slope) <= 1:
            raise ConfigError("slope", slope, "must be a number from 1e-9 to 1 (act=relu has 0)")
        super().__init__(slope)

    def extra_repr(self) -> str:
        return f"slope={self.slope}"


class Abs(Elementwise):
    """|x|: it keeps the norm of a gradient, as GroupSort does.

    Reference: Anil, Lucas and Grosse 2019, section 4: MaxMin can express it, and the other way round.
    """

    def __init__(self) -> None:
        super().__init__(slope=-1)


class GroupSort(Activation):
    """Sorts the features, ascending, within groups of equal size: a permutation of its input.

    Its Jacobian is a permutation matrix, so it is 1-Lipschitz in every p-norm and keeps the norm of a gradient.
    The output holds the same floats, bit for bit.

    Feature j belongs to group j mod n_groups, so the members of a group stand H / size apart and sorting compares
    contiguous slabs, which is the faster layout. In torch: x.unflatten(-1, (size,
    -1)).sort(-2).values.flatten(-2).

    Args:
        n_groups: the number of groups; 1 is FullSort, H / 2 is MaxMin.
        group_size: the features per group, the other spelling. Neither means 2, MaxMin.

    Raises:
        ConfigError: both are given, or one is not a positive whole number.

    Reference: Anil, Lucas and Grosse 2019, "Sorting out Lipschitz function approximation", section 4.
    """

    norms = ALL_NORMS

    def __init__(self, n_groups: int | None = None, group_size: int | None = None) -> None:
        super().__init__()
        if n_groups is not None and group_size is not None:
            raise ConfigError("n_groups", n_groups, f"give it or group_size (now {group_size}), not both")
        self.n_groups = None if n_groups is None else whole("n_groups", n_groups, least=1)
        self.group_size = None if group_size is None else whole("group_size", group_size, least=1)

    def size(self, width: int) -> int:
        """The number of features per group in a layer of `width`."""
        return width // self.n_groups if self.n_groups is not None else self.group_size or 2

    def check_width(self, width: int) -> None:
        if self.n_groups is not None and width % self.n_groups:
            raise ConfigError("model.width", width, f"must be a multiple of act.n_groups={self.n_groups}")
        size = self.size(width)
        if width % size:
            spelled = "act.group_size" if self.group_size is not None else "act's group size,"
            raise ConfigError("model.width", width, f"must be a multiple of {spelled} {size}")

    def forward(self, z: Tensor) -> Tensor:
        size = self.size(z.shape[-1])
        exported = torch.jit._trace.is_tracing() or torch.compiler.is_compiling()  # which cannot hold _Exchange
        if not exported and size == 2:
            return _Exchange.apply(z)
        return z.unflatten(-1, (size, -1)).sort(dim=-2).values.flatten(-2)

    def groups(self, width: int) -> Array:
        return np.arange(width).reshape(self.size(width), -1).T

    def active_map(self, z: Array) -> ActiveMap | None:
        groups = self.groups(z.shape[-1])
        if groups.shape[1] == 2:
            return self._exchange(z, *groups.T)
        members = z[..., groups]  # (..., groups, size)
        ranked = np.argsort(members, axis=-1)
        members = np.take_along_axis(members, ranked, axis=-1)
        if np.any(members[..., 1:] == members[..., :-1]):
            return None
        index = np.empty(z.shape, dtype=np.int64)
        index[..., groups] = np.take_along_axis(np.broadcast_to(groups, ranked.shape), ranked, axis=-1)
        return ActiveMap(index, np.ones(z.shape, dtype=np.int64))

    @staticmethod
    def _exchange(z: Array, first: Array, second: Array) -> ActiveMap | None:
        """`active_map` of groups of two, by one comparison instead of an argsort."""
        a, b = z[..., first], z[..., second]
        if np.any(a == b):
            return None
        swap = (b < a).astype(bool)  # numpy compares Python integers as objects
        index = np.empty(z.shape, dtype=np.int64)
        index[..., first] = np.where(swap, second, first)
        index[..., second] = np.where(swap, first, second)
        return ActiveMap(index, np.ones(z.shape, dtype=np.int64))

    def breakpoints(self, width: int) -> Array:
        groups = self.groups(width)
        pairs = np.stack(np.triu_indices(groups.shape[1], k=1), axis=1)
        return groups[:, pairs].reshape(-1, 2)

    def extra_repr(self) -> str:
        return f"n_groups={self.n_groups}, group_size={self.group_size}"


class _Exchange(torch.autograd.Function):
    """Sorts the halves a, b of the last axis of x (..., H) as pairs (a_i, b_i); with `swap`, exchanges those.

    The backward pass exchanges the same pairs of the gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, swap: Tensor | None = None) -> Tensor:
        out, ctx.swap = _sorted(x.detach()) if swap is None else (_exchanged(x.detach(), swap), swap)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        if torch.is_grad_enabled():  # a second derivative is wanted
            return _Exchange.apply(gradients[0], ctx.swap), None
        return _exchanged(gradients[0], ctx.swap), None


def _sorted(x: Tensor) -> tuple[Tensor, Tensor]:
    """The smaller and the larger halves of x, and `swap`: 1 where they changed places, in the number type of x.

    Of two equal numbers, such as 0 and -0, minimum and maximum return the same operand, which one depends on the
    machine. Their operands stand in opposite order here, so that both numbers are kept.
    """
    a, b = x.chunk(2, dim=-1)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    smaller, larger = out.chunk(2, dim=-1)
    torch.minimum(a, b, out=smaller)
    torch.maximum(b, a, out=larger)
    return out, torch.lt(b, a, out=torch.empty_like(a, memory_format=torch.contiguous_format))


def _exchanged(x: Tensor, swap: Tensor) -> Tensor:
    """x with its halves exchanged where `swap` is 1.

    By lerp, which is exact at 0 and 1 and vectorised: torch.where takes several times as long.
    """
    a, b = x.chunk(2, dim=-1)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    out_a, out_b = out.chunk(2, dim=-1)
    torch.lerp(a, b, swap, out=out_a)
    torch.lerp(b, a, swap, out=out_b)
    return out
