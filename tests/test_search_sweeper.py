"""Search: the space in Hydra's own grammar, trials that repeat, rounds that survive a kill, what remains."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import processes
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from sqlalchemy import NullPool

from lipexp.config import ConfigError
from lipexp.record import Outcome
from lipexp.sweep.launch import Sweep
from lipexp.sweep.search.options import SearchOptions
from lipexp.sweep.search.space import Space

SMALL = ("device=cpu", "steps=5", "eval_every=0", "model.width=8", "dataset.n_train=64", "dataset.n_test=32")
SEARCH = ("train", "-m", "hydra/sweeper=search", *SMALL, "batch_size=32", "max_regions=0", "hydra.sweep.dir=found")
LR, MARGIN = "optim.lr=tag(log,interval(1e-4,1e-1))", "loss.margin=interval(0,1)"


def space(*lines: str) -> Space:
    return Space.of(OverridesParser.create().parse_overrides(list(lines)))


def trials(folder: str = "found") -> list[optuna.trial.FrozenTrial]:
    storage = optuna.storages.RDBStorage(f"sqlite:///{folder}/study.db", {"poolclass": NullPool})
    return optuna.load_study(study_name="lipexp", storage=storage).trials


@dataclass
class Formula(Outcome):
    accuracy: float | None = None

    def results(self) -> dict[str, Any]:
        return super().results() | {"test.accuracy": self.accuracy}


@pytest.fixture
def search(lipexp, monkeypatch):
    """search(accuracy, ...) searches without training: the accuracy of a run is a function of its configuration."""

    def call(accuracy: Callable[[dict[str, Any]], float | None], *arguments: str) -> Any:
        def run(sweep: Sweep) -> list[Outcome]:
            return [Formula("ok", accuracy=accuracy(job.resolved)) for job in sweep.jobs.values()]

        with monkeypatch.context() as patch:
            patch.setattr(Sweep, "run", run)
            return lipexp(*SEARCH, "hydra.launcher.executor=inline", *arguments)

    return call


def bowl(config: dict[str, Any]) -> float:
    return -((config["loss"]["margin"] - 0.3) ** 2) - 0.1 * (config["lipschitz"] - 2) ** 2


@pytest.mark.parametrize(
    ("sweep", "distribution"),
    [
        ("interval(0.1,0.5)", FloatDistribution(0.1, 0.5)),
        ("tag(log,interval(1e-4,1e-1))", FloatDistribution(1e-4, 1e-1, log=True)),
        ("interval(8,64)", FloatDistribution(8.0, 64.0)),
        ("int(interval(8,64))", IntDistribution(8, 64)),
        ("int(tag(log,interval(8,64)))", IntDistribution(8, 64, log=True)),
        ("range(16,65,16)", IntDistribution(16, 64, step=16)),
        ("range(5,0,-2)", IntDistribution(1, 5, step=2)),
        ("range(3)", IntDistribution(0, 2)),
        ("range(0.58,0.36,-0.01)", FloatDistribution(0.37, 0.58, step=0.01)),
        ("relu,maxmin,relu", CategoricalDistribution(("relu", "maxmin"))),
        ("choice([1,2],[3])", CategoricalDistribution(("[1,2]", "[3]"))),
    ],
)
def test_hydras_grammar_as_distributions(sweep, distribution):
    assert space(f"a={sweep}").axes == {"a": distribution}


def test_settings_stay_in_their_order_and_seeds_are_runs_of_every_trial():
    found = space("steps=3", "act=relu,maxmin", "loss.margin=interval(0.1,0.5)", "+x=1", "seed=range(2)")
    lines = ["steps=3", "+x=1", "act=maxmin", "loss.margin=0.25"]
    assert found.jobs({"act": "maxmin", "loss.margin": 0.25}) == [[*lines, "seed=0"], [*lines, "seed=1"]]
    assert space("+w=int(interval(8,64))").jobs({"+w": 9}) == [["+w=9"]]


REFUSED_SPACES = {
    "": "hydra/sweeper=search: has nothing to search",
    "steps=3 seed=range(4)": "hydra/sweeper=search: has nothing to search",
    "a=interval(2,1)": "a=interval(2,1): `low <= high` must hold",
    "a=tag(log,interval(0,1))": "a=tag(log,interval(0,1)): `low > 0` must hold",
    "a=tag(log,range(1,9))": "a=tag(log,range(1,9)): a search takes tag(log, …) with an interval, and no shuffle",
    "a=shuffle(1,2)": "a=shuffle(1,2): a search takes tag(log, …) with an interval, and no shuffle",
    "a=range(3,3)": "a=range(3,3): the range is empty",
    "seed=interval(0,9) a=1,2": "seed=interval(0,9): is averaged over",
    "~a b=1,2": "~a: cannot be part of a search",
}


@pytest.mark.parametrize("lines", REFUSED_SPACES)
def test_a_space_that_cannot_be_searched_is_refused(lines):
    with pytest.raises(ConfigError) as caught:
        space(*lines.split())
    assert str(caught.value).startswith(REFUSED_SPACES[lines])


@pytest.mark.parametrize(
    ("options", "task", "goal"),
    [
        ({}, "classification", ("test.accuracy", "maximize")),
        ({}, "regression", ("test.mse", "minimize")),
        ({}, "transport", ("test.score", "maximize")),
        ({"metric": "train.loss"}, "classification", ("train.loss", "minimize")),
        ({"metric": "robustness.certified_accuracy.0.4"}, "classification", None),
        ({"metric": "lipschitz.exact", "direction": "minimize"}, "regression", ("lipschitz.exact", "minimize")),
    ],
)
def test_the_direction_is_known_or_given(options, task, goal):
    assert SearchOptions(**options).goal(task, [0.4]) == (goal or (options["metric"], "maximize"))


# Rounds, without training ----------------------------------------------------------------------------------------


def test_a_search_finds_a_bowl_and_the_importance_of_its_axes(search):
    """The second half of the trials is better than the first, and the margin matters more than L."""
    done = search(bowl, MARGIN, "lipschitz=interval(1.5,2.5)", "hydra.sweeper.trials=60", "hydra.sweeper.round=12")
    assert done.code == 0, done.err
    values = pd.Series([trial.value for trial in trials()])
    assert values[30:].median() > values[:30].median() / 2
    (line,) = [line for line in done.out.splitlines() if line.startswith("importance: loss.margin ")]
    assert float(line.split()[2]) > 0.8
    assert f"round 5 of 5: 60 trials, best test.accuracy {values.max():.6g} (trial {values.idxmax()})" in done.out


def interrupted_at(call: int, function: Callable[..., Any]) -> Callable[..., Any]:
    calls = itertools.count()

    def interrupted(*arguments: Any) -> Any:
        if next(calls) == call:
            raise KeyboardInterrupt
        return function(*arguments)

    return interrupted


@pytest.mark.parametrize("kind", [optuna.samplers.TPESampler, optuna.samplers.RandomSampler])
@pytest.mark.parametrize("asking", [True, False])
def test_an_interrupted_search_goes_on_with_the_same_trials(search, monkeypatch, kind, asking):
    """Interrupted in its second round, between the two values of a trial or while it trains."""
    sampler = "tpe" if kind is optuna.samplers.TPESampler else "random"
    arguments = (MARGIN, "lipschitz=1,2,3", "seed=0,1", f"hydra.sweeper.sampler={sampler}")
    arguments += ("hydra.sweeper.trials=15", "hydra.sweeper.round=6")
    for seed in (0, 1):
        assert search(bowl, *arguments, f"hydra.sweeper.seed={seed}", f"hydra.sweep.dir=whole{seed}").code == 0
    with monkeypatch.context() as patch:
        if asking:
            patch.setattr(kind, "sample_independent", interrupted_at(13, kind.sample_independent))
        assert search(bowl if asking else interrupted_at(13, bowl), *arguments).code == 130
    assert len(trials()) == (6 if asking else 12)
    assert search(bowl, *arguments, "resume=true").code == 0
    found, whole, other = ([trial.params for trial in trials(name)] for name in ("found", "whole0", "whole1"))
    assert found == whole != other
    pd.testing.assert_frame_equal(pd.read_csv("found/sweep.csv"), pd.read_csv("whole0/sweep.csv"))


def test_a_larger_number_of_trials_goes_on_where_the_search_ended(search):
    assert search(bowl, MARGIN, "hydra.sweeper.round=2", "hydra.sweeper.trials=3").code == 0
    before = pd.read_csv("found/sweep.csv")
    assert search(bowl, MARGIN, "hydra.sweeper.round=2", "hydra.sweeper.trials=5", "resume=true").code == 0
    after = pd.read_csv("found/sweep.csv")
    assert after["round"].tolist() == [0, 0, 1, 2, 2]
    pd.testing.assert_frame_equal(after[:3], before)


def test_after_the_first_round_a_few_trials_at_a_time_differ_in_real_numbers_only(search):
    axes = (LR, MARGIN, "act=relu,maxmin,groupsort", "model.width=range(8,33,8)")
    options = ("hydra.sweeper.trials=12", "hydra.sweeper.round=6", "hydra.sweeper.stack=3")
    assert search(bowl, *axes, *options).code == 0
    params = pd.DataFrame([trial.params for trial in trials()])
    for first in (6, 9):
        assert params[first : first + 3].nunique().tolist() == [3, 3, 1, 1]
    assert len(params[:6].drop_duplicates(["act", "model.width"])) > 2
    # Without real numbers, trials that agreed in all others would be the same.
    assert search(bowl, "lipschitz=range(1,1000)", *options, "hydra.sweep.dir=whole").code == 0
    assert len({trial.params["lipschitz"] for trial in trials("whole")}) > 6


def test_trials_without_a_value_are_ordinary_unless_all_are(search):
    done = search(lambda config: None if config["act"]["_target_"].endswith("ReLU") else 0.5, "act=relu,maxmin")
    states = {trial.params["act"]: trial.state.name for trial in trials()}
    assert (done.code, states) == (0, {"maxmin": "COMPLETE", "relu": "PRUNED"})
    assert "trials have no value; sweep.csv says why" in done.out
    rows = pd.read_csv("found/sweep.csv").set_index("act")["reason"]
    assert set(rows["relu"]) == {"test.accuracy is null"}
    done = search(lambda config: None, "act=relu,maxmin", "hydra.sweep.dir=none")
    assert (done.code, done.err) == (1, "lipexp: no trial has a value: test.accuracy is null\n")


def test_the_picture_rings_the_best_trial_in_a_panel_for_each_axis(search, monkeypatch):
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: (figures.append(figure), path.touch()))
    assert search(bowl, LR, MARGIN, "act=relu,maxmin", "seed=0,1", "hydra.sweeper.trials=6").code == 0
    assert [ax.get_xlabel() for ax in figures[0].axes] == ["trial", "optim.lr", "loss.margin", "act"]
    for ax in figures[0].axes:
        points, ring = (collection.get_offsets() for collection in ax.collections)
        assert max(points.tolist(), key=lambda point: point[1]) == ring.tolist()[0]


# The command -----------------------------------------------------------------------------------------------------


def test_a_search_leaves_runs_a_table_a_picture_and_its_best(lipexp):
    """In worker processes, in a folder whose name has characters of a URL, with an experiment of the user."""
    settings = (
        "experiment=debug",
        "radii=[0.1,0.2]",
        "seed=3,4",
        "hydra.sweeper.trials=5",
        "hydra.sweeper.round=3",
    )
    metric = "robustness.certified_accuracy.0.1"
    options = (f"hydra.sweeper.metric={metric}", "hydra.launcher.executor=process", "hydra.sweep.dir='what? %20'")
    done = lipexp(
        *SEARCH[:-1], *settings, *options, LR, "act=relu,maxmin", "optim.lr=1e-3,1e30", "constraint=none"
    )
