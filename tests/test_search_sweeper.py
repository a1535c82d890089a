"""Search: the space in Hydra's own grammar, trials that repeat, rounds that survive a kill, what remains."""

from __future__ import annotations

import itertools
import shlex
import signal
import sqlite3
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pandas as pd
import pytest
from commands import INLINE, TINY, WAITING, metrics
from hydra.core.override_parser.overrides_parser import OverridesParser
from matplotlib.figure import Figure
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from sqlalchemy import NullPool

from lipexp.sweep.launch import Sweep, exclusive
from lipexp.sweep.search.options import WARNING, SearchOptions
from lipexp.sweep.search.space import Space

SEARCH = ("train", "-m", "hydra/sweeper=search", *TINY, "hydra.sweep.dir=found")
LR, MARGIN = "optim.lr=tag(log,interval(1e-4,1e-1))", "loss.margin=interval(0.1,0.9)"


def trials(folder: str = "found") -> list[optuna.trial.FrozenTrial]:
    storage = optuna.storages.RDBStorage(f"sqlite:///{folder}/study.db", {"poolclass": NullPool})
    return optuna.load_study(study_name="lipexp", storage=storage).trials


@pytest.fixture
def search(lipexp, monkeypatch):
    """search(accuracy, …) searches without training: the accuracy of a run is a function of its configuration."""

    def call(accuracy: Callable[[dict[str, Any]], float | None], *arguments: str) -> Any:
        def run(sweep: Sweep) -> list[SimpleNamespace]:
            rows = [{"val.accuracy": accuracy(job.resolved)} for job in sweep.jobs.values()]
            return [SimpleNamespace(results=lambda row=row: {"status": "ok", "reason": "", **row}) for row in rows]

        monkeypatch.setattr(Sweep, "run", run)
        return lipexp(*SEARCH, INLINE, *arguments)

    return call


def bowl(config: dict[str, Any]) -> float:
    return -((config["loss"]["margin"] - 0.3) ** 2) - 0.1 * (config["lipschitz"] - 2) ** 2


def test_hydras_grammar_as_distributions():
    expected = {
        "interval(8,64)": FloatDistribution(8.0, 64.0),
        "tag(log,interval(1e-4,1e-1))": FloatDistribution(1e-4, 1e-1, log=True),
        "int(tag(log,interval(8,64)))": IntDistribution(8, 64, log=True),
        "range(16,65,16)": IntDistribution(16, 64, step=16),
        "range(5,0,-2)": IntDistribution(1, 5, step=2),
        "range(0.58,0.36,-0.01)": FloatDistribution(0.37, 0.58, step=0.01),
        "relu,maxmin,relu": CategoricalDistribution(("relu", "maxmin")),
        "choice([1,2],[3])": CategoricalDistribution(("[1,2]", "[3]")),
    }
    lines = [f"{name}={sweep}" for name, sweep in zip("abcdefgh", expected, strict=True)]
    axes = Space.of(OverridesParser.create().parse_overrides(lines)).axes
    assert list(axes.values()) == list(expected.values())


def test_the_metric_and_its_direction_are_known():
    for task, goal in (("regression", ("val.mse", "minimize")), ("transport", ("val.score", "maximize"))):
        assert SearchOptions().goal(task, []) == goal
    for metric, direction in (("train.loss", "minimize"), ("robustness.val.certified_accuracy.0.4", "maximize")):
        assert SearchOptions(metric=metric).goal("classification", [0.4]) == (metric, direction)


def test_a_search_finds_a_bowl_and_the_importance_of_its_axes(search):
    """The second half of the trials is better than the first, and the margin matters more than L."""
    done = search(bowl, MARGIN, "lipschitz=interval(1.5,2.5)", "hydra.sweeper.trials=40", "hydra.sweeper.round=8")
    assert done.code == 0, done.err
    values = pd.Series([trial.value for trial in trials()])
    assert values[20:].median() > values[:20].median() / 2
    assert float(done.out.split("importance: loss.margin ")[1].split()[0]) > 0.8
    assert f"round 5 of 5: 40 trials, best val.accuracy {values.max():.6g} (trial {values.idxmax()})" in done.out


def test_a_search_on_the_test_set_is_warned_of_wherever_its_result_is_read(lipexp, search):
    metric = "robustness.test.certified_accuracy.0.1"
    small = (MARGIN, INLINE, "hydra.sweeper.trials=2", f"hydra.sweeper.metric={metric}", "hydra.sweep.dir=unfair")
    done = lipexp(*SEARCH, *small)
    assert done.code == 0
    assert done.err.startswith(f"lipexp: hydra.sweeper.metric={metric}: chosen on the test set")
    assert WARNING in " ".join(done.out.split())
    assert WARNING in Path("unfair/experiment/best.yaml").read_text()
    done = search(bowl, MARGIN, "hydra.sweeper.trials=2", "hydra.sweep.dir=fair")
    assert (done.code, done.err, WARNING in done.out) == (0, "", False)
    assert WARNING not in Path("fair/experiment/best.yaml").read_text()


def test_an_interrupted_search_goes_on_with_the_same_trials(search, monkeypatch):
    """Interrupted in its second round: while it asks for trials, all of which are stored, or while it trains."""
    arguments = (MARGIN, "lipschitz=1,2,3", "seed=0,1", "hydra.sweeper.trials=8", "hydra.sweeper.round=4")
    for seed in (0, 1):
        assert search(bowl, *arguments, f"hydra.sweeper.seed={seed}", f"hydra.sweep.dir=whole{seed}").code == 0
    whole, other = ([trial.params for trial in trials(f"whole{seed}")] for seed in (0, 1))
    for asking in (True, False):
        folder, calls = f"found{asking}", itertools.count()
        function = optuna.samplers.TPESampler.sample_independent if asking else bowl

        def interrupted(*arguments: Any, calls=calls, function=function) -> Any:
            if next(calls) == 9:
                signal.raise_signal(signal.SIGINT)
            return function(*arguments)

        with monkeypatch.context() as patch:
            if asking:
                patch.setattr(optuna.samplers.TPESampler, "sample_independent", interrupted)
            assert search(bowl if asking else interrupted, *arguments, f"hydra.sweep.dir={folder}").code == 130
        assert len(trials(folder)) == 8
        assert search(bowl, *arguments, f"hydra.sweep.dir={folder}", "resume=true").code == 0
        assert [trial.params for trial in trials(folder)] == whole != other
        rows = [pd.read_csv(f"{one}/sweep.csv") for one in (folder, "whole0")]
        pd.testing.assert_frame_equal(*rows)


def test_a_larger_number_of_random_trials_goes_on_where_the_search_ended(search):
    for number, rounds in ((3, [0, 0, 1]), (5, [0, 0, 1, 2, 2])):
        options = ("hydra.sweeper.sampler=random", "hydra.sweeper.round=2", f"hydra.sweeper.trials={number}")
        done = search(bowl, MARGIN, *options, "hydra.sweeper.direction=minimize", "resume=true")
        assert f"{number} trials, best val.accuracy {min(trial.value for trial in trials()):.6g} " in done.out
        assert pd.read_csv("found/sweep.csv")["round"].tolist() == rounds


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
    assert len({trial.params["lipschitz"] for trial in trials("whole")}) > 8


def test_trials_without_a_value_are_ordinary_unless_all_are(search):
    options = ("lipschitz=1,2", "hydra.sweeper.trials=8")
    done = search(lambda config: 0.5 if config["lipschitz"] == 1 else None, *options)
    assert (done.code, "trials have no value; sweep.csv says why" in done.out) == (0, True)
    assert {trial.params["lipschitz"]: trial.state.name for trial in trials()} == {"1": "COMPLETE", "2": "PRUNED"}
    assert set(pd.read_csv("found/sweep.csv").set_index("lipschitz")["reason"][2]) == {"val.accuracy is null"}
    done = search(lambda config: None, *options, "hydra.sweep.dir=none")
    assert (done.code, done.err) == (1, "lipexp: no trial has a value: val.accuracy is null\n")


def test_the_picture_rings_the_best_trial_in_the_panel_of_each_axis(search, monkeypatch):
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: (figures.append(figure), path.touch()))
    assert search(bowl, LR, MARGIN, "act=relu,maxmin", "hydra.sweeper.trials=6").code == 0
    assert [ax.get_xlabel() for ax in figures[0].axes] == ["trial", "optim.lr", "loss.margin", "act"]
    for ax in figures[0].axes:
        points, ring = (collection.get_offsets().tolist() for collection in ax.collections)
        assert ring == [max(points, key=lambda point: point[1])]


def test_a_search_leaves_a_table_a_picture_and_its_best_as_an_experiment(lipexp):
    """In a folder whose name has a meaning in URLs. One of the learning rates cannot train, which is ordinary."""
    metric, folder = "robustness.val.certified_accuracy.0.2", Path("what? %20")
    settings = ("radii=[0.1,0.2]", "steps=40", "constraint=none", "optim.lr=1e-3,1e30", MARGIN, "seed=3,4")
    options = (f"hydra.sweeper.metric={metric}", "hydra.sweeper.trials=6", "hydra.sweeper.round=4")
    done = lipexp(*SEARCH, INLINE, *settings, *options, f"hydra.sweep.dir='{folder}'")
    assert done.code == 0, done.err
    assert (folder / "study.db").is_file()
    assert (folder / "search.png").read_bytes()[:4] == b"\x89PNG"
    rows = pd.read_csv(folder / "sweep.csv")
    assert [*zip(rows["trial"], rows["seed"], strict=True)] == [(i, seed) for i in range(6) for seed in (3, 4)]
    assert set(rows["status"]) == {"ok", "failed"}
    means = rows[rows["status"] == "ok"].groupby("trial")[metric].mean()
    assert f"6 trials, best {metric} {means.max():.6g} (trial {means.idxmax()})" in done.out
    best = rows[rows["trial"] == means.idxmax()].iloc[0]
    assert metrics(folder / f"round-{best['round']}" / str(best["job"]))["model_sha256"] == best["model_sha256"]
    text = (folder / "experiment" / "best.yaml").read_text()
    command = shlex.split(text.splitlines()[1].removeprefix("# lipexp "))
    assert lipexp(*command, "seed=3", "hydra.run.dir=again").code == 0
    assert metrics(Path("again"))["test"]["loss"] == pytest.approx(best["test.loss"], rel=1e-4)
    assert "defaults:\n- debug\n- override /constraint: none\n- _self_\n" in text


def test_a_worker_that_is_killed_leaves_a_search_that_can_be_resumed(lipexp):
    Path("waiting.py").write_text(WAITING)
    Path("kills").touch()
    own = ("dataset._target_=waiting.Waiting", "hydra.launcher.executor=process", "hydra.sweeper.trials=2")
    done = lipexp(*SEARCH, *own, LR)
    assert (done.code, "hydra.sweep.dir=found resume=true trains the rest" in done.err) == (1, True)
    Path("kills").unlink()
    assert lipexp(*SEARCH, *own, LR, "resume=true").code == 0
    assert pd.read_csv("found/sweep.csv")["status"].tolist() == ["ok", "ok"]


REFUSED = {
    "hydra.sweeper.trials=0": "hydra.sweeper.trials=0: must be a whole number, at least 1",
    "hydra.sweeper.metric=test.acuracy": "hydra.sweeper.metric=test.acuracy: no such number in metrics.json",
    "hydra.sweeper.metric=lipschitz.exact": "hydra.sweeper.direction=null: must be given for lipschitz.exact",
    "hydra/launcher=basic": "hydra/launcher=basic: cannot train a search",
    "hydra.launcher={executor:slurm,slurm:{wait:false}}": "hydra.launcher.slurm.wait=false: does not",
    "act=relu,reluu": "act=reluu: no such option; did you mean act=relu?",
    "a=interval(2,1)": "a=interval(2,1): `low <= high` must hold",
    "a=tag(log,range(1,9))": "a=tag(log,range(1,9)): a search takes tag(log, …) with an interval",
    "seed=interval(0,9)": "seed=interval(0,9): is averaged over",
    "~loss.margin": "~loss.margin: cannot be part of a search",
}


@pytest.mark.parametrize("wrong", REFUSED)
def test_bad_input_is_one_line_and_nothing_is_written(lipexp, wrong):
    done = lipexp(*SEARCH, LR, wrong)
    assert (done.code, len(done.err.splitlines()), Path("found").exists()) == (2, 1, False)
    assert done.err.startswith(f"lipexp: {REFUSED[wrong]}"), done.err


def test_a_search_needs_optuna_and_an_axis(lipexp, monkeypatch):
    assert "hydra/sweeper=search: has nothing to search" in lipexp(*SEARCH, "seed=0,1").err
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.delitem(sys.modules, "lipexp.sweep.search.rounds")
    assert lipexp(*SEARCH, LR).err == "lipexp: hydra/sweeper=search: needs optuna: pip install 'lipexp[search]'\n"


def test_results_are_not_overwritten_and_another_search_is_not_continued(search):
    def refusal(*arguments: str) -> str:
        return search(bowl, MARGIN, "hydra.sweeper.trials=2", *arguments).err

    assert refusal() == ""
    assert "is not empty; results are never overwritten" in refusal()
    assert "differs in: axes" in refusal("act=relu,maxmin", "resume=true")
    assert "differs in: settings, seed" in refusal("steps=3", "hydra.sweeper.seed=1", "resume=true")
    assert refusal("act=relu,maxmin", "hydra.sweep.dir=foreign") == ""
    with closing(sqlite3.connect("foreign/study.db")) as database:  # whose trials would go into command lines
        database.execute(
            """update trial_params set distribution_json = replace(distribution_json, 'relu', 'x.Y')"""
        )
        database.commit()
    assert "differs in: trials" in refusal("act=relu,maxmin", "hydra.sweep.dir=foreign", "resume=true")
    with exclusive(Path("found")):
        assert "is in use by another lipexp process" in refusal("resume=true")
    Path("found/study.db").write_text("no database")
    assert "study.db cannot be read" in refusal("resume=true")
    Path("found/study.db").unlink()
    Path("found/study.db").symlink_to(Path("foreign/study.db").absolute())
    assert "study.db cannot be read: it is a link out of found" in refusal("resume=true")
    Path("found/study.db").unlink()
    assert "is not empty" in refusal("resume=true")
