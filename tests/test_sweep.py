"""Sweeps: ordinary run folders with the numbers of single runs, sweep.csv, faults, resuming, and the split."""

from __future__ import annotations

import csv
import fcntl
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pandas as pd
import processes
import pytest
import torch
import yaml
from processes import wait_for

TINY = ("experiment=debug", "device=cpu", "dataset.n_train=64", "dataset.n_test=32", "batch_size=32")
WORKER = ("hydra.launcher.executor=process", "hydra.launcher.workers=1")
BASIC = ("hydra/launcher=basic", "hydra/sweeper=basic")
SCRIPT = str(Path(sys.executable).with_name("lipexp"))


@pytest.fixture
def sweep(lipexp):
    """Trains a sweep in this process, in an empty folder: sweep("seed=0,1", "hydra.sweep.dir=s") -> Result."""
    return lambda *arguments: lipexp("train", "-m", *arguments, *TINY)


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """The same in a process of its own."""
    return processes.start(folder, "train", "-m", *arguments, *TINY)


def content(folder: Path) -> dict[str, tuple[bytes, int]]:
    """file -> bytes and time of change."""
    return {
        str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()
    }


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "sweep.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def assert_same_rows(one: Path, other: Path) -> None:
    """Equal rows in equal order, up to the stacking tolerance; model_sha256 tells every last bit."""
    left, right = table(one), table(other)
    assert [list(row) for row in left] == [list(row) for row in right]
    for a, b in zip(left, right, strict=True):
        for key in a:
            if not key.startswith(("timing.", "environment.")) and key != "model_sha256":
                assert_close(parsed(a[key]), parsed(b[key]))


def parsed(cell: str) -> object:
    try:
        return json.loads(cell)
    except ValueError:
        return cell


def assert_close(a: object, b: object) -> None:
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for x, y in zip(a, b, strict=True):
            assert_close(x, y)
    elif isinstance(a, float):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-7)
    else:
        assert a == b


def test_every_job_leaves_the_run_folder_that_hydras_launcher_leaves(sweep):
    jobs = ("act=relu,groupsort", "constraint=spectral", "seed=0,1", "steps=60", "eval_every=20")
    assert sweep(*jobs, "hydra.sweep.dir=own").code == 0
    assert sweep(*jobs, "hydra.sweep.dir=basic", *BASIC).code == 0
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
        assert json.loads((own / "metrics.json").read_text())["timing"]["runs_in_stack"] == 2


def test_untrained_networks_are_bitwise_those_of_hydras_launcher(sweep):
    jobs = ("constraint=linf,none", "seed=3,4", "steps=0")
    assert sweep(*jobs, "hydra.sweep.dir=own").code == 0
    assert sweep(*jobs, "hydra.sweep.dir=basic", *BASIC).code == 0
    for job in map(str, range(4)):
        a, b = (torch.load(Path(root, job, "model.pt"), weights_only=True) for root in ("own", "basic"))
        assert all(torch.equal(a[name], b[name]) for name in b)


def test_sweep_csv_has_a_row_for_each_job(sweep):
    done = sweep("act=relu,maxmin", "seed=range(2)", "hydra.sweep.dir=s")
    assert (done.code, done.err) == (0, "")
    rows = table(Path("s"))
    assert [row["job"] for row in rows] == ["0", "1", "2", "3"]
    columns = [
        "job",
        "status",
        "reason",
        "act",
        "seed",
        "experiment",
        "device",
        "dataset.n_train",
        "dataset.n_test",
    ]
    assert list(rows[0])[: len(columns)] == columns
    assert [(row["act"], row["seed"]) for row in rows] == [(a, s) for a in ("relu", "maxmin") for s in "01"]
    for row in rows:
        metrics = json.loads(Path("s", row["job"], "metrics.json").read_text())
        assert float(row["test.accuracy"]) == metrics["test"]["accuracy"]
        assert float(row["lipschitz.certified"]) == metrics["lipschitz"]["certified"]
        assert float(row["gradient_norm.by.data"]) == metrics["gradient_norm"]["by"]["data"]
        assert (row["status"], row["reason"]) == ("ok", "")


def test_what_only_constructors_refuse_fails_that_job_alone(sweep):
    done = sweep("act.n_groups=5,8", "lipschitz=1,-1", "hydra.sweep.dir=s")
    assert done.code == 1
    reasons = {
        0: "model.width=16: must be a multiple of act.n_groups=5",
        1: "lipschitz=-1.0: must be a finite number above 0",
        3: "lipschitz=-1.0: must be a finite number above 0",
    }
    assert done.err.splitlines() == [f"lipexp: {reason} (s/{job})" for job, reason in reasons.items()]
    for job, reason in reasons.items():
        assert json.loads(Path(f"s/{job}/failed.json").read_text()) == {"reason": reason, "step": 0}
        assert Path(f"s/{job}/.hydra/config.yaml").is_file()
    assert [row["status"] for row in table(Path("s"))] == ["failed", "failed", "ok", "failed"]
    assert [row["reason"] for row in table(Path("s"))] == [reasons.get(job, "") for job in range(4)]
    assert "1 ok, 3 failed\ns/sweep.csv\n" in done.out


def test_a_loss_that_turns_nan_fails_that_job_alone(sweep):
    jobs = ("constraint=none", "loss=bce")
    done = sweep(*jobs, "optim.lr=0.01,1e30,0.02", "hydra.sweep.dir=s")
    assert (done.code, done.err) == (1, "lipexp: the loss is no longer finite at step 2 (s/1)\n")
    assert json.loads(Path("s/1/failed.json").read_text()) == {"reason": "the loss is no longer finite", "step": 2}
    assert sweep(*jobs, "optim.lr=0.01,0.011,0.02", "hydra.sweep.dir=sound").code == 0
    for job in ("0", "2"):
        state, sound = (torch.load(Path(root, job, "model.pt"), weights_only=True) for root in ("s", "sound"))
        assert all(torch.equal(state[name], sound[name]) for name in sound)
    assert sweep(*jobs, "optim.lr=1e30", "seed=0,1", "hydra.sweep.dir=lost").out.count("all failed") == 1
    assert [row["status"] for row in table(Path("lost"))] == ["failed", "failed"]


USER_CODE = """
    from torch import nn

    class Picky(nn.Module):
        norms = (2,)

        def forward(self, x):
            if len(x) > 1 or abs(float(x.detach().sum())) > 1e6:
                raise RuntimeError("one at a time, and a small one\\nas the manual says")
            return x.abs()
"""


def test_an_exception_in_a_users_class_fails_only_the_jobs_that_meet_it(sweep):
    Path("mine").mkdir()
    Path("mine/picky_package.py").write_text(textwrap.dedent(USER_CODE))
    sys.path.append("mine")
    jobs = ("act=relu", "act._target_=picky_package.Picky", "constraint=none", "loss=bce")
    done = sweep(*jobs, "optim.lr=0.01,1e20,0.02", "hydra.sweep.dir=s")
    sys.modules.pop("picky_package", None)
    assert done.code == 1
    assert done.err.startswith("lipexp: RuntimeError: one at a time, and a small one")
    assert done.err.endswith("(traceback in s/1/train.log)\n")
    assert len(done.err.splitlines()) == 1
    assert "Traceback" in Path("s/1/train.log").read_text()
    assert [row["status"] for row in table(Path("s"))] == ["ok", "failed", "ok"]


JOBS = ("steps=20,1500", "seed=range(3)", "eval_every=0")


@pytest.mark.parametrize("moment", ["when the plan is written", "after the first result", "in a worker process"])
def test_a_killed_sweep_is_continued(sweep, tmp_path, moment):
    executor = WORKER if "worker" in moment else ()
    process = start(tmp_path, *JOBS, "hydra.sweep.dir=s", *executor)
    sign = "sweep.json" if "plan" in moment else "*/metrics.json"
    wait_for(lambda: list(Path("s").glob(sign)))
    workers = descendants(process.pid)
    process.kill()
    process.communicate()
    wait_for(lambda: not any(alive(worker) for worker in workers), seconds=5)
    finished = {path: path.stat().st_mtime_ns for path in Path("s").glob("*/metrics.json")}
    plan = Path("s/sweep.json").read_text()
    assert len(finished) < 6
    done = sweep(*JOBS, "hydra.sweep.dir=s", "resume=true")
    assert (done.code, done.err) == (0, "")
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert len(list(Path("s").glob("*/metrics.json"))) == 6
    assert Path("s/sweep.json").read_text() == plan
    assert ("done before" in done.out) == bool(finished)
    assert sweep(*JOBS, "hydra.sweep.dir=whole").code == 0
    assert_same_rows(Path("s"), Path("whole"))
    assert "resume" not in Path("s/sweep.csv").read_text()
    for record in Path("s").glob("*/.hydra"):
        assert "resume" not in (record / "overrides.yaml").read_text()
        assert yaml.safe_load((record / "config.yaml").read_text())["resume"] is False


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def descendants(pid: int) -> list[int]:
    """The processes that `pid` has started, and those that they have: workers are forked by a server."""
    return [process for child in children(pid) for process in (child, *descendants(child))]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_resume_trains_what_is_missing_and_nothing_else(sweep):
    jobs = ("act.n_groups=8,5", "seed=0,1", "hydra.sweep.dir=s")
    assert sweep(*jobs).code == 1
    before = Path("s/sweep.csv").read_text()
    Path("s/1/metrics.json").unlink()
    Path("s/3/failed.json").unlink()
    kept = content(Path("s/0")) | content(Path("s/2"))
    assert sweep(*jobs, "resume=true").code == 1
    assert content(Path("s/0")) | content(Path("s/2")) == kept
    assert [row["status"] for row in table(Path("s"))] == ["ok", "ok", "failed", "failed"]
    again = sweep(*jobs, "resume=true")
    assert again.code == 1
    assert len(again.err.splitlines()) == 2
    assert "stack 1" not in again.out
    assert len(before.splitlines()) == len(Path("s/sweep.csv").read_text().splitlines())


def test_resume_of_something_else_is_refused_and_leaves_it_untouched(sweep):
    assert sweep("seed=0,1", "hydra.sweep.dir=s").code == 0
    Path("other").mkdir()
    Path("other/notes.txt").write_text("mine")
    Path("mine").mkdir()
    Path("mine/config2.yaml").write_text("defaults: [config, _self_]\nlipschitz: 3\n")
    refused = {
        ("seed=0,2", "hydra.sweep.dir=s", "resume=true"): "resume=true: s holds another sweep, of 2 jobs",
        ("seed=0,1", "hydra.sweep.dir=s"): "hydra.sweep.dir=s: is not empty; results are never overwritten",
        ("seed=0,1", "hydra.sweep.dir=other", "resume=true"): "resume=true: other holds no sweep",
        ("seed=0,1", "hydra.sweep.dir=other"): "hydra.sweep.dir=other: is not empty",
        ("-cd", "mine", "-cn", "config2", "seed=0,1", "hydra.sweep.dir=s", "resume=true"): "was another one",
    }
    before = content(Path())
    for arguments, reason in refused.items():
        done = sweep(*arguments)
        assert done.code == 2, arguments
        assert reason in done.err
        assert len(done.err.splitlines()) == 1
    assert content(Path()) == before


def test_resume_of_nothing_begins(sweep):
    assert sweep("seed=0,1", "hydra.sweep.dir=s", "resume=true").code == 0
    assert [row["status"] for row in table(Path("s"))] == ["ok", "ok"]


def test_a_folder_in_use_is_refused(sweep):
    Path("s").mkdir()
    with Path("s/.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for resume in ("false", "true"):
            done = sweep("seed=0,1", "hydra.sweep.dir=s", f"resume={resume}")
            assert (done.code, done.err) == (2, "lipexp: hydra.sweep.dir=s: is in use by another lipexp process\n")
    assert [path.name for path in Path("s").iterdir()] == [".lock"]


def test_of_two_sweeps_in_one_folder_one_wins(tmp_path):
    both = [start(tmp_path, "seed=0,1", "hydra.sweep.dir=s") for _ in range(2)]
    errors = [process.communicate(timeout=60)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2]
    (error,) = filter(None, errors)
    assert len(error.splitlines()) == 1
    assert "is in use by another lipexp process" in error or "is not empty" in error
    assert [row["status"] for row in table(tmp_path / "s")] == ["ok", "ok"]


@pytest.mark.slow
def test_sweeps_at_the_same_time_get_their_own_folders(tmp_path):
    several = [start(tmp_path, "seed=0,1") for _ in range(4)]
    errors = [process.communicate(timeout=120)[1] for process in several]
    assert errors == [""] * 4
    assert len(list(tmp_path.glob("outputs/*/*/sweep.csv"))) == 4


def test_worker_processes_train_the_same(sweep):
    process = ("hydra.launcher.executor=process", "hydra.launcher.workers=2")
    jobs = ("constraint=none", "loss=bce", "optim.lr=0.01,0.02,1e30", "act=relu,maxmin")
    spread = sweep(*jobs, *process, "hydra.sweep.dir=spread")
    inline = sweep(*jobs, "hydra.sweep.dir=inline")
    assert (spread.code, inline.code) == (1, 1)
    assert_same_rows(Path("spread"), Path("inline"))
    assert spread.err.replace("spread", "inline") == inline.err
    lines = [line for line in spread.out.splitlines() if line.startswith("stack ")]
    assert sorted(lines) == [line for line in inline.out.splitlines() if line.startswith("stack ")]
    assert "2 processes" in spread.out


@pytest.mark.parametrize("executor", [(), WORKER], ids=["inline", "process"])
def test_ctrl_c_keeps_what_is_finished(tmp_path, executor):
    process = start(tmp_path, "steps=20,1000000", "seed=0,1", *executor, "hydra.sweep.dir=s")
    wait_for(lambda: len(list(tmp_path.glob("s/*/metrics.json"))) == 2)
    workers = descendants(process.pid)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "lipexp: interrupted\n")
    wait_for(lambda: not any(alive(worker) for worker in workers), seconds=5)
    assert [row["status"] for row in table(tmp_path / "s")] == ["ok", "ok", "missing", "missing"]
    assert not list(tmp_path.glob("s/*/failed.json"))


def test_a_worker_that_dies_leaves_its_jobs_to_be_resumed(tmp_path):
    process = start(tmp_path, "steps=1000000", "seed=0,1", *WORKER, "hydra.sweep.dir=s")
    wait_for(lambda: list(tmp_path.glob("s/*/.hydra")))
    (worker,) = (worker for server in children(process.pid) for worker in children(server))
    os.kill(worker, signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert len(err.splitlines()) == 1
    assert "2 jobs are missing: a worker process died" in err
    assert [row["status"] for row in table(tmp_path / "s")] == ["missing", "missing"]


@pytest.mark.parametrize("overrides", [("hydra/launcher=basic",), BASIC])
def test_hydras_own_launcher_still_works(sweep, overrides):
    assert sweep("seed=0,1", "hydra.sweep.dir=s", *overrides).code == 0
    assert Path("s/multirun.yaml").is_file()
    assert len(list(Path("s").glob("*/metrics.json"))) == 2
    refused = sweep("steps=5,foo", "hydra.sweep.dir=t", "hydra/launcher=basic")
    assert refused.code == 2
    assert not list(Path().glob("t/*/metrics.json"))


def test_the_stack_is_also_handed_jobs_by_hydras_sweeper(sweep):
    assert sweep("seed=0,1", "hydra.sweep.dir=s", "hydra/sweeper=basic").code == 0
    assert [row["status"] for row in table(Path("s"))] == ["ok", "ok"]


def test_the_limit_splits_a_sweep_and_the_screen_says_so(sweep):
    assert sweep("steps=0", "hydra.sweep.dir=one").code == 0
    run_bytes = json.loads(Path("one/sweep.json").read_text())["run_bytes"]
    done = sweep("seed=range(3)", f"hydra.launcher.memory_gib={2.5 * run_bytes / 2**30}", "steps=0")
    assert done.code == 0
    first, *lines = done.out.splitlines()
    assert (
        first
        == f"lipexp train -m  3 jobs, 2 stacks (1 of 2 runs, 1 of 1 run), about {run_bytes / 1e6:.2g} MB a run"
    )
    assert [line.partition(":")[0] for line in lines[:2]] == ["stack 1 of 2, 1 run", "stack 2 of 2, 2 runs"]
