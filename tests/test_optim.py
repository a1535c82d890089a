"""Adam over stacked runs equals torch's, run by run."""

from __future__ import annotations

import math

import pytest
import torch

from lipexp.config import ConfigError
from lipexp.optim import SCHEDULES, Adam

RUNS, SIZE, STEPS = 3, 17, 50
LR = torch.tensor([0.1, 0.01, 0.003], dtype=torch.float64)
DECAY = torch.tensor([0.0, 0.1, 1.0], dtype=torch.float64)


def start(seed: int = 0) -> torch.Tensor:
    return torch.randn(RUNS, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gradient_at(parameters: torch.Tensor) -> torch.Tensor:
    """The gradient of a function that is neither linear nor convex; sizes differ by the parameter."""
    return (parameters**3 - 2 * parameters) * torch.logspace(-3, 2, SIZE, dtype=torch.float64)


def trained(optimiser, parameters: torch.Tensor, progress=lambda step: step / STEPS) -> torch.Tensor:
    """The parameters after all steps of an optimiser of the room."""
    parameters = parameters.clone()
    optimiser.start(parameters)
    for step in range(STEPS):
        optimiser.step(parameters, gradient_at(parameters), progress(step))
    return parameters


def trained_by_torch(parameters: torch.Tensor, **arguments) -> torch.Tensor:
    parameters = parameters.clone().requires_grad_()
    optimiser = torch.optim.Adam([parameters], **arguments)
    for _ in range(STEPS):
        parameters.grad = gradient_at(parameters.detach())
        optimiser.step()
    return parameters.detach()


def test_runs_with_their_own_arguments_equal_single_runs(optim_option, make):
    kind = type(make("optim", f"optim={optim_option}"))
    arguments = {"lr": LR, "weight_decay": DECAY}
    assert set(kind.per_run) == set(arguments)
    together = trained(kind(**arguments), start())
    for run in range(RUNS):
        own = kind(**{name: value[run : run + 1] for name, value in arguments.items()})
        alone = trained(own, start()[run : run + 1])
        torch.testing.assert_close(together[run : run + 1], alone, rtol=1e-12, atol=1e-12)  # 50 steps in float64


def test_a_plain_number_is_as_good_as_a_tensor(optim_option, make):
    kind = type(make("optim", f"optim={optim_option}"))
    numbers = trained(kind(**dict.fromkeys(kind.per_run, 0.01)), start())
    tensors = trained(kind(**dict.fromkeys(kind.per_run, LR[1:2])), start())
    torch.testing.assert_close(numbers, tensors, rtol=1e-12, atol=1e-12)


def test_an_optimiser_finds_the_minimum_of_a_bowl(optim_option, make):
    optimiser = make("optim", f"optim={optim_option}", "optim.lr=0.1")
    parameters = start()
    optimiser.start(parameters)
    for step in range(300):
        optimiser.step(parameters, parameters - 1, step / 300)
    assert (parameters - 1).abs().max() < 0.01


def test_start_forgets_the_run_before(optim_option, make):
    optimiser = make("optim", f"optim={optim_option}")
    first, second = trained(optimiser, start()), trained(optimiser, start())
    assert torch.equal(first, second)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.99), (0.0, 0.5)])
@pytest.mark.parametrize("run", range(RUNS))
def test_adam_equals_torchs_run_by_run(betas, run):
    together = trained(Adam(LR, betas, weight_decay=DECAY, schedule="constant"), start())
    expected = trained_by_torch(start()[run], lr=float(LR[run]), betas=betas, weight_decay=float(DECAY[run]))
    # The same formula in another order: 50 steps of float64 rounding on numbers of size 1.
    torch.testing.assert_close(together[run], expected, rtol=1e-12, atol=1e-12)


def test_adams_eps_counts_as_torchs_does():
    together = trained(Adam(LR, eps=0.1, schedule="constant"), start())
    expected = torch.stack(
        [trained_by_torch(start()[run], lr=float(LR[run]), betas=(0.9, 0.99), eps=0.1) for run in range(RUNS)]
    )
    torch.testing.assert_close(together, expected, rtol=1e-12, atol=1e-12)


def test_a_schedule_equals_torch_with_its_learning_rate_set_step_by_step():
    found = trained(Adam(LR[:1], schedule="cosine"), start()[:1])
    parameters = start()[:1].requires_grad_()
    optimiser = torch.optim.Adam([parameters], lr=float(LR[0]), betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=STEPS)
    for _ in range(STEPS):
        parameters.grad = gradient_at(parameters.detach())
        optimiser.step()
        schedule.step()
    torch.testing.assert_close(found, parameters.detach(), rtol=1e-11, atol=1e-11)  # torch's rate is a recurrence


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        ("cosine", {0: 1, 0.25: (1 + math.sqrt(0.5)) / 2, 0.5: 0.5, 1: 0}),
        ("linear", {0: 1, 0.25: 0.75, 0.5: 0.5, 1: 0}),
        ("constant", {0: 1, 0.25: 1, 0.5: 1, 1: 1}),
    ],
)
def test_a_schedule_has_its_values(schedule, values):
    assert [SCHEDULES[schedule](progress) for progress in values] == pytest.approx(
        list(values.values()), abs=1e-15
    )


def test_every_schedule_is_accepted_and_scales_the_step():
    for name, rate in SCHEDULES.items():
        parameters = torch.zeros(1, 1, dtype=torch.float64)
        optimiser = Adam(LR[1:2], schedule=name)
        optimiser.start(parameters)
        optimiser.step(parameters, torch.ones_like(parameters), 0.3)
        assert float(parameters) == pytest.approx(-0.01 * rate(0.3), rel=1e-7)  # Adam's first step has size lr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": 0}, "lr=0: must be a finite number above 0"),
        ({"eps": 0}, "eps=0: must be a finite number above 0"),
        ({"weight_decay": -1}, "weight_decay=-1: must be a finite number, at least 0"),
        ({"betas": [0.9]}, r"betas=\[0.9\]: must be two numbers in \[0, 1\)"),
        ({"betas": [0.9, 1.0]}, r"betas=\[0.9, 1.0\]: must be two numbers in \[0, 1\)"),
        ({"betas": [-0.1, 0.9]}, r"betas=\[-0.1, 0.9\]: must be two numbers in \[0, 1\)"),
        ({"betas": 0.9}, r"betas=0.9: must be two numbers in \[0, 1\)"),
        ({"betas": ["a", "b"]}, "must be two numbers"),
        ({"schedule": "cosin"}, "schedule=cosin: no such option; did you mean"),
    ],
    ids=lambda value: "=".join(map(str, *value.items())) if isinstance(value, dict) else "",
)
def test_a_bad_argument_is_named(arguments, message):
    with pytest.raises(ConfigError, match=message):
        Adam(**arguments)
