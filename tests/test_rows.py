"""Bounds that follow every feature: against gradients, the product of norms, and an example by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lipexp.activations import Abs, GroupSort, PiecewiseLinear, ReLU
from lipexp.proven.methods import product_certificate
from lipexp.measured.gradients import norms, scan
from lipexp.models import Layer
from lipexp.proven.rows import bound, refusal


def by_hand(*weights: list[list[float]]) -> list[Layer]:
    return [Layer(torch.tensor([weight]), torch.zeros(1, 1, len(weight))) for weight in weights]


EXAMPLE = by_hand([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0], [0.0, 0.0]], [[1.0, -1.0, 0.5, 1.0]])


@pytest.mark.parametrize(
    ("act", "q", "expected"),
    [
        (ReLU(), 2, 5 + 1 + 0.5 * 2),
        (Abs(), 1, 7 + 1 + 0.5 * 2),
        (ReLU(), math.inf, 4 + 1 + 0.5 * 2),
        # Pairs of neighbours, of features that stand apart, and all four sorted: each gets the largest bound.
        (GroupSort(neighbours=True), 2, 5 + 5 + 0.5 * 2 + 2),
        (GroupSort(), 2, 5 + 1 + 0.5 * 5 + 1),
        (GroupSort(n_groups=1), 2, 5 * 3.5),
    ],
)
def test_an_example_by_hand(act, q, expected):
    found = bound(EXAMPLE, act, q)
    assert expected <= found <= expected * (1 + 1e-13)


def test_a_feature_without_gradient_adds_nothing():
    assert bound(by_hand([[0.0, 0.0]], [[2.0]]), ReLU(), 2) == 0


def test_trained_networks_stay_within_the_bound(trained, act_option, constraint_case):
    """In the chain p -> inf -> inf it is at most the product, up to rounding."""
    result = trained(f"act={act_option}", *constraint_case, "loss=hinge")
    constraint, act = result.stack.constraint, result.checkpoint.act
    for run in range(2):
        layers = [Layer(w[run : run + 1], b[run : run + 1]) for w, b in result.checkpoint.layers]
        assert refusal(layers, act) is None
        found = bound(layers, act, constraint.q)
        x = 8 * torch.rand(1, 5000, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - 4
        assert float(norms(scan(layers, act, x).gradient, constraint.q).max()) <= found * (1 + 1e-12)
        product = product_certificate(constraint, act, result.checkpoint.layers, run).value
        if constraint.hidden_p == math.inf:
            assert found <= product * (1 + 1e-12)


def test_what_the_bound_does_not_cover_is_refused():
    assert refusal(EXAMPLE, ReLU()) is None
    assert refusal(EXAMPLE, torch.nn.Tanh()) == "Tanh neither declares slopes nor sorts"
    assert refusal(by_hand([[1.0, 2.0]], [[1.0], [2.0]]), ReLU()) == "is for one output"


class Reversed(PiecewiseLinear):
    """A user's permutation without a kink: each feature takes the place of another."""

    norms = (1, 2, math.inf)

    def forward(self, x):
        return x.flip(-1)

    def kinks(self, width):
        return np.empty((0, 2), dtype=np.int64)


class Tripled(ReLU):
    def forward(self, x):
        return 3 * torch.relu(x)


class Half(torch.nn.Module):
    slopes = (0, 0.5)

    def forward(self, x):
        return 0.5 * torch.relu(x)


def test_an_activation_counts_for_what_it_declares_of_its_own_map():
    for act in (Reversed(), Tripled()):
        assert refusal(EXAMPLE, act) == f"{type(act).__name__} neither declares slopes nor sorts"
    assert refusal(EXAMPLE, Half()) is None
    assert bound(EXAMPLE, Half(), 2) == pytest.approx(bound(EXAMPLE, ReLU(), 2) / 2)


def test_what_underflows_does_not_become_zero():
    """2^-140 to the ninth is below the smallest float64, and not 0."""
    tiny = by_hand(*[[[2.0**-140]]] * 9)
    assert 0 < bound(tiny, ReLU(), 2) < 2.0**-1000
