"""Activations: 1-Lipschitz maps between layers.

Shapes: K runs, B points, H features; every map takes and returns (..., H).

An activation declares in `norms` the p-norms in which it is 1-Lipschitz; the constraint needs the one of its
hidden space. A class that declares none, such as torch.nn.Tanh, trains without a constraint only. One that acts
feature by feature may also declare the range of its slopes in `slopes`, which leads to tighter bounds. lipexp's
own activations are piecewise linear, which `piece` exposes: that makes exact arithmetic on a network possible.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from lipexp.config import ConfigError, number, whole

ALL_NORMS = frozenset({1.0, 2.0, math.inf})


@dataclass
class Piece:
    """The linear map that an activation is near each of some points: out[j] = factor[j] 2^exponent z[index[j]]."""

    index: np.ndarray[Any, Any]  # (..., H) int64
    factor: np.ndarray[Any, Any]  # (..., H) int64
    exponent: int = 0


class Activation(nn.Module):
    """Base of lipexp's activations: what a network asks of its nonlinearity beyond `forward`."""

    norms: frozenset[float] = frozenset()

    @property
    def slopes(self) -> tuple[float, float] | None:
        """The range of (act(a) - act(b)) / (a - b) of one that acts feature by feature."""
        return None

    def check_width(self, width: int) -> None:
        """Raise ConfigError if a layer of `width` features does not suit."""

    def order(self, width: int) -> Tensor | None:
        """(H,) the training feature that stands at each place of the baked network; None: the same order."""
        return None

    def baked(self) -> nn.Module:
        """The same activation on features in the order of the baked network."""
        return self


class PiecewiseLinear(Activation):
    """An activation that says which linear map it is near a point; all of lipexp's own are."""

    def piece(self, z: np.ndarray[Any, Any]) -> Piece | None:
        """The linear pieces at the pre-activations `z` (..., H) of any exact number type; None on a kink."""
        raise NotImplementedError

    def kinks(self, width: int) -> np.ndarray[Any, Any] | None:
        """(M, 2) pairs of features (i, j), for all kinks z_i = z_j; (i, -1) for z_i = 0. None: not known."""
        return None


class Elementwise(PiecewiseLinear):
    """x above 0 and slope x below, feature by feature: 1-Lipschitz in every p-norm.

    Args:
        slope: a fraction whose denominator is a power of two, from -1 to 1.
    """

    norms = ALL_NORMS

    def __init__(self, slope: float) -> None:
        super().__init__()
        self.slope = slope
        self.below, self.above = float(slope).as_integer_ratio()
        self.exponent = 1 - self.above.bit_length()

    @property
    def slopes(self) -> tuple[float, float]:
        return float(self.slope), 1.0

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.leaky_relu(x, self.slope)

    def piece(self, z: np.ndarray[Any, Any]) -> Piece | None:
        if np.any(z == 0):
            return None
        index = np.broadcast_to(np.arange(z.shape[-1]), z.shape)
        return Piece(index, np.where(z > 0, self.above, self.below), self.exponent)

    def kinks(self, width: int) -> np.ndarray[Any, Any]:
        return np.stack([np.arange(width), np.full(width, -1)], axis=1)


class ReLU(Elementwise):
    """max(0, x): its gradient is 0 wherever x < 0."""

    def __init__(self) -> None:
        super().__init__(slope=0)


class LeakyReLU(Elementwise):
    """max(slope x, x): it keeps a little of the gradient where x < 0.

    Args:
        slope: from 1e-9 to 1; the float32 number nearest to it is taken.

    Raises:
        ConfigError: it lies outside.

    Reference: Maas, Hannun and Ng 2013, "Rectifier nonlinearities improve neural network acoustic models".
    """

    def __init__(self, slope: float = 0.01) -> None:
        # Smaller ones do not fit `piece`, whose factors are 64-bit integers.
        if not 1e-9 <= number("slope", slope) <= 1:
            raise ConfigError("slope", slope, "must be a number from 1e-9 to 1 (act=relu has 0)")
        super().__init__(float(np.float32(slope)))

    def extra_repr(self) -> str:
        return f"slope={self.slope}"


class Abs(Elementwise):
    """|x|: it keeps the norm of a gradient, as GroupSort does.

    Reference: Anil, Lucas and Grosse 2019, section 4: MaxMin can express it, and the other way round.
    """

    def __init__(self) -> None:
        super().__init__(slope=-1)


class GroupSort(PiecewiseLinear):
    """Sorts the features, ascending, within groups of equal size: a permutation of its input.

    Its Jacobian is a permutation matrix, so it is 1-Lipschitz in every p-norm and keeps the norm of a gradient.
    The output holds the same floats, bit for bit.

    In training the features of a group stand H / size apart (feature j belongs to group j mod n_groups), so that
    sorting compares contiguous slabs. `order` and `baked` lead to the usual layout, where the members of a group
    are neighbours.

    Args:
        n_groups: the number of groups; 1 is FullSort, H / 2 is MaxMin.
        group_size: the features per group, the other spelling. Neither means 2, MaxMin.
        neighbours: take the usual layout.

    Raises:
        ConfigError: both are given, or one is not a positive whole number.

    Reference: Anil, Lucas and Grosse 2019, "Sorting out Lipschitz function approximation", section 4.
    """

    norms = ALL_NORMS

    def __init__(
        self, n_groups: int | None = None, group_size: int | None = None, neighbours: bool = False
    ) -> None:
        super().__init__()
        if n_groups is not None and group_size is not None:
            raise ConfigError("n_groups", n_groups, f"give it or group_size (now {group_size}), not both")
        self.n_groups = None if n_groups is None else whole("n_groups", n_groups, least=1)
        self.group_size = None if group_size is None else whole("group_size", group_size, least=1)
        self.neighbours = neighbours

    def size(self, width: int) -> int:
        """The features per group in a layer of `width`."""
        return width // self.n_groups if self.n_groups is not None else self.group_size or 2

    def check_width(self, width: int) -> None:
        if self.n_groups is not None and width % self.n_groups:
            raise ConfigError("model.width", width, f"must be a multiple of act.n_groups={self.n_groups}")
        size = self.size(width)
        if width % size:
            spelled = "act.group_size" if self.group_size is not None else "act's group size, MaxMin's"
            raise ConfigError("model.width", width, f"must be a multiple of {spelled} {size}")

    def forward(self, x: Tensor) -> Tensor:
        width = x.shape[-1]
        size = self.size(width)
        if self.neighbours:
            return x.unflatten(-1, (width // size, size)).sort(dim=-1).values.flatten(-2)
        if size == 2:
            return _Exchange.apply(x)
        return x.unflatten(-1, (size, width // size)).sort(dim=-2).values.flatten(-2)

    def order(self, width: int) -> Tensor | None:
        if self.neighbours:
            return None
        return torch.from_numpy(self.members(width).ravel())

    def baked(self) -> nn.Module:
        return GroupSort(self.n_groups, self.group_size, neighbours=True)

    def piece(self, z: np.ndarray[Any, Any]) -> Piece | None:
        groups = self.members(z.shape[-1])
        if groups.shape[1] == 2:
            return self._exchange(z, *groups.T)
        members = z[..., groups]  # (..., groups, size)
        ranked = np.argsort(members, axis=-1)
        members = np.take_along_axis(members, ranked, axis=-1)
        if np.any(members[..., 1:] == members[..., :-1]):
            return None
        index = np.empty(z.shape, dtype=np.int64)
        index[..., groups] = np.take_along_axis(np.broadcast_to(groups, ranked.shape), ranked, axis=-1)
        return Piece(index, np.ones(z.shape, dtype=np.int64))

    @staticmethod
    def _exchange(z: np.ndarray[Any, Any], first: Any, second: Any) -> Piece | None:
        """`piece` of groups of two, by one comparison instead of an argsort."""
        a, b = z[..., first], z[..., second]
        if np.any(a == b):
            return None
        swap = (b < a).astype(bool)  # of integers of any size, numpy says object
        index = np.empty(z.shape, dtype=np.int64)
        index[..., first] = np.where(swap, second, first)
        index[..., second] = np.where(swap, first, second)
        return Piece(index, np.ones(z.shape, dtype=np.int64))

    def kinks(self, width: int) -> np.ndarray[Any, Any]:
        groups = self.members(width)
        pairs = np.stack(np.triu_indices(groups.shape[1], k=1), axis=1)
        return groups[:, pairs].reshape(-1, 2)

    def members(self, width: int) -> np.ndarray[Any, Any]:
        """(groups, size) the features of each group."""
        features, size = np.arange(width), self.size(width)
        return features.reshape(-1, size) if self.neighbours else features.reshape(size, -1).T

    def extra_repr(self) -> str:
        return f"n_groups={self.n_groups}, group_size={self.group_size}, neighbours={self.neighbours}"


class _Exchange(torch.autograd.Function):
    """The halves a, b of the last axis of x (..., H), exchanged where `swap` (..., H/2) is 1, kept where it is 0.

    Without a `swap` it sorts: exchanged is where b < a. Backwards it is the same places.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, swap: Tensor | None = None) -> Tensor:
        out, ctx.swap = _sorted(x.detach()) if swap is None else (_exchanged(x.detach(), swap), swap)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        if torch.is_grad_enabled():  # somebody wants a second derivative
            return _Exchange.apply(gradients[0], ctx.swap), None
        return _exchanged(gradients[0], ctx.swap), None


def _sorted(x: Tensor) -> tuple[Tensor, Tensor]:
    """The smaller and the larger halves of x, and the `swap` that leads to them, in the number type of x.

    Of two equal numbers, which may be zeros of different signs, minimum and maximum take the same operand, first
    or second, as the machine has it. So their operands stand in opposite order, and neither number is lost.
    """
    a, b = x.chunk(2, dim=-1)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    smaller, larger = out.chunk(2, dim=-1)
    torch.minimum(a, b, out=smaller)
    torch.maximum(b, a, out=larger)
    return out, torch.lt(b, a, out=torch.empty_like(a, memory_format=torch.contiguous_format))


def _exchanged(x: Tensor, swap: Tensor) -> Tensor:
    """x with its halves exchanged where `swap` is 1.

    By lerp, which is exact at 0 and 1, and a vector instruction: torch.where costs several times as much.
    """
    a, b = x.chunk(2, dim=-1)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    out_a, out_b = out.chunk(2, dim=-1)
    torch.lerp(a, b, swap, out=out_a)
    torch.lerp(b, a, swap, out=out_b)
    return out


def declared_norms(act: nn.Module) -> frozenset[float]:
    """The p-norms in which `act` says that it is 1-Lipschitz; none for a class that does not say."""
    return frozenset(float(p) for p in cast(Any, act.norms)) if _declares(act, "norms") else frozenset()


def declared_slopes(act: nn.Module) -> tuple[float, float] | None:
    """The range of slopes of an `act` that maps feature by feature; None for one that does not say so."""
    slopes = cast(Any, act.slopes) if _declares(act, "slopes") else None
    return None if slopes is None else (float(slopes[0]), float(slopes[1]))


def declared_groups(act: nn.Module, width: int) -> np.ndarray[Any, Any] | None:
    """(groups, size) the features that `act` permutes among themselves in a layer of `width`; None: not known."""
    return act.members(width) if isinstance(act, GroupSort) and _declares(act, "members") else None


def declared_kinks(act: nn.Module, width: int) -> np.ndarray[Any, Any] | None:
    """The kinks of `act` in a layer of `width`, see `PiecewiseLinear`; None: not known."""
    return act.kinks(width) if isinstance(act, PiecewiseLinear) and _declares(act, "kinks") else None


def is_piecewise_linear(act: nn.Module) -> bool:
    """Whether `act` says which linear map it is near a point."""
    return isinstance(act, PiecewiseLinear) and _declares(act, "piece")


def _declares(act: nn.Module, name: str) -> bool:
    """Whether `act` has `name` as a statement about its own `forward`.

    A subclass that replaces `forward` inherits what its base says of another map; that does not count.
    """
    if name in vars(act):
        return True
    for cls in type(act).__mro__:
        if name in vars(cls):
            return True
        if "forward" in vars(cls):
            return False
    return False
