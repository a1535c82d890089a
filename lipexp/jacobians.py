"""Interval Jacobians: bounds on all Jacobians of a network over boxes of inputs, or at points.

Shapes: P boxes, D inputs, H features, C outputs, M breakpoints of a layer, of one network, K = 1.

On a small box most breakpoints are out of reach, and the slopes of a smooth activation hardly vary. Behind each
layer the Jacobian is known up to a radius, J = J_c +- J_r, and z(x) lies within z(c) +- |J| r of its value at the
centre c of a box with sides 2 r. A feature by itself gets the hull of its slopes between these ends; sorted groups
get the hull of the members that a place may get.

All of it is float64 arithmetic whose rounding errors are added to the radii, so that the bounds are proven. For a
smooth activation that does not say how its values are enclosed, they rest on what `Activation.enclosed` assumes.

Reference: Jordan and Dimakis 2020, "Exactly computing the local Lipschitz constant of ReLU networks", whose
interval Jacobians these are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lipexp.activations import Activation
from lipexp.blocks import Residual, act_width
from lipexp.networks import BakedNetwork
from lipexp.norms import UNIT_ROUNDOFF

UP = 1 + 2.0**-40  # covers all rounding errors of one line of arithmetic on numbers that are not negative
LEAP = 8  # times its distance, the slope of a feature changes by at most this as long as it changes smoothly
UNDERFLOW = 2.0**-1000  # covers those of products that underflow


class Jacobian(NamedTuple):
    """Bounds on the Jacobians of P boxes: all lie within `radius` of `centre`, (P, H, D) each."""

    centre: Tensor
    radius: Tensor

    @property
    def sizes(self) -> Tensor:
        """The largest absolute values."""
        return self.centre.abs() + self.radius


class Features(NamedTuple):
    """The features behind a layer."""

    value: Tensor  # (P, H) at the centres of the boxes, as float64 computes it
    error: Tensor  # (P, H) bounds on its errors
    jacobian: Jacobian


class Hidden(NamedTuple):
    """The activation behind one layer, or inside it: two slopes, sorted groups, or slopes of any kind."""

    act: Activation
    pairs: Tensor | None  # (M, 2) its breakpoints, where it sorts or has two slopes
    slopes: tuple[float, float] | None  # below and above 0
    groups: Tensor | None  # (groups, size)
    width: int

    @classmethod
    def of(cls, act: Activation, width: int) -> Hidden | None:
        """None where it neither sorts nor says what its slopes are between two inputs.

        The pairs are listed in the order of the features, or of the groups, on which the states below rely.
        """
        slopes, members = act.two_slopes(width), act.groups(width)
        if slopes is not None:
            pairs = torch.stack([torch.arange(width), torch.full((width,), -1)], dim=1)
            return cls(act, pairs, slopes, None, width)
        if members is not None and act.breakpoints(width) is not None:
            groups = torch.from_numpy(members.copy())
            pairs = groups[:, torch.triu_indices(groups.shape[1], groups.shape[1], offset=1).T]
            return cls(act, pairs.flatten(0, 1), None, groups, width)
        return cls(act, None, None, None, width) if act.has_local_slopes(width) else None

    @property
    def steepest(self) -> float:
        """The largest slope in size, at least 1."""
        return max(1.0, *map(abs, self.act.slopes or (1.0,)), *map(abs, self.slopes or (1.0,)))

    @property
    def is_free(self) -> bool:
        """Whether sides may be chosen at will: not where three or more features are sorted together."""
        return self.groups is None or self.groups.shape[1] <= 2

    def numbers(self, dims: int) -> int:
        """About how many numbers the largest temporary array has for each box."""
        hulls = 1 if self.groups is None else self.groups.numel() * self.groups.shape[1]
        return dims * max(self.width if self.pairs is None else len(self.pairs), hulls)


class Sides(NamedTuple):
    """What an activation may do on P boxes."""

    # (P, M) the sign of each breakpoint's difference; 0: both may occur. Of a curved activation (P, H), 0 where
    # the slope leaps, or changes so fast that on this box it is as good as that.
    state: Tensor
    slopes: tuple[Tensor, Tensor] | None  # (P, H) the least and the largest, if it acts on each feature alone

    def chosen(self, sides: Tensor) -> Sides:
        """With one side, -1 or 1, in place of each 0 of the state: there the least slope, or the largest."""
        if self.slopes is None:
            return Sides(sides, None)
        open_, (least, most) = self.state == 0, self.slopes
        return Sides(
            sides, (torch.where(open_ & (sides > 0), most, least), torch.where(open_ & (sides < 0), least, most))
        )

    def of(self, boxes: Tensor) -> Sides:
        """Of some of the boxes."""
        return Sides(self.state[boxes], self.slopes and (self.slopes[0][boxes], self.slopes[1][boxes]))


class Hulls(NamedTuple):
    """What is known of a network over P boxes."""

    sides: list[Sides]  # of each activation
    sensitivity: Tensor  # (P, D) how much the slopes that may vary depend on each side
    jacobian: Jacobian  # (P, C, D) of the outputs


class IntervalNetwork:
    """One network in float64, and its activations.

    Args:
        network: K = 1; `why_not_applicable` must be None.
    """

    def __init__(self, network: BakedNetwork) -> None:
        self.double = network.double
        self.linear = self.double.linear
        self.hidden = [hidden for hidden in _hidden(self.double) if hidden is not None]

    def over(self, low: Tensor, high: Tensor, sides: Sequence[Sides] | None = None) -> Hulls:
        """The hulls over boxes from `low` to `high`, (P, D) each; points where these are equal.

        Args:
            sides: of each activation, if they are chosen; only the Jacobians are meant for these then.
        """
        centre = (low + high) / 2
        reach = torch.maximum(high - centre, centre - low) * UP
        identity = torch.eye(low.shape[1], dtype=low.dtype).expand(len(low), -1, -1)
        inputs = Features(centre, torch.zeros_like(centre), Jacobian(identity, torch.zeros_like(identity)))
        found, sensitivity, left = list[Sides](), torch.zeros_like(low), iter(self.hidden)

        def activated(features: Features) -> Features:
            nonlocal sensitivity
            hidden = next(left)
            if sides is None:
                seen, varying = _sides(hidden, features, reach)
                sensitivity = sensitivity + varying
            else:
                seen = sides[len(found)]
            found.append(seen)
            return _activated(hidden, features, seen)

        features, layers = inputs, self.double.layers
        for i, layer in enumerate(layers):
            weight, bias = layer.weight[0], layer.bias[0, 0]
            if isinstance(layer, Residual):
                inside = activated(_affine(weight.T, bias, features))
                back = -weight * layer.t[0, 0]  # the product of two float32 numbers is exact
                features = _plus(features, _affine(back, None, inside))
                continue
            features = _affine(weight, bias, features)
            if act_width(layers, i):
                features = activated(features)
        if self.linear is not None:
            features = _plus(features, _affine(self.linear[0], None, inputs))
        return Hulls(found, sensitivity, features.jacobian)


def why_not_applicable(network: BakedNetwork) -> str | None:
    """Which activation has Jacobians that are not bounded here; None: none."""
    bounded = zip(network.placed, _hidden(network), strict=True)
    return next((act.label for (_, act), hidden in bounded if hidden is None), None)


def _hidden(network: BakedNetwork) -> list[Hidden | None]:
    return [Hidden.of(act, width) for width, act in network.placed]


# Layers ----------------------------------------------------------------------------------------------------------


def _affine(weight: Tensor, bias: Tensor | None, features: Features) -> Features:
    """W x + b, with the rounding errors of the products."""
    x, error, jacobian = features
    gamma = 2 * (weight.shape[1] + 2) * UNIT_ROUNDOFF
    value, added = x @ weight.T, 0.0 if bias is None else gamma * bias.abs()
    error = ((error + gamma * (x.abs() + error)) @ weight.abs().T + added) * UP + UNDERFLOW
    return Features(value if bias is None else value + bias, error, through(weight, jacobian))


def through(weight: Tensor, jacobian: Jacobian) -> Jacobian:
    """W J, with the rounding errors of the product added to its radius."""
    gamma = 2 * (weight.shape[1] + 2) * UNIT_ROUNDOFF
    unsure = jacobian.radius + gamma * jacobian.sizes
    return Jacobian(weight @ jacobian.centre, weight.abs() @ unsure * UP + UNDERFLOW)


def _plus(a: Features, b: Features) -> Features:
    """a + b, with the rounding errors of the sums."""
    value, centre = a.value + b.value, a.jacobian.centre + b.jacobian.centre
    error = (a.error + b.error + 2 * UNIT_ROUNDOFF * value.abs()) * UP
    radius = (a.jacobian.radius + b.jacobian.radius + 2 * UNIT_ROUNDOFF * centre.abs()) * UP
    return Features(value, error, Jacobian(centre, radius))


# Activations -----------------------------------------------------------------------------------------------------


def _sides(hidden: Hidden, features: Features, reach: Tensor) -> tuple[Sides, Tensor]:
    """What the activation may do on each box, and how much slopes that vary depend on each side of it, (P, D)."""
    if hidden.groups is not None:
        state, slope = _states(hidden, features, reach)
        return Sides(state, None), ((state == 0).to(slope.dtype).unsqueeze(-1) * slope).sum(dim=1)
    if hidden.slopes is not None:
        state, slope = _states(hidden, features, reach)
        below, above = hidden.slopes
        least, most = (
            torch.full_like(state, end).masked_fill(state > 0, above).masked_fill(state < 0, below)
            for end in (min(below, above), max(below, above))
        )
    else:
        around, slope = _around(features, reach)
        bounds = hidden.act.slopes_between(features.value - around, features.value + around)
        assert bounds is not None
        least, most = bounds
        smoothly = hidden.steepest * (LEAP * around + 2.0**-36)
        state = (most - least <= smoothly).to(least.dtype)
    return Sides(state, (least, most)), ((most - least).unsqueeze(-1) * slope).sum(dim=1)


def _activated(hidden: Hidden, features: Features, sides: Sides) -> Features:
    """The features behind the activation."""
    z, error, jacobian = features
    x, own = hidden.act.enclosed(z)
    if sides.slopes is not None:
        return Features(x, hidden.steepest * error * UP + own, _stretched(*sides.slopes, jacobian))
    groups, spread = hidden.groups, torch.empty_like(error)
    assert groups is not None
    spread[:, groups] = error[:, groups].amax(dim=2, keepdim=True).expand(-1, -1, groups.shape[1])
    return Features(x, spread, _sorted(groups, sides.state, jacobian))


def _around(features: Features, reach: Tensor) -> tuple[Tensor, Tensor]:
    """(P, H) how far each feature may get from its value at the centre of its box, rounded up; and its largest
    slopes (P, H, D)."""
    z, error, jacobian = features
    slope = jacobian.sizes
    around = ((slope * reach.unsqueeze(1)).sum(dim=2) + error) * UP
    return around + 4 * UNIT_ROUNDOFF * z.abs() + UNDERFLOW, slope


def _states(hidden: Hidden, features: Features, reach: Tensor) -> tuple[Tensor, Tensor]:
    """(P, M) the sign of each pair's difference on the whole box, or 0; and its largest slopes (P, M, D)."""
    z, error, jacobian = features
    assert hidden.pairs is not None
    first, second = hidden.pairs.T
    single = hidden.groups is None

    def combined(values: Tensor, sign: int) -> Tensor:
        """values_i + sign values_j for each pair (i, j)."""
        return values[:, first] if single else values[:, first] + sign * values[:, second]

    gap = combined(z, -1)
    slope = combined(jacobian.centre, -1).abs() + combined(jacobian.radius, 1)
    around = (slope * reach.unsqueeze(1)).sum(dim=2) + combined(error, 1)
    # The rounding of these lines themselves: of the difference of slopes, and of sums that are not negative.
    sizes = jacobian.centre.abs().amax(dim=(1, 2)) * reach.sum(dim=1) + z.abs().amax(dim=1)
    around = around * UP + 8 * UNIT_ROUNDOFF * sizes.unsqueeze(1)
    return gap.sign().where(gap.abs() > around, torch.zeros((), dtype=gap.dtype)), slope


def _stretched(least: Tensor, most: Tensor, jacobian: Jacobian) -> Jacobian:
    """The hull of the Jacobians behind slopes between `least` and `most`, (P, H) each."""
    middle, half = ((most + least) / 2).unsqueeze(-1), ((most - least) / 2).unsqueeze(-1)
    radius = middle.abs() * jacobian.radius + half * jacobian.sizes
    rounding = 4 * UNIT_ROUNDOFF * (middle.abs() + half) * jacobian.centre.abs()
    return Jacobian(middle * jacobian.centre, (radius + rounding) * UP + UNDERFLOW)


def _sorted(groups: Tensor, state: Tensor, jacobian: Jacobian) -> Jacobian:
    """The hull of the Jacobians behind sorted groups for breakpoints with the given states."""
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
    half = torch.maximum(most - middle, middle - least) * UP
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
        out.radius[:, place] = torch.where(open_, either * UP, torch.where(swap, other_radius, one_radius))
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
