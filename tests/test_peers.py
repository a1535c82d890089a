"""`lipexp bench peers` with torch alone, the other libraries being left out."""

from __future__ import annotations

import io
import math
from types import SimpleNamespace

import pytest
import torch
from networks import normal
from rich.console import Console
from torch import nn

from lipexp.bench import libraries, peers
from lipexp.bench.libraries import Rival, constant, residual, row_sum, spectral
from lipexp.bench.peers import ACCURACY, LOSS, SHARE, Learnt, learnt, own_learnt, worse


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, value in {"SEEDS": 2, "STEPS": 20, "STEP_CALLS": 1}.items():
        monkeypatch.setattr(peers, name, value)


@pytest.fixture
def rival():
    return next(libraries.of_torch())


def test_a_missing_library_is_named_and_the_others_are_compared(monkeypatch, capsys):
    monkeypatch.setattr(libraries, "LIBRARIES", {"none-such": ("no_such_module", libraries.of_torchlip)})
    monkeypatch.setattr(libraries, "of_torch", lambda: iter([next(iter(libraries_of_torch()))]))
    said = io.StringIO()
    peers.peers(Console(file=said, width=200), 1)
    assert said.getvalue().startswith("not installed: none-such (pip install none-such)")
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("torch spectral_norm + MaxMin") for line in lines)
    assert any(
        line.startswith("  spectral") and line.rstrip().endswith(("met", "loss", "share")) for line in lines
    )


libraries_of_torch = libraries.of_torch


def test_ours_and_theirs_learn_both_problems_and_ours_keep_the_bound(rival):
    ours, theirs = own_learnt("spectral"), learnt(rival)
    for found in (ours, theirs):
        assert {measure: len(values) for measure, values in found.scores.items()} == {
            ACCURACY: 2,
            LOSS: 2,
            SHARE: 2,
        }
        assert len(found.constants) == 4
    assert max(ours.constants) <= 1
    assert len(theirs.in_training) == 8  # 2 problems, 2 seeds, 20 steps
    assert 0.6 < sum(ours.scores[ACCURACY]) / 2 <= 1


def test_worse_is_what_differs_by_more_than_its_standard_error():
    good, bad = Learnt(), Learnt()
    for measure, values in ((ACCURACY, [0.9, 0.8]), (LOSS, [0.1, 0.2]), (SHARE, [0.5, 0.5])):
        good.scores[measure] = values
        bad.scores[measure] = [value - 0.05 * measure.sign for value in values]
    bad.scores[SHARE] = [0.4, 0.6]  # the same mean
    assert worse(bad, good) == ["accuracy", "loss"]
    assert worse(good, bad) == []


def test_constants_are_the_products_of_norms():
    network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    first, last = (layer.weight.detach().double() for layer in (network[0], network[2]))
    expected = float(torch.linalg.svdvals(first)[0]) * float(last.abs().sum(dim=1).max())
    rival = Rival("", lambda: network, [], (spectral, row_sum))
    assert constant(rival, network) == pytest.approx(expected)


def test_the_bound_of_a_residual_layer_holds_for_every_pattern():
    weight, t = normal(3, 4), torch.tensor([0.1, 0.5, 0.9]).double()
    layer = SimpleNamespace(weight=weight, compute_t=lambda: t)
    steepest = 0.0
    for pattern in range(8):
        active = torch.tensor([pattern >> i & 1 for i in range(3)]).double()
        jacobian = torch.eye(4).double() - 2 * weight.T @ torch.diag(t * active) @ weight
        steepest = max(steepest, float(torch.linalg.matrix_norm(jacobian, ord=2)))
    assert steepest <= float(residual(layer)) * (1 + 1e-12)
    assert math.isclose(steepest, float(residual(layer)))  # all units active
