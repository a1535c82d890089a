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
from conftest import act_for, constraint_cases

from lipexp.activations import ALL_NORMS, Abs, Activation, ActiveMap, GroupSort, LeakyReLU, ReLU
from lipexp.blocks import Affine, Residual
from lipexp.constraints import SLL
from lipexp.datasets import Generated
from lipexp.losses import Loss, column
from lipexp.models import Free
from lipexp.networks import BakedNetwork

NORMS = (1.0, 2.0, math.inf)
RELU = ReLU()


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

    With a grain they are multiples of it, so that breakpoints meet in one point.
    """
    layers = []
    for i, (n_in, n_out) in enumerate(itertools.pairwise(sizes)):
        weight = normal(runs, n_out, n_in, seed=100 * seed + 2 * i) / math.sqrt(n_in)
        parts = (weight, bias * normal(runs, 1, n_out, seed=100 * seed + 2 * i + 1))
        layers.append(Affine(*((grain * (2 * part / grain).round() if grain else part).float() for part in parts)))
    return BakedNetwork(layers, act)


def by_hand(*layers: tuple[list[list[float]], list[float]], act: Activation = RELU) -> BakedNetwork:
    """One network from the nested lists of its weights and biases."""
    return BakedNetwork([Affine(torch.tensor([w]), torch.tensor([[b]])) for w, b in layers], act)


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
    return SLL().prove(BakedNetwork([*layers, *others], act))


def free(network: BakedNetwork) -> list[Free]:
    """The layers of a network as free parameters."""
    none = torch.empty(network.n_runs, 0)
    return [Free(weight, bias, none, none) for weight, bias in network.layers]


def scaled(network: BakedNetwork, *factors: float, bias: bool = False) -> BakedNetwork:
    """With the weights of each layer times its factor; the biases, too, times those of all layers so far."""
    layers = zip(network.layers, factors, itertools.accumulate(factors, lambda a, b: a * b), strict=True)
    return replace(network, layers=[Affine(w * f, b * (p if bias else 1)) for (w, b), f, p in layers])


def with_norms(network: BakedNetwork, *norms: float) -> BakedNetwork:
    return replace(network, norms=[[norm] for norm in norms])


def between(network: BakedNetwork, i: int, j: int) -> BakedNetwork:
    """f_i - f_j as a network of one output, which is exact for weights that have a grain."""
    *hidden, (weight, bias) = network.layers
    last = Affine(weight[:, [i]] - weight[:, [j]], bias[..., [i]] - bias[..., [j]])
    return replace(network, layers=[*hidden, last], norms=())


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


# Activations of a user -------------------------------------------------------------------------------------------


class Bent(Activation):
    """z / 4 below 0 and 3 z / 4 above."""

    norms, slopes = ALL_NORMS, (0.25, 0.75)

    def forward(self, z):
        return torch.where(z > 0, 0.75 * z, 0.25 * z)

    def active_map(self, z):
        if np.any(z == 0):
            return None
        return ActiveMap(np.broadcast_to(np.arange(z.shape[-1]), z.shape), np.where(z > 0, 3, 1), -2)

    def breakpoints(self, width):
        return np.stack([np.arange(width)[::-1], np.full(width, -1)], axis=1)


class Descending(Activation):
    """Sorts neighbours, the largest first; its breakpoints are listed backwards."""

    norms = ALL_NORMS

    def __init__(self, size=2):
        super().__init__()
        self.size = size

    def forward(self, z):
        return z.unflatten(-1, (-1, self.size)).sort(dim=-1, descending=True).values.flatten(-2)

    def groups(self, width):
        return np.arange(width).reshape(-1, self.size)[:, ::-1]

    def active_map(self, z):
        members = -z.reshape(*z.shape[:-1], -1, self.size)
        order = np.argsort(members, axis=-1)
        members = np.take_along_axis(members, order, axis=-1)
        if np.any(members[..., 1:] == members[..., :-1]):
            return None
        index = order + self.size * np.arange(order.shape[-2])[:, None]
        return ActiveMap(index.reshape(z.shape), np.ones(z.shape, dtype=np.int64))

    def breakpoints(self, width):
        return np.array([pair for g in self.groups(width)[::-1] for pair in itertools.combinations(g[::-1], 2)])


class Larger(Activation):
    """Of each pair of neighbours both become the larger one, which is handed on twice."""

    size = 2

    def forward(self, z):
        return z.unflatten(-1, (-1, 2)).amax(dim=-1).repeat_interleave(2, dim=-1)

    def active_map(self, z):
        first, second = z[..., ::2], z[..., 1::2]
        if np.any(first == second):
            return None
        index = 2 * np.arange(first.shape[-1]) + np.where(first > second, 0, 1)
        return ActiveMap(np.repeat(index, 2, axis=-1), np.ones(z.shape, dtype=np.int64))

    def breakpoints(self, width):
        return np.arange(width).reshape(-1, 2)


class Tripled(ReLU):
    """Another map than that of its base, whose declarations therefore say nothing of it."""

    def forward(self, z):
        return 3 * torch.relu(z)


class Unlisted(Activation):
    """Declares its active map, but not where it ends."""

    active_map = staticmethod(RELU.active_map)

    def forward(self, z):
        return torch.relu(z)


ACTS = {
    "relu": RELU,
    "leaky_relu": LeakyReLU(0.1),
    "abs": Abs(),
    "bent": Bent(),
    "maxmin": GroupSort(),
    "groups of 3": GroupSort(group_size=3),
    "fullsort": GroupSort(n_groups=1),
    "descending pairs": Descending(),
    "descending threes": Descending(3),
}
PIECEWISE = ACTS | {"larger of pairs": Larger()}


# In rational arithmetic ------------------------------------------------------------------------------------------

Form = list[Fraction]  # an affine function: its gradient, then its constant
Piece = list[tuple[int, Fraction]]  # a linear map of features: out[j] = factor z[index]


def groups_of(act: Activation, width: int) -> list[list[int]] | None:
    """The features that are compared, the place of the smallest first; None: there are two slopes."""
    if isinstance(act, GroupSort):
        n = width // act.size(width)
        return [list(range(first, width, n)) for first in range(n)]
    if isinstance(act, Descending | Larger):
        return [list(range(first, first + act.size))[::-1] for first in range(0, width, act.size)]
    return None


def slopes_of(act: Activation) -> tuple[Fraction, Fraction]:
    """Below 0 and above."""
    return (Fraction(1, 4), Fraction(3, 4)) if isinstance(act, Bent) else (Fraction(act.slope), Fraction(1))


def piece(act: Activation, z: Sequence[Any]) -> Piece:
    """What `act` does to features z: equal ones stay in the order of their indices, and 0 counts as negative."""
    groups = groups_of(act, len(z))
    if groups is None:
        return [(j, slopes_of(act)[v > 0]) for j, v in enumerate(z)]
    orders = [sorted(sorted(group), key=lambda j: z[j]) for group in groups]
    return sorting(groups, [order[-1:] * 2 for order in orders] if isinstance(act, Larger) else orders)


def sorting(groups: Sequence[Sequence[int]], orders: Sequence[Sequence[int]]) -> Piece:
    source = dict(zip(itertools.chain(*groups), itertools.chain(*orders), strict=True))
    return [(source[place], Fraction(1)) for place in range(len(source))]


def pieces(act: Activation, width: int) -> Iterator[Piece]:
    """All that `act` could do to so many features."""
    groups = groups_of(act, width)
    if groups is None:
        return (list(enumerate(slopes)) for slopes in itertools.product(slopes_of(act), repeat=width))
    return (sorting(groups, orders) for orders in itertools.product(*map(itertools.permutations, groups)))


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
    chosen = chosen or [(j, Fraction(1)) for j in range(len(forms))]
    columns = list(zip(*([factor * v for v in forms[j]] for j, factor in chosen), strict=True))
    found = [[dot(row[:-1], column) for column in columns] for row in rows]
    return [[*form[:-1], form[-1] + row[-1]] for form, row in zip(found, rows, strict=True)]


def local_map(network: BakedNetwork, point: Any) -> tuple[list[Form], list[Piece]]:
    """The affine map of each output near a point that is on no breakpoint, and the pieces that lead to it."""
    x, chosen = [*(Fraction(float(v)) for v in point), Fraction(1)], list[Piece]()
    first, *others = network.layers
    forms, beside = exact_rows(first.weight[0], first.bias[0]), True

    def activated(forms: list[Form]) -> Piece:
        chosen.append(piece(network.act, [dot(form, x) for form in forms]))
        return chosen[-1]

    for layer in others:
        if layer.is_residual:
            inside = behind(exact_rows(layer.weight[0].mT, layer.bias[0]), forms)
            back = -layer.weight[0].double() * layer.t[0].double()  # the product of two float32 numbers is exact
            change = behind(exact_rows(back, back.new_zeros(1, len(back))), inside, activated(inside))
            forms = [[a + b for a, b in zip(*pair, strict=True)] for pair in zip(forms, change, strict=True)]
        else:
            chosen_here = activated(forms) if beside else None
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
    for rows in layers:
        found = [behind(rows, forms, chosen) for forms in found for chosen in pieces(network.act, len(forms))]
    return max(power(forms[0][:-1], q) for forms in found)
