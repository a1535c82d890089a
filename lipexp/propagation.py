"""An upper bound that follows the gradient of every feature through the layers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from torch import nn

from lipexp.activations import PiecewiseLinear, is_piecewise_linear
from lipexp.certificates import UNIT_ROUNDOFF
from lipexp.models import Layer

Floats = npt.NDArray[np.float64]


def refusal(layers: Sequence[Layer], act: nn.Module) -> str | None:
    """Why the bound does not hold for this network; None if it does."""
    if not (isinstance(act, PiecewiseLinear) and is_piecewise_linear(act)):
        return f"{type(act).__name__} does not name its linear pieces"
    if act.kinks(layers[0].weight.shape[1]) is None:
        return f"{type(act).__name__} does not name its kinks"
    return None if layers[-1].weight.shape[1] == 1 else "is for one output"


def bound(layers: Sequence[Layer], act: PiecewiseLinear, q: float) -> float:
    """u_n of u_1 = ||rows of W_1||_q, u_i = |W_i| m(u_{i-1}), rounded up: at least ||grad f||_q everywhere.

    u_i bounds the gradients of the features behind layer i, by the triangle inequality. The activation has slopes
    of at most 1, so it keeps the bound of a feature; of features with a kink between them each may take the place
    of the other, and m takes the larger bound. In the chain p -> inf -> ... -> inf this is never above the product
    of the norms, as |W| u <= ||W||_inf max(u).

    Args:
        layers: one baked network of one output, K = 1; `refusal` must be None.
    """
    size = np.zeros(0)
    for i, layer in enumerate(layers):
        weight = np.abs(layer.weight[0].numpy().astype(np.float64))
        size = np.linalg.norm(weight, q, axis=1) if i == 0 else weight @ _largest_of_kin(size, act)
        # A sum of n terms that are not negative, or the root of one, is off by a factor of 1 +- (n + 2) u.
        size = size * (1 + 2 * (weight.shape[1] + 4) * UNIT_ROUNDOFF) + 2.0**-1000 * (size > 0)
    return float(size.max())


def _largest_of_kin(size: Floats, act: PiecewiseLinear) -> Floats:
    """The largest bound among each feature and those with which it may change places."""
    pairs = act.kinks(len(size))
    assert pairs is not None
    first, second = pairs[pairs[:, 1] >= 0].T
    largest = size.copy()
    np.maximum.at(largest, first, size[second])
    np.maximum.at(largest, second, size[first])
    return largest
