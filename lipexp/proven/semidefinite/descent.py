"""Multipliers of large networks: a first-order barrier method on `recursion`.

It minimises log L - mu sum log det(I - r^2 N^-1 R P R^T) over the logarithms of the multipliers by Adam, for a mu
that falls: without the barrier, steps run into the boundary of what is feasible and stay there. A step takes a few
products of matrices of the width of a layer for each stage, where the interior-point method takes those of the
size of the whole network. Of the optimum, which is the same, some per cent are missing after 200 steps.

Reference: Kingma and Ba 2015, "Adam: a method for stochastic optimization" (arXiv 1412.6980).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from lipexp.inequality import Array
from lipexp.proven.semidefinite.recursion import Maps
from lipexp.proven.semidefinite.stages import Stages

STEPS = 200
RATE = 0.2  # of the logarithms, which falls to 0 over the second half
BARRIER = (1e-2, 1e-4)  # mu at the start and at the end
RECOVERY = 1.05  # by which it grows again at every step that is feasible
INWARD = 0.03  # by how much more the logarithms start lower at each stage, away from the boundary
DECAYS = (0.9, 0.99)


Found = tuple[Tensor, Tensor]  # log L, and the sum of the log det


def descend(stages: Stages, start: Array, enough: float, seconds: float) -> Array:
    """Multipliers (P,) of a small L; where nothing better is found, `start`.

    Args:
        start: feasible multipliers.
        enough: stop at this 1 / L^2.
        seconds: stop after this time, to which the schedule is adapted.
    """
    begun, evaluated, kept = time.monotonic(), objective(stages), torch.from_numpy(start).log()
    depths = [np.full(Maps.of(stage, 0).n_multipliers, k) for k, stage in enumerate(stages.hidden)]
    logs = (kept - INWARD * torch.from_numpy(np.concatenate(depths))).requires_grad_()
    best, last, rate, adam = _value(evaluated(kept)), logs.detach().clone(), RATE, Adam(logs)
    for step in range(STEPS):
        done = max(step / STEPS, (time.monotonic() - begun) / seconds)
        if done >= 1 or best <= -math.log(enough) / 2:
            break
        found = evaluated(logs)
        if found is None or not math.isfinite(_value(found)):  # back to where it was, with smaller steps
            rate, adam = rate / 2, Adam(logs)
            logs.data.copy_(last)
            continue
        last.copy_(logs.data)
        rate = min(RATE, RECOVERY * rate)
        if _value(found) < best:
            best, kept = _value(found), logs.detach().clone()
        barrier = BARRIER[0] ** (1 - done) * BARRIER[1] ** done
        (gradient,) = torch.autograd.grad(found[0] - barrier * found[1], logs)
        logs.data.sub_(rate * min(1.0, 2 - 2 * done) * adam.direction(gradient))
    return kept.exp().numpy()


def objective(stages: Stages) -> Callable[[Tensor], Found | None]:
    """log L and the sum of the log det as functions of the logarithms of the multipliers; None: not feasible."""
    maps = [Maps.of(stage, stages.n_beside) for stage in stages.hidden]
    sizes = [each.n_multipliers for each in maps]
    out, eye = torch.from_numpy(stages.last), torch.eye(stages.n_inputs, dtype=torch.float64)
    if stages.linear is not None:
        out, eye = torch.cat([out, torch.from_numpy(stages.linear)], dim=1), eye.tile(2, 2)

    def evaluated(logs: Tensor) -> Found | None:
        p, room = eye, logs.new_zeros(())
        for each, log in zip(maps, logs.split(sizes), strict=True):
            found = each.next(p, 0.5 / (log[each.multiplier].exp() * each.factor))
            if found is None:
                return None
            p, room = found[0], room + found[1]
        return torch.linalg.eigvalsh(out @ p @ out.T)[-1].log() / 2, room

    return evaluated


class Adam:
    """The direction that Adam takes."""

    def __init__(self, parameters: Tensor) -> None:
        self.first, self.second = (torch.zeros_like(parameters) for _ in range(2))
        self.steps = 0

    def direction(self, gradient: Tensor) -> Tensor:
        self.steps += 1
        for moment, power, decay in zip((self.first, self.second), (1, 2), DECAYS, strict=True):
            moment.lerp_(gradient**power, 1 - decay)
        first, second = (
            moment / (1 - decay**self.steps)
            for moment, decay in zip((self.first, self.second), DECAYS, strict=True)
        )
        return first / (second.sqrt() + 1e-12)


def _value(found: Found | None) -> float:
    return math.inf if found is None else float(found[0].detach())
