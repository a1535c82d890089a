"""Active maps at exact numbers, also where features lie on a breakpoint in a whole neighbourhood.

Shapes: H features, M breakpoints.
"""

from __future__ import annotations

import numpy as np

from lipexp.activations.base import Activation, ActiveMap
from lipexp.exact import Exact, ExactArray, add, break_ties, finer, integers, rational


def exact_map(act: Activation, z: Exact) -> ActiveMap | None:
    """The active map of features z (H,); None at a breakpoint."""
    return act.active_map(asked(act, z))


def asked(act: Activation, z: Exact, one: int = 1) -> ExactArray:
    """Features z / one, for a positive integer, as `active_map` takes them: in any unit, if that may be."""
    return z[0] if act.is_homogeneous else rational(z, one)


def untied(act: Activation, z: Exact, one: int = 1) -> ExactArray:
    """Features z / one, moved by so little that each lies on no breakpoint, and crosses none.

    Where some lie on a breakpoint in a whole neighbourhood, either side of it has the same map.
    """
    thresholds = act.thresholds(len(z[0]))
    if thresholds is not None:
        z = finer(z, integers(thresholds)[1])
    return asked(act, break_ties(z), one)


def untied_map(act: Activation, z: Exact) -> ActiveMap | None:
    """As `exact_map`, for points where some features lie on a breakpoint in a whole neighbourhood.

    Such ties are no breakpoints: either side gives the same gradient. Training produces them, and no point avoids
    them. They show in the affine maps of the features near the point: the rows of z (H, 1 + D) are value and
    gradient.
    """
    breakpoints, thresholds = act.breakpoints(len(z[0])), act.thresholds(len(z[0]))
    if breakpoints is None:
        return None
    with_zero = np.concatenate([z[0], 0 * z[0][:1]])  # a zero row at index -1
    first, second = breakpoints.T
    gaps = with_zero[first, 0] - with_zero[second, 0]
    if thresholds is not None:
        distances, exponent = integers(thresholds)
        gaps, _ = add((gaps, z[1]), (-distances, exponent))
    ties = np.flatnonzero(gaps == 0)
    if (with_zero[first[ties], 1:] != with_zero[second[ties], 1:]).any():
        return None
    return act.active_map(untied(act, (z[0][:, 0], z[1])))
