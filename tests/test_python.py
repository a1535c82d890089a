"""lipexp.train: what the command does, from Python."""

from __future__ import annotations

import asyncio
import doctest
import io
import logging
import subprocess
import sys
import threading
from pathlib import Path

import hydra
import numpy as np
import pytest
from commands import SCRIPT, TINY, content, metrics
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from rich.console import Console

import lipexp as package
from lipexp import ConfigError, RunFailed
from lipexp.loading import LoadedRun, LoadedRuns
from lipexp.python import written

DIVERGES = "optim.lr=1e30"


@pytest.fixture
def train(tmp_path, monkeypatch):
    """lipexp.train in an empty folder, silently and with few steps."""
    monkeypatch.chdir(tmp_path)
    return lambda *overrides, progress=False, **settings: package.train(
        *TINY, *overrides, progress=progress, **settings
    )


def test_a_run_is_what_the_command_trains(train, lipexp):
    run = train("act=relu", "hydra.run.dir=python", loss="bce", lipschitz=np.float64(2), radii=[0.1, 0.5])
    command = ("act=relu", "hydra.run.dir=command", "loss=bce", "lipschitz=2.0", "radii=[0.1,0.5]")
    assert lipexp("train", *TINY, *command).code == 0
    assert isinstance(run, LoadedRun)
    assert run.folder == Path("python").absolute()
    mine, theirs = content(Path("python")), content(Path("command"))
    assert mine.keys() == theirs.keys()
    for name in ("model.pt", "history.csv", "gradients.csv", "radii.csv", ".hydra/config.yaml"):
        assert mine[name][0] == theirs[name][0], name
    assert metrics(Path("python"))["test"] == metrics(Path("command"))["test"]


def test_by_default_it_lies_in_outputs_by_date_and_time(train):
    first, second = train().folder, train().folder
    assert first != second
    assert {first, second} == {path.absolute() for path in Path("outputs").glob("*-*-*/*-*-*")}


@pytest.mark.parametrize(
    ("overrides", "settings", "table"),
    [
        (
            ["act=relu,groupsort"],
            {"seed": range(2)},
            [("relu", 0), ("relu", 1), ("groupsort", 0), ("groupsort", 1)],
        ),
        ([], {"act": ["maxmin", "abs"], "seed": 3}, [("maxmin", 3), ("abs", 3)]),
        ([], {"seed": np.arange(4, 6)}, [("groupsort", 4), ("groupsort", 5)]),
        ([], {"seed": (7,)}, [("groupsort", 7)]),
    ],
    ids=str,
)
def test_several_values_are_a_sweep_of_stacked_runs(train, overrides, settings, table):
    runs = train(*overrides, **settings)
    assert isinstance(runs, LoadedRuns)
    assert [*zip(runs.table["act"], runs.table["seed"], strict=True)] == table
    assert (runs.folder / "sweep.csv").is_file()
    stacks = len(set(runs.table["act"]))
    assert [run.metrics.timing["runs_in_stack"] for run in runs] == [len(table) // stacks] * len(table)


def test_an_experiment_that_is_a_grid_is_a_sweep(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = package.train("experiment=margins", *TINY[1:], "loss.margin=0.1,0.2", progress=False, seed=0)
    assert runs.table["loss.margin"].tolist() == [0.1, 0.2]


def test_a_search_is_a_sweep(train):
    pytest.importorskip("optuna")
    runs = train("hydra/sweeper=search", "optim.lr=interval(0.001,0.1)", "hydra.sweeper.trials=2")
    assert len(runs) == 2
    assert runs.table["optim.lr"].between(0.001, 0.1).all()


def test_an_interrupted_sweep_is_continued(train):
    runs = train(seed=range(3), **{"hydra.sweep.dir": "s"})
    (runs.folder / "1" / "metrics.json").unlink()
    before = content(runs.folder / "0")
    again = train(seed=range(3), resume=True, **{"hydra.sweep.dir": "s"})
    assert len(again) == 3
    assert content(runs.folder / "0") == before


def test_options_of_a_folder_of_ones_own(train):
    Path("own/act").mkdir(parents=True)
    Path("own/act/mine.yaml").write_text("_target_: lipexp.activations.LeakyReLU\nslope: 0.25\n")
    assert train(act="mine", config_dir="own").config["act"]["slope"] == 0.25
    with pytest.raises(ConfigError, match=r"^config_dir=other: is no folder$"):
        train(config_dir="other")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("seed", 3, "seed=3"),
        ("seed", range(3), "seed=choice(0,1,2)"),
        ("seed", [1], "seed=choice(1)"),
        ("lipschitz", np.float32(0.5), "lipschitz=0.5"),
        ("lipschitz", (1e-30, 1e30), "lipschitz=choice(1e-30,1e+30)"),
        ("resume", True, "resume=true"),
        ("experiment", None, "experiment=null"),
        ("act", "relu,abs", "act=relu,abs"),
        ("radii", [], "radii=[]"),
        ("radii", (0.1, 0.2), "radii=[0.1,0.2]"),
        ("radii", [[0.1], [0.2, 0.3]], "radii=choice([0.1],[0.2,0.3])"),
    ],
    ids=str,
)
def test_settings_are_written_as_on_the_command_line(name, value, expected):
    assert written(name, value) == expected


@pytest.mark.parametrize(
    ("overrides", "settings", "message"),
    [
        (["los=hinge"], {}, "los: no such setting; did you mean loss?"),
        (["-m", "seed=1,2"], {}, "-m: is no override, such as 'loss=hinge'"),
        ([["seed=1"]], {}, "['seed=1']: is no override, such as 'loss=hinge'"),
        ([], {"loss": "hing"}, "loss=hing: no such option; did you mean loss=hinge?"),
        ([], {"act": ["relu", "grupsort"]}, "act=grupsort: no such option; did you mean act=groupsort?"),
        ([], {"lipschitz": "one"}, "lipschitz=one: must be a number"),
        ([], {"lipschitz": [0, -1]}, "lipschitz=0.0: must be a finite number above 0"),
        ([], {"seed": []}, "seed=[]: there is nothing to sweep over"),
        ([], {"seed": {1: 2}}, "seed={1: 2}: must be a number, true or false, text, or several of them"),
        (["seed=1"], {"seed": [1, 2]}, "seed=choice(1,2): seed is swept, and given twice"),
        (["dataset=absolute_value", "loss=hinge"], {}, "loss=hinge: is for two classes"),
        ([], {"resume": True}, "resume=true: continues a sweep, which needs -m"),
    ],
    ids=str,
)
def test_bad_input_is_one_line_and_leaves_nothing_behind(train, capfd, overrides, settings, message):
    with pytest.raises(ConfigError) as refused:
        train(*overrides, **settings)
    assert str(refused.value).startswith(message)
    assert "\n" not in str(refused.value)
    assert not [path for path in Path().rglob("*") if path.is_file()]
    assert capfd.readouterr() == ("", "")


def test_results_are_not_overwritten(train):
    for setting, more in (("hydra.run.dir=s", {}), ("hydra.sweep.dir=t", {"seed": [0, 1]})):
        folder = train(setting, **more).folder
        before = content(folder)
        with pytest.raises(ConfigError, match="results are never overwritten"):
            train(setting, **more)
        assert content(folder) == before


def test_a_failed_run_raises_its_reason(train, capfd):
    with pytest.raises(RunFailed, match=r"^the loss is no longer finite at step 2 \(s\)$"):
        train("constraint=none", DIVERGES, "hydra.run.dir=s", steps=5)
    assert Path("s/failed.json").is_file()
    assert capfd.readouterr() == ("", "")


def test_the_runs_that_finish_stay_where_others_fail(train, capfd):
    with pytest.raises(RunFailed) as failed:
        train("constraint=none", "hydra.sweep.dir=s", steps=5, **{"optim.lr": [1e-3, 1e30]})
    reason, finished = str(failed.value).splitlines()
    assert reason == "the loss is no longer finite at step 2 (s/1)"
    assert finished == f"lipexp.load({str(Path('s').absolute())!r}) reads the 1 that have finished"
    assert package.load("s").table["optim.lr"].tolist() == [1e-3]
    assert capfd.readouterr() == ("", "")


class Breaks:
    def __init__(self):
        raise RuntimeError("no such luck")


def test_the_error_of_a_users_class_comes_along(train, monkeypatch):
    monkeypatch.setattr("lipexp.training.stack", lambda members: Breaks())
    with pytest.raises(RunFailed, match=r"^RuntimeError: no such luck \(traceback in s/train.log\)$") as failed:
        train("hydra.run.dir=s")
    assert isinstance(failed.value.__cause__, RuntimeError)
    assert "Traceback" in Path("s/train.log").read_text()


# The process that it is called in --------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("settings", [{}, {"seed": range(2)}], ids=["run", "sweep"])
def test_progress_is_a_bar_on_a_terminal_lines_elsewhere_and_nothing_if_it_is_not_wanted(
    train, monkeypatch, capfd, settings
):
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    train(progress=True, steps=40, **settings)
    bar = sys.stdout.getvalue()
    assert "━" in bar  # what stands beside it depends on how fast the machine is
    assert "‖∇f‖₂" not in bar  # the result, which is returned
    monkeypatch.undo()
    train(progress=True, **settings)
    lines = capfd.readouterr().out.splitlines()
    assert 1 <= len(lines) <= 3
    assert "val accuracy" in lines[-1]
    train(**settings)
    assert capfd.readouterr() == ("", "")
    assert Console().width  # of rich itself, untouched


def test_hydra_logging_and_the_process_stay_as_they_were(train, monkeypatch):
    """Within an application of Hydra of one's own, which has registered a resolver that Hydra has, too."""
    GlobalHydra.instance().clear()
    with hydra.initialize(config_path=None, version_base="1.2"):
        OmegaConf.register_new_resolver("now", lambda pattern: "never", replace=True)
        try:
            running, config = GlobalHydra.instance().hydra, HydraConfig.instance()
            config.cfg = OmegaConf.create({"hydra": {}})
            before = config.cfg
            handlers, level = list(logging.root.handlers), logging.root.level
            argv, path, folder = list(sys.argv), list(sys.path), Path.cwd()
            run = train()
            with pytest.raises(ConfigError):
                train(act="foo")
            assert "never" not in str(run.folder)
            assert GlobalHydra.instance().hydra is running
            assert HydraConfig.instance() is config
            assert config.cfg is before
            assert hydra.version.getbase().release == (1, 2)
            assert OmegaConf.create({"time": "${now:%Y}"}).time == "never"
            assert (logging.root.handlers, logging.root.level) == (handlers, level)
            assert (sys.argv, sys.path, Path.cwd()) == (argv, path, folder)
        finally:
            OmegaConf.clear_resolver("now")
            config.cfg = None


def test_it_trains_in_a_running_event_loop_as_a_notebook_has(train):
    async def cell():
        return train(seed=range(2))

    assert len(asyncio.run(cell())) == 2


def test_it_trains_in_several_threads(train):
    found = {}
    threads = [
        threading.Thread(target=lambda seed=seed: found.update({seed: train(seed=[seed, seed + 10])}))
        for seed in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {seed: runs.table["seed"].tolist() for seed, runs in found.items()} == {
        s: [s, s + 10] for s in range(3)
    }


def test_a_script_needs_no_guard(tmp_path):
    """Two calls, the second with more jobs than worker processes would be started for on the command line."""
    (tmp_path / "script.py").write_text(
        "import lipexp\n"
        f"settings = {TINY!r}\n"
        "print(len(lipexp.train(*settings, 'act=relu,groupsort', seed=range(9), progress=False)))\n"
        "print(lipexp.train(*settings, progress=False).metrics.step)\n"
    )
    done = subprocess.run(
        [Path(SCRIPT).with_name("python"), "script.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr, done.returncode) == ("18\n2\n", "", 0)


def test_the_example_in_the_docstring_holds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    finder = doctest.DocTestFinder(recurse=False)
    (example,) = finder.find(package.train, "train", globs={"lipexp": package})
    assert not doctest.DocTestRunner().run(example).failed


def test_names_are_imported_when_they_are_asked_for():
    code = "import sys, lipexp; lipexp.ConfigError; sys.exit(bool({'torch', 'sklearn', 'hydra'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert {"ConfigError", "LipschitzRegressor", "RunFailed", "load", "train"} <= {*dir(package)}
    with pytest.raises(AttributeError, match="module 'lipexp' has no attribute 'LipschitzClasifier'"):
        package.LipschitzClasifier  # noqa: B018
