"""Semidefinite bounds: proofs against rational arithmetic, bounds against all activation patterns."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from lipexp.activations import Abs, GroupSort, LeakyReLU, ReLU
from lipexp.bounds import Problem, product_certificate, prove
from lipexp.certificates import is_semidefinite
from lipexp.constraints import LInf, Spectral, Unconstrained
from lipexp.measures import Maximum, norms, scan
from lipexp.models import Layer
from lipexp.regions import constants
from lipexp.semidefinite import closed_form, eclipse, lipsdp, matrix, recursion, refusal
from lipexp.semidefinite import prove as prove_multipliers

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


@pytest.mark.parametrize("seed", range(30))
def test_what_is_proven_semidefinite_is_so_in_rational_arithmetic(exact, seed):
    """Singular matrices of integers, lifted or lowered a little: near the border, and on both sides of it."""
    draws = np.random.default_rng(seed)
    half = draws.integers(-9, 10, (6, 4)).astype(float)
    lift = float(draws.choice([-1e-9, -1e-13, 0.0, 1e-13, 1e-9]))
    tried = half @ half.T + lift * np.diag(np.diagonal(half @ half.T))
    proven = is_semidefinite(tried)
    assert not proven or exact.semidefinite(exact.fractions(tried))
    if abs(lift) == 1e-9:
        assert proven == (lift > 0)


def test_scaled_rows_and_columns_do_not_matter():
    half = np.random.default_rng(0).standard_normal((6, 6))
    tried = half @ half.T + 0.1 * np.eye(6)
    scale = np.diag(2.0 ** np.array([-300, 0, 7, 100, -40, 300]))
    assert is_semidefinite(tried)
    assert is_semidefinite(scale @ tried @ scale)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0, 0.0])
def test_a_diagonal_that_is_not_positive_proves_nothing(bad):
    tried = np.eye(3)
    tried[1, 1] = bad
    assert not is_semidefinite(tried)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("method", [eclipse, lipsdp])
def test_the_matrix_behind_a_bound_is_semidefinite_in_rational_arithmetic(exact, monkeypatch, method, shape):
    seen = []

    def kept(*arguments):
        seen.append(arguments)
        return matrix(*arguments)

    monkeypatch.setattr("lipexp.semidefinite.matrix", kept)
    layers = network(*shape)
    bound = method(layers)
    weights, multipliers, rho = seen[-1]
    assert Fraction(bound) ** 2 >= Fraction(rho)
    assert all(np.array_equal(a, b) for a, b in zip(weights, weights_of(layers), strict=True))
    # The entries, with no rounding at all.
    n, sizes = sum(shape), [0, *itertools.accumulate(shape)]
    entries = [[Fraction(0)] * n for _ in range(n)]
    for i in range(shape[0]):
        entries[i][i] = Fraction(1)
    for layer, (weight, multiplier) in enumerate(zip(weights[:-1], multipliers, strict=True)):
        for j, (row, t) in enumerate(zip(weight, multiplier, strict=True)):
            at = sizes[layer + 1] + j
            entries[at][at] = 2 * Fraction(t)
            for k, w in enumerate(row):
                entries[at][sizes[layer] + k] = entries[sizes[layer] + k][at] = -Fraction(t) * Fraction(w)
    for k, w in enumerate(weights[-1][0]):
        entries[-1][sizes[-3] + k] = entries[sizes[-3] + k][-1] = Fraction(w)
    entries[-1][-1] = Fraction(rho)
    assert exact.fractions(matrix(weights, multipliers, rho)) == entries
    assert exact.semidefinite(entries)


def test_a_smaller_rho_is_not_proven():
    weights = weights_of(network(3, 8, 8, 1))
    multipliers = [part.float().double() for part in closed_form([torch.from_numpy(w) for w in weights])]
    rho = float(recursion([torch.from_numpy(w) for w in weights], multipliers))
    numbers = [part.numpy() for part in multipliers]
    assert is_semidefinite(matrix(weights, numbers, rho * (1 + 1e-6)))
    assert not is_semidefinite(matrix(weights, numbers, rho * (1 - 1e-6)))


def test_multipliers_that_are_not_feasible_prove_nothing():
    weights = [torch.from_numpy(w) for w in weights_of(network(3, 8, 8, 1))]
    multipliers = [100 * part for part in closed_form(weights)]
    assert recursion(weights, multipliers) is None
    assert prove_multipliers(weights, multipliers) is None


# The bounds ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slope", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_bounds_lie_between_all_patterns_and_the_product(shape, slope, seed):
    layers = network(*shape, seed=seed)
    weights = weights_of(layers)
    least = over_all_patterns(weights, slope)
    loose, tight = eclipse(layers), lipsdp(layers)
    assert least * (1 - 1e-12) <= tight <= loose * (1 + 1e-9)
    assert loose <= product(weights) * (1 + 1e-9)


def test_one_feature_is_bounded_exactly():
    layers = network(4, 1, 1)
    first, last = weights_of(layers)
    expected = float(np.linalg.norm(first)) * abs(float(last[0, 0]))
    for method in (eclipse, lipsdp):
        assert method(layers) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_the_descent_finds_the_smallest_bound_of_a_grid_of_multipliers(seed):
    layers = network(3, 2, 1, seed=seed)
    weights = [torch.from_numpy(w) for w in weights_of(layers)]
    axis = torch.logspace(-3, 2, 120, dtype=torch.float64)
    found = [recursion(weights, [torch.stack([a, b])]) for a in axis for b in axis]
    smallest = math.sqrt(min(float(rho) for rho in found if rho is not None))
    assert smallest * 0.99 <= lipsdp(layers) <= smallest * (1 + 1e-9)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
@pytest.mark.parametrize("method", [eclipse, lipsdp])
def test_bounds_scale_with_the_weights(method, scale):
    layers = network(3, 8, 8, 1)
    scaled = [Layer(weight * scale, bias) for weight, bias in layers]
    assert method(scaled) == pytest.approx(method(layers) * scale**3, rel=1e-4)


@pytest.mark.parametrize("method", [eclipse, lipsdp])
def test_dead_features_do_no_harm(method):
    layers = network(3, 8, 8, 1)
    layers[0].weight[0, 2] = 0  # sees nothing
    layers[1].weight[0, :, 5] = 0  # is not seen
    bound = method(layers)
    assert over_all_patterns(weights_of(layers), 0.0) <= bound <= product(weights_of(layers)) * (1 + 1e-9)


@pytest.mark.parametrize("method", [eclipse, lipsdp])
def test_a_constant_network_has_no_bound_of_this_kind(method):
    layers = network(3, 8, 8, 1)
    layers[1].weight[0] = 0
    assert method(layers) is None


def test_a_network_without_hidden_layers_is_its_own_bound():
    layers = network(5, 1)
    assert eclipse(layers) == pytest.approx(float(layers[0].weight.double().norm()), rel=1e-9)


def test_bounds_hold_for_the_exact_constant_everywhere():
    for seed in range(3):
        layers = network(2, 24, 24, 1, seed=seed)
        known = constants(layers, ReLU(), (np.full(2, -1.0), np.full(2, 1.0)), 2.0, 10**5).everywhere.value
        assert known <= lipsdp(layers) * (1 + 1e-11)


# Which networks --------------------------------------------------------------------------------------------------


class Bent(ReLU):
    def forward(self, x):
        return x


def test_what_the_bounds_do_not_cover_is_refused():
    layers = network(3, 4, 1)
    assert refusal(layers, ReLU(), 2) is None
    assert refusal(layers, LeakyReLU(0.2), 2) is None
    for q in (1.0, math.inf):
        assert refusal(layers, ReLU(), q) == "is for gradients in the 2-norm"
    for act in (Abs(), GroupSort(), torch.nn.Tanh(), Bent()):
        assert refusal(layers, act, 2) == f"{type(act).__name__} has no slopes in [0, 1], feature by feature"
    assert refusal(network(3, 4, 2), ReLU(), 2) == "is for one output"


CONSTRAINTS = {
    "none": Unconstrained(),
    "spectral": Spectral(1.0),
    "linf": LInf(lipschitz=1.0, p=2),
    "linf,p=inf": LInf(lipschitz=1.0, p=math.inf),
}


def problem(layers, act, constraint, measured: float) -> Problem:
    certificate = product_certificate(constraint, act, layers, 0)
    box = torch.zeros(3).double(), torch.ones(3).double()
    return Problem(layers, act, constraint, certificate, box, Maximum(measured, ()), 0)


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_the_best_bound_is_taken_where_it_holds(name):
    layers, constraint = network(3, 16, 16, 1), CONSTRAINTS[name]
    found = prove(problem(layers, ReLU(), constraint, measured=0.01))
    if constraint.q == 2:
        assert found.method == "lipsdp"
        assert found.value == found.proofs["lipsdp"].value < found.proofs["eclipse"].value
    else:
        assert found.proofs["lipsdp"].value is found.proofs["eclipse"].value is None
        assert found.method in ("product", "rows")


def test_the_descent_is_for_a_gap_above_a_tenth():
    layers = network(3, 16, 16, 1)
    closed = eclipse(layers)
    near = prove(problem(layers, ReLU(), Unconstrained(), measured=closed / 1.09))
    assert (near.method, near.proofs["lipsdp"].reason) == ("eclipse", "the gap is below 10 %")
    asked = prove(problem(layers, ReLU(), Unconstrained(), measured=closed / 1.09), "lipsdp")
    assert asked.method == "lipsdp"


@pytest.mark.parametrize("act", ["relu", "leaky_relu"])
@pytest.mark.parametrize("constraint", ["none", "spectral", "linf"])
def test_trained_networks_stay_within_their_bounds(trained, act, constraint):
    """On samples over many times the box of the data, in 64 dimensions."""
    result = trained(f"act={act}", f"constraint={constraint}", "dataset=digits_parity", "loss=hinge")
    layers = [Layer(w[:1], b[:1]) for w, b in result.checkpoint.layers]
    draws = torch.Generator().manual_seed(1)
    x = 10 * torch.rand(1, 20_000, 64, generator=draws, dtype=torch.float64) - 5
    steepest = float(norms(scan(layers, result.checkpoint.act, x).gradients[0], 2).max())
    assert 0 < steepest <= lipsdp(layers) <= eclipse(layers) * (1 + 1e-9)
