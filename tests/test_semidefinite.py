"""Semidefinite bounds, against the optimum, all activation patterns, and points."""

import itertools
import math
from dataclasses import replace
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest
import torch
from acts import ACTS as ALL_ACTS
from acts import Bent, Larger, Tripled
from networks import difference, dot, generator, network, normal, pattern_power, residual, root, scaled
from optimum import CASES, OPTIMA, Steep

from lipexp.activations import Abs, GroupSort, Householder, LeakyReLU, ReLU, Tanh, as_activation
from lipexp.blocks import Affine
from lipexp.constraints import LInf, Unconstrained
from lipexp.inequality import inequality_matrix
from lipexp.measured.gradients import Maximum, norms, scan
from lipexp.norms import conversion, is_semidefinite
from lipexp.proven import Chain, Problem, prove, semidefinite
from lipexp.proven.regions import constants
from lipexp.proven.semidefinite import (
    Reduced,
    best_outputs,
    bounds_of_pairs,
    eclipse,
    lipsdp,
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
    """max ||w D_n W_n ... D_1 W_1||_2 over all choices of pieces, feasible or not."""
    return root(pattern_power(net, 2), 2)


def both(net):
    return eclipse(net), lipsdp(net)[0]


def steepest(net, points):
    """The largest 2-norm of the Jacobian at points (N, D), by autograd."""
    points = points.clone().requires_grad_()
    outputs = net.double(points.unsqueeze(0))[0]
    rows = [torch.autograd.grad(column.sum(), points, retain_graph=True)[0] for column in outputs.T]
    return float(torch.linalg.matrix_norm(torch.stack(rows, dim=1), ord=2).max())


@pytest.mark.parametrize("name", CASES)
def test_lipsdp_finds_the_optimum_of_the_semidefinite_program(name):
    """Which Clarabel has solved, in a formulation without elimination; see `optimum`."""
    assert lipsdp(CASES[name]())[0] == pytest.approx(OPTIMA[name], rel=2e-5)


@pytest.mark.parametrize("name", [*ALL_ACTS, "householder", "steep", "tanh"])
@pytest.mark.parametrize("kind", ["affine", "residual"])
def test_no_point_of_a_trained_network_is_steeper_than_a_bound(name, kind):
    """After steps of an optimiser, with random points, and with those around kinks."""
    act = {"householder": Householder(), "steep": Steep(), "tanh": Tanh()}.get(name) or ALL_ACTS[name]
    for seed, n_outputs in ((0, 1), (1, 3)):
        net = network(4, 12, 12, 12, n_outputs, act=act, seed=seed)
        net = net if kind == "affine" else residual(4, 12, n_outputs, inside=12, act=act, seed=seed)
        net = stepped(net, seed)
        x = torch.cat([3 * normal(4000, 4, seed=seed), 0.3 * normal(4000, 4, seed=seed + 1)])
        loose, tight = both(net)
        seen = steepest(net, x)
        assert 0 < seen <= tight * (1 + 1e-12)
        assert tight <= loose
        assert tight < 12 * seen
        f, moved = net.double(x.unsqueeze(0))[0], net.double((x + 1e-4 * normal(8000, 4)).unsqueeze(0))[0]
        steps = torch.linalg.vector_norm(1e-4 * normal(8000, 4), dim=1)
        assert float((torch.linalg.vector_norm(f - moved, dim=1) / steps).max()) <= tight * (1 + 1e-9)
        if n_outputs > 1:
            for multipliers in (None, lipsdp(net)[1]):
                for (i, j), bound in zip(
                    itertools.combinations(range(3), 2), bounds_of_pairs(net, multipliers), strict=True
                ):
                    ends = f[:, i] - f[:, j] - moved[:, i] + moved[:, j]
                    assert float((ends.abs() / steps).max()) <= bound * (1 + 1e-9)


def stepped(net, seed):
    """After 20 steps of Adam towards random targets, in float32."""
    layers = [type(layer)(*(part.clone().requires_grad_() for part in layer)) for layer in net.layers]
    moving = replace(net, layers=layers)
    parts = [part for layer in layers for part in layer]
    optimiser, draws = torch.optim.Adam(parts, lr=0.02), generator(seed)
    for _ in range(20):
        x = torch.randn(1, 64, net.n_inputs, generator=draws)
        optimiser.zero_grad()
        (moving(x) - torch.sin(3 * x[..., :1])).square().mean().backward()
        optimiser.step()
    return replace(net, layers=[type(layer)(*(part.detach() for part in layer)) for layer in layers])


@pytest.mark.parametrize("act", [ReLU(), LeakyReLU(0.3), LeakyReLU(1), Abs(), GroupSort(), Steep()], ids=repr)
@pytest.mark.parametrize("shape", [(3, 4, 1), (3, 4, 4, 1), (2, 4, 2, 4, 1), (6, 2, 4, 1)], ids=str)
def test_bounds_lie_between_all_patterns_and_the_product(shape, act, monkeypatch):
    monkeypatch.setattr("networks.slopes_of", lambda act: tuple(map(Fraction, act.slopes)))
    net = network(*shape, act=act)
    loose, tight = both(net)
    assert over_all_patterns(net) * (1 - 1e-12) <= tight <= loose
    steepest = max(map(abs, act.slopes)) if act.slopes else 1
    assert loose <= product(net) * steepest ** (len(shape) - 2) * (1 + 1e-5)
    if act.slopes and act.slopes[0] == act.slopes[1]:  # a linear map, whose norm is known
        assert loose == pytest.approx(over_all_patterns(net), rel=1e-9)


@pytest.mark.parametrize("sizes", [(8, 24, 24, 1), (3, 16, 16, 16, 16, 1), (40, 12, 12, 1), (6, 32, 3)], ids=str)
def test_a_local_descent_gains_nothing(sizes):
    """From the multipliers that were found, in many random directions each."""
    draws = np.random.default_rng(0)
    for act in (ReLU(), LeakyReLU(0.1), GroupSort()):
        net = network(*sizes, act=act)
        ((reduced,), (_, multipliers)) = Reduced.parts(net), lipsdp(net)
        reached = smallest(reduced, multipliers)
        for step in np.repeat([1e-3, 1e-2, 1e-1], 30):
            moved = multipliers * np.exp(step * draws.normal(size=len(multipliers)))
            assert smallest(reduced, moved) >= reached * (1 - 1e-4)
        assert reached < smallest(reduced, reduced.closed) * 0.95


def smallest(reduced, multipliers):
    """The L that multipliers allow."""
    square = best_outputs(reduced.inequality, multipliers)
    return math.inf if square is None else math.sqrt(np.linalg.eigvalsh(square)[-1])


def test_multipliers_in_closed_form_are_the_best_of_a_single_number():
    """For one hidden layer, of all multipliers t I."""
    for act in (ReLU(), LeakyReLU(0.3), Abs(), Steep(), GroupSort(), GroupSort(group_size=3)):
        net = network(5, 12, 12, act=act)
        last = net.layers[-1]._replace(weight=torch.eye(12).unsqueeze(0))  # for the largest eigenvalue of P_next
        (reduced,) = Reduced.parts(replace(net, layers=[net.layers[0], last]))
        others = [smallest(reduced, reduced.closed * 2**power) for power in np.linspace(-1, 1, 41)]
        assert smallest(reduced, reduced.closed) <= min(others) * (1 + 1e-5)


@pytest.mark.parametrize("act", [ReLU(), GroupSort()], ids=repr)
def test_the_barrier_method_comes_near_to_the_optimum(act, monkeypatch):
    """As does the interior-point method, which it replaces for large networks."""
    for net in (network(16, *[32] * 4, 1, act=act), residual(4, 12, 1, inside=12, act=act)):
        best = lipsdp(net)[0]
        with monkeypatch.context() as patch:
            patch.setattr(semidefinite, "INTERIOR", 0)
            patch.setattr(semidefinite, "maximise", None)
            assert best * (1 - 1e-4) <= lipsdp(net)[0] <= 1.05 * best
            assert best < lipsdp(net, enough=1.2 * best)[0] <= 1.2 * best
            assert lipsdp(net, seconds=1e-9)[0] == pytest.approx(eclipse(net), rel=1e-12)


def test_multipliers_whose_inequality_is_too_near_to_singular_make_way_for_their_neighbours(monkeypatch):
    """At 2 / sigma the matrix of one ReLU layer is singular."""
    (reduced,) = Reduced.parts(network(3, 6, 1))
    edge = 2 * (1 - 2.0**-50) * reduced.closed
    assert not is_semidefinite(*inequality_matrix(reduced.inequality, edge))
    monkeypatch.setattr(semidefinite, "maximise", lambda *given: edge)
    first, second = reduced._multipliers(math.inf, math.inf)
    assert first is reduced.closed
    assert is_semidefinite(*inequality_matrix(reduced.inequality, second))
    assert (edge - second > 0).all() & (edge - second < 1e-3 * edge).all()


@pytest.mark.slow
@pytest.mark.parametrize("act", [ReLU(), GroupSort()], ids=repr)
def test_ten_layers_of_256_have_a_bound_far_below_the_product(act):
    net = network(64, *[256] * 10, 1, act=act)
    loose, tight = eclipse(net), lipsdp(net, seconds=15)[0]
    assert tight < 0.7 * loose < 0.2 * product(net)


@pytest.mark.parametrize("act", [ReLU(), GroupSort()], ids=repr)
def test_a_network_that_is_too_large_is_cut_and_the_bounds_of_its_parts_are_multiplied(act, monkeypatch):
    net = network(4, *[12] * 6, 3, act=act)
    x = 2 * normal(2000, 4)
    whole, seen = lipsdp(net)[0], steepest(net, x)
    pair = [steepest(replace(net, layers=[*net.layers[:-1], difference(net.layers[-1], 0, j)]), x) for j in (1, 2)]
    monkeypatch.setattr(semidefinite, "LARGEST", 50 if act.slopes else 40)
    first, *_ = parts = Reduced.parts(net)
    assert [part.stages.size <= semidefinite.LARGEST for part in parts] == [True] * len(parts)
    assert len(parts) > 1
    assert why_not_applicable(net) is None
    loose, (tight, multipliers) = eclipse(net), lipsdp(net)
    assert max(seen, whole) < tight < loose < product(net)
    assert multipliers is None
    before, of_pairs = math.prod(part.bound(part.closed) for part in parts[:-1]), bounds_of_pairs(net)
    assert of_pairs == pytest.approx(before * parts[-1].bounds_of_pairs(parts[-1].closed), rel=1e-12)
    assert (of_pairs[:2] >= pair).all()
    # The first part ends with the features, in the 2-norm.
    n = len(first.stages.hidden)
    ending = Affine(torch.eye(12).unsqueeze(0), torch.zeros(1, 1, 12))
    inner = replace(net, layers=[*net.layers[:n], ending], acts=net.acts[: n + 1])
    assert first.bound(first.closed) == pytest.approx(eclipse(inner), rel=1e-9)
    monkeypatch.setattr(semidefinite, "LARGEST", 20)
    n = 4 + 12 + 12 if act.slopes else 12 + 6 + 12
    assert (
        why_not_applicable(net)
        == f"a layer of {max(n, 36 if act.slopes else n)} inputs and features, more than 20: would take gigabytes"
    )


@pytest.mark.parametrize("p", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("h", [1.0, 2.0, math.inf])
def test_bounds_are_converted_to_other_norms(p, h):
    """||x||_2 <= ||x||_1, ||x||_2 <= 2 ||x||_inf for four inputs, ||y||_1 <= 3^(1/2) ||y||_2 for three outputs."""
    square = (4 if p == math.inf else 1) * (3 if h == 1 else 1)
    assert square <= Fraction(conversion(p, h, 4, 3)) ** 2 <= square * (1 + Fraction(1, 10**15))
    net = Unconstrained().prove(network(4, 8, 8, 3, act=GroupSort()))
    chain = replace(Chain.of(LInf(p, 1.0), net.layers), output_p=h, hidden_p=math.inf)
    ones = torch.ones(4).double()
    problem = Problem(net, chain, (-ones, ones), Maximum(0.0, ()), 0)
    for name, own in (("eclipse", eclipse(net)), ("lipsdp", lipsdp(net)[0])):
        found = prove(problem, name).proofs[name].value
        assert found == pytest.approx(own * conversion(p, h, 4, 3), rel=1e-9)
    near = problem._replace(measured=Maximum(1.05 * found, ()), gap=0.01)  # as far as the search has to go
    assert found < prove(near, "lipsdp").proofs["lipsdp"].value <= 1.05 * found * 1.01
    x, moved = normal(3000, 4), normal(3000, 4, seed=1)
    f, g = (net.double(points.unsqueeze(0))[0] for points in (x, moved))
    assert float((norms(f - g, h) / norms(x - moved, p)).max()) <= found


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


def test_equal_rows_of_a_group_and_zero_rows_change_nothing():
    """Features of a pair that are equal everywhere stay so, and have no multiplier."""
    net = network(3, 8, 8, 1, act=GroupSort())
    (first, b1), *others = net.layers
    first[0, 5], b1[..., 5] = first[0, 1], b1[..., 1]
    (reduced,) = Reduced.parts(net)
    assert len(reduced.closed) == 7
    close = replace(net, layers=[Affine(first.clone(), b1), *others])
    close.layers[0].weight[0, 5, 0] *= 1 + 2.0**-20
    assert len(Reduced.parts(close)[0].closed) == 8
    assert lipsdp(net)[0] == pytest.approx(lipsdp(close)[0], rel=1e-5)
    assert eclipse(net) < eclipse(close)
    net = residual(3, 4, 1, inside=4)
    net.layers[1].weight[..., 2] = 0
    (reduced,) = Reduced.parts(net)
    assert len(reduced.closed) == 7
    assert steepest(net, normal(2000, 3)) <= lipsdp(net)[0] <= eclipse(net)


@pytest.mark.parametrize("act", [ReLU(), GroupSort(), Abs(), Householder()], ids=repr)
def test_weights_of_any_size_have_a_bound_and_those_that_are_no_numbers_have_none(act):
    """3e38 and denormal ones beside each other; with NaN or infinity nothing is proven, and no error escapes."""
    net = network(3, 6, 6, 1, act=act)
    wild = scaled(net, 1e38, 2.0**-149, 1.0)
    wild.layers[0].weight[0, 1, 1], wild.layers[1].weight[0, 2, 2] = 3e38, 2.0**-149
    seen = steepest(wild, 1e-30 * normal(3000, 3))
    loose, tight = both(wild)
    assert seen <= tight <= loose <= product(wild) * 1.001
    for bad in (math.nan, math.inf):
        broken = scaled(net, 1.0, 1.0, 1.0)
        broken.layers[1].weight[0, 2, 3] = bad
        ones = torch.ones(3).double()
        chain = Chain.of(Unconstrained(), broken.layers)
        problem = Problem(
            replace(broken, norms=[[1.0], [math.inf], [1.0]]), chain, (-ones, ones), Maximum(0.0, ()), 0
        )
        found = prove(problem)
        assert found.value is None or math.isinf(found.value)
        assert found.proofs["eclipse"].value is found.proofs["lipsdp"].value is None


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


def test_the_linear_term_takes_part_and_is_not_added():
    """Where it works against the layers, the bound is below that of the layers alone."""
    net = network(3, 12, 12, 1)
    layers = lipsdp(net)[0]
    slope = net.double.layers
    mean = slope[2].weight[0] @ slope[1].weight[0] @ slope[0].weight[0] / 4  # with every slope at its middle
    against = replace(net, linear=-mean.float().unsqueeze(0))
    assert steepest(against, normal(3000, 3)) <= lipsdp(against)[0] < layers + 0.5 * float(mean.norm())
    alone = replace(scaled(net, 1.0, 0.0, 1.0), linear=torch.tensor([[[3.0, 0.0, 4.0]]]))
    assert both(alone) == pytest.approx((5.0, 5.0), rel=1e-9)


def test_what_the_bounds_do_not_cover_is_refused():
    for act in (*ACTS.values(), Abs(), GroupSort(), Householder(), Steep()):
        assert why_not_applicable(network(2, 4, 1, act=act)) is None
    for act in (as_activation(torch.nn.Tanh()), Tripled(), Larger()):
        reason = f"{act.label} neither declares slopes nor sorts"
        assert why_not_applicable(network(2, 4, 1, act=act)) == reason
