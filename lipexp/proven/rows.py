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
    for width, act in network.placed:
        if act.slopes is None and act.groups(width) is None:
            return f"{act.label} neither declares slopes nor sorts"
    return None


def bound(network: BakedNetwork, q: float, h: float) -> float:
    """||u_n||_h of u_1 = ||rows of W_1||_q, u_i = |W_i| m(u_{i-1}), rounded up: at least the norm of the Jacobian.

    It is not finite where numbers overflow float64.

    u_i bounds the gradients of the features behind layer i, by the triangle inequality. Slopes in [alpha, beta]
    multiply the bound of a feature by at most m = max(|alpha|, |beta|); of features that are sorted together each
    may take the place of another, so m takes the largest of their bounds. In the chain p -> inf -> ... -> inf,
    with slopes of at most 1, this is never above the product of the norms, as |W| u <= ||W||_inf max(u). With
    several outputs, |J v|_i <= u_i ||v||_p for every v, so that ||J||_{p -> h} <= ||u_n||_h.

    Args:
        network: K = 1; `why_not_applicable` must be None.
        h: the norm of the outputs.
    """
    size = through(network.layers[-1].weight[0].double().numpy(), before_last(network, q), q)
    if len(size) == 1 or np.isinf(h):
        return float(size.max())
    with np.errstate(over="ignore"):
        # Squares may underflow, and a norm of n numbers is off by a factor of 1 +- (n + 2) u.
        longest = np.linalg.norm(size, h) + 2.0**-500 * len(size) * bool(size.any())
    return float(longest * (1 + 2 * (len(size) + 4) * UNIT_ROUNDOFF))


def before_last(network: BakedNetwork, q: float | None) -> Floats | None:
    """Bounds (H,) on the q-norms of the gradients of what the last layer is given; None where that is the input.

    Args:
        q: None: bounds (H, D) on the derivatives by each coordinate instead.
    """
    size = None
    for layer, act in zip(network.layers[:-1], network.acts, strict=False):
        size = _activated(through(layer.weight[0].double().numpy(), size, q), act)
    return size


def through(weight: Floats, before: Floats | None, q: float | None) -> Floats:
    """The bounds of the features W x behind a layer, rounded up, from those of x; None: x is the input.

    Args:
        weight: W (out, in), each entry off by a factor of at most 1 +- u.
        q: see `before_last`.
    """
    weight = np.abs(weight)
    with np.errstate(over="ignore", invalid="ignore"):
        if before is None:
            size = weight if q is None else np.linalg.norm(weight, q, axis=1)
            terms = np.zeros_like(size)
        else:
            size, terms = weight @ before, (weight > 0) @ (before > 0).astype(np.float64)
    # A sum of n terms that are not negative, or the root of one, is off by a factor of 1 +- (n + 2) u, and the
    # product with a slope by one more; n products may underflow.
    return size * (1 + 2 * (weight.shape[1] + 6) * UNIT_ROUNDOFF) + terms * 2.0**-1073


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
