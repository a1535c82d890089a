"""Monotone networks f = h + c s^T x: every claim, by slopes in rational arithmetic and at random points."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from acts import ACTS
from conftest import choice_of
from networks import NORMS, dot, free, local_map, network, normal, power
from polygons import region_gradients

from lipexp import loop, members
from lipexp.config import ConfigError
from lipexp.constraints import LInf, Spectral
from lipexp.measured import monotone
from lipexp.measured.ascent import _soft_gradient, jacobians_of
from lipexp.measured.attack import steepest_direction
from lipexp.measured.gradients import Maximum, norms, scan
from lipexp.models import MLP, signs
from lipexp.proven import Chain, Problem, prove
from lipexp.proven.pairs import feature_constants
from lipexp.proven.radii import certified_radii
from lipexp.proven.rounding import evaluate, float32_error, followed

CONSTRAINTS = {"spectral": Spectral, **{f"linf {p:g}": lambda bound, p=p: LInf(p, bound) for p in NORMS}}
RISING = (*choice_of("dataset", "table")[:-1], "dataset.target=pressure", "loss=mse", "+model.monotone={age: 1}")


def directed(kind, directions, *, name="maxmin", lipschitz=2.0, hidden=(6, 6), seed=0):
    """The constraint with these signs, and a baked network of random weights under it."""
    constraint = CONSTRAINTS[kind](lipschitz)
    constraint.signs = torch.tensor(directions, dtype=torch.float32)
    start = network(len(directions), *hidden, 1, act=ACTS[name], seed=seed, bias=1.0)
    layers = [layer._replace(weight=4 * layer.weight) for layer in free(start)]
    return constraint, constraint.bake(layers, start.acts[0])


def proof(constraint, net, method=None, measured=0.0):
    ones = torch.ones(net.n_inputs, dtype=torch.float64)
    chain = Chain.of(constraint, net.layers)
    return prove(Problem(net, chain, (-ones, ones), Maximum(measured, ()), 10**5), method)


def linear_row(net):
    return [Fraction(v) for v in net.linear[0, 0].tolist()]


def exact_gradient(net, point):
    """That of f, from the layers and the linear term by hand."""
    return [a + b for a, b in zip(local_map(net, point)[0][0][:-1], linear_row(net), strict=True)]


@pytest.mark.parametrize("lipschitz", [1e-20, 0.3, 1.0, 1e20])
@pytest.mark.parametrize("kind", CONSTRAINTS)
def test_f_rises_and_falls_as_asked_within_the_whole_of_l(kind, lipschitz):
    constraint, net = directed(kind, [1.0, -1.0, 0.0, 1.0], lipschitz=lipschitz)
    found = proof(constraint, net, "product")
    assert (1 - 2e-5) * lipschitz <= found.value <= lipschitz
    bounds = [Fraction(float(bound)) for bound in feature_constants(net, found)]
    for point in normal(20, 4):
        slopes = exact_gradient(net, point)
        assert slopes[0] >= 0 >= slopes[1]
        assert slopes[3] >= 0
        assert power(slopes, constraint.q) <= Fraction(found.value) ** (2 if constraint.q == 2 else 1)
        assert all(abs(slope) <= bound for slope, bound in zip(slopes, bounds, strict=True))


@pytest.mark.parametrize("hidden", [(), (6,), (6, 6)], ids=str)
def test_the_map_of_a_region_and_f_itself_have_the_linear_term(hidden):
    _, net = directed("linf 2", [1.0, 0.0, -1.0], hidden=hidden)
    for point in normal(10, 3):
        form, region = local_map(net, point)[0][0], net.linear_region(point.numpy())
        exact = [*exact_gradient(net, point), form[-1]]
        found = [*region.gradient[0], region.offset[0]]
        assert [int(v) * Fraction(2) ** region.exponent for v in found] == exact
        f, error = (Fraction(float(part[0, 0])) for part in evaluate(net, point[None]))
        assert abs(dot(exact, [*map(Fraction, point.tolist()), 1]) - f) <= error


@pytest.mark.parametrize("kind", CONSTRAINTS)
def test_the_exact_constant_is_the_steepest_of_all_regions(kind):
    constraint, net = directed(kind, [-1.0, 1.0], hidden=(4, 4))
    steps = (map(sum, zip(gradient, linear_row(net), strict=True)) for gradient in region_gradients(net))
    steepest = max(power(list(step), constraint.q) for step in steps)
    found = Fraction(proof(constraint, net).value) ** (2 if constraint.q == 2 else 1)
    assert steepest <= found <= steepest * (1 + Fraction(1, 10**10))


@pytest.mark.parametrize("kind", CONSTRAINTS)
def test_radii_hold_and_float32_errs_no_more_than_is_said(kind):
    """Steps of the whole radius down the gradient; evaluations in float32 at the points themselves."""
    constraint, net = directed(kind, [1.0, 0.0, -1.0], lipschitz=50.0)
    x = (3 * normal(300, 3)).float().double()
    radii = certified_radii(net, x, proof(constraint, net).value)
    gradient = scan(net, x[None]).gradient[0, :, 0]
    sides = torch.from_numpy(np.sign(radii.f) * radii.radius * (1 - 1e-12))[:, None]
    f, error = evaluate(net, x - sides * steepest_direction(gradient, constraint.p))
    assert (f[:, 0] * np.sign(radii.f) >= -error[:, 0]).all()
    reached, unsure = evaluate(net, x)
    off = np.abs(net(x.float()[None])[0].double().numpy() - reached)
    assert (off <= float32_error(net, followed(net, x), np.zeros(len(x))) + unsure).all()
    assert (radii.radius_float32 <= radii.radius).all()
    assert (radii.radius_float32 > 0.9 * radii.radius).mean() > 0.9


def test_a_stored_term_that_does_not_carry_the_layers_proves_nothing():
    """Another sign, or one of two slopes that is too small, as in a file that was changed."""
    constraint, net = directed("spectral", [1.0, -1.0, 0.0])
    points = {"data": (normal(1, 50, 3), scan(net, normal(1, 50, 3)).gradient)}
    names = {"x0": 1, "x1": -1}
    assert monotone.assess(net, points, 0, constraint.signs, names).proven
    for factors in ([-1.0, 1.0, 1.0], [1.0, 0.5, 1.0], [0.0, 1.0, 1.0]):
        other = replace(net, linear=net.linear * torch.tensor(factors))
        found = monotone.assess(other, points, 0, constraint.signs, names)
        assert not found.proven
        assert found.slope == pytest.approx(min(factors) * float(net.linear.max()))


def test_an_attack_finds_the_pairs_of_a_network_that_is_not_monotone():
    constraint, net = directed("spectral", [1.0, 0.0, -1.0])
    box, generator = (-torch.ones(3).double(), torch.ones(3).double()), torch.Generator()
    assert monotone.violations(net, box, constraint.signs, generator, 500) == 0
    assert monotone.violations(net, box, -constraint.signs, generator, 500) > 400


def test_lipsdp_goes_as_far_with_what_is_measured_as_without():
    """It may stop at what is measured of the layers, which is less than what is measured of f."""
    constraint, net = directed("spectral", [1.0, 0.0, -1.0, 0.0, 0.0], name="relu", hidden=(12, 12), lipschitz=1.0)
    measured = float(norms(scan(net, 2 * normal(1, 2000, 5)).gradient[0, :, 0], 2).max())
    alone, known = (proof(constraint, net, "lipsdp", value).value for value in (0.0, measured))
    assert measured <= known <= alone * 1.002


def test_the_softened_jacobian_has_the_linear_term():
    _, net = directed("spectral", [1.0, 0.0, -1.0], name="relu")
    x = normal(1, 100, 3)
    softened = _soft_gradient(net.double, jacobians_of(net), x, 1e9)
    assert float((softened - scan(net, x).gradient[0, :, 0]).abs().median()) < 1e-12


@pytest.mark.parametrize("p", ["1", "2", "inf"])
def test_runs_of_several_l_train_as_they_do_alone(compose, p):
    common = (*RISING, "constraint=linf", f"constraint.p={p}", "steps=20", "eval_every=0", "model.width=8")
    built = [members.build(compose(*common, f"lipschitz={bound}")) for bound in (0.5, 1, 7)]
    together = loop.fit(members.stack(built), lambda checkpoint: None, dtype=torch.float64).network
    for run, member in enumerate(built):
        alone = loop.fit(members.stack([member]), lambda checkpoint: None, dtype=torch.float64).network
        parts = zip((together.run(run).state_dict()).values(), alone.state_dict().values(), strict=True)
        assert all(torch.allclose(one, other, rtol=1e-5, atol=1e-7) for one, other in parts)
        assert float(alone.linear.sum()) == pytest.approx(member.parts["constraint"].lipschitz / 2, rel=1e-5)


def test_a_feature_has_one_direction():
    assert signs(MLP(monotone={"age": 1, "x1": -1}), ["age", "sex"], 2).tolist() == [1, -1]
    with pytest.raises(ConfigError, match=r"model\.monotone=x0: is a feature that has another name there, too"):
        signs(MLP(monotone={"age": 1, "x0": -1}), ["age", "sex"], 2)
