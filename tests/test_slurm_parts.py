"""What of the sweeps through SLURM needs none: options, refusals, requeueing, reports, and the record."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_sweep import TINY

from lipexp.sweep.compose import Job
from lipexp.config import ConfigError
from lipexp.sweep.options import Options
from lipexp.sweep.slurm import SlurmOptions
from lipexp.sweep.slurm import task as slurm_task
from lipexp.sweep.slurm.record import Record
from lipexp.sweep.slurm.task import Progress, Reporter, StackTask
from lipexp.train import build


@pytest.fixture
def sweep(lipexp):
    """sweep("seed=0,1") -> Result, of a sweep that is to be submitted from an empty folder."""
    return lambda *arguments: lipexp("train", "-m", "hydra.launcher.executor=slurm", *arguments, *TINY)


UNUSABLE = {
    "executor=slum": "hydra.launcher.executor=slum: no such option; did you mean slurm? (inline, process, slurm)",
    "slurm=3": "hydra.launcher.slurm=3: has settings of its own",
    "slurm.partitio=a": "hydra.launcher.slurm.partitio: no such setting; did you mean",
    "slurm.wait=maybe": "hydra.launcher.slurm.wait=maybe: must be true or false",
    "slurm.partition=3": "hydra.launcher.slurm.partition=3: must be a name",
    "slurm.timeout_min=1": "hydra.launcher.slurm.timeout_min=1: must be a whole number, at least 2",
    "slurm.mem_gb=0": "hydra.launcher.slurm.mem_gb=0: must be a finite number above 0",
    "slurm.cpus_per_task=1.5": "hydra.launcher.slurm.cpus_per_task=1.5: must be a whole number, at least 1",
    "slurm.gpus_per_node=0": "hydra.launcher.slurm.gpus_per_node=0: must be a whole number, at least 1",
    "slurm.resubmissions=-1": "hydra.launcher.slurm.resubmissions=-1: must be a whole number, at least 0",
    "slurm.setup=module": "hydra.launcher.slurm.setup=module: must be a list of shell commands",
    "slurm.additional_parameters=[a]": "hydra.launcher.slurm.additional_parameters=['a']: must be options of",
}


@pytest.mark.parametrize(("option", "refusal"), UNUSABLE.items(), ids=UNUSABLE)
def test_options_that_cannot_be_used(sweep, option, refusal):
    refused = sweep("seed=0,1", f"hydra.launcher.{option}")
    assert refused.code == 2
    assert refused.err.startswith(f"lipexp: {refusal}")
    assert len(refused.err.splitlines()) == 1
    assert not list(Path().iterdir())


def test_a_machine_without_slurm(sweep, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    refused = sweep("seed=0,1")
    reason = "there is no sbatch on this machine (inline, process)"
    assert (refused.code, refused.err) == (2, f"lipexp: hydra.launcher.executor=slurm: {reason}\n")
    assert not list(Path().iterdir())


def test_an_installation_without_submitit(sweep, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    refused = sweep("seed=0,1")
    reason = "needs submitit, which is not installed: pip install 'lipexp[slurm]'"
    assert (refused.code, refused.err) == (2, f"lipexp: hydra.launcher.executor=slurm: {reason}\n")
    assert not list(Path().iterdir())


def test_a_stack_may_take_half_of_the_memory_of_its_slurm_job():
    assert Options("slurm", slurm=SlurmOptions(mem_gb=3)).memory(free=1) == 1.5 * 2**30
    assert Options("slurm", workers=4, memory_gib=0.25).memory(free=1) == 2**28
    assert Options("slurm").processes == 1
    assert Options("slurm", workers=4).processes == 4


def test_the_device_of_another_machine_is_not_looked_for_here(compose, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    build(compose("device=cuda"), here=False)
    with pytest.raises(ConfigError, match="device=cuda: no CUDA device is available here"):
        build(compose("device=cuda"))


@pytest.fixture
def called(tmp_path) -> Callable[..., StackTask]:
    """called(seconds=60, timeout_min=2) -> a task of two jobs that has run for so long."""

    def job(index: int) -> Job:
        folder = tmp_path / str(index)
        folder.mkdir(exist_ok=True)
        return Job(index, (), {}, {}, "", {}, folder)

    def called(seconds: float, timeout_min: int = 60, restarts: int = 2) -> StackTask:
        task = StackTask([job(0), job(1)], tmp_path, timeout_min, restarts)
        task.started = time.monotonic() - seconds
        task.rest = list(task.jobs)
        task.reporter = Reporter(Progress.file(tmp_path, "7"))
        return task

    return called


def test_a_stack_that_has_no_time_left_gives_up(called, tmp_path):
    task = called(seconds=61, timeout_min=2)
    reason = "ran into its time limit, hydra.launcher.slurm.timeout_min=2"
    with pytest.raises(SystemExit, match=reason):
        task.checkpoint()
    progress = Progress.read(tmp_path, "7")
    assert progress is not None
    assert progress.given_up == reason
    (tmp_path / "1" / "metrics.json").touch()  # but not when it has finished a run
    assert task.checkpoint().function == task


def test_a_stack_is_not_restarted_without_end(called, monkeypatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert called(seconds=61).checkpoint().function == called(seconds=0)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    with pytest.raises(SystemExit, match="was interrupted 3 times"):
        called(seconds=61).checkpoint()


@pytest.mark.parametrize(
    ("raised", "status"), [(RuntimeError("not requeued"), "not requeued"), (SystemExit(-1), -1)]
)
def test_the_end_is_not_taken_for_an_error_of_a_users_class(raised, status):
    """Which may be any Exception, or SystemExit."""

    def warn(*received: object) -> None:
        raise raised

    before = signal.signal(signal.SIGUSR2, warn)
    try:
        slurm_task._let_nothing_catch(signal.SIGUSR2)
        with pytest.raises(slurm_task._TaskEnds) as end:
            signal.raise_signal(signal.SIGUSR2)
        assert not isinstance(end.value, Exception | SystemExit)
        assert end.value.args == (status,)
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_progress_is_written_when_it_tells_something(tmp_path, monkeypatch):
    clock = iter([0.0, 0.5, 1.1, 1.1, 1.2, 1.3, 1.3, 1.4])
    monkeypatch.setattr(slurm_task.time, "monotonic", lambda: next(clock))
    reporter = Reporter(Progress.file(tmp_path, "7_1"))  # at 0
    seen = []
    for update in ((0, 0, 50, None), (0, 10, None, None), (0, 20, None, None), (0, 50, None, "accuracy 1")):
        reporter.update(*update)
        seen.append(Progress.read(tmp_path, "7_1"))
    assert seen == [Progress(), Progress(10, 50), Progress(10, 50), Progress(50, 50, "accuracy 1")]
    assert Progress.read(tmp_path, "7_2") is None


def test_the_record_knows_where_jobs_were_submitted_last(tmp_path):
    record = Record(tmp_path / "slurm" / "submissions.json")
    assert record.last([0]) is None
    record.complete(record.begin([[0, 1], [2, 3]]), "17_0")
    record.drop(record.begin([[2]]))
    record.complete(record.begin([[3]]), "18")
    again = Record(tmp_path / "slurm" / "submissions.json")
    assert [task.id for task in again.tasks] == ["17_0", "17_1", "18"]
    assert [again.last([job]).id for job in range(4)] == ["17_0", "17_0", "17_1", "18"]
    (tmp_path / "broken.json").write_text("[{}]")
    with pytest.raises(ConfigError, match=r"broken\.json cannot be read"):
        Record(tmp_path / "broken.json")
    again.begin([[0]])  # interrupted here: its number is not known
    assert Record(tmp_path / "slurm" / "submissions.json").last([0]).id == "17_0"
