"""The activations of tests: those of a user, with all that may be declared, and those of lipexp."""

import itertools
from fractions import Fraction

import numpy as np
import torch

from lipexp.activations import (
    ALL_NORMS,
    Abs,
    Activation,
    ActiveMap,
    GroupSort,
    Identity,
    LeakyReLU,
    LipschitzSpline,
    NActivation,
    ReLU,
)

RELU = ReLU()


class Bent(Activation):
    """z / 4 below 0 and 3 z / 4 above."""

    norms, slopes = ALL_NORMS, (0.25, 0.75)

    def forward(self, z):
        return torch.where(z > 0, 0.75 * z, 0.25 * z)

    def active_map(self, z):
        if np.any(z == 0):
            return None
        return ActiveMap(np.broadcast_to(np.arange(z.shape[-1]), z.shape), np.where(z > 0, 0.75, 0.25))

    def breakpoints(self, width):
        return np.stack([np.arange(width)[::-1], np.full(width, -1)], axis=1)


class Tuned(Activation):
    """z above 0 and t z below, with a number t between -1 and 1 that each layer learns."""

    norms, slopes = ALL_NORMS, (-1.0, 1.0)
    breakpoints = staticmethod(RELU.breakpoints)

    def n_parameters(self, width):
        return 1

    def within(self, theta, scale):
        return theta.clamp(-1, 1)

    def forward(self, z):
        return torch.where(z > 0, z, self.theta.unsqueeze(1) * z)

    def active_map(self, z):
        if np.any(z == 0):
            return None
        slope = float(self.theta[0, 0])
        return ActiveMap(np.broadcast_to(np.arange(z.shape[-1]), z.shape), np.where(z > 0, 1.0, slope))


class Descending(Activation):
    """Sorts neighbours, the largest first; its breakpoints are listed backwards."""

    norms = ALL_NORMS

    def __init__(self, size=2):
        super().__init__()
        self.size = size

    def forward(self, z):
        return z.unflatten(-1, (-1, self.size)).sort(dim=-1, descending=True).values.flatten(-2)

    def groups(self, width):
        return np.arange(width).reshape(-1, self.size)[:, ::-1]

    def active_map(self, z):
        members = -z.reshape(*z.shape[:-1], -1, self.size)
        order = np.argsort(members, axis=-1)
        members = np.take_along_axis(members, order, axis=-1)
        if np.any(members[..., 1:] == members[..., :-1]):
            return None
        index = order + self.size * np.arange(order.shape[-2])[:, None]
        return ActiveMap(index.reshape(z.shape), np.ones(z.shape, dtype=np.int64))

    def breakpoints(self, width):
        return np.array([pair for g in self.groups(width)[::-1] for pair in itertools.combinations(g[::-1], 2)])


class Handicap(Descending):
    """Sorts neighbours, the largest first, after 1/2 was added to every second feature."""

    norms, size = ALL_NORMS, 2

    def forward(self, z):
        return super().forward(z + torch.tensor([0.0, 0.5], dtype=z.dtype).repeat(z.shape[-1] // 2))

    def active_map(self, z):
        found = super().active_map(
            z + np.tile([0, Fraction(1, 2)] if z.dtype == object else [0, 0.5], z.shape[-1] // 2)
        )
        return found and ActiveMap(found.index, found.factor, np.where(found.index % 2, 0.5, 0.0))

    def breakpoints(self, width):
        return np.arange(width).reshape(-1, 2)

    def thresholds(self, width):
        return np.full(width // 2, 0.5)


class Larger(Activation):
    """Of each pair of neighbours both become the larger one, which is handed on twice."""

    size = 2

    def forward(self, z):
        return z.unflatten(-1, (-1, 2)).amax(dim=-1).repeat_interleave(2, dim=-1)

    def active_map(self, z):
        first, second = z[..., ::2], z[..., 1::2]
        if np.any(first == second):
            return None
        index = 2 * np.arange(first.shape[-1]) + np.where(first > second, 0, 1)
        return ActiveMap(np.repeat(index, 2, axis=-1), np.ones(z.shape, dtype=np.int64))

    def breakpoints(self, width):
        return np.arange(width).reshape(-1, 2)


class Tripled(ReLU):
    """Another map than that of its base, whose declarations therefore say nothing of it."""

    def forward(self, z):
        return 3 * torch.relu(z)


class Unlisted(Activation):
    """Declares its active map, but not where it ends."""

    active_map = staticmethod(RELU.active_map)

    def forward(self, z):
        return torch.relu(z)


ACTS = {
    "relu": RELU,
    "leaky_relu": LeakyReLU(0.1),
    "abs": Abs(),
    "bent": Bent(),
    "tuned": Tuned(),
    "maxmin": GroupSort(),
    "groups of 3": GroupSort(group_size=3),
    "fullsort": GroupSort(n_groups=1),
    "descending pairs": Descending(),
    "descending threes": Descending(3),
}
WITH_OFFSETS = {"n": NActivation(), "spline": LipschitzSpline(3), "handicap": Handicap()}
PIECEWISE = ACTS | {"larger of pairs": Larger(), "identity": Identity()} | WITH_OFFSETS
