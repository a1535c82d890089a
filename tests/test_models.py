"""Models: where training starts, and layers as views of the parameters."""

from __future__ import annotations

import numpy as np
import torch
from conftest import part
from networks import generator

from lipexp.activations import GroupSort
from lipexp.constraints import Unconstrained
from lipexp.models import MLP, unflatten

RUNS = 3


def test_every_initial_singular_value_is_one_and_layers_are_views_of_the_parameters(model_option):
    model, before = part((f"model={model_option}", "model.width=8")), torch.get_rng_state()
    shapes = model.shapes(2, 1)
    parameters = torch.stack([model.initial(shapes, generator(run)) for run in range(RUNS)])
    assert torch.equal(torch.get_rng_state(), before)  # the global generator is left alone
    layout = Unconstrained().layout(shapes, GroupSort())
    layers, alone = unflatten(parameters, layout), unflatten(parameters[1:2].clone(), layout)
    assert [tuple(layer.weight.shape) for layer in layers] == [(RUNS, *shape) for shape in shapes]
    assert [tuple(layer.bias.shape) for layer in layers] == [(RUNS, 1, n_out) for n_out, _ in shapes]
    for layer, own in zip(layers, alone, strict=True):
        for weight in layer.weight:
            # float32 weights of size at most 1, in rows of 8.
            np.testing.assert_allclose(np.linalg.svd(weight.double().numpy(), compute_uv=False), 1, atol=1e-6)
        assert 0 < layer.bias.abs().max() <= layer.weight.shape[2] ** -0.5
        for values, own_values in zip(layer[:2], own[:2], strict=True):
            assert torch.equal(values[1], own_values[0])
            values.fill_(0)
    assert not parameters.any()  # so every parameter belongs to a layer


def test_an_mlp_has_its_depth_and_width():
    assert MLP(width=5, depth=1).shapes(2, 1) == [(5, 2), (1, 5)]
    assert MLP(width=5, depth=3).shapes(2, 4) == [(5, 2), (5, 5), (5, 5), (4, 5)]
    assert MLP(depth=0).shapes(2, 3) == [(3, 2)]
    assert MLP(width=5, depth=3, widths=[7, 4]).shapes(2, 1) == [(7, 2), (4, 7), (1, 4)]


def test_another_seed_starts_elsewhere(make, model_option):
    model = make("model", f"model={model_option}")
    shapes = model.shapes(2, 1)
    one, other = (model.initial(shapes, torch.Generator().manual_seed(seed)) for seed in (3, 4))
    assert not torch.equal(one, other)
