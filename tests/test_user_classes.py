"""A user's own classes, named in YAML: no change to lipexp, and a clear line where they do not fit."""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path

import pandas as pd
import pytest

DEBUG = ("experiment=debug", "device=cpu")

USER_CODE = """
    import torch
    from torch import nn

    class Householder(nn.Module):
        norms = (2,)

        def __init__(self, angle=1.0):
            super().__init__()
            self.angle = angle

        def forward(self, x):
            assert x.ndim == 3  # (K, B, H)
            a, b = x.chunk(2, dim=-1)
            c, s = torch.cos(torch.tensor(self.angle)).to(x), torch.sin(torch.tensor(self.angle)).to(x)
            reflect = torch.sin(torch.tensor(self.angle / 2)).to(x) * a > torch.cos(
                torch.tensor(self.angle / 2)
            ).to(x) * b
            return torch.cat([torch.where(reflect, c * a + s * b, a), torch.where(reflect, s * a - c * b, b)], -1)

    class Square(nn.Module):
        def forward(self, f, y):
            return (f - (2 * y - 1)).square()

    class Breaks(nn.Module):
        norms = (2,)

        def forward(self, x):
            raise RuntimeError("no such luck")
"""


@pytest.fixture
def user_code(lipexp):
    """A user's own classes beside them in my_package.py, and their options in my_conf/act/."""
    Path("my_package.py").write_text(textwrap.dedent(USER_CODE))
    folder = Path("my_conf/act")
    folder.mkdir(parents=True)
    (folder / "householder.yaml").write_text("_target_: my_package.Householder\nangle: 1.0\n")
    Path("my_conf/loss").mkdir()
    Path("my_conf/loss/square.yaml").write_text("_target_: my_package.Square\n")
    (folder / "tanh.yaml").write_text("_target_: torch.nn.Tanh\n")
    (folder / "breaks.yaml").write_text("_target_: my_package.Breaks\n")
    yield lipexp
    sys.modules.pop("my_package", None)


def test_a_users_activation_trains_under_the_norm_it_declares(user_code, run_folders):
    done = user_code("train", "-cd", "my_conf", "act=householder", "constraint=spectral", *DEBUG)
    assert done.code == 0, done.err
    (folder,) = run_folders()
    lipschitz = json.loads((folder / "metrics.json").read_text())["lipschitz"]
    assert lipschitz["verdict"] == "PASS"
    assert 0 < lipschitz["measured"] <= lipschitz["certified"] <= 1


@pytest.mark.parametrize("p", ["1", "2", "inf"])
def test_a_users_activation_is_refused_in_a_norm_it_does_not_declare(user_code, p, run_folders):
    done = user_code("train", "-cd", "my_conf", "act=householder", "constraint=linf", f"constraint.p={p}", *DEBUG)
    assert done.code == 2
    assert "act=householder: must be 1-Lipschitz in the inf-norm of the hidden space" in done.err
    assert not run_folders()


def test_an_activation_that_declares_nothing_trains_without_a_constraint_only(user_code, run_folders):
    refused = user_code("train", "-cd", "my_conf", "act=tanh", *DEBUG)
    assert refused.code == 2
    assert "it declares norms: none (constraint=none takes any activation)" in refused.err
    done = user_code("train", "-cd", "my_conf", "act=tanh", "constraint=none", *DEBUG)
    assert done.code == 0, done.err
    (folder,) = run_folders()
    lipschitz = json.loads((folder / "metrics.json").read_text())["lipschitz"]
    assert lipschitz["certified"] is None
    assert lipschitz["measured"] > 0
    assert "declares no bound" in lipschitz["method"]


def test_a_users_loss_needs_no_more_than_its_formula(user_code, run_folders):
    done = user_code("train", "-cd", "my_conf", "loss=square", *DEBUG)
    assert done.code == 0, done.err
    (folder,) = run_folders()
    table = pd.read_csv(folder / "gradients.csv").query("split == 'test'")
    loss = json.loads((folder / "metrics.json").read_text())["test"]["loss"]
    assert loss == pytest.approx(((table["f"] - (2 * table["y"] - 1)) ** 2).mean(), rel=1e-9)


def test_a_class_that_does_not_fit_its_group_is_refused(user_code):
    Path("my_conf/dataset").mkdir()
    Path("my_conf/dataset/wrong.yaml").write_text("_target_: my_package.Square\n")
    done = user_code("train", "-cd", "my_conf", "dataset=wrong")
    lacking = "dataset=wrong: cannot be used as dataset: it has no task, n_inputs, n_train, draw"
    assert (done.code, done.err) == (2, f"lipexp: {lacking}\n")


def test_an_error_in_a_users_class_fails_the_run_and_names_its_traceback(user_code):
    done = user_code("train", "-cd", "my_conf", "act=breaks", *DEBUG)
    assert done.code == 1
    assert done.err.startswith("lipexp: RuntimeError: no such luck (traceback in outputs/")
    assert len(done.err.splitlines()) == 1
    (log,) = Path("outputs").glob("*/*/train.log")
    assert "Traceback" in log.read_text()
    assert (log.parent / "failed.json").is_file()
