"""The matrix inequality that bounds the Lipschitz constant of a network in the 2-norm, and its proof.

Take two inputs and let x_0 be their difference, x_k that of the features behind layer k and its activation. If
every activation acts feature by feature with slopes in [alpha, beta], then z_k = W_k x_{k-1} gives
(x_k - alpha z_k)_i (x_k - beta z_k)_i <= 0. So for any multipliers T_k >= 0, a diagonal matrix a layer, and all x,

    L^2 |x_0|^2 - |W_n x_{n-1}|^2  >=  x^T M x,
    x^T M x  =  L^2 |x_0|^2 - |W_n x_{n-1}|^2 + 2 sum_k (x_k - alpha z_k)^T T_k (x_k - beta z_k),

and L is a Lipschitz constant whenever M is positive semidefinite. It holds everywhere, for any biases, and for
more than one output in their 2-norm.

The proof that M is positive semidefinite is a Cholesky factorisation that allows for its own rounding errors.

Shapes: weights (out, in) of each layer; multipliers (H,) of all hidden features together.

Reference: Fazlyab, Robey, Hassani, Morari and Pappas 2019, "Efficient and accurate estimation of Lipschitz
constants for deep neural networks" (arXiv 1906.04893), theorem 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from lipexp.norms import UNIT_ROUNDOFF, is_semidefinite

Array = npt.NDArray[np.float64]
Slopes = tuple[float, float]


def proves(lipschitz: float, weights: Sequence[Array], slopes: Slopes, multipliers: Array) -> bool:
    """Whether M is proven positive semidefinite, for L and T as these very numbers; see `is_semidefinite`.

    Each entry of M is a sum of at most m + 2 terms, m the width of the largest layer, each a product of at most
    four factors of which some are rounded. In float64 it is off by at most gamma_{m+8} B, with B the sum of the
    terms' absolute values and gamma_k = k u / (1 - k u), and by what underflows, at most (m + 8) 2^-1070 as no
    weight exceeds 4. `is_semidefinite` allows for twice the error that it is given, which covers the denominator
    and the rounding of B.

    Args:
        weights: float64, entries at most 4.
        multipliers: (H,) T.

    Reference: Higham 2002, "Accuracy and Stability of Numerical Algorithms", section 3.1.
    """
    if not (math.isfinite(lipschitz) and np.isfinite(multipliers).all() and np.all(multipliers >= 0)):
        return False
    matrix, terms = inequality_matrix(weights, slopes, multipliers, math.nextafter(lipschitz * lipschitz, 0))
    m = max(len(weight) for weight in weights)
    return is_semidefinite(matrix, (m + 8) * (UNIT_ROUNDOFF * terms + 2.0**-1070))


def inequality_matrix(
    weights: Sequence[Array], slopes: Slopes, multipliers: Array, square: float
) -> tuple[Array, Array]:
    """M (N, N) for L^2 = `square`, and the sums of the absolute values of the terms of its entries."""
    alpha, beta = slopes
    *hidden, out = weights
    sizes = [weights[0].shape[1], *(len(weight) for weight in hidden)]
    ends = np.cumsum(sizes)
    blocks = [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    matrix = np.diag(np.concatenate([np.full(sizes[0], square), 2 * multipliers]))
    terms = matrix.copy()
    for k, weight in enumerate(hidden, start=1):
        before, rows = blocks[k - 1], blocks[k]
        t = multipliers[rows.start - sizes[0] : rows.stop - sizes[0], None]
        matrix[rows, before] = -((alpha + beta) * t) * weight
        matrix[before, rows] = matrix[rows, before].T
        terms[rows, before], terms[before, rows] = (
            np.abs(matrix[r, c]) for r, c in ((rows, before), (before, rows))
        )
        if alpha:
            t = 2 * alpha * beta * t
            matrix[before, before] += weight.T @ (t * weight)
            terms[before, before] += np.abs(weight).T @ (t * np.abs(weight))
    matrix[blocks[-1], blocks[-1]] -= out.T @ out
    terms[blocks[-1], blocks[-1]] += np.abs(out).T @ np.abs(out)
    return matrix, terms
