"""Constraints: the chain of norms, and the bound of what is stored, in rational arithmetic without tolerance."""

from __future__ import annotations

import contextlib
import copy
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import act_for, part
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from networks import EACH_LIPSCHITZ, dot, free, generator, network, normal

from lipexp.activations import GroupSort, as_activation
from lipexp.blocks import inputs_and_output
from lipexp.config import ConfigError
from lipexp.constraints import (
    AOL,
    QR,
    Cayley,
    Constraint,
    Frobenius,
    LInf,
    LInfProjection,
    MatrixExp,
    One,
    Orthogonal,
    RowNorm,
    Spectral,
    SpectralNorm,
    Unconstrained,
    UnitRows,
)
from lipexp.constraints.norms import ColumnNorm, FrobeniusNorm, ProjectedRows
from lipexp.constraints.orthogonal import AlmostOrthogonal, CayleyTransform, Exponential, PolarFactor, QRFactor
from lipexp.models import MLP, Free, unflatten
from lipexp.norms import even_split

ORTHOGONAL = [PolarFactor("newton_schulz", 4), CayleyTransform(), QRFactor(), Exponential()]
NORMS = [
    *(kind(q) for kind in (RowNorm, ProjectedRows) for q in (1, 2, math.inf)),
    ColumnNorm(),
    FrobeniusNorm(),
    SpectralNorm(),
    AlmostOrthogonal(),
    *ORTHOGONAL,
]
BAKED = 2e-6  # training and baking differ by the shrink of 2^-20 and the rounding to float32, 2^-24: 1.02e-6
every_norm = pytest.mark.parametrize("norm", NORMS, ids=lambda norm: f"{type(norm).__name__}, {norm.name}")


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def parameters(*sizes: int, runs: int = 1) -> list[Free]:
    """Random free parameters of layers with these numbers of features."""
    return free(network(*sizes, runs=runs).double)


# The chain ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("constraint", "p", "q", "hidden_p", "names"),
    [
        (Unconstrained(), 2, 2, 2, ["spectral norm"] * 3),
        (Spectral(), 2, 2, 2, ["spectral norm"] * 3),
        (LInf(), 2, 2, math.inf, ["row 2-norm", "row 1-norm", "row 1-norm"]),
        (LInf(p="inf"), math.inf, 1, math.inf, ["row 1-norm", "row 1-norm", "row 1-norm"]),
        (LInf(p=1), 1, math.inf, math.inf, ["largest entry", "row 1-norm", "row 1-norm"]),
        (LInfProjection(), 2, 2, math.inf, ["row 2-norm", "row 1-norm", "row 1-norm"]),
        (One(), 1, math.inf, 1, ["column 1-norm"] * 3),
        (Frobenius(), 2, 2, 2, ["Frobenius norm"] * 3),
        (UnitRows(), 2, 2, 2, ["spectral norm", "spectral norm", "row 2-norm"]),
        *((kind(), 2, 2, 2, ["spectral norm"] * 3) for kind in (Orthogonal, Cayley, QR, MatrixExp, AOL)),
    ],
)
def test_the_chain_of_norms_is_that_of_the_table(constraint, p, q, hidden_p, names):
    assert (constraint.p, constraint.q, constraint.hidden_p) == (p, q, hidden_p)
    assert [norm.name for norm in constraint.norms(3)] == names


class Unbounded(Constraint):
    """Declares norms and no bound."""

    def norms(self, n_layers):
        return [RowNorm(1)] * n_layers


def test_without_a_bound_training_works_with_the_parameters_that_are_stored():
    layers, constraint = parameters(2, 8, 1), Unbounded()
    constraint.start(layers)
    baked = constraint.bake(layers, GroupSort())
    applied = constraint.apply(layers)
    for layer, trained, stored, (norm,) in zip(layers, applied, baked.layers, baked.norms, strict=True):
        assert trained.weight is layer.weight
        assert trained.bias is layer.bias
        assert torch.equal(stored.weight, layer.weight.float())
        assert norm >= float(stored.weight[0].double().abs().sum(dim=1).max())


def test_p_is_a_number_or_its_spelling():
    assert [LInf(p=p).p for p in (2, "2", 1.0, "inf", math.inf)] == [2, 2, 1, math.inf, math.inf]


@pytest.mark.parametrize(("norms", "declared"), [((), "none"), ((1, 2), "1, 2"), ((2, "inf"), "2, inf")])
def test_an_activation_has_to_be_1_lipschitz_in_the_norm_of_the_hidden_space(bounded_case, norms, declared):
    constraint, act = part(bounded_case), torch.nn.Tanh()
    act.norms = norms
    by_slopes = bounded_case[0] in ("constraint=sll", "constraint=cpl", "constraint=sandwich")
    suits = constraint.hidden_p in map(float, norms) and not by_slopes
    message = rf"^act=mine: .* in the {constraint.hidden_p:g}-norm .* declares norms: {declared} \("
    if by_slopes:
        message = r"^act=mine: must declare slopes in \[0, 1\] for .* layers, as relu does; it declares none$"
    with contextlib.nullcontext() if suits else pytest.raises(ConfigError, match=message):
        constraint.check(as_activation(act), "mine")
    Unconstrained().check(as_activation(act), "mine")


# The bound, exactly ---------------------------------------------------------------------------------------------


def is_within(constraint, layer, i, run, bound, exact):
    """Whether a layer has the norm that it may have, in rational arithmetic; a residual one has 1."""
    if not layer.is_residual:
        return exact.within(constraint.norms(2)[min(i, 1)], layer.weight[run].tolist(), bound)
    columns, rates = exact.fractions(layer.weight[run].T.tolist()), exact.fractions(layer.t[run].tolist())[0]
    inequality = [[-dot(a, b) for b in columns] for a in columns]
    for j, rate in enumerate(rates):
        inequality[j][j] += 2 / rate
    return exact.semidefinite(inequality)


def whole_is_within(network, lipschitz, exact):
    """Whether the multipliers of a sandwich network of two layers prove L, in rational arithmetic.

    The form L^2 |x|^2 - |V u|^2 + 2 u^T T (u - W x), with the rows of W scaled by those of u.
    """
    (first, _), (last, _) = ([exact.fractions(part[0].tolist()) for part in layer] for layer in network.layers)
    b = Fraction(even_split(lipschitz, 2))
    t = [b**2 * Fraction(v) for v in network.multipliers[0].double().tolist()]
    columns = list(zip(*last, strict=True))
    n = len(first[0])
    matrix = [[Fraction(0)] * (n + len(t)) for _ in range(n + len(t))]
    for i in range(n):
        matrix[i][i] = Fraction(lipschitz) ** 2
    for j, row in enumerate(first):
        for i, w in enumerate(row):
            matrix[i][n + j] = matrix[n + j][i] = -t[j] * w
        for k in range(len(t)):
            matrix[n + j][n + k] = (2 * t[j] if j == k else 0) - dot(columns[j], columns[k])
    return exact.semidefinite(matrix)


@pytest.mark.parametrize("depth", [1, 5])
def test_stored_weights_obey_the_bound_exactly_after_training_which_goes_the_same_way_for_every_bound(
    bounded_case, depth, trained, exact
):
    result = trained(*bounded_case, *act_for(bounded_case), f"model.depth={depth}", runs=EACH_LIPSCHITZ)
    constraint, network = result.stack.constraint, result.checkpoint.network
    first, last = (checkpoint.network.layers for checkpoint in result.seen)
    lipschitz = [constraint.target(run) for run in range(len(EACH_LIPSCHITZ))]
    for run in range(len(EACH_LIPSCHITZ)):
        n_affine = sum(not layer.is_residual for layer in last)
        bound = float(constraint.bound(n_affine)[run])
        assert Fraction(bound) ** n_affine <= Fraction(lipschitz[run])
        for initial, final in zip(first, last, strict=True):
            assert not torch.equal(initial.weight[run], final.weight[run])
            assert {part.dtype for part in (*initial, *final)} == {torch.float32}
        for checkpoint in result.seen:
            if network.whole:
                assert depth > 1 or whole_is_within(checkpoint.network.run(run), lipschitz[run], exact)
            else:
                assert all(is_within(constraint, layer, i, run, bound, exact) for i, layer in enumerate(last))
    # GroupSort is positively homogeneous, hinge is divided by L: float32 rounding, through 30 steps of Adam.
    out = network.double(normal(1, 200, 2).expand(4, -1, -1)) / column(*lipschitz).view(-1, 1, 1)
    torch.testing.assert_close(out, out[1:2].expand_as(out), rtol=0, atol=1e-4 * float(out.abs().max()))


@every_norm
@given(data=st.data())
def test_any_parameters_are_baked_within_any_bound(norm, data, exact):
    shape = data.draw(st.tuples(st.just(1), st.integers(1, 4), st.integers(1, 4)))
    entries = st.floats(-(2.0**100), 2.0**100, width=32) | st.sampled_from([0.0, 1.0, -1.0, 1e-45, 2.0**-70])
    weight = data.draw(hnp.arrays(np.float32, shape, elements=entries))
    bound = data.draw(st.floats(1e-15, 1e15))  # down from L = 1e-30 and up to L = 1e30 in two layers
    baked, (proven,) = norm.bake(torch.from_numpy(weight), column(bound))
    assert baked.dtype == torch.float32
    assert exact.within(norm, baked[0].tolist(), min(bound, proven))
    assert weight.any() or not baked.any() or norm in ORTHOGONAL


@every_norm
@pytest.mark.parametrize("excess", [1e-9, 1e-4, 0.1, 2.0])
def test_a_matrix_that_is_not_proven_is_scaled_down_until_it_is(norm, excess, exact, monkeypatch):
    """Baking aims below the bound; should rounding ever miss it, the proof and not the aim decides."""
    monkeypatch.setattr(norm, "scaled", lambda weight, bound: weight)
    weight = column(3.0 * (1 + excess), 1.5).view(2, 1, 1)  # one entry: every norm is its size
    if excess > 1:
        with pytest.raises(ArithmeticError, match=rf"no {norm.name} within 3\.0 could be proven"):
            norm.bake(weight, column(3.0, 3.0))
        return
    baked, (first, second) = norm.bake(weight, column(3.0, 3.0))
    assert exact.within(norm, baked[0].tolist(), min(3.0, first))
    assert not exact.within(norm, baked[0].tolist(), 3.0 * (1 - 4 * excess - 1e-6))
    assert baked[1].item() == 1.5 <= second


@every_norm
def test_rounding_wastes_no_more_than_it_must(norm):
    _, (proven,) = norm.bake(5 * normal(1, 8, 8), column(1.0))
    wasted = 2.0**-19 if isinstance(norm, SpectralNorm) else 2.0**-22  # rows are rounded toward zero
    assert proven > 1 - wasted or isinstance(norm, AlmostOrthogonal)


# Known weights --------------------------------------------------------------------------------------------------


def trained_and_baked(constraint, layers):
    """The weights of the first step of training, and those that are baked."""
    constraint.start(layers)
    return constraint.apply(layers), constraint.bake(layers, GroupSort()).layers


@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_short_rows_are_left_alone_and_long_ones_scaled_to_the_bound(p):
    constraint = LInf(p=p, lipschitz=9.0)  # b = 3 for each of two layers
    rows = column(0.25, -0.5, 2.0, 7.0).view(1, 2, 2)
    none = torch.empty(1, 0)
    last = Free(column(0.5, 0.25).view(1, 1, 2), torch.ones(1, 1, 1), none, none)
    layers = [Free(rows, torch.zeros(1, 1, 2), none, none), last]
    for first, last in trained_and_baked(constraint, layers):
        torch.testing.assert_close(first.weight[0, 0].double(), 3 * rows[0, 0], rtol=BAKED, atol=0)
        long = first.weight[0, 1].double()
        assert float(torch.linalg.vector_norm(long, ord=constraint.q)) == pytest.approx(3, rel=BAKED)
        assert float(long[1] / long[0]) == pytest.approx(3.5, rel=BAKED)
        torch.testing.assert_close(last.weight[0].double(), 3 * layers[1].weight[0], rtol=BAKED, atol=0)
        assert float(last.bias) == 9  # b^2 in the second layer


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_a_spectral_norm_is_always_divided_out_from_the_first_step_on(size):
    layers = [layer._replace(weight=size * layer.weight) for layer in parameters(2, 8, 8, 1)]
    for weights in trained_and_baked(Spectral(lipschitz=9.0), layers):
        for weight, _ in weights:
            largest = np.linalg.svd(weight[0].double().numpy(), compute_uv=False)[0]
            assert largest == pytest.approx(9 ** (1 / 3), rel=BAKED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_ends_of_the_accepted_range_can_be_trained_and_baked_and_waste_nothing(bounded_case, dtype, exact):
    constraint, lipschitz, act = (
        copy.copy(part(bounded_case)),
        column(1e-30, 1.0, 1e30),
        part(act_for(bounded_case)),
    )
    constraint.lipschitz = lipschitz  # as in a stack
    layout = constraint.layout([(8, 2), (8, 8), (1, 8)], act)
    start = torch.stack([layout.start(MLP(), act, generator(run)) for run in range(3)])
    layers = [Free(*(x.to(dtype).requires_grad_() for x in layer)) for layer in unflatten(start, layout)]
    constraint.start(layers)
    acts = constraint.acts(layers, act)
    out = inputs_and_output(constraint.apply(layers), acts, normal(3, 50, 2).to(dtype))[1]
    loss = (out / lipschitz.to(dtype).view(-1, 1, 1)).square().sum()
    for gradient in torch.autograd.grad(loss, [layer.weight for layer in layers]):
        assert gradient.isfinite().all()
        assert (gradient.abs().amax(dim=(1, 2)) > 1e-6).all()
    network = constraint.bake(layers, act)
    n_affine = sum(not layer.is_residual for layer in network.layers)
    bounds = constraint.bound(n_affine)
    # The exponent 1 / n is rounded by 2^-53, and |ln L| is at most 70.
    torch.testing.assert_close(bounds**n_affine, lipschitz, rtol=1e-13, atol=0)
    for i, layer in enumerate(network.layers):
        for run, bound in enumerate(bounds.tolist()):
            if network.whole:
                assert network.whole[run] == lipschitz[run]
            else:
                assert is_within(constraint, layer, i, run, bound, exact)
                assert layer.is_residual or not is_within(constraint, layer, i, run, bound / 4, exact)


def test_a_model_without_hidden_layers_is_bounded_as_well(bounded_case, trained):
    found = trained(*bounded_case, *act_for(bounded_case), "model.depth=0", runs=("lipschitz=3",))
    constraint, network = found.stack.constraint, found.checkpoint.network
    assert [layer.weight.shape for layer in network.layers] == [(1, 1, 2)]
    length = float(torch.linalg.vector_norm(network.layers[0].weight[0, 0].double(), ord=constraint.q))
    assert 1 < length <= 3
