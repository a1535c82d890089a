"""Semidefinite bounds: proofs against rational arithmetic, bounds against all activation patterns."""

import itertools
import math
from dataclasses import replace
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest
import torch
from acts import Bent, Tripled
from networks import dot, network, normal, pairs, pattern_power, root, scaled, with_act

from lipexp.activations import Abs, GroupSort, LeakyReLU, NActivation, ReLU, as_activation
from lipexp.blocks import Affine
from lipexp.measured.gradients import norms, scan
from lipexp.proven import semidefinite
from lipexp.proven.regions import constants
from lipexp.proven.semidefinite import (
    Reduced,
    best_bound,
    bounds_of_pairs,
    eclipse,
    lipsdp,
    proves,
    why_not_applicable,
)

RELU = (0.0, 1.0)
SLOPES = [RELU, (0.1, 1.0), (0.25, 0.75)]
SHAPES = [(3, 5, 1), (3, 5, 5, 1), (2, 4, 3, 4, 1), (6, 1, 5, 1)]


ACTS = dict(zip(SLOPES, (ReLU(), LeakyReLU(0.1), Bent()), strict=True))


def weights_of(net):
    return [layer.weight[0].double().numpy() for layer in net.layers]


def product(net):
    return math.prod(float(np.linalg.norm(weight, 2)) for weight in weights_of(net))


def over_all_patterns(net):
    """max ||w D_n W_n ... D_1 W_1||_2 over all diagonal D_i of the two slopes, feasible or not."""
    return root(pattern_power(net, 2), 2)


def both(net):
    return eclipse(net), lipsdp(net)[0]


def rational(weights, slopes, multipliers, square):
    """M with no rounding: L^2 |x_0|^2 - |W x|^2 + 2 sum_i T_i (x - alpha z)_i (x - beta z)_i, term by term."""
    sizes = [weights[0].shape[1], *(len(weight) for weight in weights[:-1])]
    ends, remaining = [0, *itertools.accumulate(sizes)], iter(multipliers)
    entries = [[Fraction(square) * (i == j < sizes[0]) for j in range(ends[-1])] for i in range(ends[-1])]

    def add(factor, left, right):
        for (i, a), (j, b) in itertools.product(left.items(), right.items()):
            entries[i][j] += factor * a * b

    for k, weight in enumerate(weights):
        for feature, row in enumerate(weight, start=ends[k + 1]):
            z = {i: Fraction(w) for i, w in enumerate(row, start=ends[k])}
            if k == len(weights) - 1:
                add(-1, z, z)
                continue
            t = Fraction(next(remaining))
            u, v = ({feature: Fraction(1)} | {i: -Fraction(slope) * w for i, w in z.items()} for slope in slopes)
            add(t, u, v)
            add(t, v, u)
    return entries


@pytest.mark.parametrize(("shape", "slopes"), pairs([*SHAPES, (3, 4, 2), (2, *[2] * 10, 1)], SLOPES))
@pytest.mark.parametrize("method", [eclipse, lipsdp])
def test_the_matrix_of_a_bound_is_semidefinite_in_rational_arithmetic(exact, monkeypatch, method, shape, slopes):
    tried = []
    monkeypatch.setattr(semidefinite, "proves", lambda *given: tried.append(given) or proves(*given))
    net = network(*shape, act=ACTS[slopes])
    bound = eclipse(net) if method is eclipse else lipsdp(net)[0]
    lipschitz, weights, used, multipliers = tried[-1]
    assert proves(lipschitz, weights, used, multipliers)
    np.testing.assert_allclose(used, RELU if method is eclipse else slopes, rtol=1e-6)  # as float32 has them
    scale = bound / lipschitz  # a power of two, as the weights were scaled
    assert math.frexp(scale)[0] == 0.5
    assert math.prod(float(a[0, 0]) / b[0, 0] for a, b in zip(weights_of(net), weights, strict=True)) == scale
    # The matrix is as tight as its multipliers allow: a little less is not semidefinite, nor claimed to be.
    less = lipschitz * (1 - 1e-6)
    assert exact.semidefinite(rational(weights, used, multipliers, Fraction(lipschitz) ** 2))
    assert not exact.semidefinite(rational(weights, used, multipliers, Fraction(less) ** 2))
    assert not proves(less, weights, used, multipliers)


@pytest.mark.parametrize(("shape", "slopes"), pairs([(3, 5, 3), (3, 4, 4, 3), (2, 4, 3, 4, 4), (3, 4)], SLOPES))
def test_the_matrix_of_every_pair_is_semidefinite_in_rational_arithmetic(exact, shape, slopes):
    """That of the network whose last row is the difference, with the multipliers of the whole network."""
    net = network(*shape, act=ACTS[slopes], grain=2.0**-10)
    reduced, own = Reduced.of(net), net.acts[0].slopes
    found = lipsdp(net)[1]
    for multipliers, used, bounds in (
        (reduced.closed, RELU, bounds_of_pairs(net)),
        (found, own, bounds_of_pairs(net, found)),
    ):
        *hidden, last = reduced.weights
        for (i, j), bound in zip(itertools.combinations(range(len(last)), 2), bounds, strict=True):
            weights = [*hidden, (last[i] - last[j])[None]]
            for factor, holds in ((1, True), (1 - 1e-6, False)):
                square = (Fraction(float(bound)) * Fraction(2) ** -reduced.exponent * Fraction(factor)) ** 2
                scaled = [Fraction(t) * square for t in multipliers]
                assert exact.semidefinite(rational(weights, used, scaled, square)) == holds


def test_layers_without_a_proof_leave_no_pair_a_bound():
    reduced = Reduced.of(network(3, 8, 8, 3))
    rows = reduced.weights[-1][:2]
    for multipliers in (100 * reduced.closed, -reduced.closed, math.nan * reduced.closed):
        assert (reduced.bounds_of_rows(rows, RELU, multipliers) == math.inf).all()


@pytest.mark.parametrize("slopes", SLOPES, ids=str)
def test_the_error_of_the_matrix_is_within_its_bound(slopes):
    """With weights of all magnitudes and multipliers of any digits."""
    draws, shapes = np.random.default_rng(0), ((6, 4), (7, 6), (2, 7))
    weights = [draws.normal(size=shape) * 10.0 ** draws.uniform(-6, -1, shape) for shape in shapes]
    multipliers = 10.0 ** draws.uniform(-3, 3, 13)
    computed, terms = semidefinite.inequality_matrix(weights, slopes, multipliers, 2.0)
    for rows in zip(rational(weights, slopes, multipliers, 2), computed, terms, strict=True):
        for entry, found, size in zip(*rows, strict=True):
            assert abs(entry - Fraction(found)) <= (7 + 8) * Fraction(size) / 2**53


def test_multipliers_that_are_negative_not_finite_or_not_feasible_prove_nothing():
    """A negative one would count an inequality with the wrong sign."""
    weights = [np.array([[0.5]]), np.array([[0.5]])]
    assert proves(0.3, weights, RELU, np.array([0.2]))
    assert not any(proves(100.0, weights, RELU, np.array([bad])) for bad in (-1e-9, math.nan, math.inf))
    reduced = Reduced.of(network(3, 8, 8, 1))
    multipliers = 100 * reduced.closed
    assert best_bound(reduced.weights, RELU, multipliers) is reduced.bound(RELU, multipliers) is None


@pytest.mark.parametrize("slope", [0, 0.3, 1])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bounds_lie_between_all_patterns_and_the_product(shape, slope):
    net = network(*shape, act=LeakyReLU(slope) if slope else ReLU())
    loose, tight = both(net)
    assert over_all_patterns(net) * (1 - 1e-12) <= tight <= loose
    assert loose <= product(net) * (1 + 1e-9)
    if slope == 1:  # one pattern, whose multipliers grow without end
        assert tight <= over_all_patterns(net) * 1.02


@pytest.mark.parametrize("slopes", [RELU, (0.1, 1.0)], ids=str)
def test_no_multipliers_of_a_grid_give_less(slopes):
    """Nor do they find much more than the grid does, which is refined once around its best."""
    for seed in range(3):
        net = network(3, 2, 1, act=ACTS[slopes], seed=seed)
        reduced, centre, span = Reduced.of(net), (0.0, 0.0), 3.0
        for _ in range(2):
            axes = [10 ** (at + np.linspace(-span, span, 25)) for at in centre]
            found = {at: best_bound(reduced.weights, slopes, np.array(at)) for at in itertools.product(*axes)}
            best = min((at for at in found if found[at] is not None), key=found.get)
            centre, span = np.log10(best), 0.25
        smallest = math.ldexp(found[best], reduced.exponent)
        assert smallest * 0.98 <= lipsdp(net)[0] <= smallest * (1 + 1e-9)


@pytest.mark.parametrize("sizes", [(8, 24, 24, 1), (3, 16, 16, 16, 16, 1), (40, 12, 12, 1), (6, 32, 3)], ids=str)
def test_a_local_descent_gains_nothing(sizes):
    """From the multipliers that were found, in many random directions each."""
    reduced, draws = Reduced.of(network(*sizes)), np.random.default_rng(0)
    for slopes in (RELU, (0.1, 1.0)):
        multipliers = semidefinite.lipsdp_multipliers(reduced, slopes)
        reached = best_bound(reduced.weights, slopes, multipliers)
        for step in np.repeat([1e-3, 1e-2, 1e-1], 30):
            moved = multipliers * np.exp(step * draws.normal(size=len(multipliers)))
            other = best_bound(reduced.weights, slopes, moved)
            assert other is None or other >= reached * (1 - 1e-3)
        assert reached < reduced.smallest * 0.95


def test_bounds_scale_with_the_weights():
    net = network(3, 8, 8, 1)
    for scale in (1e-10, 1e-6, 1e6, 1e10):
        expected = [bound * scale**3 for bound in both(net)]
        assert both(scaled(net, *[scale] * 3)) == pytest.approx(expected, rel=1e-3)
    # A ReLU network may move a factor from one layer to the next; so may the bound.
    assert both(scaled(net, 2.0**40, 2.0**-60, 2.0**20)) == both(net)
    deep = network(3, *[4] * 9, 1)  # below the smallest float, or above the largest, bounds are rounded up
    assert eclipse(scaled(deep, *[2.0**-120] * 10)) == 5e-324
    assert eclipse(scaled(deep, *[2.0**110] * 10)) == math.inf


def test_dead_features_change_nothing_and_nearly_dead_ones_do_no_harm():
    """One that sees nothing, one that is not seen, one that only they see; and what weight decay leaves."""
    net = network(3, 8, 8, 1)
    (first, b1), (second, b2), (last, b3) = net.layers
    first[0, 2], second[0, :, 5], second[0, 3] = 0, 0, 0
    second[0, 3, 2] = 1
    kept, alive = [0, 1, 3, 4, 6, 7], [0, 1, 2, 4, 5, 6, 7]
    inside = Affine(second[:, alive][:, :, kept], b2[..., alive])
    layers = [Affine(first[:, kept], b1[..., kept]), inside, Affine(last[..., alive], b3)]
    assert both(net) == both(replace(net, layers=layers))
    net = network(3, 4, 4, 1)
    net.layers[0].weight[0, 2] *= 1e-20
    net.layers[1].weight[0, :, 3] *= 1e-30
    net.layers[2].weight[0, :, 1] *= 1e-12
    for bound in both(net):
        assert over_all_patterns(net) <= bound <= product(net) * (1 + 1e-9)


def test_networks_that_are_constant_or_linear_are_bounded_by_their_norm():
    for factors in ((0, 1, 1), (1, 0, 1), (1, 1, 0)):
        assert both(scaled(network(3, 8, 8, 1), *factors)) == (0, 0)
    for net in (network(5, 1), network(5, 3)):
        assert both(net) == pytest.approx((product(net), product(net)), rel=1e-9)
    one_feature = network(4, 1, 1)
    assert eclipse(one_feature) == pytest.approx(product(one_feature), rel=1e-9)
    assert product(one_feature) <= lipsdp(one_feature)[0] <= product(one_feature) * 1.001


@pytest.mark.parametrize("act", [ReLU(), LeakyReLU(0.2)])
def test_bounds_hold_for_the_exact_constant_and_for_samples_of_many_inputs(act):
    net = network(2, 24, 24, 1, act=act)
    known = constants(net, (np.full(2, -1.0), np.full(2, 1.0)), 2.0, 10**5).everywhere.value
    assert known <= lipsdp(net)[0] * (1 + 1e-11)
    net = network(64, 8, 8, 1, act=act)
    steepest = float(norms(scan(net, 3 * normal(1, 5000, 64)).gradient, 2).max())
    assert 0 < steepest <= lipsdp(net)[0] <= eclipse(net)


def test_a_search_that_is_stopped_early_still_proves_a_bound():
    net = network(10, 64, 64, 1)
    best, stopped = lipsdp(net)[0], lipsdp(net, seconds=1e-9)[0]
    assert best * 1.01 < lipsdp(net, enough=1.3 * best)[0] <= 1.3 * best
    assert best * 1.01 < stopped <= eclipse(net)
    # The search for leaky_relu starts above the bound of ECLipsE, which is its own all the same.
    assert lipsdp(with_act(net, LeakyReLU(0.2)), seconds=1e-9)[0] == eclipse(net)


def closed_form(net):
    """The bound of ECLipsE-Fast as the paper has it, in 60 digits; only the sigma of each layer have 16."""
    *hidden, last = [[[Decimal(v) for v in row] for row in weight.tolist()] for weight in weights_of(net)]
    with localcontext(prec=60):
        inverse = [[Decimal(i == j) for j in range(net.n_inputs)] for i in range(net.n_inputs)]
        for weight in hidden:
            gram = form(weight, inverse)
            n, size = len(gram), max(map(max, gram))
            sigma = Decimal(float(np.linalg.eigvalsh([[float(v / size) for v in row] for row in gram])[-1])) * size
            inverse = inverted([[(2 * (i == j) - gram[i][j] / sigma) / sigma for j in range(n)] for i in range(n)])
        ((square,),) = form(last, inverse)
        return float(square.sqrt())


def form(rows, inner):
    """rows inner rows^T."""
    half = [[dot(row, column) for column in inner] for row in rows]
    return [[dot(left, row) for row in rows] for left in half]


def inverted(matrix):
    """The inverse of a positive definite matrix, by elimination."""
    n = len(matrix)
    rows = [[*row, *(Decimal(i == j) for j in range(n))] for i, row in enumerate(matrix)]
    for i in range(n):
        rows[i] = [v / rows[i][i] for v in rows[i]]
        for j in {*range(n)} - {i}:
            rows[j] = [v - rows[j][i] * pivot for v, pivot in zip(rows[j], rows[i], strict=True)]
    return [row[n:] for row in rows]


def test_the_closed_form_of_a_deep_network_loses_nothing_to_rounding():
    """Its multipliers, unless layers are scaled, span more than float64 resolves."""
    net = network(2, *[12] * 40, 1)
    exactly = closed_form(net)
    assert exactly <= eclipse(net) <= exactly * (1 + 1e-9)


def test_networks_of_any_depth_and_scale_have_a_bound():
    """Also those whose layers multiply to less than the smallest float."""
    deep = scaled(network(2, *[3] * 300, 1), *[0.5] * 301)
    assert 0 < eclipse(deep) < product(deep)
    assert both(scaled(network(2, *[4] * 10, 1), *[1e-44] * 11)) == (5e-324, 5e-324)


def test_matrices_that_take_gigabytes_are_not_made(monkeypatch):
    net = network(30, 40, 30, 1)
    assert why_not_applicable(net, 2) is None
    monkeypatch.setattr(semidefinite, "LARGEST", 99)
    assert why_not_applicable(net, 2) == "100 inputs and features, more than 99: would take gigabytes"


def test_what_the_bounds_do_not_cover_is_refused():
    net = network(2, 4, 1)
    assert [why_not_applicable(with_act(net, act), 2) for act in ACTS.values()] == [None] * 3
    assert [why_not_applicable(network(2, 4, 3), 2, h) for h in (2, math.inf)] == [None] * 2
    assert why_not_applicable(network(2, 4, 3), 2, 1) == "bounds several outputs in the 2-norm only"
    for q in (1.0, math.inf):
        assert why_not_applicable(net, q) == "bounds the 2-norm of gradients only"
    for act in (Abs(), NActivation()):
        assert why_not_applicable(with_act(net, act), 2) == f"needs slopes in [0, 1]; {act.label} has [-1, 1]"
    for act in (GroupSort(), as_activation(torch.nn.Tanh()), Tripled()):
        assert why_not_applicable(with_act(net, act), 2) == f"{act.label} declares no slopes"
