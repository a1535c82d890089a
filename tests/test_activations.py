"""Activations: 1-Lipschitz in the norms they declare, safe in batches, differentiable; GroupSort only permutes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lipexp.activations import GroupSort, ReLU, declared_norms, is_piecewise_linear
from lipexp.config import ConfigError

WIDTH = 8
DTYPES = {torch.float64: np.float64, torch.float32: np.float32, torch.float16: np.float16}
SAME_BITS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.float16: torch.int16}

# Few different values, so that ties are common, and any others.
coordinates = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e6]) | st.floats(-1e6, 1e6)
vectors = hnp.arrays(np.float64, WIDTH, elements=coordinates)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def bits(x: torch.Tensor) -> torch.Tensor:
    """The bit patterns of a float tensor, as integers."""
    return x.contiguous().view(SAME_BITS[x.dtype])


@pytest.fixture
def act(act_option, make):
    return make("act", f"act={act_option}")


# Laws of the room ---------------------------------------------------------------------------------------------


def test_an_option_declares_its_norms(act):
    assert declared_norms(act)
    assert declared_norms(act) <= {1.0, 2.0, math.inf}


@given(x=vectors, y=vectors)
def test_outputs_are_no_farther_apart_than_inputs(act_option, make, x, y):
    act = make("act", f"act={act_option}")
    out = (act(torch.from_numpy(x)) - act(torch.from_numpy(y))).numpy()
    for p in declared_norms(act):
        # Each norm is rounded some 8 times by at most 2^-53, and a curved activation rounds its values too.
        rounding = 16 * 2.0**-53 * (np.linalg.norm(x, p) + np.linalg.norm(y, p))
        assert np.linalg.norm(out, p) <= np.linalg.norm(x - y, p) + rounding


@given(x=vectors)
def test_a_small_step_is_not_enlarged(act_option, make, x):
    """Close points see a local slope that far ones average out."""
    act = make("act", f"act={act_option}")
    step = 2.0**-10 * normal(WIDTH).numpy()
    out = (act(torch.from_numpy(x + step)) - act(torch.from_numpy(x))).numpy()
    for p in declared_norms(act):
        rounding = 16 * 2.0**-53 * 2 * np.linalg.norm(x, p)
        assert np.linalg.norm(out, p) <= np.linalg.norm((x + step) - x, p) + rounding


def test_a_batch_equals_its_points_one_by_one(act):
    x = normal(3, 5, WIDTH)
    out = act(x)
    assert out.shape == x.shape
    for k in range(3):
        assert torch.equal(out[k : k + 1], act(x[k : k + 1]))
        for b in range(5):
            assert torch.equal(out[k, b], act(x[k, b]))


def test_the_layout_in_memory_does_not_matter(act):
    x = normal(3, 5, 2 * WIDTH)[..., ::2]
    assert not x.is_contiguous()
    assert torch.equal(act(x), act(x.contiguous()))
    transposed = normal(WIDTH, 5).T
    assert torch.equal(act(transposed), act(transposed.contiguous()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_number_type_is_kept(act, dtype):
    assert act(normal(3, WIDTH).to(dtype)).dtype == dtype


def test_the_input_is_left_alone(act):
    x = normal(3, WIDTH)
    before = x.clone()
    act(x)
    assert torch.equal(x, before)


def test_gradients_equal_finite_differences(act):
    # At these points no two features, and no feature and 0, are closer than the step of 1e-6.
    assert torch.autograd.gradcheck(act, (normal(3, WIDTH).requires_grad_(),))


def test_second_derivatives_are_not_lost(act):
    """A penalty on the gradient is differentiated twice: d/dw of sum(g^2), with g the gradient of w . act(x)."""
    x, w = normal(WIDTH).requires_grad_(), normal(WIDTH, seed=1).requires_grad_()
    (gradient,) = torch.autograd.grad((w * act(x)).sum(), x, create_graph=True)
    (found,) = torch.autograd.grad(gradient.square().sum() + w.square().sum(), w)
    jacobian = torch.autograd.functional.jacobian(act, x)  # (out, in): g = J^T w
    torch.testing.assert_close(found, 2 * jacobian @ jacobian.T @ w.detach() + 2 * w.detach())


def test_the_baked_activation_is_the_same_map_on_permuted_features(act):
    x, order = normal(3, 5, WIDTH), act.order(WIDTH)
    order = torch.arange(WIDTH) if order is None else order
    assert sorted(order.tolist()) == list(range(WIDTH))
    assert torch.equal(act.baked()(x[..., order]), act(x)[..., order])


def test_the_baked_activation_keeps_its_order_and_its_norms(act):
    assert act.baked().order(WIDTH) is None
    assert declared_norms(act.baked()) == declared_norms(act)


def test_the_linear_piece_is_the_map_and_its_jacobian(act):
    assert is_piecewise_linear(act)
    for layout in (act, act.baked()):
        for seed in range(5):
            z = normal(WIDTH, seed=seed)
            piece = layout.piece(z.numpy())
            factor = piece.factor * 2.0**piece.exponent
            assert np.array_equal(factor * z.numpy()[piece.index], layout(z).numpy())
            jacobian = np.zeros((WIDTH, WIDTH))
            jacobian[np.arange(WIDTH), piece.index] = factor
            assert np.array_equal(jacobian, torch.autograd.functional.jacobian(layout, z).numpy())


def test_the_linear_piece_takes_numbers_of_any_size(act):
    """The exact arithmetic hands in Python integers far beyond 64 bits."""
    z = normal(WIDTH).numpy()
    large = np.array([int(value * 2.0**60) << 200 for value in z], dtype=object)
    piece, expected = act.piece(large), act.piece(z)
    assert piece.index.tolist() == expected.index.tolist()
    assert piece.factor.tolist() == expected.factor.tolist()


def test_the_default_width_suits(act, make):
    act.check_width(make("model").width)


# ReLU -----------------------------------------------------------------------------------------------------------


def test_relu_is_the_larger_of_zero_and_x():
    x = normal(3, WIDTH)
    assert np.array_equal(ReLU()(x).numpy(), np.maximum(0, x.numpy()))


def test_relu_has_no_piece_at_a_kink():
    assert ReLU().piece(np.array([1.0, 0.0, -1.0])) is None
    assert ReLU().piece(np.array([1, 0], dtype=object)) is None


# GroupSort ------------------------------------------------------------------------------------------------------

SIZES = (2, 4, WIDTH)
LAYOUTS = {"apart": False, "neighbours": True}


def groups_of(size: int, neighbours: bool) -> list[list[int]]:
    """The features of each group, in the order in which their sorted values are placed."""
    n_groups = WIDTH // size
    if neighbours:
        return [list(range(g * size, (g + 1) * size)) for g in range(n_groups)]
    return [list(range(g, WIDTH, n_groups)) for g in range(n_groups)]


def sorted_in_groups(x: np.ndarray, size: int, neighbours: bool) -> np.ndarray:
    out = x.copy()
    for members in groups_of(size, neighbours):
        out[..., members] = np.sort(x[..., members], axis=-1)
    return out


def extreme_vectors(dtype: np.dtype) -> st.SearchStrategy[np.ndarray]:
    """(5, H) with zeros of both signs, infinities, the largest, the smallest and denormal numbers, and ties."""
    limits = np.finfo(dtype)
    special = [0.0, 1.0, np.inf, limits.max, limits.tiny, limits.smallest_subnormal, 1 + limits.eps]
    elements = st.sampled_from([dtype(sign * value) for value in special for sign in (1, -1)])
    width = {np.float64: 64, np.float32: 32, np.float16: 16}[dtype]
    return hnp.arrays(dtype, (5, WIDTH), elements=elements | st.floats(allow_nan=False, width=width))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES)
@given(data=st.data())
def test_groupsort_permutes_bits_and_sorts_each_group(size, layout, dtype, data):
    values = data.draw(extreme_vectors(DTYPES[dtype]))
    x = torch.from_numpy(values)
    out = GroupSort(group_size=size, neighbours=LAYOUTS[layout])(x)
    for members in groups_of(size, LAYOUTS[layout]):
        assert torch.equal(bits(out[:, members]).sort().values, bits(x[:, members]).sort().values)
    # Values, in which 0.0 and -0.0 are equal: sorting may leave these two in either order.
    assert np.array_equal(out.numpy(), sorted_in_groups(values, size, LAYOUTS[layout]))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES)
def test_groupsort_sorts_bfloat16(size, layout):
    x = normal(5, WIDTH).bfloat16()
    out = GroupSort(group_size=size, neighbours=LAYOUTS[layout])(x)
    assert out.dtype == torch.bfloat16
    assert np.array_equal(out.float().numpy(), sorted_in_groups(x.float().numpy(), size, LAYOUTS[layout]))


@pytest.mark.parametrize(
    ("arguments", "size"),
    [
        ({}, 2),
        ({"n_groups": WIDTH // 2}, 2),
        ({"n_groups": 2}, 4),
        ({"n_groups": 1}, WIDTH),
        ({"group_size": 4}, 4),
    ],
    ids=lambda value: str(value),
)
def test_groupsort_counts_groups_or_features_and_defaults_to_maxmin(arguments, size):
    x = normal(3, WIDTH)
    assert np.array_equal(GroupSort(**arguments)(x).numpy(), sorted_in_groups(x.numpy(), size, neighbours=False))


def test_groups_of_one_feature_change_nothing():
    x = normal(3, WIDTH)
    assert torch.equal(GroupSort(group_size=1)(x), x)
    assert torch.equal(GroupSort(n_groups=WIDTH)(x), x)


@pytest.mark.parametrize("size", SIZES)
def test_groupsorts_order_places_each_group_side_by_side(size):
    expected = [feature for members in groups_of(size, neighbours=False) for feature in members]
    assert GroupSort(group_size=size).order(WIDTH).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES)
def test_groupsorts_backward_is_the_transposed_permutation(size, layout, dtype):
    x, incoming = normal(5, WIDTH).to(dtype), normal(5, WIDTH, seed=1).to(dtype)
    x.requires_grad_()
    (found,) = torch.autograd.grad(GroupSort(group_size=size, neighbours=LAYOUTS[layout])(x), x, incoming)
    expected = torch.empty_like(found)
    for members in groups_of(size, LAYOUTS[layout]):
        ranked = np.array(members)[np.argsort(x.detach().numpy()[:, members], axis=1)]  # (5, size): sources
        for row in range(5):
            expected[row, ranked[row]] = incoming[row, members]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES)
@given(x=vectors)
@example(x=np.zeros(WIDTH))
def test_groupsorts_gradient_is_permuted_within_groups_even_at_ties(size, layout, x):
    point, incoming = torch.from_numpy(x).requires_grad_(), normal(WIDTH)
    (found,) = torch.autograd.grad(GroupSort(group_size=size, neighbours=LAYOUTS[layout])(point), point, incoming)
    for members in groups_of(size, LAYOUTS[layout]):
        assert torch.equal(found[members].sort().values, incoming[members].sort().values)


def test_groupsorts_backward_takes_an_expanded_gradient():
    """The gradient of a sum is one number, expanded: it has no memory of its own to be viewed."""
    x = normal(5, WIDTH).requires_grad_()
    (found,) = torch.autograd.grad(GroupSort()(x).sum(), x)
    assert torch.equal(found, torch.ones_like(x))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES)
def test_groupsort_has_no_piece_at_a_tie_within_a_group(size, layout):
    act = GroupSort(group_size=size, neighbours=LAYOUTS[layout])
    members = groups_of(size, LAYOUTS[layout])
    z = normal(WIDTH).numpy()
    z[members[0][0]] = z[members[0][-1]]
    assert act.piece(z) is None
    if len(members) > 1:  # a tie between two groups is none
        z = normal(WIDTH).numpy()
        z[members[0][0]] = z[members[1][0]]
        assert act.piece(z) is not None


def test_groupsort_takes_one_spelling():
    with pytest.raises(ConfigError, match=r"^n_groups=4: give it or group_size \(now 2\), not both"):
        GroupSort(n_groups=4, group_size=2)


@pytest.mark.parametrize("value", [0, -1, 2.0, "2", True])
@pytest.mark.parametrize("name", ["n_groups", "group_size"])
def test_groupsort_takes_positive_whole_numbers(name, value):
    with pytest.raises(ConfigError, match=f"^{name}={value}: must be a whole number, at least 1"):
        GroupSort(**{name: value})


@pytest.mark.parametrize(
    ("arguments", "width", "divisor"),
    [({"n_groups": 3}, 8, 3), ({"n_groups": 16}, 8, 16), ({"group_size": 4}, 10, 4), ({}, 7, 2)],
    ids=lambda value: str(value),
)
def test_a_width_that_does_not_divide_is_refused_naming_both_numbers(arguments, width, divisor):
    with pytest.raises(ConfigError, match=rf"^model\.width={width}: must be a multiple of .*\b{divisor}$"):
        GroupSort(**arguments).check_width(width)


# What a class declares ------------------------------------------------------------------------------------------


def test_a_class_that_declares_no_norm_has_none():
    assert declared_norms(torch.nn.Tanh()) == frozenset()


class Doubled(ReLU):
    """Another map than its base, about which it says nothing itself."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Halved(Doubled):
    norms = frozenset({1.0, 2.0})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) / 4


class Renamed(ReLU):
    pass


def test_what_a_base_declares_does_not_cover_another_forward():
    assert declared_norms(Doubled()) == frozenset()
    assert not is_piecewise_linear(Doubled())
    assert declared_norms(Halved()) == {1.0, 2.0}
    assert not is_piecewise_linear(Halved())
    assert declared_norms(Renamed()) == declared_norms(ReLU())
    assert is_piecewise_linear(Renamed())


def test_an_object_may_declare_its_own_norms():
    tanh = torch.nn.Tanh()
    tanh.norms = (2,)
    assert declared_norms(tanh) == {2.0}


def test_declared_norms_are_read_as_numbers():
    class Householder(torch.nn.Module):
        norms = (2, "inf")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    assert declared_norms(Householder()) == {2.0, math.inf}
