"""Networks: K stacked ones equal K of torch's, and the plain one computes what its state dict says."""

from __future__ import annotations

import io
from itertools import pairwise

import numpy as np
import pytest
import torch

from lipexp.activations import GroupSort, ReLU
from lipexp.config import ConfigError
from lipexp.models import MLP, Layer, Network, forward, hidden_inputs, state_dict, unflatten

RUNS, BATCH = 3, 5


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(7), dtype=dtype)


@pytest.fixture
def model(model_option, make):
    return make("model", f"model={model_option}", "model.width=8")


def stacked(model, n_inputs: int = 2, runs: int = RUNS) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """(K, P) initial parameters and the shapes of their layers."""
    shapes = model.shapes(n_inputs)
    return torch.stack([model.initial(shapes, generator(run)) for run in range(runs)]), shapes


def sequential(layers: list[Layer], act: torch.nn.Module, run: int) -> torch.nn.Sequential:
    """One of the stacked networks, made of torch's own parts."""
    parts: list[torch.nn.Module] = []
    for weight, bias in layers:
        linear = torch.nn.Linear(weight.shape[2], weight.shape[1], dtype=weight.dtype)
        linear.load_state_dict({"weight": weight[run], "bias": bias[run, 0]})
        parts += [linear, act]
    return torch.nn.Sequential(*parts[:-1])


def test_layers_chain_from_the_inputs_to_one_output(model):
    for n_inputs in (1, 2, 7):
        shapes = model.shapes(n_inputs)
        assert shapes[0][1] == n_inputs
        assert shapes[-1][0] == 1
        assert all(before[0] == after[1] for before, after in pairwise(shapes))


def test_stacked_networks_equal_torchs_one_by_one(model):
    parameters, shapes = stacked(model)
    layers, x = unflatten(parameters.double(), shapes), normal(RUNS, BATCH, 2, dtype=torch.float64)
    for act in (ReLU(), GroupSort(), torch.nn.Tanh()):
        out = forward(layers, act, x)
        assert out.shape == (RUNS, BATCH, 1)
        for run in range(RUNS):
            # The same sums in another order, in float64.
            torch.testing.assert_close(out[run], sequential(layers, act, run)(x[run]), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("runs", [1, RUNS])
@pytest.mark.parametrize("n_outputs", [1, 3, 12])
def test_gradients_of_stacked_networks_equal_torchs_one_by_one(model, runs, n_outputs):
    shapes = model.shapes(2, n_outputs)
    parameters = torch.stack([model.initial(shapes, generator(run)) for run in range(runs)]).double()
    x = normal(runs, BATCH, 2, dtype=torch.float64)
    layers = [
        Layer(*(part.detach().requires_grad_() for part in layer)) for layer in unflatten(parameters, shapes)
    ]
    points = x.clone().requires_grad_()
    out = forward(layers, torch.nn.Tanh(), points)
    wanted = [points, *(part for layer in layers for part in layer)]
    found = torch.autograd.grad(out.square().sum(), wanted)
    for run in range(runs):
        alone, own_points = sequential(layers, torch.nn.Tanh(), run), x[run].clone().requires_grad_()
        own = torch.autograd.grad(alone(own_points).square().sum(), [own_points, *alone.parameters()])
        for together, separate in zip(found, own, strict=True):
            # The same sums in another order, in float64.
            torch.testing.assert_close(together[run].reshape(separate.shape), separate, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n_outputs", [1, 3, 6])
def test_a_layer_can_be_differentiated_twice(n_outputs):
    """Curved activations and penalties on the gradient need it; a layer that loses it gives wrong numbers."""
    layer = Layer(normal(2, n_outputs, 4, dtype=torch.float64), normal(2, 1, n_outputs, dtype=torch.float64))
    inputs = [part.requires_grad_() for part in (*layer, normal(2, BATCH, 4, dtype=torch.float64))]

    def affine(weight, bias, x):
        return forward([Layer(weight, bias)], torch.nn.Tanh(), x)

    assert torch.autograd.gradcheck(affine, inputs)
    assert torch.autograd.gradgradcheck(affine, inputs)


def test_hidden_inputs_are_what_each_layer_receives(model):
    parameters, shapes = stacked(model)
    layers, x = unflatten(parameters.double(), shapes), normal(RUNS, BATCH, 2, dtype=torch.float64)
    out, inputs = hidden_inputs(layers, ReLU(), x)
    assert inputs[0] is x
    assert [tuple(h.shape) for h in inputs] == [(RUNS, BATCH, n_in) for _, n_in in shapes]
    for i, received in enumerate(inputs):
        torch.testing.assert_close(forward(layers[i:], ReLU(), received), out, rtol=1e-13, atol=1e-13)


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
    shapes = model.shapes(2)
    first, again, other = (model.initial(shapes, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.isclose(first, other).any()


def test_initial_parameters_leave_the_global_generator_alone(model):
    before = torch.get_rng_state()
    model.initial(model.shapes(2), generator(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_an_mlp_has_its_depth_and_width():
    assert MLP(width=5, depth=1).shapes(2) == [(5, 2), (1, 5)]
    assert MLP(width=5, depth=3).shapes(2, 4) == [(5, 2), (5, 5), (5, 5), (4, 5)]


@pytest.mark.parametrize("name", ["width", "depth"])
@pytest.mark.parametrize("value", [0, -1, 1.5])
def test_a_bad_argument_is_named(name, value):
    with pytest.raises(ConfigError, match=f"^{name}={value}: must be a whole number, at least 1"):
        MLP(**{name: value})


@pytest.mark.parametrize("act", [ReLU(), GroupSort(n_groups=1, neighbours=True)], ids=["relu", "fullsort"])
def test_a_network_loaded_from_a_state_dict_computes_the_same(model, act):
    parameters, shapes = stacked(model)
    layers, x = unflatten(parameters, shapes), normal(RUNS, BATCH, 2)
    for run in range(RUNS):
        network = Network(shapes, act)
        network.load_state_dict(state_dict(layers, run))
        # The same sums in another order, in float32 and of size at most 10.
        torch.testing.assert_close(network(x[run]), forward(layers, act, x)[run], rtol=1e-5, atol=1e-5)


def test_an_activation_in_a_network_sees_runs_points_and_features():
    class Shapes(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert x.shape == (1, BATCH, 4)
            return x

    assert Network([(4, 2), (1, 4)], Shapes())(normal(BATCH, 2)).shape == (BATCH, 1)


def test_a_state_dict_is_plain_float32_tensors_of_its_own(model):
    parameters, shapes = stacked(model)
    layers = unflatten(parameters, shapes)
    state = state_dict(layers, 1)
    expected = {}
    for i, (n_out, n_in) in enumerate(shapes):
        expected |= {f"layers.{i}.weight": (n_out, n_in), f"layers.{i}.bias": (n_out,)}
    assert {key: tuple(value.shape) for key, value in state.items()} == expected
    assert {value.dtype for value in state.values()} == {torch.float32}
    before = {key: value.clone() for key, value in state.items()}
    parameters.zero_()
    assert all(torch.equal(state[key], before[key]) for key in state)


def test_a_state_dict_is_read_back_without_running_code(model):
    parameters, shapes = stacked(model)
    state = state_dict(unflatten(parameters, shapes), 0)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    read = torch.load(buffer, weights_only=True)
    assert all(torch.equal(read[key], state[key]) for key in state)


def test_a_network_has_the_keys_of_a_state_dict(model):
    parameters, shapes = stacked(model)
    assert list(Network(shapes, ReLU()).state_dict()) == list(state_dict(unflatten(parameters, shapes), 0))
