"""Sweeps through a real SLURM, of this machine alone (.ci/slurm)."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pandas as pd
import pytest
import yaml
from commands import TINY, content, ended, start, statuses, wait_for

pytestmark = pytest.mark.slurm

SCRIPT = Path(__file__).resolve().parent.parent / ".ci" / "slurm"
SLURM = ("hydra.launcher.executor=slurm", "hydra.launcher.slurm.mem_gb=1")
NO_WAIT = "hydra.launcher.slurm.wait=false"
S = Path("s")  # the folder of the sweeps


@pytest.fixture(scope="session")
def daemons(tmp_path_factory) -> Iterator[None]:
    """SLURM on this machine, with the partitions main and urgent; urgent preempts main."""
    folder = tmp_path_factory.mktemp("cluster")
    started = subprocess.run([SCRIPT, "start", folder], capture_output=True, text=True, check=False)
    assert started.returncode == 0, started.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        yield
    subprocess.run([SCRIPT, "stop", folder], check=True)


@pytest.fixture
def sweep(daemons, lipexp):
    """Trains a sweep in the folder s, by its own executor: sweep("seed=0,1") -> Result."""
    yield lambda *arguments: lipexp("train", "-m", *TINY, "hydra.sweep.dir=s", *arguments)
    run("scancel", f"--user={os.getuid()}")
    wait_for(lambda: not run("squeue", "--noheader"))


@pytest.fixture
def background(sweep, tmp_path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """background("seed=0,1") -> the same through SLURM, in a process of its own that has begun to train."""
    started = []

    def begin(*arguments: str) -> subprocess.Popen[str]:
        started.append(start(tmp_path, "train", "-m", *TINY, "hydra.sweep.dir=s", *SLURM, *arguments))
        wait_for(lambda: list(S.glob("slurm/*_progress.json")))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def busy(sweep) -> str:
    """Something else holds the whole machine until it is cancelled; the number of its SLURM job."""
    number = run("sbatch", "--parsable", "--ntasks=2", "--output=/dev/null", "--wrap=sleep 600").strip()
    wait_for(lambda: "RUNNING" in run("squeue", "--noheader", "--format=%T"))
    return number


def run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def submitted() -> dict[str, list[int]]:
    """SLURM's number of each stack -> its jobs."""
    stacks = json.loads((S / "slurm/submitted.json").read_text())
    return {number: [job["index"] for job in jobs] for number, jobs in stacks.items()}


def assert_same_results(one: str, other: str) -> None:
    """Equal rows of sweep.csv in equal order, up to rounding."""
    tables = [pd.read_csv(f"{folder}/sweep.csv") for folder in (one, other)]
    assert set(tables[0]["status"]) == {"ok"}
    left, right = (table.filter(regex=r"^(?!timing\.|environment\.|model_sha256)") for table in tables)
    pd.testing.assert_frame_equal(left, right, rtol=1e-6)


def test_the_stacks_are_one_array_and_end_as_with_the_local_executor(sweep):
    jobs = ("act=relu,groupsort", "constraint=spectral,linf", "seed=range(8)", "steps=100", "eval_every=50")
    done = sweep(*jobs, *SLURM)
    assert (done.code, done.err) == (0, "")
    first, second, *lines = done.out.splitlines()
    assert first.startswith("lipexp train -m  32 jobs, 4 stacks (4 × 8 runs)")
    assert re.fullmatch(r"SLURM job \d+: 4 stacks submitted", second)
    shown = sorted(line for line in lines if line.startswith("stack "))
    assert [line[:20] for line in shown] == [f"stack {n} of 4, 8 runs" for n in (1, 2, 3, 4)]
    assert all(": 100 steps  val accuracy best" in line for line in shown)
    assert lines[-3:-1] == ["32 ok", "s/sweep.csv"]
    assert [number.partition("_")[2] for number in submitted()] == ["0", "1", "2", "3"]
    assert sweep(*jobs, "hydra.sweep.dir=local").code == 0
    assert_same_results("s", "local")


# A class that breaks stacks, so that their runs are trained and finished one after the other.
ALONE = """
from torch import nn

class Alone(nn.Module):
    norms = (2,)

    def forward(self, x):
        if len(x) > 1:
            raise RuntimeError("one at a time")
        return x.abs()
"""


def kill() -> None:
    """Kill the process that trains a stack of the sweep s."""
    folder = str(Path("s/slurm").absolute())
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has just ended
            words = (process / "cmdline").read_bytes().decode().split("\0")
            if folder in words and words[0] != "srun":
                os.kill(int(process.name), signal.SIGKILL)


def preempt() -> None:
    run("sbatch", "--partition=urgent", "--ntasks=2", "--output=/dev/null", "--wrap=true")
    wait_for(lambda: "RUNNING" not in run("squeue", "--noheader", "--format=%T", "--partition=main"))


@pytest.mark.parametrize("interrupt", [kill, preempt])
def test_an_interrupted_stack_goes_on_and_keeps_what_is_finished(background, tmp_path, interrupt):
    (tmp_path / "alone.py").write_text(ALONE)
    waiting = background("act=relu", "act._target_=alone.Alone", "seed=range(3)", "steps=1000")
    wait_for(lambda: list(S.glob("*/metrics.json")))
    interrupt()
    finished = {path: path.stat().st_mtime_ns for path in S.glob("*/metrics.json")}
    assert len(finished) < 3
    code, out, err = ended(waiting)
    assert (code, err, statuses(S)) == (0, "", ["ok"] * 3)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    first, *again = submitted()
    if interrupt is kill:
        rest = [job for job in range(3) if S / str(job) / "metrics.json" not in finished]
        assert submitted() == {first: [0, 1, 2], again[0]: rest}
        assert f"stack 1 of 1, 3 runs: SLURM job {first} died (FAILED), submitted again as {again[0]}\n" in out
    else:  # SLURM starts it again by itself
        assert "DUE TO PREEMPTION" in (S / f"slurm/{first}_0_log.err").read_text()
        assert not again


def cancel(number: str) -> None:
    run("scancel", number)


def end_time(number: str) -> None:
    """Move the time limit to this moment; the signal is the one that SLURM sends before it."""
    run("scancel", "--signal=USR2", number)
    run("scontrol", "update", f"JobId={number}", "EndTime=now")
    wait_for(lambda: "TIMEOUT" in run("squeue", "--states=all", f"--jobs={number}", "--format=%T"))


@pytest.mark.parametrize(("end", "state"), [(cancel, "CANCELLED"), (end_time, "TIMEOUT")])
def test_a_stack_that_is_cancelled_or_out_of_time_is_not_submitted_again(background, end, state):
    waiting = background("seed=0,1", "steps=1000000")
    (number,) = submitted()
    end(number)
    code, out, err = ended(waiting)
    assert code == 1
    assert f"stack 1 of 1, 2 runs: SLURM job {number} ended ({state})\n" in out
    assert err.startswith(
        f"lipexp: 2 jobs missing: SLURM job {number} ended ({state}); "
        f"hydra.sweep.dir=s resume=true submits them again; s/slurm/{number}_0_log.err ends:\n    "
    )
    assert list(submitted()) == [number]
    assert statuses(S) == ["missing"] * 2


@pytest.mark.parametrize(
    ("setup", "times", "reason", "log"),
    [
        ("echo the disk is full >&2; exit 3", 2, "died (FAILED) after 1 resubmission", "the disk is full"),
        ('mkdir s/slurm/"$SLURM_JOB_ID"_progress.json', 1, "ended with an error", "exit code 1"),
    ],
    ids=["killed", "exception"],
)
def test_a_job_that_dies_shows_the_end_of_its_log(sweep, setup, times, reason, log):
    lines = (f"hydra.launcher.slurm.setup=['{setup}']", "hydra.launcher.slurm.resubmissions=1")
    dead = sweep("seed=0,1", *lines, *SLURM)
    first, *end = dead.err.splitlines()
    number = list(submitted())[-1]
    assert first == (
        f"lipexp: 2 jobs missing: SLURM job {number} {reason}; hydra.sweep.dir=s resume=true submits them again; "
        f"s/slurm/{number}_0_log.err ends:"
    )
    assert 1 <= len(end) <= 5
    assert end[-1].startswith("    ")
    assert end[-1].endswith(log)
    assert (dead.code, len(submitted()), statuses(S)) == (1, times, ["missing"] * 2)


def edit(margin: float) -> None:
    """A configuration file that is not lipexp's."""
    Path("mine/loss").mkdir(parents=True, exist_ok=True)
    Path("mine/loss/mine.yaml").write_text(f"_target_: lipexp.losses.Hinge\nmargin: {margin}\n")


def test_a_sweep_is_left_to_slurm_and_collected_later(busy, sweep):
    edit(margin=0.3)
    jobs = ("-cd", "mine", "loss=mine", "act=relu,groupsort", "seed=0,1")
    left = sweep(*jobs, *SLURM, NO_WAIT)
    assert (left.code, left.err) == (0, "")
    first, second = submitted()
    array = first.removesuffix("_0")
    assert left.out.splitlines()[1:] == [
        f"SLURM job {array}: 2 stacks submitted",
        f"2 stacks left to SLURM (scancel {array} ends it); hydra.sweep.dir=s resume=true collects the results",
        "4 queued",
        "s/sweep.csv",
    ]
    assert list(pd.read_csv("s/sweep.csv")["reason"]) == [f"SLURM job {n}" for n in (first, first, second, second)]

    again = sweep(*jobs, *SLURM, NO_WAIT, "resume=true")
    assert (again.code, again.err) == (0, "")
    assert f"stack 1 of 2, 2 runs: SLURM job {first} (PENDING, " in again.out
    assert "4 queued" in again.out
    assert list(submitted()) == [first, second]
    here = sweep(*jobs, "hydra.launcher.executor=inline", "resume=true")
    assert here.code == 2
    assert here.err.startswith("lipexp: hydra.launcher.executor=inline: SLURM still works on this sweep")
    assert f"scancel {array} ends it" in here.err

    edit(margin=0.6)
    run("scancel", second)
    run("scancel", busy)
    collected = sweep(*jobs, *SLURM, "resume=true")
    assert (collected.code, collected.err) == (0, "")
    assert "the configuration has changed; the sweep goes on with the submitted one" in collected.out
    assert re.search(rf"stack 2 of 2, 2 runs: SLURM job {second} \(.*\); it left no log", collected.out)
    assert list(submitted().values()) == [[0, 1], [2, 3], [2, 3]]
    for job in range(4):
        assert yaml.safe_load((S / str(job) / ".hydra/config.yaml").read_text())["loss"]["margin"] == 0.3
    edit(margin=0.3)
    assert sweep(*jobs, "hydra.launcher.executor=inline", "hydra.sweep.dir=local").code == 0
    assert_same_results("s", "local")


def test_ctrl_c_leaves_the_sweep_to_slurm(sweep, background):
    jobs = ("seed=0,1", "steps=1000")
    waiting = background(*jobs)
    waiting.send_signal(signal.SIGINT)
    code, out, err = ended(waiting)
    assert (code, err) == (130, "lipexp: interrupted\n")
    (number,) = submitted()
    assert f"1 stack left to SLURM (scancel {number} ends it); hydra.sweep.dir=s resume=true" in out
    assert statuses(S) == ["queued"] * 2
    assert sweep(*jobs, *SLURM, "resume=true").code == 0
    assert list(submitted()) == [number]
    assert statuses(S) == ["ok"] * 2


def test_resources_are_those_of_each_stack(busy, sweep):
    resources = (
        *("partition=main", "timeout_min=7", "mem_gb=0.5", "cpus_per_task=2", "setup=['export NOTHING=1']"),
        "additional_parameters={comment: ours, nice: 10}",
    )
    options = [f"hydra.launcher.slurm.{resource}" for resource in resources]
    assert sweep("act=relu,maxmin", "hydra.launcher.workers=1", *SLURM, *options, NO_WAIT).code == 0
    number = next(iter(submitted())).partition("_")[0]
    told = run("scontrol", "--oneliner", "show", "job", number)
    settings = ("Partition=main", "TimeLimit=00:07:00", "mem=512M", "CPUs/Task=2", "Comment=ours", "Nice=10")
    assert [setting for setting in (*settings, "ArrayTaskThrottle=1") if setting not in told] == []
    assert "\nexport NOTHING=1\n" in (S / f"slurm/{number}_submission.sh").read_text()


@pytest.mark.parametrize(
    ("option", "refusal"),
    {
        "partition=mian": "invalid partition specified: mian",
        "mem_gb=1e6": "Memory specification can not be satisfied",
        "additional_parameters={fo: 1}": "unrecognized option '--fo=1'",
    }.items(),
)
def test_what_slurm_refuses_is_one_line_and_nothing_is_left(sweep, option, refusal):
    refused = sweep("seed=0,1", *SLURM, f"hydra.launcher.slurm.{option}")
    assert refused.err.startswith(f"lipexp: hydra.launcher.executor=slurm: {refusal}")
    assert (refused.code, refused.out, len(refused.err.splitlines())) == (2, "", 1)
    assert not S.exists()


def test_a_refused_resubmission_leaves_the_sweep_as_it_was(busy, sweep):
    assert sweep("seed=0,1", *SLURM, NO_WAIT).code == 0
    run("scancel", *submitted())
    before = content(S)
    refused = sweep("seed=0,1", *SLURM, "hydra.launcher.slurm.partition=mian", "resume=true")
    assert (refused.code, len(refused.err.splitlines())) == (2, 1)
    assert content(S) == before


def test_a_slurm_that_does_not_answer(sweep, monkeypatch, tmp_path):
    conf = Path(os.environ["SLURM_CONF"]).read_text()
    (tmp_path / "slurm.conf").write_text(re.sub("SlurmctldPort=.*", "SlurmctldPort=1", conf))
    with monkeypatch.context() as patch:
        patch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
        refused = sweep("seed=0,1", *SLURM)
    assert refused.err.startswith("lipexp: hydra.launcher.executor=slurm: ")
    assert (refused.code, len(refused.err.splitlines())) == (2, 1)
    assert not S.exists()


def test_a_search_asks_for_the_same_trials_as_one_on_this_machine(sweep):
    search = ("hydra/sweeper=search", "hydra.sweeper.trials=6", "hydra.sweeper.round=3", "seed=0,1")
    space = ("optim.lr=tag(log,interval(1e-4,1e-1))", "act=relu,maxmin")
    done = sweep(*search, *space, *SLURM)
    assert (done.code, done.err) == (0, "")
    assert len(re.findall(r"^SLURM job \d+: \d stacks? submitted$", done.out, re.MULTILINE)) == 2
    assert sweep(*search, *space, "hydra.sweep.dir=local").code == 0
    assert_same_results("s", "local")
