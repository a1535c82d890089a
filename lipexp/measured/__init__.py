"""Lower bounds on the Lipschitz constant: gradients that were seen, and attacks on what is proven."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lipexp.measured.ascent import ascend
from lipexp.measured.gradients import Maximum, Scan, grid, largest, scan
from lipexp.networks import BakedNetwork

Points = dict[str, tuple[Tensor, Tensor]]  # source -> points (K, N, D) and the gradients of f there


def sources(
    network: BakedNetwork,
    x: Tensor,
    scanned: Scan,
    q: float,
    generators: Sequence[torch.Generator],
    effort: int = 1,
) -> Points:
    """Where gradients of K networks are looked at: their data x (K, N, D), a grid over its box, and an ascent.

    Args:
        scanned: of the data.
        generators: the random stream of each run.
        effort: the number of ascents in more than two dimensions.
    """
    found = {"data": (x, scanned.gradient)}
    points = grid(x.amin(dim=1), x.amax(dim=1), generators)
    if points is not None:
        found["grid"] = (points, scan(network, points).gradient)
    points = ascend(network, x, scanned.gradient, q, generators, effort)
    found["search"] = (points, scan(network, points).gradient)
    return found


def steepest(network: BakedNetwork, points: Points, run: int, q: float) -> dict[str, Maximum]:
    """The largest confirmed ||grad f||_q of each source for one of the networks, K = 1; some show none."""
    found = {source: largest(network, at[run], gradients[run], q) for source, (at, gradients) in points.items()}
    return {source: maximum for source, maximum in found.items() if maximum is not None}


def overall(by: dict[str, Maximum]) -> Maximum:
    """The largest of all sources; 0, which bounds anything, where every point lies on a breakpoint."""
    return max(by.values(), key=lambda found: found.value, default=Maximum(0.0, ()))
