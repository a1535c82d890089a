"""The ascent stays in the box, never goes down, and finds the steepest region where that can be known."""

import functools
import itertools
from statistics import median

import numpy as np
import pytest
import torch
from acts import ACTS
from networks import NORMS, generator, groups_of, network, normal, pairs, scaled, slopes_of, uniform
from scipy.optimize import linprog, minimize

from lipexp.activations import GroupSort, SiLU, Tanh, as_activation
from lipexp.evaluate import Evaluator
from lipexp.loop import fit
from lipexp.measured import ascent as module
from lipexp.measured import combined, directions, sources, steepest
from lipexp.measured.ascent import ascend, jacobians_of, steepness
from lipexp.measured.gradients import operator_norms, scan
from lipexp.members import build, stack

OTHERS = {"tanh": as_activation(torch.nn.Tanh()), "large groups": GroupSort(group_size=24)}
LINEAR = GroupSort(group_size=1)  # which has no breakpoints


def ascended(net, x, q=2, seeds=(0,), effort=1):
    return ascend(net, x, scan(net, x).gradient.squeeze(2), q, [generator(seed) for seed in seeds], effort)


def heights(net, x, q=2):
    return steepness(net, x, q)


@pytest.mark.parametrize(("dims", "n"), [(1, 1), (1, 300), (2, 40), (2, 300), (5, 1), (5, 2), (5, 40)])
def test_points_stay_within_the_box_of_the_data(dims, n):
    net, x = network(dims, 8, 1), normal(1, n, dims).float().double()
    points = ascended(net, x)
    assert points.shape[::2] == (1, dims)
    assert (points >= x.amin(dim=1, keepdim=True)).all()
    assert (points <= x.amax(dim=1, keepdim=True)).all()


@pytest.mark.parametrize("sizes", [(5, 8, 1), (5, 1)], ids=str)
def test_a_linear_function_has_its_slope_at_every_point(sizes):
    net, x = network(*sizes, act=LINEAR), normal(1, 40, 5)
    found = heights(net, ascended(net, x))
    assert found.shape == (1, module.POLISHED)
    torch.testing.assert_close(found, heights(net, x)[:, :1].expand_as(found), rtol=1e-12, atol=0)


@pytest.mark.parametrize("q", NORMS)
def test_random_steps_climb_from_every_start(q, monkeypatch):
    net, x = network(2, 16, 16, 1), normal(1, 100, 2)
    ends = ascended(net, x, q)
    monkeypatch.setattr(module, "ROUNDS", 0)
    before, after = heights(net, ascended(net, x, q), q), heights(net, ends, q)
    assert (after >= before * (1 - 1e-14)).all()
    assert (after > before * 1.01).any()
    assert before.max() >= heights(net, x, q).max() * (1 - 1e-14)  # the steepest data point is a start


@pytest.mark.parametrize("act", [Tanh(), SiLU()], ids=lambda act: act.label)
def test_smooth_networks_are_climbed_as_high_as_by_a_quasi_newton_method_from_many_points(act):
    """Of -log ||grad f||_2 within the box, with gradients by automatic differentiation."""
    net, x = network(12, 16, 16, 1, act=act), 2 * uniform(1, 300, 12)
    own = net.double

    def minus_height(point):
        z = torch.from_numpy(point).view(1, 1, -1).requires_grad_()
        (slope,) = torch.autograd.grad(own(z).sum(), z, create_graph=True)
        height = -slope.square().sum().log() / 2
        (gradient,) = torch.autograd.grad(height, z)
        return float(height.detach()), gradient.view(-1).numpy()

    bounds = list(zip(x[0].amin(dim=0).tolist(), x[0].amax(dim=0).tolist(), strict=True))
    ends = [
        minimize(minus_height, start, jac=True, method="L-BFGS-B", bounds=bounds).fun
        for start in x[0, :12].numpy()
    ]
    assert heights(net, ascended(net, x)).max() >= 0.995 * np.exp(-min(ends))


@pytest.mark.parametrize(("q", "h"), [(1, np.inf), (2, np.inf), (2, 2), (np.inf, np.inf)])
@pytest.mark.parametrize("dims", [2, 5])
def test_several_outputs_are_climbed_along_the_combination_that_is_steepest_at_the_data(dims, q, h):
    """u^T f is as steep there as the Jacobian, and the points that it leads to are steeper for all outputs."""
    stack, x = network(dims, 16, 16, 3, runs=2), normal(2, 60, dims)
    scanned, size = scan(stack, x), operator_norms(scan(stack, x).gradient, q, h)
    along = directions(scanned.gradient, q, h)
    scalar = combined(stack, along)
    torch.testing.assert_close(scalar.double(x), scanned.f @ along.mT)
    torch.testing.assert_close(heights(scalar, x, q).amax(dim=1), size.amax(dim=1))
    points = sources(stack, x, scanned, q, [generator(0), generator(1)], h=h)
    for run in range(2):
        found = steepest(stack.run(run), points, run, q, h)
        assert found["search"].value >= found["data"].value * (1 - 1e-12)
        assert found["search"].value > 1.01 * float(size[run].max()) or dims == 2


@pytest.mark.parametrize(("name", "q"), pairs([*ACTS, *OTHERS], NORMS))
def test_what_is_found_is_steeper_than_the_data(name, q):
    """Without softened Jacobians, for those that sort many features or declare nothing, by random steps alone."""
    net, x = network(5, 24, 1, act=(ACTS | OTHERS)[name]), normal(1, 40, 5)
    assert heights(net, ascended(net, x, q), q).max() > 1.01 * heights(net, x, q).max()
    if q == 2:
        flat = scaled(net, 0, 0, bias=True)
        assert torch.isfinite(ascended(flat, x)).all()


@functools.cache
def regions_in_the_box(name, seed):
    """A network with one hidden layer, data, and the (gradient, radius of the largest ball inside) of all linear
    regions in the box of the data: every pattern of signs, by linear programming."""
    net, x = network(4, 7, 1, act=ACTS[name], seed=seed, bias=1.0), normal(1, 60, 4, seed=seed)
    (weight, bias), (last, _) = (tuple(part[0].double().numpy() for part in layer) for layer in net.layers)
    low, high = x[0].amin(dim=0).numpy(), x[0].amax(dim=0).numpy()
    below, above = map(float, slopes_of(net.acts[0]))
    identity, regions = np.eye(4), []
    for signs in map(np.array, itertools.product((-1, 1), repeat=len(weight))):
        planes = np.vstack([-signs[:, None] * weight, identity, -identity])  # planes x <= limits
        limits = np.concatenate([signs * bias[0], high, -low])
        lengths = np.linalg.norm(planes, axis=1, keepdims=True)
        bounds = [(None, None)] * 4 + [(0, None)]
        ball = linprog([0] * 4 + [-1], np.hstack([planes, lengths]), limits, bounds=bounds)
        if ball.status == 0:
            regions.append(((last[0] * np.where(signs > 0, above, below)) @ weight, float(ball.x[-1])))
    return net, x, regions


@pytest.mark.parametrize("q", NORMS)
def test_the_steepest_of_all_regions_is_found(q):
    shown = 0
    for name, seed in (("relu", 0), ("bent", 1), ("abs", 2), ("relu", 3)):
        net, x, regions = regions_in_the_box(name, seed)
        # The sides of the box are some 5; a region that holds no ball of radius 0.2 can be missed.
        steepest = max(float(np.linalg.norm(gradient, q)) for gradient, radius in regions if radius > 0.2)
        found = float(heights(net, ascended(net, x, q), q).max())
        assert steepest * (1 - 1e-12) <= found
        assert found <= max(float(np.linalg.norm(gradient, q)) for gradient, _ in regions) * (1 + 1e-12)
        shown += bool(heights(net, x, q).max() < steepest * 0.999)
    assert shown >= 2  # the data alone do not show it


@pytest.mark.parametrize("name", ACTS)
def test_the_softened_jacobian_becomes_the_jacobian_as_it_is_sharpened(name):
    net, x = network(3, 12, 12, 1, act=ACTS[name]).double, normal(1, 200, 3)
    true, jacobians = scan(net, x).gradient.squeeze(2), jacobians_of(net)
    errors = [
        float((module._soft_gradient(net, jacobians, x, sharpness) - true).abs().amax(dim=2).median())
        for sharpness in (1.0, 10.0, 1e9)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-12


@pytest.mark.parametrize("name", ACTS)
def test_breakpoints_are_where_the_linear_map_changes(name):
    """Along a line, features and the values of breakpoints have the derivatives of finite differences; and the
    Jacobian of the activation jumps exactly where one of those values changes its sign."""
    net, direction, step = network(3, 12, 1, act=ACTS[name]), normal(12, seed=1), 2 / 399
    act = net.double.acts[0]
    z = normal(1, 12) + direction * torch.linspace(-1, 1, 400, dtype=torch.float64)[:, None]
    out = act(z.requires_grad_().unsqueeze(0))[0]
    (jacobian,) = torch.autograd.grad((out * normal(12, seed=2)).sum(), z)  # a row times it
    (of_act,) = jacobians_of(net)
    values, normals, along = of_act.linear(z.detach(), direction.expand(400, -1).unsqueeze(-1))
    jumps = (jacobian[1:] != jacobian[:-1]).any(dim=1)
    assert jumps.any()
    for found, slope in ((values, normals), (out.detach(), along)):
        torch.testing.assert_close((found.diff(dim=0) / step)[~jumps], slope[:-1, :, 0][~jumps], rtol=0, atol=1e-9)
    if groups_of(act, 12):  # the gap between neighbours in rank is 0 on a breakpoint and never negative
        assert (values >= 0).all()
        assert values[:-1][jumps].amin(dim=1).max() < values[:-1][~jumps].amin(dim=1).max()
    else:
        assert torch.equal(jumps, (values[1:] * values[:-1] < 0).any(dim=1))


def test_a_step_across_the_nearest_breakpoint_flips_one_feature():
    net, x = network(4, 12, 12, 1).double, normal(50, 4)
    beyond = module._across_breakpoints(net, jacobians_of(net), x)

    def flipped(points):
        """(S,) how many features change their sign on the way from x."""
        before, after = (net.inputs_and_output(at.unsqueeze(0))[0][1:] for at in (x, points))
        return sum(((a > 0) != (b > 0)).sum(dim=2)[0] for a, b in zip(before, after, strict=True))

    # Two breakpoints can lie within the 0.1 % by which a step goes beyond; one that stops short would flip none.
    assert (flipped(beyond[:, 0]) >= 1).all()
    assert (flipped(beyond[:, 0]) == 1).float().mean() > 0.9
    assert ((beyond - x.unsqueeze(1)).norm(dim=2).diff(dim=1) >= 0).all()
    assert not flipped(x + 0.99 * (beyond[:, 0] - x)).any()


@pytest.mark.parametrize(("name", "q"), pairs(ACTS, NORMS))
def test_region_steps_end_where_no_neighbour_is_steeper(name, q):
    net, x = network(4, 12, 12, 1, act=ACTS[name]), normal(1, 8, 4)
    box, jacobians = module._box(x), jacobians_of(net)
    ends = module.region_steps(net, jacobians, x, box, q)
    before, after = heights(net, x, q), heights(net, ends, q)
    assert (after >= before).all()
    assert (after > before).any()
    for end, height in zip(ends[0], after[0], strict=True):
        beyond = module._clamp(module._across_breakpoints(net.double, jacobians, end.unsqueeze(0)), box)
        assert heights(net, beyond, q).max() <= height * (1 + 2e-12)  # one point, and eight: as rounded


@pytest.mark.parametrize("name", ["relu", "bent", "maxmin", "groups of 3"])
def test_softened_jacobians_climb_higher_than_random_steps(name):
    net, x = network(16, 30, 30, 1, act=ACTS[name]), normal(1, 100, 16)
    start = module._steepest(x, heights(net, x), 96)
    random = module.random_steps(net, start, module._box(x), 2, [generator(0)])
    assert heights(net, ascended(net, x)).max() > 1.02 * heights(net, random).max()


@pytest.mark.parametrize("dims", [2, 5])
def test_a_stack_draws_the_points_of_its_runs_bit_for_bit(dims, monkeypatch):
    if dims == 2:  # climbing together compares gradients, which rounding may order otherwise
        monkeypatch.setattr(module, "ROUNDS", 0)
    net, x, seeds = network(dims, 8, 1, runs=2), normal(2, 50, dims), (5, 6)
    together = ascended(net, x, seeds=seeds)
    for run, seed in enumerate(seeds):
        assert torch.equal(together[run], ascended(net.run(run), x[run : run + 1], seeds=(seed,))[0])
    assert not torch.equal(together[0], ascended(net.run(0), x[:1], seeds=(8,))[0])


def test_more_effort_finds_no_less_in_64_dimensions():
    net, x = network(64, 32, 32, 1), normal(1, 200, 64)
    once, twice = (heights(net, ascended(net, x, effort=effort)).max() for effort in (1, 2))
    assert twice >= once > heights(net, x).max()


@pytest.mark.slow
def test_the_ascent_gains_five_percent_over_the_digits(compose):
    overrides = ("dataset=digits_parity", "model.width=128", "act=relu", "constraint=none", "loss=bce")
    runs = stack([build(compose(*overrides, "eval_every=0", f"seed={seed}")) for seed in range(5)])
    found = Evaluator(runs).final(fit(runs, lambda checkpoint: None))
    gains = [one.gradient_norm.by["search"] / one.gradient_norm.by["data"] for one in found]
    assert median(gains) >= 1.05
    assert min(gains) > 1
