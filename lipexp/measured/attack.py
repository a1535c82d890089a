"""The falsifier: tries to refute certified radii, and shows that it could.

Inside the ball ||x' - x||_p < r around each test point it looks for a change of class, by projected gradient steps
that lower the margin, and along the secants to points of other classes. The margin is that by which the class c of
x wins: sign(f(x)) f for one output, for several f_c - max_{j != c} f_j. Finding nothing proves nothing, so the
falsifier also reports its power: the fraction of the same points that it flips in balls only a little larger than
what is proven.

Shapes: N points, D inputs, C outputs, of one network, K = 1, in float64.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lipexp.measured.gradients import norms
from lipexp.networks import BakedNetwork
from lipexp.norms import dual
from lipexp.proven.radii import margins, predicted
from lipexp.proven.rounding import evaluate

STEPS = 100
RESTARTS = 4
RATE = 1.0  # the length of the first step, in radii; the steps shrink to zero
INSIDE = 1 - 1e-9  # of the radius: rounding must not lead out of the ball
BEYOND = (1.05, 1.5, 2.0)  # times the radius
NEIGHBOURS = 8  # of the other class, to which the secants of a point lead
RECORDED = 10  # counterexamples in metrics.json
PAIRS = 2**22  # of points compared at once
FEATURES = 2**20  # of one layer held at once


@dataclass
class Flip:
    """A counterexample: another class within the radius. Both classes are certain, and so is the distance."""

    index: int
    point: list[float]
    moved: list[float]
    f: float  # for several outputs the margin by which the class of `point` wins there
    f_moved: float  # and that by which it loses at `moved`
    radius: float


@dataclass
class Attack:
    """What the falsifier found."""

    points: int  # with a radius to attack
    flips: list[Flip]  # inside the radius
    power: dict[float, float]  # factor on the radius -> the fraction of points flipped there

    def record(self) -> dict[str, Any]:
        """What metrics.json says of it."""
        return {
            "points": self.points,
            "steps": STEPS,
            "restarts": RESTARTS,
            "flips_inside": len(self.flips),
            "flipped": {f"{times:g}": fraction for times, fraction in self.power.items()},
            "counterexamples": [asdict(flip) for flip in self.flips[:RECORDED]],
        }


def attack(
    network: BakedNetwork, x: Tensor, radius: npt.NDArray[np.float64], p: float, generator: torch.Generator
) -> Attack:
    """Attack the balls of `radius` (N,) around points x (N, D) in the norm p, and larger ones.

    Args:
        generator: for the random starts.
    """
    chosen = np.flatnonzero((radius > 0) & np.isfinite(radius))
    reach = torch.from_numpy(radius[chosen])
    falsifier = Falsifier(network, x[chosen], p, generator)
    moved, margin = falsifier.lowest(INSIDE * reach)
    found = [
        falsifier.confirmed(i, moved[i], float(reach[i]))
        for i in falsifier.flipped(margin).nonzero()[:, 0].tolist()
    ]
    flips = [flip for flip in found if flip is not None]
    for flip in flips:
        flip.index = int(chosen[flip.index])
    power = {}
    for times in BEYOND if len(chosen) else ():
        power[times] = float(falsifier.flipped(falsifier.lowest(times * reach)[1]).double().mean())
    return Attack(len(chosen), flips, power)


class Falsifier:
    """Attacks on the class of points x (N, D), which move in the norm p."""

    def __init__(self, network: BakedNetwork, x: Tensor, p: float, generator: torch.Generator) -> None:
        self.network, self.x, self.p, self.generator = network, x, p, generator
        f, error = evaluate(network, x)
        self.own = torch.from_numpy(predicted(f))  # (N,) the class of each point
        self.certain = torch.from_numpy(
            4 * error.max(axis=1, initial=0)
        )  # margins near x below minus this are lost
        self.nearest = self._nearest_classes()
        self.rivals = self._rivals()

    # Projected gradients

    def lowest(self, reach: Tensor) -> tuple[Tensor, Tensor]:
        """The points (N, D) within `reach` (N,) of x with the lowest margins that are found, and these.

        The first start is x, the second the lowest point on its secants, the others are random. Every second one
        leads to the strongest of the other classes, the rest to the one that would be nearest if f were linear.
        Points that have flipped are not attacked again.
        """
        best, margin = self.x.clone(), torch.full_like(reach, math.inf)
        for restart in range(RESTARTS):
            rows = (~self.flipped(margin)).nonzero()[:, 0]
            if len(rows) == 0:
                break
            start = self._start(restart, rows, reach[rows])
            at, value = self._descend(start, rows, reach[rows], None if restart % 2 else self.nearest)
            better = value < margin[rows]
            best[rows[better]], margin[rows[better]] = at[better], value[better]
        return best, margin

    def flipped(self, margin: Tensor, rows: Tensor | slice = slice(None)) -> Tensor:
        """Where the margin is clearly negative."""
        return margin < -self.certain[rows]

    def _start(self, restart: int, rows: Tensor, reach: Tensor) -> Tensor:
        x = self.x[rows]
        if restart == 0:
            return x
        if restart == 1:
            return self._on_secants(rows, reach)
        draw = torch.randn(x.shape, generator=self.generator, dtype=x.dtype)
        return x + draw * (reach / norms(draw, self.p)).unsqueeze(1)

    def _descend(self, at: Tensor, rows: Tensor, reach: Tensor, rival: Tensor | None) -> tuple[Tensor, Tensor]:
        """The lowest points on the way of projected gradient steps that shrink to zero, and their margins.

        Args:
            rival: (N,) the classes to which the steps lead; None: the strongest at each step.
        """
        best, margin = at.clone(), torch.full_like(reach, math.inf)
        active = torch.arange(len(rows))
        for step in range(STEPS + 1):
            chosen = rows[active]
            value, gradient = self._slopes(at, self.own[chosen], None if rival is None else rival[chosen])
            better = value < margin[active]
            best[active[better]], margin[active[better]] = at[better], value[better]
            left = ~self.flipped(value, rows[active])
            if step == STEPS or not left.any():
                break
            active, at = active[left], at[left]
            x, towards = self.x[rows[active]], -steepest_direction(gradient[left], self.p)
            rate = RATE * (1 - step / STEPS) * reach[active].unsqueeze(1)
            at = x + project(at - x + rate * towards, reach[active], self.p)
        return best, margin

    def _slopes(self, at: Tensor, own: Tensor, rival: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(N,) margins of the classes `own` at points (N, D), and the gradients of these or of f_own - f_rival."""
        found = []
        for part in torch.arange(len(at)).split(max(1, FEATURES // max([1, *self.network.hidden_widths]))):
            with torch.enable_grad():
                x = at[part].detach().requires_grad_()
                f = self.network.double(x.unsqueeze(0))[0]
                margin = margins_of(f, own[part])
                lowered = margin if rival is None else margins_of(f, own[part], rival[part])
                (gradient,) = torch.autograd.grad(lowered.sum(), x)
            found.append((margin.detach(), gradient))
        margins, gradients = zip(*found, strict=True)
        return torch.cat(margins), torch.cat(gradients)

    def _nearest_classes(self) -> Tensor | None:
        """(N,) the class j with the smallest (f_c - f_j) / ||grad (f_c - f_j)||_q at x; None for one output."""
        if self.network.n_outputs == 1 or len(self.x) == 0:
            return None
        distances = []
        for j in range(self.network.n_outputs):
            rival = torch.full_like(self.own, j)
            value = margins_of(self.network.double(self.x.unsqueeze(0))[0], self.own, rival)
            steepness = norms(self._slopes(self.x, self.own, rival)[1], dual(self.p))
            distances.append((value / steepness).masked_fill(self.own == j, math.inf))
        return torch.stack(distances, dim=1).nan_to_num(nan=math.inf).argmin(dim=1)

    # Secants

    def _rivals(self) -> Tensor:
        """(N, M) the nearest points of other classes; M = 0 where all classes are the same."""
        others = {c: (self.own != c).nonzero()[:, 0] for c in self.own.unique().tolist()}
        nearest = min([NEIGHBOURS, *map(len, others.values())])
        rivals = torch.zeros(len(self.x), nearest, dtype=torch.long)
        for c, other in others.items() if nearest else ():
            for part in (self.own == c).nonzero()[:, 0].split(max(1, PAIRS // len(other))):
                distances = torch.cdist(self.x[part], self.x[other], p=self.p)
                rivals[part] = other[distances.topk(nearest, dim=1, largest=False).indices]
        return rivals

    def _on_secants(self, rows: Tensor, reach: Tensor) -> Tensor:
        """The lowest of the points that lie `reach` (N,) away from x on the way to one of its rivals."""
        x, rivals = self.x[rows], self.x[self.rivals[rows]]  # (N, M, D)
        if rivals.shape[1] == 0:
            return x
        away = rivals - x.unsqueeze(1)
        part = (reach.unsqueeze(1) / norms(away, self.p).clamp_min(1e-300)).clamp_max(1)
        points = x.unsqueeze(1) + part.unsqueeze(2) * away
        own = self.own[rows].repeat_interleave(points.shape[1])
        lowest = self._slopes(points.flatten(0, 1), own)[0].view(points.shape[:2]).argmin(dim=1)
        return points[torch.arange(len(rows)), lowest]

    # Counterexamples

    def confirmed(self, i: int, moved: Tensor, radius: float) -> Flip | None:
        """Point i, moved (D,), as a counterexample to its radius, if classes and distance are beyond doubt."""
        f, error = evaluate(self.network, torch.stack([self.x[i], moved]))
        before, after = predicted(f)
        margin, unsure = margins(f, error)
        wins = margin > unsure
        # The class of x beats all others there, and at `moved` it is beaten.
        certain = before != after and wins[0].all() and wins[1, before if f.shape[1] > 1 else 0]
        if not certain or not closer(self.x[i], moved, radius, self.p):
            return None
        values = f[:, 0] if f.shape[1] == 1 else margins_of(torch.from_numpy(f), torch.full((2,), int(before)))
        return Flip(i, self.x[i].tolist(), moved.tolist(), float(values[0]), float(values[1]), radius)


def margins_of(f: Tensor, own: Tensor, rival: Tensor | None = None) -> Tensor:
    """(N,) by how much the classes `own` win with outputs f (N, C): f or -f for one output, else f_c - max f_j.

    Args:
        rival: (N,) the classes j to compare with; None: the strongest.
    """
    if f.shape[1] == 1:
        return (2 * own - 1) * f[:, 0]
    mine = own.unsqueeze(1)
    others = f.scatter(1, mine, -math.inf) if rival is None else f.gather(1, rival.unsqueeze(1))
    return f.gather(1, mine)[:, 0] - others.amax(dim=1)


def closer(x: Tensor, y: Tensor, radius: float, p: float) -> bool:
    """||x - y||_p <= radius, in rational arithmetic."""
    sizes = [abs(Fraction(a) - Fraction(b)) for a, b in zip(x.tolist(), y.tolist(), strict=True)]
    if p == 2:
        return sum(size * size for size in sizes) <= Fraction(radius) ** 2
    return (max(sizes) if math.isinf(p) else sum(sizes)) <= Fraction(radius)


# The geometry of a norm ------------------------------------------------------------------------------------------


def steepest_direction(gradient: Tensor, p: float) -> Tensor:
    """The direction v (N, D) with ||v||_p = 1 and the largest gradient . v; 0 where there is no gradient."""
    if math.isinf(p):
        return gradient.sign()
    if p == 2:
        return torch.nn.functional.normalize(gradient, dim=1, eps=1e-300)
    largest = gradient.abs().argmax(dim=1, keepdim=True)
    return torch.zeros_like(gradient).scatter(1, largest, gradient.gather(1, largest).sign())


def project(offset: Tensor, reach: Tensor, p: float) -> Tensor:
    """The point nearest to `offset` (N, D), in the 2-norm, of the ball of radius `reach` (N,) in the p-norm.

    Reference: Duchi, Shalev-Shwartz, Singer and Chandra 2008, "Efficient projections onto the l1-ball", figure 1.
    """
    limit = reach.unsqueeze(1)
    if math.isinf(p):
        return torch.minimum(torch.maximum(offset, -limit), limit)
    if p == 2:
        return offset * (limit / norms(offset, 2).unsqueeze(1).clamp_min(1e-300)).clamp_max(1)
    size = offset.abs()
    sorted_size = size.sort(dim=1, descending=True).values
    rank = torch.arange(1, size.shape[1] + 1, dtype=size.dtype)
    thresholds = (sorted_size.cumsum(dim=1) - limit) / rank
    last = (sorted_size > thresholds).sum(dim=1, keepdim=True).clamp_min(1) - 1
    return offset.sign() * (size - thresholds.gather(1, last).clamp_min(0)).clamp_min(0)
