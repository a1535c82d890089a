"""Exact gradients are those of rational arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rational import PIECEWISE, by_hand, fraction_gradient, maxmin_piece, network, normal, relu_piece

from lipexp.activations import GroupSort, ReLU
from lipexp.measured.exact import ExactNetwork, integers
from lipexp.measured.gradients import scan
from lipexp.models import Layer


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=6), st.booleans())
def test_integers_stand_for_the_numbers_themselves(values, single):
    """Those of float32, of like size, and of all sizes at once, are found in different ways."""
    with np.errstate(over="ignore"):
        array = np.array(values, dtype=np.float32 if single else np.float64)
    if not np.isfinite(array).all():
        with pytest.raises(ArithmeticError):
            integers(array)
        return
    found, exponent = integers(array)
    assert [type(value) for value in found] == [int] * len(values)
    assert [value * Fraction(2) ** exponent for value in found] == [Fraction(float(value)) for value in array]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_integers_of_64_bits_do_not_overflow(dtype):
    """Full mantissas, so far apart that the larger one just fits 64 bits, or just does not."""
    full = np.nextafter(dtype(2), dtype(1))
    for spread in range(48):
        array = np.array([full, -full * dtype(2) ** spread, 0], dtype=dtype)
        found, exponent = integers(array)
        assert [value * Fraction(2) ** exponent for value in found] == [Fraction(float(value)) for value in array]


@pytest.mark.parametrize("name", PIECEWISE)
def test_the_exact_gradient_is_the_one_of_rational_arithmetic(name):
    act, piece, _ = PIECEWISE[name]
    layers = network(2, 4, 4, 1, runs=2)
    for run in range(2):
        for point in normal(10, 2, seed=run).numpy():
            integers, exponent = ExactNetwork(layers, act, run).gradient(point)
            found = [int(value) * Fraction(2) ** exponent for value in integers]
            assert found == fraction_gradient(layers, piece, point, run)


def test_the_exact_gradient_is_the_scanned_one_in_more_digits(act_option, make):
    act = make("act", f"act={act_option}").baked()
    layers, x = network(2, 16, 16, 16, 1), normal(1, 20, 2)
    scanned = scan(layers, act, x).gradient[0]
    for point, expected in zip(x[0].numpy(), scanned.numpy(), strict=True):
        integers, exponent = ExactNetwork(layers, act, 0).gradient(point)
        found = [float(int(value) * Fraction(2) ** exponent) for value in integers]
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-14)


def test_the_exact_gradient_survives_zeros_and_all_magnitudes():
    layers = by_hand(
        ([[1e-30, 0.0], [0.0, 1e30], [1e-45, -1e-45], [0.0, 0.0]], [0.0, -1e30, 1e-40, 1.0]),
        ([[1e20, -1e-20, 0.0, 3.0]], [0.0]),
    )
    for point in (np.array([1e-300, 2.0]), np.array([0.0, -5.0]), np.array([1e200, 0.25])):
        if point[0] == 0:
            assert ExactNetwork(layers, ReLU(), 0).gradient(point) is None
            continue
        integers, exponent = ExactNetwork(layers, ReLU(), 0).gradient(point)
        found = [int(value) * Fraction(2) ** exponent for value in integers]
        assert found == fraction_gradient(layers, relu_piece, point)


def test_a_point_on_a_kink_has_no_gradient():
    layers = by_hand(([[1.0, 0.0], [0.0, 1.0]], [0.0, -0.5]), ([[1.0, 1.0]], [0.0]))
    assert ExactNetwork(layers, ReLU(), 0).gradient(np.array([0.0, 3.0])) is None
    assert ExactNetwork(layers, ReLU(), 0).gradient(np.array([1.0, 0.5])) is None
    assert ExactNetwork(layers, ReLU(), 0).gradient(np.array([1.0, 3.0])) is not None
    maxmin = PIECEWISE["maxmin"][0]
    assert ExactNetwork(layers, maxmin, 0).gradient(np.array([1.0, 1.5])) is None
    assert ExactNetwork(layers, maxmin, 0).gradient(np.array([0.0, 1.5])) is not None


def equals_and_zeros() -> list[Layer]:
    """Of both hidden layers, the first two features are equal everywhere and the third is zero."""
    layers = network(2, 4, 4, 1)
    for weight, bias in layers[:2]:
        weight[0, 1], bias[0, 0, 1] = weight[0, 0], bias[0, 0, 0]
        weight[0, 2], bias[0, 0, 2] = 0, 0
    layers[1].weight[0, 1, :2] = layers[1].weight[0, 0, [1, 0]]  # equal because its inputs are
    return layers


TIED_PIECES = {
    "relu": lambda z: [[Fraction(i == j and z[i] > 0) for j in range(4)] for i in range(4)],
    "maxmin": lambda z: maxmin_piece([value + Fraction(i, 10**9) for i, value in enumerate(z)]),
}


@pytest.mark.parametrize("name", PIECEWISE)
def test_features_that_are_equal_everywhere_or_zero_make_no_kink(name):
    act, layers = PIECEWISE[name][0], equals_and_zeros()
    points = normal(10, 2)
    for point in points.numpy():
        integers, exponent = ExactNetwork(layers, act, 0).gradient(point)
        found = [int(value) * Fraction(2) ** exponent for value in integers]
        assert found == fraction_gradient(layers, TIED_PIECES[name], point)


def test_features_that_cross_make_a_kink_beside_those_that_are_equal():
    layers = equals_and_zeros()
    layers[0].weight[0, 3], layers[0].bias[0, 0, 3] = torch.tensor([1.0, -1.0]), 0
    assert ExactNetwork(layers, ReLU(), 0).gradient(np.array([0.5, 0.5])) is None  # where it meets 0 itself
    assert ExactNetwork(layers, GroupSort(neighbours=True), 0).gradient(np.array([0.5, 0.5])) is None  # the third
    assert ExactNetwork(layers, GroupSort(neighbours=True), 0).gradient(np.array([0.5, 0.25])) is not None


def test_equal_features_of_an_activation_with_other_kinks_have_no_gradient():
    """What is known of kinks where features meet says nothing of its own."""

    class Twice(ReLU):
        def forward(self, x):
            return x

        def piece(self, z):
            return None

    assert ExactNetwork(equals_and_zeros(), Twice(), 0).gradient(np.array([0.5, 0.25])) is None


def test_weights_that_are_not_finite_have_no_exact_gradient():
    layers = by_hand(([[math.inf, 1.0]], [0.0]), ([[1.0]], [0.0]))
    with pytest.raises(ArithmeticError):
        ExactNetwork(layers, ReLU(), 0)
