"""Branch and bound: an upper bound on the norm of the Jacobian over a box, or a ball, of up to six dimensions.

On a small box most breakpoints are out of reach and other slopes hardly vary, so that interval arithmetic bounds
the Jacobian, see `jacobians`. A box whose bound is too large is halved; one that few breakpoints cross is settled
at once by all combinations of their sides. Boxes that lie outside of the ball are left out.

All of it is float64 arithmetic whose rounding errors are added to the radii, so the bound is proven. It holds over
the box or the ball only, which are convex: there it bounds the Lipschitz constant.

Reference: Jordan and Dimakis 2020, "Exactly computing the local Lipschitz constant of ReLU networks".
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lipexp import jacobians
from lipexp.jacobians import UNDERFLOW, UP, Hidden, IntervalNetwork, Jacobian, Sides
from lipexp.measured.gradients import Maximum, largest, operator_norms, scan
from lipexp.networks import BakedNetwork
from lipexp.norms import UNIT_ROUNDOFF, dual

DIMS = 6  # in more, boxes are too many
LEAF = 8  # breakpoints whose sides are combined
BATCH = 512  # boxes that are bounded together, or fewer where the network is wide
AT_MOST = 8  # times so many are halved in one round
MOST_BOXES = 2_000_000
SQUARED = 13  # times, of a Gram matrix: n^(1 / 2^15) < 1.0001 for n <= 6
_CHUNK = 2**21  # numbers in one temporary array
_UNDERFLOW = 2.0**-500  # is added to every norm, and covers the squares that underflow


class Found(NamedTuple):
    """The interval that a search has reached."""

    upper: float
    best: Maximum  # the steepest point seen
    boxes: int  # that were bounded


class Ball(NamedTuple):
    """All x with ||x - centre||_p <= radius."""

    centre: Tensor  # (D,) float64
    radius: float
    p: float

    @property
    def box(self) -> tuple[Tensor, Tensor]:
        """The smallest box around it, rounded outwards."""
        low, high = self.centre - self.radius, self.centre + self.radius
        infinite = torch.full_like(low, math.inf)
        return torch.nextafter(low, -infinite), torch.nextafter(high, infinite)

    def misses(self, low: Tensor, high: Tensor) -> Tensor:
        """(P,) whether boxes surely lie outside."""
        apart = torch.maximum(low - self.centre, self.centre - high).clamp_min(0)
        return torch.linalg.vector_norm(apart, ord=self.p, dim=1) > self.radius * UP + UNDERFLOW

    def holds(self, points: Tensor) -> Tensor:
        """(P,) whether points surely lie inside."""
        return torch.linalg.vector_norm(points - self.centre, ord=self.p, dim=1) * UP + UNDERFLOW <= self.radius


class Domain(NamedTuple):
    """Where a constant is looked for, and the norms of its Jacobians."""

    box: tuple[Tensor, Tensor]  # low and high, (D,)
    q: float
    h: float = math.inf  # the norm of several outputs
    ball: Ball | None = None  # within the box: what lies outside does not count


def why_not_applicable(network: BakedNetwork, q: float = 2.0, h: float = math.inf) -> str | None:
    """Why the search is not for this network; None if it is."""
    if network.n_inputs > DIMS:
        return f"is for {DIMS} inputs or fewer"
    if network.n_outputs > 1 and not (math.isinf(h) or (h == 1 and math.isinf(q)) or q == h == 2):
        return f"knows no norm of several outputs from the {dual(q):g}-norm to the {h:g}-norm"
    label = jacobians.why_not_applicable(network)
    return None if label is None else f"is not for {label}"


def branch_and_bound(
    network: BakedNetwork,
    domain: Domain,
    root: float | None,
    best: Maximum,
    gap: float,
    seconds: float,
    report: Callable[[str], None] | None = None,
) -> Found:
    """Halve boxes until upper / lower - 1 <= gap, or the time is over.

    `upper` is the largest bound of all boxes, `lower` the norm of the Jacobian at the steepest point seen. A box
    in which no slope varies is done, whatever its bound, since its halves would have the same; so is one whose
    bound is nothing but the allowance for underflow. If the bound of the whole box overflows float64, the search
    ends at once, with an infinite bound.

    Args:
        network: K = 1; `why_not_applicable` must be None.
        root: a bound that is known for the whole domain.
        best: a point of the domain where the norm of the Jacobian is a lower bound.
        report: is called with the interval every two seconds.
    """
    own = IntervalNetwork(network)
    started = reported = time.monotonic()
    low, high = (end.double().unsqueeze(0) for end in domain.box)
    upper, side, crossed = _bound(own, low, high, domain)
    if root is not None:
        upper = upper.clamp_max(root)
    if not torch.isfinite(upper).all():
        return Found(math.inf, best, 1)
    best = _steeper(network, low, high, domain, best, gap)
    settled, boxes = best.value, 1  # the largest bound of the boxes that are done
    numbers = max((hidden.numbers(network.n_inputs) for hidden in own.hidden), default=1)
    batch = max(1, min(BATCH, _CHUNK // numbers))
    while len(low):
        enough = (upper <= max(best.value * (1 + gap), 2 * _UNDERFLOW)) | ~crossed
        settled = max(settled, float(upper[enough].max()) if enough.any() else 0.0)
        low, high, upper, side, crossed = (part[~enough] for part in (low, high, upper, side, crossed))
        now = time.monotonic()
        over = now - started > seconds or len(low) > MOST_BOXES
        if over or not len(low):
            break
        if report is not None and now - reported > 2:
            reported = now
            ceiling = max(settled, float(upper.max()))
            report(f"bnb: [{best.value:.6g}, {ceiling:.6g}] after {boxes:,} boxes, {len(low):,} are open")
        order = upper.argsort(descending=True)
        several = batch * min(AT_MOST, max(1, len(low) // (16 * batch)))  # sorting and copying take time, too
        worst, rest = order[:several], order[several:]
        halves = _halve(low[worst], high[worst], side[worst])
        if halves is None:  # float64 cannot halve them
            break
        parts = zip(*(end.split(2 * batch) for end in halves), strict=True)
        found = [_bound(own, lows, highs, domain) for lows, highs in parts]
        bounds, sides, crossings = map(torch.cat, zip(*found, strict=True))
        best = _steeper(network, *halves, domain, best, gap)
        boxes += len(bounds)
        bounds = torch.minimum(bounds, upper[worst].repeat(2))
        open_ = zip((low, high, upper, side, crossed), (*halves, bounds, sides, crossings), strict=True)
        kept = slice(None) if domain.ball is None else ~domain.ball.misses(*halves)
        low, high, upper, side, crossed = (torch.cat([old[rest], new[kept]]) for old, new in open_)
    return Found(max(settled, float(upper.max()) if len(upper) else 0.0), best, boxes)


# One batch of boxes ----------------------------------------------------------------------------------------------


def _bound(network: IntervalNetwork, low: Tensor, high: Tensor, domain: Domain) -> tuple[Tensor, Tensor, Tensor]:
    """Over boxes (P, D): bounds (P,) on the norm of the Jacobian, the side of each on which varying slopes depend
    most, along which to halve it, and whether any slope varies."""
    sides, sensitivity, hull = network.over(low, high)
    upper = _norm_above(hull, domain)
    side, crossed = ((high - low) * sensitivity).argmax(dim=1), sensitivity.sum(dim=1) > 0
    if not sides or not all(hidden.is_free for hidden in network.hidden):
        return upper, side, crossed
    single = network.double.is_plain and all(hidden.pairs is not None for hidden in network.hidden)
    n_open = torch.stack([(part.state == 0).sum(dim=1) for part in sides]).sum(dim=0)
    widest = max(layer.weight.shape[1] for layer in network.double.layers) * hull.centre.shape[1]
    numbers = widest if single else widest * low.shape[1]
    for n in range(1, (LEAF if single else LEAF // 2) + 1):
        leaves = (n_open == n).nonzero().squeeze(1)
        if not len(leaves):
            continue
        for part in leaves.split(max(1, _CHUNK // (2**n * numbers))):
            some = [of_all.of(part) for of_all in sides]
            states = _combinations([of_part.state for of_part in some], n)
            hull = _single(network, states) if single else _chosen(network, low[part], high[part], some, states)
            tight = _norm_above(hull, domain).view(len(part), -1).amax(dim=1)
            upper[part] = torch.minimum(upper[part], tight)
    return upper, side, crossed


def _chosen(
    network: IntervalNetwork, low: Tensor, high: Tensor, sides: Sequence[Sides], states: Sequence[Tensor]
) -> Jacobian:
    """The hulls over P boxes for 2^n choices of the sides of each, (P 2^n, C, D).

    The Jacobian is affine in each slope alone, so that its norm, which is convex, is largest at the least or at
    the largest of each, even if no point has these together.
    """
    n = len(states[0]) // len(low)
    again = torch.arange(len(low)).repeat_interleave(n)
    chosen = [part.of(again).chosen(state) for part, state in zip(sides, states, strict=True)]
    return network.over(low[again], high[again], chosen).jacobian


def _combinations(states: Sequence[Tensor], n: int) -> list[Tensor]:
    """The states of P boxes with n open breakpoints each, 2^n times, with all choices of their sides."""
    sides = torch.tensor([[1 - 2 * (i >> bit & 1) for bit in range(n)] for i in range(2**n)])  # (2^n, n)
    together = torch.cat(list(states), dim=1)  # (P, M of all layers)
    places = (together == 0).nonzero()[:, 1].view(-1, 1, n)  # (P, 1, n)
    chosen = together.unsqueeze(1).repeat(1, 2**n, 1)
    chosen.scatter_(2, places.expand(-1, 2**n, -1), sides.to(chosen.dtype).expand(len(together), -1, -1))
    return list(chosen.flatten(0, 1).split([state.shape[1] for state in states], dim=1))


def _single(network: IntervalNetwork, states: Sequence[Tensor]) -> Jacobian:
    """The Jacobians where all breakpoints have the given states, none of them open; (P, C, D).

    Backwards from the rows of the last layer, and with one bound on all rounding errors: entries of w W_n ... W_1
    are at most ||w||_1 ||W_n||_inf ... ||W_1||_inf times the steepest slopes, each of the n products being off by
    gamma times that.
    """
    *weights, last = (layer.weight[0] for layer in network.double.affine)
    linear = network.double.linear
    rows = last.expand(len(states[0]), -1, -1)
    largest_row, n = float(last.abs().sum(dim=1).max()), len(weights) + 1
    for weight, hidden, state in zip(reversed(weights), reversed(network.hidden), reversed(states), strict=True):
        rows = _pulled_back(hidden, state.unsqueeze(1), rows) @ weight
        largest_row *= hidden.steepest * float(weight.abs().sum(dim=1).max())
    widest = max(max(weight.shape) for weight in (*weights, last))
    error = 4 * n * (widest + 4) * UNIT_ROUNDOFF * largest_row * UP + UNDERFLOW
    if linear is not None:
        rows, error = rows + linear[0], error + 4 * UNIT_ROUNDOFF * (largest_row + float(linear.abs().max()))
    return Jacobian(rows, torch.full_like(rows, error))


def _pulled_back(hidden: Hidden, state: Tensor, rows: Tensor) -> Tensor:
    """Rows (P, C, H) behind the activation as rows in front of it, for pairs or feature by feature."""
    if hidden.slopes is not None:
        below, above = hidden.slopes
        return torch.where(state > 0, above * rows, below * rows)
    assert hidden.pairs is not None
    first, second = hidden.pairs.T
    out = rows.clone()
    # Where z_first > z_second they change places.
    out[..., first] = torch.where(state > 0, rows[..., second], rows[..., first])
    out[..., second] = torch.where(state > 0, rows[..., first], rows[..., second])
    return out


def _norm_above(hull: Jacobian, domain: Domain) -> Tensor:
    """At least the norm of every Jacobian in the hulls (P, C, D); see `operator_norms`."""
    q, h, most = domain.q, domain.h, hull.sizes
    if most.shape[1] == 1 or math.isinf(h):
        norm = torch.linalg.vector_norm(most, ord=q, dim=2).amax(dim=1) * UP
    elif h == 1:
        norm = most.sum(dim=1).amax(dim=1) * UP
    else:
        norm = (_spectral_norms_above(hull.centre) + torch.linalg.matrix_norm(hull.radius)) * UP
    # NaN is no bound, so it is treated as infinite.
    return (norm + _UNDERFLOW).nan_to_num(nan=math.inf, posinf=math.inf)


def _spectral_norms_above(matrices: Tensor) -> Tensor:
    """(P,) at least the largest singular values of (P, C, D), and no more than 1.0001 times them.

    The Gram matrix G is squared several times, where ||G||_2 = ||G^2||_2^(1/2), and of the last power the
    Frobenius norm is taken, which is too large by a factor of sqrt(n) at most. Each power is divided by its
    Frobenius norm s. The errors E of a product and of that division have ||E||_F <= gamma_n ||G||_F^2 + u s, and
    are added on the way back.
    """
    scale = matrices.abs().amax(dim=(1, 2), keepdim=True).clamp_min(2.0**-1000)
    part = matrices / scale
    part = part if part.shape[1] <= part.shape[2] else part.mT
    gamma = 4 * (max(part.shape[1:]) + 2) * UNIT_ROUNDOFF
    power, steps = part @ part.mT, []
    unsure = gamma * part.square().sum(dim=(1, 2)) * UP  # of the Gram matrix itself
    for _ in range(SQUARED):
        power = (power + power.mT) / 2
        size = torch.linalg.matrix_norm(power).clamp_min(2.0**-500)
        square = power @ power
        divisor = torch.linalg.matrix_norm(square).clamp_min(2.0**-1000)
        steps.append((divisor, gamma * (size.square() + divisor)))
        power = square / divisor[:, None, None]
    bound = torch.linalg.matrix_norm(power) * UP
    for divisor, error in reversed(steps):
        bound = ((bound * divisor + error) * UP).sqrt() * UP
    return (bound + unsure).sqrt() * scale[:, 0, 0] * UP


def _halve(low: Tensor, high: Tensor, side: Tensor) -> tuple[Tensor, Tensor] | None:
    """(low, high) of both halves of boxes; None if one is too small to be halved in float64."""
    side = side.unsqueeze(1)
    middle = ((low + high) / 2).gather(1, side)
    if not ((middle > low.gather(1, side)) & (middle < high.gather(1, side))).all():
        return None
    return torch.cat([low, low.scatter(1, side, middle)]), torch.cat([high.scatter(1, side, middle), high])


def _steeper(
    network: BakedNetwork, low: Tensor, high: Tensor, domain: Domain, best: Maximum, gap: float
) -> Maximum:
    """The steeper of `best` and the centres of boxes, if it is by more than an eighth of the gap."""
    centres, ball = (low + high) / 2, domain.ball
    if ball is not None:
        centres = centres[ball.holds(centres)]
    if not len(centres):
        return best
    gradients = scan(network, centres.unsqueeze(0)).gradient[0]
    if float(operator_norms(gradients, domain.q, domain.h).max()) <= best.value * (1 + gap / 8):
        return best
    found = largest(network, centres, gradients, domain.q, domain.h)
    if found is None or found.value <= best.value:
        return best
    # A point that was moved off a breakpoint may lie outside.
    inside = ball is None or bool(ball.holds(torch.tensor([found.point], dtype=centres.dtype)))
    return found if inside else best
