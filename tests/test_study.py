"""Search: the space in Hydra's own grammar, trials that repeat, rounds that survive a kill, what remains."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pandas as pd
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from lipexp.config import ConfigError
from lipexp.sweep.search.options import Options
from lipexp.sweep.search.outcome import importances, ranked
from lipexp.sweep.search.rounds import DATABASE, NAME, _sampler, value_of
from lipexp.sweep.search.space import Space
from lipexp.sweep.launch import End

optuna.logging.set_verbosity(optuna.logging.WARNING)
SMALL = ("steps=5", "eval_every=0", "model.width=8", "dataset.n_train=64", "dataset.n_test=32", "batch_size=32")
LR = "optim.lr=tag(log,interval(1e-4,1e-1))"
SEARCH = ("train", "-m", "hydra/sweeper=search", "device=cpu", "max_regions=0", *SMALL, "hydra.sweep.dir=found")


def space(*lines: str) -> Space:
    return Space.of(OverridesParser.create().parse_overrides(list(lines)))


def trials(folder: str | Path = "found") -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name=NAME, storage=f"sqlite:///{folder}/{DATABASE}").trials


# The space -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "distribution"),
    [
        ("a=interval(0.1,0.5)", optuna.distributions.FloatDistribution(0.1, 0.5)),
        ("a=tag(log,interval(1e-4,1e-1))", optuna.distributions.FloatDistribution(1e-4, 1e-1, log=True)),
        ("a=interval(8,64)", optuna.distributions.FloatDistribution(8.0, 64.0)),
        ("a=int(interval(8,64))", optuna.distributions.IntDistribution(8, 64)),
        ("a=int(tag(log,interval(8,64)))", optuna.distributions.IntDistribution(8, 64, log=True)),
        ("a=range(16,65,16)", optuna.distributions.IntDistribution(16, 64, step=16)),
        ("a=range(5,0,-2)", optuna.distributions.IntDistribution(1, 5, step=2)),
        ("a=range(3)", optuna.distributions.IntDistribution(0, 2)),
        ("a=range(0,1,0.25)", optuna.distributions.FloatDistribution(0, 0.75, step=0.25)),
        ("a=relu,maxmin", optuna.distributions.CategoricalDistribution(("relu", "maxmin"))),
        ("a=choice(1,2)", optuna.distributions.CategoricalDistribution(("1", "2"))),
        ("a=choice([1,2],[3])", optuna.distributions.CategoricalDistribution(("[1,2]", "[3]"))),
    ],
)
def test_hydras_grammar_as_distributions(line, distribution):
    assert space(line).distributions() == {"a": distribution}


def test_settings_stay_in_their_order_and_seeds_are_runs_of_every_trial():
    found = space("steps=3", "act=relu,maxmin", "loss.margin=interval(0.1,0.5)", "+x=1", "seed=range(2)")
    assert found.settings == ("steps=3", "+x=1")
    assert found.seeds == ("0", "1")
    both = ["steps=3", "+x=1", "act=maxmin", "loss.margin=0.25"]
    assert found.jobs({"act": "maxmin", "loss.margin": 0.25}) == [[*both, "seed=0"], [*both, "seed=1"]]
    assert space("act=relu,maxmin").jobs({"act": "relu"}) == [["act=relu"]]
    # Every file that a trial can choose is composed beforehand.
    assert [line[2] for line in found.probes()] == ["act=relu", "act=maxmin"]
    whole = space("w=int(interval(8,64))", "+n=interval(1,2)")
    assert whole.jobs({"w": 9, "+n": 1.5}) == [["w=9", "+n=1.5"]]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "hydra/sweeper=search: has nothing to search"),
        (["steps=3", "seed=range(4)"], "hydra/sweeper=search: has nothing to search"),
        (["a=interval(2,1)"], r"a=interval\(2.0,1.0\): must rise"),
        (["a=interval(1,1)"], r"a=interval\(1.0,1.0\): must rise"),
        (["a=tag(log,interval(0,1))"], r"a=interval\(0.0,1.0\): must lie above 0 for tag"),
        (["a=tag(log,range(1,9))"], r"a: takes tag\(log, …\) with an interval, and no shuffle"),
        (["a=range(3,3)"], "a: is an empty range"),
        (["seed=interval(0,9)", "a=1,2"], "seed: is averaged over"),
        (["a=1,2", "a=3,4"], "a: is searched twice"),
        (["~a", "b=1,2"], "~a: cannot be part of a search"),
    ],
)
def test_a_space_that_cannot_be_searched_is_refused(lines, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        space(*lines)


# Options and values ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "task", "goal"),
    [
        ({}, "classification", ("test.accuracy", "maximize")),
        ({}, "regression", ("test.mse", "minimize")),
        ({}, "transport", ("test.score", "maximize")),
        ({"metric": "train.loss"}, "classification", ("train.loss", "minimize")),
        ({"metric": "robustness.certified_accuracy.0.4"}, "classification", None),
        ({"metric": "lipschitz.exact", "direction": "minimize"}, "regression", ("lipschitz.exact", "minimize")),
    ],
)
def test_the_direction_is_known_or_given(settings, task, goal):
    metric = Options(**settings).metric_for(task)
    assert (metric, Options(**settings).direction_of(metric)) == (goal or (settings["metric"], "maximize"))


def test_a_direction_that_nobody_knows_is_asked_for():
    with pytest.raises(ConfigError, match=r"^hydra.sweeper.direction=null: must be given for lipschitz.exact"):
        Options().direction_of("lipschitz.exact")


def test_the_value_of_a_run_or_why_it_has_none():
    metrics = {"a": {"b": 0.5, "c": None, "d": {"0.4": 1}}, "e": True, "f": math.inf}
    assert value_of(End("ok", metrics=metrics), "a.b") == 0.5
    assert value_of(End("ok", metrics=metrics), "a.d.0.4") == 1.0
    for metric, value in (("a.c", "None"), ("e", "True"), ("f", "inf"), ("missing", "None")):
        assert value_of(End("ok", metrics=metrics), metric) == f"{metric} is {value}"
    assert value_of(End("failed", "the loss is no longer finite"), "a.b") == "the loss is no longer finite"


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_trials_depend_on_the_seed_and_on_what_was_told_alone(sampler):
    """A bowl, asked for in rounds of 4; also with the third round asked for in two parts."""

    def asked(seed: int, interrupted: bool = False) -> list[dict]:
        study = optuna.create_study()
        axes = space("x=interval(-1,1)", "y=tag(log,interval(1e-3,1))", "z=a,b").distributions()
        for first in range(0, 20, 4):
            for number in range(first, first + 4):
                if interrupted and number == 9:
                    study.sampler = optuna.samplers.RandomSampler()  # whatever it was is forgotten
                study.sampler = _sampler(Options(sampler=sampler, seed=seed), number, {})
                study.ask(axes)
            for trial in study.trials[first:]:
                study.tell(trial.number, trial.params["x"] ** 2 + math.log(trial.params["y"]) ** 2)
        return [trial.params for trial in study.trials]

    assert asked(0) == asked(0) == asked(0, interrupted=True)
    assert asked(0) != asked(1)


def test_the_estimator_finds_a_bowl_and_the_importance_of_its_axes():
    """60 trials, 12 a round: the second half lies lower than the first, and x matters 100 times as much as y."""
    study = optuna.create_study()
    axes = space("x=interval(-1,1)", "y=interval(-1,1)").distributions()
    for first in range(0, 60, 12):
        for number in range(first, first + 12):
            study.sampler = _sampler(Options(), number, {})
            study.ask(axes)
        for trial in study.trials[first:]:
            study.tell(trial.number, trial.params["x"] ** 2 + 0.1 * trial.params["y"] ** 2)
    values = pd.Series([trial.value for trial in study.trials])
    assert values[30:].median() < 0.5 * values[:30].median()
    assert list(importances(study)) == ["x", "y"]
    assert importances(study)["x"] > 0.8
    assert [trial.number for trial in ranked(study)] == list(values.sort_values(kind="stable").index)


def test_a_study_without_two_different_values_has_no_importances():
    study = optuna.create_study()
    for _ in range(3):
        study.tell(study.ask(space("x=interval(-1,1)").distributions()).number, 1.0)
    assert importances(study) == {}


# The command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("executor", ["inline", "process"])
def test_a_search_leaves_runs_a_table_a_picture_and_its_best(lipexp, executor):
    done = lipexp(
        *SEARCH,
        LR,
        "act=relu,maxmin",
        "seed=3,4",
        "hydra.sweeper.trials=5",
        "hydra.sweeper.round=3",
        "hydra.sweeper.metric=robustness.certified_accuracy.0.1",
        f"hydra.launcher.executor={executor}",
    )
    assert done.code == 0, done.err
    assert "round 2 of 2: 5 trials, best robustness.certified_accuracy.0.1 " in done.out
    folder = Path("found")
    assert (folder / "search.png").read_bytes()[:4] == b"\x89PNG"
    rows = pd.read_csv(folder / "sweep.csv")
    assert list(rows["trial"]) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert list(rows["seed"]) == [3, 4] * 5
    # The value of a trial is the mean over its seeds, of what the run folders say.
    for trial in trials():
        own = rows[rows["trial"] == trial.number]
        assert trial.value == pytest.approx(own["robustness.certified_accuracy.0.1"].mean(), rel=1e-12)
        assert own["optim.lr"].tolist() == [trial.params["optim.lr"]] * 2
        assert own["act"].tolist() == [trial.params["act"]] * 2
        job = own.iloc[0]
        metrics = json.loads((folder / f"round-{job['round']}" / str(job["job"]) / "metrics.json").read_text())
        assert metrics["robustness"]["certified_accuracy"]["0.1"] == job["robustness.certified_accuracy.0.1"]
    # The best one is an experiment that can be run as the file says.
    best = max(trials(), key=lambda trial: trial.value)
    experiment = (folder / "experiment" / "best.yaml").read_text().splitlines()
    assert experiment[:2] == ["# @package _global_", "# lipexp train -cd found experiment=best"]
    command = experiment[1].removeprefix("# lipexp ").split()
    again = lipexp(*command, "seed=3", "device=cpu", "hydra.run.dir=again")
    assert again.code == 0, again.err
    first = rows[(rows["trial"] == best.number) & (rows["seed"] == 3)].iloc[0]
    config = OmegaConf.load("again/.hydra/config.yaml")
    assert (config.optim.lr, config.steps, config.model.width) == (best.params["optim.lr"], 5, 8)
    metrics = json.loads(Path("again/metrics.json").read_text())
    assert metrics["model_sha256"] == first["model_sha256"] or metrics["test"]["loss"] == pytest.approx(
        first["test.loss"], rel=1e-4
    )


def test_the_best_keeps_an_experiment_and_settings_of_all_kinds(lipexp):
    done = lipexp(
        *SEARCH[:-1],
        "hydra.sweep.dir='with space'",
        "experiment=debug",
        "radii=[0.2]",
        LR,
        "hydra.sweeper.trials=2",
    )
    assert done.code == 0, done.err
    content = OmegaConf.load("with space/experiment/best.yaml")
    assert content.defaults == ["debug", "_self_"]
    assert content.radii == [0.2]
    assert "hydra" not in content
    assert lipexp("train", "-cd", "with space", "experiment=best", "hydra.run.dir=again").code == 0
    assert OmegaConf.load("again/.hydra/config.yaml").radii == [0.2]


def test_trials_that_fail_are_told_and_the_search_goes_on(lipexp):
    done = lipexp(*SEARCH, "optim.lr=1e-3,1e30", "constraint=none", "steps=60", "hydra.sweeper.trials=6")
    assert done.code == 0, done.err
    states = {trial.params["optim.lr"]: trial.state.name for trial in trials()}
    assert states == {"0.001": "COMPLETE", "1e+30": "PRUNED"}
    assert "trials have no value; sweep.csv says why" in done.out
    assert set(pd.read_csv("found/sweep.csv")["status"]) == {"ok", "failed"}


def test_a_search_in_which_nothing_has_a_value_fails(lipexp):
    done = lipexp(*SEARCH, "optim.lr=1e30,1e31", "constraint=none", "steps=60", "hydra.sweeper.trials=2")
    assert done.code == 1
    assert "no trial has a value: " in done.err


def test_after_the_first_round_a_few_trials_at_a_time_share_a_stack(lipexp):
    own = ("act=relu,maxmin,groupsort", "model.width=4,8", "hydra.sweeper.round=6", "hydra.sweeper.stack=3")
    done = lipexp(*SEARCH, LR, *own, "loss.margin=interval(0.1,0.5)", "hydra.sweeper.trials=12", "model.depth=1,2")
    assert done.code == 0, done.err
    second = trials()[6:]
    for group in (second[:3], second[3:]):
        for key in ("act", "model.width", "model.depth"):
            assert len({trial.params[key] for trial in group}) == 1
        for key in ("optim.lr", "loss.margin"):  # these may differ within a stack
            assert len({trial.params[key] for trial in group}) == 3
    assert len({(trial.params["act"], trial.params["model.width"]) for trial in trials()[:6]}) > 2
    plans = [json.loads(Path(f"found/round-{number}/sweep.json").read_text()) for number in (0, 1)]
    assert len(plans[1]["stacks"]) <= 2 < len(plans[0]["stacks"])


def test_an_interval_in_a_sweep_is_one_line(lipexp):
    done = lipexp("train", "-m", *SMALL, LR, "hydra.sweep.dir=found")
    assert done.code == 2
    assert done.err.startswith("lipexp: interval(…): is for a search, hydra/sweeper=search")


def test_a_larger_number_of_trials_goes_on_where_the_search_ended(lipexp):
    arguments = (*SEARCH, LR, "hydra.sweeper.round=2")
    assert lipexp(*arguments, "hydra.sweeper.trials=3").code == 0
    before, runs = trials(), pd.read_csv("found/sweep.csv")
    done = lipexp(*arguments, "hydra.sweeper.trials=5", "resume=true")
    assert done.code == 0, done.err
    assert [trial.params for trial in trials()[:3]] == [trial.params for trial in before]
    after = pd.read_csv("found/sweep.csv")
    assert after["trial"].tolist() == [0, 1, 2, 3, 4]
    pd.testing.assert_frame_equal(after[:3], runs)  # nothing was trained again


REFUSED = {
    "hydra.sweeper.sampler=grid": "hydra.sweeper.sampler=grid: no such option",
    "hydra.sweeper.trials=0": "hydra.sweeper.trials=0: must be a whole number, at least 1",
    "+hydra.sweeper.trial=3": "hydra.sweeper.trial: no such setting; did you mean hydra.sweeper.trials?",
    "hydra.sweeper.metric=test.acuracy": "hydra.sweeper.metric=test.acuracy: no such number in metrics.json; "
    "did you mean test.accuracy?",
    "hydra.sweeper.metric=lipschitz.measured": "hydra.sweeper.direction=null: must be given for lipschitz.",
    "hydra.sweeper.direction=up": "hydra.sweeper.direction=up: no such option",
    "hydra/launcher=basic": "hydra/launcher=basic: cannot train a search",
    "act=relu,reluu": "act=reluu: no such option; did you mean act=relu?",
    "optim.lrr=interval(1,2)": "optim.lrr: no such setting; did you mean optim.lr?",
    "loss.margin=interval(2,1)": "loss.margin=interval(2.0,1.0): must rise",
}


@pytest.mark.parametrize("wrong", REFUSED)
def test_bad_input_is_one_line_and_nothing_is_written(lipexp, wrong):
    done = lipexp(*SEARCH, LR, wrong)
    assert done.code == 2
    assert done.err.startswith(f"lipexp: {REFUSED[wrong]}"), done.err
    assert len(done.err.splitlines()) == 1
    assert not Path("found").exists()


def test_without_optuna_the_extra_is_named(lipexp, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    done = lipexp(*SEARCH, LR)
    assert (done.code, done.err) == (
        2,
        "lipexp: hydra/sweeper=search: needs optuna: pip install 'lipexp[search]'\n",
    )


def test_results_are_not_overwritten_and_another_search_is_not_continued(lipexp):
    arguments = (*SEARCH, LR, "hydra.sweeper.trials=2")
    assert lipexp(*arguments).code == 0
    done = lipexp(*arguments)
    assert (done.code, "is not empty" in done.err) == (2, True)
    for other, what in (
        ("act=relu,maxmin", "axes"),
        ("loss=bce", "settings"),
        ("hydra.sweeper.seed=1", "sampler"),
    ):
        done = lipexp(*arguments, other, "resume=true")
        assert done.code == 2
        assert f"found holds another search: its {what} are others" in done.err
    Path("found", DATABASE).write_text("no database")
    done = lipexp(*arguments, "resume=true")
    assert (done.code, f"{DATABASE} cannot be read" in done.err) == (2, True)
    Path("found", DATABASE).unlink()
    done = lipexp(*arguments, "resume=true")
    assert (done.code, "holds no search that could be continued" in done.err) == (2, True)


def test_a_worker_that_dies_leaves_a_search_to_be_resumed(lipexp, tmp_path):
    """The command continues the search, not the sweep of one round."""
    (tmp_path / "dying.py").write_text(
        "import multiprocessing, os, torch\nclass Dying(torch.nn.Module):\n    def forward(self, x):\n"
        "        return x if multiprocessing.parent_process() is None else os._exit(3)\n"
    )
    (tmp_path / "act").mkdir()
    (tmp_path / "act" / "dying.yaml").write_text("_target_: dying.Dying\n")
    arguments = ("-cd", ".", "act=dying", "constraint=none", "hydra.launcher.executor=process")
    done = lipexp(*SEARCH, LR, *arguments, "hydra.sweeper.trials=1")
    assert done.code == 1
    assert "lipexp: 1 job is missing: a worker process died" in done.err
    assert "hydra.sweep.dir=found resume=true trains the rest" in done.err


@pytest.mark.slow
def test_a_killed_search_goes_on_with_the_same_trials(lipexp, tmp_path):
    """kill -9 in the second round, as soon as one of its runs has finished."""
    arguments = [
        *SEARCH[:-1],
        LR,
        "act=relu,maxmin",
        "hydra.sweeper.trials=12",
        "hydra.sweeper.round=6",
        "steps=400",
    ]
    assert lipexp(*arguments, "hydra.sweep.dir=whole").code == 0
    script = str(Path(sys.executable).with_name("lipexp"))
    process = subprocess.Popen(
        [script, *arguments, "hydra.sweep.dir=killed"], cwd=tmp_path, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("killed/round-1/*/metrics.json")):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert any(trial.value is None for trial in trials("killed"))
    done = lipexp(*arguments, "hydra.sweep.dir=killed", "resume=true")
    assert done.code == 0, done.err
    assert [trial.params for trial in trials("killed")] == [trial.params for trial in trials("whole")]
    rows = [pd.read_csv(f"{name}/sweep.csv") for name in ("killed", "whole")]
    assert rows[0]["trial"].tolist() == rows[1]["trial"].tolist()
    assert rows[0]["test.loss"].to_numpy() == pytest.approx(rows[1]["test.loss"].to_numpy(), rel=1e-4)


@pytest.mark.slow
def test_a_search_finds_a_configuration_at_least_as_robust_as_the_default(lipexp):
    """100 trials, as in the README."""
    space = (LR, "loss.margin=interval(0.1,0.5)", "model.width=32,64,128", "act=relu,groupsort")
    options = ("hydra.launcher.executor=process", "hydra.sweeper.metric=robustness.certified_accuracy.0.4")
    done = lipexp(
        "train",
        "-m",
        "hydra/sweeper=search",
        *space,
        "constraint=spectral,linf",
        *options,
        "hydra.sweep.dir=found",
    )
    assert done.code == 0, done.err
    assert len(trials()) == 100
    assert lipexp("train", "hydra.run.dir=default").code == 0
    default = json.loads(Path("default/metrics.json").read_text())["robustness"]["certified_accuracy"]["0.4"]
    assert max(trial.value for trial in trials()) >= default
