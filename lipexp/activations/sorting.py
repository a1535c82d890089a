"""GroupSort: features sorted within groups."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lipexp.activations.base import ALL_NORMS, Activation, ActiveMap, Array
from lipexp.config import ConfigError, whole


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
