"""Activations: known values, bit for bit where they permute; how they are declared, and what is refused."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import part, suits
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from networks import EACH_LIPSCHITZ, network, normal, piece

from lipexp.activations import (
    ALL_NORMS,
    ELU,
    Abs,
    GroupSort,
    Householder,
    Identity,
    LeakyReLU,
    LipschitzSpline,
    NActivation,
    ReLU,
    Sigmoid,
    Softplus,
    Tanh,
    as_activation,
)
from lipexp.config import ConfigError
from lipexp.loop import Trainer
from lipexp.networks import BakedNetwork

WIDTH, SIZES = 8, (2, 4, 8)
BITS = {np.float64: 64, np.float32: 32, np.float16: 16}


def groups_of(size):
    """The features of each group, as the class describes them: feature j belongs to group j mod n_groups."""
    return [list(range(group, WIDTH, WIDTH // size)) for group in range(WIDTH // size)]


def sorted_in_groups(x, size):
    out = x.copy()
    for members in groups_of(size):
        out[..., members] = np.sort(x[..., members], axis=-1)
    return out


def with_parameters(act, width=WIDTH, runs=1):
    """Some way off those from which training starts."""
    theta = act.initial(width) + 0.3 * normal(runs, act.n_parameters(width), seed=1)
    return act.at(act.within(theta, torch.ones(1, 1).double()))


def test_any_layout_in_memory_will_do_and_second_derivatives_are_not_lost(act_option):
    act, x = with_parameters(part((f"act={act_option}",))), normal(1, 3, 2 * WIDTH)[..., ::2]
    torch.testing.assert_close(act(x), act(x.contiguous()), rtol=1e-14, atol=0)
    # At these points no two features, and no feature and 0, are closer than the step of 1e-6.
    assert torch.autograd.gradgradcheck(act, (x.requires_grad_(),))


def test_elementwise_activations_have_their_values():
    x = torch.tensor([-2.0, -0.5, 0.0, 3.0])
    assert ReLU()(x).tolist() == [0, 0, 0, 3]
    assert LeakyReLU(0.25)(x).tolist() == [-0.5, -0.125, 0, 3]
    assert Abs()(x).tolist() == [2, 0.5, 0, 3]
    assert Identity()(x).tolist() == x.tolist()


SMOOTH = {
    Tanh: lambda x: 1 - 2 / ((2 * x).exp() + 1),
    Sigmoid: lambda x: 4 / (1 + (-x).exp()),
    Softplus: lambda x: (1 + x.exp()).ln(),
    ELU: lambda x: x if x > 0 else x.exp() - 1,
}


@pytest.mark.parametrize("kind", SMOOTH)
def test_smooth_activations_have_the_values_of_their_formulas_to_43_bits(kind):
    """As certified radii assume; torch's softplus, for one, is only right to 2e-9 near 20 as it comes."""
    x = torch.cat([torch.linspace(-45, 45, 181), 1e-9 * normal(20)]).double()
    for found, at in zip(kind()(x).tolist(), x.tolist(), strict=True):
        with localcontext(prec=60):
            assert abs(Decimal(found) - SMOOTH[kind](Decimal(at))) <= Decimal(2) ** -43 * max(1, abs(Decimal(at)))


@pytest.mark.parametrize("kind", SMOOTH)
def test_smooth_activations_reach_the_slopes_that_they_declare(kind):
    x = torch.linspace(-40, 40, 8001).double().requires_grad_()
    (slope,) = torch.autograd.grad(kind()(x).sum(), x)
    assert slope.aminmax() == pytest.approx((0, 1), abs=1e-12)


@pytest.mark.parametrize("number", [float, object])
def test_there_is_no_active_map_where_it_changes(number):
    assert all(act.active_map(np.array([1, 0, -1], dtype=number)) is None for act in (ReLU(), LeakyReLU(), Abs()))
    for size in SIZES:
        act, z = GroupSort(group_size=size), np.arange(WIDTH).astype(number)
        assert act.active_map(np.where(z == WIDTH // size, 0, z)) is None  # features 0 and n_groups share a group
        assert act.active_map(np.where(z == 1, 0, z)) is not None or size == WIDTH  # a tie between two groups


# GroupSort ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", BITS)
@pytest.mark.parametrize("size", SIZES)
@given(data=st.data())
def test_groupsort_permutes_bits_and_sorts_each_group(size, number, data):
    limits = np.finfo(
        number
    )  # zeros of both signs, infinities, the largest, the smallest and denormal numbers, ties
    special = [0.0, 1.0, np.inf, limits.max, limits.tiny, limits.smallest_subnormal, 1 + limits.eps]
    elements = st.sampled_from([number(sign * value) for value in special for sign in (1, -1)])
    elements |= st.floats(allow_nan=False, width=BITS[number])
    values = data.draw(hnp.arrays(number, (5, WIDTH), elements=elements))
    out = GroupSort(group_size=size)(torch.from_numpy(values)).numpy()
    for members in groups_of(size):
        found, given = (np.ascontiguousarray(x[:, members]).view(f"u{x.itemsize}") for x in (out, values))
        assert np.array_equal(np.sort(found), np.sort(given))
    # Values, in which 0.0 and -0.0 are equal: sorting may leave these two in either order.
    assert np.array_equal(out, sorted_in_groups(values, size))


@pytest.mark.parametrize("size", SIZES)
@given(x=hnp.arrays(np.float64, WIDTH, elements=st.sampled_from([0.0, -0.0, 1.0]) | st.floats(-1e6, 1e6)))
@example(x=np.zeros(WIDTH))
def test_groupsorts_gradient_is_permuted_back_even_at_ties(size, x):
    point, incoming = torch.from_numpy(x).requires_grad_(), normal(WIDTH)
    (found,) = torch.autograd.grad(GroupSort(group_size=size)(point), point, incoming)
    for members in groups_of(size):
        assert torch.equal(found[members].sort().values, incoming[members].sort().values)
        if len(set(x[members])) == size:
            assert torch.equal(found[np.array(members)[np.argsort(x[members])]], incoming[members])


@pytest.mark.parametrize("size", [1, *SIZES])
def test_groupsort_counts_groups_or_features_and_defaults_to_maxmin(size):
    x = normal(3, WIDTH)
    for act in (
        GroupSort(n_groups=WIDTH // size),
        GroupSort(group_size=size),
        *([GroupSort()] if size == 2 else []),
    ):
        assert np.array_equal(act(x).numpy(), sorted_in_groups(x.numpy(), size))


# Parameters -----------------------------------------------------------------------------------------------------


def reflected(t, a, b):
    """A pair as the paper has it: the matrix of the reflection where the other half-plane than that of n lies."""
    if -math.sin(t / 2) * a + math.cos(t / 2) * b >= 0:
        return a, b
    return math.cos(t) * a + math.sin(t) * b, math.sin(t) * a - math.cos(t) * b


def test_householder_reflects_pairs_with_orthogonal_jacobians_and_starts_as_maxmin():
    z, angle = normal(1, 300, WIDTH), 2 * normal(1, WIDTH // 2, seed=1)
    act = Householder().at(angle)
    expected = torch.empty_like(z)
    for j, t in enumerate(angle[0].tolist()):
        for b, (x, y) in enumerate(z[0, :, [j, j + WIDTH // 2]].tolist()):
            expected[0, b, j], expected[0, b, j + WIDTH // 2] = reflected(t, x, y)
    torch.testing.assert_close(act(z), expected, rtol=1e-12, atol=1e-12)
    jacobians = [torch.autograd.functional.jacobian(lambda x: act(x[None, None])[0, 0], x) for x in z[0, :20]]
    for jacobian in jacobians:
        torch.testing.assert_close(jacobian @ jacobian.T, torch.eye(WIDTH).double(), rtol=0, atol=1e-14)
    assert sorted({round(float(torch.linalg.det(jacobian))) for jacobian in jacobians}) == [-1, 1]
    start = Householder().at(Householder().initial(WIDTH)[None].double())
    torch.testing.assert_close(start(z), GroupSort()(z), rtol=0, atol=1e-6)  # pi / 2 in float32


def test_householder_is_refused_where_the_norm_is_not_the_2_norm_since_it_may_stretch_by_1_4_there():
    a, b = normal(1, 20_000, 2), normal(1, 20_000, 2, seed=1)
    for p, most in ((2.0, 1.0), (1.0, 2**0.5), (math.inf, 2**0.5)):
        act = Householder().at(torch.tensor([[2.5]]).double())
        stretch = [torch.linalg.vector_norm(x, ord=p, dim=-1) for x in (act(a) - act(b), a - b)]
        assert 0.97 * most < float((stretch[0] / stretch[1]).max()) < most + 1e-12
    for constraint in (("constraint=linf", "constraint.p=2"), ("constraint=one",)):
        assert not suits(("act=householder",), constraint)
    assert suits(("act=householder",), ("constraint=spectral",))


def test_an_n_activation_has_its_three_pieces_and_the_absolute_value_as_a_limit():
    act = NActivation().at(NActivation().within(torch.tensor([[0.5, 1.0, -1.0, 2.0]]), torch.ones(1, 1)))
    z = torch.tensor([[[-3.0, -3.0], [-1.0, 0.0], [0.25, 1.0], [0.5, 1.5], [2.0, 2.0], [3.0, 5.0]]])
    first = [-1, 1, -0.25, -0.5, 1, 2]  # between -1 and 1/2, which were given the other way round
    second = [-5, -2, -1, -1.5, -2, 1]  # between 1 and 2
    assert act(z)[0].T.tolist() == [first, second]
    wide = NActivation().at(torch.tensor([[-1e6, 0.0]]))
    assert torch.equal(wide(z[..., :1]), z[..., :1].abs())


@pytest.mark.parametrize("n_knots", [1, 3, 9])
def test_a_spline_is_the_integral_of_its_slopes_from_0_and_starts_as_the_absolute_value(n_knots):
    act, width, h = LipschitzSpline(n_knots, spacing=0.25), 3, 0.375
    z = 3 * normal(1, 500, width)
    start = act.at(act.initial(width)[None].double())
    torch.testing.assert_close(start(z), z.abs(), rtol=1e-14, atol=0)
    slopes = torch.randint(-(2**20), 2**20 + 1, (n_knots + 1, width)).double() / 2**20
    found = act.at(torch.cat([slopes.flatten(), torch.tensor([h])])[None])(z)
    knots = h * (np.arange(n_knots) - n_knots // 2)
    ends = np.concatenate([[-50.0], knots, [50.0]])
    for j in range(width):
        values = np.concatenate([[0.0], np.cumsum(np.diff(ends) * slopes[:, j].numpy())])
        values -= np.interp(0, ends, values)
        np.testing.assert_allclose(found[0, :, j], np.interp(z[0, :, j], ends, values), rtol=0, atol=1e-12)


@pytest.mark.parametrize("n_knots", [1, 7, 257])
def test_the_lines_of_a_spline_are_exact(n_knots):
    act = with_parameters(LipschitzSpline(n_knots, spacing=0.3), width=2)
    act = act.at(act.theta.float())
    for z in 30 * normal(50, 2):
        found = act.active_map(z.numpy())
        lines = zip(found.factor.tolist(), found.offset.tolist(), strict=True)
        assert [(j, *map(Fraction, line)) for j, line in enumerate(lines)] == piece(
            act, [*map(Fraction, z.tolist())]
        )


def test_slopes_of_a_spline_are_clipped_and_rounded_and_can_come_back():
    act = LipschitzSpline(n_knots=1)
    theta = torch.tensor([[-3.0, 0.1, -0.5]], requires_grad=True)
    within = act.within(theta, torch.tensor([[2.0]]))
    assert within.tolist() == [[-1.0, round(0.1 * 2**20) / 2**20, 1.0]]
    (gradient,) = torch.autograd.grad(within.sum(), theta)
    assert gradient.tolist() == [[1.0, 1.0, 0.0]]


@pytest.mark.parametrize("constraint", ["spectral", "linf"])
@pytest.mark.parametrize("name", ["n_activation", "lipschitz_spline"])
def test_lengths_that_are_learned_have_the_unit_of_the_features_so_that_training_is_the_same_for_every_bound(
    name, constraint, trained
):
    result = trained(f"act={name}", f"constraint={constraint}", "model.depth=2", runs=EACH_LIPSCHITZ)
    trainer = Trainer(result.stack, dtype=torch.float64)
    losses = torch.stack([trainer.step() for _ in range(30)])
    torch.testing.assert_close(losses, losses[:, 1:2].expand_as(losses), rtol=1e-9, atol=1e-9)
    first, last = (seen.network for seen in result.seen)
    assert all(
        not torch.equal(one.theta, other.theta) for one, other in zip(first.acts[:2], last.acts[:2], strict=True)
    )
    lipschitz = torch.tensor([0.01, 1, 3, 100]).view(-1, 1, 1).double()
    out = last.double(normal(1, 200, 2).expand(4, -1, -1)) / lipschitz
    torch.testing.assert_close(out, out[1:2].expand_as(out), rtol=0, atol=1e-4 * float(out.abs().max()))


@pytest.mark.parametrize("name", ["householder", "n_activation", "lipschitz_spline"])
def test_parameters_are_stored_and_read_back_if_they_are_within_their_range(name):
    act = part((f"act={name}",))
    baked = network(2, 4, 4, 1, act=act, runs=2)
    state = baked.state_dict(1)
    assert [key for key in state if key.startswith("acts.")] == ["acts.0", "acts.1"]
    again, x = BakedNetwork.from_state_dict(state, act), normal(1, 50, 2).float()
    assert torch.equal(again(x), baked.run(1)(x))
    assert not torch.equal(again(x), baked.run(0)(x))
    with pytest.raises(ValueError, match=r"^acts\.1 has shape \(1,\), not "):
        BakedNetwork.from_state_dict(state | {"acts.1": torch.ones(1)}, act)
    if name != "householder":  # whose angles may be any
        state["acts.0"][0] = 5.0
        with pytest.raises(ValueError, match=rf"^acts\.0 holds no parameters of {act.label}$"):
            BakedNetwork.from_state_dict(state, act)


# What is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (GroupSort, {"n_groups": 4, "group_size": 2}, r"n_groups=4: give it or group_size \(now 2\), not both"),
        *(
            (GroupSort, {"n_groups": n}, f"n_groups={n}: must be a whole number, at least 1")
            for n in (0, 2.0, True)
        ),
        (GroupSort, {"group_size": "2"}, "group_size=2: must be a whole number, at least 1"),
        *((LeakyReLU, {"slope": s}, f"slope={s}: must be a number from 1e-9 to 1") for s in (0, 1e-10, 1.5)),
        (LeakyReLU, {"slope": math.nan}, "slope=nan: must be a finite number"),
        (LipschitzSpline, {"n_knots": 4}, "n_knots=4: must be odd, as one knot lies at 0"),
        (LipschitzSpline, {"n_knots": 259}, "n_knots=259: must be a whole number, at least 1, at most 257"),
        (LipschitzSpline, {"spacing": 0}, "spacing=0: must be a finite number above 0"),
    ],
)
def test_a_bad_argument_is_named(kind, arguments, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        kind(**arguments)


@pytest.mark.parametrize(
    ("arguments", "width", "divisor"),
    [({"n_groups": 3}, 8, 3), ({"n_groups": 16}, 8, 16), ({"group_size": 4}, 10, 4), ({}, 7, 2)],
)
def test_a_width_that_does_not_divide_is_refused_naming_both_numbers(arguments, width, divisor):
    with pytest.raises(ConfigError, match=rf"^model\.width={width}: must be a multiple of .*\b{divisor}$"):
        GroupSort(**arguments).check_width(width)
    with pytest.raises(ConfigError, match=r"^model\.width=7: must be even"):
        Householder().check_width(7)


# Declarations ---------------------------------------------------------------------------------------------------


class Halved(ReLU):
    """Another map than its base, of which it declares less than its base does."""

    norms = (1, "inf")

    def forward(self, z):
        return super().forward(z) / 2


def test_what_a_base_declares_does_not_cover_another_forward():
    halved, renamed = as_activation(Halved()), type("Renamed", (ReLU,), {})()
    assert halved.norms == {1.0, math.inf}
    assert (halved.slopes, halved.groups(4), halved.breakpoints(4), halved.is_piecewise_linear) == (
        *[None] * 3,
        False,
    )
    assert (renamed.norms, renamed.slopes, renamed.is_piecewise_linear) == (ALL_NORMS, (0, 1), True)


def test_any_module_or_function_is_an_activation_with_the_declarations_of_its_own():
    tanh = torch.nn.Tanh()
    act = as_activation(tanh)
    assert (act.label, set(act.norms), act.slopes, act.is_piecewise_linear) == ("Tanh", set(), None, False)
    assert torch.equal(act(normal(2, 3, 4)), normal(2, 3, 4).tanh())
    tanh.norms, tanh.slopes = (2,), (0, 1)
    act = as_activation(tanh)
    assert (set(act.norms), act.slopes) == ({2}, (0, 1))


@pytest.mark.parametrize(
    "declared",
    [{"norms": None}, {"norms": (3,)}, {"norms": ("x",)}, *({"slopes": s} for s in ((math.nan, 1), (1, 0), 1))],
)
def test_a_declaration_that_makes_no_sense_is_refused(declared):
    act = torch.nn.Tanh()
    vars(act).update(declared)
    with pytest.raises(ConfigError, match=rf"^act=Tanh: declares {next(iter(declared))} = "):
        as_activation(act)
