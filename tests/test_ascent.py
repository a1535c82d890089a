"""The search stays in the box, never goes down, and finds the steepest piece where that can be known."""

from __future__ import annotations

import functools
import itertools
import math
from statistics import median

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

from lipexp.measured import ascent as module
from lipexp.activations import GroupSort, ReLU
from lipexp.evaluate import Evaluator
from lipexp.loop import fit
from lipexp.measured.gradients import norms, scan
from lipexp.models import Layer, hidden_inputs
from lipexp.measured.ascent import pieces_of, search
from lipexp.train import build, stack

NORMS = (1, 2, math.inf)


class Tanh(torch.nn.Module):
    """A class of a user's, whose kinks nobody knows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def network(*sizes: int, runs: int = 1, seed: int = 0) -> list[Layer]:
    """Random float32 layers with these numbers of features, outputs of size 1."""
    return [
        Layer(
            (normal(runs, n_out, n_in, seed=100 * seed + 2 * i) / math.sqrt(n_in)).float(),
            normal(runs, 1, n_out, seed=100 * seed + 2 * i + 1).float(),
        )
        for i, (n_in, n_out) in enumerate(itertools.pairwise(sizes))
    ]


def searched(layers, act, x, q=2, seeds=(0,), effort=1) -> torch.Tensor:
    gradients = scan(layers, act, x).gradient
    return search(layers, act, x, gradients, q, [generator(seed) for seed in seeds], effort)


def heights(layers, act, x, q=2) -> torch.Tensor:
    return norms(scan(layers, act, x).gradient, q)


@pytest.fixture(params=["training order", "baked"])
def any_act(request, act_option, make):
    """Every activation of conf/, in the two orders of features."""
    act = make("act", f"act={act_option}")
    return act if request.param == "training order" else act.baked()


@pytest.mark.parametrize("n", [1, 2, 40, 300])
@pytest.mark.parametrize("dims", [1, 2, 5])
def test_points_stay_within_the_box_of_the_data(dims, n):
    for seed in range(3):
        layers, x = network(dims, 8, 1, seed=seed), normal(1, n, dims, seed=seed).float().double()
        points = searched(layers, ReLU(), x, seeds=(seed,))
        assert points.shape[::2] == (1, dims)
        assert (points >= x.amin(dim=1, keepdim=True)).all()
        assert (points <= x.amax(dim=1, keepdim=True)).all()


@pytest.mark.parametrize("q", NORMS)
def test_random_steps_climb_from_every_start(q, monkeypatch):
    layers, x = network(2, 16, 16, 1), normal(1, 100, 2)
    ends = searched(layers, ReLU(), x, q)
    monkeypatch.setattr(module, "ROUNDS", 0)
    starts = searched(layers, ReLU(), x, q)
    before, after = heights(layers, ReLU(), starts, q), heights(layers, ReLU(), ends, q)
    assert (after >= before * (1 - 1e-14)).all()
    assert (after > before * 1.01).any()
    assert before.max() >= heights(layers, ReLU(), x, q).max() * (1 - 1e-14)  # the steepest data point is a start


@pytest.mark.parametrize("q", NORMS)
def test_what_is_found_is_at_least_as_steep_as_the_data(any_act, q):
    layers, x = network(5, 16, 16, 1), normal(1, 100, 5)
    found, data = (heights(layers, any_act, points, q).max() for points in (searched(layers, any_act, x, q), x))
    assert found >= data * (1 - 1e-14)


@functools.cache
def pieces_in_the_box(seed: int) -> tuple[list[Layer], torch.Tensor, list[tuple[np.ndarray, float]]]:
    """A ReLU network with one hidden layer, data, and (gradient, radius of the largest ball inside) of each linear
    piece in the box of the data: every pattern of signs, by linear programming."""
    layers, x = network(4, 7, 1, seed=seed), normal(1, 60, 4, seed=seed)
    (weight, bias), (last, _) = (tuple(part[0].double().numpy() for part in layer) for layer in layers)
    low, high = x[0].amin(dim=0).numpy(), x[0].amax(dim=0).numpy()
    identity, pieces = np.eye(4), []
    for signs in itertools.product((-1, 1), repeat=len(weight)):
        planes = np.vstack([-np.array(signs)[:, None] * weight, identity, -identity])  # planes x <= limits
        limits = np.concatenate([signs * bias[0], high, -low])
        lengths = np.linalg.norm(planes, axis=1, keepdims=True)
        ball = linprog(
            [0] * 4 + [-1], np.hstack([planes, lengths]), limits, bounds=[(None, None)] * 4 + [(0, None)]
        )
        if ball.status == 0:
            pieces.append(((last[0] * (np.array(signs) > 0)) @ weight, float(ball.x[-1])))
    return layers, x, pieces


@pytest.mark.parametrize("q", NORMS)
def test_the_steepest_of_all_pieces_is_found(q):
    shown = 0
    for seed in range(8):
        layers, x, pieces = pieces_in_the_box(seed)
        # The sides of the box are some 5; a piece that holds no ball of radius 0.2 can be missed.
        steepest = max(float(np.linalg.norm(gradient, q)) for gradient, radius in pieces if radius > 0.2)
        found = float(heights(layers, ReLU(), searched(layers, ReLU(), x, q), q).max())
        assert steepest * (1 - 1e-12) <= found
        assert found <= max(float(np.linalg.norm(gradient, q)) for gradient, _ in pieces) * (1 + 1e-12)
        shown += bool(heights(layers, ReLU(), x, q).max() < steepest * 0.999)
    assert shown >= 3  # the data alone do not show it


# The parts -------------------------------------------------------------------------------------------------------


def double(layers: list[Layer]) -> list[Layer]:
    return [Layer(*map(torch.Tensor.double, layer)) for layer in layers]


def test_soft_masks_become_the_jacobian_as_they_are_sharpened(any_act):
    layers, x = double(network(3, 16, 16, 1)), normal(1, 200, 3)
    true = scan(layers, any_act, x).gradient
    pieces = pieces_of(layers, any_act)
    errors = [
        float((module._soft_jacobian(layers, any_act, pieces, x, sharpness) - true).abs().amax(dim=2).median())
        for sharpness in (1.0, 10.0, 1e9)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-12


def test_soft_masks_have_the_derivative_of_finite_differences(any_act):
    (piece,) = pieces_of(network(3, 8, 1), any_act)
    z, gradient = normal(2, 3, 8).requires_grad_(), normal(2, 3, 8, seed=1).requires_grad_()
    sharpness = torch.full((2, 1, 1), 3.0).double()
    assert torch.autograd.gradcheck(lambda *at: piece.soft(at[0], sharpness, at[1]), (z, gradient))
    (slope,) = torch.autograd.grad(piece.soft(z, sharpness, gradient).square().sum(), z)
    assert (slope.abs() > 1e-3).any()


def test_kinks_and_pieces_have_the_derivatives_of_finite_differences(any_act):
    layers, x = double(network(3, 16, 16, 1)), normal(10, 3)
    (weight, bias), _, _ = layers
    (piece, _), jacobian = pieces_of(layers, any_act), weight[0].expand(10, -1, -1)

    def at(points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        z = points @ weight[0].mT + bias[0]
        return piece.linear(z, jacobian)[0], any_act(z.unsqueeze(0))[0]

    _, normals, out = piece.linear(x @ weight[0].mT + bias[0], jacobian)
    for axis in range(3):
        step = torch.zeros(3, dtype=torch.float64)
        step[axis] = 1e-7  # pieces are linear, so only rounding counts: 1e-16 / 1e-7, times some ten
        for up, down, found in zip(at(x + step), at(x - step), (normals, out), strict=True):
            torch.testing.assert_close((up - down) / 2e-7, found[..., axis], rtol=0, atol=1e-7)


def test_kinks_are_where_the_linear_piece_changes(any_act):
    """Along a line the Jacobian of the activation jumps exactly where one of the kink values changes its sign."""
    z = (normal(1, 16) + normal(1, 16, seed=1) * torch.linspace(-1, 1, 400).double()[:, None]).requires_grad_()
    (piece,) = pieces_of(network(3, 16, 1), any_act)
    weights = normal(16, seed=2)
    (jacobian,) = torch.autograd.grad((any_act(z.unsqueeze(0))[0] * weights).sum(), z)  # weights^T times it
    values = piece.linear(z.detach(), torch.zeros(400, 16, 1).double())[0]
    jumps = (jacobian[1:] != jacobian[:-1]).any(dim=1)
    assert jumps.any()
    if isinstance(any_act, GroupSort):  # the gap between neighbours in rank is 0 on a kink and never negative
        assert (values >= 0).all()
        assert values[:-1][jumps].amin(dim=1).max() < values[:-1][~jumps].amin(dim=1).max()
    else:
        assert torch.equal(jumps, (values[1:] * values[:-1] < 0).any(dim=1))


def pattern(layers: list[Layer], x: torch.Tensor) -> torch.Tensor:
    """(S, all features) which features of a ReLU network are positive."""
    _, inputs = hidden_inputs(layers, ReLU(), x.unsqueeze(0))
    return torch.cat([hidden[0] > 0 for hidden in inputs[1:]], dim=1)


def test_a_step_across_the_nearest_kink_flips_one_feature():
    layers, x = double(network(4, 12, 12, 1)), normal(50, 4)
    beyond = module._across_kinks(layers, ReLU(), pieces_of(layers, ReLU()), x)
    flipped = (pattern(layers, x) != pattern(layers, beyond[:, 0])).sum(dim=1)
    # Two kinks can lie within the 0.1 % by which a step goes beyond; a step that stops short would flip none.
    assert (flipped >= 1).all()
    assert (flipped == 1).float().mean() > 0.9
    distance = (beyond - x.unsqueeze(1)).norm(dim=2)
    assert (distance.diff(dim=1) >= 0).all()
    assert not (pattern(layers, x) != pattern(layers, x + 0.99 * (beyond[:, 0] - x))).any()


@pytest.mark.parametrize("q", NORMS)
def test_kink_steps_end_where_no_neighbour_is_steeper(q, any_act):
    layers, x = double(network(4, 12, 12, 1)), normal(1, 8, 4)
    box = x.amin(dim=1, keepdim=True), x.amax(dim=1, keepdim=True)
    pieces = pieces_of(layers, any_act)
    ends = module.kink_steps(layers, any_act, pieces, x, box, q)
    before, after = heights(layers, any_act, x, q), heights(layers, any_act, ends, q)
    assert (after >= before).all()
    assert (after > before).any()
    for end, height in zip(ends[0], after[0], strict=True):
        beyond = module._clamp(module._across_kinks(layers, any_act, pieces, end.unsqueeze(0)), box)
        assert heights(layers, any_act, beyond, q).max() <= height * (
            1 + 2e-12
        )  # one point, and eight: as rounded


def test_soft_masks_climb_higher_than_random_steps(any_act):
    layers = network(16, 32, 32, 1)
    x = normal(1, 100, 16)
    best = float(heights(layers, any_act, searched(layers, any_act, x)).max())
    box = module._box(x)
    start = module._steepest(x, heights(layers, any_act, x), 96)
    random = module.random_steps(layers, any_act, start, box, 2, [generator(0)])
    assert best > 1.02 * float(heights(layers, any_act, random).max())


@pytest.mark.parametrize("act", [Tanh(), GroupSort(group_size=32)], ids=["unknown kinks", "large groups"])
def test_without_soft_masks_there_are_random_steps(act):
    layers, x = network(5, 32, 32, 1), normal(1, 100, 5)
    found = heights(layers, act, searched(layers, act, x)).max()
    assert found > 1.01 * heights(layers, act, x).max()


# Runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [2, 5])
def test_the_same_seed_gives_the_same_points(dims):
    layers, x = network(dims, 8, 1), normal(1, 50, dims)
    assert torch.equal(*(searched(layers, ReLU(), x, seeds=(3,)) for _ in range(2)))
    assert not torch.equal(*(searched(layers, ReLU(), x, seeds=(seed,)) for seed in (3, 4)))


@pytest.mark.parametrize("dims", [2, 5])
def test_a_stack_draws_the_points_of_its_runs_bit_for_bit(dims, monkeypatch):
    if dims == 2:  # climbing together compares gradients, which rounding may order otherwise
        monkeypatch.setattr(module, "ROUNDS", 0)
    layers, x, seeds = network(dims, 8, 8, 1, runs=3), normal(3, 50, dims), (5, 6, 7)
    gradients = scan(layers, ReLU(), x).gradient
    together = search(layers, ReLU(), x, gradients, 2, [generator(seed) for seed in seeds])
    for run, seed in enumerate(seeds):
        one = slice(run, run + 1)
        own = [Layer(*(part[one] for part in layer)) for layer in layers]
        assert torch.equal(together[one], search(own, ReLU(), x[one], gradients[one], 2, [generator(seed)]))


@pytest.mark.parametrize("q", NORMS)
def test_a_network_without_slope_is_searched_without_complaint(q, any_act):
    layers = [Layer(torch.zeros_like(weight), torch.zeros_like(bias)) for weight, bias in network(5, 16, 16, 1)]
    points = searched(layers, any_act, normal(1, 50, 5), q)
    assert torch.isfinite(points).all()


def test_more_effort_finds_no_less_in_64_dimensions():
    layers, x = network(64, 32, 32, 1), normal(1, 200, 64)
    once, four = (heights(layers, ReLU(), searched(layers, ReLU(), x, effort=effort)).max() for effort in (1, 4))
    assert four >= once > heights(layers, ReLU(), x).max()


@pytest.mark.slow
def test_the_search_gains_five_percent_over_the_digits(compose):
    runs = stack(
        [
            build(
                compose(
                    "dataset=digits_parity",
                    "model.width=128",
                    "act=relu",
                    "constraint=none",
                    "loss=bce",
                    "eval_every=0",
                    f"seed={seed}",
                )
            )
            for seed in range(5)
        ]
    )
    records = Evaluator(runs).final(fit(runs, lambda checkpoint: None))
    gains = [by["search"] / by["data"] for by in (record.gradient_norm["by"] for record in records)]
    assert median(gains) >= 1.05
    assert min(gains) > 1
