"""A user's own classes, named in YAML: no change to lipexp, and a clear line where they break."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from commands import INLINE, TINY, metrics, statuses

USER_CODE = """
from torch import nn, cat

class Rotation(nn.Module):
    norms = (2,)

    def forward(self, x):
        assert x.ndim == 3  # (K, B, H)
        a, b = x.chunk(2, dim=-1)
        return cat([0.6 * a - 0.8 * b, 0.8 * a + 0.6 * b], -1).abs()

class Breaks(nn.Module):
    norms = (2,)

    def forward(self, x):
        raise RuntimeError("no such luck")
"""


@pytest.fixture
def train(lipexp):
    """train("act=rotation") -> Result: the command where my_package.py and my_conf/ lie beside the user."""
    Path("my_package.py").write_text(USER_CODE)
    Path("my_conf/act").mkdir(parents=True)
    targets = {"rotation": "my_package.Rotation", "plain": "torch.nn.Tanh", "breaks": "my_package.Breaks"}
    for option, target in targets.items():
        Path(f"my_conf/act/{option}.yaml").write_text(f"_target_: {target}\n")
    yield lambda *overrides: lipexp("train", "-cd", "my_conf", *overrides, *TINY)
    sys.modules.pop("my_package", None)


def test_a_users_activation_trains_under_the_norm_it_declares_and_no_other(train, run_folders):
    for p in ("1", "2", "inf"):
        refused = train("act=rotation", "constraint=linf", f"constraint.p={p}")
        assert refused.code == 2
        assert "act=rotation: must be 1-Lipschitz in the inf-norm of the hidden space" in refused.err
    done = train("act=rotation", "constraint=spectral")
    assert done.code == 0, done.err
    lipschitz = metrics(*run_folders())["lipschitz"]
    assert lipschitz["verdict"] == "PASS"
    assert 0 < lipschitz["measured"] <= lipschitz["certified"] <= 1


def test_an_activation_that_declares_nothing_trains_without_a_constraint_only(train, run_folders):
    refused = train("act=plain")
    assert refused.code == 2
    assert "it declares norms: none (constraint=none takes any activation)" in refused.err
    done = train("act=plain", "constraint=none")
    assert done.code == 0, done.err
    lipschitz = metrics(*run_folders())["lipschitz"]
    assert (lipschitz["certified"], lipschitz["method"], lipschitz["verdict"]) == (None, "none", "OPEN")
    assert "declares no bound" in lipschitz["reason"]
    assert lipschitz["measured"] > 0


def test_an_error_in_a_users_class_fails_the_run_and_names_its_traceback(train):
    done = train("act=breaks")
    assert done.code == 1
    assert done.err.startswith("lipexp: RuntimeError: no such luck (traceback in outputs/")
    assert len(done.err.splitlines()) == 1
    (log,) = Path("outputs").glob("*/*/train.log")
    assert "Traceback" in log.read_text()
    assert "RuntimeError: no such luck" in (log.parent / "failed.json").read_text()


UNUSUAL = """
import torch
from torch import nn

class Silent(nn.Module):
    norms = (2,)

    def __init__(self):
        raise TypeError

class Unprintable(nn.Module):
    norms = (2,)

    def __init__(self):
        super().__init__()

        class Error(Exception):
            def __str__(self):
                raise RuntimeError

        raise Error

class NoNorms(nn.ReLU):
    norms = None

class OddSlopes(nn.ReLU):
    norms, slopes = (2,), (float("nan"), 1)
"""


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("act._target_=unusual.Silent", "act._target_=unusual.Silent: does not take these arguments:"),
        ("act._target_=unusual.Unprintable", "cannot be used: Error: its text cannot be printed"),
        ("act._target_=unusual.NoNorms", "act=NoNorms: declares norms = None; a p-norm is 1, 2 or inf"),
        ("act._target_=unusual.OddSlopes", "act=OddSlopes: declares slopes = (nan, 1); they are the least"),
        ("loss._target_=torch.nn.SoftMarginLoss", "must return one number per sample"),
    ],
)
def test_what_is_wrong_with_a_users_class_is_one_line_and_others_of_the_sweep_go_on(lipexp, setting, message):
    Path("unusual.py").write_text(UNUSUAL)
    key = setting.partition("=")[0]
    sound = {"act": "torch.nn.ReLU", "loss": "lipexp.losses.MSE"}[key.partition(".")[0]]
    usual = ("act=relu", "constraint=none", "loss=mse", "dataset=absolute_value", "~loss.lipschitz")
    done = lipexp("train", *TINY, *usual, setting)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert message in done.err
    done = lipexp("train", "-m", INLINE, *TINY, *usual, f"{setting},{sound}", "hydra.sweep.dir=s")
    sys.modules.pop("unusual", None)
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert message in done.err
    assert statuses(Path("s")) == ["failed", "ok"]
