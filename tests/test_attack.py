"""The falsifier finds what is wrong, proves what it finds, and finds nothing wrong with what is right."""

import itertools
import json
import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import act_for
from networks import (
    EACH_LIPSCHITZ,
    NORMS,
    ONE_OF_EACH,
    SEVERAL_OF_EACH,
    by_hand,
    generator,
    network,
    normal,
    power,
    values,
)

from lipexp.evaluate import Evaluator
from lipexp.loop import fit
from lipexp.measured.attack import Falsifier, attack, project
from lipexp.measured.gradients import Maximum, norms, scan
from lipexp.members import build, stack
from lipexp.norms import dual, product_bound
from lipexp.proven import Chain, Problem, prove_quickly
from lipexp.proven.pairs import pair_constants
from lipexp.proven.radii import certified_radii


def distances(net, x, p):
    """The distances of points from the zeros of a linear function."""
    weight, bias = (part.double().flatten() for part in net.layers[0])
    slope = torch.linalg.vector_norm(weight, ord=dual(p))
    return ((x @ weight + bias).abs() / slope).numpy()


def distance_power(x, y, p):
    """||x - y||_p, for p = 2 its square."""
    return power([Fraction(a) - Fraction(b) for a, b in zip(x, y, strict=True)], p)


def check_flips(found, net, x, radius, p):
    """Each counterexample is one, decided without rounding."""
    for flip in found.flips:
        assert flip.point == x[flip.index].tolist()
        assert flip.radius == radius[flip.index]
        assert distance_power(flip.point, flip.moved, p) <= Fraction(flip.radius) ** (2 if p == 2 else 1)
        f, moved = values(net, flip.point), values(net, flip.moved)
        if len(f) == 1:
            assert f[0] * moved[0] < 0
            continue
        own = f.index(max(f))
        margin, lost = (v[own] - max(v[:own] + v[own + 1 :]) for v in (f, moved))
        assert margin > 0 > lost
        assert (flip.f, flip.f_moved) == (pytest.approx(float(margin)), pytest.approx(float(lost)))


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("dims", [1, 2, 5])
def test_a_projection_is_the_nearest_point_of_the_ball(p, dims):
    """<offset - projection, y - projection> <= 0 for every y of the ball: for its corners, or where it touches."""
    offset, reach = normal(200, dims, seed=dims), normal(200).abs()
    found = project(offset, reach, p)
    assert (torch.linalg.vector_norm(found, ord=p, dim=1) <= reach * (1 + 1e-12)).all()
    inside = torch.linalg.vector_norm(offset, ord=p, dim=1) <= reach
    assert torch.equal(found[inside], offset[inside])
    assert 0 < inside.sum() < 200
    corners = {
        1: torch.cat([torch.eye(dims), -torch.eye(dims)]).double(),
        2: torch.nn.functional.normalize(normal(100, dims, seed=9), dim=1),
        math.inf: torch.tensor(list(itertools.product((-1.0, 1.0), repeat=dims))).double(),
    }
    for corner in corners[p]:
        assert (((offset - found) * (reach.unsqueeze(1) * corner - found)).sum(dim=1) <= 1e-12).all()


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("dims", [1, 3, 64])
def test_a_linear_function_is_flipped_just_beyond_its_distance_and_never_within(p, dims):
    net, x = network(dims, 1, bias=1.0), normal(40, dims, seed=5)
    right = distances(net, x, p)
    found = attack(net, x, right * (1 - 1e-12), p, generator())
    assert found.flips == []
    assert found.power == {1.05: 1.0, 1.5: 1.0, 2.0: 1.0}
    found = attack(net, x, right * 1.0001, p, generator())
    assert len(found.flips) == 40
    check_flips(found, net, x, right * 1.0001, p)


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize(("dims", "classes"), [(2, 3), (64, 10)])
def test_a_linear_map_changes_its_class_just_beyond_its_distance_and_never_within(p, dims, classes):
    net, x = network(dims, classes, bias=0.1), normal(40, dims, seed=5)
    weight = net.layers[0].weight[0].double()
    slopes = torch.linalg.vector_norm(weight.unsqueeze(1) - weight, ord=dual(p), dim=2)
    right = certified_radii(replace(net, norms=[[1.0]]), x, slopes.numpy()).radius
    found = attack(net, x, right * (1 - 1e-12), p, generator())
    assert found.flips == []
    assert found.power[1.5] == found.power[2.0] == 1.0
    found = attack(net, x, right * 1.0001, p, generator())
    assert len(found.flips) == 40
    check_flips(found, net, x, right * 1.0001, p)


@pytest.mark.parametrize("overrides", SEVERAL_OF_EACH, ids=" ".join)
def test_radii_of_several_classes_are_refuted_if_and_only_if_they_are_wrong(overrides, trained, monkeypatch):
    monkeypatch.setattr("lipexp.measured.attack.BEYOND", ())
    result = trained(*overrides, runs=EACH_LIPSCHITZ)
    net, chain = (
        result.checkpoint.network.run(1),
        Chain.of(result.stack.constraint, result.checkpoint.network.layers, 1),
    )
    x = torch.from_numpy(result.stack.data[1].test_x).double()[:20]
    pairs = pair_constants(net, prove_quickly(Problem(net, chain, (x[0], x[0]), Maximum(0.0, ()), 0)))
    radius = certified_radii(net, x, pairs.constants).radius
    assert attack(net, x, radius, chain.p, generator()).flips == []
    # Constants of a third of the steepest slopes at these points are wrong.
    jacobians = scan(net, x.unsqueeze(0)).gradient[0]
    slopes = norms(jacobians.unsqueeze(1) - jacobians.unsqueeze(2), chain.q).amax(dim=0).numpy() / 3
    wrong = certified_radii(net, x, slopes).radius
    found = attack(net, x, wrong, chain.p, generator())
    assert found.flips
    check_flips(found, net, x, wrong, chain.p)


@pytest.mark.parametrize("overrides", ONE_OF_EACH, ids=" ".join)
def test_radii_are_refuted_if_and_only_if_they_are_wrong(overrides, trained, monkeypatch):
    """Of trained networks, with every constraint and every activation."""
    monkeypatch.setattr("lipexp.measured.attack.BEYOND", ())
    result = trained(*overrides, runs=EACH_LIPSCHITZ)
    net, p = result.checkpoint.network.run(1), result.stack.constraint.p
    x = torch.from_numpy(result.stack.data[1].test_x).double()[:20]
    certified = product_bound(norm for (norm,) in net.norms)
    radius = certified_radii(net, x, certified).radius
    found = attack(net, x, radius, p, generator())
    assert (found.points, found.flips) == (20, [])
    json.dumps(found.record(), allow_nan=False)
    # Radii from half of the steepest gradient at these points are wrong.
    wrong = radius * certified / float(norms(scan(net, x.unsqueeze(0)).gradient, dual(p)).max() / 2)
    found = attack(net, x, wrong, p, generator())
    assert found.flips
    check_flips(found, net, x, wrong, p)


def test_points_without_a_radius_are_left_out():
    net, x, radius = network(3, 1), normal(4, 3), np.array([0.0, math.inf, 1e-9, 0.0])
    assert attack(net, x, radius, 2.0, generator()).points == 1
    found = attack(net, x, np.zeros(4), 2.0, generator())
    assert (found.points, found.flips, found.power) == (0, [], {})


def test_networks_with_one_sign_or_without_slope_are_attacked_all_the_same():
    x, high, flat = normal(10, 3), by_hand(([[1.0] * 3], [50.0])), by_hand(([[0.0] * 3], [1.0]))
    assert len(attack(high, x, distances(high, x, 2.0) * 1.001, 2.0, generator()).flips) == 10
    found, again = (attack(flat, x, np.ones(10), 2.0, generator()) for _ in range(2))
    assert not found.flips
    assert found.power == {1.05: 0.0, 1.5: 0.0, 2.0: 0.0}
    assert json.dumps(found.record(), allow_nan=False) == json.dumps(again.record(), allow_nan=False)


def test_a_flip_that_rounding_may_have_made_is_no_counterexample():
    """x + 2^60 - 2^60 is x, of which float64 keeps nothing: its sign is anybody's guess."""
    huge, x = 2.0**60, torch.tensor([[0.6], [-700.0]]).double()
    cancelling = by_hand(([[1.0], [0.0]], [huge, huge]), ([[1.0, -1.0]], [0.0]))
    assert Falsifier(cancelling, x, 2.0, generator()).confirmed(1, x[0] + 200, 1e4) is None
    falsifier = Falsifier(by_hand(([[1.0]], [0.0])), x, 2.0, generator())
    assert falsifier.confirmed(1, x[0] + 200, 1e4) is not None
    assert falsifier.confirmed(1, x[0] + 200, 900.0) is None  # too far away
    # The same with the outputs x + 2^60 and 2^60.
    cancelling = by_hand(([[1.0], [0.0]], [huge, huge]))
    assert Falsifier(cancelling, x, 2.0, generator()).confirmed(1, x[0] + 200, 1e4) is None
    falsifier = Falsifier(by_hand(([[1.0], [0.0]], [0.0, 0.0])), x, 2.0, generator())
    assert falsifier.confirmed(1, x[0] + 200, 1e4) is not None


@pytest.mark.slow
def test_two_moons_keep_their_class_within_the_radius_and_lose_it_at_twice_of_it(compose, bounded_case):
    runs = stack([build(compose(*bounded_case, *act_for(bounded_case), "eval_every=0"))])
    (evaluated,) = Evaluator(runs).final(fit(runs, lambda checkpoint: None))
    net, certified = evaluated.network, evaluated.certificate.value
    x = torch.from_numpy(runs.data[0].test_x).double()
    found = attack(net, x, certified_radii(net, x, certified).radius, runs.constraint.p, generator())
    assert found.points == 2000
    assert not found.flips
    if bounded_case != ("constraint=one",):  # whose network is steepest away from the decision line
        assert found.power[1.5] > 0.85
        assert found.power[2.0] > 0.99


@pytest.mark.slow
def test_two_moons_keep_their_class_within_the_exact_distance_and_lose_it_just_beyond(compose):
    runs = stack([build(compose("eval_every=0"))])
    (found,) = Evaluator(runs).final(fit(runs, lambda checkpoint: None))
    assert 0.8 < found.robustness.summary([]).exact.radius < 0.95 < found.robustness.summary([]).exact.local
    x, radii = torch.from_numpy(runs.data[0].test_x).double(), found.robustness.of("test")
    attacked = attack(found.network, x, radii["radius_exact"], 2.0, generator())
    assert (attacked.points, attacked.flips) == (2000, [])
    assert attacked.power[1.05] > 0.99


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chain", "margin"),
    [
        (("constraint=spectral",), 0.15),
        (("constraint=linf", "constraint.p=inf"), 0.02),
        (("constraint=linf", "constraint.p=1"), 0.4),
    ],
    ids=["2", "inf", "1"],
)
def test_ten_digits_keep_their_class_within_radii_that_are_larger_by_pairs_of_outputs(compose, chain, margin):
    overrides = ("dataset=digits", f"loss.margin={margin}", "steps=300", "eval_every=0")
    runs = stack([build(compose(*overrides, *chain))])
    (found,) = Evaluator(runs).final(fit(runs, lambda checkpoint: None))
    assert found.scores["test"]["accuracy"] > 0.95
    assert found.robustness.summary([]).pairs.median_gain > 1
    x = torch.from_numpy(runs.data[0].test_x).double()
    radii = found.robustness.of("test")
    assert np.median(radii["radius_local"] / np.maximum(radii["radius"], 1e-9)) > 1.01
    attacked = attack(found.network, x, radii["radius_local"], runs.constraint.p, generator())
    assert attacked.points >= 399
    assert not attacked.flips
