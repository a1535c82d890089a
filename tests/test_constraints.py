"""Constraints: what is stored obeys its bound exactly, and training sees the same map."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from lipexp.activations import GroupSort, ReLU
from lipexp.constraints import (
    Constraint,
    LInf,
    RowNorm,
    Spectral,
    SpectralNorm,
    Unconstrained,
    _shrink_until_proven,
    in_usual_order,
    toward_zero,
)
from lipexp.models import MLP, Layer, forward, unflatten

LIPSCHITZ = (0.01, 1.0, 3.0, 100.0)
EACH_LIPSCHITZ = tuple(f"lipschitz={value}" for value in LIPSCHITZ)
NORMS = {"row 1-norm": RowNorm(1), "row 2-norm": RowNorm(2), "largest entry": RowNorm(math.inf)}
NORMS["spectral norm"] = SpectralNorm()

# `apply` and `bake` differ by the shrink of 2^-20 and the rounding to float32, 2^-24: together 1.02e-6.
BAKED = 2e-6


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def build(make, case, *overrides: str) -> Constraint:
    return make("constraint", *case, *overrides)


def per_run(make, case, *lipschitz: float) -> Constraint:
    """The constraint for a stack of runs with a Lipschitz constant each."""
    return make("constraint", *case, lipschitz=column(*lipschitz))


def size_of_outputs(constraint: Constraint, runs: int) -> Tensor:
    """(K, 1, 1) L, or 1 without a bound."""
    lipschitz = 1.0 if constraint.lipschitz is None else constraint.lipschitz
    return torch.as_tensor(lipschitz, dtype=torch.float64).expand(runs).view(-1, 1, 1)


def after_steps(
    constraint: Constraint, runs: int, depth: int = 2, steps: int = 25, dtype: torch.dtype = torch.float64
) -> list[Layer]:
    """Free parameters of `runs` networks after some steps of torch's Adam through the constraint."""
    model = MLP(width=8, depth=depth)
    shapes = model.shapes(2)
    parameters = torch.stack([model.initial(shapes, generator(run)) for run in range(runs)]).to(dtype)
    constraint.start(unflatten(parameters.clone(), shapes))
    x, y = normal(runs, 20, 2, seed=1).to(dtype), normal(runs, 20, 1, seed=2).to(dtype)
    scale = size_of_outputs(constraint, runs).to(dtype)
    parameters.requires_grad_()
    optimiser = torch.optim.Adam([parameters], lr=0.05)
    for _ in range(steps):
        optimiser.zero_grad()
        out = forward(constraint.apply(unflatten(parameters, shapes)), GroupSort(), x) / scale
        (out - y).square().mean(dim=(1, 2)).sum().backward()
        optimiser.step()
    return unflatten(parameters.detach(), shapes)


def converged(constraint: Constraint, layers: list[Layer]) -> list[Layer]:
    """What `apply` gives once power iteration has caught up with parameters that rest."""
    for _ in range(2000):
        applied = constraint.apply(layers)
    return applied


def single(layers: list[Layer], run: int) -> list[Layer]:
    return [Layer(*(part[run : run + 1] for part in layer)) for layer in layers]


# The bound, exactly ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_stored_weights_obey_the_bound_exactly_after_training(bounded_case, depth, trained, exact):
    result = trained(*bounded_case, "act=groupsort", f"model.depth={depth}", runs=EACH_LIPSCHITZ)
    constraint, n_layers = result.stack.constraint, depth + 1
    first, last = result.seen
    assert all(not torch.equal(a.weight, b.weight) for a, b in zip(first.layers, last.layers, strict=True))
    for run, lipschitz in enumerate(LIPSCHITZ):
        bound = float(constraint.bound(n_layers)[run])
        assert Fraction(bound) ** n_layers <= Fraction(lipschitz)
        for checkpoint in result.seen:
            for norm, layer in zip(constraint.norms(n_layers), checkpoint.layers, strict=True):
                assert layer.weight.dtype == torch.float32
                assert exact.within(norm.name, layer.weight[run].tolist(), bound)


@pytest.mark.parametrize("depth", [1, 5])
def test_the_bound_of_a_layer_wastes_nothing(bounded_case, depth, make):
    values = (*LIPSCHITZ, 1e-30, 1e30)
    bound = per_run(make, bounded_case, *values).bound(depth + 1)
    assert bound.dtype == torch.float64
    # The exponent 1/n is rounded by 2^-53, and ln L is at most 70.
    np.testing.assert_allclose(bound.numpy() ** (depth + 1), values, rtol=1e-13)


def test_slopes_between_points_stay_within_the_bound_after_training(bounded_case, act_option, trained):
    result = trained(*bounded_case, f"act={act_option}", "model.depth=2", runs=EACH_LIPSCHITZ)
    p, layers = result.stack.constraint.p, [Layer(*map(Tensor.double, x)) for x in result.checkpoint.layers]
    x = 3 * normal(4, 500, 2)
    for reach in (1e-3, 0.1, 3.0):
        y = x + reach * normal(4, 500, 2, seed=1)
        rise = (forward(layers, result.checkpoint.act, x) - forward(layers, result.checkpoint.act, y)).squeeze(-1)
        distance = torch.linalg.vector_norm(x - y, ord=p, dim=-1)
        allowed = column(*LIPSCHITZ).view(-1, 1)
        # Outputs have a size of 10 L and are rounded some 50 times by 2^-53.
        assert (rise.abs() <= allowed * (distance + 1e-13)).all()


@pytest.mark.parametrize("name", NORMS)
@given(data=st.data())
def test_any_parameters_are_baked_within_any_bound(name, data, exact):
    shape = data.draw(st.tuples(st.just(1), st.integers(1, 4), st.integers(1, 4)))
    entries = st.floats(-(2.0**100), 2.0**100, width=32) | st.sampled_from([0.0, 1.0, -1.0, 1e-45, 2.0**-70])
    weight = data.draw(hnp.arrays(np.float32, shape, elements=entries))
    bound = data.draw(st.floats(1e-15, 1e15))  # down from L = 1e-30 and up to L = 1e30 in two layers
    baked = NORMS[name].bake(torch.from_numpy(weight), column(bound))
    assert baked.dtype == torch.float32
    assert exact.within(name, baked[0].tolist(), bound)
    assert NORMS[name].proven(baked[0]) <= bound


@pytest.mark.parametrize("lipschitz", [1e-30, 1e30])
def test_the_ends_of_the_accepted_range_can_be_trained_and_baked(bounded_case, lipschitz, make, exact):
    constraint = per_run(make, bounded_case, lipschitz)
    layers = after_steps(constraint, 1, depth=1, dtype=torch.float32)
    bound = float(constraint.bound(2))
    for norm, layer in zip(constraint.norms(2), constraint.bake(layers), strict=True):
        assert exact.within(norm.name, layer.weight[0].tolist(), bound)
        assert not exact.within(norm.name, layer.weight[0].tolist(), bound / 2)


def test_zero_parameters_are_baked_to_zero(constraint_case, make):
    layers = [Layer(torch.zeros(1, *shape), torch.zeros(1, 1, shape[0])) for shape in ((4, 2), (4, 4), (1, 4))]
    for layer in per_run(make, constraint_case, 3.0).bake(layers):
        assert not layer.weight.any()
        assert not layer.bias.any()


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("excess", [1e-9, 1e-4, 0.1])
def test_a_matrix_that_is_not_proven_is_scaled_down_until_it_is(name, excess, exact):
    """Baking aims below the bound; should rounding ever miss it, the proof and not the aim decides."""
    bound = column(3.0, 3.0)
    weight = column(*[3.0 * (1 + excess), 1.5]).view(2, 1, 1)  # one entry: every norm is its size
    baked = _shrink_until_proven(NORMS[name], weight, bound, Tensor.float)
    assert exact.within(name, baked[0].tolist(), 3.0)
    assert not exact.within(name, baked[0].tolist(), 3.0 * (1 - 4 * excess - 1e-6))
    assert baked[1].item() == 1.5


@pytest.mark.parametrize("name", NORMS)
def test_a_matrix_far_beyond_its_bound_is_an_error(name):
    with pytest.raises(ArithmeticError, match=name):
        _shrink_until_proven(NORMS[name], column(9.0).view(1, 1, 1), column(3.0), Tensor.float)


@given(hnp.arrays(np.float64, 5, elements=st.floats(-1e38, 1e38)))
def test_rounding_toward_zero_is_the_nearest_float32_that_is_no_larger(x):
    rounded = toward_zero(torch.from_numpy(x)).numpy()
    assert rounded.dtype == np.float32
    assert (np.abs(rounded.astype(np.float64)) <= np.abs(x)).all()
    with np.errstate(over="ignore"):
        away = np.nextafter(rounded, np.copysign(np.float32(np.inf), x.astype(np.float32)))
    assert ((np.abs(away.astype(np.float64)) > np.abs(x)) | (rounded == x)).all()


# Training and baking are the same map ---------------------------------------------------------------------------


def test_baking_equals_the_training_map_up_to_the_shrink(constraint_case, make):
    constraint = per_run(make, constraint_case, *LIPSCHITZ)
    layers = after_steps(constraint, 4)
    for i, (applied, baked) in enumerate(zip(converged(constraint, layers), constraint.bake(layers), strict=True)):
        for trained, stored in zip(applied, baked, strict=True):
            for run in range(4):
                size = float(trained[run].abs().max())
                assert size > 0
                torch.testing.assert_close(
                    stored[run].double(),
                    trained[run],
                    rtol=BAKED,
                    atol=BAKED * size,
                    msg=lambda m, i=i: f"{i}: {m}",
                )


def test_the_baked_network_computes_what_training_sees(constraint_case, act_option, make):
    constraint, act = per_run(make, constraint_case, *LIPSCHITZ), make("act", f"act={act_option}")
    layers = after_steps(constraint, 4)
    x = normal(4, 50, 2, seed=3)
    in_training = forward(converged(constraint, layers), act, x)
    baked = [Layer(*map(Tensor.double, layer)) for layer in constraint.bake(layers)]
    reported = forward(in_usual_order(baked, act), act.baked(), x)
    for run in range(4):
        size = float(in_training[run].abs().max())
        # Three layers, each off by BAKED relative to its bound, on features that hardly cancel.
        torch.testing.assert_close(reported[run], in_training[run], rtol=0, atol=10 * BAKED * size)


def test_the_usual_order_permutes_hidden_features_only():
    layers = [Layer(normal(2, *shape), normal(2, 1, shape[0])) for shape in ((8, 3), (8, 8), (1, 8))]
    act = GroupSort(group_size=4)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    first, middle, last = in_usual_order(layers, act)
    assert torch.equal(first.weight, layers[0].weight[:, order])
    assert torch.equal(first.bias, layers[0].bias[:, :, order])
    assert torch.equal(middle.weight, layers[1].weight[:, order][:, :, order])
    assert torch.equal(last.weight, layers[2].weight[:, :, order])
    assert torch.equal(last.bias, layers[2].bias)
    unchanged = in_usual_order(layers, torch.nn.Tanh())
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(unchanged, layers, strict=True))


def test_without_a_bound_parameters_are_the_weights():
    layers = after_steps(Unconstrained(), 2, dtype=torch.float32)
    for parameters, applied, baked in zip(
        layers, Unconstrained().apply(layers), Unconstrained().bake(layers), strict=True
    ):
        assert applied.weight is parameters.weight
        assert torch.equal(baked.weight, parameters.weight)
        assert torch.equal(baked.bias, parameters.bias)
        assert baked.weight.data_ptr() != parameters.weight.data_ptr()  # training goes on; a checkpoint stays


@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_short_rows_are_left_alone_and_long_ones_scaled_to_the_bound(p):
    constraint = LInf(p=p, lipschitz=9.0)  # b = 3 for each of two layers
    rows = column(0.25, -0.5, 2.0, 7.0).view(1, 2, 2)
    layers = [Layer(rows, torch.zeros(1, 1, 2)), Layer(column(0.5, 0.25).view(1, 1, 2), torch.zeros(1, 1, 1))]
    constraint.start(layers)
    for weights in (constraint.apply(layers), constraint.bake(layers)):
        first, last = (layer.weight[0].double() for layer in weights)
        torch.testing.assert_close(first[0], 3 * rows[0, 0], rtol=BAKED, atol=0)
        length = torch.linalg.vector_norm(first[1], ord=constraint.q)
        torch.testing.assert_close(length, column(3.0)[0], rtol=BAKED, atol=0)
        torch.testing.assert_close(first[1, 1] / first[1, 0], column(3.5)[0], rtol=BAKED, atol=0)
        torch.testing.assert_close(last, 3 * layers[1].weight[0], rtol=BAKED, atol=0)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_a_spectral_norm_is_always_divided_out(size):
    constraint = Spectral(lipschitz=9.0)
    layers = [Layer(size * normal(1, *shape), normal(1, 1, shape[0])) for shape in ((8, 2), (8, 8), (1, 8))]
    constraint.start(layers)
    for weights in (converged(constraint, layers), constraint.bake(layers)):
        for layer in weights:
            largest = np.linalg.svd(layer.weight[0].double().numpy(), compute_uv=False)[0]
            assert largest == pytest.approx(9 ** (1 / 3), rel=BAKED)


def test_power_iteration_starts_at_the_singular_vectors():
    """So the very first step of training already has the right norm."""
    constraint = Spectral(lipschitz=1.0)
    layers = [Layer(normal(3, *shape), normal(3, 1, shape[0])) for shape in ((8, 2), (8, 8), (1, 8))]
    constraint.start(layers)
    for layer in constraint.apply(layers):
        for weight in layer.weight:
            # float64 singular vectors, times the division of singular values by their gap.
            assert np.linalg.svd(weight.numpy(), compute_uv=False)[0] == pytest.approx(1, rel=1e-10)


# Gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradients_are_finite_and_reach_every_weight(constraint_case, make, dtype):
    constraint = per_run(make, constraint_case, 1e-30, 0.01, 1.0, 100.0, 1e30)
    layers = after_steps(constraint, 5, dtype=dtype)
    weights = [layer.weight.requires_grad_() for layer in layers]
    x = normal(5, 50, 2, seed=3).to(dtype)
    scale = (column(1e-30, 0.01, 1.0, 100.0, 1e30) if constraint.lipschitz is not None else torch.ones(5)).to(
        dtype
    )
    out = forward(constraint.apply(layers), GroupSort(), x) / scale.view(-1, 1, 1)
    gradients = torch.autograd.grad(out.square().sum(), weights)
    for gradient in gradients:
        assert gradient.isfinite().all()
        assert (gradient.abs().amax(dim=(1, 2)) > 1e-6).all()


@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_gradients_of_the_row_maps_equal_finite_differences(p):
    shapes = [(4, 2), (4, 4), (1, 4)]
    parameters = 0.6 * normal(1, 37)  # a mixture of rows that are scaled and rows that are not
    constraint = LInf(p=p, lipschitz=3.0)
    constraint.start(unflatten(parameters, shapes))
    lengths = torch.linalg.vector_norm(unflatten(parameters, shapes)[0].weight, ord=constraint.q, dim=-1)
    assert lengths.min() < 1 < lengths.max()

    def apply(parameters: Tensor) -> Tensor:
        return torch.cat(
            [part.flatten() for layer in constraint.apply(unflatten(parameters, shapes)) for part in layer]
        )

    assert torch.autograd.gradcheck(apply, (parameters.requires_grad_(),))


def test_the_gradient_of_the_spectral_map_is_that_of_dividing_by_the_singular_value():
    constraint = Spectral(lipschitz=8.0)
    layers = [Layer(normal(2, *shape), normal(2, 1, shape[0])) for shape in ((6, 2), (6, 6), (1, 6))]
    constraint.start(layers)
    converged(constraint, layers)
    for i, layer in enumerate(layers):
        weight, direction = layer.weight.requires_grad_(), normal(*layer.weight.shape, seed=5)
        applied = constraint.apply([*layers[:i], Layer(weight, layer.bias), *layers[i + 1 :]])[i].weight
        (found,) = torch.autograd.grad((applied * direction).sum(), weight)
        divided = 2 * weight / torch.linalg.svdvals(weight)[:, :1, None]
        (expected,) = torch.autograd.grad((divided * direction).sum(), weight)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


# Batches --------------------------------------------------------------------------------------------------------


def test_a_stack_equals_its_runs_one_by_one(constraint_case, make):
    constraint = per_run(make, constraint_case, *LIPSCHITZ)
    layers = after_steps(constraint, 4)
    constraint.start(layers)
    applied, baked = constraint.apply(layers), constraint.bake(layers)
    for run, lipschitz in enumerate(LIPSCHITZ):
        alone, own = per_run(make, constraint_case, lipschitz), single(layers, run)
        alone.start(own)
        # Batched and single sums may be taken in another order: float64, at the end rounded to float32.
        for stacked, separate, rtol in [
            *((a, b, 1e-13) for a, b in zip(single(applied, run), alone.apply(own), strict=True)),
            *((a, b, 2.0**-22) for a, b in zip(single(baked, run), alone.bake(own), strict=True)),
        ]:
            for part, own_part in zip(stacked, separate, strict=True):
                torch.testing.assert_close(part, own_part, rtol=rtol, atol=0)


def test_one_lipschitz_constant_serves_a_stack(constraint_case, make):
    """A plain number is as good as a tensor with one value a run."""
    number, tensor = build(make, constraint_case, "lipschitz=3"), per_run(make, constraint_case, 3.0, 3.0)
    layers = after_steps(tensor, 2)
    for constraint in (number, tensor):
        constraint.start(layers)
    for a, b in zip(number.apply(layers), tensor.apply(layers), strict=True):
        assert torch.equal(a.weight, b.weight)
    for a, b in zip(number.bake(layers), tensor.bake(layers), strict=True):
        assert torch.equal(a.weight, b.weight)


# Every L trains alike -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("act", [ReLU(), GroupSort(), GroupSort(n_groups=1)], ids=["relu", "maxmin", "fullsort"])
def test_networks_scale_with_the_lipschitz_constant(bounded_case, act, make):
    """For an activation with act(c x) = c act(x), c > 0, f at L is L times f at 1."""
    constraint = per_run(make, bounded_case, *LIPSCHITZ)
    layers = [Layer(*(part[:1].repeat(4, 1, 1) for part in layer)) for layer in after_steps(constraint, 4)]
    constraint.start(layers)
    x = normal(1, 50, 2, seed=3).repeat(4, 1, 1)
    out = forward(constraint.apply(layers), act, x)
    for run, lipschitz in enumerate(LIPSCHITZ):
        expected = lipschitz * out[1]
        # b^n misses L by some ulps, and features cancel to outputs a tenth of their size.
        torch.testing.assert_close(out[run], expected, rtol=0, atol=1e-13 * float(expected.abs().max()))


def test_training_with_hinge_goes_the_same_way_for_every_lipschitz_constant(bounded_case, trained):
    result = trained(*bounded_case, "act=groupsort", "model.depth=2", runs=EACH_LIPSCHITZ)
    layers = [Layer(*map(Tensor.double, layer)) for layer in result.checkpoint.layers]
    x = normal(1, 200, 2, seed=3).repeat(4, 1, 1)
    out = forward(layers, result.checkpoint.act, x)
    for run, lipschitz in enumerate(LIPSCHITZ):
        # float32 rounding, carried through 30 steps of Adam.
        torch.testing.assert_close(out[run] / lipschitz, out[1], rtol=0, atol=1e-4 * float(out[1].abs().max()))
