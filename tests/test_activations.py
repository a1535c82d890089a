"""Activations: known values, bit for bit where they permute; how they are declared, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import part
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from networks import normal

from lipexp.activations import ALL_NORMS, Abs, GroupSort, LeakyReLU, ReLU, as_activation
from lipexp.config import ConfigError

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
