"""Branch and bound: an upper bound on ||grad f||_q over a box of up to four dimensions.

On a small box most breakpoints are out of reach, and interval arithmetic bounds the Jacobian: behind each layer it
is known up to a radius, J = J_c +- J_r, and z(x) lies within z(c) +- |J| r of its value at the centre c. A box
whose bound is too large is halved; one that few breakpoints cross is settled at once by all combinations of their
sides.

All of it is float64 arithmetic whose rounding errors are added to the radii, so the bound is proven. It holds over
the box only.

Reference: Jordan and Dimakis 2020, "Exactly computing the local Lipschitz constant of ReLU networks", whose
interval Jacobians these are; sorted groups take the hull of the members that a place may get.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lipexp.activations import Activation
from lipexp.measured.gradients import Maximum, largest, operator_norms, scan
from lipexp.networks import BakedNetwork
from lipexp.norms import UNIT_ROUNDOFF

DIMS = 4  # in more, boxes are too many
LEAF = 8  # breakpoints whose sides are combined
BATCH = 512  # boxes that are halved together, or fewer where the network is wide
MOST_BOXES = 2_000_000
_CHUNK = 2**21  # numbers in one temporary array
_UP = 1 + 2.0**-40  # covers all rounding errors of one line of arithmetic on numbers that are not negative
_UNDERFLOW = 2.0**-500  # is added to every norm, and covers the squares that underflow


class Found(NamedTuple):
    """The interval that a search has reached."""

    upper: float
    best: Maximum  # the steepest point seen
    boxes: int  # that were bounded


class Hidden(NamedTuple):
    """The activation behind one hidden layer: two slopes, or sorted groups."""

    pairs: Tensor  # (M, 2) its breakpoints
    slopes: tuple[float, float] | None  # below and above 0
    groups: Tensor | None  # (groups, size)

    @property
    def steepest(self) -> float:
        """The largest slope in size, at least 1."""
        return max(1.0, *map(abs, self.slopes or (1.0,)))

    @property
    def is_free(self) -> bool:
        """Whether any choice of sides is one linear map: not where three or more features are sorted together."""
        return self.groups is None or self.groups.shape[1] <= 2

    def numbers(self, dims: int) -> int:
        """About how many numbers the largest temporary array has for each box."""
        hulls = 1 if self.groups is None else self.groups.numel() * self.groups.shape[1]
        return dims * max(len(self.pairs), hulls)


class Network(NamedTuple):
    """One network in float64."""

    weights: list[Tensor]
    biases: list[Tensor]
    acts: Sequence[Activation]  # of each layer
    hidden: list[Hidden]


class Jacobian(NamedTuple):
    """Bounds on the Jacobians of the features of P boxes: all lie within `radius` of `centre`, (P, H, D) each."""

    centre: Tensor
    radius: Tensor


def why_not_applicable(network: BakedNetwork) -> str | None:
    """Why the search is not for this network; None if it is."""
    if network.n_inputs > DIMS:
        return f"is for {DIMS} inputs or fewer"
    if network.n_outputs != 1:
        return "is for one output"
    for (_, act), hidden in zip(network.placed, _hidden(network), strict=True):
        if hidden is None:
            return f"is not for {act.label}"
    return None


def _hidden(network: BakedNetwork) -> list[Hidden | None]:
    """The activation behind each hidden layer; None where it neither has two slopes nor sorts.

    The pairs are listed in the order of the features, or of the groups, on which the states below rely.
    """
    found: list[Hidden | None] = []
    for width, act in zip(network.hidden_widths, network.acts, strict=False):
        slopes, members = act.two_slopes(width), act.groups(width)
        if slopes is not None:
            found.append(Hidden(torch.stack([torch.arange(width), torch.full((width,), -1)], dim=1), slopes, None))
        elif members is None or act.breakpoints(width) is None:
            found.append(None)
        else:
            groups = torch.from_numpy(members.copy())
            pairs = groups[:, torch.triu_indices(groups.shape[1], groups.shape[1], offset=1).T]
            found.append(Hidden(pairs.flatten(0, 1), None, groups))
    return found


def branch_and_bound(
    network: BakedNetwork,
    box: tuple[Tensor, Tensor],
    q: float,
    root: float | None,
    best: Maximum,
    gap: float,
    seconds: float,
    report: Callable[[str], None] | None = None,
) -> Found:
    """Halve boxes until upper / lower - 1 <= gap, or the time is over.

    `upper` is the largest bound of all boxes, `lower` the gradient norm at the steepest point seen. A box that no
    breakpoint crosses is done, whatever its bound, since its halves would have the same; so is one whose bound is
    nothing but the allowance for underflow. If the bound of the whole box overflows float64, the search ends at
    once, with an infinite bound.

    Args:
        network: K = 1; `why_not_applicable` must be None.
        box: low and high, (D,).
        root: a bound that is known for the whole box.
        best: a point whose gradient norm is a lower bound.
        report: is called with the interval every two seconds.
    """
    own = _network(network)
    started = reported = time.monotonic()
    low, high = (end.double().unsqueeze(0) for end in box)
    upper, side, crossed = _bound(own, low, high, q)
    if root is not None:
        upper = upper.clamp_max(root)
    if not torch.isfinite(upper).all():
        return Found(math.inf, best, 1)
    best = _steeper(network, low, high, q, best)
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
        worst, rest = order[:batch], order[batch:]
        halves = _halve(low[worst], high[worst], side[worst])
        if halves is None:  # float64 cannot halve them
            break
        bounds, sides, crossings = _bound(own, *halves, q)
        best = _steeper(network, *halves, q, best)
        boxes += len(bounds)
        low, high = torch.cat([low[rest], halves[0]]), torch.cat([high[rest], halves[1]])
        upper = torch.cat([upper[rest], torch.minimum(bounds, upper[worst].repeat(2))])
        side, crossed = torch.cat([side[rest], sides]), torch.cat([crossed[rest], crossings])
    return Found(max(settled, float(upper.max()) if len(upper) else 0.0), best, boxes)


# One batch of boxes ----------------------------------------------------------------------------------------------


def _network(network: BakedNetwork) -> Network:
    weights = [layer.weight[0].double() for layer in network.layers]
    biases = [layer.bias[0, 0].double() for layer in network.layers]
    return Network(
        weights, biases, network.double.acts, [hidden for hidden in _hidden(network) if hidden is not None]
    )


def _bound(network: Network, low: Tensor, high: Tensor, q: float) -> tuple[Tensor, Tensor, Tensor]:
    """Over boxes (P, D): bounds (P,) on ||grad f||_q, the side along which to halve each, that on which its open
    breakpoints depend most, and whether any breakpoint is open."""
    states, sensitivity, gradient = _forward(network, low, high)
    upper = _norm_above(gradient, q)
    side, crossed = ((high - low) * sensitivity).argmax(dim=1), sensitivity.sum(dim=1) > 0
    if not states or not all(hidden.is_free for hidden in network.hidden):
        return upper, side, crossed
    n_open = torch.stack([(state == 0).sum(dim=1) for state in states]).sum(dim=0)
    widest = max(weight.shape[0] for weight in network.weights)
    for n in range(1, LEAF + 1):
        leaves = (n_open == n).nonzero().squeeze(1)
        if not len(leaves):
            continue
        for part in leaves.split(max(1, _CHUNK // (2**n * widest))):
            gradients = _gradients(network, _combinations([state[part] for state in states], n))
            tight = _norm_above(gradients, q).view(len(part), -1).amax(dim=1)
            upper[part] = torch.minimum(upper[part], tight)
    return upper, side, crossed


def _combinations(states: Sequence[Tensor], n: int) -> list[Tensor]:
    """The states of P boxes with n open breakpoints each, 2^n times, with all choices of their sides."""
    sides = torch.tensor([[1 - 2 * (i >> bit & 1) for bit in range(n)] for i in range(2**n)])  # (2^n, n)
    together = torch.cat(list(states), dim=1)  # (P, M of all layers)
    places = (together == 0).nonzero()[:, 1].view(-1, 1, n)  # (P, 1, n)
    chosen = together.unsqueeze(1).repeat(1, 2**n, 1)
    chosen.scatter_(2, places.expand(-1, 2**n, -1), sides.to(chosen.dtype).expand(len(together), -1, -1))
    return list(chosen.flatten(0, 1).split([state.shape[1] for state in states], dim=1))


def _forward(network: Network, low: Tensor, high: Tensor) -> tuple[list[Tensor], Tensor, Jacobian]:
    """Over P boxes: the states of all breakpoints, how much the open ones depend on each side (P, D), and the hull
    of the gradient.

    A state is the sign of z_i - z_j, or of z_i, on the whole box; 0: it is open, both signs may occur.
    """
    centre = (low + high) / 2
    reach = torch.maximum(high - centre, centre - low) * _UP  # (P, D)
    x, error = centre, torch.zeros_like(centre)
    identity = torch.eye(low.shape[1], dtype=low.dtype).expand(len(low), -1, -1)
    jacobian = Jacobian(identity, torch.zeros_like(identity))
    states, sensitivity = [], torch.zeros_like(low)
    for i, (weight, bias) in enumerate(zip(network.weights, network.biases, strict=True)):
        jacobian = _through(weight, jacobian)
        gamma = 2 * (weight.shape[1] + 2) * UNIT_ROUNDOFF
        size = x.abs() + error
        z = x @ weight.T + bias
        error = ((error + gamma * size) @ weight.abs().T + gamma * bias.abs()) * _UP + 2.0**-1000
        if i == len(network.hidden):
            break
        hidden = network.hidden[i]
        state, slope = _states(hidden, z, error, jacobian, reach)
        states.append(state)
        sensitivity += ((state == 0).to(slope.dtype).unsqueeze(-1) * slope).sum(dim=1)
        jacobian = _activated(hidden, state, jacobian)
        x, error = _applied(network.acts[i], hidden, z, error)
    return states, sensitivity, jacobian


def _gradients(network: Network, states: Sequence[Tensor]) -> Jacobian:
    """The gradients where all breakpoints have the given states, none of them open; (P, 1, D).

    Backwards, a row at a time, and with one bound on all rounding errors: entries of w W_n ... W_1 are at most
    ||w||_1 ||W_n||_inf ... ||W_1||_inf times the steepest slopes, each of the n products being off by gamma times
    that.
    """
    *weights, last = network.weights
    row = last.expand(len(states[0]), -1)
    largest_row, n = float(last.abs().sum()), len(network.weights)
    for weight, hidden, state in zip(reversed(weights), reversed(network.hidden), reversed(states), strict=True):
        row = _pulled_back(hidden, state, row) @ weight
        largest_row *= hidden.steepest * float(weight.abs().sum(dim=1).max())
    widest = max(max(weight.shape) for weight in network.weights)
    error = 4 * n * (widest + 4) * UNIT_ROUNDOFF * largest_row * _UP + 2.0**-1000
    return Jacobian(row.unsqueeze(1), torch.full_like(row, error).unsqueeze(1))


def _pulled_back(hidden: Hidden, state: Tensor, row: Tensor) -> Tensor:
    """Rows (P, H) behind the activation as rows in front of it, for pairs or feature by feature."""
    if hidden.slopes is not None:
        below, above = hidden.slopes
        return torch.where(state > 0, above * row, below * row)
    first, second = hidden.pairs.T
    out = row.clone()
    # Where z_first > z_second they change places.
    out[:, first] = torch.where(state > 0, row[:, second], row[:, first])
    out[:, second] = torch.where(state > 0, row[:, first], row[:, second])
    return out


def _through(weight: Tensor, jacobian: Jacobian) -> Jacobian:
    """W J, with the rounding errors of the product added to its radius."""
    gamma = 2 * (weight.shape[1] + 2) * UNIT_ROUNDOFF
    unsure = jacobian.radius + gamma * (jacobian.centre.abs() + jacobian.radius)
    return Jacobian(weight @ jacobian.centre, weight.abs() @ unsure * _UP + 2.0**-1000)


def _states(hidden: Hidden, z: Tensor, error: Tensor, jacobian: Jacobian, reach: Tensor) -> tuple[Tensor, Tensor]:
    """(P, M) the sign of each pair's difference on the whole box, or 0; and its largest slopes (P, M, D)."""
    first, second = hidden.pairs.T
    single = bool((second < 0).all())

    def combined(values: Tensor, sign: int) -> Tensor:
        """values_i + sign values_j for each pair (i, j)."""
        return values[:, first] if single else values[:, first] + sign * values[:, second]

    gap = combined(z, -1)
    slope = combined(jacobian.centre, -1).abs() + combined(jacobian.radius, 1)
    around = (slope * reach.unsqueeze(1)).sum(dim=2) + combined(error, 1)
    # The rounding of these lines themselves: of the difference of slopes, and of sums that are not negative.
    sizes = jacobian.centre.abs().amax(dim=(1, 2)) * reach.sum(dim=1) + z.abs().amax(dim=1)
    around = around * _UP + 8 * UNIT_ROUNDOFF * sizes.unsqueeze(1)
    return gap.sign().where(gap.abs() > around, torch.zeros((), dtype=gap.dtype)), slope


def _activated(hidden: Hidden, state: Tensor, jacobian: Jacobian) -> Jacobian:
    """The hull of the Jacobians behind the activation for breakpoints with the given states."""
    if hidden.slopes is not None:
        below, above = hidden.slopes
        # Where the side is open, the centre of the two slopes and half of their range.
        middle = torch.full_like(state, (above + below) / 2)
        middle = middle.masked_fill(state > 0, above).masked_fill(state < 0, below).unsqueeze(-1)
        half = torch.full_like(state, abs(above - below) / 2).masked_fill(state != 0, 0).unsqueeze(-1)
        centre = middle * jacobian.centre
        radius = middle.abs() * jacobian.radius + half * (jacobian.centre.abs() + jacobian.radius)
        return Jacobian(centre, (radius + 4 * UNIT_ROUNDOFF * jacobian.centre.abs()) * _UP)
    groups = hidden.groups
    assert groups is not None
    size = groups.shape[1]
    if size == 2:
        return _exchanged(jacobian, state, *groups.T)
    allowed = _places(state, len(groups), size)  # (P, G, place, member)
    centre, radius = jacobian.centre[:, groups], jacobian.radius[:, groups]  # (P, G, member, D)
    infinite = torch.tensor(math.inf, dtype=centre.dtype)
    mask = allowed.unsqueeze(-1)
    most = torch.where(mask, (centre + radius).unsqueeze(2), -infinite).amax(dim=3)
    least = torch.where(mask, (centre - radius).unsqueeze(2), infinite).amin(dim=3)
    middle = (most + least) / 2
    half = torch.maximum(most - middle, middle - least) * _UP
    half = half + 8 * UNIT_ROUNDOFF * torch.maximum(most.abs(), least.abs())
    out = Jacobian(torch.empty_like(jacobian.centre), torch.empty_like(jacobian.radius))
    out.centre[:, groups], out.radius[:, groups] = middle, half
    return out


def _exchanged(jacobian: Jacobian, state: Tensor, first: Tensor, second: Tensor) -> Jacobian:
    """The hull behind sorted pairs: exchanged where z_first > z_second, and either where that is open."""
    (a, b), (a_radius, b_radius) = ((part[:, first], part[:, second]) for part in jacobian)
    swap, open_ = (state > 0).unsqueeze(-1), (state == 0).unsqueeze(-1)
    either = torch.maximum(a_radius, b_radius) + (a - b).abs() / 2 + 4 * UNIT_ROUNDOFF * (a.abs() + b.abs())
    middle = (a + b) / 2
    out = Jacobian(torch.empty_like(jacobian.centre), torch.empty_like(jacobian.radius))
    for place, one, other, one_radius, other_radius in (
        (first, a, b, a_radius, b_radius),
        (second, b, a, b_radius, a_radius),
    ):
        out.centre[:, place] = torch.where(open_, middle, torch.where(swap, other, one))
        out.radius[:, place] = torch.where(open_, either * _UP, torch.where(swap, other_radius, one_radius))
    return out


def _places(state: Tensor, n_groups: int, size: int) -> Tensor:
    """(P, G, place, member) whether a member may get a place, by those that are surely below and above it."""
    first, second = torch.triu_indices(size, size, offset=1)
    signs = state.new_zeros(len(state), n_groups, size, size)  # of z_member - z_other
    signs[:, :, first, second] = state.view(len(state), n_groups, len(first))
    signs[:, :, second, first] = -signs[:, :, first, second]
    below, above = (signs > 0).sum(dim=3).unsqueeze(2), (signs < 0).sum(dim=3).unsqueeze(2)
    place = torch.arange(size).view(-1, 1)
    return (below <= place) & (place <= size - 1 - above)


def _applied(act: Activation, hidden: Hidden, z: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    """The activation and the errors behind it: feature by feature, or the largest of a group."""
    x = act(z.unsqueeze(0))[0]
    groups = hidden.groups
    if groups is not None:
        spread = torch.empty_like(error)
        spread[:, groups] = error[:, groups].amax(dim=2, keepdim=True).expand(-1, -1, groups.shape[1])
        return x, spread
    return x, hidden.steepest * error * _UP + 2 * UNIT_ROUNDOFF * x.abs()


def _norm_above(gradient: Jacobian, q: float) -> Tensor:
    """||.||_q, at least that of every gradient in the hulls (P, 1, D)."""
    most = gradient.centre[:, 0].abs() + gradient.radius[:, 0]
    norm = torch.linalg.vector_norm(most, ord=q, dim=1) * _UP + _UNDERFLOW
    # NaN is no bound, so it is treated as infinite.
    return norm.nan_to_num(nan=math.inf, posinf=math.inf)


def _halve(low: Tensor, high: Tensor, side: Tensor) -> tuple[Tensor, Tensor] | None:
    """(low, high) of both halves of boxes; None if one is too small to be halved in float64."""
    side = side.unsqueeze(1)
    middle = ((low + high) / 2).gather(1, side)
    if not ((middle > low.gather(1, side)) & (middle < high.gather(1, side))).all():
        return None
    return torch.cat([low, low.scatter(1, side, middle)]), torch.cat([high.scatter(1, side, middle), high])


def _steeper(network: BakedNetwork, low: Tensor, high: Tensor, q: float, best: Maximum) -> Maximum:
    """The steeper of `best` and the centres of boxes."""
    centres = (low + high) / 2
    gradients = scan(network, centres.unsqueeze(0)).gradient[0]
    if float(operator_norms(gradients, q).max()) <= best.value:
        return best
    found = largest(network, centres, gradients, q)
    return found if found is not None and found.value > best.value else best
