"""The laws of whole runs: stacked runs equal single ones, and what is measured is below what is proven."""

from __future__ import annotations

from contextlib import suppress

import torch

from lipexp.config import ConfigError
from lipexp.evaluate import Evaluator
from lipexp.laws.subject import Broken, Law, Subject
from lipexp.measured.gradients import scan
from lipexp.members import stack

ODD_WIDTH = 13  # at which matrix products are computed in another way than at 8


def stacked_runs_equal_single_ones(subject: Subject) -> str | None:
    """A run has the same losses alone and in a stack: to 1e-9 over 60 steps in float64, to 1e-4 over 5 in float32.

    They are compared in units of the largest loss. In float32 later steps may differ: where gradients cancel, Adam
    turns their rounding errors into full steps.
    """
    cases = [(subject, torch.float32, 5, 1e-4), (subject, torch.float64, 60, 1e-9)]
    with suppress(ConfigError):  # the activation does not take that width
        odd = Subject(subject.content, subject.choices, ODD_WIDTH)
        cases += [(odd, torch.float64, 60, 1e-9)] if odd.width == ODD_WIDTH else []
    for one, dtype, steps, tolerance in cases:
        members = one.variants(3)
        together = one.losses(members, steps, dtype)
        for run in (0, 2):
            alone = one.losses([members[run]], steps, dtype)[:, 0]
            wrong = ~((alone - together[:, run]).abs() <= tolerance * together[:, run].abs().max())
            if wrong.any():
                step = int(wrong.nonzero()[0])
                raise Broken(
                    f"run {run} at step {step} in {dtype}: {float(alone[step]):.9g} alone, "
                    f"{float(together[step, run]):.9g} in the stack"
                )
    return None


def measured_is_below_proven(subject: Subject) -> str | None:
    """After training, measured <= certified <= L."""
    members = subject.variants(2)
    runs = stack(members)
    for run, found in enumerate(Evaluator(runs).final(subject.trained(members))):
        if found is None:
            raise Broken(f"run {run} has numbers that are not finite")
        interval = found.certificate.interval(found.measured)
        if interval.verdict == "FAIL":
            raise Broken(
                f"run {run}: measured {interval.measured}, certified {interval.certified}, L = {interval.target}"
            )
    return None


def measured_gradients_are_slopes(subject: Subject) -> str | None:
    """Measured gradients agree with finite differences, except at breakpoints."""
    network = subject.network
    x = subject.points[:100].expand(2, -1, -1)
    scanned = scan(network, x)
    direction = subject.normal(*x.shape)
    step = 1e-7
    difference = (scan(network, x + step * direction).f - scan(network, x - step * direction).f) / (2 * step)
    off = (difference - (scanned.gradient @ direction.unsqueeze(-1)).squeeze(-1)).abs()
    scale = scanned.gradient.abs().amax(dim=(1, 2, 3)).view(-1, 1, 1)
    if (off > 1e-4 * scale + 1e-7).double().mean() > 0.05:
        raise Broken(f"they differ by up to {float(off.max()):.3g}")
    return None


RUN_LAWS: tuple[Law, ...] = (
    stacked_runs_equal_single_ones,
    measured_is_below_proven,
    measured_gradients_are_slopes,
)
