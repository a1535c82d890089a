"""Lower bounds: what is measured is a gradient that exists, and never above the true constant."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from networks import (
    ACTS,
    EACH_LIPSCHITZ,
    NORMS,
    TRAINED,
    by_hand,
    exact_layers,
    generator,
    gradient,
    groups_of,
    network,
    normal,
    pattern_power,
    power,
)

from lipexp.activations import Activation, ActiveMap, GroupSort, ReLU, as_activation
from lipexp.measured import gradients as module
from lipexp.measured.gradients import grid, largest, norms, scan
from lipexp.norms import product_bound

TANH = as_activation(torch.nn.Tanh())


def measured(network, points, q):
    """What `largest` makes of points (N, D), for K = 1."""
    return largest(network, points, scan(network, points.unsqueeze(0)).gradient[0], q)


def is_rounded_down(value: float, true_power: Fraction, q: float) -> bool:
    """`value` is the largest float64 that is no more than the norm."""
    exponent = 2 if q == 2 else 1
    return Fraction(value) ** exponent <= true_power < Fraction(math.nextafter(value, math.inf)) ** exponent


# Scanning --------------------------------------------------------------------------------------------------------


def test_scanned_gradients_equal_finite_differences(act_option, make):
    stack, x = network(2, 8, 8, 1, act=make("act", f"act={act_option}"), runs=3), normal(3, 20, 2)
    before = x.clone()
    scanned = scan(stack, x)
    assert torch.equal(x, before)
    assert not x.requires_grad
    assert torch.equal(scanned.f, stack.double(x).squeeze(-1))
    for axis in range(2):
        step = torch.zeros(2, dtype=torch.float64)
        step[axis] = 1e-7  # pieces are linear, so only rounding counts: 1e-16 / 1e-7, times some ten
        slope = (stack.double(x + step) - stack.double(x - step)).squeeze(-1) / 2e-7
        torch.testing.assert_close(scanned.gradient[..., axis], slope, rtol=0, atol=1e-7)


def test_hidden_gradients_are_those_of_the_rest_of_the_network():
    stack, x = network(2, 8, 8, 1, runs=3), normal(3, 20, 2)
    inputs, _ = stack.double.inputs_and_output(x)
    for q in (1.0, 2.0):
        hidden = scan(stack, x, hidden_q=q).hidden
        assert len(hidden) == 2
        for i, found in enumerate(hidden, start=1):
            expected = scan(replace(stack, layers=stack.layers[i:]), inputs[i]).gradient.numpy()
            np.testing.assert_allclose(found, np.linalg.norm(expected, q, axis=2), rtol=1e-13, atol=1e-13)


def test_scanning_in_parts_changes_nothing(monkeypatch):
    stack, x = network(2, 8, 8, 1, runs=3), normal(3, 20, 2)
    whole = scan(stack, x, hidden_q=2)
    monkeypatch.setattr(module, "_CHUNK", 8 * 3 * 7)  # 7 points at a time
    parts = scan(stack, x, hidden_q=2)
    for part, together in zip((*parts[:2], *parts.hidden), (*whole[:2], *whole.hidden), strict=True):
        torch.testing.assert_close(part, together, rtol=1e-14, atol=1e-14)


def test_several_outputs_have_no_gradient_to_measure():
    with pytest.raises(ValueError, match="for one output; this network has 2"):
        scan(network(2, 4, 2), normal(1, 3, 2))


@pytest.mark.parametrize("q", NORMS)
def test_norms_are_numpys(q):
    x = normal(3, 5, 4)
    np.testing.assert_allclose(norms(x, q), np.linalg.norm(x, q, axis=-1), rtol=1e-15)


# The largest gradient --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(2, 6, 1), (2, 4, 4, 1), (1, 4, 4, 1)], ids=str)
@pytest.mark.parametrize("name", ["relu", "maxmin", "bent", "descending pairs", "groups of 3"])
def test_what_is_measured_is_at_most_the_constant_of_all_patterns(name, sizes):
    if name == "groups of 3" and sizes[1] == 4:
        sizes = (sizes[0], 3, 3, 1)
    net = network(*sizes, act=ACTS[name], bias=1.0)
    for q in NORMS:
        found = measured(net, 3 * normal(200, sizes[0]), q)
        assert found.exact
        assert Fraction(found.value) ** (2 if q == 2 else 1) <= pattern_power(net, q)
        # It is the norm of the gradient at its point, less one rounding.
        assert is_rounded_down(found.value, power(gradient(net, found.point), q), q)


@pytest.mark.parametrize("name", ["relu", "maxmin"])
def test_a_curve_seen_in_each_of_its_pieces_measures_its_constant(name):
    """One input and one hidden layer: the breakpoints are known exactly, and so is the steepest piece."""
    for seed in range(3):
        net = network(1, 4, 1, act=ACTS[name], seed=seed)
        lines = exact_layers(net)[0]
        crossing = [(lines[i], lines[j]) for i, j in groups_of(net.act, 4) or []] or [
            (line, (0, 0)) for line in lines
        ]
        kinks = sorted((d - b) / (a - c) for (a, b), (c, d) in crossing)
        middles = [kinks[0] - 1, *((x + y) / 2 for x, y in itertools.pairwise(kinks)), kinks[-1] + 1]
        constant = max(abs(gradient(net, [x])[0]) for x in middles)
        points = torch.cat([3 * normal(500, 1), torch.tensor([[float(x)] for x in middles]).double()])
        for q in NORMS:  # one dimension has one norm
            assert is_rounded_down(measured(net, points, q).value, constant, 1)


@pytest.mark.parametrize("q", NORMS)
def test_a_linear_function_measures_the_dual_norm_of_its_weight(q):
    """Alone, and hidden in a sorting network: the sum of a group does not depend on its order."""
    hidden = by_hand(
        ([[0.1, 0.3, -0.7], [0.2, 0.9, 0.4]], [0.1, -0.2]), ([[1.5, 1.5]], [7.0]), act=GroupSort(group_size=2)
    )
    total = [Fraction(3, 2) * sum(column) for column in zip(*exact_layers(hidden)[0], strict=True)]
    assert is_rounded_down(measured(hidden, normal(50, 3), q).value, power(total[:-1], q), q)
    for seed in range(20):
        net = network(5, 1, seed=seed)
        weight = exact_layers(net)[0][0][:-1]
        assert is_rounded_down(measured(net, normal(3, 5, seed=seed), q).value, power(weight, q), q)
        if q != math.inf:  # an estimate allows for its own rounding
            estimate = Fraction(measured(replace(net, act=TANH), normal(3, 5, seed=seed), q).value) ** int(q)
            assert power(weight, q) * (1 - Fraction(1, 10**12)) <= estimate <= power(weight, q)


def test_a_tight_network_measures_its_constant_and_not_an_ulp_more():
    """Rows that are positive and sum to 1 exactly: so does the gradient, everywhere."""
    tight = by_hand(
        ([[0.5, 0.25, 0.25], [0.125, 0.75, 0.125]], [0.0, 0.1]),
        ([[0.75, 0.25], [0.5, 0.5]], [0.0, 0.2]),
        ([[1.0, 0.0]], [0.0]),
        act=GroupSort(),
    )
    assert measured(tight, 3 * normal(500, 3), 1).value == 1


def zero(act):
    """x - relu(x) + relu(-x), for an `act` that is relu; at 0 autograd says 1."""
    return by_hand(([[1.0], [-1.0], [1.0]], [100.0, 0.0, 0.0]), ([[1.0, 1.0, -1.0]], [-100.0]), act=act)


SORTED_ZERO = by_hand(  # min(x, 0) + max(-x, 0), of pairs that keep their order at the tie
    ([[1.0], [-1.0], [0.0], [0.0]], [0.0] * 4), ([[1.0, 0.0, 0.0, 1.0]], [0.0]), act=GroupSort()
)


@pytest.mark.parametrize(
    "net", [zero(ReLU()), zero(as_activation(torch.relu)), SORTED_ZERO], ids=["relu", "undeclared", "maxmin"]
)
def test_a_function_that_is_zero_near_a_breakpoint_measures_zero(net):
    point = torch.zeros(1, 1, dtype=torch.float64)
    assert scan(net, point.unsqueeze(0)).gradient.item() == 1  # the trap is set
    assert measured(net, point, 2).value == 0


def test_a_function_that_is_zero_everywhere_measures_zero():
    flat = by_hand(([[0.0, 0.0]], [0.0]), ([[1.0]], [0.0]))
    for q in NORMS:
        assert measured(flat, normal(50, 2), q)[::2] == (0.0, True)


def test_a_breakpoint_at_the_steepest_point_is_left_by_a_small_step():
    """|x| at 0: autograd sees 0 there, the slope beside it is 1."""
    found = measured(by_hand(([[1.0], [-1.0]], [0.0, 0.0]), ([[1.0, 1.0]], [0.0])), torch.zeros(1, 1).double(), 2)
    assert found.value == 1
    assert 0 < abs(found.point[0]) < 1e-6


def test_the_point_of_the_largest_gradient_shows_it(act_option, make):
    stack, points = network(2, 8, 8, 1, act=make("act", f"act={act_option}"), runs=2), normal(300, 2)
    for one in (stack.run(0), stack.run(1)):
        found = measured(one, points, 2)
        every = norms(scan(one, points.unsqueeze(0)).gradient, 2)
        assert found.value == pytest.approx(float(every.max()), rel=1e-12)
        at_point = scan(one, torch.tensor([[found.point]]).double()).gradient
        assert found.value == pytest.approx(float(norms(at_point, 2)), rel=1e-12)


@pytest.mark.parametrize("overrides", TRAINED, ids=" ".join)
def test_no_measure_exceeds_the_certificate_of_a_trained_network(overrides, trained):
    """In every norm of the room, with no tolerance: both sides are rigorous."""
    result = trained(*overrides, runs=EACH_LIPSCHITZ)
    constraint, points = result.stack.constraint, 3 * normal(300, 2)
    for run in range(4):
        one = result.checkpoint.network.run(run)
        certified = product_bound(norm for (norm,) in one.norms)
        assert 0 < measured(one, points, constraint.q).value <= certified
        assert constraint.lipschitz is None or certified <= float(constraint.lipschitz[run])


def tanh_gradient(net, point) -> np.ndarray:
    """In extended precision: 64 bits of mantissa on x86, where float64 has 53; elsewhere it may be float64."""
    x, jacobian = np.array(point, dtype=np.longdouble), np.eye(len(point), dtype=np.longdouble)
    for i, (weight, bias) in enumerate(net.layers):
        if i > 0:
            x, jacobian = np.tanh(x), (1 - np.tanh(x) ** 2)[:, None] * jacobian
        matrix = weight[0].numpy().astype(np.longdouble)
        x, jacobian = matrix @ x + bias[0, 0].numpy().astype(np.longdouble), matrix @ jacobian
    return jacobian[0]


@pytest.mark.parametrize("q", NORMS)
def test_a_curved_activation_is_measured_below_its_gradient_in_more_digits(q):
    for seed in range(5):
        net = network(2, 8, 8, 1, act=TANH, seed=seed)
        found = measured(net, normal(100, 2, seed=seed), q)
        assert not found.exact
        sizes = np.abs(tanh_gradient(net, found.point))
        true = sizes.max() if math.isinf(q) else (sizes**q).sum() ** (1 / np.longdouble(q))
        assert true * (1 - 1e-9) <= found.value <= true


class Liar(Activation):
    """Declares the identity as its active map, which it is not."""

    def forward(self, z):
        return torch.relu(z)

    def active_map(self, z):
        return ActiveMap(np.arange(len(z)), np.full(len(z), 1, dtype=object))


def test_an_active_map_that_contradicts_its_activation_is_an_error():
    with pytest.raises(ArithmeticError, match=r"Liar\.active_map contradicts its forward"):
        measured(network(2, 8, 1, act=Liar()), normal(200, 2), 2)


def test_gradients_that_are_not_finite_measure_nothing():
    net, points = network(2, 8, 1), normal(20, 2)
    gradients = torch.full_like(points, math.nan)
    gradients[3] = math.inf
    for act in (ReLU(), TANH):
        assert largest(replace(net, act=act), points, gradients, 2) is None
    gradients[5] = scan(net, points.unsqueeze(0)).gradient[0, 5]
    assert largest(net, points, gradients, 2).point == tuple(points[5].tolist())


def test_layers_that_cancel_are_no_contradiction():
    """The gradient is 2^-60 exactly; float64 may see nothing but rounding errors of the size of the layers."""
    net = by_hand(([[1 / 3], [1 / 3], [2.0**-60]], [9.0] * 3), ([[3.0, -3.0, 1.0]], [0.0]))
    seen = torch.full((4, 1), 1e-16, dtype=torch.float64)  # what rounding may leave of it
    assert largest(net, torch.ones(4, 1).double(), seen, 2).value == 2.0**-60


# Grids -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [1, 2])
def test_each_cell_of_the_box_holds_one_grid_point(dims):
    low, high = (torch.tensor([[a] * dims, [b] * dims]).double() for a, b in ((-3.0, 0.5), (5.0, 0.75)))
    points = grid(low, high, [generator(0), generator(1)])
    n = module.GRID_POINTS[dims]
    assert points.shape == (2, n**dims, dims)
    assert points.dtype == torch.float64
    places = (points - low.unsqueeze(1)) / (high - low).unsqueeze(1) * n
    for run in range(2):
        assert {tuple(cell) for cell in places[run].floor().long().tolist()} == set(
            itertools.product(range(n), repeat=dims)
        )
    offsets = places[0].flatten().frac()
    assert offsets.min() < 0.01  # anywhere in the cell
    assert offsets.max() > 0.99
    assert len(set(offsets.tolist())) > 0.99 * len(offsets)


def test_a_grid_is_drawn_from_the_stream_of_its_run():
    """So a run has the same one alone, bit for bit."""
    x, seeds = normal(3, 50, 2), (5, 6, 7)
    low, high = x.amin(dim=1), x.amax(dim=1)
    together = grid(low, high, [generator(seed) for seed in seeds])
    for run, seed in enumerate(seeds):
        one = slice(run, run + 1)
        assert torch.equal(together[one], grid(low[one], high[one], [generator(seed)]))
        assert not torch.equal(together[one], grid(low[one], high[one], [generator(seed + 3)]))
    assert grid(torch.zeros(1, 3), torch.ones(1, 3), [generator(0)]) is None
