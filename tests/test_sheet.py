"""Regions of several networks that are found together are those of each network alone, to the last bit."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_regions import ACTS, network

from lipexp import evaluate, regions
from lipexp.activations import PiecewiseLinear, ReLU
from lipexp.evaluate import Evaluator
from lipexp.loop import Failure
from lipexp.models import Layer, run_layers
from lipexp.regions import Enumeration, constants, constants_together


def networks(*sizes: int, runs: int, grain: float = 0.0) -> list[Layer]:
    """So many networks of test_regions, as one stack."""
    each = [network(*sizes, seed=run, grain=grain) for run in range(runs)]
    return [Layer(*map(torch.cat, zip(*layers, strict=True))) for layers in zip(*each, strict=True)]


def boxes(dims: int, runs: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of a different place and size each, one of them without an interior."""
    ends = [(np.full(dims, -1.0 - run), np.full(dims, 0.5 + run / 3)) for run in range(runs)]
    ends[1] = (ends[1][0], ends[1][0])
    return ends


def alone(layers: list[Layer], act: PiecewiseLinear, ends: list, q: float) -> list[regions.Constants]:
    return [constants(run_layers(layers, run), act, box, q, 10**6) for run, box in enumerate(ends)]


@pytest.mark.parametrize("q", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("grain", [0.0, 0.25])
@pytest.mark.parametrize("sizes", [(2, 6, 1), (2, 6, 6, 1), (1, 6, 6, 6, 1), (2, 1)], ids=str)
@pytest.mark.parametrize("name", ACTS)
def test_together_they_have_the_same_constants(name, sizes, grain, q, monkeypatch):
    monkeypatch.setattr(regions, "_TOGETHER", 3)
    layers, ends = networks(*sizes, runs=5, grain=grain), boxes(sizes[0], 5)
    together = constants_together(layers, ACTS[name], ends, q, 10**6)
    assert together == alone(layers, ACTS[name], ends, q)
    assert len({found.everywhere.value for found in together}) > 1


def test_integers_are_asked_of_the_network_whose_line_it_is(monkeypatch):
    asked = []
    exactly = Enumeration.exact_kink
    monkeypatch.setattr(
        Enumeration, "exact_kink", lambda self, *line: asked.append((self, line[0])) or exactly(self, *line)
    )
    layers, ends = networks(2, 6, 6, 1, runs=3, grain=0.25), boxes(2, 3)
    together = constants_together(layers, ReLU(), ends, 2.0, 10**6)
    assert {layer for _, layer in asked} == {0, 1}
    assert len({id(enumeration) for enumeration, _ in asked}) == 3
    assert together == alone(layers, ReLU(), ends, 2.0)


def test_too_many_regions_are_left_to_each_alone(monkeypatch):
    layers, ends = networks(2, 8, 8, 1, runs=4), boxes(2, 4)
    numbers = [found.regions for found in alone(layers, ReLU(), ends, 2.0)]
    assert constants_together(layers, ReLU(), ends, 2.0, sum(numbers)) == alone(layers, ReLU(), ends, 2.0)
    assert constants_together(layers, ReLU(), ends, 2.0, sum(numbers) - 1) == [None] * 4
    # Once a group has too many, no other is tried.
    monkeypatch.setattr(regions, "_TOGETHER", 2)
    cap = sum(numbers[:2])
    assert sum(numbers[2:]) < cap
    assert constants_together(layers, ReLU(), ends, 2.0, cap) == alone(layers, ReLU(), ends, 2.0)
    assert constants_together(layers, ReLU(), ends, 2.0, cap - 1) == [None] * 4
    monkeypatch.setattr(regions, "_MOST_TOGETHER", cap - 1)
    assert constants_together(layers, ReLU(), ends, 2.0, 10**6) == [None] * 4


def test_numbers_that_overflow_leave_the_others_to_themselves():
    layers, ends = networks(2, *[4] * 10, 1, runs=3), boxes(2, 3)
    for weight, _ in layers:
        weight[1] *= 1e37
    assert constants_together(layers, ReLU(), ends, 2.0, 10**6) == [None] * 3


def test_a_stack_is_certified_as_its_runs_are_alone(trained, monkeypatch):
    """Also where one has failed, and has no network."""
    result = trained(runs=("seed=0", "seed=1", "seed=2", "seed=3"))
    checkpoint = replace(result.checkpoint, failures={1: Failure("lost", 1)})
    calls = []
    really = regions.constants_together
    monkeypatch.setattr(
        evaluate.regions, "constants_together", lambda *rest: calls.append(really(*rest)) or calls[-1]
    )
    together = Evaluator(result.stack).final(checkpoint)
    assert [len(found) for found in calls] == [3]
    assert None not in calls[0]
    monkeypatch.setattr(evaluate.regions, "constants_together", lambda layers, *rest: [None] * 3)
    each = Evaluator(result.stack).final(checkpoint)
    assert together[1] is None
    for run in (0, 2, 3):
        assert together[run].certificate == each[run].certificate
        assert together[run].certificate.proofs["exact"].constants is not None
