"""The falsifier finds what is wrong, proves what it finds, and finds nothing wrong with what is right."""

from __future__ import annotations

import itertools
import json
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from test_robustness import exact_f

from lipexp.activations import ReLU
from lipexp.measured.attack import Falsifier, attack, closer, project, steepest
from lipexp.proven.methods import product_certificate
from lipexp.norms import dual
from lipexp.constraints import in_usual_order
from lipexp.loop import fit
from lipexp.models import Layer, run_layers
from lipexp.proven.radii import certified_radii
from lipexp.train import build, stack

NORMS = (1.0, 2.0, math.inf)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def linear(dims: int = 3, seed: int = 0) -> list[Layer]:
    """One linear function, whose distances to its zero are known."""
    return [Layer(normal(1, 1, dims, seed=seed).float(), normal(1, 1, 1, seed=seed + 1).float())]


def distances(layers: list[Layer], x: torch.Tensor, p: float) -> np.ndarray:
    weight, bias = layers[0].weight[0, 0].double(), layers[0].bias.double().item()
    return ((x @ weight + bias).abs() / torch.linalg.vector_norm(weight, ord=dual(p))).numpy()


def exact_power(x: list[float], y: list[float], p: float) -> Fraction:
    """||x - y||_p, for p = 2 its square."""
    sizes = [abs(Fraction(a) - Fraction(b)) for a, b in zip(x, y, strict=True)]
    return max(sizes) if math.isinf(p) else sum(size ** int(p) for size in sizes)


def check_flips(found, layers, act, x, radius, p) -> None:
    """Each counterexample is one, decided without rounding."""
    for flip in found.flips:
        assert flip.point == x[flip.index].tolist()
        assert flip.radius == radius[flip.index]
        assert exact_power(flip.point, flip.moved, p) <= Fraction(flip.radius) ** (2 if p == 2 else 1)
        assert exact_f(layers, act, flip.point) * exact_f(layers, act, flip.moved) < 0


# The geometry ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("dims", [1, 2, 5])
def test_a_projection_is_the_nearest_point_of_the_ball(p, dims):
    """<offset - projection, y - projection> <= 0 for every y of the ball: for its corners, or where it touches."""
    offset, reach = normal(200, dims, seed=dims), normal(200).abs()
    found = project(offset, reach, p)
    assert (torch.linalg.vector_norm(found, ord=p, dim=1) <= reach * (1 + 1e-12)).all()
    inside = torch.linalg.vector_norm(offset, ord=p, dim=1) <= reach
    assert torch.equal(found[inside], offset[inside])
    assert inside.any()
    assert not inside.all()
    if p == 2:
        corners = torch.nn.functional.normalize(normal(100, dims, seed=9), dim=1)
    elif p == 1:
        corners = torch.cat([torch.eye(dims), -torch.eye(dims)]).double()
    else:
        corners = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=dims))).double()
    for corner in corners:
        product = ((offset - found) * (reach.unsqueeze(1) * corner - found)).sum(dim=1)
        assert (product <= 1e-12).all()


@pytest.mark.parametrize("p", NORMS)
def test_the_steepest_direction_has_the_dual_norm_as_its_slope(p):
    gradient = normal(50, 4)
    direction = steepest(gradient, p)
    size = torch.linalg.vector_norm(direction, ord=p, dim=1)
    torch.testing.assert_close(size, torch.ones(50).double())
    slope = (gradient * direction).sum(dim=1)
    torch.testing.assert_close(slope, torch.linalg.vector_norm(gradient, ord=dual(p), dim=1))
    assert (steepest(torch.zeros(3, 4).double(), p) == 0).all()


@pytest.mark.parametrize("p", NORMS)
def test_distances_are_compared_exactly(p):
    x, y = torch.tensor([0.1, 0.2]).double(), torch.tensor([0.4, 0.6]).double()
    power = exact_power(x.tolist(), y.tolist(), p)
    radius = math.sqrt(power) if p == 2 else float(power)
    answers = {r: closer(x, y, r, p) for r in (math.nextafter(radius, 0), radius, math.nextafter(radius, 1))}
    for r, answer in answers.items():
        assert answer == (power <= Fraction(r) ** (2 if p == 2 else 1))
    assert len(set(answers.values())) == 2


# Attacks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("dims", [1, 3, 64])
def test_a_linear_function_is_flipped_just_beyond_its_distance_and_never_within(p, dims):
    layers, x = linear(dims), normal(40, dims, seed=5)
    right = distances(layers, x, p)
    slope = float(torch.linalg.vector_norm(layers[0].weight.double().flatten(), ord=dual(p)))
    found = attack(layers, ReLU(), x, right * (1 - 1e-12), p, slope * (1 + 1e-12), generator())
    assert not found.flips
    assert not found.refuted
    assert found.power == {1.05: 1.0, 1.5: 1.0, 2.0: 1.0}
    wrong = right * 1.0001
    found = attack(layers, ReLU(), x, wrong, p, slope / 1.0001, generator())
    assert len(found.flips) == 40
    assert found.refuted
    check_flips(found, layers, ReLU(), x, wrong, p)


@pytest.mark.parametrize("p", NORMS)
def test_the_steepest_secant_refutes_a_constant_that_is_too_small(p):
    """From points to where they were moved, along the steepest direction: the slope of a linear function."""
    layers, x = linear(), normal(40, 3, seed=5)
    slope = float(torch.linalg.vector_norm(layers[0].weight.double().flatten(), ord=dual(p)))
    found = attack(layers, ReLU(), x, np.full(40, 1e-3), p, slope * 0.9999, generator())
    assert found.refuted
    assert found.secant.slope == pytest.approx(slope, rel=1e-9)
    rise = abs(exact_f(layers, ReLU(), found.secant.x) - exact_f(layers, ReLU(), found.secant.y))
    run = exact_power(found.secant.x, found.secant.y, p)
    assert Fraction(found.secant.slope) ** (2 if p == 2 else 1) * run <= rise ** (2 if p == 2 else 1)


@pytest.fixture
def small(trained):
    """A trained network with its test points, certificate and radii."""

    def small(*overrides):
        result = trained(*overrides, "model.depth=2", "dataset.n_test=24")
        act = result.checkpoint.act
        layers = in_usual_order(run_layers(result.checkpoint.layers, 0), act)
        x = torch.from_numpy(result.stack.data[0].test_x).double()
        certificate = product_certificate(result.stack.constraint, act, result.checkpoint.layers, 0)
        radii = certified_radii(layers, act.baked(), x, certificate.value, certificate.layer_norms)
        return layers, act.baked(), x, certificate, radii.radius

    return small


def check_that_only_wrong_radii_are_refuted(layers, act, x, certificate, radius):
    found = attack(layers, act, x, radius, certificate.p, certificate.value, generator())
    assert found.points == 24
    assert not found.flips
    assert not found.refuted
    assert 0 < found.secant.slope <= certificate.value
    # Half of the steepest secant is no Lipschitz constant.
    constant = found.secant.slope / 2
    wrong = radius * certificate.value / constant
    found = attack(layers, act, x, wrong, certificate.p, constant, generator())
    assert found.flips
    assert found.refuted
    assert found.secant.slope > constant
    check_flips(found, layers, act, x, wrong, certificate.p)


def test_radii_are_refuted_if_and_only_if_they_are_wrong_for_every_norm(small, constraint_case, monkeypatch):
    monkeypatch.setattr("lipexp.measured.attack.BEYOND", ())
    check_that_only_wrong_radii_are_refuted(*small(*constraint_case))


def test_radii_are_refuted_if_and_only_if_they_are_wrong_for_every_activation(small, act_option, monkeypatch):
    monkeypatch.setattr("lipexp.measured.attack.BEYOND", ())
    check_that_only_wrong_radii_are_refuted(*small("constraint=none", f"act={act_option}"))


def test_points_without_a_radius_are_left_out():
    layers, x = linear(), normal(4, 3)
    radius = np.array([0.0, math.inf, 1e-9, 0.0])
    assert attack(layers, ReLU(), x, radius, 2.0, 100.0, generator()).points == 1
    found = attack(layers, ReLU(), x, np.zeros(4), 2.0, 100.0, generator())
    assert (found.points, found.flips, found.power, found.secant) == (0, [], {}, None)
    assert not found.refuted
    json.dumps(found.record(), allow_nan=False)


def test_a_network_with_one_sign_is_attacked_all_the_same():
    layers = [Layer(torch.ones(1, 1, 3), torch.full((1, 1, 1), 50.0))]
    x = normal(10, 3)
    found = attack(layers, ReLU(), x, distances(layers, x, 2.0) * 1.001, 2.0, 1.7, generator())
    assert len(found.flips) == 10


def test_a_network_without_slope_is_attacked_without_complaint():
    layers = [Layer(torch.zeros(1, 1, 3), torch.ones(1, 1, 1))]
    found = attack(layers, ReLU(), normal(5, 3), np.ones(5), 2.0, 1.0, generator())
    assert not found.refuted
    assert found.power == {1.05: 0.0, 1.5: 0.0, 2.0: 0.0}


def test_a_flip_that_rounding_may_have_made_is_no_counterexample():
    """x + 2^60 - 2^60 is x, of which float64 keeps nothing: its sign is anybody's guess."""
    huge = 2.0**60
    layers = [
        Layer(torch.tensor([[[1.0], [0.0]]]), torch.tensor([[[huge, huge]]])),
        Layer(torch.tensor([[[1.0, -1.0]]]), torch.zeros(1, 1, 1)),
    ]
    x = torch.tensor([[0.6], [-700.0]]).double()
    falsifier = Falsifier(layers, ReLU(), x, 2.0, generator())
    assert falsifier.confirmed(1, x[0] + 200, 1e4) is None
    layers = [Layer(torch.ones(1, 1, 1), torch.zeros(1, 1, 1))]
    falsifier = Falsifier(layers, ReLU(), x, 2.0, generator())
    assert falsifier.confirmed(1, x[0] + 200, 1e4) is not None
    assert falsifier.confirmed(1, x[0] + 200, 900.0) is None  # too far away


def test_the_same_seed_finds_the_same(small):
    layers, act, x, certificate, radius = small("constraint=spectral")
    first, second = (
        attack(layers, act, x, 3 * radius, certificate.p, certificate.value, generator(1)).record()
        for _ in range(2)
    )
    assert first == second
    json.dumps(first, allow_nan=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [("spectral",), ("linf", "constraint.p=2"), ("linf", "constraint.p=inf"), ("linf", "constraint.p=1")],
    ids=" ".join,
)
def test_two_moons_keep_their_class_within_the_radius_and_lose_it_at_twice_of_it(compose, overrides):
    runs = stack([build(compose(f"constraint={overrides[0]}", *overrides[1:], "eval_every=0"))])
    last = fit(runs, lambda checkpoint: None)
    certificate = product_certificate(runs.constraint, last.act, last.layers, 0)
    x = torch.from_numpy(runs.data[0].test_x).double()
    radii = certified_radii(last.layers, last.act, x, certificate.value, certificate.layer_norms)
    found = attack(last.layers, last.act, x, radii.radius, certificate.p, certificate.value, generator())
    assert found.points == 2000
    assert not found.refuted
    assert found.power[1.5] > 0.85
    assert found.power[2.0] > 0.99
