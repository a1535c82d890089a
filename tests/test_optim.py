"""Adam over stacked runs equals torch's, run by run."""

from __future__ import annotations

import pytest
import torch
from networks import normal
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR

from lipexp.optim import Adam

SIZE, STEPS = 17, 50
LR, DECAY = torch.tensor([[0.1, 0.01, 0.003], [0.0, 0.1, 1.0]], dtype=torch.float64)
START = normal(len(LR), SIZE)


def gradient_at(parameters):
    """The gradient of a function that is neither linear nor convex; sizes differ by the parameter."""
    return (parameters**3 - 2 * parameters) * torch.logspace(-3, 2, SIZE, dtype=torch.float64)


def trained(optimiser):
    """The parameters (K, P) after all steps of an optimiser of the room."""
    parameters = START.clone()
    optimiser.start(parameters)
    for step in range(STEPS):
        optimiser.step(parameters, gradient_at(parameters), step / STEPS)
    return parameters


def trained_by_torch(start, schedule=None, **arguments):
    """The same by torch.optim.Adam and one of torch's schedules, a function of the optimiser."""
    parameters = start.clone().requires_grad_()
    optimiser = torch.optim.Adam([parameters], **arguments)
    rate = schedule(optimiser) if schedule else None
    for _ in range(STEPS):
        parameters.grad = gradient_at(parameters.detach())
        optimiser.step()
        if rate is not None:
            rate.step()
    return parameters.detach()


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.99), (0.0, 0.5)])
@pytest.mark.parametrize("eps", [1e-8, 0.1])
def test_adam_equals_torchs_run_by_run(betas, eps):
    adam = Adam(betas=betas, eps=eps, schedule="constant")
    adam.lr, adam.weight_decay = LR, DECAY  # as in a stack
    for found, start, lr, decay in zip(trained(adam), START, LR.tolist(), DECAY.tolist(), strict=True):
        expected = trained_by_torch(start, betas=betas, eps=eps, lr=lr, weight_decay=decay)
        # The same formula in another order: 50 steps of float64 rounding on numbers of size 1.
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


SCHEDULES = {
    "cosine": lambda optimiser: CosineAnnealingLR(optimiser, T_max=STEPS),
    "linear": lambda optimiser: LinearLR(optimiser, start_factor=1, end_factor=0, total_iters=STEPS),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_equals_torchs(name):
    expected = trained_by_torch(START, SCHEDULES[name], lr=0.1, betas=(0.9, 0.99))
    # torch's rates are recurrences.
    torch.testing.assert_close(trained(Adam(0.1, schedule=name)), expected, rtol=1e-11, atol=1e-11)
