"""Lower bounds: what is measured is a gradient that exists, and never above the true constant."""

import itertools
import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from acts import ACTS
from networks import (
    NORMS,
    by_hand,
    exact_layers,
    generator,
    gradient,
    jacobian,
    network,
    normal,
    pattern_power,
    power,
    with_act,
)

from lipexp.activations import GroupSort, ReLU, as_activation
from lipexp.measured import gradients as module
from lipexp.measured.gradients import EXACT, grid, largest, norms, operator_norms, scan
from lipexp.norms import dual

TANH = as_activation(torch.nn.Tanh())


def measured(net, points, q, h=math.inf):
    """What `largest` makes of points (N, D)."""
    return largest(net, points, scan(net, points.unsqueeze(0)).gradient[0], q, h)


def is_rounded_down(value, true_power, q):
    """`value` is the largest float64 that is no more than the norm."""
    exponent = 2 if q == 2 else 1
    return Fraction(value) ** exponent <= true_power < Fraction(math.nextafter(value, math.inf)) ** exponent


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("name", ["relu", "maxmin", "groups of 3"])
def test_scanned_gradients_equal_finite_differences(name, outputs):
    stack, x = network(2, 6, 6, outputs, act=ACTS[name], runs=3), normal(3, 20, 2)
    scanned = scan(stack, x)
    assert torch.equal(x, normal(3, 20, 2))
    assert not x.requires_grad
    assert torch.equal(scanned.f, stack.double(x))
    assert scanned.gradient.shape == (3, 20, outputs, 2)
    for axis, step in enumerate(1e-7 * torch.eye(2).double()):  # it is linear there, so only rounding counts
        slope = (stack.double(x + step) - stack.double(x - step)) / 2e-7
        torch.testing.assert_close(scanned.gradient[..., axis], slope, rtol=0, atol=1e-7)


@pytest.mark.parametrize("outputs", [1, 3])
def test_hidden_jacobians_are_those_of_the_rest_of_the_network(outputs):
    """Their norms lead from the norm h of the hidden spaces to itself: singular values, or sums of rows."""
    stack, x = network(2, 8, 8, outputs, runs=3), normal(3, 20, 2)
    inputs, _ = stack.double.inputs_and_output(x)
    for h in (2.0, math.inf):
        hidden = scan(stack, x, hidden_p=h).hidden
        assert len(hidden) == 2
        for i, found in enumerate(hidden, start=1):
            expected = scan(
                replace(stack, layers=stack.layers[i:], acts=stack.acts[i:]), inputs[i]
            ).gradient.numpy()
            expected = np.linalg.norm(expected, h, axis=(2, 3))
            np.testing.assert_allclose(found, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("outputs", [1, 3])
def test_scanning_in_parts_changes_nothing(outputs, monkeypatch):
    stack, x = network(2, 8, 8, outputs, runs=3), normal(3, 20, 2)
    whole = scan(stack, x, hidden_p=2)
    monkeypatch.setattr(module, "_CHUNK", 8 * 3 * 7)  # 7 points at a time, or fewer
    parts = scan(stack, x, hidden_p=2)
    for part, together in zip((*parts[:2], *parts.hidden), (*whole[:2], *whole.hidden), strict=True):
        torch.testing.assert_close(part, together, rtol=1e-13, atol=1e-13)


def test_norms_are_numpys():
    x = normal(3, 5, 4)
    for q in NORMS:
        np.testing.assert_allclose(norms(x, q), np.linalg.norm(x, q, axis=-1), rtol=1e-15)


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 1), (1, 4)], ids=str)
def test_operator_norms_are_the_largest_lengths_of_images_of_the_unit_ball(shape):
    """||J v||_h over the corners of the ball of p = 1 and inf, and over the right singular vectors for p = 2."""
    jacobians = normal(50, *shape)
    vertices = {
        1: torch.eye(shape[1]),
        2: torch.linalg.svd(jacobians, full_matrices=False).Vh,
        math.inf: torch.tensor(list(itertools.product((-1.0, 1.0), repeat=shape[1]))),
    }
    for p, h in ((2, 2), (1, math.inf), (math.inf, math.inf)):
        images = jacobians @ vertices[p].double().mT.expand(50, -1, -1)
        expected = torch.linalg.vector_norm(images, ord=h, dim=1).amax(dim=1)
        torch.testing.assert_close(operator_norms(jacobians, dual(p), h), expected, rtol=1e-12, atol=0)
    rows = torch.linalg.vector_norm(jacobians, dim=2).amax(dim=1)
    torch.testing.assert_close(operator_norms(jacobians, 2), rows, rtol=1e-14, atol=0)


def test_a_jacobian_that_is_not_finite_has_no_norm_and_unknown_norms_are_refused():
    jacobians = normal(4, 3, 2)
    jacobians[1, 0, 0], jacobians[2, 1, 1] = math.nan, math.inf
    assert torch.isfinite(operator_norms(jacobians, 2, 2)).tolist() == [True, False, False, True]
    with pytest.raises(ArithmeticError, match="no operator norm from the inf-norm to the 2-norm is known"):
        operator_norms(jacobians, 1, 2)


# The largest gradient --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(2, 6, 1), (1, 2, 4, 1), (3, 4, 4, 1)], ids=str)
@pytest.mark.parametrize("name", ["relu", "bent", "maxmin", "descending pairs", "fullsort"])
def test_the_largest_gradient_is_measured_exactly_and_below_the_constant(name, sizes):
    net, points = network(*sizes, act=ACTS[name], bias=1.0), 3 * normal(200, sizes[0])
    for q in NORMS:
        found = measured(net, points, q)
        assert found.by == EXACT
        assert found.value == pytest.approx(float(norms(scan(net, points[None]).gradient, q).max()), rel=1e-12)
        # It is the norm of the gradient at its point, less one rounding.
        assert is_rounded_down(found.value, power(gradient(net, found.point), q), q)
        assert Fraction(found.value) ** (2 if q == 2 else 1) <= pattern_power(net, q)


@pytest.mark.parametrize("sizes", [(2, 6, 3), (1, 6, 4, 10), (12, 6, 4)], ids=str)
@pytest.mark.parametrize("name", ["relu", "bent", "maxmin", "abs"])
def test_the_largest_jacobian_is_measured_exactly_and_never_above_its_norm(name, sizes, exact):
    """Decided without rounding; in the spectral norm nothing visible is lost."""
    net, points = network(*sizes, act=ACTS[name], bias=1.0), 3 * normal(100, sizes[0])
    for q in NORMS:
        found = measured(net, points, q)
        rows = [power(row, q) for row in jacobian(net, found.point)]
        assert is_rounded_down(found.value, max(rows), q)
    found = measured(net, points, 2, 2)
    scanned = scan(net, points.unsqueeze(0)).gradient[0]
    assert found.value == pytest.approx(float(torch.linalg.matrix_norm(scanned, ord=2).max()), rel=1e-12)
    rows = jacobian(net, found.point)
    assert exact.spectral_within(rows, found.value * (1 + 1e-14))
    assert not exact.spectral_within(rows, Fraction(found.value) * (1 - Fraction(1, 10**30)))


@pytest.mark.parametrize("q", NORMS)
def test_a_linear_function_measures_the_dual_norm_of_its_weight(q):
    """Alone, and hidden in a sorting network: the sum of a group does not depend on its order."""
    first = [[0.1, 0.3, -0.7], [0.2, 0.9, 0.4]]
    hidden = by_hand((first, [0.1, -0.2]), ([[1.5, 1.5]], [7.0]), act=GroupSort())
    total = [Fraction(3, 2) * sum(column) for column in zip(*exact_layers(hidden)[0], strict=True)]
    assert is_rounded_down(measured(hidden, normal(50, 3), q).value, power(total[:-1], q), q)
    for seed in range(20):
        net, x = network(5, 1, seed=seed), normal(3, 5, seed=seed)
        exactly = power(exact_layers(net)[0][0][:-1], q)
        assert is_rounded_down(measured(net, x, q).value, exactly, q)
        if q != math.inf:  # an estimate allows for its own rounding
            estimate = Fraction(measured(with_act(net, TANH), x, q).value) ** int(q)
            assert exactly * (1 - Fraction(1, 10**12)) <= estimate <= exactly


def test_a_tight_network_measures_its_constant_and_not_an_ulp_more():
    """Rows that are positive and sum to 1 exactly: so does the gradient, everywhere."""
    first, second = [[0.5, 0.25, 0.25], [0.125, 0.75, 0.125]], [[0.75, 0.25], [0.5, 0.5]]
    tight = by_hand((first, [0.0, 0.1]), (second, [0.0, 0.2]), ([[1.0, 0.0]], [0.0]), act=GroupSort())
    assert measured(tight, 3 * normal(500, 3), 1).value == 1


# x - relu(x) + relu(-x), and min(x, 0) + max(-x, 0) of pairs that keep their order at the tie.
ZERO = by_hand(([[1.0], [-1.0], [1.0]], [100.0, 0.0, 0.0]), ([[1.0, 1.0, -1.0]], [-100.0]))
SORTED_ZERO = by_hand(([[1.0], [-1.0], [0.0], [0.0]], [0.0] * 4), ([[1.0, 0.0, 0.0, 1.0]], [0.0]), act=GroupSort())


@pytest.mark.parametrize("net", [ZERO, with_act(ZERO, as_activation(torch.relu)), SORTED_ZERO])
def test_a_function_that_is_zero_measures_zero_at_a_breakpoint(net):
    point = torch.zeros(1, 1, dtype=torch.float64)
    assert scan(net, point.unsqueeze(0)).gradient.item() == 1  # the trap is set
    assert measured(net, point, 2).value == 0


def test_a_breakpoint_at_the_steepest_point_is_left_by_a_small_step():
    """|x| at 0: autograd sees 0 there, the slope beside it is 1. A function without slope has no such step."""
    found = measured(by_hand(([[1.0], [-1.0]], [0.0, 0.0]), ([[1.0, 1.0]], [0.0])), torch.zeros(1, 1).double(), 2)
    assert found.value == 1
    assert 0 < abs(found.point[0]) < 1e-6
    assert measured(by_hand(([[0.0, 0.0]], [0.0]), ([[1.0]], [0.0])), normal(50, 2), 2)[::2] == (0.0, EXACT)


def test_a_point_on_the_wrong_side_by_rounding_gives_way_to_a_steeper_one():
    """What float64 has seen at the first candidate is not there."""
    net, points = network(2, 8, 8, 1), normal(50, 2)
    gradients = scan(net, points.unsqueeze(0)).gradient[0]
    flattest, steepest = (int(choice(operator_norms(gradients, 2))) for choice in (torch.argmin, torch.argmax))
    gradients[flattest] = 2 * gradients[steepest]
    found = largest(net, points, gradients, 2)
    assert found.value == pytest.approx(float(operator_norms(gradients[steepest], 2)), rel=1e-12)
    assert is_rounded_down(found.value, power(gradient(net, found.point), 2), 2)


def test_layers_that_cancel_are_measured_exactly():
    """The gradient is 2^-60 exactly; float64 may see nothing but rounding errors of the size of the layers."""
    net = by_hand(([[1 / 3], [1 / 3], [2.0**-60]], [9.0] * 3), ([[3.0, -3.0, 1.0]], [0.0]))
    seen = torch.full((4, 1, 1), 1e-16, dtype=torch.float64)  # what rounding may leave of it
    assert largest(net, torch.ones(4, 1).double(), seen, 2).value == 2.0**-60


def test_gradients_that_are_not_finite_measure_nothing():
    net, points = network(2, 8, 1), normal(20, 2)
    gradients = torch.full_like(points, math.nan).unsqueeze(1)
    gradients[3] = math.inf
    for act in (ReLU(), TANH):
        assert largest(with_act(net, act), points, gradients, 2) is None
    gradients[5] = scan(net, points.unsqueeze(0)).gradient[0, 5]
    assert largest(net, points, gradients, 2).point == tuple(points[5].tolist())


@pytest.mark.parametrize("dims", [1, 2])
def test_a_grid_has_one_point_anywhere_in_each_cell_from_the_stream_of_its_run(dims):
    low, high = (torch.tensor([[a] * dims, [b] * dims]).double() for a, b in ((-3.0, 0.5), (5.0, 0.75)))
    points, n = grid(low, high, [generator(0), generator(1)]), module.GRID_POINTS[dims]
    assert points.dtype == torch.float64
    for run in range(2):
        places = (points[run] - low[run]) / (high[run] - low[run]) * n
        cells = [tuple(cell) for cell in places.floor().long().tolist()]
        assert sorted(cells) == list(itertools.product(range(n), repeat=dims))
        offsets = places.flatten().frac()
        assert offsets.min() < 0.01
        assert offsets.max() > 0.99
        assert len(set(offsets.tolist())) > 0.99 * len(offsets)
        one = slice(run, run + 1)
        assert torch.equal(points[one], grid(low[one], high[one], [generator(run)]))
        assert not torch.equal(points[one], grid(low[one], high[one], [generator(2)]))
    assert grid(torch.zeros(1, 3), torch.ones(1, 3), [generator(0)]) is None
