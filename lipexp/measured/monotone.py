"""Attempts to refute that a network is monotone: the flattest slopes that are seen, and pairs of points.

Shapes: N points, D inputs, of one network of one output, K = 1, in float64.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lipexp import record
from lipexp.measured.gradients import Points
from lipexp.networks import BakedNetwork
from lipexp.norms import product_bound
from lipexp.proven.rounding import evaluate


def assess(
    network: BakedNetwork, points: Points, run: int, signs: Tensor, monotone: Mapping[str, int]
) -> record.Monotone:
    """What is known of the directions of f = h + c s^T x, for one of the networks.

    It is monotone if |dh/dx_k| <= c for the layers h, and the product of their norms bounds every derivative. A
    stored linear term may be another one than c s^T, so c is the smallest of its slopes in these directions.

    Args:
        points: where gradients were looked at.
        signs: (D,) s.
        monotone: the same by the names of the features.
    """
    assert network.linear is not None
    chosen = signs.nonzero()[:, 0]
    slope = float((network.linear[0, 0, chosen] * signs[chosen]).min())
    layers = product_bound(norm for (norm,) in network.norms)
    smallest = min(
        float((gradients[run, :, 0, chosen] * signs[chosen].double()).min()) for _, gradients in points.values()
    )
    return record.Monotone(dict(monotone), slope, layers, smallest, proven=layers <= slope)


def violations(
    network: BakedNetwork, box: tuple[Tensor, Tensor], signs: Tensor, generator: torch.Generator, pairs: int
) -> int:
    """The number of random pairs x, x' on which f certainly has the wrong order.

    x is uniform in the box. x' = x + s t with a random length t, up to the side of the box, for one of the inputs
    that have a sign s, and in every other pair for all of them. Certainly: by more than the rounding errors.

    Args:
        box: low and high (D,).
    """
    low, high = box
    x = torch.lerp(low, high, torch.rand(pairs, len(low), generator=generator, dtype=torch.float64))
    chosen = signs.nonzero()[:, 0]
    moved = torch.zeros_like(x)
    moved[1::2, chosen] = 1
    one = chosen[torch.randint(len(chosen), (pairs,), generator=generator)]
    moved[torch.arange(pairs), one] = 1
    move = moved * signs * (high - low) * torch.rand(x.shape, generator=generator, dtype=torch.float64)
    (before, error), (after, further) = (evaluate(network, points) for points in (x, x + move))
    return int((before - error > after + further).sum())
