"""lipexp certify on what comes from elsewhere: nothing in it is run, and what cannot be used is one line."""

from __future__ import annotations

import math
import pickle
import sys
from pathlib import Path

import pytest
import torch
from test_certify import edit, files, metrics

# Files from elsewhere --------------------------------------------------------------------------------------------


class Payload:
    """Unpickling an instance writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("save", ["pickle", "torch"])
def test_a_payload_in_model_pt_is_refused_and_not_run(lipexp, run, tmp_path, save):
    folder, victim = run(), tmp_path / "executed"
    if save == "pickle":
        (folder / "model.pt").write_bytes(pickle.dumps(Payload(victim)))
    else:
        torch.save({"layers.0.weight": Payload(victim)}, folder / "model.pt")
    before = files(folder)
    done = lipexp("certify", str(folder), "--attack", "--trust")
    assert done.code == 2
    assert len(done.err.splitlines()) == 1
    assert "is not a plain state dict" in done.err
    assert not victim.exists()
    assert files(folder) == before


FOREIGN = """
from pathlib import Path
Path("imported").touch()
from lipexp.activations import ReLU
from lipexp.constraints import Unconstrained
from lipexp.datasets import TwoMoons
"""


@pytest.mark.parametrize(
    ("group", "name"), [("act", "ReLU"), ("constraint", "Unconstrained"), ("dataset", "TwoMoons")]
)
def test_a_class_from_elsewhere_needs_trust(lipexp, run, group, name, monkeypatch, tmp_path):
    folder = run("act=relu", "constraint=none", "loss=bce")
    (tmp_path / "elsewhere.py").write_text(FOREIGN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "elsewhere", raising=False)
    config = folder / ".hydra" / "config.yaml"
    module = {"act": "activations", "constraint": "constraints", "dataset": "datasets"}[group]
    config.write_text(config.read_text().replace(f"lipexp.{module}.{name}", f"elsewhere.{name}"))
    before = files(folder)
    done = lipexp("certify", str(folder))
    assert done.code == 2
    assert f"{group}._target_=elsewhere.{name}: lies outside lipexp and runs code" in done.err
    assert "--trust" in done.err
    assert len(done.err.splitlines()) == 1
    assert not Path("imported").exists()
    assert files(folder) == before
    done = lipexp("certify", str(folder), "--trust")
    assert (done.code, done.err) == (0, "")
    assert Path("imported").exists()


def torch_save(change):
    return lambda folder: edit(folder, change)


def replace_config(old: str, new: str):
    def replace(folder: Path) -> None:
        path = folder / ".hydra" / "config.yaml"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new, 1))

    return replace


BROKEN = {
    "not finite": (
        torch_save(lambda state: state["layers.1.weight"].fill_(math.nan)),
        "holds numbers that are not finite",
    ),
    "float64": (
        torch_save(lambda state: {key: value.double() for key, value in state.items()}),
        "layers.0.weight is float64, not float32",
    ),
    "two outputs": (
        torch_save(lambda state: {**state, "layers.2.weight": torch.ones(2, 16), "layers.2.bias": torch.ones(2)}),
        "has 2 outputs; certify needs one",
    ),
    "other inputs": (
        torch_save(lambda state: {**state, "layers.0.weight": torch.ones(16, 5)}),
        "has 5 inputs, its dataset 2",
    ),
    "layers that do not fit": (
        torch_save(lambda state: {**state, "layers.1.weight": torch.ones(16, 8)}),
        "layers.1 takes 8 features, layers.0 gives 16",
    ),
    "odd groups": (
        torch_save(
            lambda state: {
                **{f"layers.{i}.weight": torch.ones(*shape) for i, shape in enumerate(((5, 2), (5, 5), (1, 5)))},
                **{f"layers.{i}.bias": torch.ones(n) for i, n in enumerate((5, 5, 1))},
            }
        ),
        "must be a multiple of",
    ),
    "no layers": (torch_save(lambda state: {}), "holds no such network"),
    "a list": (torch_save(lambda state: [1, 2, 3]), "holds no such network"),
    "no model": (lambda folder: (folder / "model.pt").unlink(), "is not a plain state dict"),
    "an empty model": (lambda folder: (folder / "model.pt").write_bytes(b""), "is not a plain state dict"),
    "no configuration": (lambda folder: (folder / ".hydra" / "config.yaml").unlink(), "no configuration that can"),
    "no act": (replace_config("act:", "ract:"), "act: needs an option with a _target_"),
    "an interpolation to nowhere": (replace_config("noise: 0.05", "noise: ${nowhere}"), "dataset: cannot be read"),
    "no seed": (replace_config("seed: 0", "seeed: 0"), "seed: must be a whole number"),
    "another class": (
        replace_config("lipexp.datasets.TwoMoons", "lipexp.losses.MSE"),
        "dataset._target_=lipexp.losses.MSE: does not take these arguments",
    ),
    "metrics that are cut": (
        lambda folder: (folder / "metrics.json").write_text("{"),
        "no metrics.json that can be",
    ),
    "metrics that are a list": (
        lambda folder: (folder / "metrics.json").write_text("[]"),
        "no metrics.json that can",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_run_that_cannot_be_used_is_one_line_and_left_alone(lipexp, run, name):
    damage, message = BROKEN[name]
    folder = run()
    damage(folder)
    before = files(folder)
    done = lipexp("certify", str(folder))
    assert done.code == 2
    assert message in done.err
    assert done.err.startswith(f"lipexp: {folder}: ")
    assert len(done.err.splitlines()) == 1, done.err
    assert files(folder) == before


def test_one_bad_run_does_not_keep_others_from_being_certified(lipexp, run, tmp_path):
    bad, good = run(name="all/0"), run(name="all/1")
    (bad / "model.pt").write_bytes(b"")
    done = lipexp("certify", str(tmp_path / "all"))
    assert done.code == 2
    assert "certify" in metrics(good)
    edit(good, lambda state: state["layers.2.weight"].mul_(1.5))
    assert lipexp("certify", str(tmp_path / "all")).code == 1  # a broken bound is the graver news


BAD_INPUT = {
    "nowhere": "RUN=nowhere: does not exist",
    "": "the following arguments are required: RUN",
    ". --gap 0": "--gap=0.0: must be a finite number above 0",
    ". --gap wide": "argument --gap: invalid float value: 'wide'",
    ". --max-seconds -1": "--max-seconds=-1.0: must be a finite number above 0",
    ". --radii 0.1,far": "--radii=0.1,far: must be numbers, such as 0.1,0.25",
    ". --radii 0.1,-1": "--radii=-1.0: must be a finite number above 0",
    ". --method magic": "argument --method: invalid choice: 'magic'",
    ".": "RUN=.: no finished run found there",
}


@pytest.mark.parametrize("command", BAD_INPUT)
def test_bad_input_is_one_line(lipexp, command):
    done = lipexp("certify", *command.split())
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"lipexp: {BAD_INPUT[command]}")
    assert len(done.err.splitlines()) == 1
