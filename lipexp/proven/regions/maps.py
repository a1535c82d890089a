"""The affine maps of many regions onto the features of a layer, with bounds on their rounding errors.

Shapes: P regions, H features. A map has three columns: the gradient in x and in y, and the constant.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from lipexp.activations import ActiveMap
from lipexp.norms import UNIT_ROUNDOFF, spectral_norm_bound
from lipexp.proven.regions.polygons import SAFETY, TINY, Floats, Integers


class TooLarge(Exception):
    """Numbers of the network, or bounds on their errors, overflow float64."""


@dataclass
class Maps:
    """The affine maps of P regions onto H features: value[r, c, h], c = 0, 1 the gradient, 2 the constant.

    Scalars for each region and c: the entries are off by at most `error` and at most `size` large, in the inf-norm
    over the H features; `error_2` and `size_2` are the same in the 2-norm. A layer multiplies an error by its own
    norm, and a layer of spectral norm 1 may have row sums of sqrt(H). If errors were followed in the inf-norm
    alone, those of deep networks would grow until every side of a breakpoint had to be decided in integers.
    """

    value: Floats  # (P, 3, H)
    error: Floats  # (P, 3)
    error_2: Floats  # (P, 3)

    @cached_property
    def size(self) -> Floats:
        """(P, 3)"""
        return np.abs(self.value).max(axis=2)

    @cached_property
    def size_2(self) -> Floats:
        """(P, 3), rounded up; the squares of numbers below 2^-500 may vanish, and others overflow."""
        with np.errstate(over="ignore"):
            small = math.sqrt(self.value.shape[2]) * 2.0**-500 * (self.size > 0)
            return SAFETY * (np.linalg.norm(self.value, axis=2) + small)

    @classmethod
    def identity(cls, n: int, dims: int) -> Maps:
        """The inputs themselves as two features, for n regions; in one dimension the second feature is zero."""
        value = np.zeros((n, 3, 2))
        value[:, 0, 0] = 1.0
        value[:, 1, 1] = 1.0 if dims == 2 else 0.0
        return cls(value, np.zeros((n, 3)), np.zeros((n, 3)))

    def take(self, regions: Integers) -> Maps:
        return Maps(self.value[regions], self.error[regions], self.error_2[regions])

    def affine(self, weight: npt.NDArray[np.float32], bias: npt.NDArray[np.float32]) -> Maps:
        """The maps behind an affine layer, W (out, H) and b (out,).

        Raises:
            TooLarge: float64 does not hold the numbers.

        Reference for the rounding errors: Higham 2002, "Accuracy and stability of numerical algorithms", (3.5).
        """
        n_out, n_in = weight.shape
        gamma = SAFETY * (n_in + 2) * UNIT_ROUNDOFF
        matrix, offset = weight.astype(np.float64), bias.astype(np.float64)
        rows, spectral = float(np.abs(matrix).sum(axis=1).max()), spectral_norm_bound(weight)
        with np.errstate(over="ignore", invalid="ignore"):
            value = self.value @ matrix.T
            value[:, 2] += offset
            # A feature is off by |W| |error| + gamma (|W| |size| + |b|), and || |W| ||_2 <= ||W||_F.
            error = rows * (self.error + gamma * (self.size + self.error))
            error[:, 2] += gamma * float(np.abs(offset).max())
            frobenius = SAFETY * float(np.linalg.norm(matrix))
            error_2 = spectral * self.error_2 + gamma * frobenius * (self.size_2 + self.error_2)
            error_2[:, 2] += gamma * SAFETY * float(np.linalg.norm(offset))
        # Products of zeros are exact; all others may underflow.
        underflow = TINY * n_in * (self.size + self.error > 0)
        return _checked(value, SAFETY * error + underflow, SAFETY * error_2 + n_out * underflow)

    def plus(self, linear: Floats) -> Maps:
        """The maps of f(x) + A x, with A (H, D)."""
        value = self.value.copy()
        value[:, : linear.shape[1]] += linear.T
        rounding = UNIT_ROUNDOFF * np.abs(value)
        error = SAFETY * (self.error + rounding.max(axis=2))
        return _checked(value, error, SAFETY * (self.error_2 + rounding.sum(axis=2)))

    def activated(self, parent: Integers, active: ActiveMap) -> Maps:
        """The maps behind an activation, for parts of the regions.

        Args:
            parent: (P',) the region of this object that each part lies in.
            active: the activation's affine map on each part, with numbers (P', H).
        """
        index, scale = active.index, active.factor
        width = index.shape[1]
        rows = 3 * parent[:, None] + np.arange(3)  # (P', 3) of `value` as a matrix of H columns
        places_before = self.value.shape[2] * rows[:, :, None] + index[:, None, :]
        value = self.value.reshape(-1).take(places_before)
        if (scale != 1).any():  # sorting only moves features
            value *= scale[:, None, :]
        most = np.abs(scale).max(axis=1, keepdims=True)
        underflow = TINY * ((self.size[parent] > 0) & (most > 0))
        error = SAFETY * most * (self.error[parent] + UNIT_ROUNDOFF * self.size[parent]) + underflow
        # An activation may copy a feature to several places.
        places = (index + width * np.arange(len(index))[:, None]).ravel()
        copies = math.sqrt(np.bincount(places).max(initial=1))
        with np.errstate(over="ignore", invalid="ignore"):
            error_2 = self.error_2[parent] + UNIT_ROUNDOFF * self.size_2[parent]
            error_2 = SAFETY * copies * most * error_2 + width * underflow
        if active.offset is not None:
            value[:, 2] += active.offset
            rounding = UNIT_ROUNDOFF * np.abs(value[:, 2])
            error[:, 2] = SAFETY * (error[:, 2] + rounding.max(axis=1))
            error_2[:, 2] = SAFETY * (error_2[:, 2] + rounding.sum(axis=1))
        return _checked(value, error, error_2)


def _checked(value: Floats, error: Floats, error_2: Floats) -> Maps:
    """Maps whose two error bounds are tightened by each other: ||.||_inf <= ||.||_2 <= sqrt(H) ||.||_inf.

    Where squares overflow, `error_2` is not finite and only the inf-norm is used.
    """
    error = np.fmin(error, error_2)
    error_2 = np.fmin(error_2, SAFETY * math.sqrt(value.shape[2]) * error)
    if not (np.isfinite(value).all() and np.isfinite(error).all()):
        raise TooLarge
    return Maps(value, error, error_2)
