"""Radii by local constants: at least the global ones, never above exact distances, and refuted by no attack."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from acts import ACTS, PIECEWISE
from networks import NORMS, by_hand, degenerate, generator, network, normal, pairs, residual, scaled
from test_boundary import boundary
from test_pairs import CHAINS, TANH, certified

from lipexp.activations import GroupSort
from lipexp.constraints import Unconstrained
from lipexp.measured.attack import attack
from lipexp.proven import local
from lipexp.proven.pairs import pair_constants
from lipexp.proven.radii import certified_radii, local_radii

LOCAL = [name for name, act in ACTS.items() if name not in ("groups of 3", "fullsort", "descending threes")]


def both(net, constraint, x, method="product"):
    """The radii by the constants for everywhere, those by local ones, and p."""
    net, found = certified(net, constraint, method)
    constants = found.value if net.n_outputs == 1 else pair_constants(net, found).constants
    norms = found.chain.p, found.chain.hidden_p
    return certified_radii(net, x, constants).radius, local_radii(net, x, constants, norms), norms[0]


def check_exact(net, constraint, x):
    radius, near, p = both(net, constraint, x)
    exact = np.where(radius > 0, boundary(net).distances(x.numpy(), p), 0)
    assert (near >= radius).all()
    assert (near <= exact * (1 + 1e-9) + 1e-9).all()
    chosen = (exact > 0) & np.isfinite(exact)
    return radius[chosen] / exact[chosen], near[chosen] / exact[chosen]


SHAPES = [(2, 8, 8, 1), (2, 8, 8, 3), (1, 8, 8, 1), (2, 6, 6, 6, 1), (2, 12, 1), (2, 6, 6, 6, 6, 3)]


@pytest.mark.parametrize(("name", "shape", "kind"), pairs(LOCAL * 4, SHAPES * 5, CHAINS))
def test_local_radii_lie_between_those_by_global_constants_and_exact_distances(name, shape, kind):
    net = network(*shape, act=ACTS[name], seed=len(name))
    check_exact(net, CHAINS[kind], 2 * normal(60, shape[0], seed=1))


@pytest.mark.parametrize("kind", CHAINS)
def test_networks_that_are_awkward_have_no_radius_above_the_exact_distance(kind):
    """Without biases, with features that are equal or dead, huge, tiny, with a linear term beside the layers."""
    x = 2 * normal(60, 2, seed=1)
    for seed in range(3):
        check_exact(network(2, 8, 8, 1, bias=0.0, seed=seed), CHAINS[kind], x)
        check_exact(degenerate(network(2, 6, 6, 3, seed=seed, grain=0.5)), CHAINS[kind], x.round())
    plain = network(2, 8, 8, 1, act=ACTS["maxmin"], seed=1)
    beside = replace(plain, linear=torch.tensor([[[0.5, 1.0]]]))
    check_exact(beside, CHAINS[kind], x)
    for factors in ((2.0**100, 2.0**-100, 1.0), (2.0**-100, 2.0**20, 1.0), (2.0**60, 2.0**60, 1.0)):
        found = check_exact(scaled(plain, *factors, bias=True), CHAINS[kind], x)
        assert (found[1] > 0.05).any()


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("name", ["relu", "maxmin", "descending pairs"])
def test_local_constants_come_closer_to_exact_distances(name, p):
    constraint = Unconstrained() if p == 2 else CHAINS[f"{p:g} -> inf"]
    radius, near = check_exact(
        network(2, 16, 16, 1, act=ACTS[name], seed=2), constraint, 2 * normal(300, 2, seed=3)
    )
    assert np.median(near) > max(0.35, 3 * np.median(radius))


@pytest.mark.parametrize(("name", "kind"), pairs(LOCAL, CHAINS))
def test_no_attack_refutes_radii_in_more_dimensions(name, kind, monkeypatch):
    monkeypatch.setattr("lipexp.measured.attack.BEYOND", (2.0,))
    net, x = network(10, 16, 16, 4, act=ACTS[name], seed=7), normal(30, 10, seed=8)
    radius, near, p = both(net, CHAINS[kind], x)
    assert np.median(near[radius > 0] / radius[radius > 0]) > 1.2
    found = attack(net, x, near, p, generator())
    assert found.points > 25
    assert found.flips == []
    assert found.power[2.0] > 0.1


def test_a_kink_that_float64_cannot_place_counts_as_open():
    """f = 1 - 1000 max(x, 0), through x + 2^50, whose last bit is 1/4: the flat part does not reach beyond 0."""
    large = 2.0**50
    net = by_hand(
        ([[1.0]], [large]), ([[1.0], [-1.0]], [-large, large]), ([[-1000.0, 0.0]], [1.0]), act=ACTS["relu"]
    )
    x = -torch.linspace(0, 0.6, 61).double().unsqueeze(1)
    net, found = certified(net, Unconstrained())
    # Radii as if f itself were known.
    margin, constant = np.ones((61, 1)), np.full((61, 1), found.value)
    near = local.radii(net, x, margin, constant, (2.0, 2.0))
    assert (near <= -x[:, 0].numpy() + 1 / 1000 + 1e-12).all()


def test_a_linear_map_and_a_point_on_the_boundary_have_what_the_global_constant_gives():
    net, x = network(3, 4), normal(20, 3)
    radius, near, _ = both(net, Unconstrained(), x)
    np.testing.assert_array_equal(radius, near)
    hinged = by_hand(([[1.0], [-1.0]], [0.0, 0.0]), ([[2.0, -1.0]], [0.0]))  # 2 x, or x where x < 0
    radius, near, _ = both(hinged, Unconstrained(), torch.tensor([[0.0], [0.5], [-0.5]]).double())
    assert near[0] == 0
    assert ((near[1:] > 0.47) & (near[1:] <= 0.5)).all()
    flat = by_hand(([[0.0]], [1.0]), ([[1.0]], [1.0]))
    assert np.isinf(both(flat, Unconstrained(), x[:, :1])[1]).all()


@pytest.mark.parametrize(
    ("net", "reason"),
    [
        (network(2, 8, 8, 1, act=TANH), "Tanh neither has two slopes nor sorts pairs"),
        (network(2, 8, 8, 1, act=GroupSort(group_size=4)), "GroupSort neither has two slopes nor sorts pairs"),
        (network(2, 6, 6, 1, act=PIECEWISE["handicap"]), "Handicap neither has two slopes nor sorts pairs"),
        (residual(2, 6, 6, 1), "local constants are for affine layers"),
    ],
)
def test_networks_without_local_constants_keep_the_global_ones_and_it_is_said_why(net, reason):
    assert local.why_not_applicable(net).startswith(reason)
    x = normal(10, 2)
    norms = [[1.0]] * len(net.layers)
    radius, near = (of(replace(net, norms=norms), x, 2.0, *more) for of, *more in PAIR)
    np.testing.assert_array_equal(radius.radius, near)


PAIR = [(certified_radii,), (local_radii, (2.0, 2.0))]


def test_what_would_take_too_long_is_left_out(monkeypatch):
    net = network(2, 8, 8, 8, 1)
    assert local.why_not_applicable(net, 1000) is None
    # For one point: two products of (2, 8) and (8, 8), and 8 rows of the third layer through the second.
    monkeypatch.setattr(local, "LARGEST", 1000 * (2 * 2 * 64 + 8 * 64) - 1)
    assert local.why_not_applicable(net, 999) is None
    assert local.why_not_applicable(net, 1000) == "local constants would take too long"


def test_radii_do_not_depend_on_the_order_of_pairs():
    """Of pairs of neighbours, which are indexed, and of halves, which are sliced."""
    halves = network(3, 8, 8, 1, act=ACTS["maxmin"], seed=4)
    order = torch.arange(8).reshape(2, 4).T.flip(1).flatten()  # the larger one first
    layers = [halves.layers[0]]
    for layer in halves.layers[1:]:
        layers.append(layer._replace(weight=layer.weight[:, :, order]))
    for i in (0, 1):
        layers[i] = layers[i]._replace(weight=layers[i].weight[:, order], bias=layers[i].bias[:, :, order])
    neighbours = replace(halves, layers=layers, acts=[ACTS["descending pairs"]] * 3)
    x = normal(40, 3)
    np.testing.assert_allclose(neighbours.double(x[None]), halves.double(x[None]), atol=1e-12)
    one, other = (both(net, Unconstrained(), x)[1] for net in (halves, neighbours))
    np.testing.assert_allclose(one, other, rtol=1e-9)
    assert math.isfinite(one.max())
