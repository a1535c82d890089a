"""Lower bounds on the Lipschitz constant: gradients that were seen, and attacks on what is proven."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lipexp.blocks import Affine
from lipexp.measured.ascent import ascend
from lipexp.measured.gradients import Maximum, Points, Scan, grid, largest, operator_norms, scan
from lipexp.networks import BakedNetwork


def sources(
    network: BakedNetwork,
    x: Tensor,
    scanned: Scan,
    q: float,
    generators: Sequence[torch.Generator],
    effort: int = 1,
    h: float = math.inf,
) -> Points:
    """Where gradients of K networks are looked at: their data x (K, N, D), a grid over its box, and an ascent.

    Args:
        scanned: of the data.
        generators: the random stream of each run.
        effort: the number of ascents in more than two dimensions.
        q, h: the norms in which several outputs are measured, see `gradients.operator_norms`.
    """
    found = {"data": (x, scanned.gradient)}
    points = grid(x.amin(dim=1), x.amax(dim=1), generators)
    if points is not None:
        found["grid"] = (points, scan(network, points).gradient)
    along = directions(scanned.gradient, q, h)
    climbed = (along.unsqueeze(1) @ scanned.gradient).squeeze(2)  # (K, N, D)
    points = ascend(combined(network, along), x, climbed, q, generators, effort)
    found["search"] = (points, scan(network, points).gradient)
    return found


def directions(gradients: Tensor, q: float, h: float) -> Tensor:
    """(K, 1, C) the combination u of the outputs whose gradient is as long as the steepest Jacobian of each run.

    At the steepest point that is the steepest row, u = e_c, for h = 2 the leading left singular vector, and for
    h = 1 the signs of the longest column.

    Args:
        gradients: (K, N, C, D) at the data.
    """
    runs = torch.arange(len(gradients))
    steepest = operator_norms(gradients, q, h).nan_to_num(nan=-1, posinf=-1).argmax(dim=1)
    jacobians = gradients[runs, steepest].nan_to_num(nan=0, posinf=0, neginf=0)  # (K, C, D)
    if math.isinf(h):
        rows = torch.linalg.vector_norm(jacobians, ord=q, dim=2).argmax(dim=1)
        return torch.nn.functional.one_hot(rows, jacobians.shape[1]).to(gradients).unsqueeze(1)
    if h == 1:
        columns = jacobians.abs().sum(dim=1).argmax(dim=1)
        return jacobians[torch.arange(len(jacobians)), :, columns].sgn().unsqueeze(1)
    return torch.linalg.svd(jacobians, full_matrices=False).U[:, :, :1].mT


def combined(network: BakedNetwork, along: Tensor) -> BakedNetwork:
    """The networks u^T f of one output, for u (K, 1, C), in float64."""
    if network.n_outputs == 1:
        return network
    double = replace(network.double, norms=())
    *hidden, last = double.layers
    if last.is_residual:  # no activation stands behind it
        added = Affine(along, along.new_zeros(len(along), 1, 1))
        return replace(double, layers=[*hidden, last, added], acts=[*double.acts, double.acts[-1]])
    return replace(double, layers=[*hidden, Affine(along @ last.weight, last.bias @ along.mT)])


def steepest(network: BakedNetwork, points: Points, run: int, q: float, h: float = math.inf) -> dict[str, Maximum]:
    """The largest confirmed norm of a Jacobian of each source for one of the networks, K = 1; some show none."""
    found = {source: largest(network, at[run], gradients[run], q, h) for source, (at, gradients) in points.items()}
    return {source: maximum for source, maximum in found.items() if maximum is not None}


def overall(by: dict[str, Maximum]) -> Maximum:
    """The largest of all sources; 0, which bounds anything, where every point lies on a breakpoint."""
    return max(by.values(), key=lambda found: found.value, default=Maximum(0.0, ()))
