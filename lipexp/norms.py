"""Norms: their names and duals, and proven upper bounds on the norms of one matrix.

Every bound is a float64 that is at least the exact value for the real numbers that float32 weights stand for: sums
and products are exact or rounded up, and the spectral norm is proven by a Cholesky factorisation that allows for
its own rounding errors. No tolerance is involved. Weights are numpy arrays (out, in) in float32; float64 holds
each of them, and each product of two, exactly.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.floating[Any]]

UNIT_ROUNDOFF = 2.0**-53


def dual(p: float) -> float:
    """q with 1/p + 1/q = 1, for p in 1, 2, inf."""
    return {1.0: math.inf, 2.0: 2.0, math.inf: 1.0}[p]


def norm_name(p: float) -> int | str:
    """How a norm is written in JSON and CSV: 1, 2 or "inf"."""
    return "inf" if math.isinf(p) else int(p)


def round_up(value: Fraction) -> float:
    """The smallest float64 that is at least `value`; inf beyond the largest."""
    try:
        nearest = float(value)
    except OverflowError:
        return math.inf
    return nearest if Fraction(nearest) >= value else math.nextafter(nearest, math.inf)


def round_down(value: Fraction) -> float:
    """The largest float64 that is at most the non-negative `value`."""
    try:
        nearest = float(value)
    except OverflowError:
        return math.nextafter(math.inf, 0)
    return nearest if Fraction(nearest) <= value else math.nextafter(nearest, 0)


def row_norm_bound(weight: FloatArray, q: float) -> float:
    """The operator norm p -> inf of `weight`, rounded up: max over rows of ||w||_q, with 1/p + 1/q = 1.

    Args:
        weight: (out, in), float32.
        q: 1, 2 or inf.
    """
    if float(np.float32(2.0**-149)) == 0:
        raise ArithmeticError("this process flushes small floats to zero, so that nothing can be proven")
    entries = np.abs(weight).astype(np.float64)
    if math.isinf(q):
        return float(entries.max())
    terms = entries if q == 1 else entries * entries
    sums = terms.sum(axis=1)
    # A float64 sum of n terms is off by a factor of at most 1 +- n u, so only these rows can be the largest.
    slack = 1 - 4 * terms.shape[1] * UNIT_ROUNDOFF
    largest = max(_sum_up(terms[row]) for row in np.flatnonzero(sums >= sums.max() * slack))
    return largest if q == 1 else root_up(Fraction(largest))


def spectral_norm_bound(weight: FloatArray) -> float:
    """A proven upper bound on the largest singular value of `weight` (out, in), some 1e-12 above it.

    s is proven when the Cholesky factorisation of s^2 I - W W^T - c I succeeds in float64, with a shift c that
    covers the rounding errors of the product and of the factorisation.

    Reference: Rump 2006, "Verification of positive definiteness", BIT 46, theorem 2.3.
    """
    matrix = weight.astype(np.float64)
    if matrix.shape[0] > matrix.shape[1]:
        matrix = matrix.T
    if matrix.shape[0] == 1:
        return row_norm_bound(matrix, 2)  # one row: the two norms are the same
    gram = matrix @ matrix.T
    estimate = math.sqrt(max(0.0, np.linalg.eigvalsh(gram)[-1]))
    frobenius = np.linalg.norm(matrix)  # an upper bound anyway, so nothing above it needs to be tried
    excess = cholesky_shift(matrix.shape)
    while excess < 1 and estimate * (1 + excess) < frobenius:
        candidate = estimate * (1 + excess)
        if _proves(candidate, gram, matrix.shape):
            return candidate
        excess *= 4
    return row_norm_bound(weight.reshape(1, -1), 2)


def operator_norm_bound(weight: FloatArray, p: float, h: float) -> float:
    """A proven upper bound on the operator norm p -> h of `weight` (out, in), the largest ||W x||_h / ||x||_p.

    | p -> h             | what it is                                                                         |
    |--------------------|------------------------------------------------------------------------------------|
    | p -> inf, 1 -> h   | the norm itself: the largest q-norm of a row, or the largest h-norm of a column    |
    | 2 -> 2             | the largest singular value                                                         |
    | inf -> 2, 2 -> 1   | hard to compute: the smaller of the singular value times sqrt(in), or sqrt(out),   |
    |                    | and the 2-norm of all 1-norms of rows, or of columns                               |
    | inf -> 1           | hard to compute: the sum of all sizes                                              |

    Reference: Tropp 2004, "Topics in sparse approximation", section 4.3.1.
    """
    if math.isinf(h):
        return row_norm_bound(weight, dual(p))
    if p == 1:
        return row_norm_bound(weight.T, h)
    if p == h == 2:
        return spectral_norm_bound(weight)
    if h == 1 and math.isinf(p):
        return row_norm_bound(weight.reshape(1, -1), 1)
    rows = weight if h == 2 else weight.T
    with_all = root_up(Fraction(rows.shape[1]) * Fraction(spectral_norm_bound(weight)) ** 2)
    lengths = (Fraction(row_norm_bound(row[None], 1)) for row in rows)
    return min(with_all, root_up(sum((length**2 for length in lengths), Fraction(0))))


def conversion(p: float, h: float, n_inputs: int, n_outputs: int) -> float:
    """What a bound from the 2-norm to the 2-norm is multiplied by to hold from the norm p to the norm h.

    ||x||_2 <= ||x||_1 and ||x||_2 <= D^(1/2) ||x||_inf; ||y||_h <= ||y||_2 for h >= 2, ||y||_1 <= C^(1/2) ||y||_2.
    Rounded up.
    """
    square = (n_inputs if math.isinf(p) else 1) * (n_outputs if h < 2 else 1)
    return root_up(Fraction(square))


def cholesky_shift(shape: tuple[int, int]) -> float:
    """c / s^2 for `spectral_norm_bound` and an (n, m) matrix, n <= m.

    With u the unit roundoff, gamma_k = k u / (1 - k u) and every diagonal entry at most s^2, the eigenvalues move
    by at most gamma_m n s^2 in the product (its error is at most gamma_m |W| |W|^T, whose norm is at most
    gamma_m ||W||_F^2), by 2 u s^2 in the subtraction, and by gamma_{n+1} / (1 - gamma_{n+1}) n s^2 in the
    factorisation. The factor 2 covers the denominators, and the rounding of this very number.
    """
    n, m = shape
    return 2 * UNIT_ROUNDOFF * (n * (n + 1) + n * m + 4)


def _proves(bound: float, gram: FloatArray, shape: tuple[int, int]) -> bool:
    """Whether the shifted Cholesky factorisation shows `bound`^2 I - W W^T to be positive semidefinite."""
    square = math.nextafter(bound * bound, 0)
    shifted = -gram
    shifted[np.diag_indices_from(shifted)] += square * (1 - cholesky_shift(shape))
    try:
        np.linalg.cholesky(shifted)
    except np.linalg.LinAlgError:
        return False
    return True


def is_semidefinite(matrix: FloatArray, error: FloatArray | None = None) -> bool:
    """Whether each symmetric matrix within `error` of `matrix` (n, n), entry by entry, is positive semidefinite.

    This is proven for the exact numbers that both hold; without an `error` it concerns `matrix` itself. Rows and
    columns of both are scaled by the same powers of two, which leaves diagonal entries between 1/2 and 2. If a
    Cholesky factorisation of A - c I succeeds, A - c I + E is semidefinite for some E with
    ||E||_2 <= gamma_{n+1} / (1 - gamma_{n+1}) trace(A - c I); and the largest row sum of `error` is at least the
    2-norm of any symmetric matrix within it. So c has to be at least the sum of the two.

    Reference: Rump 2006, as above.
    """
    diagonal = np.diagonal(matrix)
    if not (np.isfinite(matrix).all() and (diagonal > 0).all()):
        return False
    scale = np.ldexp(1.0, -(np.frexp(diagonal)[1] // 2))
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = matrix * scale * scale[:, None]
        unsure = 0.0 if error is None else float((scale * (error @ scale)).max())
    n = len(matrix)
    # The trace is at most 2 n, and the diagonal is rounded once more. The factor 2 covers the denominators, the
    # rounding of this very number, and entries that underflow.
    shift = 2 * UNIT_ROUNDOFF * (2 * n * (n + 1) + 4) + 2 * unsure
    if not (np.isfinite(scaled).all() and shift < 1):
        return False  # LAPACK does not stop at entries that are not finite
    scaled[np.diag_indices(n)] -= shift
    try:
        np.linalg.cholesky(scaled)
    except np.linalg.LinAlgError:
        return False
    return True


def product_bound(norms: Iterable[float]) -> float:
    """The product of the layers' norms, computed exactly and rounded up."""
    product = Fraction(1)
    for norm in norms:
        if math.isinf(norm):
            return math.inf
        product *= Fraction(norm)
    return round_up(product)


@functools.cache
def even_split(lipschitz: float, n_layers: int) -> float:
    """b = L^(1/n), the norm that each of n layers may have: lowered until b^n <= L holds exactly."""
    bound = lipschitz ** (1 / n_layers)
    while Fraction(bound) ** n_layers > Fraction(lipschitz):
        bound = math.nextafter(bound, 0)
    return bound


def _sum_up(terms: FloatArray) -> float:
    """The exact sum of float64 numbers, rounded up; fsum rounds correctly, so the sign of the rest is certain."""
    total = math.fsum(terms)
    return math.nextafter(total, math.inf) if math.fsum([*terms, -total]) > 0 else total


def root_up(value: Fraction) -> float:
    """The square root, rounded up."""
    root = math.sqrt(value)
    while Fraction(root) ** 2 < value:
        root = math.nextafter(root, math.inf)
    return root
