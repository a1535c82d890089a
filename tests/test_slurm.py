"""Sweeps through a real SLURM, of this machine alone (.ci/slurm)."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from test_sweep import TINY, assert_same_rows, start, table, wait_for

pytestmark = pytest.mark.slurm

SCRIPT = Path(__file__).resolve().parent.parent / ".ci" / "slurm"
SLURM = ("hydra.launcher.executor=slurm", "hydra.launcher.slurm.mem_gb=1")
NO_WAIT = "hydra.launcher.slurm.wait=false"


@pytest.fixture(scope="session")
def cluster(tmp_path_factory) -> Iterator[None]:
    """SLURM on this machine, with the partitions main and urgent; urgent preempts main."""
    folder = tmp_path_factory.mktemp("cluster")
    started = subprocess.run([SCRIPT, "start", folder], capture_output=True, text=True, check=False)
    assert started.returncode == 0, started.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        yield
    subprocess.run([SCRIPT, "stop", folder], check=True)


@pytest.fixture
def sweep(lipexp):
    """Trains a sweep in this process, in an empty folder, by its own executor: sweep("seed=0,1") -> Result."""
    return lambda *arguments: lipexp("train", "-m", *arguments, *TINY)


@pytest.fixture
def busy(cluster) -> Iterator[int]:
    """Something else holds the whole machine until it is cancelled; the number of its SLURM job."""
    answer = run("sbatch", "--parsable", "--ntasks=2", "--output=/dev/null", "--wrap=sleep 600")
    wait_for(lambda: "RUNNING" in run("squeue", "--noheader", "--format=%T"))
    yield int(answer)
    run("scancel", f"--user={os.getuid()}")
    wait_for(lambda: not run("squeue", "--noheader"))


@pytest.fixture
def background(tmp_path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """background("seed=0,1") -> the same sweep in a process of its own."""
    started = []

    def begin(*arguments: str) -> subprocess.Popen[str]:
        started.append(start(tmp_path, *arguments))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def wait_with(process: subprocess.Popen[str], condition: Callable[[], object]) -> None:
    """Until the condition holds, before the process ends."""
    wait_for(lambda: condition() or process.poll() is not None)
    assert condition(), process.communicate()


def run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def submissions() -> list[dict]:
    return json.loads(Path("s/slurm/submissions.json").read_text())


def worker() -> int:
    """The process that trains a stack of the sweep s."""
    folder = str(Path("s/slurm").absolute())
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has just ended
            words = (process / "cmdline").read_bytes().decode().split("\0")
            if folder in words and words[0] != "srun":
                return int(process.name)
    raise AssertionError("no stack is training")


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
ONE_BY_ONE = ("act=relu", "act._target_=alone.Alone", "seed=range(3)", "eval_every=0")


@pytest.fixture
def alone(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "alone", raising=False)
    (tmp_path / "alone.py").write_text(ALONE)
    yield
    sys.modules.pop("alone", None)


def test_32_jobs_in_4_stacks_end_as_with_the_local_executor(cluster, sweep):
    jobs = ("act=relu,groupsort", "lipschitz=1,2", "seed=range(8)", "steps=100", "eval_every=50")
    done = sweep(*jobs, *SLURM, "hydra.launcher.workers=4", "hydra.sweep.dir=s")
    assert (done.code, done.err) == (0, "")
    first, second, *lines = done.out.splitlines()
    assert first.startswith("lipexp train -m  32 jobs, 4 stacks (4 of 8 runs)")
    assert re.fullmatch(r"SLURM job \d+: 4 stacks submitted", second)
    shown = sorted(line for line in lines if line.startswith("stack "))
    assert [line[:20] for line in shown] == [f"stack {n} of 4, 8 runs" for n in (1, 2, 3, 4)]
    assert all(": 100 steps  test accuracy best" in line for line in shown)
    assert lines[-2:] == ["32 ok", "s/sweep.csv"]
    (submission,) = submissions()
    assert [len(stack) for stack in submission["stacks"]] == [8] * 4
    local = sweep(*jobs, "hydra.sweep.dir=local")
    assert local.code == 0
    assert_same_rows(Path("s"), Path("local"))
    assert len(local.out.splitlines()) == len(done.out.splitlines()) - 3  # two stacks, and nothing submitted
    for job in map(str, range(32)):
        own, other = ({path.name for path in Path(root, job).rglob("*")} for root in ("s", "local"))
        assert own == other


def test_a_killed_stack_is_submitted_again_and_keeps_what_is_finished(cluster, sweep, alone, background):
    waiting = background(*ONE_BY_ONE, "steps=500", *SLURM, "hydra.sweep.dir=s")
    wait_with(waiting, lambda: list(Path("s").glob("*/metrics.json")))
    os.kill(worker(), signal.SIGKILL)
    finished = {path: path.stat().st_mtime_ns for path in Path("s").glob("*/metrics.json")}
    assert len(finished) < 3
    out, err = waiting.communicate(timeout=60)
    assert (waiting.returncode, err) == (0, "")
    first, second = (submission["id"] for submission in submissions())
    assert f"stack 1 of 1, 3 runs: SLURM job {first} died (FAILED), submitted again as {second}\n" in out
    assert submissions()[1]["stacks"] == [
        [job for job in range(3) if Path(f"s/{job}/metrics.json") not in finished]
    ]
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert sweep(*ONE_BY_ONE, "steps=500", "hydra.sweep.dir=local").code == 0
    assert_same_rows(Path("s"), Path("local"))


def test_a_preempted_stack_goes_on_by_itself_and_keeps_what_is_finished(cluster, sweep, alone, background):
    waiting = background(*ONE_BY_ONE, "steps=2000", *SLURM, "hydra.sweep.dir=s")
    wait_with(waiting, lambda: list(Path("s").glob("*/metrics.json")))
    run("sbatch", "--partition=urgent", "--ntasks=2", "--output=/dev/null", "--wrap=true")
    wait_for(lambda: "RUNNING" not in run("squeue", "--noheader", "--format=%T", "--partition=main"))
    finished = {path: path.stat().st_mtime_ns for path in Path("s").glob("*/metrics.json")}
    assert len(finished) < 3
    _, err = waiting.communicate(timeout=60)
    assert (waiting.returncode, err) == (0, "")
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    (submission,) = submissions()
    assert "DUE TO PREEMPTION" in Path(f"s/slurm/{submission['id']}_0_log.err").read_text()
    assert [row["status"] for row in table(Path("s"))] == ["ok"] * 3


def test_a_warned_stack_is_queued_again(cluster, sweep, alone, background):
    waiting = background(*ONE_BY_ONE, "steps=500", *SLURM, "hydra.sweep.dir=s")
    wait_with(waiting, lambda: list(Path("s").glob("*/metrics.json")))
    (submission,) = submissions()
    run("scancel", "--signal=USR2", submission["id"])
    _, err = waiting.communicate(timeout=60)
    assert (waiting.returncode, err) == (0, "")
    log = Path(f"s/slurm/{submission['id']}_0_log.out").read_text()
    assert log.count("Starting with JobEnvironment") == 2
    assert f"Requeued job {submission['id']}" in log
    assert len(submissions()) == 1
    assert [row["status"] for row in table(Path("s"))] == ["ok"] * 3


def edit(margin: float) -> None:
    """A configuration file of the user's."""
    Path("mine/loss").mkdir(parents=True, exist_ok=True)
    Path("mine/loss/mine.yaml").write_text(f"_target_: lipexp.losses.Hinge\nmargin: {margin}\n")


def test_a_sweep_is_left_to_slurm_and_collected_later(busy, sweep):
    edit(margin=0.3)
    jobs = ("-cd", "mine", "loss=mine", "act=relu,groupsort", "seed=0,1", *SLURM, "hydra.sweep.dir=s")
    left = sweep(*jobs, NO_WAIT)
    assert (left.code, left.err) == (0, "")
    number = submissions()[0]["id"]
    first, second = f"{number}_0", f"{number}_1"
    where = (
        f"2 stacks left to SLURM (scancel {number} ends it); hydra.sweep.dir=s resume=true collects the results"
    )
    assert left.out.splitlines()[1:] == [
        f"SLURM job {number}: 2 stacks submitted",
        where,
        "4 queued",
        "s/sweep.csv",
    ]
    reasons = [f"SLURM job {task}" for task in (first, first, second, second)]
    assert [(row["status"], row["reason"]) for row in table(Path("s"))] == [
        ("queued", reason) for reason in reasons
    ]
    assert not list(Path("s").glob("*/metrics.json"))

    again = sweep(*jobs, NO_WAIT, "resume=true")
    assert (again.code, again.err) == (0, "")
    assert f"stack 1 of 2, 2 runs: SLURM job {first} (PENDING, " in again.out
    assert f"stack 2 of 2, 2 runs: SLURM job {second} (PENDING, " in again.out
    assert "4 queued" in again.out
    assert len(submissions()) == 1
    here = sweep(*jobs, "hydra.launcher.executor=inline", "resume=true")
    assert here.code == 2
    assert here.err.startswith("lipexp: hydra.launcher.executor=inline: SLURM still works on this sweep")
    assert f"scancel {number} ends it" in here.err

    edit(margin=0.6)
    run("scancel", second)
    run("scancel", str(busy))
    collected = sweep(*jobs, "resume=true")
    assert (collected.code, collected.err) == (0, "")
    assert "the configuration has changed; the sweep goes on with the one that was submitted" in collected.out
    assert f"stack 1 of 2, 2 runs: SLURM job {first} (" in collected.out
    assert f"stack 2 of 2, 2 runs: SLURM job {second} ended (CANCELLED); it left no log" in collected.out
    assert f"SLURM job {submissions()[1]['id']}: 1 stack submitted" in collected.out
    assert submissions()[1]["stacks"] == [[2, 3]]
    assert [row["status"] for row in table(Path("s"))] == ["ok"] * 4
    for job in range(4):
        assert yaml.safe_load(Path(f"s/{job}/.hydra/config.yaml").read_text())["loss"]["margin"] == 0.3
    edit(margin=0.3)
    assert sweep(*jobs, "hydra.launcher.executor=inline", "hydra.sweep.dir=local").code == 0
    assert_same_rows(Path("s"), Path("local"))


def test_a_submission_that_was_not_told_its_number_is_found(busy, sweep):
    jobs = ("seed=0,1", *SLURM, NO_WAIT, "hydra.sweep.dir=s")
    assert sweep(*jobs).code == 0
    (submission,) = submissions()
    Path("s/slurm/submissions.json").write_text(json.dumps([submission | {"id": None}]))
    found = sweep(*jobs, "resume=true")
    assert found.code == 0
    assert f"stack 1 of 1, 2 runs: SLURM job {submission['id']} (PENDING, " in found.out
    assert submissions() == [submission]


def test_resources_are_those_of_each_stack(busy, sweep):
    node = "hydra.launcher.slurm"
    options = (
        f"{node}.partition=main",
        f"{node}.timeout_min=7",
        f"{node}.mem_gb=0.5",
        f"{node}.cpus_per_task=2",
        f"{node}.setup=['export NOTHING=1']",
        f"{node}.additional_parameters={{comment: ours, nice: 10}}",
    )
    jobs = ("act=relu,maxmin", "hydra.launcher.workers=1", "hydra.sweep.dir=s")
    assert sweep(*jobs, *SLURM, *options, NO_WAIT).code == 0
    number = submissions()[0]["id"]
    told = run("scontrol", "--oneliner", "show", "job", number)
    for setting in ("Partition=main", "TimeLimit=00:07:00", "mem=512M", "CPUs/Task=2", "Comment=ours", "Nice=10"):
        assert setting in told
    assert "ArrayTaskThrottle=1" in told
    assert "\nexport NOTHING=1\n" in Path(f"s/slurm/{number}_submission.sh").read_text()


def test_ctrl_c_leaves_the_sweep_to_slurm(cluster, sweep, background):
    jobs = ("seed=0,1", "steps=500", *SLURM, "hydra.sweep.dir=s")
    waiting = background(*jobs)
    wait_with(waiting, lambda: list(Path("s/slurm").glob("*_progress.json")))
    waiting.send_signal(signal.SIGINT)
    out, err = waiting.communicate(timeout=60)
    assert (waiting.returncode, err) == (130, "lipexp: interrupted\n")
    (submission,) = submissions()
    assert f"1 stack left to SLURM (scancel {submission['id']} ends it); hydra.sweep.dir=s resume=true" in out
    assert [row["status"] for row in table(Path("s"))] == ["queued"] * 2
    assert sweep(*jobs, "resume=true").code == 0
    assert submissions() == [submission]
    assert [row["status"] for row in table(Path("s"))] == ["ok"] * 2


def test_a_cancelled_stack_is_not_submitted_again(busy, sweep, background):
    waiting = background("seed=0,1", *SLURM, "hydra.sweep.dir=s")
    wait_with(waiting, lambda: Path("s/slurm/submissions.json").exists() and submissions()[0]["id"])
    (submission,) = submissions()
    run("scancel", submission["id"])
    _, err = waiting.communicate(timeout=60)
    assert waiting.returncode == 1
    assert err == (
        f"lipexp: 2 jobs missing: SLURM job {submission['id']} ended (CANCELLED); "
        "hydra.sweep.dir=s resume=true submits them again; it left no log\n"
    )
    assert len(submissions()) == 1


@pytest.mark.parametrize(
    ("setup", "submitted", "reason", "log"),
    [
        ("echo the disk is full >&2; exit 3", 2, "died (FAILED), 2 times", "the disk is full"),
        ('mkdir s/slurm/"$SLURM_JOB_ID"_progress.json', 1, "ended with an error", "exit code 1"),
    ],
    ids=["killed", "exception"],
)
def test_a_job_that_dies_shows_the_end_of_its_log(cluster, sweep, setup, submitted, reason, log):
    lines = (f"hydra.launcher.slurm.setup=['{setup}']", "hydra.launcher.slurm.resubmissions=1")
    dead = sweep("seed=0,1", *lines, *SLURM, "hydra.sweep.dir=s")
    assert dead.code == 1
    first, *end = dead.err.splitlines()
    number = submissions()[-1]["id"]
    assert first == (
        f"lipexp: 2 jobs missing: SLURM job {number} {reason}; hydra.sweep.dir=s resume=true submits them again; "
        f"s/slurm/{number}_0_log.err ends:"
    )
    assert 1 <= len(end) <= 5
    assert end[-1].startswith("    ")
    assert end[-1].endswith(log)
    assert len(submissions()) == submitted
    assert [row["status"] for row in table(Path("s"))] == ["missing"] * 2


@pytest.mark.parametrize(
    ("option", "refusal"),
    {
        "partition=mian": "hydra.launcher.slurm.partition=mian: no such partition; did you mean main? (main,",
        "mem_gb=1e6": "hydra.launcher.executor=slurm: Memory specification can not be satisfied",
        "additional_parameters={fo: 1}": "hydra.launcher.executor=slurm: unrecognized option '--fo=1'",
    }.items(),
)
def test_what_slurm_refuses_is_one_line_and_nothing_is_left(cluster, sweep, option, refusal):
    refused = sweep("seed=0,1", *SLURM, f"hydra.launcher.slurm.{option}", "hydra.sweep.dir=s")
    assert refused.code == 2
    assert refused.err.startswith(f"lipexp: {refusal}")
    assert len(refused.err.splitlines()) == 1
    assert refused.out == ""
    assert not Path("s").exists()


def test_a_refused_resubmission_leaves_the_sweep_as_it_was(busy, sweep):
    jobs = ("seed=0,1", *SLURM, NO_WAIT, "hydra.sweep.dir=s")
    assert sweep(*jobs).code == 0
    run("scancel", submissions()[0]["id"])
    before = files(Path("s"))
    refused = sweep(*jobs, "hydra.launcher.slurm.partition=mian", "resume=true")
    assert refused.code == 2
    assert len(refused.err.splitlines()) == 1
    assert files(Path("s")) == before
    assert sweep(*jobs, "resume=true").code == 0
    assert len(submissions()) == 2


def test_a_slurm_that_does_not_answer(cluster, sweep, monkeypatch, tmp_path):
    conf = Path(os.environ["SLURM_CONF"]).read_text()
    (tmp_path / "slurm.conf").write_text(re.sub("SlurmctldPort=.*", "SlurmctldPort=1", conf))
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    refused = sweep("seed=0,1", *SLURM, "hydra.sweep.dir=s")
    assert refused.code == 2
    assert refused.err.startswith("lipexp: hydra.launcher.executor=slurm: ")
    assert "Unable to contact slurm controller" in refused.err
    assert len(refused.err.splitlines()) == 1
    assert not Path("s").exists()


def test_a_search_asks_for_the_same_trials_as_one_on_this_machine(cluster, sweep):
    search = ("hydra/sweeper=search", "hydra.sweeper.trials=6", "hydra.sweeper.round=3", "seed=0,1")
    space = ("optim.lr=tag(log,interval(1e-4,1e-1))", "act=relu,maxmin")
    done = sweep(*search, *space, *SLURM, "hydra.sweep.dir=there")
    assert (done.code, done.err) == (0, "")
    assert len(re.findall(r"^SLURM job \d+: \d stacks? submitted$", done.out, re.MULTILINE)) == 2
    assert "round 2 of 2: 6 trials, best test.accuracy" in done.out
    assert sweep(*search, *space, "hydra.sweep.dir=here").code == 0
    assert_same_rows(Path("there"), Path("here"))


def test_a_search_does_not_leave_its_rounds_to_slurm(cluster, sweep):
    done = sweep("hydra/sweeper=search", "act=relu,maxmin", *SLURM, NO_WAIT, "hydra.sweep.dir=s")
    assert done.code == 2
    assert done.err.startswith("lipexp: hydra.launcher.slurm.wait=false: does not suit a search")
    assert not Path("s").exists()
