"""Constraints that bound nothing: what they add to the loss, by closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import SMALL
from networks import free, network, normal

from lipexp.activations import GroupSort
from lipexp.blocks import inputs_and_output
from lipexp.constraints import GloRo, GradientPenalty
from lipexp.losses import CrossEntropy


def outputs(constraint, net, x):
    """The penalty, and f (K, B, C), of these weights in training."""
    layers = free(net)
    constraint.start(layers)
    for _ in range(300):
        blocks = constraint.apply(layers)
        acts = [GroupSort()] * len(blocks)
        f = inputs_and_output(blocks, acts, x)[1]
        penalty = constraint.penalty(blocks, acts, x, f)
    return penalty.detach(), f.detach()


def test_the_gradient_penalty_of_a_linear_network_is_that_of_its_rows():
    net, x = network(3, 2, runs=2).double, normal(2, 10, 3).requires_grad_()
    lengths = net.layers[0].weight.norm(dim=2)  # (K, C)
    for goal in (0.1, 0.7, 5.0):
        constraint = GradientPenalty(weight=3.0, goal=goal)
        expected = 3 * (lengths / goal - 1).clamp_min(0).square().mean(dim=1)
        torch.testing.assert_close(outputs(constraint, net, x)[0], expected)


def test_the_gradient_penalty_has_true_derivatives():
    net, x = network(2, 4, 4, 1).double, normal(1, 20, 2).requires_grad_()
    layers, acts = free(net), [GroupSort()] * 3
    weight = layers[1].weight.clone().requires_grad_()

    def value(weight):
        layers[1] = layers[1]._replace(weight=weight)
        blocks = GradientPenalty(goal=0.1).apply(layers)
        return GradientPenalty(goal=0.1).penalty(blocks, acts, x, inputs_and_output(blocks, acts, x)[1])

    (gradient,) = torch.autograd.grad(value(weight).sum(), weight)
    change = 1e-6 * normal(*weight.shape)
    difference = float((value(weight + change) - value(weight - change)).detach() / 2)
    assert float((gradient * change).sum()) == pytest.approx(difference, rel=1e-6)


@pytest.mark.parametrize("n_outputs", [1, 2, 4])
def test_the_cross_entropy_and_what_gloro_adds_are_the_cross_entropy_with_one_output_more(n_outputs):
    net, x, radius = network(3, 8, n_outputs, runs=2).double, normal(2, 10, 3), 0.3
    penalty, f = outputs(GloRo(radius), net, x)
    y = torch.arange(10) % max(2, n_outputs)
    for run in range(2):
        hidden, last = (layer.weight[run] for layer in net.layers)
        steepest = float(torch.linalg.matrix_norm(hidden, ord=2))
        logits = f[run] if n_outputs > 1 else torch.cat([-f[run], f[run]], dim=1) / 2
        rows = last if n_outputs > 1 else torch.cat([-last, last]) / 2
        expected = []
        for point, target in zip(logits, y, strict=True):
            top = int(point.argmax())
            bottom = max(
                float(point[j]) + radius * float((rows[top] - rows[j]).norm()) * steepest
                for j in range(len(point))
                if j != top
            )
            all_of_them = torch.cat([point, torch.tensor([bottom], dtype=torch.float64)])
            expected.append(float(all_of_them.logsumexp(0) - point[target]))
        entropy = CrossEntropy()(logits[None], y[None].double()).mean()
        assert float(entropy + penalty[run]) == pytest.approx(sum(expected) / len(expected), rel=1e-6)


def test_gloro_is_for_classes(lipexp):
    done = lipexp("train", "dataset=absolute_value", "constraint=gloro", *SMALL)
    assert (done.code, done.out) == (2, "")
    assert done.err == "lipexp: constraint=gloro: is for classes, not for dataset=absolute_value\n"


@pytest.mark.parametrize("kind", [GradientPenalty, GloRo])
def test_they_set_no_bound(kind):
    assert (kind().lipschitz, kind().target(0), kind().bound(3)) == (None, None, None)
    assert math.isfinite(kind().prove(network(2, 4, 1)).norms[0][0])
