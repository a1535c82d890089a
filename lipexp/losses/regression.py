"""Losses for regression: functions of the error f - y, the mean over the targets."""

from __future__ import annotations

import torch
from torch import Tensor

from lipexp.config import number
from lipexp.losses.base import Scaled, column, over_targets


class MSE(Scaled):
    """(f - y)^2 / (L max(1, L)), the mean over the targets; the metric `mse` is not divided.

    Its derivative by a parameter is of the size |f - y| L / (L max(1, L)). For targets of a size of about 1,
    |f - y| has the size max(1, L) before training, so this is about 1.
    """

    task = "regression"

    def forward(self, f: Tensor, y: Tensor) -> Tensor:
        lipschitz = torch.as_tensor(column(self.lipschitz, f), dtype=f.dtype, device=f.device)
        # The square of f alone may overflow.
        return over_targets(((f - y) / (lipschitz.sqrt() * lipschitz.clamp_min(1).sqrt())).square())


class MAE(Scaled):
    """|f - y| / L, the mean over the targets. Its derivative by f is 1 / L in size, however large the error is."""

    task = "regression"

    def forward(self, f: Tensor, y: Tensor) -> Tensor:
        return over_targets((f - y).abs() / column(self.lipschitz, f))


class Huber(Scaled):
    """H(f - y) / (L min(delta, max(1, L))), the mean over the targets, with H(e) = e^2 / 2 up to |e| = delta.

    Beyond, H(e) = delta (|e| - delta / 2) goes on in a straight line, so a few targets that are far off do not
    outweigh all others. The derivative of H is at most delta in size, and of the size max(1, L) or less before
    training, as for `MSE`: hence the divisor. A large delta makes it half of `MSE`, a small one makes it `MAE`.

    Args:
        delta: the error from which on it is straight, in the units of the target.
        lipschitz: L.

    Reference: Huber 1964, "Robust estimation of a location parameter".
    """

    task = "regression"
    per_run = ("delta", "lipschitz")

    def __init__(self, delta: float = 1.0, lipschitz: float = 1.0) -> None:
        super().__init__(lipschitz)
        self.delta = number("delta", delta, above=0)

    def forward(self, f: Tensor, y: Tensor) -> Tensor:
        delta, lipschitz = (
            torch.as_tensor(column(value, f), dtype=f.dtype, device=f.device)
            for value in (self.delta, self.lipschitz)
        )
        error = (f - y).abs()
        bent = torch.minimum(error, delta)
        # H(e) = bent (|e| - bent / 2), which may overflow before it is divided.
        scaled = bent / torch.minimum(delta, lipschitz.clamp_min(1)) * ((error - bent / 2) / lipschitz)
        return over_targets(scaled)
