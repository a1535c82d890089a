"""Branch and bound: against exact constants, samples, all sides of all kinks, and its own limits."""

from __future__ import annotations

import itertools
import json
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from lipexp.activations import Abs, GroupSort, LeakyReLU, PiecewiseLinear, ReLU
from lipexp.proven.branching import _bound, _combinations, _forward, _network, refusal, search
from lipexp.measured.exact import ExactNetwork
from lipexp.measured.gradients import Maximum, norms, scan
from lipexp.models import Layer
from lipexp.proven.regions.enumeration import constants

ACTS = {
    "relu": ReLU(),
    "leaky_relu": LeakyReLU(0.1),
    "abs": Abs(),
    "maxmin": GroupSort(),
    "neighbours": GroupSort(neighbours=True),
    "groups of 4": GroupSort(group_size=4),
}
NOTHING = Maximum(0.0, ())


def network(*sizes: int, seed: int = 0) -> list[Layer]:
    draws = torch.Generator().manual_seed(seed)
    return [
        Layer(
            torch.randn(1, n_out, n_in, generator=draws) / math.sqrt(n_in),
            torch.randn(1, 1, n_out, generator=draws) / 2,
        )
        for n_in, n_out in itertools.pairwise(sizes)
    ]


def box(dims: int, side: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((dims,), -side).double(), torch.full((dims,), side).double()


def steepest(layers: list[Layer], act: PiecewiseLinear, q: float, n: int = 50_000) -> float:
    dims = layers[0].weight.shape[2]
    x = 4 * torch.rand(1, n, dims, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 2
    return float(norms(scan(layers, act, x).gradient, q).max())


@pytest.mark.parametrize("q", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("name", ACTS)
def test_the_interval_holds_the_exact_constant(name, dims, q):
    act, layers = ACTS[name], network(dims, 16, 16, 1)
    low, high = box(dims)
    known = constants(layers, act, (low.numpy(), high.numpy()), q, 10**6).box.value  # some 1e-12 too large
    found = search(layers, act, (low, high), q, None, NOTHING, 1e-6, 5.0)
    assert found.best.value <= known
    assert known <= found.upper * (1 + 1e-10)
    if name != "groups of 4":  # where three features tie, the hull never shrinks to what is there
        assert found.upper <= found.best.value * (1 + 1e-6)


@pytest.mark.parametrize("dims", [3, 4])
@pytest.mark.parametrize("name", ACTS)
def test_more_dimensions_close_on_small_networks(name, dims):
    act, layers = ACTS[name], network(dims, 8, 8, 1, seed=dims)
    found = search(layers, act, box(dims), 2.0, None, NOTHING, 1e-3, 1.0 if name == "groups of 4" else None)
    assert steepest(layers, act, 2.0) <= found.upper
    assert found.upper <= found.best.value * (1.001 if name != "groups of 4" else 3)
    at = ExactNetwork(layers, act, 0).gradient(np.array(found.best.point))
    assert at is not None
    assert np.linalg.norm([float(v) * 2.0 ** at[1] for v in at[0]]) == pytest.approx(found.best.value, rel=1e-12)


@pytest.mark.parametrize("name", ACTS)
@pytest.mark.parametrize("side", [2.0, 0.2, 0.01])
def test_bounds_of_boxes_hold_at_all_their_points(name, side):
    """Of 200 boxes anywhere, each with 50 points: the states of kinks, and the norms."""
    act, layers = ACTS[name], network(3, 12, 12, 1)
    draws = torch.Generator().manual_seed(2)
    centre = 4 * torch.rand(200, 3, generator=draws, dtype=torch.float64) - 2
    low, high = centre - side / 2, centre + side / 2
    net = _network(layers, act)
    x = low.unsqueeze(1) + side * torch.rand(200, 50, 3, generator=draws, dtype=torch.float64)
    gradients = scan(layers, act, x.view(1, -1, 3)).gradient.view(200, 50, 3)
    for q in (1.0, 2.0, math.inf):
        assert (norms(gradients, q).amax(dim=1) <= _bound(net, low, high, q)[0]).all()
    states, _, hull = _forward(net, low, high)
    assert ((gradients - hull.centre).abs() <= hull.radius).all()
    z = x @ net.weights[0].T + net.biases[0]
    for i, (weight, bias) in enumerate(zip(net.weights, net.biases, strict=True)):
        if i == len(states):
            break
        if i > 0:
            z = act(z) @ weight.T + bias
        first, second = net.kinks[i].T
        gap = z[..., first] - torch.where(second < 0, 0.0, z[..., second])
        assert (gap.sign() == states[i].unsqueeze(1))[(states[i] != 0).unsqueeze(1).expand(gap.shape)].all()


def test_open_kinks_are_given_all_sides():
    states = [torch.tensor([[1.0, 0.0], [0.0, -1.0]]).double(), torch.tensor([[0.0], [0.0]]).double()]
    first, second = _combinations(states, 2)
    rows = torch.cat([first, second], dim=1).view(2, 4, 3)
    expected = [[(1, a, b) for a in (1, -1) for b in (1, -1)], [(a, -1, b) for a in (1, -1) for b in (1, -1)]]
    assert [sorted(map(tuple, part.tolist())) for part in rows] == [sorted(part) for part in expected]


def test_a_time_limit_leaves_a_valid_interval_below_the_root():
    layers = network(4, 64, 64, 1)
    said = []
    found = search(layers, ReLU(), box(4), 2.0, 3.0, NOTHING, 1e-6, 3.0, said.append)
    assert steepest(layers, ReLU(), 2.0) <= found.upper <= 3.0
    assert said
    assert all(line.startswith("bnb: [") for line in said)


def test_a_known_point_and_a_known_bound_are_used():
    layers = network(2, 16, 16, 1)
    found = search(layers, ReLU(), box(2), 2.0, None, NOTHING, 1e-6, None)
    again = search(layers, ReLU(), box(2), 2.0, found.upper * 1.01, found.best, 0.02, None)
    assert again.boxes < found.boxes
    assert again.best == found.best
    assert again.upper <= found.upper * 1.01


def test_a_box_without_interior_is_bounded_at_once():
    layers = network(2, 8, 8, 1)
    point = torch.tensor([0.3, 0.4]).double()
    found = search(layers, ReLU(), (point, point), 2.0, None, NOTHING, 1e-6, None)
    slope = float(scan(layers, ReLU(), point.view(1, 1, 2)).gradient.norm())
    assert slope <= found.upper <= slope * (1 + 1e-9)


def test_gradients_whose_squares_underflow_are_not_lost():
    layers = [Layer(weight * 1e-38, bias * 0) for weight, bias in network(2, 4, 4, 4, 4, 1)]
    found = search(layers, Abs(), box(2), 2.0, None, NOTHING, 0.1, 1.0)
    at = ExactNetwork(layers, Abs(), 0).gradient(np.array([0.3, 0.7]))
    assert at is not None
    square = sum(Fraction(int(v)) ** 2 for v in at[0]) * Fraction(2) ** (2 * at[1])
    assert 0 < square <= Fraction(found.upper) ** 2


def test_numbers_that_overflow_are_no_bound():
    layers = [Layer(weight * 1e37, bias) for weight, bias in network(2, *[4] * 10, 1)]
    assert search(layers, ReLU(), box(2), 2.0, None, NOTHING, 0.1, 1.0).upper == math.inf


class Bent(ReLU):
    def forward(self, x):
        return x


class Otherwise(ReLU):
    """Another map with pieces of its own: its kinks are not those of ReLU."""

    def forward(self, x):
        return 3 * torch.relu(x - 1)

    def piece(self, z):
        return None


def test_what_the_search_is_not_for_is_refused():
    assert refusal(network(4, 8, 1), ReLU()) is None
    assert refusal(network(2, 8, 1), Otherwise()) == "is not for Otherwise"
    assert refusal(network(5, 8, 1), ReLU()) == "is for 4 inputs or fewer"
    assert refusal(network(2, 8, 2), ReLU()) == "is for one output"
    assert refusal(network(2, 8, 1), torch.nn.Tanh()) == "is not for Tanh"
    assert refusal(network(2, 8, 1), Bent()) == "is not for Bent"


def test_certify_searches_when_it_is_asked_to(lipexp, run):
    folder = run("dataset=cones", "dataset.n_inputs=3", "act=maxmin")
    done = lipexp("certify", str(folder), "--method", "bnb", "--gap", "0.01")
    assert (done.code, done.err) == (0, "")
    section = json.loads((folder / "metrics.json").read_text())["certify"]
    bound, interval = section["bounds"]["bnb"], section["lipschitz"]
    assert bound["everywhere"] is False
    assert interval["measured"] <= bound["value"] <= interval["measured"] * 1.01
    assert bound["value"] <= interval["certified"]  # which holds everywhere
    assert "(over the box of the data)" in done.out
    assert "bnb" not in json.loads((run(name="other") / "metrics.json").read_text())["lipschitz"]["method"]
    done = lipexp("certify", str(run("dataset=digits_parity", name="many")), "--method", "bnb")
    assert done.code == 2
    assert "--method=bnb: has no bound for this network: is for 4 inputs or fewer" in done.err
