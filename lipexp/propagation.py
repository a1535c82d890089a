"""An upper bound that follows the gradient of every feature through the layers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from torch import nn

from lipexp.activations import declared_groups, declared_slopes
from lipexp.certificates import UNIT_ROUNDOFF
from lipexp.models import Layer

Floats = npt.NDArray[np.float64]


def refusal(layers: Sequence[Layer], act: nn.Module) -> str | None:
    """Why the bound does not hold for this network; None if it does."""
    if declared_slopes(act) is None and declared_groups(act, layers[0].weight.shape[1]) is None:
        return f"{type(act).__name__} neither declares slopes nor sorts"
    return None if layers[-1].weight.shape[1] == 1 else "is for one output"


def bound(layers: Sequence[Layer], act: nn.Module, q: float) -> float:
    """u_n of u_1 = ||rows of W_1||_q, u_i = |W_i| m(u_{i-1}), rounded up: at least ||grad f||_q everywhere.

    It is not finite where numbers overflow float64.

    u_i bounds the gradients of the features behind layer i, by the triangle inequality. Slopes in [alpha, beta]
    multiply the bound of a feature by at most m = max(|alpha|, |beta|); of features that are sorted together each
    may take the place of another, and m takes the largest of their bounds. In the chain p -> inf -> ... -> inf,
    with slopes of at most 1, this is never above the product of the norms, as |W| u <= ||W||_inf max(u).

    Args:
        layers: one baked network of one output, K = 1; `refusal` must be None.
    """
    size = np.zeros(0)
    for i, layer in enumerate(layers):
        weight = np.abs(layer.weight[0].numpy().astype(np.float64))
        before = _behind(size, act) if i > 0 else np.ones(weight.shape[1])
        with np.errstate(over="ignore", invalid="ignore"):
            size = weight @ before if i > 0 else np.linalg.norm(weight, q, axis=1)
        # A sum of n terms that are not negative, or the root of one, is off by a factor of 1 +- (n + 2) u, the
        # slope's product by another; n products may underflow.
        counts = (weight > 0) @ (before > 0).astype(np.float64)
        size = size * (1 + 2 * (weight.shape[1] + 6) * UNIT_ROUNDOFF) + counts * 2.0**-1073
    return float(size.max())


def _behind(size: Floats, act: nn.Module) -> Floats:
    """The bounds of the features behind an activation, from those in front of it."""
    slopes, groups = declared_slopes(act), declared_groups(act, len(size))
    if slopes is not None:
        factor = max(abs(slope) for slope in slopes)
        return size * factor + 2.0**-1074 * (size > 0) * (factor > 0)
    assert groups is not None
    largest = np.empty_like(size)
    largest[groups] = size[groups].max(axis=1, keepdims=True)
    return largest
