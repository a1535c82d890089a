"""An upper bound that follows the gradient of every feature through the layers."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lipexp.activations import Activation
from lipexp.networks import BakedNetwork
from lipexp.norms import UNIT_ROUNDOFF

Floats = npt.NDArray[np.float64]


def why_not_applicable(network: BakedNetwork) -> str | None:
    """Why the bound does not hold for this network; None if it does."""
    act = network.act
    if act.slopes is None and any(act.groups(width) is None for width in network.hidden_widths):
        return f"{act.label} neither declares slopes nor sorts"
    return None if network.n_outputs == 1 else "is for one output"


def bound(network: BakedNetwork, q: float) -> float:
    """u_n of u_1 = ||rows of W_1||_q, u_i = |W_i| m(u_{i-1}), rounded up: at least ||grad f||_q everywhere.

    It is not finite where numbers overflow float64.

    u_i bounds the gradients of the features behind layer i, by the triangle inequality. Slopes in [alpha, beta]
    multiply the bound of a feature by at most m = max(|alpha|, |beta|); of features that are sorted together each
    may take the place of another, so m takes the largest of their bounds. In the chain p -> inf -> ... -> inf,
    with slopes of at most 1, this is never above the product of the norms, as |W| u <= ||W||_inf max(u).

    Args:
        network: K = 1, one output; `why_not_applicable` must be None.
    """
    size = np.zeros(0)
    for i, layer in enumerate(network.layers):
        weight = np.abs(layer.weight[0].numpy().astype(np.float64))
        before = _activated(size, network.act) if i > 0 else np.ones(weight.shape[1])
        with np.errstate(over="ignore", invalid="ignore"):
            size = weight @ before if i > 0 else np.linalg.norm(weight, q, axis=1)
        # A sum of n terms that are not negative, or the root of one, is off by a factor of 1 +- (n + 2) u, and the
        # product with a slope by one more; n products may underflow.
        counts = (weight > 0) @ (before > 0).astype(np.float64)
        size = size * (1 + 2 * (weight.shape[1] + 6) * UNIT_ROUNDOFF) + counts * 2.0**-1073
    return float(size.max())


def _activated(size: Floats, act: Activation) -> Floats:
    """The bounds of the features behind an activation, from those in front of it."""
    groups = act.groups(len(size))
    if act.slopes is not None:
        factor = max(abs(slope) for slope in act.slopes)
        return size * factor + 2.0**-1074 * (size > 0) * (factor > 0)
    assert groups is not None
    largest = np.empty_like(size)
    largest[groups] = size[groups].max(axis=1, keepdims=True)
    return largest
