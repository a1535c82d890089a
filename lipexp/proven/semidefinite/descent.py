"""Multipliers of large networks: a first-order barrier method on `recursion`.

It minimises log L - mu sum log det(I - r^2 N^-1 R P R^T) over the logarithms of the multipliers by Adam, for a mu
that falls: without the barrier, steps run into the boundary of what is feasible and stay there. A step takes a few
products of matrices of the width of a layer for each stage, where the interior-point method takes those of the
size of the whole network. It has the optimum of the same problem, but comes near to it only slowly: some
0.1 % after 200 steps, 10 % after 50.

Reference: Kingma and Ba 2015, "Adam: a method for stochastic optimization" (arXiv 1412.6980).
"""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from lipexp.inequality import Array
from lipexp.proven.semidefinite.recursion import Maps
from lipexp.proven.semidefinite.stages import Stages

STEPS = 200
RATE = 0.2  # of the logarithms, which falls to 0 over the second half
BARRIER = (1e-2, 1e-4)  # mu at the start and at the end
INWARD = 0.03  # by how much more the logarithms start lower at each stage, away from the boundary
DECAYS = (0.9, 0.99)


def descend(stages: Stages, start: Array, enough: float, seconds: float) -> Array:
    """Multipliers (P,) of a small L; where nothing better is found, `start`.

    Args:
        start: feasible multipliers.
        enough: stop at this 1 / L^2.
        seconds: stop after this time, to which the schedule is adapted.
    """
    maps = [Maps.of(stage, stages.n_beside) for stage in stages.hidden]
    sizes = [each.n_multipliers for each in maps]
    out = torch.from_numpy(stages.last)
    if stages.linear is not None:
        out = torch.cat([out, torch.from_numpy(stages.linear)], dim=1)
    eye = torch.eye(stages.n_inputs, dtype=torch.float64)
    eye = eye.tile(2, 2) if stages.linear is not None else eye

    def evaluated(logs: Tensor) -> tuple[Tensor, Tensor] | None:
        """log L, and the sum of the log det; None: not feasible."""
        p, room = eye, logs.new_zeros(())
        for each, log in zip(maps, logs.split(sizes), strict=True):
            t = log[each.multiplier].exp() * each.factor
            found = each.next(p, 0.5 / t)
            if found is None:
                return None
            p, room = found[0], room + found[1]
        return torch.linalg.eigvalsh(out @ p @ out.T)[-1].log() / 2, room

    origin = torch.from_numpy(start)
    depths = torch.cat([torch.full((n,), float(k)).double() for k, n in enumerate(sizes)])
    logs = (origin.log() - INWARD * depths).requires_grad_()
    best, kept = _value(evaluated(origin.log())), origin.log()
    first, second, since, rate = torch.zeros_like(logs), torch.zeros_like(logs), 0, RATE
    begun = time.monotonic()
    last_good = logs.detach().clone()
    for step in range(STEPS):
        done = max(step / STEPS, (time.monotonic() - begun) / seconds)
        found = evaluated(logs)
        if done >= 1 or best <= -math.log(enough) / 2:
            break
        if found is None or not math.isfinite(_value(found)):
            rate, since = rate / 2, 0
            first.zero_(), second.zero_()
            logs.data.copy_(last_good)
            continue
        last_good.copy_(logs.data)
        if (value := _value(found)) < best:
            best, kept = value, logs.detach().clone()
        mu = BARRIER[0] ** (1 - done) * BARRIER[1] ** done
        (gradient,) = torch.autograd.grad(found[0] - mu * found[1], logs)
        since += 1
        first.lerp_(gradient, 1 - DECAYS[0])
        second.lerp_(gradient.square(), 1 - DECAYS[1])
        scale = (second / (1 - DECAYS[1] ** since)).sqrt() + 1e-12
        logs.data.sub_(rate * min(1.0, 2 - 2 * done) / (1 - DECAYS[0] ** since) * first / scale)
    return kept.exp().numpy()


def _value(found: tuple[Tensor, Tensor] | None) -> float:
    return math.inf if found is None else float(found[0].detach())
