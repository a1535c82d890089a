"""Finished and failed runs made by hand, and `lipexp report` on them: fixtures of the tests of the report."""

from __future__ import annotations

import csv
import io
import json

import pytest
import yaml

from lipexp.report import main

CLASSES = {"relu": "lipexp.activations.ReLU", "groupsort": "lipexp.activations.GroupSort"}


def configuration(act="relu", seed=0, **changes):
    """A configuration as Hydra stores it; changes are dotted keys with __ for the dot."""
    config = {
        "seed": seed,
        "lipschitz": 1.0,
        "dataset": {"_target_": "lipexp.datasets.TwoMoons", "noise": 0.05},
        "act": {"_target_": CLASSES[act]} | ({"n_groups": None} if act == "groupsort" else {}),
        "constraint": {"_target_": "lipexp.constraints.Spectral", "lipschitz": "${lipschitz}"},
        "loss": {"_target_": "lipexp.losses.Hinge", "margin": 0.5, "lipschitz": "${lipschitz}"},
        "model": {"_target_": "lipexp.models.MLP", "width": 16},
        "optim": {"_target_": "lipexp.optim.Adam", "lr": 0.01, "betas": [0.9, 0.99]},
    }
    for key, value in changes.items():
        *path, last = key.split("__")
        node = config
        for part in path:
            node = node[part]
        node[last] = value
    return config


def record(folder, config, **choices):
    """Write .hydra/ as Hydra does."""
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    names = {"dataset": "two_moons", "constraint": "spectral", "loss": "hinge", "model": "mlp", "optim": "adam"}
    hydra = {"hydra": {"runtime": {"choices": {**names, **choices, "hydra/env": "default", "experiment": None}}}}
    (folder / ".hydra" / "hydra.yaml").write_text(yaml.safe_dump(hydra))


def measured_as(score=0.9, *, metric="accuracy", measured=0.75, certified=0.9999971, median=0.5, **more):
    return {
        "test": {"loss": 0.25, metric: score},
        "gradient_norm": {"q": 2, "median": median, "argmax": [0.5, -0.25]},
        "lipschitz": {
            "q": 2,
            "target": 1.0,
            "measured": measured,
            "certified": certified,
            "exact": None,
            "verdict": "PASS",
        },
        **more,
    }


@pytest.fixture
def outputs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").mkdir()
    return tmp_path / "outputs"


@pytest.fixture
def run(outputs):
    """run("name", score, act="relu", seed=1, ...) makes a finished run; keys with __ change its configuration."""

    def run(name, score=0.9, *, act="relu", seed=0, result=None, choices=None, **changes):
        folder = outputs / name
        record(folder, configuration(act, seed, **changes), act=act, **(choices or {}))
        content = {"schema": 1, "seed": seed, **measured_as(score, **(result or {}))}
        (folder / "metrics.json").write_text(json.dumps(content))
        return folder

    return run


@pytest.fixture
def fail(outputs):
    def fail(name, reason="the loss is no longer finite", act="relu", seed=0, **changes):
        folder = outputs / name
        record(folder, configuration(act, seed, **changes), act=act)
        (folder / "failed.json").write_text(json.dumps({"reason": reason, "step": 2}))

    return fail


@pytest.fixture
def report(capsys):
    """report("--by", "act") -> what it prints; anything on stderr or another exit status is an error."""

    def report(*arguments):
        assert main(list(arguments)) == 0
        printed = capsys.readouterr()
        assert printed.err == ""
        return printed.out

    return report


@pytest.fixture
def refused(capsys):
    """refused("--by", "akt") -> the one line on stderr of an exit with status 2."""

    def refused(*arguments):
        assert main(list(arguments)) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        (line,) = printed.err.splitlines()
        assert line.startswith("lipexp: ")
        return line.removeprefix("lipexp: ")

    return refused


def table(printed):
    """The rows of a printed CSV as dicts."""
    return list(csv.DictReader(io.StringIO(printed)))


def order(printed):
    """The runs of a table from top to bottom, each under the name of its folder."""
    lines = printed.splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("run "))
    return [line.split()[0] for line in lines[start + 1 :]]
