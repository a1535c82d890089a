"""The search for the steepest point of a network: candidates only, which `measures.largest` then confirms.

Shapes: K runs, N points, D inputs, H features, S starts. Everything stays inside the box of the data.

In one or two dimensions a grid sees nearly everything, and a few random steps from the steepest points do. In more
dimensions the gradient norm, which is constant on each linear piece, is climbed in three ways:

- *soft masks*: in the Jacobian W_n P_{n-1} ... P_1 W_1 the activations' own Jacobians P_i, which jump where x
  crosses a kink, are replaced by sigmoids of the same pre-activations. Its norm then has a gradient, which Adam
  follows while the sigmoids are sharpened;
- *kink steps*: from the ends of the climb across each of the nearest kinks, into the steepest of the neighbouring
  pieces, until none is steeper;
- *random steps* with a shrinking radius, which also serve where the other two do not apply.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from lipexp.activations import GroupSort, PiecewiseLinear, is_piecewise_linear
from lipexp.measures import norms, scan
from lipexp.models import Layer, run_layers

STARTS = 64
ROUNDS = 20  # of random steps

# In more than two dimensions:
QUARTER = 24  # of the starts: steepest data, steepest mixtures of two of them, steepest of the box, any mixtures
SOFT_STEPS = 150
SOFT_RATE = 1.0  # the length of Adam's first steps, in sides of the box; it falls to zero
SHARPNESS = (6.0, 100.0)  # of the sigmoids, first and last, per standard deviation of the pre-activations
LARGEST_SOFT_GROUP = 16  # of features sorted together: the cost is its square
DRAWN = 4096  # mixtures, and points anywhere in the box, of which the steepest are taken
POLISHED = 16  # ends of the climb that go on across kinks
KINKS = 64  # the nearest ones, which a kink step tries
KINK_ROUNDS = 20
STEEPER = 1 + 1e-12  # by so much; a piece of another batch may be off in its last bits

Box = tuple[Tensor, Tensor]  # low and high, (K, 1, D)


def search(
    layers: Sequence[Layer],
    act: nn.Module,
    x: Tensor,
    gradients: Tensor,
    q: float,
    generators: Sequence[torch.Generator],
    effort: int = 1,
) -> Tensor:
    """Points (K, S, D) that climb ||grad f||_q for networks with data x (K, N, D).

    Args:
        gradients: of f at the data, (K, N, D).
        generators: the random stream of each run.
        effort: in more than two dimensions, so many searches; the first is that of effort 1.
    """
    if x.shape[2] <= 2:
        return _climb(layers, act, x, gradients, q, generators)
    found = []
    # One run at a time: the features of a whole stack at all starts would be its largest arrays.
    for run, own in enumerate(generators):
        one, points = run_layers(layers, run), x[run : run + 1]
        order = norms(gradients[run : run + 1], q).argsort(dim=1, descending=True)
        ranked = _take(points, order)
        parts = [_search_once(one, act, points, ranked[:, turn * QUARTER :], q, own) for turn in range(effort)]
        found.append(torch.cat(parts, dim=1))
    return torch.cat(found)


def starts(dims: int) -> int:
    """How many points a search begins with in `dims` dimensions."""
    return STARTS if dims <= 2 else 4 * QUARTER


def _climb(
    layers: Sequence[Layer],
    act: nn.Module,
    x: Tensor,
    gradients: Tensor,
    q: float,
    generators: Sequence[torch.Generator],
) -> Tensor:
    """Random steps, half of them from the steepest data points and half from mixtures."""
    half = STARTS // 2
    mixed = torch.cat([_mixtures(x[run : run + 1], half, own) for run, own in enumerate(generators)])
    points = torch.cat([_steepest(x, norms(gradients, q), half), mixed], dim=1)
    return random_steps(layers, act, points, _box(x), q, generators)


def _search_once(
    layers: Sequence[Layer], act: nn.Module, x: Tensor, ranked: Tensor, q: float, generator: torch.Generator
) -> Tensor:
    """All three ways for one network, K = 1, with data x; `ranked`: those left to try, steepest first."""

    def height(points: Tensor) -> Tensor:
        return norms(scan(layers, act, points).gradient, q)

    pieces, box = pieces_of(layers, act), _box(x)
    mixed = _mixtures(x, DRAWN, generator)
    anywhere = torch.lerp(*box, torch.rand(1, DRAWN, x.shape[2], generator=generator, dtype=torch.float64))
    steepest = [_steepest(part, height(part), QUARTER) for part in (mixed, anywhere)]
    points = torch.cat([ranked[:, :QUARTER], *steepest, mixed[:, :QUARTER]], dim=1)
    if pieces and all(piece.smooth for piece in pieces):
        points = torch.cat([points, soft_ascent(layers, act, pieces, points, box, q)], dim=1)
    best = _steepest(points, height(points), POLISHED)
    if pieces:
        best = kink_steps(layers, act, pieces, best, box, q)
    return random_steps(layers, act, best, box, q, [generator])


def random_steps(
    layers: Sequence[Layer],
    act: nn.Module,
    best: Tensor,
    box: Box,
    q: float,
    generators: Sequence[torch.Generator],
) -> Tensor:
    """`best` (K, S, D) after Gaussian proposals with a shrinking radius, kept when they are steeper."""
    low, high = box
    proposals = torch.stack(
        [torch.randn(ROUNDS, *best.shape[1:], generator=own, dtype=torch.float64) for own in generators]
    )
    height = norms(scan(layers, act, best).gradient, q)
    for turn in range(ROUNDS):
        radius = 0.2 * 0.7**turn * (high - low)
        candidate = _clamp(best + radius * proposals[:, turn], box)
        reached = norms(scan(layers, act, candidate).gradient, q)
        better = reached > height
        best = torch.where(better.unsqueeze(-1), candidate, best)
        height = torch.where(better, reached, height)
    return best


# Linear pieces ---------------------------------------------------------------------------------------------------


class Pieces(Protocol):
    """What the search reads from the activation of one layer of H features."""

    smooth: bool  # whether `soft` is worth its cost

    def soft(self, z: Tensor, sharpness: Tensor, gradient: Tensor) -> Tensor:
        """`gradient` (K, S, H) at the output pulled back to the input through the softened Jacobian at z."""

    def linear(self, z: Tensor, jacobian: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For z (S, H) and its Jacobian (S, H, D): what is 0 on the kinks (S, M), its gradients (S, M, D), and
        the Jacobian of the output."""


def pieces_of(layers: Sequence[Layer], act: nn.Module) -> list[Pieces] | None:
    """The pieces of each hidden layer; None for an activation whose kinks are not known."""
    if not is_piecewise_linear(act) or not isinstance(act, PiecewiseLinear):
        return None
    widths = [layer.weight.shape[1] for layer in layers[:-1]]
    if isinstance(act, GroupSort):
        return [Sorted(act, width) for width in widths]
    # Distinct and all positive: what is elementwise leaves each feature in its place.
    probes = [act.piece(np.arange(width, 0, -1)) for width in widths]
    if any(probe is None or (probe.index != np.arange(len(probe.index))).any() for probe in probes):
        return None
    return [Elementwise(act, width) for width in widths]


class Elementwise:
    """One slope below 0 and one above, feature by feature, such as ReLU."""

    smooth = True

    def __init__(self, act: nn.Module, width: int) -> None:
        ones = torch.ones(1, 1, width, dtype=torch.float64)
        self.below, self.above = -act(-ones)[0, 0], act(ones)[0, 0]

    def soft(self, z: Tensor, sharpness: Tensor, gradient: Tensor) -> Tensor:
        return gradient * torch.lerp(self.below, self.above, torch.sigmoid(sharpness * z))

    def linear(self, z: Tensor, jacobian: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        slope = torch.where(z > 0, self.above, self.below)
        return z, jacobian, slope.unsqueeze(-1) * jacobian


class Sorted:
    """Sorted groups: the permutation matrix of a group is softened to softmax_j(-sharpness |sorted_i - z_j|).

    For a pair, that exchanges it by the sigmoid of its difference.

    Reference: Prillo and Eisenschlos 2020, "SoftSort" (arXiv 2006.16038).
    """

    def __init__(self, act: GroupSort, width: int) -> None:
        self.size, self.neighbours = act.size(width), act.neighbours
        self.smooth = self.size <= LARGEST_SOFT_GROUP

    def soft(self, z: Tensor, sharpness: Tensor, gradient: Tensor) -> Tensor:
        members, out = self._groups(z), self._groups(gradient)  # (K, S, groups, size)
        if self.size == 2:
            exchange = torch.sigmoid(sharpness * (members[..., 0] - members[..., 1])).unsqueeze(-1)
            return self._features(torch.lerp(out, out.flip(-1), exchange))
        distance = (members.sort(dim=-1).values.unsqueeze(-1) - members.unsqueeze(-2)).abs()
        permutation = torch.softmax(-sharpness[..., None, None] * distance, dim=-1)
        return self._features((out.unsqueeze(-2) @ permutation).squeeze(-2))

    def linear(self, z: Tensor, jacobian: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        members, place = self._groups(z).sort(dim=-1)  # (S, groups, size)
        rows = self._groups(jacobian.mT)  # (S, D, groups, size)
        rows = rows.gather(-1, place.unsqueeze(1).expand(rows.shape))
        return members.diff(dim=-1).flatten(1), rows.diff(dim=-1).flatten(2).mT, self._features(rows).mT

    def _groups(self, features: Tensor) -> Tensor:
        """(..., H) -> (..., groups, size)."""
        if self.neighbours:
            return features.unflatten(-1, (-1, self.size))
        return features.unflatten(-1, (self.size, -1)).mT

    def _features(self, groups: Tensor) -> Tensor:
        return (groups if self.neighbours else groups.mT).flatten(-2)


# Climbing --------------------------------------------------------------------------------------------------------


def soft_ascent(
    layers: Sequence[Layer], act: nn.Module, pieces: Sequence[Pieces], points: Tensor, box: Box, q: float
) -> Tensor:
    """`points` (K, S, D) after Adam's steps up the gradient of log ||J||_q, J the softened Jacobian."""
    layers = [Layer(weight.double(), bias.double()) for weight, bias in layers]
    x, mean, square = points, torch.zeros_like(points), torch.zeros_like(points)
    side = box[1] - box[0]
    for step in range(SOFT_STEPS):
        share = step / SOFT_STEPS
        x = x.detach().requires_grad_()
        sharpness = SHARPNESS[0] * (SHARPNESS[1] / SHARPNESS[0]) ** share
        height = norms(_soft_jacobian(layers, act, pieces, x, sharpness), q)
        (gradient,) = torch.autograd.grad(height.clamp_min(1e-300).log().sum(), x)
        gradient = gradient.nan_to_num()
        mean = mean.lerp(gradient, 0.1)
        square = square.lerp(gradient.square(), 0.01)
        direction = mean / (1 - 0.9 ** (step + 1)) / ((square / (1 - 0.99 ** (step + 1))).sqrt() + 1e-300)
        x = _clamp(x.detach() + SOFT_RATE * (1 - share) * side * direction, box)
    return x


def _soft_jacobian(
    layers: Sequence[Layer], act: nn.Module, pieces: Sequence[Pieces], x: Tensor, sharpness: float
) -> Tensor:
    """The gradient of f at x (K, S, D) with each activation's Jacobian softened."""
    pre_activations = []
    for weight, bias in layers[:-1]:
        z = torch.baddbmm(bias, x, weight.mT)
        pre_activations.append(z)
        x = act(z)
    gradient = layers[-1].weight.expand(-1, x.shape[1], -1)
    for (weight, _), piece, z in zip(layers[-2::-1], pieces[::-1], pre_activations[::-1], strict=True):
        spread = z.detach().std(dim=(1, 2), keepdim=True) + 1e-300
        gradient = piece.soft(z, sharpness / spread, gradient) @ weight
    return gradient


def kink_steps(
    layers: Sequence[Layer], act: nn.Module, pieces: Sequence[Pieces], best: Tensor, box: Box, q: float
) -> Tensor:
    """`best` (1, S, D) after steps across the nearest kinks, as long as a neighbouring piece is steeper."""
    layers = [Layer(weight.double(), bias.double()) for weight, bias in layers]
    height = norms(scan(layers, act, best).gradient, q)
    for _ in range(KINK_ROUNDS):
        beyond = _clamp(_across_kinks(layers, act, pieces, best[0]), box)  # (S, M, D)
        reached = norms(scan(layers, act, beyond.flatten(0, 1).unsqueeze(0)).gradient, q)
        top = reached.view(beyond.shape[:2]).max(dim=1)
        better = top.values > STEEPER * height[0]
        if not better.any():
            break
        steps = _take(beyond, top.indices.unsqueeze(1))[:, 0]
        best = torch.where(better.unsqueeze(-1), steps, best[0]).unsqueeze(0)
        height = torch.where(better, top.values, height[0]).unsqueeze(0)
    return best


def _across_kinks(layers: Sequence[Layer], act: nn.Module, pieces: Sequence[Pieces], x: Tensor) -> Tensor:
    """(S, M, D) the points just behind the M nearest kinks of x (S, D), as far as its piece is linear."""
    values, normals = [], []
    point, jacobian = x, torch.eye(x.shape[1], dtype=x.dtype).expand(len(x), -1, -1)
    for (weight, bias), piece in zip(layers[:-1], pieces, strict=False):
        z, jacobian = point @ weight[0].mT + bias[0], weight[0] @ jacobian
        value, normal, jacobian = piece.linear(z, jacobian)
        values.append(value)
        normals.append(normal)
        point = act(z.unsqueeze(0))[0]
    value, normal = torch.cat(values, dim=1), torch.cat(normals, dim=1)
    length = torch.linalg.vector_norm(normal, dim=2).clamp_min(1e-300)
    nearest = (value.abs() / length).topk(min(KINKS, value.shape[1]), largest=False).indices
    value, length, normal = value.gather(1, nearest), length.gather(1, nearest), _take(normal, nearest)
    return x.unsqueeze(1) - (1.001 * value / length.square()).unsqueeze(-1) * normal


# Points ----------------------------------------------------------------------------------------------------------


def _box(x: Tensor) -> Box:
    return x.amin(dim=1, keepdim=True), x.amax(dim=1, keepdim=True)


def _clamp(x: Tensor, box: Box) -> Tensor:
    return torch.minimum(torch.maximum(x, box[0]), box[1])


def _mixtures(x: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """(1, n, D) points between two random rows of x (1, N, D)."""
    pairs = torch.randint(x.shape[1], (n, 2), generator=generator)
    shares = torch.rand(n, 1, generator=generator, dtype=torch.float64)
    return (shares * x[0, pairs[:, 0]] + (1 - shares) * x[0, pairs[:, 1]]).unsqueeze(0)


def _steepest(x: Tensor, height: Tensor, n: int) -> Tensor:
    """The n highest of the points x (K, N, D), or all where there are fewer."""
    return _take(x, height.topk(min(n, x.shape[1]), dim=1).indices)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x (K, N, D) at index (K, n)."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
