"""Ascent to the steepest point of a network: candidates only, which `gradients.largest` then confirms.

Shapes: K runs, N points, D inputs, H features, S starts. Everything stays inside the box of the data.

In one or two dimensions a grid sees nearly everything, and a few random steps from the steepest points find the
rest. In more dimensions the gradient norm, which is constant on linear regions, is climbed in three ways:

- *soft masks*: in the Jacobian W_n P_{n-1} ... P_1 W_1 the activations' own Jacobians P_i, which jump where x
  crosses a breakpoint, are replaced by sigmoids of the same pre-activations. Its norm then has a gradient, which
  Adam follows while the sigmoids are sharpened; smooth activations stay as they are;
- *region steps*: from the ends of that climb across each of the nearest breakpoints, into the steepest of the
  neighbouring regions, until none is steeper;
- *random steps* with a shrinking radius, which also serve where the other two do not apply, as for activations
  with several breakpoints of their own, and for residual layers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from lipexp.activations import Activation
from lipexp.measured.gradients import norms, scan
from lipexp.networks import BakedNetwork

STARTS = 64
ROUNDS = 20  # of random steps

# In more than two dimensions:
STARTS_PER_KIND = 24  # steepest data, steepest mixtures of two of them, steepest of the box, any mixtures
SOFT_STEPS = 150
SOFT_RATE = 1.0  # the length of Adam's first steps, in sides of the box; it falls to zero
SHARPNESS = (6.0, 100.0)  # of the sigmoids, first and last, per standard deviation of the pre-activations
LARGEST_SOFT_GROUP = 16  # features sorted together: the cost grows with the square
DRAWN = 4096  # mixtures, and points anywhere in the box, of which the steepest are taken
POLISHED = 16  # ends of the climb that go on across breakpoints
NEIGHBOURS = 64  # the nearest breakpoints, which a region step tries
REGION_ROUNDS = 20
MIN_GAIN = 1 + 1e-12  # a step must improve by this factor; smaller differences are rounding

Box = tuple[Tensor, Tensor]  # low and high, (K, 1, D)


def ascend(
    network: BakedNetwork,
    x: Tensor,
    gradients: Tensor,
    q: float,
    generators: Sequence[torch.Generator],
    effort: int = 1,
) -> Tensor:
    """Points (K, S, D) that climb ||grad f||_q for networks of one output with data x (K, N, D).

    Args:
        gradients: of f at the data, (K, N, D).
        generators: the random stream of each run.
        effort: the number of searches in more than two dimensions; the first is that of effort 1.
    """
    if x.shape[2] <= 2:
        return _climb(network, x, gradients, q, generators)
    found = []
    # One run at a time: the features of a whole stack at all starts would be its largest arrays.
    for run, own in enumerate(generators):
        one, points = network.run(run), x[run : run + 1]
        order = norms(gradients[run : run + 1], q).argsort(dim=1, descending=True)
        ranked = _take(points, order)
        parts = [_search_once(one, points, ranked[:, turn * STARTS_PER_KIND :], q, own) for turn in range(effort)]
        found.append(torch.cat(parts, dim=1))
    return torch.cat(found)


def steepness(network: BakedNetwork, x: Tensor, q: float) -> Tensor:
    """(K, N) ||grad f||_q at points x (K, N, D)."""
    return norms(scan(network, x).gradient.squeeze(2), q)


def starts(dims: int) -> int:
    """The number of points from which an ascent in `dims` dimensions starts."""
    return STARTS if dims <= 2 else 4 * STARTS_PER_KIND


def _climb(
    network: BakedNetwork, x: Tensor, gradients: Tensor, q: float, generators: Sequence[torch.Generator]
) -> Tensor:
    """Random steps, half of them from the steepest data points and half from mixtures."""
    half = STARTS // 2
    mixed = torch.cat([_mixtures(x[run : run + 1], half, own) for run, own in enumerate(generators)])
    points = torch.cat([_steepest(x, norms(gradients, q), half), mixed], dim=1)
    return random_steps(network, points, _box(x), q, generators)


def _search_once(network: BakedNetwork, x: Tensor, ranked: Tensor, q: float, generator: torch.Generator) -> Tensor:
    """All three ways for one network, K = 1, with data x; `ranked`: those not started from yet, steepest first."""

    def height(points: Tensor) -> Tensor:
        return steepness(network, points, q)

    jacobians, box = jacobians_of(network), _box(x)
    mixed = _mixtures(x, DRAWN, generator)
    anywhere = torch.lerp(*box, torch.rand(1, DRAWN, x.shape[2], generator=generator, dtype=torch.float64))
    steepest = [_steepest(part, height(part), STARTS_PER_KIND) for part in (mixed, anywhere)]
    points = torch.cat([ranked[:, :STARTS_PER_KIND], *steepest, mixed[:, :STARTS_PER_KIND]], dim=1)
    if jacobians and all(jacobian.can_soften for jacobian in jacobians):
        points = torch.cat([points, soft_ascent(network, jacobians, points, box, q)], dim=1)
    best = _steepest(points, height(points), POLISHED)
    if jacobians:
        best = region_steps(network, jacobians, best, box, q)
    return random_steps(network, best, box, q, [generator])


def random_steps(
    network: BakedNetwork, best: Tensor, box: Box, q: float, generators: Sequence[torch.Generator]
) -> Tensor:
    """`best` (K, S, D) after Gaussian proposals with a shrinking radius, kept when they are steeper."""
    low, high = box
    proposals = torch.stack(
        [torch.randn(ROUNDS, *best.shape[1:], generator=own, dtype=torch.float64) for own in generators]
    )
    height = steepness(network, best, q)
    for turn in range(ROUNDS):
        radius = 0.2 * 0.7**turn * (high - low)
        candidate = _clamp(best + radius * proposals[:, turn], box)
        reached = steepness(network, candidate, q)
        better = reached > height
        best = torch.where(better.unsqueeze(-1), candidate, best)
        height = torch.where(better, reached, height)
    return best


# The Jacobian of an activation -----------------------------------------------------------------------------------


class Jacobian(ABC):
    """The Jacobian of the activation behind one layer of H features."""

    can_soften: bool  # whether `soft` is worth its cost

    @abstractmethod
    def soft(self, z: Tensor, sharpness: Tensor, gradient: Tensor) -> Tensor:
        """`gradient` (K, S, H) at the output pulled back to the input through the softened Jacobian at z."""

    @abstractmethod
    def linear(self, z: Tensor, jacobian: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For features z (S, H) whose own Jacobian is `jacobian` (S, H, D).

        Returns:
            What is 0 at each breakpoint (S, M), its gradients (S, M, D), and the Jacobian of the output.
        """


def jacobians_of(network: BakedNetwork) -> list[Jacobian] | None:
    """The Jacobian behind each hidden layer; None where one has several breakpoints, or they are not known."""
    if not network.is_plain:
        return None
    found: list[Jacobian] = []
    for width, act in zip(network.hidden_widths, network.acts[:-1], strict=True):
        slopes, groups = act.two_slopes(width), act.groups(width)
        if slopes is not None:
            found.append(TwoSlopes(*slopes))
        elif groups is not None:
            found.append(Sorting(torch.from_numpy(groups.copy())))
        elif act.has_local_slopes(width) and not act.is_piecewise_linear:
            found.append(Curved(act))
        else:
            return None
    return found


class TwoSlopes(Jacobian):
    """One slope below 0 and one above, feature by feature, such as ReLU."""

    can_soften = True

    def __init__(self, below: float, above: float) -> None:
        self.below, self.above = (torch.tensor(slope, dtype=torch.float64) for slope in (below, above))

    def soft(self, z: Tensor, sharpness: Tensor, gradient: Tensor) -> Tensor:
        return gradient * torch.lerp(self.below, self.above, torch.sigmoid(sharpness * z))

    def linear(self, z: Tensor, jacobian: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        slope = torch.where(z > 0, self.above, self.below)
        return z, jacobian, slope.unsqueeze(-1) * jacobian


class Curved(Jacobian):
    """Slopes that change smoothly, feature by feature: they need no softening, and have no breakpoints."""

    can_soften = True

    def __init__(self, act: Activation) -> None:
        self.act = act

    def soft(self, z: Tensor, sharpness: Tensor, gradient: Tensor) -> Tensor:
        return gradient * torch.autograd.grad(self.act(z).sum(), z, create_graph=True)[0]

    def linear(self, z: Tensor, jacobian: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        point = z.detach().unsqueeze(0).requires_grad_()
        (slope,) = torch.autograd.grad(self.act(point).sum(), point)
        return z[:, :0], jacobian[:, :0], slope[0].unsqueeze(-1) * jacobian


class Sorting(Jacobian):
    """Sorted groups: the permutation matrix of a group is softened to softmax_j(-sharpness |sorted_i - z_j|).

    For a pair, the two are exchanged by the sigmoid of their difference.

    Reference: Prillo and Eisenschlos 2020, "SoftSort" (arXiv 2006.16038).
    """

    def __init__(self, groups: Tensor) -> None:
        self.size = groups.shape[1]
        self.can_soften = self.size <= LARGEST_SOFT_GROUP
        self.order = groups.flatten()
        self.inverse = self.order.argsort()

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
        return features.index_select(-1, self.order).unflatten(-1, (-1, self.size))

    def _features(self, groups: Tensor) -> Tensor:
        return groups.flatten(-2).index_select(-1, self.inverse)


# Climbing --------------------------------------------------------------------------------------------------------


def soft_ascent(
    network: BakedNetwork, jacobians: Sequence[Jacobian], points: Tensor, box: Box, q: float
) -> Tensor:
    """`points` (K, S, D) after Adam's steps up the gradient of log ||J||_q, J the softened Jacobian."""
    x, mean, square = points, torch.zeros_like(points), torch.zeros_like(points)
    side = box[1] - box[0]
    for step in range(SOFT_STEPS):
        progress = step / SOFT_STEPS
        x = x.detach().requires_grad_()
        sharpness = SHARPNESS[0] * (SHARPNESS[1] / SHARPNESS[0]) ** progress
        height = norms(_soft_gradient(network.double, jacobians, x, sharpness), q)
        (gradient,) = torch.autograd.grad(height.clamp_min(1e-300).log().sum(), x)
        gradient = gradient.nan_to_num()
        mean = mean.lerp(gradient, 0.1)
        square = square.lerp(gradient.square(), 0.01)
        direction = mean / (1 - 0.9 ** (step + 1)) / ((square / (1 - 0.99 ** (step + 1))).sqrt() + 1e-300)
        x = _clamp(x.detach() + SOFT_RATE * (1 - progress) * side * direction, box)
    return x


def _soft_gradient(network: BakedNetwork, jacobians: Sequence[Jacobian], x: Tensor, sharpness: float) -> Tensor:
    """The gradient of f at x (K, S, D) with each activation's Jacobian softened."""
    pre_activations = []
    for (weight, bias), act in zip(network.affine[:-1], network.acts[:-1], strict=True):
        z = torch.baddbmm(bias, x, weight.mT)
        pre_activations.append(z)
        x = act(z)
    gradient = network.affine[-1].weight.expand(-1, x.shape[1], -1)
    for (weight, _), jacobian, z in zip(
        network.affine[-2::-1], jacobians[::-1], pre_activations[::-1], strict=True
    ):
        spread = z.detach().std(dim=(1, 2), keepdim=True) + 1e-300
        gradient = jacobian.soft(z, sharpness / spread, gradient) @ weight
    return gradient if network.linear is None else gradient + network.linear


def region_steps(network: BakedNetwork, jacobians: Sequence[Jacobian], best: Tensor, box: Box, q: float) -> Tensor:
    """`best` (1, S, D) after steps across the nearest breakpoints, as long as a neighbouring region is steeper."""
    height = steepness(network, best, q)
    for _ in range(REGION_ROUNDS):
        beyond = _clamp(_across_breakpoints(network.double, jacobians, best[0]), box)  # (S, M, D)
        if not beyond.shape[1]:  # there are no breakpoints, as in groups of one feature
            break
        reached = steepness(network, beyond.flatten(0, 1).unsqueeze(0), q)
        top = reached.view(beyond.shape[:2]).max(dim=1)
        better = top.values > MIN_GAIN * height[0]
        if not better.any():
            break
        steps = _take(beyond, top.indices.unsqueeze(1))[:, 0]
        best = torch.where(better.unsqueeze(-1), steps, best[0]).unsqueeze(0)
        height = torch.where(better, top.values, height[0]).unsqueeze(0)
    return best


def _across_breakpoints(network: BakedNetwork, jacobians: Sequence[Jacobian], x: Tensor) -> Tensor:
    """(S, M, D) the points just behind the M nearest breakpoints of x (S, D), as far as its map is linear."""
    values, normals = [], []
    point, jacobian = x, torch.eye(x.shape[1], dtype=x.dtype).expand(len(x), -1, -1)
    for (weight, bias), of_act, act in zip(network.affine[:-1], jacobians, network.acts[:-1], strict=True):
        z, jacobian = point @ weight[0].mT + bias[0], weight[0] @ jacobian
        value, normal, jacobian = of_act.linear(z, jacobian)
        values.append(value)
        normals.append(normal)
        point = act(z.unsqueeze(0))[0]
    value, normal = torch.cat(values, dim=1), torch.cat(normals, dim=1)
    length = torch.linalg.vector_norm(normal, dim=2).clamp_min(1e-300)
    nearest = (value.abs() / length).topk(min(NEIGHBOURS, value.shape[1]), largest=False).indices
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
    weights = torch.rand(n, 1, generator=generator, dtype=torch.float64)
    return (weights * x[0, pairs[:, 0]] + (1 - weights) * x[0, pairs[:, 1]]).unsqueeze(0)


def _steepest(x: Tensor, height: Tensor, n: int) -> Tensor:
    """The n highest of the points x (K, N, D), or all where there are fewer."""
    return _take(x, height.topk(min(n, x.shape[1]), dim=1).indices)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x (K, N, D) at index (K, n)."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
