"""Lower bounds: what is measured is a gradient that exists, and never above the true constant."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from rational import (
    PIECEWISE,
    by_hand,
    fraction_gradient,
    fraction_layers,
    generator,
    greatest_power,
    is_rounded_down,
    network,
    normal,
    power,
)

from lipexp.measured import gradients as measures
from lipexp.activations import Activation, Piece, ReLU
from lipexp.norms import product_bound
from lipexp.measured.gradients import MeasuredNetwork, grid, largest, norms, scan
from lipexp.models import Layer, Network, forward, state_dict

NORMS = (1, 2, math.inf)
EACH_LIPSCHITZ = ("lipschitz=0.01", "lipschitz=1", "lipschitz=3", "lipschitz=100")


def measured(layers: list[Layer], act: torch.nn.Module, points: torch.Tensor, q: float, run: int = 0):
    """What `largest` makes of points (N, D)."""
    everywhere = points.expand(layers[0].weight.shape[0], *points.shape)
    return largest(MeasuredNetwork(layers, act, run), points, scan(layers, act, everywhere).gradient[run], q)


# Scanning -------------------------------------------------------------------------------------------------------


def test_scanned_gradients_equal_finite_differences(act_option, make):
    act, layers, x = make("act", f"act={act_option}"), network(2, 8, 8, 1, runs=3), normal(3, 20, 2)
    double = [Layer(*map(torch.Tensor.double, layer)) for layer in layers]
    scanned = scan(layers, act, x)
    assert torch.equal(scanned.f, forward(double, act, x).squeeze(-1))
    for axis in range(2):
        step = torch.zeros(2, dtype=torch.float64)
        step[axis] = 1e-7  # pieces are linear, so only rounding counts: 1e-16 / 1e-7, times some ten
        slope = (forward(double, act, x + step) - forward(double, act, x - step)).squeeze(-1) / 2e-7
        torch.testing.assert_close(scanned.gradient[..., axis], slope, rtol=0, atol=1e-7)


def test_scanned_gradients_equal_autograd_of_the_plain_network(act_option, make):
    act, layers, x = make("act", f"act={act_option}"), network(2, 8, 8, 1, runs=3), normal(3, 20, 2)
    scanned = scan(layers, act, x)
    for run in range(3):
        plain = Network([(8, 2), (8, 8), (1, 8)], act)
        plain.load_state_dict(state_dict(layers, run))
        points = x[run].clone().requires_grad_()
        out = plain.double()(points)
        (expected,) = torch.autograd.grad(out.sum(), points)
        # The same sums in another order, in float64.
        torch.testing.assert_close(scanned.f[run], out.squeeze(-1).detach(), rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(scanned.gradient[run], expected, rtol=1e-13, atol=1e-13)


def test_hidden_gradients_are_those_of_the_rest_of_the_network():
    layers, x = network(2, 8, 8, 1, runs=3), normal(3, 20, 2)
    double = [Layer(*map(torch.Tensor.double, layer)) for layer in layers]
    for q in (1.0, 2.0):
        scanned = scan(layers, ReLU(), x, hidden_q=q)
        assert len(scanned.hidden) == 2
        received = x
        for i, found in enumerate(scanned.hidden, start=1):
            received = torch.relu(forward(double[i - 1 : i], ReLU(), received))
            gradient = scan(layers[i:], ReLU(), received).gradient
            expected = gradient.abs().sum(dim=2) if q == 1 else gradient.square().sum(dim=2).sqrt()
            torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


def test_scanning_in_parts_changes_nothing(monkeypatch):
    layers, x = network(2, 8, 8, 1, runs=3), normal(3, 20, 2)
    whole = scan(layers, ReLU(), x, hidden_q=2)
    monkeypatch.setattr(measures, "_CHUNK", 8 * 3 * 7)  # 7 points at a time
    parts = scan(layers, ReLU(), x, hidden_q=2)
    torch.testing.assert_close(parts.f, whole.f, rtol=1e-14, atol=1e-14)
    assert len(parts.hidden) == 2
    for part, together in zip((parts.gradient, *parts.hidden), (whole.gradient, *whole.hidden), strict=True):
        torch.testing.assert_close(part, together, rtol=1e-14, atol=1e-14)


def test_scanning_leaves_the_points_alone():
    x = normal(1, 20, 2)
    before = x.clone()
    scan(network(2, 8, 1), ReLU(), x)
    assert not x.requires_grad
    assert torch.equal(x, before)


@pytest.mark.parametrize("q", NORMS)
def test_norms_are_numpys(q):
    x = normal(3, 5, 4)
    np.testing.assert_allclose(norms(x, q).numpy(), np.linalg.norm(x.numpy(), q, axis=-1), rtol=1e-15)


# The largest gradient -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("q", NORMS)
@pytest.mark.parametrize("sizes", [(2, 4, 1), (2, 4, 4, 1), (1, 4, 4, 1)], ids=str)
@pytest.mark.parametrize("name", PIECEWISE)
def test_what_is_measured_is_at_most_the_constant_found_by_enumeration(name, sizes, q):
    act, piece, patterns = PIECEWISE[name]
    for seed in range(3):
        layers = network(*sizes, seed=seed)
        found = measured(layers, act, 3 * normal(200, sizes[0], seed=seed), q)
        assert found.exact
        assert Fraction(found.value) ** (2 if q == 2 else 1) <= greatest_power(layers, patterns, q)
        # It is the norm of the gradient at its point, less one rounding.
        assert is_rounded_down(found.value, power(fraction_gradient(layers, piece, found.point), q), q)


@pytest.mark.parametrize("name", PIECEWISE)
def test_a_curve_seen_in_each_of_its_pieces_measures_its_constant(name):
    """One input and one hidden layer: the kinks are known exactly, and so is the steepest piece."""
    act, piece, _ = PIECEWISE[name]
    for seed in range(5):
        layers = network(1, 4, 1, seed=seed)
        ((weight, bias), _) = fraction_layers(layers)
        lines = [(w, b) for (w,), (b,) in zip(weight, bias, strict=True)]
        zero = [(Fraction(), Fraction())] * len(lines)
        pairs = zip(lines, zero, strict=True) if name == "relu" else zip(lines[::2], lines[1::2], strict=True)
        kinks = sorted((d - b) / (a - c) for (a, b), (c, d) in pairs)
        middles = [kinks[0] - 1, *((x + y) / 2 for x, y in itertools.pairwise(kinks)), kinks[-1] + 1]
        constant = max(power(fraction_gradient(layers, piece, [x]), 1) for x in middles)
        points = torch.cat([3 * normal(500, 1), torch.tensor([[float(x)] for x in middles]).double()])
        for q in NORMS:  # one dimension has one norm
            assert is_rounded_down(measured(layers, act, points, q).value, constant, 1)


@pytest.mark.parametrize("q", NORMS)
def test_a_linear_function_measures_the_dual_norm_of_its_weight(q):
    for seed in range(20):
        layers = network(5, 1, seed=seed)
        weight = [Fraction(value) for value in layers[0].weight[0, 0].double().tolist()]
        found = measured(layers, ReLU(), normal(3, 5, seed=seed), q)
        assert is_rounded_down(found.value, power(weight, q), q)


@pytest.mark.parametrize("q", NORMS)
def test_a_linear_function_hidden_in_a_sorting_network_measures_the_same(q):
    """w . x + w . x from a sorted pair: the sum of a group does not depend on its order."""
    maxmin = PIECEWISE["maxmin"][0]
    layers = by_hand(([[0.1, 0.3, -0.7], [0.2, 0.9, 0.4]], [0.1, -0.2]), ([[1.5, 1.5]], [7.0]))
    total = [Fraction(3, 2) * sum(column) for column in zip(*fraction_layers(layers)[0][0], strict=True)]
    assert is_rounded_down(measured(layers, maxmin, normal(50, 3), q).value, power(total, q), q)


def test_a_tight_network_measures_its_constant_and_not_an_ulp_more():
    """Rows that are positive and sum to 1 exactly: so does the gradient, everywhere."""
    maxmin = PIECEWISE["maxmin"][0]
    layers = by_hand(
        ([[0.5, 0.25, 0.25], [0.125, 0.75, 0.125]], [0.0, 0.1]),
        ([[0.75, 0.25], [0.5, 0.5]], [0.0, 0.2]),
        ([[1.0, 0.0]], [0.0]),
    )
    points = 3 * normal(500, 3)
    assert measured(layers, maxmin, points, 1).value == 1.0


def test_rows_that_float64_sums_above_one_do_not_measure_above_one():
    """Ten weights whose exact sum is just below 1, though float64 may round their products and sums above it."""
    tenth = float(np.nextafter(np.float32(0.1), np.float32(0)))
    layers = by_hand(([[tenth] * 10, [-tenth] * 10], [0.0, 0.0]), ([[1.0, 0.0]], [0.0]))
    found = measured(layers, PIECEWISE["maxmin"][0], normal(50, 10), 1)
    assert is_rounded_down(found.value, 10 * Fraction(tenth), 1)
    assert found.value < 1


ZERO_ABOVE_MINUS_100 = by_hand(([[1.0], [1.0], [-1.0]], [100.0, 0.0, 0.0]), ([[1.0, -1.0, 1.0]], [-100.0]))


def test_a_zero_function_measures_zero_though_autograd_says_one():
    """x - relu(x) + relu(-x) is 0; x is relu(x + 100) - 100 for every x above -100."""
    layers = ZERO_ABOVE_MINUS_100
    points = torch.linspace(-3, 3, 61, dtype=torch.float64).unsqueeze(1)
    points[30] = 0.0
    scanned = scan(layers, ReLU(), points.unsqueeze(0))
    assert scanned.gradient[0, 30] == 1  # the trap is set
    for q in NORMS:
        assert measured(layers, ReLU(), points, q).value == 0


def test_a_zero_function_of_sorted_pairs_measures_zero():
    """min(x, 0) + max(-x, 0) is 0; at the tie both pairs keep their order, and autograd says 1 + 0."""
    maxmin = PIECEWISE["maxmin"][0]
    layers = by_hand(([[1.0], [0.0], [-1.0], [0.0]], [0.0] * 4), ([[1.0, 0.0, 0.0, 1.0]], [0.0]))
    points = torch.zeros(1, 1, dtype=torch.float64)
    assert scan(layers, maxmin, points.unsqueeze(0)).gradient.item() == 1  # the trap is set
    assert measured(layers, maxmin, points, 2).value == 0


@pytest.mark.parametrize("q", NORMS)
def test_a_function_that_is_zero_everywhere_measures_zero(q):
    layers = by_hand(([[0.0, 0.0]], [0.0]), ([[1.0]], [0.0]))
    assert measured(layers, ReLU(), normal(50, 2), q)[::2] == (0.0, True)


def test_a_kink_at_the_steepest_point_is_left_by_a_small_step():
    """|x| at 0: autograd sees 0 there, the slope beside it is 1."""
    layers = by_hand(([[1.0], [-1.0]], [0.0, 0.0]), ([[1.0, 1.0]], [0.0]))
    found = measured(layers, ReLU(), torch.zeros(1, 1, dtype=torch.float64), 2)
    assert found.value == 1
    assert 0 < abs(found.point[0]) < 1e-6


def test_the_point_of_the_largest_gradient_shows_it(act_option, make):
    act, layers, points = make("act", f"act={act_option}").baked(), network(2, 8, 8, 1, runs=2), normal(300, 2)
    for run in range(2):
        found = measured(layers, act, points, 2, run)
        every = norms(scan(layers, act, points.expand(2, -1, -1)).gradient[run], 2)
        assert found.value == pytest.approx(float(every.max()), rel=1e-12)
        at_point = scan(layers, act, torch.tensor([[found.point]]).double().expand(2, -1, -1)).gradient[run]
        assert found.value == pytest.approx(float(norms(at_point, 2)), rel=1e-12)


def test_no_measure_exceeds_the_certificate_of_a_trained_network(bounded_case, act_option, trained):
    """In every norm of the room, with no tolerance: both sides are rigorous."""
    result = trained(*bounded_case, f"act={act_option}", "model.depth=2", runs=EACH_LIPSCHITZ)
    constraint, checkpoint = result.stack.constraint, result.checkpoint
    points = 3 * normal(1, 300, 2).expand(4, -1, -1)
    gradients = scan(checkpoint.layers, checkpoint.act, points).gradient
    for run in range(4):
        found = largest(
            MeasuredNetwork(checkpoint.layers, checkpoint.act, run), points[run], gradients[run], constraint.q
        )
        chain = zip(constraint.norms(3), checkpoint.layers, strict=True)
        certified = product_bound(norm.proven(layer.weight[run]) for norm, layer in chain)
        assert 0 < found.value <= certified <= float(constraint.lipschitz[run])


class Tanh(Activation):
    """A curved activation of a user's: lipexp knows no exact arithmetic for it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x)


def tanh_gradient(layers: list[Layer], point: tuple[float, ...]) -> np.ndarray:
    """In extended precision: 64 bits of mantissa on x86, where float64 has 53; elsewhere it may be float64."""
    x, jacobian = np.array(point, dtype=np.longdouble), np.eye(len(point), dtype=np.longdouble)
    for i, layer in enumerate(layers):
        weight, bias = (
            layer.weight[0].numpy().astype(np.longdouble),
            layer.bias[0, 0].numpy().astype(np.longdouble),
        )
        if i > 0:
            x, jacobian = np.tanh(x), (1 - np.tanh(x) ** 2)[:, None] * jacobian
        x, jacobian = weight @ x + bias, weight @ jacobian
    return jacobian[0]


@pytest.mark.parametrize("q", NORMS)
def test_a_curved_activation_is_measured_below_its_gradient_in_more_digits(q):
    for seed in range(5):
        layers = network(2, 8, 8, 1, seed=seed)
        found = measured(layers, Tanh(), normal(100, 2, seed=seed), q)
        assert not found.exact
        sizes = np.abs(tanh_gradient(layers, found.point))
        true = sizes.max() if math.isinf(q) else (sizes**q).sum() ** (1 / np.longdouble(q))
        assert true * (1 - 1e-9) <= found.value <= true


@pytest.mark.parametrize("q", [1, 2])
def test_an_estimate_allows_for_its_own_rounding(q):
    """Of a linear function, all points show the same slope, whose norm float64 rounds up in half of the cases."""
    for seed in range(20):
        layers = network(5, 1, seed=seed)
        weight = [Fraction(value) for value in layers[0].weight[0, 0].double().tolist()]
        found = Fraction(measured(layers, Tanh(), normal(3, 5, seed=seed), q).value) ** q
        assert power(weight, q) * (1 - Fraction(1, 10**12)) <= found <= power(weight, q)


class UsersReLU(Activation):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x)


def test_a_class_of_the_users_is_moved_off_its_kinks_too():
    """The zero function x - relu(x) + relu(-x) again, by a class that names no pieces."""
    points = torch.zeros(1, 1, dtype=torch.float64)
    assert scan(ZERO_ABOVE_MINUS_100, UsersReLU(), points.unsqueeze(0)).gradient.item() == 1
    assert measured(ZERO_ABOVE_MINUS_100, UsersReLU(), points, 2).value == 0


class Liar(ReLU):
    """Names the identity as its linear piece, which it is not."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x)

    def piece(self, z: np.ndarray) -> Piece:
        return Piece(np.arange(len(z)), np.full(len(z), 1, dtype=object))


def test_a_piece_that_contradicts_its_activation_is_an_error():
    with pytest.raises(ArithmeticError, match="Liar"):
        measured(network(2, 8, 1), Liar(), normal(200, 2), 2)


def test_gradients_that_are_not_finite_measure_nothing():
    layers, points = network(2, 8, 1), normal(20, 2)
    gradients = torch.full_like(points, math.nan)
    gradients[3] = math.inf
    for act in (ReLU(), Tanh()):
        assert largest(MeasuredNetwork(layers, act, 0), points, gradients, 2) is None
    gradients[5] = scan(layers, ReLU(), points.unsqueeze(0)).gradient[0, 5]
    assert largest(MeasuredNetwork(layers, ReLU(), 0), points, gradients, 2).point == tuple(points[5].tolist())


# Points ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [1, 2])
def test_each_cell_of_the_box_holds_one_grid_point(dims):
    low, high = (
        torch.tensor([[-3.0] * dims, [0.5] * dims]).double(),
        torch.tensor([[5.0] * dims, [0.75] * dims]).double(),
    )
    points = grid(low, high, [generator(0), generator(1)])
    n = measures.GRID_POINTS[dims]
    assert points.shape == (2, n**dims, dims)
    assert points.dtype == torch.float64
    assert (points >= low.unsqueeze(1)).all()
    assert (points <= high.unsqueeze(1)).all()
    cells = ((points - low.unsqueeze(1)) / (high - low).unsqueeze(1) * n).floor().long()
    for run in range(2):
        assert {tuple(cell) for cell in cells[run].tolist()} == set(itertools.product(range(n), repeat=dims))


def test_grid_points_are_not_centred_in_their_cells():
    points = grid(torch.zeros(1, 1).double(), torch.full((1, 1), 2001.0).double(), [generator(0)])
    offsets = points.flatten().frac()
    assert offsets.min() < 0.01
    assert offsets.max() > 0.99
    assert len(set(offsets.tolist())) > 1990


def test_three_dimensions_have_no_grid():
    assert grid(torch.zeros(1, 3), torch.ones(1, 3), [generator(0)]) is None


def test_the_same_seed_gives_the_same_grid():
    low, high = torch.zeros(1, 2).double(), torch.ones(1, 2).double()
    assert torch.equal(grid(low, high, [generator(3)]), grid(low, high, [generator(3)]))
    assert not torch.equal(grid(low, high, [generator(3)]), grid(low, high, [generator(4)]))


def test_a_stack_draws_the_grids_of_its_runs_bit_for_bit():
    x, seeds = normal(3, 50, 2), (5, 6, 7)
    low, high = x.amin(dim=1), x.amax(dim=1)
    on_grid = grid(low, high, [generator(seed) for seed in seeds])
    for run, seed in enumerate(seeds):
        one = slice(run, run + 1)
        assert torch.equal(on_grid[one], grid(low[one], high[one], [generator(seed)]))


def test_layers_that_cancel_are_no_contradiction():
    """The gradient is 2^-60 exactly; float64 may see nothing but rounding errors of the size of the layers."""
    third = 1 / 3
    first = torch.tensor([[[third], [third], [2.0**-60]]], dtype=torch.float32)
    last = torch.tensor([[[3.0, -3.0, 1.0]]], dtype=torch.float32)
    layers = [Layer(first, torch.full((1, 1, 3), 9.0)), Layer(last, torch.zeros(1, 1, 1))]
    points = torch.ones(4, 1, dtype=torch.float64)
    seen = torch.full((4, 1), 1e-16, dtype=torch.float64)  # what rounding may leave of it
    found = largest(MeasuredNetwork(layers, ReLU(), 0), points, seen, 2)
    assert found is not None
    assert found.value == 2.0**-60
