"""Losses: closed forms, one value a sample, and every run of a stack by its own arguments."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lipexp.config import ConfigError
from lipexp.losses import BCE, MSE, Hinge, Kantorovich, difference_of_means

RUNS, BATCH = 3, 40


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.fixture
def outputs() -> torch.Tensor:
    """(K, B) outputs of both signs and of sizes from 1e-3 to 30."""
    rng = np.random.default_rng(0)
    sizes = 10 ** rng.uniform(-3, 1.5, (RUNS, BATCH))
    return torch.from_numpy(sizes * rng.choice([-1.0, 1.0], (RUNS, BATCH)))


def targets(task: str) -> torch.Tensor:
    rng = np.random.default_rng(1)
    y = rng.integers(0, 2, (RUNS, BATCH)) if task != "regression" else rng.normal(size=(RUNS, BATCH))
    return torch.from_numpy(y.astype(np.float64))


def per_run_values(loss) -> dict[str, torch.Tensor]:
    """A different value for each run, for every argument that may differ between them."""
    return {name: column(0.3, 1.0, 2.5) * (i + 1) for i, name in enumerate(type(loss).per_run)}


def test_a_loss_has_a_task_and_one_value_a_sample(loss_option, make, outputs):
    loss = make("loss", f"loss={loss_option}")
    assert loss.task in ("classification", "regression", "transport")
    values = loss(outputs, targets(loss.task))
    assert values.shape == (RUNS, BATCH)
    assert (values >= 0).all() or loss.task == "transport"


def test_a_sample_does_not_depend_on_the_others(loss_option, make, outputs):
    loss = make("loss", f"loss={loss_option}")
    y = targets(loss.task)
    changed = outputs + 1
    changed[:, 5] = outputs[:, 5]
    assert torch.equal(loss(changed, y)[:, 5], loss(outputs, y)[:, 5])
    if loss.task == "transport":
        return  # what a sample counts depends on how many there are of its class
    whole, part = loss(outputs, y), loss(outputs[:, 5:6], y[:, 5:6])
    # Vectorised and scalar loops of exp and log1p may round differently by an ulp or two.
    torch.testing.assert_close(whole[:, 5:6], part, rtol=1e-14, atol=0)


def test_runs_with_their_own_arguments_equal_single_runs(loss_option, make, outputs):
    kind = type(make("loss", f"loss={loss_option}"))
    arguments = per_run_values(make("loss", f"loss={loss_option}"))
    y = targets(kind.task)
    stacked = kind(**arguments)(outputs, y)
    for run in range(RUNS):
        single = kind(**{name: value[run : run + 1] for name, value in arguments.items()})
        torch.testing.assert_close(stacked[run : run + 1], single(outputs[run : run + 1], y[run : run + 1]))


def test_a_plain_number_is_as_good_as_a_tensor(loss_option, make, outputs):
    """In float64, in which a run is evaluated, 0.3 must be 0.3 and not its float32 neighbour."""
    kind = type(make("loss", f"loss={loss_option}"))
    y = targets(kind.task)
    numbers, tensors = kind(**dict.fromkeys(kind.per_run, 0.3)), kind(**dict.fromkeys(kind.per_run, column(0.3)))
    torch.testing.assert_close(numbers(outputs, y), tensors(outputs, y), rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_finite_at_extreme_outputs(loss_option, make, dtype):
    loss = make("loss", f"loss={loss_option}")
    f = torch.tensor([[-1e4, -1e-30, 0.0, 1e-30, 1e4]], dtype=dtype, requires_grad=True)
    for y in (torch.zeros_like(f), torch.ones_like(f)):
        values = loss(f, y)
        (gradient,) = torch.autograd.grad(values.sum(), f)
        assert values.isfinite().all()
        assert gradient.isfinite().all()


def test_gradients_equal_finite_differences(loss_option, make):
    loss = make("loss", f"loss={loss_option}")
    f = column(-2.3, -0.7, 0.2, 0.9, 3.1).view(1, -1).requires_grad_()
    y = column(0.0, 1.0, 0.0, 1.0, 1.0).view(1, -1)
    assert torch.autograd.gradcheck(lambda f: loss(f, y), (f,))


@pytest.mark.parametrize("temperature", [0.1, 1.0, 7.0, 1000.0])
def test_bce_is_log_of_one_plus_exp_of_minus_the_margin_over_the_temperature(outputs, temperature):
    y = targets("classification")
    margin = ((2 * y - 1) * outputs).numpy()
    expected = np.logaddexp(0, -temperature * margin) / temperature
    found = BCE(column(temperature))(outputs, y).numpy()
    # torch subtracts T f y from T f where numpy does not: an error of some ulps of f, at most 30 here.
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-14)


def test_bce_without_an_opinion_costs_log_two_over_the_temperature():
    value = BCE(4.0)(torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64))
    assert float(value) == pytest.approx(math.log(2) / 4, rel=1e-15)


def test_bce_at_a_large_temperature_is_hinge_without_a_margin(outputs):
    """0 <= log(1 + exp(-T m)) / T - max(0, -m) <= log(2) / T."""
    y, temperature = targets("classification"), 1e5
    gap = BCE(temperature)(outputs, y) - Hinge(margin=0)(outputs, y)
    assert gap.min() >= -1e-14  # both sides are rounded, at a size of at most 30
    assert gap.max() <= math.log(2) / temperature + 1e-14


@pytest.mark.parametrize(
    ("f", "y", "value"),
    [(0.0, 1, 0.5), (0.0, 0, 0.5), (0.25, 1, 0.25), (0.25, 0, 0.75), (0.5, 1, 0.0), (7.0, 1, 0.0), (-2.0, 1, 2.5)],
)
def test_hinge_is_what_is_missing_from_the_margin(f, y, value):
    assert float(Hinge(margin=0.5)(torch.tensor([[f]]), torch.tensor([[float(y)]]))) == value


def test_hinge_measures_outputs_in_units_of_the_lipschitz_constant(outputs):
    y, lipschitz = targets("classification"), column(0.01, 1.0, 100.0)
    one = Hinge(margin=0.5, lipschitz=1.0)(outputs, y)
    scaled = Hinge(margin=0.5, lipschitz=lipschitz)(outputs * lipschitz.view(-1, 1), y)
    torch.testing.assert_close(scaled, one, rtol=1e-14, atol=1e-14)  # f L / L rounds twice, at a size of 30


def test_hinge_costs_nothing_exactly_from_the_margin_on():
    loss, y = Hinge(margin=0.5, lipschitz=4.0), torch.ones(1, 2)
    assert loss(torch.tensor([[2.0, 1.9]]), y).gt(0).tolist() == [[False, True]]


def test_mse_is_the_square_of_the_error(outputs):
    y = targets("regression")
    np.testing.assert_array_equal(MSE()(outputs, y).numpy(), (outputs.numpy() - y.numpy()) ** 2)


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [(BCE, "temperature", 0.0), (Hinge, "margin", -0.1), (Hinge, "lipschitz", 0.0), (Hinge, "margin", math.nan)],
)
def test_a_bad_argument_is_named(kind, name, value):
    with pytest.raises(ConfigError, match=f"^{name}={value}: must be"):
        kind(**{name: value})


def test_kantorovich_is_the_difference_of_the_means_however_many_samples_each_class_has(outputs):
    rng = np.random.default_rng(2)
    for share in (0.1, 0.5, 0.9):
        y = torch.from_numpy((rng.random((RUNS, BATCH)) < share).astype(np.float64))
        y[:, 0], y[:, 1] = 0, 1
        lipschitz = column(0.5, 1.0, 4.0)
        losses = Kantorovich(lipschitz)(outputs, y).mean(dim=1)
        for run in range(RUNS):
            f, ones = outputs[run], y[run] == 1
            difference = f[ones].mean() - f[~ones].mean()
            assert float(losses[run]) == pytest.approx(-float(difference / lipschitz[run]), rel=1e-12)
        assert torch.allclose(difference_of_means(outputs + 7, y), difference_of_means(outputs, y), atol=1e-12)


def test_a_class_without_samples_has_mean_zero():
    f = torch.tensor([[1.0, 3.0]])
    assert difference_of_means(f, torch.ones_like(f)).item() == 2
    assert difference_of_means(f, torch.zeros_like(f)).item() == -2
