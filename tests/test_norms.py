"""Upper bounds: never below the exact value, and hardly above it."""

from __future__ import annotations

import contextlib
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lipexp.norms import (
    _proves,
    cholesky_shift,
    dual,
    even_split,
    is_semidefinite,
    product_bound,
    round_down,
    round_up,
    row_norm_bound,
    spectral_norm_bound,
)

TIGHT = 1e-9  # how much a spectral bound may exceed the norm, relative to it

float32 = st.floats(allow_nan=False, allow_infinity=False, width=32)
# One magnitude from the smallest denormal to near the largest number, and digits that tie and cancel.
powers = st.integers(-149, 120).map(lambda e: 2.0**e)
digits = st.integers(-8, 8).map(float)
shapes = st.tuples(st.integers(1, 4), st.integers(1, 4))
mixed = shapes.flatmap(lambda shape: hnp.arrays(np.float32, shape, elements=float32))
scaled = st.builds(
    lambda matrix, power: (matrix * power).astype(np.float32),
    shapes.flatmap(lambda shape: hnp.arrays(np.float64, shape, elements=digits)),
    powers,
)
matrices = mixed | scaled
positive = st.fractions(min_value=Fraction(1, 10**30), max_value=10**30)


def below(value: float, steps: int = 1) -> float:
    for _ in range(steps):
        value = math.nextafter(value, -math.inf)
    return value


# Rounding -------------------------------------------------------------------------------------------------------


@given(positive | st.fractions(min_value=0))
def test_rounding_up_gives_the_smallest_float_that_is_no_less(value):
    assert Fraction(round_up(value)) >= value
    assert value == 0 or Fraction(below(round_up(value))) < value


@given(positive | st.fractions(min_value=0))
def test_rounding_down_gives_the_largest_float_that_is_no_more(value):
    assert 0 <= Fraction(round_down(value)) <= value
    assert Fraction(math.nextafter(round_down(value), math.inf)) > value


@pytest.mark.parametrize("exponent", [-2000, -1074, -1022, 0, 1023])
def test_rounding_holds_at_the_ends_of_the_range(exponent):
    value = Fraction(2) ** exponent * Fraction(10**20 + 1, 10**20)
    assert Fraction(round_down(value)) < value < Fraction(round_up(value))
    assert math.nextafter(round_down(value), math.inf) == round_up(value)


def test_beyond_the_largest_float_rounding_up_is_infinite_and_rounding_down_is_it():
    assert round_up(Fraction(10) ** 400) == math.inf
    assert round_down(Fraction(10) ** 400) == np.finfo(np.float64).max


@given(st.floats(0, allow_infinity=False))
def test_a_float_is_its_own_rounding(value):
    assert round_up(Fraction(value)) == round_down(Fraction(value)) == value


# Rows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("q", [1, math.inf])
@given(weight=matrices)
def test_a_row_bound_is_the_smallest_float_that_is_no_less_than_the_norm(q, weight, exact):
    bound, norm = Fraction(row_norm_bound(weight, q)), exact.row_power(weight, q)
    assert bound >= norm
    assert norm == 0 or Fraction(below(float(bound))) < norm


@settings(max_examples=200)
@given(weight=matrices)
def test_a_row_bound_in_the_2_norm_is_within_one_float_of_the_smallest(weight, exact):
    bound, square = row_norm_bound(weight, 2), exact.row_power(weight, 2)
    assert Fraction(bound) ** 2 >= square
    # The sum of squares and its root are each rounded up, which together can cost one more float.
    assert square == 0 or Fraction(below(bound, 2)) ** 2 < square


@pytest.mark.parametrize("q", [1, 2, math.inf])
def test_a_row_bound_holds_for_wide_layers_of_all_magnitudes(q, exact):
    rng = np.random.default_rng(0)
    for spread in (0, 5, 35):
        weight = (rng.normal(size=(5, 300)) * 10.0 ** rng.uniform(-spread, 0, (5, 300))).astype(np.float32)
        bound = row_norm_bound(weight, q)
        assert exact.rows_within(weight, q, bound)
        assert not exact.rows_within(weight, q, below(bound, 2))


def test_a_difference_that_float64_does_not_see_decides_between_rows(exact):
    """Both rows have the float64 sum 1; only the second one exceeds it."""
    weight = np.array([[1, 0, 0], [1, 2.0**-60, 2.0**-100]], dtype=np.float32)
    for order in ([0, 1], [1, 0]):
        assert row_norm_bound(weight[order], 1) == math.nextafter(1, 2)


def test_a_row_whose_float64_sum_is_smaller_can_be_the_larger_one():
    """1 + 4 x 2^-53 loses its small terms one by one in float64; 1 + 2^-52 keeps its own, and is less."""
    weight = np.array([[1, 2.0**-52, 0, 0, 0], [1, *[2.0**-53] * 4]], dtype=np.float32)
    for order in ([0, 1], [1, 0]):
        assert row_norm_bound(weight[order], 1) == 1 + 2.0**-51


def test_a_row_that_sums_to_one_has_the_bound_one():
    assert row_norm_bound(np.array([[0.5, -0.25, 0.125, 0.125]], dtype=np.float32), 1) == 1
    assert row_norm_bound(np.array([[3, 4], [1, 1]], dtype=np.float32), 2) == 5
    assert row_norm_bound(np.array([[3, -4], [1, 1]], dtype=np.float32), math.inf) == 4


def test_nothing_is_proven_while_small_floats_are_flushed_to_zero():
    """A row of the smallest float32 would be given the norm 0. Not every processor can do so."""
    weight = np.full((2, 2), 2.0**-149, dtype=np.float32)
    flushes = torch.set_flush_denormal(True)
    try:
        for prove in (lambda: row_norm_bound(weight, 1), lambda: spectral_norm_bound(weight)):
            with pytest.raises(ArithmeticError, match="flushes") if flushes else contextlib.nullcontext():
                prove()
    finally:
        torch.set_flush_denormal(False)
    assert row_norm_bound(weight, 1) == 2.0**-148


# The spectral norm ----------------------------------------------------------------------------------------------

HADAMARD = np.array([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]])
KNOWN = {
    "diagonal": ([[3, 0], [0, 4]], 4),
    "permutation": (7 * np.eye(5)[[3, 0, 4, 1, 2]], 7),
    "orthogonal": (HADAMARD, 2),
    "half of an orthogonal": (HADAMARD[:2], 2),
    "rotation of 3 4 5": ([[3, 4], [-4, 3]], 5),
    "rank one": (np.outer([3, 4], [5, 12]), 65),
    "rank one, wide": (np.outer([3, 4], np.ones(16)), 20),
    "ones": (np.ones((8, 8)), 8),
    "equal rows": (np.tile([3, 4], (4, 1)), 10),
    "one row": ([[3, 4, 12]], 13),
    "one column": ([[3], [4], [12]], 13),
    "one entry": ([[-3]], 3),
    "a zero row": ([[3, 4], [0, 0]], 5),
    "equal singular values": (np.diag([2, 2, 2, 1]), 2),
    "symmetric, -3 and 5": ([[1, 4], [4, 1]], 5),
    "wide": (np.hstack([HADAMARD, HADAMARD, HADAMARD, HADAMARD]), 4),
    "large": (6 * np.kron(HADAMARD, np.kron(HADAMARD, HADAMARD)), 48),
}


@pytest.mark.parametrize("power", [0, -140, 110, 1], ids="2^{}".format)
@pytest.mark.parametrize("name", KNOWN)
def test_a_spectral_bound_meets_a_known_norm(name, power):
    matrix, norm = KNOWN[name]
    factor = 2.0**power if power != 1 else 1 / 3  # a power of two is exact; a third rounds every entry alike
    weight = (np.array(matrix) * factor).astype(np.float32)
    true = norm * (2.0**power if power != 1 else 1 / 3)
    slack = 0 if power != 1 else 2.0**-23
    for side in (weight, weight.T):
        bound = spectral_norm_bound(side)
        assert true * (1 - slack) <= bound <= true * (1 + slack) * (1 + TIGHT)


def test_a_spectral_bound_covers_an_irrational_norm():
    """||[[1, 1], [0, 1]]||_2 is the golden ratio, whose square is (3 + sqrt 5) / 2."""
    square = Fraction(spectral_norm_bound(np.array([[1, 1], [0, 1]], dtype=np.float32))) ** 2
    assert (2 * square - 3) ** 2 >= 5
    square *= (1 - Fraction(TIGHT)) ** 2
    assert (2 * square - 3) ** 2 < 5


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (3, 2), (4, 4)], ids=str)
def test_zero_has_the_norm_zero(shape):
    weight = np.zeros(shape, dtype=np.float32)
    assert spectral_norm_bound(weight) == row_norm_bound(weight, 1) == row_norm_bound(weight, 2) == 0


@settings(max_examples=200)
@given(weight=matrices)
def test_a_spectral_bound_is_proven_and_tight(weight, exact):
    bound = spectral_norm_bound(weight)
    assert exact.spectral_within(weight, bound)
    if weight.any():
        assert not exact.spectral_within(weight, bound * (1 - TIGHT))


@settings(max_examples=200)
@given(shape=shapes, power=powers, seed=st.integers(0, 10**6))
def test_a_spectral_bound_is_proven_and_tight_for_rank_one(shape, power, seed, exact):
    rng = np.random.default_rng(seed)
    weight = (np.outer(rng.normal(size=shape[0]), rng.normal(size=shape[1])) * power).astype(np.float32)
    assume(weight.any())
    bound = spectral_norm_bound(weight)
    assert exact.spectral_within(weight, bound)
    assert not exact.spectral_within(weight, bound * (1 - TIGHT))


@pytest.mark.parametrize("shape", [(64, 64), (64, 2), (1, 64), (128, 96)], ids=str)
@pytest.mark.parametrize("kind", ["normal", "orthogonal", "graded"])
def test_a_spectral_bound_is_tight_for_wide_layers(shape, kind):
    weight = np.random.default_rng(0).normal(size=shape)
    left, _, right = np.linalg.svd(weight, full_matrices=False)
    if kind != "normal":
        weight = (
            left
            @ np.diag(np.ones(min(shape)) if kind == "orthogonal" else np.logspace(0, -12, min(shape)))
            @ right
        )
    weight = weight.astype(np.float32)
    largest = float(np.linalg.svd(weight.astype(np.float64), compute_uv=False)[0])
    # LAPACK's singular value is itself off by some n 2^-53.
    assert largest * (1 - 1e-13) <= spectral_norm_bound(weight) <= largest * (1 + TIGHT)


@pytest.mark.parametrize("shape", [(2, 2), (2, 8), (8, 8), (64, 64)], ids=str)
def test_no_proof_is_found_for_a_bound_that_is_too_low(shape):
    for seed in range(5):
        weight = np.random.default_rng(seed).normal(size=shape).astype(np.float32).astype(np.float64)
        gram, largest = weight @ weight.T, np.linalg.svd(weight, compute_uv=False)[0]
        for excess in (-1e-6, -1e-12):
            assert not _proves(largest * (1 + excess), gram, shape)
        assert _proves(largest * (1 + 1e-9), gram, shape)


@pytest.mark.parametrize("norm", [1.0, 3.0, 1e-20, 1e20])
def test_a_proof_needs_room_for_its_own_rounding(norm):
    """The factorisation itself would run through a few ulps above the norm, where rounding can make it."""
    weight = norm * np.eye(8)
    for ulps in (0, 1, 8):
        assert not _proves(norm * (1 + ulps * 2.0**-52), weight @ weight.T, weight.shape)
    assert _proves(norm * (1 + 2 * cholesky_shift(weight.shape)), weight @ weight.T, weight.shape)


@pytest.mark.parametrize("shape", [(2, 2), (2, 64), (64, 64), (256, 1024)], ids=str)
def test_the_shift_covers_the_rounding_errors_that_it_is_for(shape):
    """Rump's bound in exact arithmetic: product, subtraction and factorisation, in units of s^2."""
    n, m = shape
    unit = Fraction(1, 2**53)
    product, factorisation = m * unit / (1 - m * unit), (n + 1) * unit / (1 - (n + 1) * unit)
    needed = product * n + 2 * unit + factorisation / (1 - factorisation) * n
    assert needed < Fraction(cholesky_shift(shape)) < 4 * needed


# Budgets and products -------------------------------------------------------------------------------------------


@given(st.floats(1e-30, 1e30), st.integers(1, 12))
def test_the_even_split_multiplies_to_no_more_than_the_budget(lipschitz, n_layers):
    bound = even_split(lipschitz, n_layers)
    assert Fraction(bound) ** n_layers <= Fraction(lipschitz)
    # The exponent 1/n is rounded by 2^-53, ln L is at most 70, and the loop takes off no more than it must.
    assert Fraction(bound * (1 + 1e-13)) ** n_layers > Fraction(lipschitz)


@pytest.mark.parametrize(
    ("lipschitz", "n_layers", "bound"), [(1, 7, 1), (4, 2, 2), (8, 3, 2), (0.25, 2, 0.5), (0.01, 1, 0.01)]
)
def test_the_even_split_is_exact_where_it_can_be(lipschitz, n_layers, bound):
    assert even_split(lipschitz, n_layers) == bound


@given(st.lists(st.floats(1e-40, 1e40), max_size=6))
def test_the_product_of_norms_is_rounded_up_once(norms):
    product = math.prod(map(Fraction, norms))
    assert Fraction(product_bound(norms)) >= product
    assert Fraction(below(product_bound(norms))) < product
    assert product_bound(reversed(norms)) == product_bound(norms)


def test_products_at_the_ends():
    assert product_bound([]) == 1
    assert product_bound([2.0, 0.0]) == 0
    assert product_bound([2.0, math.inf]) == math.inf
    assert product_bound([1e300, 1e300]) == math.inf
    assert product_bound([1e300, 1e300, 1e-300, 1e-300]) == pytest.approx(1, rel=1e-15)


@given(st.floats(1e-30, 1e30), st.integers(1, 8))
def test_layers_at_their_bound_multiply_to_no_more_than_the_budget(lipschitz, n_layers):
    assert product_bound([even_split(lipschitz, n_layers)] * n_layers) <= lipschitz


@pytest.mark.parametrize("p", [1.0, 2.0, math.inf])
def test_the_dual_exponent_satisfies_its_equation(p):
    assert 1 / p + 1 / dual(p) == 1
    assert dual(dual(p)) == p


# Semidefinite matrices -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(30))
def test_what_is_proven_semidefinite_is_so_in_rational_arithmetic(exact, seed):
    """Singular matrices of integers, lifted or lowered a little: near the border, and on both sides of it."""
    draws = np.random.default_rng(seed)
    half = draws.integers(-9, 10, (6, 4)).astype(float)
    lift = float(draws.choice([-1e-9, -1e-13, 0.0, 1e-13, 1e-9]))
    tried = half @ half.T + lift * np.diag(np.diagonal(half @ half.T))
    proven = is_semidefinite(tried)
    assert not proven or exact.semidefinite(exact.fractions(tried))
    if abs(lift) == 1e-9:
        assert proven == (lift > 0)


def test_scaled_rows_and_columns_do_not_matter():
    half = np.random.default_rng(0).standard_normal((6, 6))
    tried = half @ half.T + 0.1 * np.eye(6)
    scale = np.diag(2.0 ** np.array([-300, 0, 7, 100, -40, 300]))
    assert is_semidefinite(tried)
    assert is_semidefinite(scale @ tried @ scale)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0, 0.0])
def test_a_diagonal_that_is_not_positive_proves_nothing(bad):
    tried = np.eye(3)
    tried[1, 1] = bad
    assert not is_semidefinite(tried)


@pytest.mark.parametrize("size", [1.0, 1e-3])
@pytest.mark.parametrize("seed", range(10))
def test_an_error_is_allowed_for_in_its_worst_form(exact, seed, size):
    """Off by `error` with the signs that an eigenvector of the smallest eigenvalue likes least."""
    draws = np.random.default_rng(seed)
    half = draws.integers(-9, 10, (5, 5)).astype(float)
    tried = size * (half @ half.T + np.eye(5))
    vector = np.linalg.eigh(tried)[1][:, 0]
    signs = np.sign(np.outer(vector, vector))
    seen = set()
    for share in (1e-3, 1e-2, 0.1, 1.0, 10.0):
        error = np.full((5, 5), share * size)
        proven = is_semidefinite(tried, error)
        assert not proven or exact.semidefinite(exact.fractions(tried - signs * error))
        seen.add(proven)
    assert seen == {True, False}


def test_a_matrix_that_overflows_where_it_is_scaled_proves_nothing():
    """LAPACK does not stop at an infinite entry in the last row."""
    tried = np.eye(3)
    tried[0, 0] = 2.0**-1000
    tried[2, 0] = tried[0, 2] = 2.0**600
    assert not is_semidefinite(tried)
