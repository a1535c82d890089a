"""Integers times a power of two stand for floats exactly, and norms of them are rounded once."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from networks import NORMS, power

from lipexp.exact import add, break_ties, finer, integers, norm_above, norm_below, rational, spectral_norm_below

floats = st.floats(allow_nan=False, allow_infinity=False)
whole = st.integers(-(2**80), 2**80)


def values(exact):
    return [value * Fraction(2) ** exact[1] for value in exact[0]]


@given(st.lists(floats, min_size=1, max_size=6), st.booleans())
def test_integers_stand_for_the_numbers_themselves(numbers, single):
    """Those of float32, of like size, and of all sizes at once, are found in different ways."""
    with np.errstate(over="ignore"):
        array = np.array(numbers, dtype=np.float32 if single else np.float64)
    if not np.isfinite(array).all():
        with pytest.raises(ArithmeticError):
            integers(array)
        return
    assert [type(value) for value in integers(array)[0]] == [int] * len(numbers)
    assert values(integers(array)) == [Fraction(float(value)) for value in array]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_integers_of_64_bits_do_not_overflow(dtype):
    """Full mantissas, so far apart that the larger one just fits 64 bits, or just does not."""
    full = np.nextafter(dtype(2), dtype(1))
    for spread in range(48):
        array = np.array([full, -full * dtype(2) ** spread, 0], dtype=dtype)
        assert values(integers(array)) == [Fraction(float(value)) for value in array]


@given(st.lists(whole, min_size=1, max_size=5), st.integers(-90, 90), st.integers(-90, 90))
def test_sums_ties_and_norms_are_exact(numbers, exponent, other):
    array = np.array(numbers, dtype=object)
    total = add((array, exponent), (array[:1], other))
    first = numbers[0] * Fraction(2) ** other
    assert values(total) == [value * Fraction(2) ** exponent + first for value in numbers]
    moved = values(break_ties((array, exponent)))
    unit = Fraction(2) ** exponent
    assert len(set(moved)) == len(numbers)
    assert all(0 < (found / unit - value) < 1 for found, value in zip(moved, numbers, strict=True))
    assert values(finer((array, exponent), other)) == values((array, exponent))
    assert finer((array, exponent), other)[1] <= other
    assert [*rational((array, exponent), 3)] == [value / 3 for value in values((array, exponent))]
    for q in NORMS:
        found, exact = norm_below(array, exponent, q), power(values((array, exponent)), q)
        assert Fraction(found) ** (2 if q == 2 else 1) <= exact
        assert Fraction(math.nextafter(found, math.inf)) ** (2 if q == 2 else 1) > exact
        above = norm_above(array, exponent, q)
        assert Fraction(above) ** (2 if q == 2 else 1) >= exact
        assert above in (found, math.nextafter(found, math.inf))


@given(st.lists(st.lists(whole, min_size=3, max_size=3), min_size=1, max_size=4), st.integers(-90, 90))
def test_a_spectral_norm_is_rounded_down_and_loses_nothing_visible(exact, rows, exponent):
    """Whether a number is a bound is decided by elimination in rational arithmetic."""
    found = spectral_norm_below(np.array(rows, dtype=object), exponent)
    matrix = [[value * Fraction(2) ** exponent for value in row] for row in rows]
    assert exact.spectral_within(matrix, found * (1 + 1e-12))
    assert found == 0 or not exact.spectral_within(matrix, Fraction(found) * (1 - Fraction(1, 10**40)))
