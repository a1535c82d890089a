"""Activations that only networks from elsewhere have: lipexp trains with none of them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lipexp.activations.base import ALL_NORMS, Activation, ActiveMap, Array
from lipexp.config import ConfigError


class PReLU(Activation):
    """x above 0 and slope_i x below, for feature i: torch's and ONNX's PReLU, and LeakyReLU with any slope.

    It is 1-Lipschitz in every p-norm if no slope is larger than 1 in size.

    Args:
        below: (H,) the slopes below 0, in float32.
    """

    def __init__(self, below: Array) -> None:
        super().__init__()
        self.below = np.asarray(below, dtype=np.float32)
        self.norms = ALL_NORMS if np.abs(self.below).max() <= 1 else frozenset()

    @property
    def slopes(self) -> tuple[float, float]:
        return min(1.0, float(self.below.min())), max(1.0, float(self.below.max()))

    def forward(self, z: Tensor) -> Tensor:
        return torch.where(z > 0, z, z * torch.from_numpy(self.below).to(z))

    def active_map(self, z: Array) -> ActiveMap | None:
        if np.any(z == 0):
            return None
        index = np.broadcast_to(np.arange(z.shape[-1]), z.shape)
        return ActiveMap(index, np.where(z > 0, 1.0, self.below.astype(np.float64)))

    def breakpoints(self, width: int) -> Array:
        return np.stack([np.arange(width), np.full(width, -1)], axis=1)

    def check_width(self, width: int) -> None:
        if len(self.below) != width:
            raise ConfigError("act", self.label, f"has {len(self.below)} slopes for {width} features")

    def extra_repr(self) -> str:
        return f"below={self.below.tolist()}"


class Clip(Activation):
    """min(max(x, low), high), as ReLU6 with the limits 0 and 6, and Hardtanh: its slopes are 0 and 1.

    Raises:
        ConfigError: the limits are no finite numbers, or low is not below high.
    """

    norms, slopes = ALL_NORMS, (0.0, 1.0)

    def __init__(self, low: float = -1.0, high: float = 1.0) -> None:
        super().__init__()
        self.low, self.high = float(low), float(high)
        if not (np.isfinite([low, high]).all() and low < high):
            raise ConfigError("act", self.label, f"needs two limits low < high, not {low} and {high}")

    def forward(self, z: Tensor) -> Tensor:
        return z.clamp(self.low, self.high)

    def active_map(self, z: Array) -> ActiveMap | None:
        if np.any(z == self.low) or np.any(z == self.high):
            return None
        index = np.broadcast_to(np.arange(z.shape[-1]), z.shape)
        below, above = (z < self.low).astype(bool), (z > self.high).astype(bool)
        offset = np.where(below, self.low, np.where(above, self.high, 0.0))
        return ActiveMap(index, np.where(below | above, 0.0, 1.0), offset)

    def breakpoints(self, width: int) -> Array:
        features = np.repeat(np.arange(width), 2)
        return np.stack([features, np.full_like(features, -1)], axis=1)

    def thresholds(self, width: int) -> Array:
        return np.tile([self.low, self.high], width)

    def extra_repr(self) -> str:
        return f"low={self.low}, high={self.high}"
