"""What an activation does to differences of features: part of them it hands on, of the rest it bounds the change.

For two inputs of an activation let z be their difference, and x that of what becomes of them. Then

    x = B z + C d,   with scalars d_i whose slopes in (A z)_i are in [alpha, beta].

- Feature by feature: A = C = I, B = 0, with the slopes that are declared; and B = alpha I, with no scalars, where
  both slopes are the same.
- Sorting within groups of g features keeps the sum of a group, so that its mean is handed on: B is the mean over
  the group. With h_j = (1, ..., 1, -j, 0, ..., 0), of j ones, for j = 1, ..., g - 1, which are orthogonal to each
  other and to the mean, the scalars are d_j = h_j . x, and C has the columns h_j / (j (j + 1)). Sorting does not
  increase the distance within a group: sum_j (d_j^2 - (h_j . z)^2) / (j (j + 1)) <= 0, slopes of [-1, 1] for all
  g - 1 together, with the factors 1 / (j (j + 1)). For MaxMin, d = x_1 - x_2 with x_1 - x_2 = +-(z_1 - z_2). To
  solve for the mean is at least as tight as multipliers for the equality of the sums.
- `Householder`: with the normal n of a pair, z - n (n . z) stays, and d = n . x = |n . z| or its negative.

Shapes: H features, M scalars.

Reference: Pauli, Havens, Araujo, Garg, Khorrami, Allgöwer and Hu 2024, "Novel quadratic constraints for extending
LipSDP beyond slope-restricted activations" (arXiv 2401.14033), whose inequalities for sorting these are.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lipexp.activations import Activation, Householder
from lipexp.inequality import Array, Slopes
from lipexp.norms import UNIT_ROUNDOFF

SINE = 2.0**-50  # what is assumed of the errors of float64's sines and cosines


class Split(NamedTuple):
    """An activation of one layer."""

    slopes: Slopes
    multiplier: npt.NDArray[np.intp]  # (M,) which of the layer's a scalar has ...
    factor: Array  # (M,) ... times this
    features: npt.NDArray[np.intp] | None = None  # (M,) the scalars, where it acts feature by feature
    linear: float = 0.0  # B = linear I, where it does
    a: Array = np.empty((0, 0))  # (M, H), else
    b: Array = np.empty((0, 0))  # (H, H)
    c: Array = np.empty((0, 0))  # (H, M)
    off: float = 0.0  # a bound on the error of each entry of a, b and c that is not 0


def why_none(act: Activation, width: int) -> str | None:
    """Why nothing is known of the increments of this activation; None if they are."""
    if act.slopes is not None or isinstance(act, Householder):
        return None
    groups = act.groups(width)
    if groups is not None and np.array_equal(np.sort(groups, axis=None), np.arange(width)):
        return None
    return f"{act.label} neither declares slopes nor sorts"


def split(act: Activation, weight: Array) -> Split:
    """What the activation does to the features W x.

    Scalars that are 0 whatever x is, of a row of zeros or of a group of equal rows, are left out.

    Args:
        weight: W (H, in).
    """
    width = len(weight)
    if act.slopes is not None:
        return _by_feature((float(act.slopes[0]), float(act.slopes[1])), weight)
    if isinstance(act, Householder):
        return _reflecting(act.theta[0].double().numpy(), width)
    groups = act.groups(width)
    assert groups is not None
    b, size = np.zeros((width, width)), groups.shape[1]
    b[groups[:, :, None], groups[:, None, :]] = 1 / size
    groups = groups[(weight[groups] != weight[groups[:, :1]]).any(axis=(1, 2))]
    index = np.repeat(np.arange(len(groups)), size - 1)
    j = np.tile(np.arange(1, size), len(groups))
    a = np.zeros((len(index), width))
    places = np.arange(len(index))
    for k, members in enumerate(groups[index].T):  # the member k of the group of each scalar
        a[places, members] = np.where(k < j, 1.0, np.where(k == j, -j, 0.0))
    factor = 1 / (j * (j + 1.0))
    off = 0.0 if size == 2 else UNIT_ROUNDOFF
    return Split((-1.0, 1.0), index, factor, a=a, b=b, c=a.T * factor, off=off)


def _by_feature(slopes: Slopes, weight: Array) -> Split:
    equal = slopes[0] == slopes[1]
    alive = np.arange(0) if equal else np.flatnonzero(weight.any(axis=1))
    places, factor = np.arange(len(alive)), np.ones(len(alive))
    return Split(slopes, places, factor, features=alive, linear=slopes[0] if equal else 0.0)


def _reflecting(theta: Array, width: int) -> Split:
    n = np.stack([-np.sin(theta / 2), np.cos(theta / 2)])  # (2, H / 2), of the features j and j + H / 2
    pairs = np.arange(len(theta))
    a, b = np.zeros((len(theta), width)), np.eye(width)
    for k in range(2):
        a[pairs, pairs + k * len(theta)] = n[k]
    b -= a.T @ a
    return Split((-1.0, 1.0), pairs, np.ones(len(theta)), a=a, b=b, c=a.T.copy(), off=8 * SINE)
