"""Proven bounds on the norms of matrices: never below the exact value, and hardly above it."""

import contextlib
import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from networks import NORMS

from lipexp import norms
from lipexp.norms import (
    conversion,
    dual,
    even_split,
    is_semidefinite,
    operator_norm_bound,
    product_bound,
    row_norm_bound,
    spectral_norm_bound,
)

TIGHT = 1e-9  # how much a spectral bound may exceed the norm, relative to it

# One magnitude from the smallest denormal to near the largest number, and digits that tie and cancel.
powers = st.integers(-149, 120).map(lambda e: 2.0**e)
shapes = st.tuples(st.integers(1, 4), st.integers(1, 4))
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
mixed = shapes.flatmap(lambda shape: hnp.arrays(np.float32, shape, elements=finite))
digits = shapes.flatmap(lambda shape: hnp.arrays(np.float64, shape, elements=st.integers(-8, 8).map(float)))
rank_one = st.builds(
    lambda a, b, seed: np.outer(*np.random.default_rng(seed).normal(size=(2, a)))[:, :b],
    *[st.integers(1, 4)] * 2,
    st.integers(0, 10**6),
)
matrices = mixed | st.builds(lambda matrix, power: (matrix * power).astype(np.float32), digits | rank_one, powers)


def below(value: float, steps: int = 1) -> float:
    for _ in range(steps):
        value = math.nextafter(value, -math.inf)
    return value


@given(st.fractions(min_value=0, max_value=10**6), st.sampled_from([-2000, -1074, -1022, 0, 1000]))
def test_rounding_gives_the_nearest_float_on_the_right_side(value, exponent):
    value *= Fraction(2) ** exponent
    up, down = norms.round_up(value), norms.round_down(value)
    assert 0 <= Fraction(down) <= value <= Fraction(up)
    assert up == (down if Fraction(down) == value else math.nextafter(down, math.inf))
    assert norms.round_up(value + Fraction(10) ** 400) == math.inf
    assert norms.round_down(value + Fraction(10) ** 400) == np.finfo(np.float64).max


@given(st.floats(1e-30, 1e30), st.integers(1, 12))
def test_the_even_split_multiplies_to_no_more_than_the_budget(lipschitz, n_layers):
    bound = even_split(lipschitz, n_layers)
    assert Fraction(bound) ** n_layers <= Fraction(lipschitz)
    assert product_bound([bound] * n_layers) <= lipschitz
    # The exponent 1/n is rounded by 2^-53, ln L is at most 70, and the loop takes off no more than it must.
    assert Fraction(bound * (1 + 1e-13)) ** n_layers > Fraction(lipschitz)
    assert [even_split(*case) for case in ((1, 7), (4, 2), (8, 3), (0.25, 2), (0.01, 1))] == [1, 2, 2, 0.5, 0.01]


@given(st.lists(st.floats(1e-40, 1e40), max_size=6))
def test_the_product_of_norms_is_rounded_up_once(factors):
    product = math.prod(map(Fraction, factors))
    assert Fraction(below(product_bound(factors))) < product <= Fraction(product_bound(factors))
    assert product_bound([*factors, 0.0]) == 0
    assert product_bound([*factors, math.inf]) == product_bound([1e300, 1e300]) == math.inf
    assert product_bound([1e300, 1e300, 1e-300, 1e-300]) == pytest.approx(1, rel=1e-15)


def test_norms_have_duals_and_names():
    assert [1 / p + 1 / dual(p) for p in NORMS] == [1, 1, 1]
    assert [norms.norm_name(p) for p in NORMS] == [1, 2, "inf"]


@settings(max_examples=100)
@given(weight=matrices, q=st.sampled_from(NORMS))
def test_a_row_bound_is_the_smallest_float_that_is_no_less_than_the_norm(weight, q, exact):
    """In the 2-norm the sum of squares and its root are each rounded up, which can cost one more float."""
    bound, power, exponent = row_norm_bound(weight, q), exact.row_power(weight, q), 2 if q == 2 else 1
    assert Fraction(bound) ** exponent >= power
    assert power == 0 or Fraction(below(bound, exponent)) ** exponent < power


@pytest.mark.parametrize("q", NORMS)
def test_a_row_bound_holds_for_wide_layers_of_all_magnitudes(q, exact):
    rng = np.random.default_rng(0)
    for spread in (0, 5, 35):
        weight = (rng.normal(size=(5, 300)) * 10.0 ** rng.uniform(-spread, 0, (5, 300))).astype(np.float32)
        bound = row_norm_bound(weight, q)
        assert exact.rows_within(weight, q, bound)
        assert not exact.rows_within(weight, q, below(bound, 2))


def test_a_difference_that_float64_does_not_see_decides_between_rows():
    """Two rows have the float64 sum 1, which only the second one exceeds; then 1 + 4 x 2^-53 loses its small terms
    one by one, and 1 + 2^-52, which is less, keeps its own."""
    for first, second, norm in (
        ([1, 0, 0], [1, 2.0**-60, 2.0**-100], 1 + 2.0**-52),
        ([1, 2.0**-52, 0, 0, 0], [1, *[2.0**-53] * 4], 1 + 2.0**-51),
        ([0.5, -0.25, 0.125, 0.125], [0, 0, 0, 0], 1),
    ):
        for rows in ([first, second], [second, first]):
            assert row_norm_bound(np.array(rows, dtype=np.float32), 1) == norm


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


@settings(max_examples=300)
@given(weight=matrices)
def test_a_spectral_bound_is_proven_and_tight(weight, exact):
    bound = spectral_norm_bound(weight)
    assert exact.spectral_within(weight, bound)
    if weight.any():
        assert not exact.spectral_within(weight, bound * (1 - TIGHT))
    else:
        assert bound == 0


@pytest.mark.parametrize("shape", [(64, 64), (64, 2), (1, 64), (128, 96)], ids=str)
@pytest.mark.parametrize("kind", ["normal", "orthogonal", "graded"])
def test_a_spectral_bound_is_tight_for_wide_layers(shape, kind):
    weight = np.random.default_rng(0).normal(size=shape)
    left, singular, right = np.linalg.svd(weight, full_matrices=False)
    n = len(singular)
    singular = {"normal": singular, "orthogonal": np.ones(n), "graded": np.logspace(0, -12, n)}[kind]
    weight = (left * singular @ right).astype(np.float32)
    largest = float(np.linalg.svd(weight.astype(np.float64), compute_uv=False)[0])
    # LAPACK's singular value is itself off by some n 2^-53.
    assert largest * (1 - 1e-13) <= spectral_norm_bound(weight) <= largest * (1 + TIGHT)


def test_a_proof_needs_room_for_its_own_rounding():
    """The factorisation itself would run through a few ulps above the norm, where rounding can make it."""
    for norm in (1.0, 3.0, 1e-20, 1e20):
        gram, shape = norm**2 * np.eye(8), (8, 8)
        assert not any(norms._proves(norm * (1 + ulps * 2.0**-52), gram, shape) for ulps in (-9, 0, 1, 8))
        assert norms._proves(norm * (1 + 2 * norms.cholesky_shift(shape)), gram, shape)


@pytest.mark.parametrize("shape", [(2, 2), (2, 64), (64, 64), (256, 1024)], ids=str)
def test_the_shift_covers_the_rounding_errors_that_it_is_for(shape):
    """Rump's bound in exact arithmetic: product, subtraction and factorisation, in units of s^2."""
    n, m = shape
    unit = Fraction(1, 2**53)
    product, factorisation = m * unit / (1 - m * unit), (n + 1) * unit / (1 - (n + 1) * unit)
    needed = product * n + 2 * unit + factorisation / (1 - factorisation) * n
    assert needed < Fraction(norms.cholesky_shift(shape)) < 4 * needed


def test_what_is_proven_semidefinite_is_so_in_rational_arithmetic(exact):
    """Singular matrices of integers, lifted or lowered a little: near the border, and on both sides of it."""
    for seed in range(30):
        half = np.random.default_rng(seed).integers(-9, 10, (6, 4)).astype(float)
        lift = (-1e-9, -1e-13, 0.0, 1e-13, 1e-9)[seed % 5]
        tried = half @ half.T + lift * np.diag(np.diagonal(half @ half.T))
        proven = is_semidefinite(tried)
        assert not proven or exact.semidefinite(exact.fractions(tried))
        if abs(lift) == 1e-9:
            assert proven == (lift > 0)


@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_an_error_is_allowed_for_in_its_worst_form(exact, size):
    """Off by `error` with the signs that an eigenvector of the smallest eigenvalue likes least."""
    for seed in range(10):
        half = np.random.default_rng(seed).integers(-9, 10, (5, 5)).astype(float)
        tried = size * (half @ half.T + np.eye(5))
        vector = np.linalg.eigh(tried)[1][:, 0]
        seen = set()
        for share in (1e-3, 1e-2, 0.1, 1.0, 10.0):
            error = np.full((5, 5), share * size)
            proven = is_semidefinite(tried, error)
            worst = tried - np.sign(np.outer(vector, vector)) * error
            assert not proven or exact.semidefinite(exact.fractions(worst))
            seen.add(proven)
        assert seen == {True, False}


def test_scales_do_not_matter_and_numbers_that_are_not_finite_prove_nothing():
    half = np.random.default_rng(0).standard_normal((6, 6))
    tried, scale = half @ half.T + 0.1 * np.eye(6), np.diag(2.0 ** np.array([-300, 0, 7, 100, -40, 300]))
    assert is_semidefinite(tried)
    assert is_semidefinite(scale @ tried @ scale)
    for bad in (math.nan, math.inf, -1.0, 0.0):
        assert not is_semidefinite(np.diag([1.0, bad, 1.0]))
    # LAPACK does not stop at an infinite entry in the last row, which scaling makes here.
    overflowing = np.array([[2.0**-1000, 0, 2.0**600], [0, 1, 0], [2.0**600, 0, 1]])
    assert not is_semidefinite(overflowing)


def exact_norm(matrix: np.ndarray, p: float, h: float) -> float:
    """||W||_{p -> h} in float64: by the singular values, or by the corners of the ball, or of that of the dual."""
    if p == h == 2:
        return float(np.linalg.svd(matrix, compute_uv=False).max())
    if p == 2:  # ||W||_{2 -> h} = ||W^T||_{h* -> 2}, and the balls of the 1- and the inf-norm have corners
        matrix, p, h = matrix.T, dual(h), 2.0
    n = matrix.shape[1]
    corners = np.eye(n) if p == 1 else np.array(list(itertools.product([-1.0, 1.0], repeat=n)))
    return float(np.linalg.norm(matrix @ corners.T, h, axis=0).max())


@given(matrices, st.sampled_from(NORMS), st.sampled_from(NORMS))
def test_the_norm_from_any_norm_to_any_is_bounded_and_found_where_it_is_easy(matrix, p, h):
    matrix = matrix.astype(np.float32)
    with np.errstate(over="ignore"):
        exact = exact_norm(matrix.astype(np.float64), p, h)
    bound = operator_norm_bound(matrix, p, h)
    is_easy = p == 1 or math.isinf(h) or p == h == 2
    assert exact * (1 - 1e-12) <= bound
    # A matrix of n columns of one length, with any signs, is hard: its bound is at most sqrt(n) too large.
    assert bound <= exact * ((1 if is_easy else math.sqrt(max(matrix.shape))) + TIGHT) + 1e-300


@given(matrices, st.sampled_from(NORMS), st.sampled_from(NORMS))
def test_a_bound_in_the_two_norm_is_one_in_any_norm(matrix, p, h):
    matrix = matrix.astype(np.float64)
    n_outputs, n_inputs = matrix.shape
    bound = exact_norm(matrix, 2, 2) * conversion(p, h, n_inputs, n_outputs)
    assert exact_norm(matrix, p, h) <= bound * (1 + 1e-9) + 1e-300
    assert conversion(math.inf, 2, 4, 5) == 2.0
    assert conversion(math.inf, 1, 4, 9) == 6.0
