"""Models: layers that chain, and where their training starts."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from networks import generator

from lipexp.config import ConfigError
from lipexp.models import MLP, unflatten

RUNS = 3


@pytest.fixture
def model(model_option, make):
    return make("model", f"model={model_option}", "model.width=8")


def stacked(model, n_inputs: int = 2, runs: int = RUNS) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """(K, P) initial parameters and the shapes of their layers."""
    shapes = model.shapes(n_inputs, 1)
    return torch.stack([model.initial(shapes, generator(run)) for run in range(runs)]), shapes


def test_layers_chain_from_the_inputs_to_the_outputs(model):
    for n_inputs, n_outputs in ((1, 1), (2, 1), (7, 3)):
        shapes = model.shapes(n_inputs, n_outputs)
        assert shapes[0][1] == n_inputs
        assert shapes[-1][0] == n_outputs
        assert all(before[0] == after[1] for before, after in pairwise(shapes))


def test_unflattened_layers_are_views_of_the_parameters(model):
    parameters, shapes = stacked(model)
    layers = unflatten(parameters, shapes)
    assert [tuple(layer.weight.shape) for layer in layers] == [(RUNS, *shape) for shape in shapes]
    assert [tuple(layer.bias.shape) for layer in layers] == [(RUNS, 1, n_out) for n_out, _ in shapes]
    for layer in layers:
        for part in layer:
            assert part.untyped_storage().data_ptr() == parameters.untyped_storage().data_ptr()
            part.fill_(0)
    assert not parameters.any()  # so that no parameter belongs to no layer


def test_unflatten_keeps_runs_apart(model):
    parameters, shapes = stacked(model)
    for run in range(RUNS):
        for together, alone in zip(
            unflatten(parameters, shapes), unflatten(parameters[run : run + 1], shapes), strict=True
        ):
            assert torch.equal(together.weight[run], alone.weight[0])
            assert torch.equal(together.bias[run], alone.bias[0])


def test_every_initial_singular_value_is_one(model):
    for layer in unflatten(*stacked(model)):
        for weight in layer.weight:
            # float32 weights of size at most 1, in rows of 8.
            np.testing.assert_allclose(np.linalg.svd(weight.double().numpy(), compute_uv=False), 1, atol=1e-6)


def test_initial_biases_lie_within_one_over_the_root_of_the_inputs(model):
    for layer in unflatten(*stacked(model, runs=40)):
        limit = layer.weight.shape[2] ** -0.5
        assert layer.bias.abs().max() <= limit
        assert layer.bias.std() > limit / 3  # a uniform distribution has limit / sqrt(3)


def test_a_generator_fixes_every_initial_bit(model):
    shapes = model.shapes(2, 1)
    first, again, other = (model.initial(shapes, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.isclose(first, other).any()


def test_initial_parameters_leave_the_global_generator_alone(model):
    before = torch.get_rng_state()
    model.initial(model.shapes(2, 1), generator(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_an_mlp_has_its_depth_and_width():
    assert MLP(width=5, depth=1).shapes(2, 1) == [(5, 2), (1, 5)]
    assert MLP(width=5, depth=3).shapes(2, 4) == [(5, 2), (5, 5), (5, 5), (4, 5)]


@pytest.mark.parametrize("name", ["width", "depth"])
@pytest.mark.parametrize("value", [0, -1, 1.5])
def test_a_bad_argument_is_named(name, value):
    with pytest.raises(ConfigError, match=f"^{name}={value}: must be a whole number, at least 1"):
        MLP(**{name: value})
