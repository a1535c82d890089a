"""Smooth activations, feature by feature: torch's functions, with slopes between 0 and 1.

They are 1-Lipschitz in every p-norm. Having no linear regions, they are measured in float64, as an estimate.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from lipexp.activations.base import ALL_NORMS, Activation


class Tanh(Activation):
    """tanh(x), between -1 and 1: its slope 1 - tanh(x)^2 is 1 at 0 alone, and falls to 0 on both sides."""

    norms, slopes = ALL_NORMS, (0.0, 1.0)

    def forward(self, z: Tensor) -> Tensor:
        return torch.tanh(z)

    def onnx(self, add: Callable[..., str], z: str, theta: str) -> str:
        return add("Tanh", z)


class Sigmoid(Activation):
    """4 / (1 + exp(-x)), between 0 and 4: its slope is largest at 0, where the factor of 4 makes it 1."""

    norms, slopes = ALL_NORMS, (0.0, 1.0)

    def forward(self, z: Tensor) -> Tensor:
        return 4 * torch.sigmoid(z)

    def onnx(self, add: Callable[..., str], z: str, theta: str) -> str:
        return add("Mul", add("Sigmoid", z), np.float32(4))


class Softplus(Activation):
    """log(1 + exp(x)), ReLU without its corner: the slope 1 / (1 + exp(-x)) rises from 0 to 1.

    Reference: Dugas, Bengio, Belisle, Nadeau and Garcia 2001, "Incorporating second-order functional knowledge for
    better option pricing".
    """

    norms, slopes = ALL_NORMS, (0.0, 1.0)

    def forward(self, z: Tensor) -> Tensor:
        # Above its threshold torch returns x, which at the default of 20 is off by 2e-9, too much for float64.
        return nn.functional.softplus(z, threshold=40)

    def onnx(self, add: Callable[..., str], z: str, theta: str) -> str:
        return add("Softplus", z)


class ELU(Activation):
    """x above 0 and exp(x) - 1 below: the slope min(1, exp(x)).

    Reference: Clevert, Unterthiner and Hochreiter 2016, "Fast and accurate deep network learning by exponential
    linear units (ELUs)" (arXiv 1511.07289), with alpha = 1.
    """

    norms, slopes = ALL_NORMS, (0.0, 1.0)

    def forward(self, z: Tensor) -> Tensor:
        return nn.functional.elu(z)

    def onnx(self, add: Callable[..., str], z: str, theta: str) -> str:
        return add("Elu", z)
