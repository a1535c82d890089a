"""Residual and sandwich layers: closed forms, bounds by other routes, and what refuses them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from networks import generator, normal

from lipexp.activations import ALL_NORMS, Activation, GroupSort, LeakyReLU, ReLU
from lipexp.blocks import inputs_and_output
from lipexp.config import ConfigError
from lipexp.constraints import CPL, SLL, Sandwich
from lipexp.models import MLP, Free, unflatten
from lipexp.proven.semidefinite import lipsdp

RUNS = 2


def started(constraint, shapes, act, noise=0.5, dtype=torch.float64):
    """Free parameters some way off their start, for which training has settled."""
    layout = constraint.layout(shapes, act)
    start = torch.stack([layout.start(MLP(), act, generator(run)) for run in range(RUNS)]).to(dtype)
    layers = unflatten(start + noise * normal(*start.shape).to(dtype), layout)
    constraint.start(layers)
    for _ in range(300):
        blocks = constraint.apply(layers)
    return layers, blocks


def layer_norms(blocks, run):
    return [float(torch.linalg.matrix_norm(block.weight[run], ord=2)) for block in blocks]


@pytest.mark.parametrize("kind", [SLL, CPL])
def test_each_hidden_layer_is_a_residual_one_and_widths_are_joined_by_orthogonal_ones(kind):
    layers, blocks = started(kind(9.0), [(6, 2), (6, 6), (4, 6), (1, 4)], ReLU())
    assert [block.is_residual for block in blocks] == [False, True, True, False, True, False]
    shapes = [(6, 2), (6, 6), (6, 6), (4, 6), (4, 4), (1, 4)]
    assert [tuple(block.weight.shape[1:]) for block in blocks] == shapes
    b = 9.0 ** (1 / 3)  # three affine layers
    assert [layer_norms(blocks, 0)[i] for i in (0, 3, 5)] == pytest.approx([b, b, b])
    for block, layer, depth in zip(blocks, layers, (1, 1, 1, 2, 2, 3), strict=True):
        torch.testing.assert_close(block.bias, b**depth * layer.bias)


def test_the_rates_of_the_layers_are_those_of_their_papers():
    for kind in (SLL, CPL):
        layers, blocks = started(kind(), [(5, 3), (1, 5)], ReLU())
        for run in range(RUNS):
            w, t = blocks[1].weight[run].numpy(), blocks[1].t[run, 0].numpy()
            q = np.exp(layers[1].own[run].numpy())
            gram = np.abs(w.T @ w)
            of_sll = (
                [2 / sum(gram[i, j] * q[j] / q[i] for j in range(5)) for i in range(5)] if kind is SLL else None
            )
            expected = of_sll or [2 / np.linalg.svd(w, compute_uv=False)[0] ** 2] * 5
            np.testing.assert_allclose(t, expected, rtol=1e-9)
            x = normal(RUNS, 7, 5)
            by_hand = x[run].numpy() - t * np.maximum(x[run].numpy() @ w + blocks[1].bias[run].numpy(), 0) @ w.T
            np.testing.assert_allclose(blocks[1](x, ReLU())[run], by_hand, atol=1e-12)


class Knee(Activation):
    """The larger of z and a length that each feature learns."""

    norms, slopes = ALL_NORMS, (0.0, 1.0)

    def n_parameters(self, width):
        return width

    def within(self, theta, scale):
        return scale * theta

    def forward(self, z):
        return torch.maximum(z, self.theta.unsqueeze(1))


@pytest.mark.parametrize("kind", [SLL, CPL, Sandwich])
def test_what_is_stored_is_what_training_worked_with(kind):
    """Learned lengths are in the unit of the features, which only affine layers change."""
    constraint, act = kind(9.0), Knee()
    layers, blocks = started(constraint, [(6, 2), (6, 6), (4, 6), (1, 4)], act)
    x = normal(RUNS, 100, 2)
    trained = inputs_and_output(blocks, constraint.acts(layers, act), x)[1]
    torch.testing.assert_close(constraint.bake(layers, act).double(x), trained, rtol=0, atol=1e-4)


@pytest.mark.parametrize("act", [ReLU(), LeakyReLU(0.3)], ids=["relu", "leaky_relu"])
@pytest.mark.parametrize("kind", [SLL, CPL, Sandwich])
def test_networks_are_lipschitz_and_use_most_of_it(kind, act):
    """By secants of random points and by gradients, of what training works with and of what is stored."""
    for seed in range(3):
        constraint = kind(4.0)
        layers, _ = started(constraint, [(8, 3), (8, 8), (2, 8)], act, noise=0.3 * seed)
        x = (3 * normal(RUNS, 400, 3, seed=seed)).requires_grad_()
        net = constraint.bake(layers, act).double
        f = net(x)
        secants = (f - f.roll(1, dims=1)).norm(dim=2) / (x - x.roll(1, dims=1)).norm(dim=2)
        rows = torch.stack(
            [torch.autograd.grad(f[..., c].sum(), x, retain_graph=True)[0] for c in range(2)], dim=2
        )
        steepest = torch.linalg.matrix_norm(rows, ord=2).max()
        assert secants.max() <= 4.0
        assert 0.8 < steepest <= 4.0


def sandwich_by_layers(layers, act, x):
    """The layers as they are defined, one after the other, for one run and L = 1."""
    for i, (weight, bias, own, _) in enumerate(layers):
        wide = weight.numpy()
        n = len(wide)
        u, v = wide.T[:n], wide.T[n:]
        inverse = np.linalg.inv(np.eye(n) + u - u.T + v.T @ v)
        rows = np.concatenate([(np.eye(n) - (u - u.T) - v.T @ v) @ inverse, -2 * v @ inverse]).T
        if i == len(layers) - 1:
            return x @ rows.T + bias.numpy()
        a, b, psi = rows[:, -n:], rows[:, :-n], np.exp(own.numpy())
        np.testing.assert_allclose(a @ a.T + b @ b.T, np.eye(n), atol=1e-12)
        z = 2**0.5 * (x @ b.T) / psi + bias.numpy()
        x = 2**0.5 * (psi * act(torch.from_numpy(z)[None])[0].numpy()) @ a
    raise AssertionError


def test_merged_sandwich_layers_are_the_network_of_sandwich_layers():
    layers, blocks = started(Sandwich(), [(6, 2), (5, 6), (2, 5)], ReLU())
    x = normal(1, 50, 2)
    for run in range(RUNS):
        own = [Free(*(part[run] for part in layer)) for layer in layers]
        expected = sandwich_by_layers([(w, b[0], o, t) for w, b, o, t in own], ReLU(), x[0].numpy())
        merged = x
        for i, block in enumerate(blocks):
            merged = block._replace(weight=block.weight[run : run + 1], bias=block.bias[run : run + 1])(
                merged, ReLU()
            )
            merged = torch.relu(merged) if i < 2 else merged
        np.testing.assert_allclose(merged[0], expected, atol=1e-10)


@pytest.mark.parametrize("lipschitz", [1e-20, 1.0, 7.0, 1e20])
def test_the_best_multipliers_prove_hardly_less_than_those_of_the_sandwich(lipschitz):
    layers, _ = started(Sandwich(lipschitz), [(8, 3), (8, 8), (1, 8)], ReLU())
    net = Sandwich(lipschitz).bake(layers, ReLU())
    assert net.whole == [lipschitz] * RUNS
    found, _ = lipsdp(net.run(0))
    assert found <= 1.01 * lipschitz
    # Half of the multipliers prove nothing: the proof is of these very numbers.
    import dataclasses

    broken = dataclasses.replace(
        net, multipliers=net.multipliers * torch.linspace(0.5, 1, net.multipliers.shape[1])
    )
    assert not np.isfinite(Sandwich(lipschitz).prove(broken).whole).any()


@pytest.mark.parametrize("kind", [SLL, Sandwich])
def test_scales_that_have_run_away_are_baked_within_the_bound(kind):
    layers, _ = started(kind(2.0), [(6, 2), (6, 6), (1, 6)], ReLU())
    layers = [layer._replace(own=1e4 * layer.own) for layer in layers]
    net = kind(2.0).bake(layers, ReLU())
    assert all(net.is_finite(run) for run in range(RUNS))
    assert net.whole in ((), [2.0] * RUNS)
    assert all(np.isfinite(norm) for of_layer in net.norms for norm in of_layer)


@pytest.mark.parametrize("kind", [SLL, CPL, Sandwich])
def test_what_sorts_is_refused(kind):
    with pytest.raises(
        ConfigError, match=r"^act=groupsort: must declare slopes in \[0, 1\] for .*; it declares none$"
    ):
        kind().check(GroupSort(), "groupsort")
