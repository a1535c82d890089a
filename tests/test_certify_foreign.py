"""lipexp certify on what comes from elsewhere: nothing in it is run, and what cannot be used is one line."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from commands import content, edit, metrics

FOREIGN = """
from pathlib import Path
Path("imported").touch()
from lipexp.activations import ReLU
from lipexp.constraints import Unconstrained
from lipexp.datasets import TwoMoons
"""


@pytest.mark.parametrize("target", ["activations.ReLU", "constraints.Unconstrained", "datasets.TwoMoons"])
def test_a_class_from_elsewhere_needs_trust(lipexp, run, target, monkeypatch, tmp_path):
    folder = run("act=relu", "constraint=none", "loss=bce", "max_regions=0")
    (tmp_path / "elsewhere.py").write_text(FOREIGN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "elsewhere", raising=False)
    replaced = f"elsewhere.{target.rpartition('.')[2]}"
    replace_config(f"lipexp.{target}", replaced)(folder)
    before = content(folder)
    done = lipexp("certify", str(folder))
    assert done.code == 2
    assert f"._target_={replaced}: lies outside lipexp and runs code" in done.err
    assert "--trust" in done.err
    assert len(done.err.splitlines()) == 1
    assert not Path("imported").exists()
    assert content(folder) == before
    done = lipexp("certify", str(folder), "--trust")
    assert (done.code, done.err) == (0, "")
    assert Path("imported").exists()


def replace_config(old: str, new: str):
    def replace(folder: Path) -> None:
        path = folder / ".hydra" / "config.yaml"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new, 1))

    return replace


def saved(change):
    return lambda folder: edit(folder, change)


def recorded(text: str):
    return lambda folder: (folder / "metrics.json").write_text(text)


TWO = {"layers.2.weight": torch.ones(2, 16), "layers.2.bias": torch.ones(2)}
TWO_MOONS, MSE = "lipexp.datasets.TwoMoons", "lipexp.losses.MSE"
BROKEN = {
    "not finite": (saved(lambda s: s["layers.1.weight"].fill_(math.nan)), "holds numbers that are not finite"),
    "two outputs": (saved(lambda s: s | TWO), "has 2 outputs; certify needs one"),
    "other inputs": (saved(lambda s: s | {"layers.0.weight": torch.ones(16, 5)}), "has 5 inputs, its dataset 2"),
    "no act": (replace_config("act:", "ract:"), "act: needs an option with a _target_"),
    "an interpolation to nowhere": (replace_config("noise: 0.05", "noise: ${nowhere}"), "dataset: cannot be read"),
    "no seed": (replace_config("seed: 0", "seeed: 0"), "seed: must be a whole number"),
    "another class": (replace_config(TWO_MOONS, MSE), f"dataset._target_={MSE}: does not take these arguments"),
    "an older schema": (recorded('{"schema": 1}'), "its schema is 1, this lipexp reads 2: train it again"),
    "metrics that are cut": (recorded("{"), "no metrics.json that can be read"),
    "metrics that are a list": (recorded("[]"), "no metrics.json that can be read"),
    "an empty model": (lambda folder: (folder / "model.pt").write_bytes(b""), "is not a plain state dict"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_run_that_cannot_be_used_is_one_line_and_left_alone(lipexp, run, name):
    damage, message = BROKEN[name]
    folder = run("max_regions=0")
    damage(folder)
    before = content(folder)
    done = lipexp("certify", str(folder), "--attack")
    assert done.code == 2
    assert message in done.err
    assert done.err.startswith(f"lipexp: {folder}: ")
    assert len(done.err.splitlines()) == 1, done.err
    assert content(folder) == before


def test_one_bad_run_does_not_keep_others_from_being_certified(lipexp, run, tmp_path):
    bad, good = (run("max_regions=0", name=f"all/{i}") for i in range(2))
    (bad / "model.pt").write_bytes(b"")
    done = lipexp("certify", str(tmp_path / "all"))
    assert done.code == 2
    assert metrics(good)["certify"]
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
