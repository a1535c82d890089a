"""Losses: closed forms, and values by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lipexp.losses import BCE, MSE, Hinge, Kantorovich
from lipexp.tasks import difference_of_means

# (K, B) outputs of both signs and of sizes from 1e-3 to 30, and classes; each run has both.
RNG = np.random.default_rng(0)
F = torch.from_numpy(10 ** RNG.uniform(-3, 1.5, (3, 40)) * RNG.choice([-1.0, 1.0], (3, 40)))
Y = torch.from_numpy((RNG.random((3, 40)) < [[0.1], [0.5], [0.9]]).astype(np.float64))


@pytest.mark.parametrize("temperature", [0.1, 1.0, 7.0, 1000.0])
def test_bce_is_log_of_one_plus_exp_of_minus_the_margin_over_the_temperature(temperature):
    expected = np.logaddexp(0, -temperature * ((2 * Y - 1) * F).numpy()) / temperature
    # torch subtracts T f y from T f where numpy does not: an error of some ulps of f, at most 30 here.
    np.testing.assert_allclose(BCE(temperature)(F, Y).numpy(), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("f", "y", "value"),
    [(0.0, 1, 0.5), (0.0, 0, 0.5), (0.25, 1, 0.25), (0.25, 0, 0.75), (0.5, 1, 0.0), (7.0, 1, 0.0), (-2.0, 1, 2.5)],
)
def test_hinge_is_what_is_missing_from_the_margin_in_units_of_the_lipschitz_constant(f, y, value):
    for lipschitz in (1.0, 0.25, 64.0):  # powers of two: nothing is rounded
        loss = Hinge(margin=0.5, lipschitz=lipschitz)(torch.tensor([[lipschitz * f]]), torch.tensor([[float(y)]]))
        assert float(loss) == value


def test_mse_is_the_square_of_the_error():
    np.testing.assert_array_equal(MSE()(F, Y).numpy(), (F.numpy() - Y.numpy()) ** 2)


def test_kantorovich_is_the_difference_of_the_means_however_many_samples_each_class_has():
    for f, y, loss in zip(F, Y, Kantorovich(4.0)(F, Y).mean(dim=1), strict=True):
        assert float(loss) == pytest.approx(-float(f[y == 1].mean() - f[y == 0].mean()) / 4, rel=1e-12)
    assert torch.allclose(difference_of_means(F + 7, Y), difference_of_means(F, Y), atol=1e-12)


def test_a_class_without_samples_has_mean_zero():
    f = torch.tensor([[1.0, 3.0]])
    assert difference_of_means(f, torch.ones_like(f)).item() == 2
    assert difference_of_means(f, torch.zeros_like(f)).item() == -2
