"""The local Lipschitz constant: over a ball around a point, by branch and bound.

A ball is convex, so that |f(x) - f(x')| <= c ||x - x'||_p there, with c the largest dual norm of a gradient in it.
It may be far below the constant of the whole space, and says nothing of points outside.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from lipexp import record
from lipexp.config import ConfigError
from lipexp.measured.gradients import Maximum
from lipexp.norms import norm_name
from lipexp.proven.branching import Ball, Domain, branch_and_bound, why_not_applicable
from lipexp.proven.methods import OVERFLOW, Problem


def bound_on_ball(problem: Problem, around: Sequence[float], within: float) -> record.LocalInterval:
    """measured <= local constant <= certified on a ball, within the gap and the time of the problem.

    Args:
        problem: with the smallest bound proven everywhere as its `best`.
        around: the centre, (D,).
        within: the radius, in the norm of the problem.

    Raises:
        ConfigError: `around` has another number of inputs, or branch and bound no bound for this network.
    """
    network, chain = problem.network, problem.chain
    if len(around) != network.n_inputs:
        wanted = f"must be {network.n_inputs} numbers, the coordinates of a point"
        raise ConfigError("--around", ",".join(f"{value:g}" for value in around), wanted)
    ball = Ball(torch.tensor(around, dtype=torch.float64), within, chain.p)
    reason = why_not_applicable(network, chain.q, chain.output_p)
    if reason is None:
        domain = Domain(ball.box, chain.q, chain.output_p, ball)
        found = branch_and_bound(
            network, domain, problem.best, Maximum(0.0, ()), problem.gap, problem.seconds, problem.report
        )
        if found.upper < math.inf:
            best = found.best
            return record.LocalInterval(
                around=ball.centre.tolist(),
                within=ball.radius,
                p=norm_name(chain.p),
                q=norm_name(chain.q),
                measured=best.value,
                measured_by=best.by,
                point=list(best.point),
                certified=found.upper if problem.best is None else min(found.upper, problem.best),
            )
        reason = OVERFLOW
    raise ConfigError("--method", "bnb", f"has no bound for this network: {reason}")
