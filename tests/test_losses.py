"""Losses: closed forms, and values by hand."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import numpy as np
import pytest
import scipy.special
import torch
from conftest import options, part

from lipexp.config import ConfigError
from lipexp.losses import (
    BCE,
    HKR,
    MAE,
    MSE,
    CertifiedRadius,
    Cosine,
    CrossEntropy,
    Hinge,
    Huber,
    Kantorovich,
    MultiMargin,
    SoftHKR,
    SoftMargin,
    as_loss,
    check_loss,
    tasks_of,
)
from lipexp.tasks import difference_of_means, squeezed

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


# (K, B, C) outputs and targets of the same sizes for three classes or targets, and (K, B) the classes.
F3, Y3 = (
    torch.from_numpy(10 ** RNG.uniform(-3, 1.5, (3, 40, 3)) * RNG.choice([-1.0, 1.0], (3, 40, 3))) for _ in "FY"
)
CLASSES = torch.from_numpy(RNG.integers(3, size=(3, 40)).astype(np.float64))
# task -> the outputs and targets that a loss for it takes
BATCHES = {
    "classification": [(F, Y)],
    "transport": [(F, Y)],
    "multiclass": [(F3, CLASSES)],
    "regression": [(F, Y), (F3, Y3)],
}


def batches(loss):
    """The outputs and targets that a loss takes."""
    return [batch for task in tasks_of(loss) for batch in BATCHES[task]]


@pytest.mark.parametrize(("temperature", "lipschitz"), [(0.1, 1.0), (1.0, 4.0), (7.0, 1e-3), (1000.0, 1e3)])
def test_cross_entropy_is_minus_the_logarithm_of_the_softmax_over_the_temperature_and_l(temperature, lipschitz):
    logarithms = scipy.special.log_softmax(temperature * F3.numpy(), axis=-1)
    expected = -np.take_along_axis(logarithms, CLASSES.long().unsqueeze(-1).numpy(), axis=-1)[..., 0]
    found = CrossEntropy(temperature, lipschitz)(F3, CLASSES).numpy() * temperature * lipschitz
    np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-13)


def test_cross_entropy_of_two_outputs_is_bce_of_their_difference():
    expected = BCE(7.0, 4.0)(F, Y)
    torch.testing.assert_close(CrossEntropy(7.0, 4.0)(torch.stack([-F / 2, F / 2], dim=-1), Y), expected)


def test_multi_margin_is_the_sum_over_the_other_classes_of_what_their_gap_lacks():
    found = MultiMargin(margin=0.5, lipschitz=4.0)(F3, CLASSES)
    for run, point in np.ndindex(3, 40):
        f, y = F3[run, point].tolist(), int(CLASSES[run, point])
        expected = sum(max(0.0, 0.5 - (f[y] - f[j]) / 8) for j in range(3) if j != y)
        assert float(found[run, point]) == pytest.approx(expected, rel=1e-12, abs=1e-14)


def test_multi_margin_of_two_opposite_outputs_is_the_hinge_loss():
    both = torch.stack([-F, F], dim=-1)
    torch.testing.assert_close(MultiMargin(0.3, 4.0)(both, Y), Hinge(0.3, 4.0)(F, Y))


@pytest.mark.parametrize("constraint", ["spectral", "linf"])
def test_a_point_without_multi_margin_loss_keeps_its_class_within_the_margin(trained, constraint):
    """Moves of the length of the margin, in random directions at first, then to where another class gains most."""
    settings = ("loss.margin=0.5", "dataset.n_train=1000", "steps=300", "model.width=32")
    result = trained("dataset=spirals", f"constraint={constraint}", *settings, runs=("seed=0 lipschitz=0.5",))
    network = result.checkpoint.network
    axis = torch.linspace(-3.5, 3.5, 40, dtype=torch.float64)
    x = torch.cartesian_prod(axis, axis)[None]
    f = network.double(x)
    content = result.stack.loss(f, f.argmax(dim=-1).double())[0] == 0
    assert content.sum() > 50
    x, own = x[:, content], f[:, content].argmax(dim=-1, keepdim=True)
    for seed in range(10):
        move = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)
        for _ in range(5):
            end = (x + 0.5 * move / torch.linalg.vector_norm(move, dim=-1, keepdim=True)).requires_grad_()
            f = network.double(end)
            assert torch.equal(f.argmax(dim=-1, keepdim=True), own)
            gain = f.scatter(-1, own, -torch.inf).amax(dim=-1) - f.gather(-1, own).squeeze(-1)
            (move,) = torch.autograd.grad(gain.sum(), end)


@pytest.mark.parametrize(("temperature", "lipschitz"), [(0.1, 1.0), (10.0, 4.0), (1000.0, 1e-3)])
def test_soft_margin_is_log_of_one_plus_exp_of_what_the_margin_lacks(temperature, lipschitz):
    lacking = 0.5 - ((2 * Y - 1) * F).numpy() / lipschitz
    found = SoftMargin(0.5, temperature, lipschitz)(F, Y).numpy()
    np.testing.assert_allclose(found, np.logaddexp(0, temperature * lacking) / temperature, rtol=1e-11, atol=0)
    above = found - Hinge(0.5, lipschitz)(F, Y).numpy()
    assert (above >= -1e-11).all()
    assert (above <= np.log(2) / temperature + 1e-11).all()  # so it is the hinge loss at T -> infinity


def test_soft_margin_without_a_margin_is_bce():
    torch.testing.assert_close(SoftMargin(0.0, 8.0, 4.0)(F, Y), BCE(2.0, 4.0)(F, Y))


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_hkr_is_the_difference_of_means_and_the_hinge_loss_in_their_shares(alpha):
    for f, y, loss in zip(F, Y, HKR(alpha, 0.3, 4.0)(F, Y).mean(dim=1), strict=True):
        apart = float(f[y == 1].mean() - f[y == 0].mean()) / 4
        lacking = np.maximum(0, 0.3 - ((2 * y - 1) * f).numpy() / 4).mean()
        assert float(loss) == pytest.approx(alpha * lacking - (1 - alpha) * apart, rel=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("temperature", [1e-12, 2.0, 1e12])
def test_soft_hkr_weighs_the_other_classes_by_their_softmax(alpha, temperature):
    found = SoftHKR(alpha, 0.3, temperature, 4.0)(F3, CLASSES)
    for run, point in np.ndindex(3, 40):
        y, z = int(CLASSES[run, point]), (F3[run, point] / 4).tolist()
        others = [z[j] for j in range(3) if j != y]
        weights = {1e-12: [0.5, 0.5], 1e12: [float(other == max(others)) for other in others]}
        shares = weights.get(temperature, scipy.special.softmax(temperature * np.array(others)))
        apart = sum(p * other for p, other in zip(shares, others, strict=True)) - z[y]
        lacking = sum(p * max(0, 0.3 + other) for p, other in zip(shares, others, strict=True)) + max(
            0, 0.3 - z[y]
        )
        expected = ((1 - alpha) * apart + alpha * lacking) / 2
        assert float(found[run, point]) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_soft_hkr_of_two_opposite_outputs_is_their_distance_and_the_hinge_loss():
    expected = 0.75 * Hinge(0.3, 4.0)(F, Y) - 0.25 * (2 * Y - 1) * F / 4
    torch.testing.assert_close(SoftHKR(0.75, 0.3, 5.0, 4.0)(torch.stack([-F, F], dim=-1), Y), expected)


def test_cosine_is_one_minus_the_cosine_between_the_outputs_and_the_axis_of_the_class():
    axes = torch.nn.functional.one_hot(CLASSES.long(), 3).double()
    expected = 1 - torch.nn.functional.cosine_similarity(F3, axes, dim=-1)
    torch.testing.assert_close(Cosine()(F3, CLASSES), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(Cosine()(0 * F3, CLASSES), torch.ones(3, 40, dtype=F3.dtype))


@pytest.mark.parametrize(
    ("radius", "value"),
    [(0.5, 0.0), (0.25, 0.0), (0.125, 0.125), (0.0, 0.25), (-0.25, 0.5), (-1.75, 0.5 * (1 + np.log(4)))],
)
def test_certified_radius_is_a_ramp_that_bends_where_the_radius_is_as_far_on_the_wrong_side(radius, value):
    for lipschitz in (1.0, 0.25, 64.0):
        loss = CertifiedRadius(0.25, lipschitz)
        for y in (0.0, 1.0):
            f = torch.tensor([[(2 * y - 1) * radius * lipschitz]], dtype=torch.float64)
            assert float(loss(f, torch.tensor([[y]]))) == pytest.approx(value, rel=1e-15)


def test_certified_radius_of_several_classes_is_that_of_the_nearest_other_one():
    own, (first, second) = F3[..., 0], (F3[..., 1], F3[..., 2])
    # Half the difference to the larger one, as one output for two classes.
    expected = CertifiedRadius(0.3, 4.0)((own - torch.maximum(first, second)) / 2, torch.ones_like(own))
    torch.testing.assert_close(CertifiedRadius(0.3, 4.0)(F3, torch.zeros_like(own)), expected)


def test_the_mean_of_certified_radius_in_units_of_the_radius_is_at_least_the_share_of_errors():
    errors = ((F > 0) != (Y == 1)).double().mean(dim=1)
    assert (CertifiedRadius(0.3, 4.0)(F, Y).mean(dim=1) / 0.3 >= errors).all()


HUBER = scipy.special.huber


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        *((MSE(lipschitz), lambda e, d=d: e**2 / d) for lipschitz, d in ((1.0, 1), (4.0, 16), (0.25, 0.25))),
        *((MAE(lipschitz), lambda e, d=lipschitz: abs(e) / d) for lipschitz in (1.0, 4.0, 0.25)),
        *(
            (Huber(delta, lipschitz), lambda e, delta=delta, d=d: HUBER(delta, e) / d)
            for delta, lipschitz, d in (
                (1.0, 1.0, 1),
                (1.0, 4.0, 4),
                (8.0, 4.0, 16),
                (0.5, 0.25, 0.125),
                (2, 0.25, 0.25),
            )
        ),
    ],
)
def test_a_loss_of_regression_is_its_function_of_the_error_over_its_divisor_and_the_mean_of_several_targets(
    loss, expected
):
    np.testing.assert_allclose(loss(F, Y).numpy(), expected((F - Y).numpy()), rtol=1e-12)
    np.testing.assert_allclose(loss(F3, Y3).numpy(), expected((F3 - Y3).numpy()).mean(axis=-1), rtol=1e-12)


@pytest.mark.parametrize(
    ("delta", "limit"),
    [(1e6, lambda lipschitz: (MSE(lipschitz), 0.5)), (1e-9, lambda lipschitz: (MAE(lipschitz), 1))],
)
@pytest.mark.parametrize("lipschitz", [1e-6, 1.0, 100.0])
def test_huber_of_a_large_delta_is_half_of_mse_and_of_a_small_one_mae(delta, limit, lipschitz):
    other, factor = limit(lipschitz)
    np.testing.assert_allclose(Huber(delta, lipschitz)(F, Y), factor * other(F, Y), rtol=1e-5)


def test_each_run_of_a_stack_has_arguments_of_its_own(make, loss_option):
    """(K,) tensors give what the numbers give one by one."""
    stacked = copy.deepcopy(make("loss", f"loss={loss_option}"))
    values = {name: float(getattr(stacked, name)) * torch.tensor([0.25, 0.5, 1]) for name in stacked.per_run}
    for name, value in values.items():
        setattr(stacked, name, value)
    for run in range(3):
        single = type(stacked)(**{name: float(value[run]) for name, value in values.items()})
        for f, y in batches(stacked):
            torch.testing.assert_close(stacked(f, y)[run], single(f[[run]], y[[run]])[0])


SUITED = {
    "regression": "absolute_value",
    "transport": "cones",
    "classification": "two_moons",
    "multiclass": "spirals",
}
# Every option, with each task that it is made for.
CASES = [(loss, task) for loss in options("loss") for task in tasks_of(part((f"loss={loss}",)))]
# A temperature is per unit of f, and so is a target: what counts as large depends on L.
OTHERWISE = {"bce", "cross_entropy", "mse", "mae", "huber"}


@pytest.mark.parametrize(("loss", "task"), [case for case in CASES if case[0] not in OTHERWISE])
def test_a_loss_of_distances_trains_in_the_same_way_at_every_l(trained, loss, task):
    """Up to the scale of f. The three layers have norms of 1, 8 and 1/8, which round nothing."""
    runs = tuple(f"seed=0 lipschitz={lipschitz}" for lipschitz in (1, 512, 1 / 512))
    result = trained(f"dataset={SUITED[task]}", f"loss={loss}", "model.depth=2", runs=runs)
    x = torch.from_numpy(np.stack([data.train_x for data in result.stack.data])).double()
    before, after = (
        checkpoint.network.double(x) / torch.tensor([1, 512, 1 / 512]).view(3, 1, 1)
        for checkpoint in (result.seen[0], result.checkpoint)
    )
    assert not torch.allclose(before, after, rtol=0.1)
    torch.testing.assert_close(after[1:], after[:1].expand_as(after[1:]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("lipschitz", [1e-30, 1e-10, 1e-6, 1e6, 1e10, 1e30])
@pytest.mark.parametrize(("loss", "task"), CASES)
def test_every_loss_trains_at_every_l(trained, loss, task, lipschitz):
    """30 steps are enough to use more than half of L, or, where the target is flatter, to shrink the loss."""
    result = trained(f"dataset={SUITED[task]}", f"loss={loss}", runs=(f"seed=0 lipschitz={lipschitz}",))
    data, losses = result.stack.data[0], []
    x, y = (torch.from_numpy(part).double()[None] for part in (data.train_x, data.train_y))
    for checkpoint in (result.seen[0], result.checkpoint):
        f = checkpoint.network.double(x.requires_grad_())
        losses.append(result.stack.loss(squeezed(f), y).mean().item())
    rows = [torch.autograd.grad(output.sum(), x, retain_graph=True)[0] for output in f.unbind(dim=-1)]
    steepest = float(torch.linalg.matrix_norm(torch.stack(rows, dim=-2), ord=2).max())
    assert not result.checkpoint.failures
    share = 0.4 if loss == "cosine" else 0.1  # which asks for no slope, so it can only be seen to shrink
    assert 0.5 * lipschitz < steepest <= lipschitz or losses[1] < share * losses[0]


def test_kantorovich_is_the_difference_of_the_means_however_many_samples_each_class_has():
    for f, y, loss in zip(F, Y, Kantorovich(4.0)(F, Y).mean(dim=1), strict=True):
        assert float(loss) == pytest.approx(-float(f[y == 1].mean() - f[y == 0].mean()) / 4, rel=1e-12)
    assert torch.allclose(difference_of_means(F + 7, Y), difference_of_means(F, Y), atol=1e-12)


def test_a_class_without_samples_has_mean_zero():
    f = torch.tensor([[1.0, 3.0]])
    assert difference_of_means(f, torch.ones_like(f)).item() == 2
    assert difference_of_means(f, torch.zeros_like(f)).item() == -2


def test_a_module_of_torch_takes_several_targets_and_their_mean():
    expected = torch.nn.SmoothL1Loss(reduction="none")(F3, Y3).sum(dim=-1) / 3
    torch.testing.assert_close(as_loss(torch.nn.SmoothL1Loss(reduction="none"), "x")(F3, Y3), expected)


@pytest.mark.parametrize(
    ("n_outputs", "has_classes", "function", "message"),
    [
        (1, True, lambda f, y: (f - y).square(), None),
        (3, True, lambda f, y: f.gather(-1, y.long().unsqueeze(-1)).squeeze(-1), None),
        (3, False, lambda f, y: (f - y).square(), None),
        (3, False, lambda f, y: (f - y).square().amax(dim=-1), None),
        (1, True, torch.nn.MSELoss(), r"must return one number per sample, \(K, B\), not a tensor of shape \(\)"),
        (3, False, torch.nn.MSELoss(), r"must return one number per sample, \(K, B\), not a tensor of shape \(\)"),
        (3, True, lambda f, y: f.square(), r"must return .* shape \(1, 2, 3\)"),
        (3, True, lambda f, y: (f - y).square(), "cannot be used: RuntimeError: .* must match"),
    ],
)
def test_a_function_is_a_loss_if_it_returns_one_number_per_sample_of_the_task(
    n_outputs, has_classes, function, message
):
    with nullcontext() if message is None else pytest.raises(ConfigError, match=f"^loss=mine: {message}"):
        check_loss(as_loss(function, "mine"), "mine", n_outputs, has_classes)


def test_gradients_are_finite_for_outputs_of_any_size(make, loss_option):
    """The law asks it of a user's loss up to some 30 only, which an exponential one can meet."""
    loss = make("loss", f"loss={loss_option}")
    for f, y in batches(loss):
        for outputs in (1e4 * f, (1e4 * f).float(), 0 * f):
            (gradient,) = torch.autograd.grad(loss(outputs.requires_grad_(), y.to(outputs.dtype)).sum(), outputs)
            assert torch.isfinite(gradient).all()
