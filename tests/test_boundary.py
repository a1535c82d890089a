"""Exact distances from the decision boundary: against closed forms, and rays along which classes change."""

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from acts import PIECEWISE
from networks import NORMS, by_hand, degenerate, network, normal, pairs, residual, scaled, values

from lipexp.activations import LeakyReLU
from lipexp.proven.regions import enumeration as module
from lipexp.proven.regions.enumeration import Enumeration, TooManyRegions, constants

BOX = (np.array([-4.0, -3.0]), np.array([4.0, 5.0]))


def boundary(net):
    return Enumeration(net, [end[: net.n_inputs] for end in BOX], 10**6).boundary()


def fan(dims, p, n):
    """Directions of length 1 in the norm p: all axes and diagonals, and many between them."""
    angle = torch.arange(8 * n).double() * math.pi / (4 * n)
    found = torch.stack([angle.cos(), angle.sin()], dim=1) if dims == 2 else torch.tensor([[-1.0], [1.0]]).double()
    return found / torch.linalg.vector_norm(found, ord=p, dim=1, keepdim=True)


def wins(net, x, like):
    """Whether the class of each point of `like` (N, D) beats all others at points x (N, ..., D)."""
    f, own = (net.double(points.reshape(1, -1, net.n_inputs))[0] for points in (x, like))
    if f.shape[1] == 1:
        f, own = (torch.cat([part, 0 * part], dim=1) for part in (f, own))
    own = own.argmax(dim=1).repeat_interleave(len(f) // len(own)).unsqueeze(1)
    margin = f.gather(1, own)[:, 0] - f.scatter(1, own, -math.inf).amax(dim=1)
    return (margin > 1e-12).reshape(x.shape[:-1])


def along_rays(net, x, p, reach, steps=240):
    """Upper bounds (N,) on the distances at which the class loses, up to `reach` (N,); bisected along each ray."""
    directions = fan(net.n_inputs, p, 45)
    t = torch.linspace(0, 1, steps + 1).double()[1:]
    offsets = reach[:, None, None, None] * t[:, None, None] * directions  # (N, steps, directions, D)
    changed = ~wins(net, x[:, None, None] + offsets, x)
    first = torch.where(changed, t[:, None], math.inf).amin(dim=1)  # (N, directions)
    low, high = (first - 1 / steps).clamp_max(1), first.clamp_max(1)
    for _ in range(40):
        middle = (low + high) / 2
        at = x[:, None] + (reach[:, None] * middle).unsqueeze(2) * directions
        beyond = ~wins(net, at, x)
        low, high = torch.where(beyond, low, middle), torch.where(beyond, middle, high)
    return (reach[:, None] * torch.where(first.isfinite(), high, math.inf)).amin(dim=1).numpy()


def check_rays(net, p, closeness=0.99):
    x = 2 * normal(8, net.n_inputs, seed=7)
    found = boundary(net).distances(x.numpy(), p)
    # The others lie on the boundary, or rays are too far apart there to meet all of its spikes.
    chosen = (found > 1e-9) & (found < 4) & wins(net, x, x).numpy()
    x, found = x[chosen], found[chosen]
    if len(x):
        seen = along_rays(net, x, p, torch.from_numpy(1.02 * found))
        assert (found <= seen * (1 + 1e-9)).all()
        assert (found >= closeness * seen).all()
    return int(chosen.sum())


KINDS = pairs(PIECEWISE, [(2, 6, 6, 1), (2, 6, 6, 3), (1, 6, 6, 1), (1, 6, 1)], NORMS)


@pytest.mark.parametrize(("name", "shape", "p"), KINDS)
def test_no_ray_meets_another_class_within_the_distance_and_one_does_just_beyond(name, shape, p):
    assert check_rays(network(*shape, act=PIECEWISE[name], seed=3), p) or shape[0] == 1


@pytest.mark.parametrize("p", NORMS)
def test_networks_of_other_kinds_have_exact_distances_as_well(p):
    """With residual layers, with a linear term beside the layers, and with breakpoints that meet or coincide."""
    assert check_rays(residual(2, 6, 6, 1), p)
    plain = network(2, 6, 6, 1, act=PIECEWISE["maxmin"], seed=1)
    assert check_rays(replace(plain, linear=torch.tensor([[[0.5, 1.0]]])), p)
    check_rays(network(2, 6, 6, 1, bias=0.0, seed=2), p)
    for seed in range(3):
        check_rays(degenerate(network(2, 6, 6, 1, seed=seed)), p)
        check_rays(degenerate(network(2, 6, 6, 3, seed=seed, grain=0.5)), p)


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize(("dims", "outputs"), [(1, 1), (2, 1), (2, 2), (1, 3), (2, 5)])
def test_a_linear_classifier_has_the_distances_of_its_closed_form(dims, outputs, p):
    net, x = network(dims, outputs, bias=0.5, seed=4), normal(50, dims, seed=5)
    weight, bias = (part[0].double() for part in net.layers[0])
    if outputs == 1:
        weight, bias = torch.cat([weight, 0 * weight]), torch.cat([bias, 0 * bias], dim=1)
    f, q = x @ weight.T + bias, {1: math.inf, 2: 2, math.inf: 1}[p]
    own = f.argmax(dim=1)
    slopes = torch.linalg.vector_norm(weight[own].unsqueeze(1) - weight, ord=q, dim=2)
    margin = f.amax(dim=1, keepdim=True) - f
    nearest = torch.where(slopes > 0, margin / slopes, math.inf).amin(dim=1).numpy()
    found = boundary(net).distances(x.numpy(), p)
    assert (found <= nearest * (1 + 1e-15)).all()
    np.testing.assert_allclose(found, nearest, rtol=1e-11, atol=1e-12)


HINGED = by_hand(([[1.0, 0.0], [-1.0, 0.0]], [0.0, 0.0]), ([[2.0, -1.0]], [0.0]))  # 2 x, or x where x < 0
BESIDE = replace(  # the same as max(x, 0) - y with x + y beside the layers
    by_hand(([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0]], [0.0] * 3), ([[1.0, -1.0, 1.0]], [0.0])),
    linear=torch.tensor([[[1.0, 1.0]]]),
)
TOUCHING = by_hand(([[1.0, 0.0], [-1.0, 0.0]], [0.0, 0.0]), ([[1.0, 1.0]], [0.0]))  # |x|
CORNER = by_hand(  # |x| + |y|, which is 0 in one point
    ([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]], [0.0] * 4), ([[1.0] * 4], [0.0])
)
PLATEAU = by_hand(([[1.0, 0.0]], [-1.0]), ([[1.0]], [0.0]))  # max(x - 1, 0), which is 0 on half of the plane


@pytest.mark.parametrize("p", NORMS)
def test_a_boundary_along_breakpoints_or_in_one_point_is_found(p):
    x = torch.tensor([[0.5, 0.2], [-0.25, 3.0], [-2.0, -1.0], [0.0, 0.0], [0.0, 1.5]]).double().numpy()
    for net in (HINGED, BESIDE, TOUCHING):
        np.testing.assert_allclose(boundary(net).distances(x, p), np.abs(x[:, 0]), rtol=1e-12)
    np.testing.assert_allclose(boundary(CORNER).distances(x, p), np.linalg.norm(x, p, axis=1), rtol=1e-12)
    flat = boundary(PLATEAU).distances(np.array([[3.0, 0.0], [1.5, -7.0]]), p)
    np.testing.assert_allclose(flat, [2.0, 0.5], rtol=1e-12)
    assert np.isinf(boundary(by_hand(([[1.0, 0.0]], [0.0]), ([[1.0]], [1.0]))).distances(x, p)).all()


@pytest.mark.parametrize("scale", [2.0**-100, 1.0, 2.0**60])
def test_a_boundary_far_away_or_of_a_network_of_huge_or_tiny_numbers_is_found(scale):
    """f = c (x / 2^20 + y / 2^40 - 1) with a slope of 1/10 below 0."""
    weight, x = [[2.0**-20 * scale, 2.0**-40 * scale]], np.array([[0.0, 0.0], [3e6, 1.0], [2.0**20, 0.0]])
    net = by_hand((weight, [-scale]), ([[1.0]], [0.0]), act=LeakyReLU(0.1))
    exact = np.abs(x @ np.array([2.0**-20, 2.0**-40]) - 1) / math.hypot(2.0**-20, 2.0**-40)
    found = boundary(net).distances(x, 2.0)
    assert (found <= exact * (1 + 1e-15)).all()
    np.testing.assert_allclose(found, exact, rtol=1e-7, atol=1e-6)


def test_numbers_near_the_ends_of_float32_give_bounds_that_hold():
    for factors in ((2.0**100, 2.0**-100, 1.0), (2.0**-100, 2.0**20, 1.0), (2.0**60, 2.0**60, 1.0)):
        net = scaled(network(2, 6, 6, 1, seed=5), *factors, bias=True)
        plain = network(2, 6, 6, 1, seed=5)  # whose signs are the same, but for what float32 loses
        x = normal(20, 2).numpy()
        near, far = (boundary(one).distances(x, 2.0) for one in (plain, net))
        np.testing.assert_allclose(far, near, rtol=1e-6)


def test_where_no_time_is_left_for_the_boundary_the_constants_stay(monkeypatch):
    def over(self):
        raise TooManyRegions("not done")

    net = network(2, 6, 6, 1)
    assert constants(net, BOX, 2.0, 10**5, decides=True).boundary is not None
    assert constants(net, BOX, 2.0, 10**5).boundary is None
    monkeypatch.setattr(module.Enumeration, "boundary", over)
    found = constants(net, BOX, 2.0, 10**5, decides=True)
    assert found.boundary is None
    assert found.everywhere.value > 0


def test_the_ends_of_pieces_have_outputs_of_zero_in_rational_arithmetic():
    net = network(2, 8, 8, 1, act=PIECEWISE["maxmin"], seed=6)
    found = boundary(net)
    finite = np.isfinite(found.most)
    for start, step in zip(found.start[finite], found.step[finite], strict=True):
        for point in (start, start + step):
            (f,) = values(net, point)
            assert abs(f) < Fraction(10) ** -12 * (1 + Fraction(abs(point).max()))


def test_signs_that_are_decided_in_integers_know_of_the_linear_term():
    enumeration = Enumeration(BESIDE, BOX, 10**6)
    found = enumeration._gradients(np.arange(len(enumeration.cells))).value[:, :, 0]
    for region, expected in enumerate(found):
        rows, exponent = enumeration._exact_map(1, region)
        np.testing.assert_array_equal([float(v * Fraction(2) ** exponent) for v in rows[0]], expected)
