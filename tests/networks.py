"""Small networks for tests, and what they compute in rational arithmetic.

The rational side knows what an activation does by `piece`, and by nothing that it declares to lipexp.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from acts import RELU, Bent, Descending, Handicap, Larger, Tuned
from conftest import act_for, constraint_cases

from lipexp.activations import Activation, GroupSort, Identity, LipschitzSpline, NActivation
from lipexp.blocks import Affine, Residual, act_width
from lipexp.constraints import SLL
from lipexp.datasets import Generated
from lipexp.losses import Loss, column
from lipexp.models import Free
from lipexp.networks import BakedNetwork

NORMS = (1.0, 2.0, math.inf)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def uniform(*shape: int, seed: int = 0) -> torch.Tensor:
    """Between -1 and 1."""
    return 2 * torch.rand(*shape, generator=generator(seed), dtype=torch.float64) - 1


def stored(*shape: int) -> torch.Tensor:
    """Points in float64 that float32 holds exactly, as data are."""
    return normal(*shape).float().double()


def network(
    *sizes: int, act: Activation = RELU, runs: int = 1, seed: int = 0, bias: float = 0.5, grain: float = 0.0
) -> BakedNetwork:
    """Random networks with these numbers of features: normal weights, and biases of size `bias`.

    With a grain they, and the parameters of the activation, are multiples of it, so that breakpoints meet in one
    point.
    """
    layers = []
    for i, (n_in, n_out) in enumerate(itertools.pairwise(sizes)):
        weight = normal(runs, n_out, n_in, seed=100 * seed + 2 * i) / math.sqrt(n_in)
        parts = (weight, bias * normal(runs, 1, n_out, seed=100 * seed + 2 * i + 1))
        layers.append(Affine(*(in_grains(part, grain) for part in parts)))
    return with_parameters(BakedNetwork(layers, [act] * len(layers)), seed, grain)


def with_act(network: BakedNetwork, act: Activation) -> BakedNetwork:
    """The same layers with another activation."""
    return replace(network, acts=[act] * len(network.layers))


def with_parameters(network: BakedNetwork, seed: int = 0, grain: float = 0.0) -> BakedNetwork:
    """With random parameters of the activation in each layer, if it has any."""
    acts = []
    for i, act in enumerate(network.acts):
        width = act_width(network.layers, i)
        n = act.n_parameters(width) if width else 0
        theta = in_grains(normal(network.n_runs, n, seed=100 * seed + 50 + i), grain)
        acts.append(act.at(act.within(theta, torch.ones(1, 1))) if n else act)
    return replace(network, acts=acts)


def in_grains(part: torch.Tensor, grain: float) -> torch.Tensor:
    return (grain * (2 * part / grain).round() if grain else part).float()


def by_hand(*layers: tuple[list[list[float]], list[float]], act: Activation = RELU) -> BakedNetwork:
    """One network from the nested lists of its weights and biases."""
    affine = [Affine(torch.tensor([w]), torch.tensor([[b]])) for w, b in layers]
    return BakedNetwork(affine, [act] * len(affine))


def residual(
    *sizes: int, inside: int = 6, act: Activation = RELU, seed: int = 0, bias: float = 0.5
) -> BakedNetwork:
    """With two residual layers of `inside` features behind the first layer, and the proven norms of all."""
    first, *others = network(*sizes, act=act, seed=seed, bias=bias).layers
    layers = [first]
    for i in range(2):
        weight, offset = (normal(1, n, inside, seed=seed + 50 + i + n) for n in (sizes[1], 1))
        t = 2 * (1 - 2.0**-10) / (weight.mT @ weight).abs().sum(dim=2)  # diagonally dominant
        layers.append(Residual(weight.float(), (bias * offset).float(), t.float().unsqueeze(1)))
    layers += others
    return SLL().prove(with_parameters(BakedNetwork(layers, [act] * len(layers)), seed))


def free(network: BakedNetwork) -> list[Free]:
    """The layers of a network as free parameters."""
    none = torch.empty(network.n_runs, 0)
    thetas = [act.theta.expand(network.n_runs, -1) for act in network.acts]
    return [Free(*layer, none, theta) for layer, theta in zip(network.layers, thetas, strict=True)]


def scaled(network: BakedNetwork, *factors: float, bias: bool = False) -> BakedNetwork:
    """With the weights of each layer times its factor; the biases, too, times those of all layers so far."""
    layers = zip(network.layers, factors, itertools.accumulate(factors, lambda a, b: a * b), strict=True)
    return replace(network, layers=[Affine(w * f, b * (p if bias else 1)) for (w, b), f, p in layers])


def with_norms(network: BakedNetwork, *norms: float) -> BakedNetwork:
    return replace(network, norms=[[norm] for norm in norms])


def difference(layer: Affine, i: int, j: int) -> Affine:
    """Output i less output j of a layer."""
    weight, bias = layer
    return Affine(weight[:, [i]] - weight[:, [j]], bias[..., [i]] - bias[..., [j]])


def between(network: BakedNetwork, i: int, j: int) -> BakedNetwork:
    """f_i - f_j as a network of one output, which is exact for weights that have a grain."""
    *hidden, last = network.layers
    return replace(network, layers=[*hidden, difference(last, i, j)], norms=())


def degenerate(network: BakedNetwork) -> BakedNetwork:
    """With features that are equal, parallel, zero and constant everywhere, in both of its layers of 6."""
    layers = [Affine(weight.clone(), bias.clone()) for weight, bias in network.layers]
    for i, (weight, bias) in enumerate(layers[:-1]):
        weight[:, 1], bias[..., 1] = weight[:, 0], bias[..., 0]
        weight[:, 2], bias[..., 2] = 0, 0
        weight[:, 4] = 2 * weight[:, 3]
        if i > 0:
            weight[:, 1, :2] = weight[:, 0, [1, 0]]  # equal, because what they are computed from is
            weight[:, 5] = 0
    return replace(network, layers=layers)


class Blobs(Generated):
    """Points around one centre for each class, in any number of dimensions."""

    task = "multiclass"

    def __init__(self, n_train=64, n_val=32, n_test=32, n_inputs=2, n_outputs=3, noise=0.5, scale=2.0):
        super().__init__(n_train, n_val, n_test)
        self.n_inputs, self.n_outputs, self.noise, self.scale = n_inputs, n_outputs, noise, scale

    def sample(self, n, rng):
        centres = self.scale * np.random.default_rng(0).normal(size=(self.n_outputs, self.n_inputs))
        y = rng.integers(self.n_outputs, size=n)
        return centres[y] + self.noise * rng.normal(size=(n, self.n_inputs)), y


class Apart(Loss):
    """max(0, margin - (f_y - max f_j) / L) for the class y against all others j."""

    task = "multiclass"
    per_run = ("margin", "lipschitz")

    def __init__(self, margin=0.5, lipschitz=1.0):
        super().__init__()
        self.margin, self.lipschitz = margin, lipschitz

    def forward(self, f, y):
        if f.dim() == 2:  # one output: that of class 1, where the other one is 0
            f = torch.stack([torch.zeros_like(f), f], dim=-1)
        own = torch.nn.functional.one_hot(y.long(), f.shape[-1]).bool()
        margin = f.masked_fill(~own, -math.inf).amax(dim=-1) - f.masked_fill(own, -math.inf).amax(dim=-1)
        return torch.relu(column(self.margin, margin) - margin / column(self.lipschitz, margin))


def of_classes(n: int, dims: int) -> tuple[str, ...]:
    """The overrides of a run that tells apart n classes in so many dimensions."""
    shape = ("+dataset.n_inputs", str(dims)), ("+dataset.n_outputs", str(n))
    targets = ("dataset._target_", "networks.Blobs"), ("loss._target_", "networks.Apart")
    return tuple(f"{key}={value}" for key, value in (*targets, *shape))


def pairs(*rooms: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Choices of an option of each room in which every option occurs."""
    options = [list(room) for room in rooms]
    return [tuple(room[i % len(room)] for room in options) for i in range(max(map(len, options)))]


# The overrides of small trained networks with every constraint, and the runs of each stack.
CASES = constraint_cases(bounded=False).values()
TRAINED = [(*case, *act_for(case, place), "model.depth=2") for place, case in enumerate(CASES)]
# The same with several classes: 3 in the plane, and 10 in five dimensions.
SEVERAL = [(*case, *of_classes(*((3, 2), (10, 5))[i % 2])) for i, case in enumerate(TRAINED)]
# One case of each kind of network that there is once training is over, where all would take minutes.
KINDS = {f"constraint={name}" for name in ("none", "spectral", "linf", "one", "sll", "sandwich")}
ONE_OF_EACH, SEVERAL_OF_EACH = ([case for case in cases if case[0] in KINDS] for cases in (TRAINED, SEVERAL))
EACH_LIPSCHITZ = ("lipschitz=0.01", "lipschitz=1", "lipschitz=3", "lipschitz=100")


# In rational arithmetic ------------------------------------------------------------------------------------------

Form = list[Fraction]  # an affine function: its gradient, then its constant
Piece = list[tuple[int, Fraction, Fraction]]  # an affine map of features: out[j] = factor z[index] + offset
Line = tuple[Fraction, Fraction]  # slope and offset


def groups_of(act: Activation, width: int) -> list[list[int]] | None:
    """The features that are compared, the place of the smallest first; None: each is mapped by its own curve."""
    if isinstance(act, GroupSort):
        n = width // act.size(width)
        return [list(range(first, width, n)) for first in range(n)]
    if isinstance(act, Descending | Larger):
        return [list(range(first, first + act.size))[::-1] for first in range(0, width, act.size)]
    return None


def slopes_of(act: Activation) -> tuple[Fraction, Fraction]:
    """Below 0 and above."""
    if isinstance(act, Bent):
        return Fraction(1, 4), Fraction(3, 4)
    if isinstance(act, Identity):
        return Fraction(1), Fraction(1)
    return Fraction(float(act.theta[0, 0]) if isinstance(act, Tuned) else act.slope), Fraction(1)


def curve(act: Activation, j: int, width: int) -> tuple[list[Fraction], list[Line]]:
    """The points at which the slope of feature j changes, ascending, and the lines between them."""
    if isinstance(act, NActivation):
        low, high = (Fraction(float(act.theta[0, place])) for place in (j, width + j))
        return [low, high], [(Fraction(1), -2 * low), (Fraction(-1), Fraction(0)), (Fraction(1), -2 * high)]
    if not isinstance(act, LipschitzSpline):
        return [Fraction(0)], [(slope, Fraction(0)) for slope in slopes_of(act)]
    *slopes, spacing = (Fraction(v) for v in act.theta[0].tolist())
    slopes, side = slopes[j::width], act.n_knots // 2
    knots = [place * spacing for place in range(-side, side + 1)]
    lines = [(slopes[side], Fraction(0)), (slopes[side + 1], Fraction(0))]
    for step in range(1, side + 1):  # each line goes on where the one before it ends
        for place, end, inner in ((side - step, knots[side - step], 0), (side + 1 + step, knots[side + step], -1)):
            value = lines[inner][0] * end + lines[inner][1]
            lines.insert(0 if inner == 0 else len(lines), (slopes[place], value - slopes[place] * end))
    return knots, lines


def piece(act: Activation, z: Sequence[Any]) -> Piece:
    """What `act` does to features z: equal ones stay in the order of their indices, and knots count as below."""
    groups = groups_of(act, len(z))
    if groups is None:
        curves = [curve(act, j, len(z)) for j in range(len(z))]
        places = [sum(v > knot for knot in knots) for v, (knots, _) in zip(z, curves, strict=True)]
        return [(j, *lines[place]) for j, (place, (_, lines)) in enumerate(zip(places, curves, strict=True))]
    orders = [sorted(sorted(group), key=lambda j: z[j] + ahead(act, j)) for group in groups]
    return sorting(act, groups, [order[-1:] * 2 for order in orders] if isinstance(act, Larger) else orders)


def ahead(act: Activation, j: int) -> Fraction:
    """What is added to feature j before it is compared."""
    return Fraction(j % 2, 2) if isinstance(act, Handicap) else Fraction(0)


def sorting(act: Activation, groups: Sequence[Sequence[int]], orders: Sequence[Sequence[int]]) -> Piece:
    source = dict(zip(itertools.chain(*groups), itertools.chain(*orders), strict=True))
    return [(source[place], Fraction(1), ahead(act, source[place])) for place in range(len(source))]


def pieces(act: Activation, width: int) -> Iterator[Piece]:
    """All that `act` could do to so many features."""
    groups = groups_of(act, width)
    if groups is None:
        lines = (curve(act, j, width)[1] for j in range(width))
        return ([(j, *line) for j, line in enumerate(chosen)] for chosen in itertools.product(*lines))
    return (sorting(act, groups, orders) for orders in itertools.product(*map(itertools.permutations, groups)))


def exact_rows(weight: torch.Tensor, bias: torch.Tensor) -> list[Form]:
    """The rows of a weight (out, in), each with its bias (1, out)."""
    return [[Fraction(v) for v in row] for row in torch.cat([weight, bias.mT], dim=1).double().tolist()]


def exact_layers(network: BakedNetwork) -> list[list[Form]]:
    """The rows of each affine layer."""
    return [exact_rows(weight[0], bias[0]) for weight, bias in network.layers]


def dot(a: Sequence[Any], b: Sequence[Any]) -> Any:
    return sum(x * y for x, y in zip(a, b, strict=True))


def behind(rows: list[Form], forms: Sequence[Form], chosen: Piece | None = None) -> list[Form]:
    """The affine functions behind an activation, if there is one, and a layer."""
    chosen = chosen or [(j, Fraction(1), Fraction(0)) for j in range(len(forms))]
    out = [[factor * v for v in forms[j]] for j, factor, _ in chosen]
    out = [[*form[:-1], form[-1] + offset] for form, (_, _, offset) in zip(out, chosen, strict=True)]
    columns = list(zip(*out, strict=True))
    found = [[dot(row[:-1], column) for column in columns] for row in rows]
    return [[*form[:-1], form[-1] + row[-1]] for form, row in zip(found, rows, strict=True)]


def local_map(network: BakedNetwork, point: Any) -> tuple[list[Form], list[Piece]]:
    """The affine map of each output near a point that is on no breakpoint, and the pieces that lead to it."""
    x, chosen = [*(Fraction(float(v)) for v in point), Fraction(1)], list[Piece]()
    first, *others = network.layers
    forms, beside = exact_rows(first.weight[0], first.bias[0]), True

    def activated(act: Activation, forms: list[Form]) -> Piece:
        chosen.append(piece(act, [dot(form, x) for form in forms]))
        return chosen[-1]

    for layer, (before, inner) in zip(others, itertools.pairwise(network.acts), strict=True):
        if layer.is_residual:
            inside = behind(exact_rows(layer.weight[0].mT, layer.bias[0]), forms)
            back = -layer.weight[0].double() * layer.t[0].double()  # the product of two float32 numbers is exact
            change = behind(exact_rows(back, back.new_zeros(1, len(back))), inside, activated(inner, inside))
            forms = [[a + b for a, b in zip(*pair, strict=True)] for pair in zip(forms, change, strict=True)]
        else:
            chosen_here = activated(before, forms) if beside else None
            forms = behind(exact_rows(layer.weight[0], layer.bias[0]), forms, chosen_here)
        beside = not layer.is_residual
    return forms, chosen


def jacobian(network: BakedNetwork, point: Any) -> list[Form]:
    """The gradients of all outputs at a point that is on no breakpoint."""
    return [form[:-1] for form in local_map(network, point)[0]]


def gradient(network: BakedNetwork, point: Any) -> Form:
    return jacobian(network, point)[0]


def values(network: BakedNetwork, point: Any) -> list[Fraction]:
    """All outputs at any point."""
    x = [*(Fraction(float(v)) for v in point), 1]
    return [dot(form, x) for form in local_map(network, point)[0]]


def value(network: BakedNetwork, point: Any) -> Fraction:
    """f at any point."""
    return values(network, point)[0]


def power(vector: Sequence[Fraction], q: float) -> Fraction:
    """||vector||_q, for q = 2 its square."""
    return dot(vector, vector) if q == 2 else sum(map(abs, vector)) if q == 1 else max(map(abs, vector))


def root(power: Fraction, q: float) -> float:
    """The norm, in more digits than float64 has before it is rounded."""
    return math.isqrt(int(power * 4**1200)) / 2**1200 if q == 2 else float(power)


def norm_at(network: BakedNetwork, point: Any, q: float) -> float:
    """||grad f||_q at a point."""
    return root(power(gradient(network, point), q), q)


def pattern_power(network: BakedNetwork, q: float) -> Fraction:
    """The largest `power` of the gradient on all patterns of pieces, whether they occur or not."""
    forms, *layers = exact_layers(network)
    found = [forms]
    for act, rows in zip(network.acts, layers, strict=False):
        found = [behind(rows, forms, chosen) for forms in found for chosen in pieces(act, len(forms))]
    return max(power(forms[0][:-1], q) for forms in found)
