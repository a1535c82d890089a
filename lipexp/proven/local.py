"""Certified radii from what a network does near each point, instead of one Lipschitz constant for everywhere.

A network of affine layers z = W h + b bends where u = 0, with u = z_i for an activation of two slopes, and
u = z_i - z_j for a sorted pair: h = S(u) z with a matrix S that depends on the signs of all u only. Around a point
x, u moves by at most some m within the ball of radius s, so that the sign of each u with |u(x)| > m is known. The
other kinks are open. m and the margin f_c - f_j are followed outwards, from shell to shell, in two ways:

- by local constants. If open kinks count as halfway between their two sides, the gradient of a sum r h of features
  is that of one linear map, and off by at most sum |kappa_k| sup ||grad u_k||_q over open kinks, where
  r h = mean + sum kappa_k |u_k|. So the margin falls by no more than L_cj(x, s) per unit of distance within the
  ball, and by the integral of that over all shells in all. A kink right before the outputs with kappa > 0 may be
  taken as closed: kappa |u| is convex, and never below its tangent at x.
- by linear bounds over the whole ball: kappa |u| is at least its tangent at x where kappa > 0, and at least the
  chord between u(x) - m and u(x) + m where kappa < 0, which costs |kappa| (m - |u(x)|) at x.

The first is the better one near x, and the second farther out. Both may end behind any layer, with the product of
the norms of the layers that are left. Where local constants are above the global one, that is taken.

All of it is float64 arithmetic. What rounding may change in a row of weights is bounded through the largest
gradients that the features can have anywhere (see `rows`), and is added to what the margin loses.

References: Hein and Andriushchenko 2017 (radii from local Lipschitz constants, arXiv 1705.08475); Weng et al. 2018
(Fast-Lip and Fast-Lin, arXiv 1804.09699); Zhang et al. 2018 (CROWN, arXiv 1811.00866). They are about ReLU; the
integral over shells, and both ways for sorted pairs, are lipexp's own.

Shapes: N points, D inputs, H features, M kinks of a layer, R rows of weights, C classes, of one network, K = 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lipexp.networks import BakedNetwork
from lipexp.norms import UNIT_ROUNDOFF, dual
from lipexp.proven import rows

FloatArray = npt.NDArray[np.float64]

SHELLS = 8  # up to the radius that the global constant gives; farther out their thickness grows with the radius
MOST_SHELLS = 100  # which reach a thousand times as far
LARGEST = 2**31  # multiplications for one shell of all points, some 10 s of one core in all; more are not made
_CHUNK = 2**18  # numbers in one temporary array, which stays in the cache
_UP = 1 + 2.0**-40  # covers all rounding errors of one line of arithmetic on numbers that are not negative
_TINY = 2.0**-500  # what squares that underflow may hide


def why_not_applicable(network: BakedNetwork, points: int = 0) -> str | None:
    """Why there are no local constants for this network, and so many points; None if there are."""
    if points * _multiplications(network) > LARGEST:
        return "local constants would take too long"
    if not network.is_plain:
        return "local constants are for affine layers"
    for width, act in zip(network.hidden_widths, network.acts, strict=False):
        groups = act.groups(width)
        if act.two_slopes(width) is None and (groups is None or groups.shape[1] > 2):
            return f"{act.label} neither has two slopes nor sorts pairs, which local constants need"
    return None


def _multiplications(network: BakedNetwork) -> int:
    """For one shell of one point: the Jacobian, and the rows of all kinks through all layers before their own."""
    widths, total, before = network.hidden_widths, 0, 0
    for i in range(1, len(widths)):
        total += network.n_inputs * widths[i - 1] * widths[i] + widths[i] * before
        before += widths[i - 1] * widths[i]
    return total


class Kinks(NamedTuple):
    """Where an activation bends: h = S z, for each sorted pair or each feature alone."""

    width: int
    middle: float  # of the slopes below and above 0, and half of their difference, where u = z
    half: float
    pairs: tuple[Tensor | slice, Tensor | slice] | None  # (M,) both members; None: u = z

    @classmethod
    def of(cls, network: BakedNetwork, i: int) -> Kinks:
        width, act = network.hidden_widths[i], network.acts[i]
        slopes, groups = act.two_slopes(width), act.groups(width)
        if slopes is not None or groups is None or groups.shape[1] == 1:
            below, above = slopes or (1.0, 1.0)
            return cls(width, (below + above) / 2, (above - below) / 2, None)
        if (groups.T.ravel() == np.arange(width)).all():  # slices are faster
            return cls(width, 0.5, 0.5, (slice(0, width // 2), slice(width // 2, width)))
        first, second = torch.from_numpy(groups.T.copy())
        return cls(width, 0.5, 0.5, (first, second))

    @property
    def steepest(self) -> float:
        """The largest slope in size, which is the Lipschitz constant of the activation in every p-norm."""
        return abs(self.middle) + abs(self.half)

    def u(self, z: Tensor) -> Tensor:
        """(..., H) -> (..., M)"""
        return z if self.pairs is None else z[..., self.pairs[0]] - z[..., self.pairs[1]]

    def together(self, size: Tensor) -> Tensor:
        """Bounds (..., M) on u from those on z."""
        return size if self.pairs is None else size[..., self.pairs[0]] + size[..., self.pairs[1]]

    def kappa(self, r: Tensor) -> Tensor:
        """The weights (..., M) of |u| in r h, for weights r (..., H)."""
        return self.half * (r if self.pairs is None else r[..., self.pairs[1]] - r[..., self.pairs[0]])

    def bent(self, r: Tensor, kappa: Tensor, slope: Tensor) -> Tensor:
        """r S (..., H), where |u| is replaced by slope u. S is symmetric, so that it is S r as well."""
        if self.pairs is None:
            return self.middle * r + kappa * slope
        mean, bend = self.together(r) / 2, kappa * slope
        return self._apart(mean + bend, mean - bend)

    def most(self, size: Tensor) -> Tensor:
        """Bounds (..., H) behind the activation from those in front of it."""
        if self.pairs is None:
            return size * self.steepest
        largest = torch.maximum(size[..., self.pairs[0]], size[..., self.pairs[1]])
        return self._apart(largest, largest)

    def _apart(self, first: Tensor, second: Tensor) -> Tensor:
        """(..., H) with the members of the pairs in their places."""
        assert self.pairs is not None
        if isinstance(self.pairs[0], slice):
            return torch.cat([first, second], dim=-1)
        out = torch.empty((*first.shape[:-1], self.width), dtype=first.dtype)
        out[..., self.pairs[0]], out[..., self.pairs[1]] = first, second
        return out


class Layer(NamedTuple):
    """One hidden layer, with what holds of its features everywhere."""

    weight: Tensor  # (H, in)
    bias: Tensor
    kinks: Kinks
    to_u: Tensor  # (M, in): u = to_u h + ...
    steepest: Tensor  # (H,) bounds on the q-norms of the gradients behind the activation
    unsure: float  # what rounding changes in the gradient of r h, relative to |r| steepest
    lost: Tensor  # (M,) what it changes in the gradients of u
    beyond: float  # a bound on how fast the layer's input moves, in the norm of the hidden spaces; inf: unknown
    limit: Tensor  # (M,) bounds on the gradients of u


class Shell(NamedTuple):
    """What is known of the kinks of one layer within a ball."""

    open: Tensor  # (N, M)
    moved: Tensor  # (N, M) m
    fastest: Tensor  # (N, M) bounds on ||grad u||_q


class Followed(NamedTuple):
    """The kinks of one layer at x."""

    size: Tensor  # (N, M) |u|
    sign: Tensor
    error: Tensor  # (N, M) of u


def _hidden(network: BakedNetwork, p: float, h: float) -> list[Layer]:
    """The hidden layers of a network that moves in the norm p, and within in the norm h."""
    q, layers, size, unsure, beyond = dual(p), list[Layer](), None, 0.0, 1.0
    for i, layer in enumerate(network.layers[:-1]):
        weight, kinks = layer.weight[0].double(), Kinks.of(network, i)
        before = torch.from_numpy(rows.through(weight.numpy(), size, q))
        steepest = kinks.most(before) * _UP
        to_u = kinks.u(weight.T).T.contiguous()
        unsure += 4 * (weight.shape[1] + 16) * UNIT_ROUNDOFF
        lengths = torch.linalg.vector_norm(to_u, ord=q if i == 0 else dual(h), dim=1) * _UP + _TINY
        limit = torch.minimum(lengths * beyond * _UP, kinks.together(before) * _UP)
        bias, lost = layer.bias[0, 0].double(), unsure * kinks.together(before)
        layers.append(Layer(weight, bias, kinks, to_u, steepest, unsure, lost, beyond, limit))
        size = steepest.numpy()
        beyond = beyond * network.norms[i][0] * kinks.steepest * _UP if network.norms else math.inf
    return layers


def _follow(layers: Sequence[Layer], x: Tensor) -> list[Followed]:
    """The kinks at points x (N, D), with bounds on the rounding errors of float64."""
    found, error = [], torch.zeros_like(x)
    for layer in layers:
        gamma = 2 * (layer.weight.shape[1] + 2) * UNIT_ROUNDOFF
        z = x @ layer.weight.T + layer.bias
        error = (error + gamma * (x.abs() + error)) @ layer.weight.abs().T + gamma * layer.bias.abs()
        error = error * _UP + 2.0**-1000
        u = layer.kinks.u(z)
        unsure = layer.kinks.together(error) * _UP + UNIT_ROUNDOFF * u.abs()
        found.append(Followed(u.abs(), u.sign(), unsure))
        x = layer.kinks.bent(z, layer.kinks.kappa(z), u.sign())
        error = layer.kinks.most(error + 4 * UNIT_ROUNDOFF * z.abs()) * _UP + 2.0**-1000
    return found


# One ball for each point -----------------------------------------------------------------------------------------


def _shell(
    layers: Sequence[Layer], at: Sequence[Followed], moved: Sequence[Tensor], thick: Tensor, p: float
) -> list[Shell]:
    """The kinks within balls that are larger by `thick` (N,) than those in which they have `moved`."""
    q, n, found = dual(p), len(thick), list[Shell]()
    jacobian: Tensor | None = None
    for i, (layer, here) in enumerate(zip(layers, at, strict=True)):
        # (N, D, H), of the first layer (1, D, H): the gradients in its columns
        z = layer.weight.T.unsqueeze(0) if jacobian is None else jacobian @ layer.weight.T
        length = torch.linalg.vector_norm(layer.kinks.u(z), ord=q, dim=1)
        fastest = length + layer.lost + _TINY
        if i:
            fastest = fastest + _unsettled(layers[:i], at, found, layer.to_u.expand(n, -1, -1))
        fastest = torch.fmin(fastest * _UP, layer.limit).expand(n, -1)
        m = (moved[i] + thick.unsqueeze(1) * fastest) * _UP
        shell = Shell(~(here.size - here.error > m), m, fastest)  # open, too, where numbers overflow
        found.append(shell)
        slope = here.sign.masked_fill(shell.open, 0).unsqueeze(1)
        jacobian = layer.kinks.bent(z, layer.kinks.kappa(z), slope)
    return found


def _unsettled(layers: Sequence[Layer], at: Sequence[Followed], shells: Sequence[Shell], r: Tensor) -> Tensor:
    """(N, R) by how much open kinks may change the gradients of r h, for weights r (N, R, H) behind `layers`."""
    total = torch.zeros(r.shape[:2], dtype=r.dtype)
    for i in reversed(range(len(layers))):
        layer, here, shell = layers[i], at[i], shells[i]
        fastest = shell.fastest * shell.open
        if r.stride(0) == 0:  # the same rows for each point
            total = (
                total + fastest @ layer.kinks.kappa(r[0]).abs().T + layer.unsure * (r[0].abs() @ layer.steepest)
            )
        else:
            total = total + (layer.kinks.kappa(r).abs() @ fastest.unsqueeze(2)).squeeze(2)
            total = total + layer.unsure * (r.abs() @ layer.steepest)
        if i:
            slope = here.sign.masked_fill(shell.open, 0).unsqueeze(1)
            r = layer.kinks.bent(r, layer.kinks.kappa(r), slope) @ layer.weight
    return total


def _constants(
    layers: Sequence[Layer],
    at: Sequence[Followed],
    shells: Sequence[Shell],
    ends: tuple[Tensor, Tensor],
    norms: tuple[float, float],
) -> Tensor:
    """Bounds (N, R) on how fast r h + A x can fall per unit of distance within a ball, for (r, A) `ends`."""
    (r, beside), (q, h) = ends, norms
    least = torch.full_like(r[:, :, 0], math.inf)
    beyond = _length(beside, q)
    lost = 2 * UNIT_ROUNDOFF * beyond
    for i in reversed(range(len(layers))):
        layer, here, shell = layers[i], at[i], shells[i]
        kappa = layer.kinks.kappa(r)
        unsettled = shell.open.unsqueeze(1).expand_as(kappa)
        if i == len(layers) - 1:
            unsettled = unsettled & ((kappa <= 0) | (here.size <= here.error).unsqueeze(1))
        lost = lost + ((kappa.abs() * unsettled) @ shell.fastest.unsqueeze(2)).squeeze(2)
        lost = lost + layer.unsure * (r.abs() @ layer.steepest)
        r = layer.kinks.bent(r, kappa, here.sign.unsqueeze(1).masked_fill(unsettled, 0)) @ layer.weight
        if i:
            least = torch.fmin(least, _length(r, h) * layer.beyond + beyond + lost)
    return torch.fmin(least, _length(r + beside, q) + lost) * _UP + _TINY


def _linear(
    layers: Sequence[Layer],
    at: Sequence[Followed],
    shells: Sequence[Shell],
    ends: tuple[Tensor, Tensor],
    norms: tuple[float, float],
    radius: Tensor,
) -> list[tuple[Tensor, Tensor]]:
    """(cost, L) (N, R) each, several pairs: within the ball r h + A x falls by at most cost + L ||x' - x||_p."""
    (r, beside), (q, h) = ends, norms
    beyond, found = _length(beside, q), []
    cost = 2 * UNIT_ROUNDOFF * radius.unsqueeze(1) * beyond
    for i in reversed(range(len(layers))):
        layer, here, shell = layers[i], at[i], shells[i]
        kappa = layer.kinks.kappa(r)
        chord = (here.size / shell.moved.clamp(min=2.0**-1000)).clamp(max=1).masked_fill(~shell.open, 1)
        falling = kappa < 0
        slope = here.sign.unsqueeze(1) * torch.where(falling, chord.unsqueeze(1), torch.ones_like(kappa))
        # |u| <= |u(x)| + slope (u - u(x)) + (m - |u(x)|), and twice the error of u(x) more.
        own = shell.open * ((shell.moved - here.size).clamp(min=0) + 8 * UNIT_ROUNDOFF * shell.moved)
        cost = cost - (kappa.clamp(max=0) @ own.unsqueeze(2)).squeeze(2)
        cost = cost + (kappa.abs() @ (2 * shell.open * here.error).unsqueeze(2)).squeeze(2)
        cost = (cost + layer.unsure * radius.unsqueeze(1) * (r.abs() @ layer.steepest)) * _UP
        r = layer.kinks.bent(r, kappa, slope) @ layer.weight
        if i:
            found.append((cost, (_length(r, h) * layer.beyond + beyond) * _UP + _TINY))
    return [*found, (cost, _length(r + beside, q) * _UP + _TINY)]


def _length(r: Tensor, q: float) -> Tensor:
    return torch.linalg.vector_norm(r, ord=q, dim=2)


# Outwards --------------------------------------------------------------------------------------------------------


def radii(
    network: BakedNetwork, x: Tensor, margin: FloatArray, constants: FloatArray, norms: tuple[float, float]
) -> FloatArray:
    """The largest radii (N,) that local constants prove: every margin stays positive within them; rounded down.

    Args:
        network: K = 1, with the proven norms of its layers; `why_not_applicable` must be None.
        x: (N, D), float64.
        margin: (N, 1) lower bounds on |f(x)|, or (N, C) on f_c(x) - f_j(x), and infinity for c itself.
        constants: (N, 1) or (N, C) bounds for everywhere, on L and on L_cj.
        norms: p in which points move, and h of the hidden spaces.
    """
    own, least = torch.from_numpy(margin), torch.from_numpy(constants)
    found = _over(own, least).amin(dim=1) * (1 - 2.0**-50)
    chosen = ((found > 0) & torch.isfinite(found)).nonzero().squeeze(1)
    layers = _hidden(network, *norms)
    if not (layers and len(chosen)):  # the constants are those of one linear map, or no margin is finite
        return found.numpy()
    back = [len(layer.to_u) for layer in layers[2:]]  # rows that are followed back from a deeper layer
    numbers = max(network.hidden_widths) * max([network.n_inputs, network.n_outputs, *back])
    for part in chosen.split(max(1, _CHUNK // numbers)):
        found[part] = torch.maximum(
            found[part], _outwards(network, layers, x[part], (own[part], least[part]), norms)
        )
    return found.numpy()


def _over(value: Tensor, constant: Tensor) -> Tensor:
    """value / constant; infinite where that is 0, as it is for the class itself, and NaN where it is NaN."""
    return torch.where(constant == 0, math.inf, value / constant).where(value > 0, torch.zeros_like(value))


def _rows(network: BakedNetwork, x: Tensor) -> tuple[Tensor, Tensor]:
    """(r, A): the margins are r h + A x and a constant, with the features h before the last layer, (N, R, ...)."""
    f = network.double(x.unsqueeze(0))[0]
    last = network.layers[-1].weight[0].double()
    beside = x.new_zeros(len(last), x.shape[1]) if network.linear is None else network.linear[0].double()
    if f.shape[1] == 1:
        return f.sign().unsqueeze(2) * last, f.sign().unsqueeze(2) * beside
    own = f.argmax(dim=1)
    return last[own].unsqueeze(1) - last, beside[own].unsqueeze(1) - beside


def _outwards(
    network: BakedNetwork,
    layers: Sequence[Layer],
    x: Tensor,
    known: tuple[Tensor, Tensor],
    norms: tuple[float, float],
) -> Tensor:
    """See `radii`, for points that have a finite radius by the global constants."""
    margin, constants = known
    dual_norms = (dual(norms[0]), dual(norms[1]))
    at, ends = _follow(layers, x), _rows(network, x)
    moved = [torch.zeros_like(here.size) for here in at]
    first = _over(margin, constants).amin(dim=1)
    found, reached, active = torch.zeros_like(first), torch.zeros_like(first), torch.arange(len(x))
    # What is left of the margins at `reached`: as they are, and with convex kinks as closed ones, which is less.
    left = tangent = margin
    for _ in range(MOST_SHELLS):
        radius = reached + torch.maximum(first[active], reached) / SHELLS
        thick = (radius - reached) * _UP
        shells = _shell(layers, at, moved, thick, norms[0])
        local = _constants(layers, at, shells, ends, dual_norms)
        reach = reached.unsqueeze(1) + torch.fmax(_over(tangent, local), _over(left, constants))
        tangent = torch.fmax(_after(tangent, thick, local), torch.zeros(()).double())
        for cost, slope in _linear(layers, at, shells, ends, dual_norms, radius):
            rest = margin - cost
            reach = torch.fmax(reach, _over(rest, slope))
            tangent = torch.fmax(tangent, _after(rest, radius * _UP, slope))
        without = _after(left, thick, constants)
        left = torch.fmax(tangent, without)
        kept = (left > 0).all(dim=1)
        inside = torch.minimum(reach.amin(dim=1), radius)
        outside = radius + _over(left, constants).amin(dim=1)
        found[active] = torch.maximum(found[active], torch.where(kept, outside, inside) * (1 - 2.0**-50))
        # Where local constants are above the global ones, they are so farther out as well.
        on = kept & (tangent > without).any(dim=1)
        if not on.any():
            break
        active, left, tangent, reached = (part[on] for part in (active, left, tangent, radius))
        margin, constants, ends = margin[on], constants[on], (ends[0][on], ends[1][on])
        at = [Followed(*(part[on] for part in here)) for here in at]
        moved = [shell.moved[on] for shell in shells]
    return found


def _after(margin: Tensor, distance: Tensor, constant: Tensor) -> Tensor:
    """What is left of margins (N, R) after a distance (N,), rounded down."""
    return (margin - distance.unsqueeze(1) * constant) * (1 - 2.0**-50)
