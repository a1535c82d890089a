"""The matrix inequality of a network: increments, and proofs against rational arithmetic."""

import itertools
import math
from dataclasses import replace
from fractions import Fraction

import mpmath
import numpy as np
import pytest
import torch
from acts import ACTS as ALL_ACTS
from networks import difference, groups_of, network, normal, residual
from optimum import Steep

from lipexp.activations import Abs, GroupSort, Householder, ReLU, Tanh
from lipexp.blocks import Affine
from lipexp.inequality import bordered, of_layers, proves
from lipexp.proven import semidefinite
from lipexp.proven.semidefinite import (
    Reduced,
    best_outputs,
    bounds_of_pairs,
    eclipse,
    lipsdp,
    size,
)
from lipexp.proven.semidefinite.splits import split
from lipexp.proven.semidefinite.stages import Rounded, Stage, norm_above

RELU = (0.0, 1.0)
KINDS = {
    "relu": network(3, 5, 5, 1),
    "steep": network(3, 4, 4, 2, act=Steep()),
    "abs": network(2, 4, 3, 4, 1, act=Abs()),
    "maxmin": network(3, 6, 4, 2, act=GroupSort()),
    "threes": network(2, 6, 6, 3, act=GroupSort(group_size=3)),
    "descending": network(2, 6, 6, 1, act=ALL_ACTS["descending threes"]),
    "deep": network(2, *[2] * 10, 1, act=GroupSort()),
    "residual": residual(3, 4, 1, inside=3),
    "residual maxmin": residual(3, 4, 1, inside=4, act=GroupSort()),
    "linear": replace(network(3, 4, 4, 2, act=GroupSort()), linear=normal(1, 2, 3).float()),
}


def rational(net, multipliers, bound):
    """[[K, C^T], [C, S]] with no rounding, from the layers of a network, term by term.

    What the activations do is told by `groups_of`, and by slopes. With x the features of a group of g and z those
    before they are sorted, sum_j (h_j . x)^2 / (j (j + 1)) is at most the same of z, with
    h_j = (1, ..., 1, -j, 0, ...).
    """
    n_inputs, left, forms, count = net.n_inputs, iter([Fraction(t) for t in multipliers]), [], net.n_inputs
    state = [{i: Fraction(1)} for i in range(n_inputs)]

    def times(rows, features):
        return [combined(zip(row, features, strict=True)) for row in rows]

    def activated(act, z):
        nonlocal count
        groups = groups_of(act, len(z))
        if groups is None:
            for row in z:
                t, own = next(left), {count: Fraction(1)}
                below, above = (combined([(1, own), (-Fraction(slope), row)]) for slope in act.slopes)
                forms.extend([(t, below, above), (t, above, below)])
                count += 1
            return [{count - len(z) + i: Fraction(1)} for i in range(len(z))]
        out = [None] * len(z)
        for group in groups:
            t, g = next(left), len(group)
            mean = combined([(Fraction(1, g), z[i]) for i in group])
            parts = [[(1, mean)] for _ in group]
            for j in range(1, g):
                h = [1] * j + [-j] + [0] * (g - j - 1)
                own, before = {count: Fraction(1)}, combined([(a, z[i]) for a, i in zip(h, group, strict=True)])
                forms.extend([(2 * t / (j * (j + 1)), own, own), (-2 * t / (j * (j + 1)), before, before)])
                for part, a in zip(parts, h, strict=True):
                    part.append((Fraction(a, j * (j + 1)), own))
                count += 1
            for i, part in zip(group, parts, strict=True):
                out[i] = combined(part)
        return out

    for i, (layer, act) in enumerate(zip(net.layers, net.acts, strict=True)):
        rows = [[Fraction(v) for v in row] for row in layer.weight[0].double().tolist()]
        if layer.is_residual:
            inside = activated(act, times(zip(*rows, strict=True), state))
            t = [Fraction(v) for v in layer.t[0, 0].double().tolist()]
            back = times([[v * rate for v, rate in zip(row, t, strict=True)] for row in rows], inside)
            state = [combined([(1, a), (-1, b)]) for a, b in zip(state, back, strict=True)]
            continue
        state = times(rows, state)
        if i + 1 < len(net.layers) and not net.layers[i + 1].is_residual:
            state = activated(act, state)
    if net.linear is not None:
        inputs = [{i: Fraction(1)} for i in range(n_inputs)]
        beside = times([[Fraction(v) for v in row] for row in net.linear[0].double().tolist()], inputs)
        state = [combined([(1, a), (1, b)]) for a, b in zip(state, beside, strict=True)]
    entries = [[Fraction(i == j < n_inputs) for j in range(count + len(state))] for i in range(count + len(state))]
    for factor, first, second in forms:
        for (i, a), (j, b) in itertools.product(first.items(), second.items()):
            entries[i][j] += factor * a * b
    for i, row in enumerate(state, start=count):
        for j, v in row.items():
            entries[i][j], entries[j][i] = v, v
        entries[i][count:] = [Fraction(float(v)) for v in bound[i - count]]
    return entries


def combined(parts):
    """The sum of factors times sparse rows."""
    found = {}
    for factor, row in parts:
        for i, v in row.items():
            found[i] = found.get(i, 0) + factor * v
    return found


def as_scaled(net, reduced):
    """The network with the weights of `reduced`, checked to be those of the network times powers of two."""
    layers, stages = [], [*(stage.weight for stage in reduced.stages.hidden), reduced.stages.last]
    for layer, weight in zip(net.layers, stages, strict=True):
        own = layer.weight.double()
        scale = float(weight.flat[0]) / float(own[0, 0, 0])
        assert math.frexp(scale)[0] == 0.5
        if layer.is_residual:
            layers.append(layer._replace(weight=own * scale, t=layer.t.double() / scale**2))
        else:
            layers.append(Affine(own * scale, layer.bias))
    linear = None if net.linear is None else net.linear.double() * 2.0**-reduced.exponent
    return replace(net, layers=layers, linear=linear)


# The proof -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("method", [eclipse, lipsdp])
def test_the_matrix_of_a_bound_is_semidefinite_in_rational_arithmetic(exact, monkeypatch, method, name):
    proven, net = [], KINDS[name]
    monkeypatch.setattr(semidefinite, "proves", lambda *given: proves(*given) and (proven.append(given) or True))
    bound = eclipse(net) if method is eclipse else lipsdp(net)[0]
    (reduced,), (inequality, multipliers, square) = Reduced.parts(net), proven[-1]
    same, lipschitz = as_scaled(net, reduced), math.ldexp(bound, -reduced.exponent)
    assert Fraction(lipschitz) ** 2 >= Fraction(square[0, 0])
    assert np.array_equal(square, square[0, 0] * np.eye(net.n_outputs))
    # The matrix is as tight as its multipliers allow: a little less is not semidefinite, nor claimed to be.
    assert exact.semidefinite(rational(same, multipliers, square))
    less = square * (1 - 1e-6)
    assert not exact.semidefinite(rational(same, multipliers, less))
    assert not proves(inequality, multipliers, less)


@pytest.mark.parametrize("name", [name for name, net in KINDS.items() if net.n_outputs > 1])
def test_the_matrix_of_all_pairs_is_semidefinite_in_rational_arithmetic(exact, monkeypatch, name):
    net, proven = KINDS[name], []
    monkeypatch.setattr(semidefinite, "proves", lambda *given: proves(*given) and (proven.append(given) or True))
    for multipliers in (None, lipsdp(net)[1]):
        bounds, (reduced,) = bounds_of_pairs(net, multipliers), Reduced.parts(net)
        _, used, square = proven[-1]
        assert exact.semidefinite(rational(as_scaled(net, reduced), used, square))
        for (i, j), bound in zip(itertools.combinations(range(net.n_outputs), 2), bounds, strict=True):
            size = sum(a * b * Fraction(square[k, m]) for k, a in ((i, 1), (j, -1)) for m, b in ((i, 1), (j, -1)))
            assert size <= (Fraction(float(bound)) * Fraction(2) ** -reduced.exponent) ** 2
            alone = replace(net, layers=[*net.layers[:-1], difference(net.layers[-1], i, j)])
            alone = alone if net.linear is None else replace(alone, linear=net.linear[:, [i]] - net.linear[:, [j]])
            assert lipsdp(alone)[0] <= bound * (1 + 1e-6)  # but for the rounding of the difference
            (own,) = Reduced.parts(alone)
            smallest = best_outputs(own.inequality, own.closed) if multipliers is None else None
            if smallest is not None:
                assert bound == pytest.approx(math.ldexp(math.sqrt(smallest[0, 0]), own.exponent), rel=1e-6)


def test_multipliers_without_a_proof_leave_no_pair_a_bound():
    (reduced,) = Reduced.parts(network(3, 8, 8, 3))
    for multipliers in (100 * reduced.closed, -reduced.closed, math.nan * reduced.closed):
        assert reduced.bound(multipliers) is None
        assert (reduced.bounds_of_pairs(multipliers) == math.inf).all()


@pytest.mark.parametrize("name", KINDS)
def test_the_errors_of_the_matrix_are_within_their_bounds(name):
    """With weights of all magnitudes and multipliers of any digits."""
    net, draws = KINDS[name], np.random.default_rng(0)
    spread = [10 ** torch.from_numpy(draws.uniform(-4, 0, layer.weight.shape)) for layer in net.layers]
    layers = [
        layer._replace(weight=(layer.weight * s).float()) for layer, s in zip(net.layers, spread, strict=True)
    ]
    net = replace(net, layers=layers)
    (reduced,) = Reduced.parts(net)
    multipliers = reduced.closed * 10.0 ** draws.uniform(-3, 3, len(reduced.closed))
    bound = np.diag(draws.uniform(1, 2, net.n_outputs))
    computed, errors = bordered(reduced.inequality, multipliers, bound)
    exactly, unsure = rational(as_scaled(net, reduced), multipliers, bound), 0.0
    for rows in zip(exactly, computed, errors, strict=True):
        for entry, found, error in zip(*rows, strict=True):
            assert abs(entry - Fraction(found)) <= Fraction(error)
        unsure = max(unsure, *(float(error) for error in rows[2]))
    assert 0 < unsure < 1e-9


def test_products_of_rounded_matrices_are_within_their_errors():
    draws = np.random.default_rng(0)
    left, right = draws.normal(size=(5, 40)), draws.normal(size=(40, 6))
    for sizes in ((0.0, 0.0), (1e-12, 0.0), (0.0, 1e-12)):
        errors = [size * draws.normal(size=m.shape) for size, m in zip(sizes, (left, right), strict=True)]
        first, second = (
            Rounded(m, np.linalg.norm(e, axis=0) * 1.01) for m, e in zip((left, right), errors, strict=True)
        )
        exact_left, exact_right = in_fractions(left, errors[0]), in_fractions(right, errors[1])
        for found, true in ((first @ second, exact_left @ exact_right), (second.plus(second), 2 * exact_right)):
            lost = np.linalg.norm((true - in_fractions(found.values)).astype(float), axis=0)
            assert (lost <= found.off).all()
            assert found.off.max() < 1e-9
    for shape in ((1, 1), (7, 3), (3, 60), (20, 20)):
        matrix = draws.normal(size=shape)
        assert np.linalg.norm(matrix, 2) <= norm_above(matrix) <= 1.5 * np.linalg.norm(matrix, 2)


def with_rows(inequality, outputs, *rows):
    scalars = [each._replace(rows=own) for each, own in zip(inequality.scalars, rows, strict=True)]
    return inequality._replace(outputs=outputs, scalars=scalars)


def test_what_errors_of_rows_make_of_the_matrix_is_within_its_bound():
    """With errors that are large against those of rounding, of all signs."""
    draws = np.random.default_rng(0)
    for name in ("steep", "maxmin", "residual maxmin", "linear"):
        (reduced,) = Reduced.parts(KINDS[name])
        given, bound = reduced.inequality, np.eye(KINDS[name].n_outputs)
        unsure = [
            rows._replace(off=0.1 + 0 * rows.off) for rows in (given.outputs, *(e.rows for e in given.scalars))
        ]
        moved = [r._replace(values=r.values + r.off * draws.choice([-1, 1], r.values.shape)) for r in unsure]
        found, errors = bordered(with_rows(given, *unsure), reduced.closed, bound)
        other, _ = bordered(with_rows(given, *moved), reduced.closed, bound)
        assert (np.abs(found - other) <= errors + 1e-12).all()
        assert (errors <= 40).all()


def test_the_difference_of_two_outputs_may_be_off_by_the_errors_of_both():
    rows = 10.0 ** np.random.default_rng(0).uniform(-9, 0, (3, 6))
    given = of_layers([rows], RELU)
    values, off, _ = given.of_difference(2, 0).outputs
    errors = (in_fractions(rows[[2]]) - in_fractions(rows[[0]]) - in_fractions(values)).astype(float)
    assert (np.abs(errors[0]).max() > 0) & (np.abs(errors[0]) <= off).all() & (off < 1e-15).all()
    unsure = given._replace(outputs=given.outputs._replace(off=np.full(6, 0.25)))
    assert (unsure.of_difference(2, 0).outputs.off >= 0.5).all()


def test_the_coefficients_of_activations_are_within_their_errors():
    """Differences of features of very different sizes, and sines in 50 digits."""
    weight = 10.0 ** np.random.default_rng(0).uniform(-9, 0, (8, 5))
    found = Stage(weight, split(GroupSort(), weight)).before()
    exactly = in_fractions(weight[:4]) - in_fractions(weight[4:])
    assert (np.linalg.norm((exactly - in_fractions(found.values)).astype(float), axis=0) <= found.off).all()
    assert 0 < found.off.max() < 1e-15
    theta = normal(1, 40).float()
    found = split(Householder().at(theta), np.eye(80))
    with mpmath.workdps(50):
        for j, angle in enumerate(theta[0].double().tolist()):
            n = {j: -mpmath.sin(mpmath.mpf(angle) / 2), j + 40: mpmath.cos(mpmath.mpf(angle) / 2)}
            for i, k in itertools.product(n, n):
                assert abs(found.a[j, i] - n[i]) <= found.off
                assert abs(found.b[i, k] - ((i == k) - n[i] * n[k])) <= found.off < 1e-14


def in_fractions(*summands):
    return sum(np.array([[Fraction(v) for v in row] for row in part.tolist()]) for part in summands)


def test_multipliers_that_are_negative_not_finite_or_not_feasible_prove_nothing():
    """A negative one would count an inequality with the wrong sign."""
    inequality, square = of_layers([np.array([[0.5]]), np.array([[0.5]])], RELU), np.array([[0.09]])
    assert proves(inequality, np.array([2.0]), square)
    assert not any(proves(inequality, np.array([bad]), 1e9 * square) for bad in (-1e-9, math.nan, math.inf))


# Increments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*ALL_ACTS, "householder", "tanh"])
def test_what_is_known_of_increments_holds_of_random_points(name):
    act = {"householder": Householder(), "tanh": Tanh()}.get(name) or ALL_ACTS[name]
    theta = act.within(normal(1, act.n_parameters(6), seed=3), torch.ones(1, 1))
    act, first = act.at(theta), 2 * normal(1, 5000, 6)
    second = torch.where(
        torch.arange(5000).view(1, -1, 1) % 2 > 0, first + 0.1 * normal(1, 5000, 6, seed=1), -first
    )
    z, x = ((b - a)[0].numpy() for a, b in ((first, second), (act(first), act(second))))
    found = split(act, np.eye(6))
    if found.features is not None:
        a, b, c = np.eye(6)[found.features], found.linear * np.eye(6), np.eye(6)[:, found.features]
    else:
        a, b, c = found.a, found.b, found.c
    # d is what solves x = B z + C d, as A C is diagonal and A B is 0
    d = (x - z @ b.T) @ np.linalg.pinv(c).T
    np.testing.assert_allclose(z @ b.T + d @ c.T, x, atol=1e-12)
    below, above = ((d - slope * (z @ a.T)) for slope in found.slopes)
    totals = np.zeros((5000, len(set(found.multiplier))))
    np.add.at(totals.T, found.multiplier, (below * above * found.factor).T)
    assert totals.max() <= 1e-12
    assert np.abs(totals).max() > 1e-3 or name not in ("relu", "tanh", "bent")


def test_the_size_of_the_matrices_is_known_before_they_are_made():
    for act, n in ((ReLU(), 24), (GroupSort(), 12), (GroupSort(group_size=3), 16), (Householder(), 12)):
        net = network(30, 12, 12, 1, act=act)
        assert size(net) == 12 + n
        (reduced,) = Reduced.parts(net)
        assert reduced.stages.compressed().inequality().size == 12 + n
        assert reduced.inequality.size == 30 + n
