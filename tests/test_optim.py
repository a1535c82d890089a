"""Optimisers over stacked runs equal torch's, run by run, or a recurrence in plain Python."""

from __future__ import annotations

import pytest
import torch
from networks import normal
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, MultiStepLR, OneCycleLR

from lipexp.optim import SGD, Adam, AdamW, AggMo

SIZE, STEPS = 17, 50
LR, DECAY = torch.tensor([[0.1, 0.01, 0.003], [0.0, 0.1, 1.0]], dtype=torch.float64)
START = normal(len(LR), SIZE)


def gradient_at(parameters):
    """The gradient of a function that is neither linear nor convex; sizes differ by the parameter."""
    return (parameters**3 - 2 * parameters) * torch.logspace(-3, 2, SIZE, dtype=torch.float64)


def trained(optimiser, **stacked):
    """The parameters (K, P) after all steps of an optimiser of the room, with these arguments as in a stack."""
    for name, value in stacked.items():
        setattr(optimiser, name, value)
    parameters = START.clone()
    optimiser.start(parameters)
    for step in range(STEPS):
        optimiser.step(parameters, gradient_at(parameters), step / STEPS)
    return parameters


def trained_by_torch(start, kind=torch.optim.Adam, schedule=None, clip=None, **arguments):
    """The same by one of torch's optimisers and one of its schedules, a function of the optimiser."""
    parameters = start.clone().requires_grad_()
    optimiser = kind([parameters], **arguments)
    rate = schedule(optimiser) if schedule else None
    for _ in range(STEPS):
        parameters.grad = gradient_at(parameters.detach())
        if clip is not None:
            torch.nn.utils.clip_grad_norm_([parameters], clip)
        optimiser.step()
        if rate is not None:
            rate.step()
    return parameters.detach()


# The same formula in another order: 50 steps of float64 rounding on numbers of size 1.
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.99), (0.0, 0.5)])
@pytest.mark.parametrize("eps", [1e-8, 0.1])
@pytest.mark.parametrize(("kind", "by_torch"), [(Adam, torch.optim.Adam), (AdamW, torch.optim.AdamW)])
def test_adam_and_adamw_equal_torchs_run_by_run(kind, by_torch, betas, eps):
    optimiser = kind(betas=betas, eps=eps, schedule="constant")
    found = trained(optimiser, lr=LR, weight_decay=DECAY)
    for end, start, lr, decay in zip(found, START, LR.tolist(), DECAY.tolist(), strict=True):
        expected = trained_by_torch(start, by_torch, betas=betas, eps=eps, lr=lr, weight_decay=decay)
        torch.testing.assert_close(end, expected, **CLOSE)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_equals_torchs_run_by_run(nesterov):
    rates, momenta = LR / 100, torch.tensor([0.9, 0.5, 0.99], dtype=torch.float64)
    optimiser = SGD(nesterov=nesterov, schedule="constant")
    found = trained(optimiser, lr=rates, weight_decay=DECAY, momentum=momenta)
    for run, (lr, decay, momentum) in enumerate(torch.stack([rates, DECAY, momenta], dim=1).tolist()):
        arguments = {"lr": lr, "weight_decay": decay, "momentum": momentum, "nesterov": nesterov}
        torch.testing.assert_close(found[run], trained_by_torch(START[run], torch.optim.SGD, **arguments), **CLOSE)


def test_plain_gradient_descent_has_no_momentum():
    expected = trained_by_torch(START, torch.optim.SGD, lr=0.001)
    torch.testing.assert_close(trained(SGD(0.001, momentum=0, schedule="constant")), expected, **CLOSE)


@pytest.mark.parametrize("betas", [(0.0, 0.9, 0.99), (0.5,)])
def test_aggmo_is_its_recurrence_in_each_number(betas):
    found = trained(AggMo(betas=betas, schedule="linear"), lr=LR / 100, weight_decay=DECAY)
    factors = torch.logspace(-3, 2, SIZE, dtype=torch.float64).tolist()
    for run, (lr, decay) in enumerate(zip((LR / 100).tolist(), DECAY.tolist(), strict=True)):
        for place, (p, factor) in enumerate(zip(START[run].tolist(), factors, strict=True)):
            velocities = [0.0] * len(betas)
            for step in range(STEPS):
                slope = (p**3 - 2 * p) * factor + decay * p
                velocities = [beta * v - slope for beta, v in zip(betas, velocities, strict=True)]
                p += lr * (1 - step / STEPS) / len(betas) * sum(velocities)
            assert float(found[run, place]) == pytest.approx(p, rel=1e-12, abs=1e-12)


def test_aggmo_of_one_momentum_is_sgd():
    torch.testing.assert_close(trained(AggMo(0.001, betas=[0.9])), trained(SGD(0.001, momentum=0.9)), **CLOSE)


SCHEDULES = {
    "cosine": lambda optimiser: CosineAnnealingLR(optimiser, T_max=STEPS),
    "linear": lambda optimiser: LinearLR(optimiser, start_factor=1, end_factor=0, total_iters=STEPS),
    "constant": None,
    "milestones": lambda optimiser: MultiStepLR(optimiser, [15, 30], gamma=0.1),  # of 50 steps: 0.3 and 0.6
    # torch's is at its largest one step before `pct_start`, and ends with its last step instead of behind it.
    "one_cycle": lambda optimiser: OneCycleLR(
        optimiser,
        optimiser.param_groups[0]["lr"],
        total_steps=STEPS + 1,
        pct_start=(0.3 * STEPS + 1) / (STEPS + 1),
        cycle_momentum=False,
    ),
}
KINDS = [
    (Adam, torch.optim.Adam, {"lr": 0.1, "betas": (0.9, 0.99)}),
    (AdamW, torch.optim.AdamW, {"lr": 0.1, "betas": (0.9, 0.99), "weight_decay": 0.3}),
    (SGD, torch.optim.SGD, {"lr": 0.001, "momentum": 0.5, "weight_decay": 0.3}),
]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("kind", "by_torch", "own"), KINDS)
def test_a_schedule_equals_torchs(kind, by_torch, own, name):
    expected = trained_by_torch(START, by_torch, SCHEDULES[name], **own)
    # torch's rates are recurrences.
    torch.testing.assert_close(trained(kind(schedule=name, **own)), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("kind", "by_torch", "own"), KINDS)
def test_the_gradient_of_each_run_is_clipped_as_by_torch(kind, by_torch, own):
    clips = [0.5, 20.0, 1e6]
    found = trained(kind(clip=1, schedule="constant", **own), clip=torch.tensor(clips, dtype=torch.float64))
    for end, start, clip in zip(found, START, clips, strict=True):
        torch.testing.assert_close(end, trained_by_torch(start, by_torch, clip=clip, **own), **CLOSE)
    assert not torch.allclose(found[:2], trained(kind(schedule="constant", **own))[:2])
