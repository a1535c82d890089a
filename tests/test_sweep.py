"""Sweeps: ordinary run folders with the numbers of single runs, sweep.csv, faults, resuming, worker processes."""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import shutil
from multiprocessing import forkserver
from pathlib import Path

import pandas as pd
import pytest
from commands import (
    INLINE,
    PROCESS,
    TINY,
    TWO_STACKS,
    WAITING,
    assert_same_sweep,
    content,
    ctrl_c,
    ended,
    metrics,
    start,
    statuses,
    table,
    wait_for,
)


@pytest.fixture
def sweep(lipexp):
    """Trains a sweep in this process, in an empty folder: sweep("seed=0,1", "hydra.sweep.dir=s") -> Result."""
    Path("waiting.py").write_text(WAITING)
    return lambda *arguments: lipexp("train", *TINY, INLINE, "-m", *arguments)


def test_every_job_leaves_the_run_folder_that_hydras_launcher_leaves(sweep, lipexp):
    jobs = ("act=relu,groupsort", "seed=0,1", "steps=60", "eval_every=20")
    assert sweep(*jobs, "hydra.sweep.dir=own").code == 0
    assert lipexp("train", "-m", *TINY, *jobs, "hydra/launcher=basic", "hydra.sweep.dir=basic").code == 0
    for job in map(str, range(4)):
        own, basic = Path("own", job), Path("basic", job)
        assert {path.name for path in own.rglob("*")} == {path.name for path in basic.rglob("*")}
        a, b = (pd.read_csv(folder / "gradients.csv") for folder in (own, basic))
        given = ["split", "x0", "x1", "y"]
        assert a[given].equals(b[given])
        pd.testing.assert_frame_equal(a, b, rtol=1e-4, atol=1e-6)
        a, b = (pd.read_csv(folder / "history.csv") for folder in (own, basic))
        assert list(a["step"]) == [0, 20, 40, 60]
        # The initial weights are equal bit by bit; their evaluation may add up in another order.
        pd.testing.assert_frame_equal(a.iloc[:1], b.iloc[:1], rtol=1e-12)
        pd.testing.assert_frame_equal(a, b, rtol=1e-4)
        assert metrics(own)["timing"]["runs_in_stack"] == 2
    assert not Path("own/multirun.yaml").exists()


def test_sweep_csv_has_a_row_for_each_job(sweep):
    assert sweep("seed=0,1", "hydra.sweep.dir=s", "hydra/sweeper=basic").code == 0  # Hydra's sweeper is as good
    rows = table(Path("s"))
    assert list(rows[0])[:5] == ["job", "status", "reason", "experiment", "device"]
    for number, row in enumerate(rows):
        found = metrics(Path("s", str(number)))
        assert (row["job"], row["status"], row["reason"], row["seed"]) == (str(number), "ok", "", str(number))
        assert float(row["test.accuracy"]) == found["test"]["accuracy"]
        assert float(row["lipschitz.certified"]) == found["lipschitz"]["certified"]
        assert float(row["gradient_norm.by.data"]) == found["gradient_norm"]["by"]["data"]


def test_a_sweep_ends_with_the_command_that_folds_it_over_its_seeds(sweep, lipexp):
    done = sweep("act=relu,groupsort", "optim.lr=0.1,0.01", "seed=0,1", "hydra.sweep.dir='my runs/a'")
    *_, last = done.out.splitlines()
    command = shlex.split(last.removeprefix("next: lipexp "))
    assert command == ["report", "my runs/a", "--by", "act,optim.lr"]
    folded = lipexp(*command)
    assert (folded.code, folded.err) == (0, "")
    assert len([line for line in folded.out.splitlines() if " ± " in line]) == 4


# Faults --------------------------------------------------------------------------------------------------------


def test_what_only_constructors_refuse_fails_that_job_alone(sweep):
    done = sweep("act.n_groups=5,8", "lipschitz=1,-1", "hydra.sweep.dir=s")
    assert done.code == 1
    negative = "lipschitz=-1.0: must be a finite number above 0"
    reasons = {0: "model.width=16: must be a multiple of act.n_groups=5", 1: negative, 3: negative}
    assert done.err.splitlines() == [f"lipexp: {reason} (s/{job})" for job, reason in reasons.items()]
    for job, reason in reasons.items():
        assert json.loads(Path(f"s/{job}/failed.json").read_text()) == {"reason": reason, "step": 0}
        assert Path(f"s/{job}/.hydra/config.yaml").is_file()
    assert [row["reason"] for row in table(Path("s"))] == [reasons.get(job, "") for job in range(4)]
    assert statuses(Path("s")) == ["failed", "failed", "ok", "failed"]
    assert "1 ok, 3 failed\ns/sweep.csv\n" in done.out


PICKY = """
from torch import nn

class Picky(nn.Module):
    def forward(self, x):
        if len(x) > 1 or abs(float(x.detach().sum())) > 1e6:
            raise RuntimeError("one at a time, and a small one\\nas the manual says")
        return x.abs()
"""


def test_an_exception_in_a_users_class_fails_only_the_jobs_that_meet_it(sweep):
    Path("picky_package.py").write_text(PICKY)
    jobs = ("act=relu", "act._target_=picky_package.Picky", "constraint=none", "loss=bce")
    done = sweep(*jobs, "optim.lr=0.01,1e20,0.02", "hydra.sweep.dir=s")
    assert done.code == 1
    reason = "lipexp: RuntimeError: one at a time, and a small one (traceback in s/1/train.log)"
    assert done.err.splitlines() == [reason]
    assert "Traceback" in Path("s/1/train.log").read_text()
    assert statuses(Path("s")) == ["ok", "failed", "ok"]


# Resuming --------------------------------------------------------------------------------------------------------


def test_jobs_whose_options_do_not_fit_each_other_are_left_out_if_that_is_asked_for(sweep):
    jobs = ("act=relu,groupsort", "constraint=sll,spectral", "hydra.sweep.dir=s")
    done = sweep(*jobs, "hydra.launcher.skip_unfit=true")
    assert (done.code, done.err) == (0, "")
    assert "1 job left out, as their options do not fit each other" in done.out
    rows = pd.read_csv("s/sweep.csv")
    kept = [("relu", "sll"), ("relu", "spectral"), ("groupsort", "spectral")]
    assert list(zip(rows["act"], rows["constraint"], strict=True)) == kept
    assert statuses(Path("s")) == ["ok"] * 3


def test_resume_trains_what_is_missing_and_nothing_else(sweep):
    jobs = ("act.n_groups=8,5", "seed=0,1", "hydra.sweep.dir=s")
    assert sweep(*jobs, "resume=true").code == 1  # nothing is there yet: it begins
    shutil.copytree("s", "whole")
    Path("s/1/metrics.json").write_bytes(Path("s/1/metrics.json").read_bytes()[:99])  # as by a power failure
    Path("s/3/failed.json").write_text("")
    kept = content(Path("s/0")) | content(Path("s/2"))
    done = sweep(*jobs, "resume=true")
    assert done.code == 1
    assert "1 done before" in done.out
    assert content(Path("s/0")) | content(Path("s/2")) == kept
    assert statuses(Path("s")) == ["ok", "ok", "failed", "failed"]
    assert_same_sweep(Path("s"), Path("whole"))
    Path("s/0/metrics.json").write_text('{"schema": 1}')
    again = sweep(*jobs, "resume=true")
    assert (again.code, len(again.err.splitlines())) == (1, 3)
    assert "cannot be read: its schema is 1, this lipexp reads 5: train it again (s/0)" in again.err
    assert "stack 1" not in again.out
    for record in Path("s").glob("*/.hydra"):
        assert "resume" not in (record / "overrides.yaml").read_text()
        assert "resume: false" in (record / "config.yaml").read_text()


def test_resume_of_something_else_is_refused_and_leaves_it_untouched(sweep):
    assert sweep("seed=0,1", "hydra.sweep.dir=s").code == 0
    Path("other").mkdir()
    Path("other/notes.txt").write_text("mine")
    Path("mine").mkdir()
    Path("mine/config2.yaml").write_text("defaults: [config, _self_]\nlipschitz: 3\n")
    before = content(Path())
    for arguments, reason in {
        ("seed=0,2", "hydra.sweep.dir=s", "resume=true"): "resume=true: s holds another sweep, of 2 jobs",
        ("seed=0,1", "hydra.sweep.dir=s"): "hydra.sweep.dir=s: is not empty; results are never overwritten",
        ("seed=0,1", "hydra.sweep.dir=other", "resume=true"): "resume=true: other holds no sweep",
        ("seed=0,1", "hydra.sweep.dir=other"): "hydra.sweep.dir=other: is not empty",
        ("-cd", "mine", "-cn", "config2", "seed=0,1", "hydra.sweep.dir=s", "resume=true"): "was another one",
    }.items():
        done = sweep(*arguments)
        assert (done.code, len(done.err.splitlines())) == (2, 1), arguments
        assert reason in done.err
    assert content(Path()) == before


def test_what_is_resumed_lies_in_its_folder(sweep, tmp_path):
    """What is written through a link would land elsewhere, and a pipe in place of the lock would be waited for."""
    assert sweep("seed=0,1", "hydra.sweep.dir=s").code == 0
    shutil.move("s/1", "elsewhere")
    Path("elsewhere/metrics.json").unlink()
    before = content(Path("elsewhere"))
    Path("s/1").symlink_to(tmp_path / "elsewhere")
    refused = "lipexp: resume=true: s: 1 cannot be read: it is a link out of s\n"
    assert sweep("seed=0,1", "hydra.sweep.dir=s", "resume=true")[::2] == (2, refused)
    assert content(Path("elsewhere")) == before
    Path("s/.lock").unlink()
    os.mkfifo("s/.lock")
    refused = "lipexp: hydra.sweep.dir=s: cannot be written: No such device or address\n"
    assert sweep("seed=0,1", "hydra.sweep.dir=s", "resume=true")[::2] == (2, refused)


@pytest.mark.parametrize(
    "change",
    [{"stacks": [[0]]}, {"stacks": [[0, 7]]}, {"stacks": [[0], [0, 1]]}, {"jobs": [1, 2]}, {"run_bytes": "many"}],
    ids=str,
)
def test_a_plan_that_makes_no_sense_is_refused(sweep, change):
    assert sweep("seed=0,1", "hydra.sweep.dir=s").code == 0
    plan = json.loads(Path("s/sweep.json").read_text())
    Path("s/sweep.json").write_text(json.dumps(plan | change))
    done = sweep("seed=0,1", "hydra.sweep.dir=s", "resume=true")
    assert (done.code, done.err.startswith("lipexp: resume=true: s: sweep.json cannot be read: ")) == (2, True)


def test_a_folder_in_use_is_refused(sweep):
    Path("s").mkdir()
    with Path("s/.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for resume in ("false", "true"):
            done = sweep("seed=0,1", "hydra.sweep.dir=s", f"resume={resume}")
            assert (done.code, done.err) == (2, "lipexp: hydra.sweep.dir=s: is in use by another lipexp process\n")
    assert [path.name for path in Path("s").iterdir()] == [".lock"]


def test_ctrl_c_keeps_what_is_finished_and_resume_trains_the_rest(sweep):
    Path("interrupts").touch()
    done = sweep(TWO_STACKS, "hydra.sweep.dir=s")
    assert (done.code, done.err) == (130, "lipexp: interrupted\n")
    assert done.out.endswith("\nthe same command with hydra.sweep.dir=s resume=true trains the rest\n")
    assert statuses(Path("s")) == ["ok", "missing"]
    Path("interrupts").unlink()
    assert sweep(TWO_STACKS, "hydra.sweep.dir=s", "resume=true").code == 0
    assert statuses(Path("s")) == ["ok", "ok"]


# Stacks and worker processes -------------------------------------------------------------------------------------


def test_the_limit_splits_a_sweep_and_the_screen_says_so(sweep):
    assert sweep("hydra.sweep.dir=one").code == 0
    run_bytes = json.loads(Path("one/sweep.json").read_text())["run_bytes"]
    done = sweep("seed=range(3)", f"hydra.launcher.memory_gib={2.5 * run_bytes / 2**30}")
    first, *lines = done.out.splitlines()
    size = f"about {run_bytes / 1e6:.2g} MB a run"
    assert first == f"lipexp train -m  3 jobs, 2 stacks (1 × 2 runs, 1 × 1 run), {size}"
    assert [line.partition(":")[0] for line in lines[:2]] == ["stack 1 of 2, 1 run", "stack 2 of 2, 2 runs"]


@pytest.mark.parametrize(
    ("jobs", "workers", "expected"),
    [("act=relu,abs", 2, "process"), ("act=relu,abs", 1, "inline"), ("seed=0,1", 2, "inline")],
)
def test_auto_takes_worker_processes_for_several_stacks_and_several_cores(sweep, jobs, workers, expected):
    options = ("hydra.launcher.executor=auto", f"hydra.launcher.workers={workers}", "hydra.sweep.dir=s")
    done = sweep(jobs, *options)
    assert (done.code, done.err) == (0, "")
    assert json.loads(Path("s/sweep.json").read_text())["executor"] == expected
    assert ("2 processes" in done.out) == (expected == "process")


def test_worker_processes_train_the_same(sweep):
    jobs = ("constraint=none", "loss=bce", "optim.lr=0.01,0.02,1e30", "act=relu,maxmin", "steps=20")
    spread = sweep(*jobs, PROCESS, "hydra.launcher.workers=2", "hydra.sweep.dir=spread")
    inline = sweep(*jobs, "hydra.sweep.dir=inline")
    assert (spread.code, inline.code) == (1, 1)
    assert [row["reason"] for row in table(Path("inline"))] == [""] * 4 + ["the loss is no longer finite"] * 2
    assert_same_sweep(Path("spread"), Path("inline"))
    assert spread.err.replace("spread", "inline") == inline.err
    lines = [line for line in spread.out.splitlines() if line.startswith("stack ")]
    assert sorted(lines) == [line for line in inline.out.splitlines() if line.startswith("stack ")]


def test_a_worker_that_is_killed_leaves_its_jobs_to_be_resumed(sweep):
    jobs = (TWO_STACKS, "seed=0,1", PROCESS, "hydra.launcher.workers=1")
    Path("kills").touch()
    done = sweep(*jobs, "hydra.sweep.dir=s")
    assert done.code == 1
    (line,) = done.err.splitlines()
    assert line.startswith("lipexp: 2 jobs are missing: a worker process died, or found no room; ")
    assert line.endswith("; hydra.sweep.dir=s resume=true trains the rest")
    assert "stack 2 of 2, 2 runs: its worker process died" in done.out
    assert statuses(Path("s")) == ["ok", "ok", "missing", "missing"]
    Path("kills").unlink()
    assert sweep(*jobs, "hydra.sweep.dir=s", "resume=true").code == 0
    assert sweep(TWO_STACKS, "seed=0,1", "hydra.sweep.dir=whole").code == 0
    assert_same_sweep(Path("s"), Path("whole"))


@pytest.fixture
def waiting(sweep, tmp_path):
    """The command in a process of its own, whose worker has trained one of two stacks and waits in the other."""
    os.mkfifo("gate")
    options = (PROCESS, "hydra.launcher.workers=1", "hydra.sweep.dir=s")
    process = start(tmp_path, "train", "-m", *TINY, *options, TWO_STACKS)
    wait_for(Path("waits").exists)
    yield process
    process.kill()


def test_ctrl_c_ends_the_worker_processes(waiting):
    ctrl_c(waiting)
    code, _, err = ended(waiting)
    assert (code, err) == (130, "lipexp: interrupted\n")
    assert statuses(Path("s")) == ["ok", "missing"]
    assert not list(Path("s").glob("*/failed.json"))


def test_a_killed_command_takes_its_workers_along_and_is_continued(sweep, waiting):
    waiting.kill()
    assert ended(waiting)[0] < 0
    Path("gate").unlink()
    plan, finished = Path("s/sweep.json").read_text(), content(Path("s/0"))
    done = sweep(TWO_STACKS, "hydra.sweep.dir=s", "resume=true")
    assert (done.code, done.err) == (0, "")
    assert "1 done before" in done.out
    assert (Path("s/sweep.json").read_text(), content(Path("s/0"))) == (plan, finished)
    assert sweep(TWO_STACKS, "hydra.sweep.dir=whole").code == 0
    assert_same_sweep(Path("s"), Path("whole"))


def test_a_machine_that_starts_no_workers_is_one_line(sweep, monkeypatch):
    """Such as one whose temporary folder has too long a name for a socket."""

    def fail() -> None:
        raise OSError("AF_UNIX path too long")

    monkeypatch.setattr(forkserver, "ensure_running", fail)
    refused = "lipexp: hydra.launcher.executor=process: cannot start a process here: AF_UNIX path too long\n"
    assert sweep("seed=0,1", PROCESS) == (2, "", refused)
    assert not Path("outputs").exists()
