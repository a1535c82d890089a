"""Branch and bound: against exact constants, samples, all sides of all breakpoints, and its own limits."""

import itertools
import json
import math
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from acts import ACTS, Tripled, Unlisted
from networks import (
    NORMS,
    generator,
    gradient,
    network,
    norm_at,
    normal,
    pairs,
    residual,
    scaled,
    uniform,
    with_act,
)

from lipexp.activations import (
    ELU,
    GELU,
    Elementwise,
    GroupSort,
    LipschitzSpline,
    NActivation,
    ReLU,
    Sigmoid,
    SiLU,
    Softplus,
    Tanh,
    as_activation,
)
from lipexp.jacobians import IntervalNetwork
from lipexp.measured.gradients import INTERVAL, Maximum, norms, operator_norms, scan
from lipexp.proven import branching
from lipexp.proven.branching import Domain, branch_and_bound, why_not_applicable
from lipexp.proven.regions import constants

NOTHING = Maximum(0.0, ())
# Where three features tie, the hull never shrinks to what is there, and the bound not to the constant.
THREES = ("groups of 3", "fullsort", "descending threes")


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """The time counts the rounds of a search, so that `seconds` limits these."""
    ticks = itertools.count()
    monkeypatch.setattr(branching, "time", SimpleNamespace(monotonic=lambda: next(ticks)))


def searched(net, q=2.0, best=NOTHING, root=None, gap=1e-3, seconds=math.inf, report=None):
    box = tuple(torch.full((net.n_inputs,), end).double() for end in (-2, 2))
    return branch_and_bound(net, Domain(box, q), root, best, gap, seconds, report)


def sampled(net, q=2.0):
    return float(norms(scan(net, 2 * uniform(1, 20_000, net.n_inputs)).gradient, q).max())


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("name", ACTS)
def test_the_interval_holds_the_exact_constant(name, dims):
    net, box = network(dims, 12, 6, 1, act=ACTS[name]), (np.full(dims, -2.0), np.full(dims, 2.0))
    for q in NORMS:
        known = constants(net, box, q, 10**5).box.value  # some 1e-12 too large
        found = searched(net, q, gap=1e-6, seconds=5 if name in THREES else math.inf)
        assert found.best.value <= known <= found.upper * (1 + 1e-10)
        assert name in THREES or found.upper <= found.best.value * (1 + 1e-6)


class Steep(Elementwise):
    """z above 0 and -1024 z below."""

    def __init__(self):
        super().__init__(slope=-1)
        self.slope = -1024.0


def test_the_rounding_errors_of_a_single_region_grow_with_the_slopes():
    net = network(3, 12, 12, 12, 1, act=Steep())
    own = IntervalNetwork(net)
    for point in uniform(100, 3):
        inputs, _ = net.double.inputs_and_output(point.view(1, 1, -1))
        z = [layer(x, net.acts[0])[0] for layer, x in zip(net.double.layers[:-1], inputs, strict=False)]
        found = branching._single(own, [part.sign() for part in z])
        sides = (part[0, 0].tolist() for part in found)
        for centre, radius, exactly in zip(*sides, gradient(net, point), strict=True):
            assert abs(Fraction(centre) - exactly) <= Fraction(radius)


@pytest.mark.parametrize(("name", "dims"), pairs(ACTS, [3, 4]))
def test_more_dimensions_close_on_small_networks(name, dims):
    net = network(dims, 6, 6, 1, act=ACTS[name], seed=dims)
    found = searched(net, seconds=20 if name in THREES else math.inf)
    assert sampled(net) <= found.upper <= found.best.value * (3 if name in THREES else 1.001)
    assert found.best.value == pytest.approx(norm_at(net, found.best.point, 2), rel=1e-12)


@pytest.mark.parametrize("name", ACTS)
@pytest.mark.parametrize("side", [2.0, 0.2, 0.01])
def test_bounds_of_boxes_hold_at_all_their_points(name, side):
    """Of boxes anywhere, with 50 points each: the states of breakpoints, and the norms."""
    net = network(3, 12, 12, 1, act=ACTS[name])
    own, low = IntervalNetwork(net), 2 * uniform(100, 3) - side / 2
    x = low.unsqueeze(1) + side * uniform(100, 50, 3, seed=1).abs()
    gradients = scan(net, x.view(1, -1, 3)).gradient.view(100, 50, 3)
    for q in NORMS:
        assert (
            norms(gradients, q).amax(dim=1) <= branching._bound(own, low, low + side, Domain((low, low), q))[0]
        ).all()
    sides, _, hull = own.over(low, low + side)
    assert ((gradients - hull.centre).abs() <= hull.radius).all()
    inputs, _ = net.double.inputs_and_output(x.view(1, -1, 3))
    for layer, received, hidden, state in zip(net.double.layers, inputs, own.hidden, sides, strict=False):
        z, (first, second) = layer(received, net.acts[0])[0].view(100, 50, -1), hidden.pairs.T
        gap = z[..., first] - torch.where(second < 0, 0.0, z[..., second])
        state = state.state
        assert (gap.sign() == state.unsqueeze(1))[(state != 0).unsqueeze(1).expand(gap.shape)].all()


# Other networks --------------------------------------------------------------------------------------------------


CURVED = {
    "tanh": Tanh(),
    "sigmoid": Sigmoid(),
    "softplus": Softplus(beta=2),
    "elu": ELU(alpha=2, scaled=False),
    "gelu": GELU("tanh", scaled=False),
    "silu": SiLU(),
    "n": NActivation(),
    "spline": LipschitzSpline(5),
}


def steepest_seen(net, low, high, q, h=math.inf, n=20_000):
    x = low + (high - low) * torch.rand(1, n, net.n_inputs, generator=generator(5), dtype=torch.float64)
    return float(operator_norms(scan(net, x).gradient, q, h).max())


@pytest.mark.parametrize("name", CURVED)
@pytest.mark.parametrize("side", [2.0, 0.2, 1e-3])
def test_jacobians_of_other_networks_are_within_their_hulls(name, side):
    """Curved, residual, with several outputs and with a linear term."""
    nets = [network(3, 8, 8, 3, act=CURVED[name]), residual(3, 8, 2, act=CURVED[name])]
    nets.append(replace(nets[0], linear=normal(1, 3, 3).float()))
    for net in nets:
        own, low = IntervalNetwork(net), 2 * uniform(50, 3) - side / 2
        x = low.unsqueeze(1) + side * uniform(50, 40, 3, seed=1).abs()
        jacobians = scan(net, x.view(1, -1, 3)).gradient.view(50, 40, *(net.n_outputs, 3))
        hull = own.over(low, low + side).jacobian
        assert ((jacobians - hull.centre.unsqueeze(1)).abs() <= hull.radius.unsqueeze(1) + 1e-14).all()
        assert side > 1e-3 or float(hull.radius.median()) < 0.05
        for q, h in [(q, math.inf) for q in NORMS] + [(2.0, 2.0), (math.inf, 1.0)]:
            seen = operator_norms(jacobians, q, h).amax(dim=1)
            bound = branching._bound(own, low, low + side, Domain((low, low), q, h))[0]
            assert (seen <= bound * (1 + 1e-14)).all()


@pytest.mark.parametrize("name", CURVED)
def test_the_search_closes_on_curved_networks(name):
    for dims, gap in ((1, 1e-4), (2, 0.05)):
        net = network(dims, 6, 6, 1, act=CURVED[name], seed=1)
        low, high = -torch.ones(dims).double(), torch.ones(dims).double()
        for q in NORMS:
            found = branch_and_bound(net, Domain((low, high), q), None, NOTHING, gap, math.inf)
            assert steepest_seen(net, low, high, q) <= found.upper <= found.best.value * (1 + gap)


@pytest.mark.parametrize(("q", "h"), [(1.0, math.inf), (2.0, 2.0), (math.inf, 1.0)])
@pytest.mark.parametrize("kind", ["relu", "maxmin", "tanh", "residual", "linear"])
def test_the_search_closes_on_several_outputs_residual_layers_and_linear_terms(kind, q, h):
    act = {"maxmin": ACTS["maxmin"], "tanh": Tanh()}.get(kind, ReLU())
    net = residual(2, 6, 3, act=act) if kind == "residual" else network(2, 6, 6, 3, act=act)
    net = replace(net, linear=normal(1, 3, 2).float()) if kind == "linear" else net
    low, high = -torch.ones(2).double(), torch.ones(2).double()
    found = branch_and_bound(net, Domain((low, high), q, h), None, NOTHING, 0.05, math.inf)
    assert steepest_seen(net, low, high, q, h) <= found.upper <= found.best.value * 1.05


def test_layers_may_have_different_activations():
    net = replace(network(2, 6, 6, 6, 1), acts=[Tanh(), GroupSort(), GELU(), Tanh()])
    low, high = -torch.ones(2).double(), torch.ones(2).double()
    found = branch_and_bound(net, Domain((low, high), 2.0), None, NOTHING, 0.02, math.inf)
    assert steepest_seen(net, low, high, 2.0) <= found.upper <= found.best.value * 1.02
    assert found.best.by == INTERVAL


@pytest.mark.parametrize("shape", [(3, 5), (5, 2), (1, 4), (6, 6)], ids=str)
def test_spectral_norms_are_bounded_closely(shape):
    """Of random, singular, orthogonal, tiny, huge and zero matrices."""
    matrices = normal(20, *shape)
    matrices[0] = 1.0
    matrices[1], matrices[2], matrices[3] = matrices[1] * 1e-200, matrices[2] * 1e200, 0
    matrices[4] = torch.eye(*shape)
    exactly = torch.linalg.matrix_norm(matrices, ord=2)
    found = branching._spectral_norms_above(matrices)
    assert (found >= exactly * (1 - 1e-14)).all()
    assert (found <= exactly * 1.0001 + 1e-250).all()


@pytest.mark.parametrize("dims", [5, 6])
def test_five_and_six_inputs_are_searched(dims):
    net = network(dims, 4, 4, 1, seed=dims)
    found = searched(net, gap=0.01)
    assert sampled(net) <= found.upper <= found.best.value * 1.01


# Limits ----------------------------------------------------------------------------------------------------------


def test_a_time_limit_leaves_a_valid_interval_below_the_root():
    net, said = network(4, 64, 64, 1), []
    found = searched(net, root=3.0, gap=1e-6, seconds=8, report=said.append)
    assert sampled(net) <= found.upper <= 3.0
    assert len(said) == 2  # every third round
    assert all(line.startswith("bnb: [") for line in said)


def test_a_known_point_and_a_known_bound_are_used():
    net = network(2, 16, 16, 1)
    found = searched(net, gap=1e-6)
    again = searched(net, root=found.upper * 1.01, best=found.best, gap=0.02)
    assert again.boxes < found.boxes
    assert again.best == found.best
    assert again.upper <= found.upper * 1.01


def test_a_box_without_interior_is_bounded_at_once():
    net, point = network(2, 8, 8, 1), torch.tensor([0.3, 0.4]).double()
    found = branch_and_bound(net, Domain((point, point), 2.0), None, NOTHING, 1e-6, math.inf)
    slope = float(scan(net, point.view(1, 1, 2)).gradient.norm())
    assert slope <= found.upper <= slope * (1 + 1e-9)


def test_numbers_that_underflow_are_not_lost_and_those_that_overflow_are_no_bound():
    net = scaled(network(2, 4, 4, 4, 4, 1, act=ACTS["abs"], bias=0), *[1e-38] * 5)
    assert 0 < norm_at(net, [0.3, 0.7], 2) <= searched(net, gap=0.1, seconds=5).upper
    assert searched(scaled(network(2, *[4] * 10, 1), *[1e37] * 11), seconds=1).upper == math.inf


def test_the_search_ends_where_halving_gains_nothing():
    """At the constant 0, on a box that no breakpoint crosses, and where the bound of the whole box overflows."""
    zero = network(2, 8, 8, 1, act=ACTS["maxmin"])
    linear = scaled(network(3, 8, 8, 1), 1, 1e-3, 1)
    linear.layers[0].bias[:], linear.layers[1].bias[:] = 1e3, 1e3
    huge = scaled(network(3, *[4] * 10, 1), *[1e37] * 11)
    for net, most in ((scaled(zero, 0, 1, 1), 1e-100), (scaled(zero, 1, 0, 0, bias=True), 1e-100)):
        assert searched(net).upper < most
    found = searched(linear, gap=1e-300)
    assert (found.boxes, found.upper) == (1, pytest.approx(norm_at(linear, [0, 0, 0], 2), rel=1e-12))
    assert searched(huge)[::2] == (math.inf, 1)
    assert searched(huge, root=7.0, seconds=3).upper == 7.0
    assert searched(scaled(zero, 1, 0, 1), root=0.0)[::2] == (0.0, 1)


@pytest.mark.parametrize("size", [64, 16, 1])
def test_as_many_boxes_are_bounded_together_as_fit_the_memory(monkeypatch, size):
    """Where groups of `size` are sorted, each box takes `size` numbers for every feature and input."""
    seen, bound = [], branching._bound

    def counted(net, low, *rest):
        seen.append(len(low))
        return bound(net, low, *rest)

    monkeypatch.setattr(branching, "_bound", counted)
    monkeypatch.setattr(branching, "_CHUNK", 20 * 64 * 64 * 3)
    act = GroupSort(group_size=size) if size > 1 else ReLU()
    searched(network(3, 64, 64, 1, act=act), gap=1e-300, seconds=10)
    assert 20 < max(seen) <= 2 * min(20 * 64 // size, branching.BATCH)


def test_sorted_groups_of_one_feature_have_no_breakpoints():
    found = searched(network(3, 8, 8, 1, act=GroupSort(group_size=1)), gap=1e-9)
    assert (found.boxes, found.upper) == (1, pytest.approx(found.best.value, rel=1e-9))


def test_what_the_search_is_not_for_is_refused():
    assert why_not_applicable(network(4, 8, 1)) is None
    assert why_not_applicable(network(7, 8, 1)) == "is for 6 inputs or fewer"
    reason = "knows no norm of several outputs from the inf-norm to the 2-norm"
    assert [why_not_applicable(network(2, 8, 2), q, h) for q, h in ((2, 2), (1, math.inf), (1, 2))] == [
        None,
        None,
        reason,
    ]
    declared = as_activation(torch.nn.Tanh())
    declared.function.slopes = (0, 1)  # which says nothing of a small box
    for act in (Tripled(), Unlisted(), as_activation(torch.tanh), declared):
        assert why_not_applicable(with_act(network(2, 8, 1), act)) == f"is not for {act.label}"


def test_certify_searches_when_it_is_asked_to(lipexp, run):
    folder = run("dataset=cones", "dataset.n_inputs=3", "act=maxmin")
    done = lipexp("certify", str(folder), "--method", "bnb", "--gap", "0.01")
    assert (done.code, done.err) == (0, "")
    section = json.loads((folder / "metrics.json").read_text())["certify"]
    bound, interval = section["bounds"]["bnb"], section["lipschitz"]
    assert interval["measured"] <= bound["value"] <= min(interval["measured"] * 1.01, interval["certified"])
    assert bound["everywhere"] is False
    assert "(over the box of the data)" in done.out
