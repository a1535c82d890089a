"""A sweep as a few stacked models: training what is missing, resuming, sweep.csv.

The jobs of a sweep that share their signature (train.py) train as one stack. A stack is split where memory or the
number of workers asks for it; the split is written into the sweep's folder before anything is trained, and a
resumed sweep reuses it, so that it ends as it would have without the interruption.
"""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.utils import JobReturn
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from lipexp.callbacks import JobCallbacks, job_return
from lipexp.compose import Composer, Job
from lipexp.config import ConfigError
from lipexp.display import SweepDisplay, composing
from lipexp.executors import execute
from lipexp.interrupts import admit_interrupts, find_lost_interrupts, hold_interrupts
from lipexp.options import Options
from lipexp.plan import RECORD, Plan, digest, make_plan
from lipexp.runs import RunFolder, SweepFailed, flat, write_csv, write_file
from lipexp.slurm import Cluster, check_machine, refuse_second
from lipexp.wording import broken_bound, count
from lipexp.workers import prepare_workers

MULTIRUN = "multirun.yaml"  # Hydra's own record: the configuration of the sweep
LOCK = ".lock"


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Holds `folder` for this process.

    Raises:
        ConfigError: another process holds it.
    """
    with (folder / LOCK).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError("hydra.sweep.dir", folder, "is in use by another lipexp process") from None
        yield


@hold_interrupts()
def write_record(folder: Path, master: DictConfig) -> None:
    """multirun.yaml, the configuration of a sweep as Hydra's own sweeper writes it; the first call's stays."""
    if not (folder / MULTIRUN).exists():
        write_file(folder / MULTIRUN, lambda path: OmegaConf.save(master, path))


class End(NamedTuple):
    """How a job ended: `ok`, `failed`, or `missing` when the sweep was interrupted before it.

    `queued` is one that has not: it is left to SLURM.
    """

    status: str
    reason: str = ""
    step: int = 0  # at which it failed
    metrics: Mapping[str, Any] = {}

    @classmethod
    def of(cls, folder: RunFolder) -> End:
        """How the run in `folder` ended, as its files tell."""
        if folder.complete:
            try:
                metrics = folder.metrics()
            except ValueError as error:
                return cls("failed", f"metrics.json cannot be read: {error}")
            if metrics["lipschitz"]["verdict"] == "FAIL":
                return cls("failed", broken_bound(metrics["lipschitz"]), metrics=metrics)
            return cls("ok", metrics=metrics)
        if folder.failed:
            failure = folder.failure()
            return cls("failed", str(failure["reason"]), int(failure["step"]))
        return cls("missing")


class Sweep:
    """The jobs of one sweep and the folder they leave their results in.

    Args:
        callbacks: Hydra's, told of the jobs.
        master: the configuration of the sweep itself, to be written down.
        resumed_in: the hydra.sweep.dir with which the command continues it; None: its own folder.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        folder: Path,
        options: Options,
        resume: bool,
        callbacks: JobCallbacks | None = None,
        master: DictConfig | None = None,
        resumed_in: Path | None = None,
    ) -> None:
        self.jobs = {job.index: job for job in jobs}
        self.folder, self.options, self.resume = folder, options, resume
        self.callbacks, self.master = callbacks, master
        self.resumed_in = resumed_in or folder
        self.cluster: Cluster | None = None

    def run(self) -> list[End]:
        """Train what is missing and write sweep.csv.

        Raises:
            ConfigError: the folder is in use, or holds something else; or SLURM refuses.
            SweepFailed: at the end, if jobs failed.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / LOCK).exists():
            self._check_use()  # before the lock is made: what is not ours stays as it is
        with exclusive(self.folder):
            used = self._check_use()
            if self.options.executor == "slurm":
                self.cluster = Cluster(self.folder, self.options.slurm, self.options.workers)
            else:
                refuse_second(self.folder, self.options.executor)
            plan = self._known_plan() if used else self._new_plan()
            if self.master is not None:
                write_record(self.folder, self.master)
            stacks = [[self.jobs[job] for job in stack if self._missing(job)] for stack in plan.stacks]
            stacks = [stack for stack in stacks if stack]
            if self.cluster is not None and stacks:
                self._submit(self.cluster, stacks, new=not used)
            for number, reason in plan.refused.items():
                if self._missing(number):
                    job = self.jobs[number]
                    self._begin([job])
                    job.write_hydra_files()
                    RunFolder(job.folder).write_failure(reason, step=0)
                    self._finish([job])
            ends = self._train(plan, stacks)
        failures = self._failures(ends)
        if failures:
            raise SweepFailed(failures)
        return ends

    def _submit(self, cluster: Cluster, stacks: Sequence[Sequence[Job]], new: bool) -> None:
        """Hand the stacks to SLURM; where it refuses those of a new sweep, nothing is left behind."""
        try:
            cluster.submit(stacks)
        except ConfigError:
            if new:
                shutil.rmtree(self.folder / "slurm", ignore_errors=True)
                (self.folder / RECORD).unlink()
                (self.folder / LOCK).unlink()
                RunFolder(self.folder).discard_if_empty()
            raise

    def _train(self, plan: Plan, stacks: Sequence[Sequence[Job]]) -> list[End]:
        """Train the jobs that are missing, show and write down how all jobs ended, whatever happens."""
        processes = self.options.processes if self.options.executor == "process" else None
        done = sum(not self._missing(job) for job in self.jobs if job not in plan.refused)
        display = SweepDisplay()
        display.header(len(self.jobs), done, [len(stack) for stack in stacks], plan.run_bytes, processes)
        try:
            if stacks:
                execute(stacks, processes, display, self.cluster, self._begin, self._finish)
        finally:
            ends = [self._end(job) for job in self.jobs.values()]
            rows = [self.row(job, end) for job, end in zip(self.jobs.values(), ends, strict=True)]
            write_csv(self.folder / "sweep.csv", rows)
            display.result(rows, self.folder / "sweep.csv", self.options.table)
        return ends

    def _begin(self, jobs: Sequence[Job]) -> None:
        if self.callbacks is not None:
            self.callbacks.start(jobs)

    def _finish(self, jobs: Sequence[Job]) -> None:
        if self.callbacks is None:
            return
        for job in jobs:
            end = self._end(job)
            if end.status != "queued":
                self.callbacks.end(job, end, None if end.status == "ok" else end.reason or "its worker died")

    def _end(self, job: Job) -> End:
        end = End.of(RunFolder(job.folder))
        where = self.cluster.queued.get(job.index) if self.cluster is not None else None
        return End("queued", where) if where is not None and end.status == "missing" else end

    def _missing(self, job: int) -> bool:
        return not RunFolder(self.jobs[job].folder).ended

    @staticmethod
    def row(job: Job, end: End) -> dict[str, Any]:
        """The row of sweep.csv: job, status, reason, its overrides, and its metrics with dotted keys."""
        row: dict[str, Any] = {"job": job.index, "status": end.status, "reason": end.reason}
        row |= {key.lstrip("+"): value for key, _, value in (line.partition("=") for line in job.overrides)}
        return row | {key: value for key, value in flat(end.metrics).items() if key not in row}

    def _failures(self, ends: Sequence[End]) -> list[str]:
        """A line for each job that failed, and for those that a dead worker or SLURM job has left out."""
        lines = list(self.cluster.lost) if self.cluster is not None else []
        for job, end in zip(self.jobs.values(), ends, strict=True):
            if end.status == "failed":
                log = RunFolder(job.folder).path / "train.log"
                where = f"traceback in {log}" if log.is_file() else f"{job.folder}"
                lines.append(f"{end.reason}{f' at step {end.step}' if end.step else ''} ({where})")
        missing = sum(end.status == "missing" for end in ends)
        if missing and self.cluster is None:
            lines.append(
                f"{count(missing, 'job')} {'is' if missing == 1 else 'are'} missing: a worker process died, "
                f"of too little memory perhaps; hydra.sweep.dir={self.resumed_in} resume=true trains the rest"
            )
        return lines

    def _check_use(self) -> bool:
        """Whether the folder holds a sweep that is to be continued.

        Raises:
            ConfigError: it holds something, and that is not to be continued, or cannot be.
        """
        names = {entry.name for entry in self.folder.iterdir()} - {LOCK, MULTIRUN}
        if not {name for name in names if not name.startswith(f".{RECORD}.")}:  # killed while it was written
            return False
        if not self.resume:
            allowed = "is not empty; results are never overwritten (resume=true continues a sweep)"
            raise ConfigError("hydra.sweep.dir", self.folder, allowed)
        Plan.read(self.folder)
        return True

    def _known_plan(self) -> Plan:
        """The plan of an interrupted sweep."""
        plan = Plan.read(self.folder)
        if plan.jobs != [list(job.overrides) for job in self.jobs.values()]:
            raise ConfigError("resume", "true", f"{self.folder} holds another sweep, of {len(plan.jobs)} jobs")
        if plan.digest != digest(self.jobs.values()):
            self._go_back_to_submitted(plan)
        return plan

    def _go_back_to_submitted(self, plan: Plan) -> None:
        """Take the jobs as they were composed when SLURM got them: conf/ may be edited while they queue.

        Raises:
            ConfigError: this sweep was not submitted.
        """
        submitted = self.cluster.travelled() if self.cluster is not None else {}
        if not {job for stack in plan.stacks for job in stack} <= set(submitted):
            raise ConfigError("resume", "true", f"the configuration of {self.folder} was another one")
        self.jobs |= {index: replace(job, folder=self.jobs[index].folder) for index, job in submitted.items()}

    def _new_plan(self) -> Plan:
        """A plan, written down before anything is trained."""
        plan = make_plan(list(self.jobs.values()), self.options)
        plan.write(self.folder)
        return plan


@admit_interrupts()
@find_lost_interrupts()
def launch(
    context: HydraContext,
    task: TaskFunction,
    master: Any,
    job_overrides: Sequence[Sequence[str]],
    first: int,
    options: Mapping[str, Any],
) -> list[JobReturn]:
    """Carry out a sweep for Hydra's launcher: compose every job, train what is missing, write sweep.csv.

    Args:
        context: Hydra's configuration loader and callbacks.
        task: what Hydra runs as a job, for its callbacks.
        master: the configuration of the sweep itself; its flat key `resume` continues an interrupted one.
        first: the number of the first job.

    Raises:
        HydraException: a job that composition refuses; nothing is written then.
        ConfigError: options or a folder that cannot be used.
        SweepFailed: at the end, if some jobs failed.
    """
    chosen = Options.of(options)
    folder = Path(master.hydra.sweep.dir)
    if chosen.executor == "process" and not (folder / RECORD).exists():  # else perhaps all is done
        prepare_workers()
    if chosen.executor == "slurm":
        check_machine()
    if first:
        sweeper = master.hydra.runtime.choices["hydra/sweeper"]
        raise ConfigError(
            "hydra/sweeper", sweeper, "hands over its jobs in parts; hydra/launcher=basic takes them"
        )
    if any(line.startswith("resume=") for overrides in job_overrides for line in overrides):
        raise ConfigError("resume", None, "is read once, for the whole sweep: true or false")
    composer = Composer(cast(ConfigLoaderImpl, context.config_loader), master)
    jobs = []
    with composing(len(job_overrides)) as composed:
        for number, overrides in enumerate(job_overrides):
            jobs.append(composer.job(number, overrides))
            composed()
    _check_folders(jobs)
    resume = bool(OmegaConf.select(master, "resume"))
    callbacks = JobCallbacks(context.callbacks, task, master)
    try:
        with callbacks.whole_sweep():
            ends = Sweep(jobs, folder, chosen, resume, callbacks, master).run()
    except OSError as error:
        raise ConfigError("hydra.sweep.dir", folder, f"cannot be written: {error.strerror}") from None
    return [job_return(job, end) for job, end in zip(jobs, ends, strict=True)]


def _check_folders(jobs: Sequence[Job]) -> None:
    """Refuse a sweep without jobs, as of a glob that matches nothing, and jobs that share a folder."""
    if not jobs:
        raise ConfigError("--multirun", None, "there is no job in this sweep")
    first: dict[Path, int] = {}
    for job in jobs:
        other = first.setdefault(job.folder, job.index)
        if other != job.index:
            allowed = f"gives jobs {other} and {job.index} the same folder, {job.folder}"
            raise ConfigError("hydra.sweep.subdir", None, allowed)
