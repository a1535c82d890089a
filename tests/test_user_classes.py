"""A user's own classes, named in YAML: no change to lipexp, and a clear line where they do not fit."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pandas as pd
import pytest
from commands import TINY

USER_CODE = """
import math
from torch import nn, cat, where

class Householder(nn.Module):  # reflects (a, b) into a half plane; Singla, Singla and Feizi 2022
    norms = (2,)

    def __init__(self, angle=1.0):
        super().__init__()
        self.angle = angle

    def forward(self, x):
        assert x.ndim == 3  # (K, B, H)
        a, b = x.chunk(2, dim=-1)
        c, s = math.cos(self.angle), math.sin(self.angle)
        reflect = math.sin(self.angle / 2) * a > math.cos(self.angle / 2) * b
        return cat([where(reflect, c * a + s * b, a), where(reflect, s * a - c * b, b)], -1)

class Square(nn.Module):
    def forward(self, f, y):
        return (f - (2 * y - 1)).square()

class Breaks(nn.Module):
    norms = (2,)

    def forward(self, x):
        raise RuntimeError("no such luck")
"""


@pytest.fixture
def train(lipexp):
    """train("act=householder") -> Result: the command where my_package.py and my_conf/ lie beside the user."""
    Path("my_package.py").write_text(USER_CODE)
    targets = {"act/householder": "my_package.Householder", "act/tanh": "torch.nn.Tanh"}
    targets |= {"act/breaks": "my_package.Breaks", "loss/square": "my_package.Square"}
    for option, target in (targets | {"dataset/wrong": "my_package.Square"}).items():
        file = Path(f"my_conf/{option}.yaml")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"_target_: {target}\n")
    yield lambda *overrides: lipexp("train", "-cd", "my_conf", *overrides, *TINY)
    sys.modules.pop("my_package", None)


@pytest.fixture
def metrics(run_folders):
    """metrics() -> metrics.json of the only run."""

    def read():
        (folder,) = run_folders()
        return json.loads((folder / "metrics.json").read_text())

    return read


def test_a_users_activation_trains_under_the_norm_it_declares_and_no_other(train, metrics):
    for p in ("1", "2", "inf"):
        refused = train("act=householder", "constraint=linf", f"constraint.p={p}")
        assert refused.code == 2
        assert "act=householder: must be 1-Lipschitz in the inf-norm of the hidden space" in refused.err
    done = train("act=householder", "constraint=spectral")
    assert done.code == 0, done.err
    lipschitz = metrics()["lipschitz"]
    assert lipschitz["verdict"] == "PASS"
    assert 0 < lipschitz["measured"] <= lipschitz["certified"] <= 1


def test_an_activation_that_declares_nothing_trains_without_a_constraint_only(train, metrics):
    refused = train("act=tanh")
    assert refused.code == 2
    assert "it declares norms: none (constraint=none takes any activation)" in refused.err
    done = train("act=tanh", "constraint=none")
    assert done.code == 0, done.err
    lipschitz = metrics()["lipschitz"]
    assert (lipschitz["certified"], lipschitz["method"]) == (None, "none")
    assert "declares no bound" in lipschitz["reason"]
    assert lipschitz["measured"] > 0


def test_a_users_loss_needs_no_more_than_its_formula(train, metrics, run_folders):
    assert train("loss=square").code == 0
    points = pd.read_csv(run_folders()[0] / "gradients.csv").query("split == 'test'")
    expected = ((points["f"] - (2 * points["y"] - 1)) ** 2).mean()
    assert metrics()["test"]["loss"] == pytest.approx(expected, rel=1e-9)


def test_a_class_that_does_not_fit_its_group_is_refused(train, lipexp):
    refused = "lipexp: dataset=wrong: cannot be used as dataset: it does not derive from lipexp.datasets.Dataset\n"
    assert lipexp("train", "-cd", "my_conf", "dataset=wrong") == (2, "", refused)


def test_an_error_in_a_users_class_fails_the_run_and_names_its_traceback(train):
    done = train("act=breaks")
    assert done.code == 1
    assert done.err.startswith("lipexp: RuntimeError: no such luck (traceback in outputs/")
    assert len(done.err.splitlines()) == 1
    (log,) = Path("outputs").glob("*/*/train.log")
    assert "Traceback" in log.read_text()
    assert json.loads((log.parent / "failed.json").read_text())["reason"] == "RuntimeError: no such luck"
