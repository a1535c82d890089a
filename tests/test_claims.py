"""What the blog post and Anil, Lucas and Grosse 2019 say, shown by training with the defaults: five seeds each.

These train full-size networks for minutes, so they are marked slow. Seeds of one setting are one stack, which
equals single runs (test_loop.py).
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from lipexp.evaluate import Evaluator
from lipexp.loop import fit
from lipexp.train import build, stack

pytestmark = pytest.mark.slow

SEEDS = range(5)
EVERY_L = (0.01, 0.1, 1, 10, 100)


@pytest.fixture(scope="module")
def records(compose):
    """records(overrides of one run, overrides of another, ...) -> their records, trained as one stack."""

    def train(*runs):
        members = stack([build(compose("device=cpu", "eval_every=0", *overrides)) for overrides in runs])
        return Evaluator(members).final(fit(members, lambda checkpoint: None))

    return train


def seeds(*overrides):
    return [(*overrides, f"seed={seed}") for seed in SEEDS]


def slopes(record):
    """f' at every point of a run on the line: its size is exact, its sign is that of the difference quotient."""
    order = np.argsort(record.gradients["x0"])
    x, f = record.gradients["x0"][order].astype(float), record.gradients["f"][order]
    size = record.gradients["grad_1"][order]
    sign = np.sign(np.gradient(f, x))
    return size * sign


@pytest.mark.parametrize("act", ["relu", "groupsort"])
def test_without_a_constraint_bce_classifies_and_is_steep(records, act):
    for record in records(*seeds("constraint=none", "loss=bce", f"act={act}")):
        assert record.test["accuracy"] >= 0.999
        assert record.measured.value > 10


@pytest.mark.parametrize("constraint", ["spectral", "linf"])
def test_at_l_1_bce_misclassifies_two_moons(records, constraint):
    accuracy = [r.test["accuracy"] for r in records(*seeds(f"constraint={constraint}", "loss=bce"))]
    assert 0.85 <= np.mean(accuracy) <= 0.94


@pytest.mark.parametrize("constraint", ["spectral", "linf"])
def test_hinge_classifies_two_moons_at_any_l(records, constraint):
    predictions = {}
    for lipschitz in EVERY_L:
        trained = records(*seeds(f"constraint={constraint}", "loss=hinge", f"lipschitz={lipschitz}"))
        assert all(record.test["accuracy"] >= 0.999 for record in trained)
        assert all(r.measured.value <= r.certificate.value <= lipschitz for r in trained)
        predictions[lipschitz] = [record.gradients["f"] > 0 for record in trained]
    for seed in SEEDS:
        agree = np.all([predictions[lipschitz][seed] == predictions[1][seed] for lipschitz in EVERY_L], axis=0)
        assert agree.mean() >= 0.999


@pytest.mark.parametrize(("constraint", "ceiling"), [("linf", 1 / 2), ("spectral", 1 / math.sqrt(3))])
def test_relu_cannot_fit_the_absolute_value(records, constraint, ceiling):
    """With two hidden layers norm-constrained ReLU reaches the half-range `ceiling` of slopes, and no more."""
    for record in records(*seeds("dataset=absolute_value", "act=relu", f"constraint={constraint}")):
        slope = slopes(record)
        half_range = (slope.max() - slope.min()) / 2
        assert 0.98 * ceiling <= half_range <= 1.001 * ceiling
        assert record.test["mse"] > 1e-2


def test_groupsort_fits_the_absolute_value_under_linf(records):
    for record in records(*seeds("dataset=absolute_value", "act=groupsort", "constraint=linf")):
        assert record.test["mse"] <= 1e-8
        assert np.median(np.abs(slopes(record))) >= 0.995


def test_groupsort_fits_the_absolute_value_under_spectral(records):
    trained = records(*seeds("dataset=absolute_value", "act=groupsort", "constraint=spectral"))
    assert np.median([record.test["mse"] for record in trained]) <= 1e-6
    assert np.median([np.median(np.abs(slopes(record))) for record in trained]) >= 0.995


@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize("act", ["relu", "maxmin", "fullsort"])
@pytest.mark.parametrize("constraint", ["spectral", "linf p=1", "linf p=2", "linf p=inf"])
def test_measured_is_at_most_certified_is_at_most_l(records, constraint, act, depth):
    name, *p = constraint.split()
    common = (f"constraint={name}", *(f"constraint.{argument}" for argument in p), f"act={act}")
    common = (*common, f"model.depth={depth}", "steps=300", "dataset.n_train=500", "dataset.n_test=500")
    for loss in ("bce", "hinge"):
        runs = [(*common, f"loss={loss}", f"lipschitz={value}") for value in (0.01, 1, 3, 100)]
        for record, lipschitz in zip(records(*runs), (0.01, 1, 3, 100), strict=True):
            assert record.measured.value <= record.certificate.value <= lipschitz
            assert record.certificate.verdict(record.measured.value) == "PASS"
            assert record.measured.value > 0
