"""What the blog post and Anil, Lucas and Grosse 2019 say beyond the claims of the figures: five seeds each.

These train full-size networks for minutes, so they are marked slow. Seeds of one setting are one stack, which
equals single runs (test_loop.py).
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lipexp.evaluate import Evaluator
from lipexp.loop import fit
from lipexp.members import build, stack

pytestmark = pytest.mark.slow

EVERY_L = (0.01, 0.1, 1, 10, 100)


@pytest.fixture(scope="module")
def evaluations(compose):
    """evaluations(overrides of one run, overrides of another, ...) -> what is found of each run of that stack."""

    def train(*runs):
        members = stack([build(compose("device=cpu", "eval_every=0", *overrides)) for overrides in runs])
        return Evaluator(members).final(fit(members, lambda checkpoint: None))

    return train


@pytest.mark.parametrize("constraint", ["spectral", "linf"])
def test_hinge_classifies_two_moons_alike_at_any_l(evaluations, constraint):
    classes = []
    for lipschitz in EVERY_L:
        runs = [(f"constraint={constraint}", f"lipschitz={lipschitz}", f"seed={seed}") for seed in range(5)]
        trained = evaluations(*runs)
        assert all(found.scores["test"]["accuracy"] >= 0.999 for found in trained)
        assert all(found.measured.value <= found.certificate.value <= lipschitz for found in trained)
        classes.append([found.gradients["f"] > 0 for found in trained])
    agree = (np.array(classes) == classes[EVERY_L.index(1)]).all(axis=0)  # (seed, point)
    assert (agree.mean(axis=1) >= 0.999).all()


@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize("act", ["relu", "maxmin", "fullsort"])
@pytest.mark.parametrize("constraint", ["spectral", "linf p=1", "linf p=2", "linf p=inf"])
def test_measured_is_at_most_certified_is_at_most_l(evaluations, constraint, act, depth):
    name, *p = constraint.split()
    common = (f"constraint={name}", *(f"constraint.{argument}" for argument in p), f"act={act}")
    common = (*common, f"model.depth={depth}", "steps=300", "dataset.n_train=500", "dataset.n_test=500")
    values = (0.01, 1, 3, 100)
    for loss in ("bce", "hinge"):
        runs = [(*common, f"loss={loss}", f"lipschitz={value}") for value in values]
        for found, lipschitz in zip(evaluations(*runs), values, strict=True):
            assert 0 < found.measured.value <= found.certificate.value <= lipschitz
            assert found.certificate.verdict(found.measured) == "PASS"


def test_a_network_that_may_only_rise_follows_fewer_outliers(evaluations):
    x = torch.linspace(0.25, 4, 1000).double().view(1, -1, 1)
    errors, falls = [], []
    for monotone in ("null", "{x0:1}"):
        runs = [("experiment=monotone", f"model.monotone={monotone}", f"seed={seed}") for seed in range(5)]
        trained = evaluations(*runs)
        errors.append([found.scores["test"]["mse"] for found in trained])
        falls.append([bool((found.network.double(x)[0, :, 0].diff() < 0).any()) for found in trained])
    assert falls == [[True] * 5, [False] * 5]
    assert (np.array(errors[1]) < errors[0]).all()
