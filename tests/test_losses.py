"""Losses: closed forms, and values by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lipexp.losses import BCE, MSE, Hinge, Kantorovich
from lipexp.measured.gradients import scan
from lipexp.tasks import difference_of_means

# (K, B) outputs of both signs and of sizes from 1e-3 to 30, and classes; each run has both.
RNG = np.random.default_rng(0)
F = torch.from_numpy(10 ** RNG.uniform(-3, 1.5, (3, 40)) * RNG.choice([-1.0, 1.0], (3, 40)))
Y = torch.from_numpy((RNG.random((3, 40)) < [[0.1], [0.5], [0.9]]).astype(np.float64))


@pytest.mark.parametrize(("temperature", "lipschitz"), [(0.1, 1.0), (1.0, 4.0), (7.0, 1e-3), (1000.0, 1e3)])
def test_bce_is_log_of_one_plus_exp_of_minus_the_margin_over_the_temperature_and_l(temperature, lipschitz):
    expected = np.logaddexp(0, -temperature * ((2 * Y - 1) * F).numpy()) / temperature / lipschitz
    # torch subtracts T f y from T f where numpy does not: an error of some ulps of f, at most 30 here.
    found = BCE(temperature, lipschitz)(F, Y).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-14 / lipschitz)


@pytest.mark.parametrize(
    ("f", "y", "value"),
    [(0.0, 1, 0.5), (0.0, 0, 0.5), (0.25, 1, 0.25), (0.25, 0, 0.75), (0.5, 1, 0.0), (7.0, 1, 0.0), (-2.0, 1, 2.5)],
)
def test_hinge_is_what_is_missing_from_the_margin_in_units_of_the_lipschitz_constant(f, y, value):
    for lipschitz in (1.0, 0.25, 64.0):  # powers of two: nothing is rounded
        loss = Hinge(margin=0.5, lipschitz=lipschitz)(torch.tensor([[lipschitz * f]]), torch.tensor([[float(y)]]))
        assert float(loss) == value


@pytest.mark.parametrize(("lipschitz", "divisor"), [(1.0, 1), (4.0, 16), (0.25, 0.25)])
def test_mse_is_the_square_of_the_error_over_l_and_above_1_over_its_square(lipschitz, divisor):
    np.testing.assert_array_equal(MSE(lipschitz)(F, Y).numpy(), (F.numpy() - Y.numpy()) ** 2 / divisor)


@pytest.mark.parametrize("lipschitz", [1e-30, 1e-10, 1e10, 1e30])
def test_every_loss_trains_at_every_l(trained, loss_option, lipschitz):
    """30 steps are enough to use more than half of L, or, where the target is flatter, to shrink the loss."""
    dataset = {"mse": "absolute_value", "kantorovich": "cones"}.get(loss_option, "two_moons")
    result = trained(f"dataset={dataset}", f"loss={loss_option}", runs=(f"seed=0 lipschitz={lipschitz}",))
    data, losses = result.stack.data[0], []
    for checkpoint in (result.seen[0], result.checkpoint):
        scanned = scan(checkpoint.network, torch.from_numpy(data.train_x).unsqueeze(0))
        losses.append(
            float(result.stack.loss(scanned.f.squeeze(-1), torch.from_numpy(data.train_y).double()[None]).mean())
        )
    steepest = float(torch.linalg.vector_norm(scanned.gradient, dim=-1).max())
    assert not result.checkpoint.failures
    assert 0.5 * lipschitz < steepest <= lipschitz or losses[1] < 0.1 * losses[0]


def test_kantorovich_is_the_difference_of_the_means_however_many_samples_each_class_has():
    for f, y, loss in zip(F, Y, Kantorovich(4.0)(F, Y).mean(dim=1), strict=True):
        assert float(loss) == pytest.approx(-float(f[y == 1].mean() - f[y == 0].mean()) / 4, rel=1e-12)
    assert torch.allclose(difference_of_means(F + 7, Y), difference_of_means(F, Y), atol=1e-12)


def test_a_class_without_samples_has_mean_zero():
    f = torch.tensor([[1.0, 3.0]])
    assert difference_of_means(f, torch.ones_like(f)).item() == 2
    assert difference_of_means(f, torch.zeros_like(f)).item() == -2


def test_gradients_are_finite_for_outputs_of_any_size(make, loss_option):
    """The law asks it of a user's loss up to some 30 only, which an exponential one can meet."""
    loss = make("loss", f"loss={loss_option}")
    for outputs in (1e4 * F, (1e4 * F).float()):
        (gradient,) = torch.autograd.grad(loss(outputs.requires_grad_(), Y.to(outputs.dtype)).sum(), outputs)
        assert torch.isfinite(gradient).all()
