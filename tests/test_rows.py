"""Bounds that follow every feature: against gradients, the product of norms, and an example by hand."""

import math
from dataclasses import replace

import pytest
import torch
from acts import ACTS, Bent, Descending, Tripled
from networks import NORMS, by_hand, network, normal, pattern_power, root, with_act

from lipexp.activations import Abs, GroupSort, ReLU, as_activation
from lipexp.blocks import Affine
from lipexp.measured.gradients import norms, scan
from lipexp.norms import row_norm_bound
from lipexp.proven.rows import bound, why_not_applicable

EXAMPLE = by_hand(([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0], [0.0, 0.0]], [0.0] * 4), ([[1.0, -1.0, 0.5, 1.0]], [0.0]))


class Falling(torch.nn.Module):
    slopes = (-1, 0.5)


@pytest.mark.parametrize(
    ("act", "q", "expected"),
    [
        (ReLU(), 2, 5 + 1 + 0.5 * 2),
        (Abs(), 1, 7 + 1 + 0.5 * 2),
        (ReLU(), math.inf, 4 + 1 + 0.5 * 2),
        (Bent(), 2, 0.75 * (5 + 1 + 0.5 * 2)),
        (as_activation(Falling()), 2, 5 + 1 + 0.5 * 2),
        # Pairs of neighbours, of features that stand apart, and all four sorted: each gets the largest bound.
        (Descending(), 2, 5 + 5 + 0.5 * 2 + 2),
        (GroupSort(), 2, 5 + 1 + 0.5 * 5 + 1),
        (GroupSort(n_groups=1), 2, 5 * 3.5),
    ],
)
def test_an_example_by_hand(act, q, expected):
    net = with_act(EXAMPLE, act)
    assert why_not_applicable(net) is None
    assert expected <= bound(net, q, 2) <= expected * (1 + 1e-13)


@pytest.mark.parametrize("name", [name for name in ACTS if name != "fullsort"])
def test_the_bound_holds_for_all_patterns_and_is_below_the_product_of_row_norms(name):
    net = network(2, 3 if "three" in name or "3" in name else 4, 6, 1, act=ACTS[name])
    later = [row_norm_bound(layer.weight[0].numpy(), 1) for layer in net.layers[1:]]
    for q in NORMS:
        product = row_norm_bound(net.layers[0].weight[0].numpy(), q) * math.prod(later)
        assert root(pattern_power(net, q), q) <= bound(net, q, 2) <= product * (1 + 1e-12)


@pytest.mark.parametrize("name", ["relu", "bent", "maxmin", "abs"])
def test_the_bound_of_several_outputs_holds_in_the_norms_of_both_chains(name):
    """Of each row, and of the whole Jacobian for p = 2; the rows alone are those of networks of one output."""
    net = network(3, 8, 8, 4, act=ACTS[name])
    *hidden, (weight, bias) = net.layers
    each = [Affine(weight[:, c : c + 1], bias[..., c : c + 1]) for c in range(4)]
    found = scan(net, normal(1, 2000, 3)).gradient[0]
    for q in NORMS:
        alone = [bound(replace(net, layers=[*hidden, last]), q, 2) for last in each]
        assert bound(net, q, math.inf) == pytest.approx(max(alone), rel=1e-12)
        assert bound(net, q, 2) == pytest.approx(math.hypot(*alone), rel=1e-12)
        assert (norms(found, q) <= torch.tensor(alone)).all()
    assert float(torch.linalg.matrix_norm(found, ord=2).max()) <= bound(net, 2, 2)


def test_an_activation_counts_for_what_it_declares_of_its_own_map():
    for act in (Tripled(), as_activation(torch.tanh)):
        assert why_not_applicable(with_act(EXAMPLE, act)) == f"{act.label} neither declares slopes nor sorts"


def test_what_has_no_gradient_adds_nothing_and_what_underflows_does_not_become_zero():
    assert bound(by_hand(([[0.0, 0.0]], [0.0]), ([[2.0]], [0.0])), 2, 2) == 0
    assert 0 < bound(by_hand(*[([[2.0**-140]], [0.0])] * 9), 2, 2) < 2.0**-1000  # below the smallest float64
