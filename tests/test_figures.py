"""The picture of a run shows what it says."""

from __future__ import annotations

import numpy as np
import pytest

from lipexp.evaluate import Evaluator
from lipexp.figures import run_figure
from lipexp.loop import fit
from lipexp.train import build, stack


@pytest.fixture
def drawn(compose):
    """drawn("act=relu") -> (figure, record) of a small run."""

    def draw(*overrides):
        member = build(compose("experiment=debug", "device=cpu", *overrides))
        runs = stack([member])
        last = fit(runs, lambda checkpoint: None)
        (record,) = Evaluator(runs).final(last)
        return run_figure(last.layers, last.act, 0, record, member.names), record

    return draw


def test_a_classifier_is_drawn_with_both_classes_and_labelled_levels(drawn):
    figure, record = drawn()
    (ax,) = figure.axes
    test = record.gradients["split"] == "test"
    drawn_points = np.concatenate([c.get_offsets() for c in ax.collections if len(c.get_offsets()) > 1])
    expected = np.stack([record.gradients["x0"][test], record.gradients["x1"][test]], axis=1)
    assert sorted(map(tuple, drawn_points)) == sorted(map(tuple, expected))
    labels = [text.get_text() for text in ax.texts]
    assert "0" in labels
    assert len(labels) >= 4
    assert f"test accuracy {record.test['accuracy']:.4g}" in ax.get_title()
    assert "‖∇f‖₂: measured" in ax.get_title()
    assert ax.get_aspect() == 1


def test_a_fitted_curve_is_drawn_with_target_and_slope(drawn):
    figure, _ = drawn("dataset=absolute_value", "lipschitz=2", "constraint=linf", "constraint.p=inf")
    upper, lower = figure.axes
    target, f = (line.get_xydata() for line in upper.get_lines())
    assert np.allclose(target[:, 1], np.abs(target[:, 0]))
    slope = lower.get_lines()[0].get_xydata()
    between = np.diff(f[:, 1]) / np.diff(f[:, 0])  # the slope drawn is the slope of the curve drawn
    assert np.median(np.abs(between - slope[:-1, 1])) < 1e-9
    assert {line.get_ydata()[0] for line in lower.get_lines()[1:]} == {-2.0, 2.0}
    assert "‖∇f‖₁" in upper.get_title()


def test_a_constant_network_is_drawn_without_complaint(drawn):
    figure, _ = drawn("lipschitz=1e-30", "steps=0")
    assert figure.axes
