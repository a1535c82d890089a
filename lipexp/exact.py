"""Floats as integers times a power of two: sums and products of them have no rounding error.

Shapes: H features, C outputs, D inputs.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from lipexp.norms import round_down, round_up

ExactArray = npt.NDArray[np.object_]  # Python integers
Exact = tuple[ExactArray, int]  # (integers, e), standing for integers * 2^e


def integers(values: npt.NDArray[Any]) -> Exact:
    """(integers, e) with values = integers * 2^e, exactly."""
    if not np.isfinite(values).all():
        raise ArithmeticError("numbers that are not finite have no exact value")
    mantissas, exponents = np.frexp(values.astype(np.float64))
    whole = np.ldexp(mantissas, 53).astype(np.int64)
    exponents = np.where(mantissas == 0, exponents.max(), exponents) - 53
    lowest = int(exponents.min())
    # A float32 number ends in at least 29 zeros here. Without them most shifts fit 64 bits, which is faster.
    zeros = _trailing_zeros(int(np.bitwise_or.reduce(whole, axis=None)))
    whole, shifts = whole >> zeros, exponents - lowest
    if 53 - zeros + int(shifts.max(initial=0)) < 63:
        return (whole << shifts).astype(object), lowest + zeros
    return whole.astype(object) << shifts.astype(object), lowest + zeros


def _trailing_zeros(value: int) -> int:
    """The number of zeros at the end of a binary number; 0 for the number 0."""
    return (value & -value).bit_length() - 1 if value else 0


def finer(values: Exact, exponent: int) -> Exact:
    """The same numbers with an exponent of at most `exponent`."""
    exponent = min(values[1], exponent)
    return values[0] << (values[1] - exponent), exponent


def add(a: Exact, b: Exact) -> Exact:
    """a + b, with numpy's broadcasting."""
    a, b = finer(a, b[1]), finer(b, a[1])
    return a[0] + b[0], a[1]


def rational(values: Exact, divisor: int) -> ExactArray:
    """(H,) values / divisor as fractions, for a positive integer."""
    scale = Fraction(2) ** values[1] / divisor
    return np.array([value * scale for value in values[0]], dtype=object)


def break_ties(values: Exact) -> Exact:
    """(H,) values moved up by less than 2^exponent each, so that none is such a multiple, and no two are equal.

    So each keeps its order among all others, and among all multiples of 2^exponent, but for those that are equal
    to it: right where they stay equal in a neighbourhood, so that no order gives another gradient.
    """
    bits = len(values[0]).bit_length()
    moved = (values[0] << bits) + np.arange(1, len(values[0]) + 1).astype(object)
    return moved, values[1] - bits


def norm_below(vector: ExactArray, exponent: int, q: float) -> float:
    """||vector * 2^exponent||_q as a float64, rounded down."""
    sizes = [abs(int(value)) for value in vector]
    if q == 2:
        # 64 more bits before the integer square root, whose rounding then costs nothing visible.
        return round_down(Fraction(math.isqrt(sum(s * s for s in sizes) << 128)) * Fraction(2) ** (exponent - 64))
    return round_down((sum(sizes) if q == 1 else max(sizes)) * Fraction(2) ** exponent)


def norm_above(vector: ExactArray, exponent: int, q: float) -> float:
    """||vector * 2^exponent||_q as a float64, rounded up; inf where it overflows."""
    sizes = [abs(int(value)) for value in vector]
    if q == 2:
        # The root of an integer, rounded up: 1 more than that of the integer before it, rounded down.
        square = sum(s * s for s in sizes) << 128
        root = math.isqrt(square - 1) + 1 if square else 0
        return round_up(Fraction(root) * Fraction(2) ** (exponent - 64))
    return round_up((sum(sizes) if q == 1 else max(sizes)) * Fraction(2) ** exponent)


def spectral_norm_below(matrix: ExactArray, exponent: int) -> float:
    """At most the largest singular value of matrix (C, D) * 2^exponent, and hardly less: ||M^T u||_2 / ||u||_2.

    That is a lower bound for any vector u. Here u is about the leading left singular vector, found in float64; the
    quotient is computed without rounding errors, and rounded down.
    """
    bits = max(abs(int(value)).bit_length() for value in matrix.flat)
    if bits == 0:
        return 0.0
    shift = max(0, bits - 64)
    u = np.linalg.svd((matrix >> shift).astype(np.float64), full_matrices=False)[0][:, 0]
    along, _ = integers(u)
    above, below = (int(vector.dot(vector)) for vector in (matrix.T.dot(along), along))
    more = 64 + max(0, (below.bit_length() - above.bit_length()) // 2 + 1)  # bits of the root below the point
    return round_down(Fraction(math.isqrt((above << 2 * more) // below)) * Fraction(2) ** (exponent - more))
