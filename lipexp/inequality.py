"""The matrix inequality that bounds the Lipschitz constant of a network in the 2-norm, and its proof.

Take two inputs. All that a network does to their difference is written with free variables y: the difference x_0
of the inputs, and the differences d_i of some scalars inside, each of which an activation changes with slopes in
[alpha, beta]. What it changes is z_i = w_i^T y, with a row w_i on variables before its own, and what the network
returns is C y. As (d_i - alpha z_i)(d_i - beta z_i) <= 0, for any multipliers T_i >= 0 and all y

    |x_0|^2  >=  y^T K y,   K = E_0 + sum_i T_i (u_i v_i^T + v_i u_i^T),   u_i = e_i - alpha w_i,
                                                                           v_i = e_i - beta w_i,

with E_0 the identity on the inputs. So wherever the matrix [[K, C^T], [C, S]] is positive semidefinite, that is
K >= C^T S^-1 C, the outputs satisfy (C y)^T S^-1 (C y) <= |x_0|^2. With S = L^2 I, L is a Lipschitz constant; and
for any S the output r^T f of a vector r has the constant (r^T S r)^(1/2). It holds everywhere, for any biases.

Scalars may share a multiplier: then only the sum of (d_i - alpha z_i)(d_i - beta z_i), times a factor each, needs
to be at most 0. Rows may be rounded, if the error is bounded.

The proof that the matrix is positive semidefinite is a Cholesky factorisation that allows for its own rounding
errors, and for those of the rows.

Shapes: D inputs, N variables, M scalars, P multipliers, C outputs.

Reference: Fazlyab, Robey, Hassani, Morari and Pappas 2019, "Efficient and accurate estimation of Lipschitz
constants for deep neural networks" (arXiv 1906.04893), theorem 2.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lipexp.norms import UNIT_ROUNDOFF, is_semidefinite

Array = npt.NDArray[np.float64]
Slopes = tuple[float, float]


class Rows(NamedTuple):
    """Rows (n, m) on the variables of a slice, as float64 holds them."""

    values: Array
    off: Array  # (m,) bounds on the error of every entry of a column
    on: slice


class Scalars(NamedTuple):
    """Scalars that an activation changes together."""

    rows: Rows  # (n, m) w_i
    own: slice  # the variables d_i
    slopes: Slopes
    multiplier: npt.NDArray[np.intp]  # (n,) which of all it has ...
    factor: Array  # (n,) ... times this, off by a factor of at most 1 +- u


class Inequality(NamedTuple):
    """The increments of one network."""

    n_inputs: int
    scalars: Sequence[Scalars]
    outputs: Rows  # (C, m)

    @property
    def size(self) -> int:
        """N."""
        return self.scalars[-1].own.stop if self.scalars else self.n_inputs

    @property
    def n_multipliers(self) -> int:
        return max((int(each.multiplier.max()) + 1 for each in self.scalars if len(each.factor)), default=0)

    def spread(self, multipliers: Array) -> Iterator[tuple[Scalars, Array]]:
        """Scalars, each time with their T_i (n,), of P multipliers."""
        return ((each, multipliers[each.multiplier] * each.factor) for each in self.scalars)

    def of_difference(self, i: int, j: int) -> Inequality:
        """That of the single output f_i - f_j."""
        values, off, on = self.outputs
        row = values[[i]] - values[[j]]
        off = (2 * off + 2 * UNIT_ROUNDOFF * np.abs(row[0])) * (1 + 2.0**-20)
        return self._replace(outputs=Rows(row, off, on))


def of_layers(weights: Sequence[Array], slopes: Slopes) -> Inequality:
    """That of affine layers with an activation of these slopes, feature by feature, between them.

    Args:
        weights: (out, in) of each layer.
    """
    *hidden, out = weights
    ends = np.cumsum([weights[0].shape[1], *(len(weight) for weight in hidden)])
    blocks = [slice(0, int(ends[0])), *(slice(int(a), int(b)) for a, b in itertools.pairwise(ends))]
    scalars = []
    for weight, on, own in zip(hidden, blocks, blocks[1:], strict=False):
        index = np.arange(own.start - ends[0], own.stop - ends[0])
        rows = Rows(weight, np.zeros(weight.shape[1]), on)
        scalars.append(Scalars(rows, own, slopes, index, np.ones(len(weight))))
    return Inequality(int(ends[0]), scalars, Rows(out, np.zeros(out.shape[1]), blocks[-1]))


def proves(inequality: Inequality, multipliers: Array, bound: Array) -> bool:
    """Whether [[K, C^T], [C, S]] is proven positive semidefinite, for T (P,) and S (C, C) as these very numbers.

    Each entry of K is a sum of at most n + 4 terms, n the number of all scalars whose slopes are not 0 at either
    end, each a product of at most five factors of which some are rounded. In float64 it is off by at most
    gamma_{n+8} B, with B the sum of the terms' absolute values and gamma_k = k u / (1 - k u), by what the errors
    of the rows make of it, and by what underflows. `is_semidefinite` allows for twice the error that it is given,
    which covers the denominator and the rounding of B.

    Reference: Higham 2002, "Accuracy and Stability of Numerical Algorithms", section 3.1.
    """
    if not (np.isfinite(multipliers).all() and np.all(multipliers >= 0) and np.isfinite(bound).all()):
        return False
    with np.errstate(over="ignore", invalid="ignore"):
        matrix, error = bordered(inequality, multipliers, bound)
    return is_semidefinite(matrix, error)


def bordered(inequality: Inequality, multipliers: Array, bound: Array) -> tuple[Array, Array]:
    """[[K, C^T], [C, S]] (N + C, N + C), and bounds on the errors of its entries."""
    size, (values, off, on) = inequality.size, inequality.outputs
    matrix, error = (np.zeros((size + len(values),) * 2) for _ in range(2))
    matrix[:size, :size], error[:size, :size] = inequality_matrix(inequality, multipliers)
    matrix[size:, size:] = bound
    matrix[size:, on], error[size:, on] = values, off
    matrix[on, size:], error[on, size:] = values.T, off[:, None]
    return matrix, error


def inequality_matrix(inequality: Inequality, multipliers: Array) -> tuple[Array, Array]:
    """K (N, N), and bounds on the errors of its entries."""
    matrix, terms, unsure = (np.zeros((inequality.size,) * 2) for _ in range(3))
    diagonal, n = np.ones(inequality.n_inputs), 8
    for (rows, own, (alpha, beta), _, _), t in inequality.spread(multipliers):
        values, off, on = rows
        sizes, between, below = np.abs(values), alpha + beta, 2 * alpha * beta
        diagonal = np.concatenate([diagonal, 2 * t])
        matrix[own, on] = -(between * t)[:, None] * values
        terms[own, on], unsure[own, on] = np.abs(matrix[own, on]), np.outer(abs(between) * t, off)
        for part in (matrix, terms, unsure):
            part[on, own] = part[own, on].T
        if below:
            n += len(t)
            matrix[on, on] += values.T @ ((below * t)[:, None] * values)
            terms[on, on] += sizes.T @ ((abs(below) * t)[:, None] * sizes)
            if off.any():
                part = np.outer(abs(below) * (t @ sizes), off)
                unsure[on, on] += part + part.T + abs(below) * t.sum() * np.outer(off, off)
    for part in (matrix, terms):
        part[np.diag_indices(len(part))] += diagonal
    return matrix, n * (UNIT_ROUNDOFF * terms + 2.0**-900) + (1 + n * UNIT_ROUNDOFF) * unsure
