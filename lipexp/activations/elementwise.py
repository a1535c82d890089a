"""Piecewise linear activations that act feature by feature, with a breakpoint at 0 or none at all."""

from __future__ import annotations

import numpy as np
from torch import Tensor, nn

from lipexp.activations.base import ALL_NORMS, Activation, ActiveMap, Array
from lipexp.config import ConfigError, number


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
        # Products of smaller ones vanish in float32 after a few layers.
        if not 1e-9 <= abs(number("slope", slope)) <= 1 and slope != 0:
            raise ConfigError("slope", slope, "must be a number from -1 to 1, and 0 or at least 1e-9 in size")
        self.slope = float(np.float32(slope))

    @property
    def slopes(self) -> tuple[float, float]:
        return self.slope, 1.0

    def forward(self, z: Tensor) -> Tensor:
        return nn.functional.leaky_relu(z, self.slope)

    def active_map(self, z: Array) -> ActiveMap | None:
        if np.any(z == 0):
            return None
        index = np.broadcast_to(np.arange(z.shape[-1]), z.shape)
        return ActiveMap(index, np.where(z > 0, 1.0, self.slope))

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


class Identity(Activation):
    """x: one affine layer after another, which is linear. It is 1-Lipschitz in every p-norm."""

    norms, slopes = ALL_NORMS, (1.0, 1.0)

    def forward(self, z: Tensor) -> Tensor:
        return z

    def active_map(self, z: Array) -> ActiveMap:
        index = np.broadcast_to(np.arange(z.shape[-1]), z.shape)
        return ActiveMap(index, np.ones(z.shape))

    def breakpoints(self, width: int) -> Array:
        return np.empty((0, 2), dtype=np.int64)
