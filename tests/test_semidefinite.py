"""Semidefinite bounds: proofs against rational arithmetic, bounds against all activation patterns."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from lipexp.proven import semidefinite
from lipexp.activations import Abs, GroupSort, LeakyReLU, ReLU
from lipexp.measured.gradients import norms, scan
from lipexp.models import Layer
from lipexp.proven.regions.enumeration import constants
from lipexp.proven.semidefinite import (
    Reduced,
    best_bound,
    eclipse,
    eclipse_multipliers,
    inequality_matrix,
    lipsdp,
    lipsdp_multipliers,
    proves,
    refusal,
)

RELU = (0.0, 1.0)
METHODS = [eclipse, lambda layers: lipsdp(layers, RELU)]
SHAPES = [(3, 5, 1), (3, 5, 5, 1), (2, 4, 3, 4, 1), (6, 1, 5, 1)]


def network(*sizes: int, seed: int = 0) -> list[Layer]:
    draws = torch.Generator().manual_seed(seed)
    return [
        Layer(
            torch.randn(1, n_out, n_in, generator=draws) / math.sqrt(n_in),
            torch.randn(1, 1, n_out, generator=draws),
        )
        for n_in, n_out in itertools.pairwise(sizes)
    ]


def weights_of(layers: list[Layer]) -> list[np.ndarray]:
    return [layer.weight[0].double().numpy() for layer in layers]


def over_all_patterns(weights: list[np.ndarray], slope: float) -> float:
    """max ||w D_n W_n ... D_1 W_1||_2 over all diagonal D_i with entries 1 and `slope`, feasible or not."""
    rows = weights[-1]
    for weight in weights[-2::-1]:
        patterns = np.array(list(itertools.product((1.0, slope), repeat=len(weight))))
        rows = np.unique((rows[:, None, :] * patterns).reshape(-1, len(weight)) @ weight, axis=0)
    return float(np.linalg.norm(rows, axis=1).max())


def product(weights: list[np.ndarray]) -> float:
    return math.prod(float(np.linalg.norm(weight, 2)) for weight in weights)


# The proof -------------------------------------------------------------------------------------------------------


def rational(weights, slopes, multipliers, lipschitz: float) -> list[list[Fraction]]:
    """M with no rounding: L^2 |x_0|^2 - |W x|^2 + 2 sum_i T_i (x - alpha z)_i (x - beta z)_i, term by term."""
    alpha, beta = map(Fraction, slopes)
    sizes = [weights[0].shape[1], *(len(weight) for weight in weights[:-1])]
    ends = [0, *itertools.accumulate(sizes)]
    n = ends[-1]
    entries = [[Fraction(0)] * n for _ in range(n)]

    def add(factor, left, right):
        for i, a in left.items():
            for j, b in right.items():
                entries[i][j] += factor * a * b

    for i in range(sizes[0]):
        entries[i][i] = Fraction(lipschitz) ** 2
    remaining = iter(multipliers)
    for k, weight in enumerate(weights):
        for j, row in enumerate(weight):
            z = {ends[k] + i: Fraction(w) for i, w in enumerate(row)}
            if k == len(weights) - 1:
                add(-1, z, z)
                continue
            t, at = Fraction(next(remaining)), ends[k + 1] + j
            u = {at: Fraction(1), **{i: -alpha * w for i, w in z.items()}}
            v = {at: Fraction(1), **{i: -beta * w for i, w in z.items()}}
            add(t, u, v)
            add(t, v, u)
    return entries


@pytest.mark.parametrize("slopes", [(0.0, 1.0), (0.1, 1.0), (0.3, 0.7)], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (3, 4, 2)], ids=str)
@pytest.mark.parametrize("method", ["eclipse", "lipsdp"])
def test_the_matrix_behind_a_bound_is_semidefinite_in_rational_arithmetic(
    exact, monkeypatch, method, shape, slopes
):
    tried = []

    def kept(*arguments):
        tried.append((arguments, proves(*arguments)))
        return tried[-1][1]

    monkeypatch.setattr(semidefinite, "proves", kept)
    layers = network(*shape)
    bound = eclipse(layers) if method == "eclipse" else lipsdp(layers, slopes)
    (lipschitz, weights, used, multipliers), proven = tried[-1]
    assert proven
    assert used == ((0.0, 1.0) if method == "eclipse" else slopes)
    scale = bound / lipschitz  # a power of two, as the weights were scaled
    assert math.frexp(scale)[0] == 0.5
    assert (
        math.prod(layer.weight[0, 0, 0].item() / w[0, 0] for layer, w in zip(layers, weights, strict=True))
        == scale
    )
    assert exact.semidefinite(rational(weights, used, multipliers, lipschitz))
    # The matrix is as tight as its multipliers allow: a little less is not semidefinite, nor claimed to be.
    assert not exact.semidefinite(rational(weights, used, multipliers, lipschitz * (1 - 1e-6)))
    assert not proves(lipschitz * (1 - 1e-6), weights, used, multipliers)


@pytest.mark.parametrize("slopes", [(0.0, 1.0), (0.1, 1.0), (0.3, 0.7)], ids=str)
def test_the_error_of_the_matrix_is_within_its_bound(slopes):
    """With weights of all magnitudes and multipliers of any digits."""
    draws = np.random.default_rng(0)
    weights = [
        draws.normal(size=shape) * 10.0 ** draws.uniform(-6, -1, shape) for shape in ((6, 4), (7, 6), (2, 7))
    ]
    multipliers = 10.0 ** draws.uniform(-3, 3, 13)
    computed, terms = inequality_matrix(weights, slopes, multipliers, 2.0)
    true = rational(weights, slopes, multipliers, math.sqrt(2.0))
    for i in range(4):  # its square is not 2, but 2 is what was asked for
        true[i][i] += 2 - Fraction(math.sqrt(2.0)) ** 2
    for row, computed_row, terms_row in zip(true, computed, terms, strict=True):
        for entry, found, size in zip(row, computed_row, terms_row, strict=True):
            assert abs(entry - Fraction(found)) <= (7 + 8) * Fraction(size) / 2**53


@pytest.mark.parametrize("bad", [-1e-9, math.nan, math.inf])
def test_multipliers_that_are_no_multipliers_prove_nothing(bad):
    """A negative one would count an inequality with the wrong sign."""
    weights = [np.array([[0.5]]), np.array([[0.5]])]
    assert proves(0.3, weights, (0.0, 1.0), np.array([0.2]))
    assert not proves(100.0, weights, (0.0, 1.0), np.array([bad]))


def test_multipliers_that_are_not_feasible_have_no_bound():
    reduced = Reduced.of(network(3, 8, 8, 1))
    multipliers = 100 * eclipse_multipliers(reduced.weights)
    assert best_bound(reduced.weights, (0.0, 1.0), multipliers) is None
    assert reduced.bound((0.0, 1.0), multipliers) is None


# The bounds ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slope", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_bounds_lie_between_all_patterns_and_the_product(shape, slope, seed):
    layers = network(*shape, seed=seed)
    weights = weights_of(layers)
    least = over_all_patterns(weights, slope)
    loose, tight = eclipse(layers), lipsdp(layers, (slope, 1.0))
    assert least * (1 - 1e-12) <= tight <= loose * (1 + 1e-9)
    assert loose <= product(weights) * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_a_linear_network_is_bounded_by_its_norm(seed):
    """Slopes in [1, 1] leave one pattern, whose multipliers grow without end."""
    layers = network(3, 5, 5, 1, seed=seed)
    exactly = over_all_patterns(weights_of(layers), 1.0)
    assert exactly <= lipsdp(layers, (1.0, 1.0)) <= exactly * 1.02


def test_one_feature_is_bounded_exactly():
    layers = network(4, 1, 1)
    first, last = weights_of(layers)
    expected = float(np.linalg.norm(first)) * abs(float(last[0, 0]))
    assert eclipse(layers) == pytest.approx(expected, rel=1e-9)
    assert expected <= lipsdp(layers, RELU) <= expected * 1.001


@pytest.mark.parametrize("slopes", [(0.0, 1.0), (0.2, 1.0)], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_no_multipliers_of_a_grid_give_less(seed, slopes):
    """Nor do they find much more than the grid does."""
    layers = network(3, 2, 1, seed=seed)
    reduced, axis = Reduced.of(layers), np.logspace(-3, 3, 150)
    found = [best_bound(reduced.weights, slopes, np.array([a, b])) for a in axis for b in axis]
    smallest = math.ldexp(min(value for value in found if value is not None), reduced.exponent)
    assert smallest * 0.98 <= lipsdp(layers, slopes) <= smallest * (1 + 1e-9)


@pytest.mark.parametrize("sizes", [(8, 24, 24, 1), (3, 16, 16, 16, 16, 1), (40, 12, 12, 1), (6, 32, 3)], ids=str)
@pytest.mark.parametrize("slopes", [(0.0, 1.0), (0.1, 1.0)], ids=str)
def test_a_local_descent_gains_nothing(sizes, slopes):
    """From the multipliers that were found, in a hundred random directions each."""
    reduced = Reduced.of(network(*sizes))
    multipliers = lipsdp_multipliers(reduced.weights, slopes)
    reached = best_bound(reduced.weights, slopes, multipliers)
    draws = np.random.default_rng(0)
    for step in (1e-3, 1e-2, 1e-1):
        for _ in range(100):
            moved = multipliers * np.exp(step * draws.normal(size=len(multipliers)))
            other = best_bound(reduced.weights, slopes, moved)
            assert other is None or other >= reached * (1 - 1e-3)
    assert reached < best_bound(reduced.weights, RELU, eclipse_multipliers(reduced.weights)) * 0.95


@pytest.mark.parametrize("scale", [1e-10, 1e-6, 1e6, 1e10])
@pytest.mark.parametrize("method", METHODS, ids=["eclipse", "lipsdp"])
def test_bounds_scale_with_the_weights(method, scale):
    layers = network(3, 8, 8, 1)
    scaled = [Layer(weight * scale, bias) for weight, bias in layers]
    assert method(scaled) == pytest.approx(method(layers) * scale**3, rel=1e-3)


def test_a_bound_below_the_smallest_float_or_above_the_largest_is_rounded_up():
    layers = network(3, 4, 4, 4, 4, 4, 4, 4, 4, 4, 1)
    for scale, expected in ((2.0**-120, 5e-324), (2.0**110, math.inf)):
        assert eclipse([Layer(weight * scale, bias) for weight, bias in layers]) == expected


def test_layers_of_different_scales_do_no_harm():
    """A ReLU network may move a factor from one layer to the next; so may the bound."""
    layers = network(3, 8, 8, 1)
    factors = (2.0**40, 2.0**-60, 2.0**20)
    moved = [Layer(weight * factor, bias) for (weight, bias), factor in zip(layers, factors, strict=True)]
    for method in METHODS:
        assert method(moved) == method(layers)


@pytest.mark.parametrize("method", METHODS, ids=["eclipse", "lipsdp"])
def test_dead_features_change_nothing(method):
    """One that sees nothing, one that is not seen, and one that only they see."""
    layers = network(3, 8, 8, 1)
    layers[0].weight[0, 2] = 0
    layers[1].weight[0, :, 5] = 0
    layers[1].weight[0, 3] = 0
    layers[1].weight[0, 3, 2] = 1
    kept, alive = [0, 1, 3, 4, 6, 7], [0, 1, 2, 4, 5, 6, 7]
    (first, b1), (second, b2), (last, b3) = layers
    without = [
        Layer(first[:, kept], b1[:, :, kept]),
        Layer(second[:, alive][:, :, kept], b2[:, :, alive]),
        Layer(last[:, :, alive], b3),
    ]
    assert method(layers) == method(without)
    assert over_all_patterns(weights_of(layers), 0.0) <= method(layers) * (1 + 1e-12)


@pytest.mark.parametrize("method", METHODS, ids=["eclipse", "lipsdp"])
def test_nearly_dead_features_do_no_harm(method):
    """As weight decay leaves them."""
    layers = network(3, 8, 8, 1)
    layers[0].weight[0, 2] *= 1e-20
    layers[1].weight[0, :, 5] *= 1e-30
    layers[2].weight[0, :, 1] *= 1e-12
    bound = method(layers)
    assert over_all_patterns(weights_of(layers), 0.0) <= bound <= product(weights_of(layers)) * (1 + 1e-9)


@pytest.mark.parametrize("method", METHODS, ids=["eclipse", "lipsdp"])
@pytest.mark.parametrize("layer", range(3))
def test_a_constant_network_has_the_constant_zero(method, layer):
    layers = network(3, 8, 8, 1)
    layers[layer].weight[0] = 0
    assert method(layers) == 0


@pytest.mark.parametrize("shape", [(5, 1), (5, 3)], ids=str)
def test_a_network_without_hidden_layers_is_bounded_by_its_norm(shape):
    layers = network(*shape)
    for method in METHODS:
        assert method(layers) == pytest.approx(product(weights_of(layers)), rel=1e-9)


def test_bounds_hold_for_the_exact_constant_everywhere():
    for seed in range(3):
        layers = network(2, 24, 24, 1, seed=seed)
        for act in (ReLU(), LeakyReLU(0.2)):
            box = np.full(2, -1.0), np.full(2, 1.0)
            known = constants(layers, act, box, 2.0, 10**5).everywhere.value
            assert known <= lipsdp(layers, act.slopes) * (1 + 1e-11)


def test_a_search_that_is_stopped_early_still_proves_a_bound():
    layers = network(10, 64, 64, 1)
    best, stopped = lipsdp(layers, RELU), lipsdp(layers, RELU, seconds=1e-9)
    satisfied = lipsdp(layers, RELU, enough=1.3 * best)
    assert best * 1.01 < satisfied <= 1.3 * best
    assert best * 1.01 < stopped <= eclipse(layers) * (1 + 1e-3)


# Which networks --------------------------------------------------------------------------------------------------


class Steeper(ReLU):
    """A user's class: with another map, what ReLU says of its own does not count, even beside `piece`."""

    def forward(self, x):
        return 3 * x

    def piece(self, z):
        return None


class Softer(torch.nn.Module):
    """One that declares its slopes."""

    slopes = (0, 0.5)

    def forward(self, x):
        return 0.5 * torch.relu(x)


def test_what_the_bounds_do_not_cover_is_refused():
    for act in (ReLU(), LeakyReLU(0.2), Softer()):
        assert refusal(act, 2) is None
    for q in (1.0, math.inf):
        assert refusal(ReLU(), q) == "bounds the 2-norm of gradients only"
    assert refusal(Abs(), 2) == "needs slopes in [0, 1]; Abs has [-1, 1]"
    for act in (GroupSort(), torch.nn.Tanh(), Steeper()):
        assert refusal(act, 2) == f"{type(act).__name__} declares no slopes"


@pytest.mark.parametrize("act", ["relu", "leaky_relu"])
@pytest.mark.parametrize("constraint", ["none", "spectral", "linf"])
def test_trained_networks_stay_within_their_bounds(trained, act, constraint):
    """On samples over many times the box of the data, in 64 dimensions."""
    result = trained(f"act={act}", f"constraint={constraint}", "dataset=digits_parity", "loss=hinge")
    layers = [Layer(w[:1], b[:1]) for w, b in result.checkpoint.layers]
    draws = torch.Generator().manual_seed(1)
    x = 10 * torch.rand(1, 20_000, 64, generator=draws, dtype=torch.float64) - 5
    steepest = float(norms(scan(layers, result.checkpoint.act, x).gradient, 2).max())
    assert 0 < steepest <= lipsdp(layers, result.stack.act.slopes) <= eclipse(layers) * (1 + 1e-9)
