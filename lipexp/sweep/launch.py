"""A sweep as a few stacked models: training what is missing, resuming, sweep.csv.

The jobs of a sweep that share their signature (members.py) train as one stack. A stack is split where memory or
the number of processes asks for it; the split is written into the sweep's folder before anything is trained, and a
resumed sweep reuses it, so that it ends as it would have without the interruption.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import HydraContext
from omegaconf import OmegaConf

from lipexp.config import ConfigError, Unfit
from lipexp.display import SweepDisplay, composing
from lipexp.gate import LOCK, exclusive
from lipexp.process import begin_work
from lipexp.record import Outcome
from lipexp.runs import RunFolder, SweepFailed, write_csv
from lipexp.sweep import executors
from lipexp.sweep.compose import Composer, Job, in_folder
from lipexp.sweep.options import LauncherOptions
from lipexp.sweep.plan import RECORD, Plan, digest, make_plan
from lipexp.wording import broken_bound, count, shown_path

if TYPE_CHECKING:
    from lipexp.sweep.slurm import Cluster

MANY = 16  # jobs that will surely make several stacks, so that worker processes may begin to import


class Sweep:
    """The jobs of one sweep and the folder they leave their results in.

    Args:
        resumed_in: the hydra.sweep.dir with which the command continues it; None: its own folder.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        folder: Path,
        options: LauncherOptions,
        resume: bool,
        resumed_in: Path | None = None,
    ) -> None:
        self.jobs = {job.index: job for job in jobs}
        self.folder, self.options, self.resume = folder, options, resume
        self.resumed_in = resumed_in or folder
        self.cluster: Cluster | None = None
        self.made: dict[str, Any] = {}  # the objects that the jobs share; see members.build

    def run(self) -> list[Outcome]:
        """Train what is missing and write sweep.csv.

        Raises:
            ConfigError: the folder is in use, or holds something else; or SLURM refuses.
            SweepFailed: at the end, if jobs failed.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / LOCK).exists():
            self._check_use()  # before the lock is made: a folder that is not ours stays as it is
        with exclusive(self.folder):
            used = self._check_use()
            if self.options.executor == "slurm":
                from lipexp.sweep.slurm import Cluster

                self.cluster = Cluster(self.folder, self.resumed_in, self.options.slurm, self.options.workers)
            elif (self.folder / "slurm").exists():
                from lipexp.sweep.slurm import refuse_second

                refuse_second(self.folder, self.options.executor)
            plan = self._known_plan() if used else self._new_plan()
            stacks = [[self.jobs[job] for job in stack if self._missing(job)] for stack in plan.stacks]
            stacks = [stack for stack in stacks if stack]
            if self.cluster is not None and stacks:
                self._submit(self.cluster, stacks, new=not used)
            for number, reason in plan.refused.items():
                if self._missing(number):
                    self.jobs[number].write_hydra_files()
                    RunFolder(self.jobs[number].folder).write_failure(reason, step=0)
            outcomes = self._train(plan, stacks)
        failures = self._failures(outcomes)
        if failures:
            raise SweepFailed(failures)
        return outcomes

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

    def _train(self, plan: Plan, stacks: Sequence[Sequence[Job]]) -> list[Outcome]:
        """Train the jobs that are missing, show and write down how all jobs ended, whatever happens."""
        # The plan says what executor=auto became; another call may have asked for another one.
        executor = plan.executor if self.options.executor == "auto" else self.options.executor
        processes = self.options.processes if executor == "process" else None
        done = sum(not self._missing(job) for job in self.jobs if job not in plan.refused)
        display = SweepDisplay()
        display.header(len(self.jobs), done, [len(stack) for stack in stacks], plan.run_bytes, processes)
        interrupted = False
        try:
            with display.progress():
                if self.cluster is not None and stacks:
                    self.cluster.follow(display)
                elif processes is not None:
                    executors.in_processes(stacks, processes, display)
                else:
                    executors.inline(stacks, display, self.made)
        except KeyboardInterrupt:
            interrupted = True
            raise
        finally:
            outcomes = [self._outcome(job) for job in self.jobs.values()]
            rows = [row(job, outcome) for job, outcome in zip(self.jobs.values(), outcomes, strict=True)]
            write_csv(self.folder / "sweep.csv", rows)
            overrides = dict.fromkeys(key for job in self.jobs.values() for key, _ in job.settings)
            display.result(rows, list(overrides), self.folder / "sweep.csv", self.options.table)
            if interrupted and any(outcome.status == "missing" for outcome in outcomes):
                display.say(f"the same command with {self._continued} trains the rest")
        return outcomes

    @property
    def _continued(self) -> str:
        """The overrides with which the command goes on."""
        return f"{shlex.quote(in_folder(self.resumed_in))} resume=true"

    def _outcome(self, job: Job) -> Outcome:
        outcome = Outcome.of(RunFolder(job.folder))
        where = self.cluster.queued.get(job.index) if self.cluster is not None else None
        return Outcome("queued", where) if where is not None and outcome.status == "missing" else outcome

    def _missing(self, job: int) -> bool:
        return not RunFolder(self.jobs[job].folder).ended

    def _failures(self, outcomes: Sequence[Outcome]) -> list[str]:
        """A line for each job that failed, and for those that a dead worker or SLURM job has left out."""
        lines = list(self.cluster.lost) if self.cluster is not None else []
        for job, outcome in zip(self.jobs.values(), outcomes, strict=True):
            if outcome.status == "failed":
                log = RunFolder(job.folder).path / "train.log"
                where = f"traceback in {shown_path(log)}" if log.is_file() else shown_path(job.folder)
                reason = broken_bound(outcome.metrics.lipschitz) if outcome.metrics else outcome.reason
                lines.append(f"{reason}{f' at step {outcome.step}' if outcome.step else ''} ({where})")
        missing = sum(outcome.status == "missing" for outcome in outcomes)
        if missing and self.cluster is None:
            lines.append(
                f"{count(missing, 'job')} {'is' if missing == 1 else 'are'} missing: a worker process died, "
                f"or found no room; {self._continued} trains the rest"
            )
        return lines

    def _check_use(self) -> bool:
        """Whether the folder holds a sweep that is to be continued.

        Raises:
            ConfigError: it holds something, and that is not to be continued, or cannot be.
        """
        names = {entry.name for entry in self.folder.iterdir()} - {LOCK, "multirun.yaml"}  # of Hydra's own sweeper
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
        submitted = self.cluster.submitted_jobs() if self.cluster is not None else {}
        if not {job for stack in plan.stacks for job in stack} <= set(submitted):
            raise ConfigError("resume", "true", f"the configuration of {self.folder} was another one")
        self.jobs |= {index: replace(job, folder=self.jobs[index].folder) for index, job in submitted.items()}

    def _new_plan(self) -> Plan:
        """A plan, written down before anything is trained."""
        plan = make_plan(list(self.jobs.values()), self.options, self.made)
        if not plan.stacks:  # bad input, and nothing else
            (self.folder / LOCK).unlink()
            RunFolder(self.folder).discard_if_empty()
            raise HydraException(next(iter(plan.refused.values())))
        plan.write(self.folder)
        return plan


def row(job: Job, outcome: Outcome) -> dict[str, Any]:
    """The row of sweep.csv: job, status, reason, its overrides, and its results with dotted keys."""
    results = outcome.results()
    head = {"job": job.index, "status": results.pop("status"), "reason": results.pop("reason")}
    head |= dict(job.settings)
    return head | {key: value for key, value in results.items() if key not in head}


def launch(
    context: HydraContext, master: Any, job_overrides: Sequence[Sequence[str]], first: int
) -> list[JobReturn]:
    """Carry out a sweep for Hydra's launcher: compose every job, train what is missing, write sweep.csv.

    Args:
        context: Hydra's configuration loader and callbacks.
        master: the configuration of the sweep itself; its flat key `resume` continues an interrupted one.
        first: the number of the first job.

    Raises:
        HydraException: a job that composition refuses, or all that cannot be trained; nothing is written then.
        ConfigError: options or a folder that cannot be used.
        SweepFailed: at the end, if some jobs failed.
    """
    options = LauncherOptions.of(master.hydra.launcher)
    refuse_callbacks(context)
    if options.executor == "slurm":
        from lipexp.sweep.slurm import check_machine

        check_machine()
    if first:
        sweeper = master.hydra.runtime.choices["hydra/sweeper"]
        raise ConfigError(
            "hydra/sweeper", sweeper, "hands over its jobs in parts; hydra/launcher=basic takes them"
        )
    if any(line.startswith("resume=") for overrides in job_overrides for line in overrides):
        raise ConfigError("resume", None, "is read once, for the whole sweep: true or false")
    several = options.executor == "auto" and len(job_overrides) > MANY and options.processes > 1
    if options.executor == "process" or several:
        executors.start_server()
    composer = Composer(cast(ConfigLoaderImpl, context.config_loader), master)
    jobs = []
    with composing(len(job_overrides)) as composed:
        for number, overrides in enumerate(job_overrides):
            jobs.append(composer.job(number, overrides))
            composed()
    if options.skip_unfit:
        fitting = [job.overrides for job in jobs if fits(job, options)]
        if len(fitting) < len(jobs):
            left_out = count(len(jobs) - len(fitting), "job")
            SweepDisplay().say(f"{left_out} left out, as their options do not fit each other")
            jobs = [composer.job(number, overrides) for number, overrides in enumerate(fitting)]
    _check_folders(jobs)
    folder = Path(master.hydra.sweep.dir)
    begin_work()
    try:
        outcomes = Sweep(jobs, folder, options, bool(OmegaConf.select(master, "resume"))).run()
    except OSError as error:
        raise ConfigError("hydra.sweep.dir", folder, f"cannot be written: {error.strerror}") from None
    return [job_return(job, outcome) for job, outcome in zip(jobs, outcomes, strict=True)]


def fits(job: Job, options: LauncherOptions) -> bool:
    """Whether the options of a job fit each other; what else is wrong with it is found later."""
    from lipexp.members import build

    try:
        build(job.resolved, job.choices, here=options.executor != "slurm")
    except Unfit:
        return False
    except Exception:  # a user's class may raise anything
        return True
    return True


def job_return(job: Job, outcome: Outcome) -> JobReturn:
    """What Hydra hands on about a job."""
    returned = JobReturn(overrides=job.overrides, status=JobStatus.COMPLETED)
    returned.return_value = outcome
    return returned


def refuse_callbacks(context: HydraContext) -> None:
    """Refuse callbacks of Hydra that want to hear of each job: the jobs of a stack train at the same time.

    Raises:
        ConfigError: there is one.
    """
    for one in context.callbacks.callbacks:
        for name in ("on_job_start", "on_job_end"):
            if getattr(type(one), name, None) is not getattr(Callback, name):
                allowed = (
                    f"{type(one).__name__}.{name} is for hydra/launcher=basic: the jobs of a stack train together"
                )
                raise ConfigError("hydra.callbacks", None, allowed)


def _check_folders(jobs: Sequence[Job]) -> None:
    """Refuse a sweep without jobs, as of a glob that matches nothing, and jobs that share a folder."""
    if not jobs:
        raise ConfigError("--multirun", None, "there is no job in this sweep")
    first: dict[Path, int] = {}
    for job in jobs:
        other = first.setdefault(job.folder, job.index)
        if other != job.index:
            allowed = f"gives jobs {other} and {job.index} the same folder, {shown_path(job.folder)}"
            raise ConfigError("hydra.sweep.subdir", None, allowed)
