"""The stacks of one sweep in SLURM: submitting them, following them, submitting again what was killed."""

from __future__ import annotations

import io
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stderr, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lipexp.sweep.compose import Job
from lipexp.config import ConfigError, no_such
from lipexp.display import SweepDisplay
from lipexp.sweep.slurm.options import EXECUTOR, NODE, SlurmOptions
from lipexp.sweep.slurm.record import Record, State, Task, complaint
from lipexp.sweep.slurm.task import REPORT_SECONDS, WARNING_SECONDS, Progress, StackTask, missing
from lipexp.wording import count

if TYPE_CHECKING:
    from submitit.core.utils import JobPaths

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds between two calls of squeue; each is half as long again
SETTLE_SECONDS = 60.0  # until what another machine has written is surely seen here
LOG_LINES = 5
NOT_AGAIN = {"CANCELLED", "DEADLINE", "OUT_OF_MEMORY", "TIMEOUT"}  # someone's will, or sure to happen again
ENOUGH = 10**6  # requeueings, of which submitit keeps count; StackTask decides


def refuse_second(sweep: Path, executor: str) -> None:
    """Refuse another executor as long as SLURM has stacks of this sweep.

    Raises:
        ConfigError: it has.
    """
    record = Record(sweep / "slurm" / "submissions.json")
    if not record.tasks or shutil.which("squeue") is None:  # it may have been brought here from another machine
        return
    active = [task for task, state in record.states().items() if not state.ended]
    if active:
        allowed = (
            f"SLURM still works on this sweep (executor=slurm waits for it; scancel {_numbers(active)} ends it)"
        )
        raise ConfigError("hydra.launcher.executor", executor, allowed)


def _numbers(tasks: Iterable[str]) -> str:
    """What scancel takes for all of these: 17_0 and 17_2 are 17."""
    return " ".join(dict.fromkeys(task.partition("_")[0] for task in tasks))


class Cluster:
    """The stacks of one sweep in SLURM.

    Args:
        sweep: the folder of the sweep.
        parallel: how many stacks may run at the same time; None is as many as SLURM allows.
    """

    def __init__(self, sweep: Path, options: SlurmOptions, parallel: int | None = None) -> None:
        self.sweep, self.options, self.parallel = sweep, options, parallel
        self.queued: dict[int, str] = {}  # the jobs that are left to SLURM, and where they are
        self.lost: list[str] = []  # a line for each stack that cannot be finished
        self._folder = (sweep / "slurm").absolute()
        self._record = Record(self._folder / "submissions.json")
        self._stacks: Sequence[Sequence[Job]] = []
        self._tasks: dict[int, Task] = {}  # the stacks that SLURM has
        self._states: Mapping[str, State] = {}
        self._seen_ended: dict[str, float] = {}
        self._news: list[tuple[int | None, str]] = []

    def travelled(self) -> dict[int, Job]:
        """The jobs as they were composed when they were first submitted."""
        import submitit

        jobs: dict[int, Job] = {}
        for task in self._record.tasks:
            with suppress(AssertionError, OSError):  # submitit's file is gone
                what: Any = submitit.SlurmJob(self._folder, task.id).submission().function
                jobs = {job.index: job for job in what.jobs} | jobs
        self._news.append(
            (None, "the configuration has changed; the sweep goes on with the one that was submitted")
        )
        return jobs

    def submit(self, stacks: Sequence[Sequence[Job]]) -> None:
        """Submit the stacks that SLURM does not have yet.

        Raises:
            ConfigError: SLURM does not answer, or refuses; nothing is submitted.
        """
        self._stacks = stacks
        self._states = self._record.states()
        fresh = []
        for stack, jobs in enumerate(stacks):
            task = self._record.last(job.index for job in jobs)
            if task is None:
                fresh.append(stack)
                continue
            state = self._state(task)
            if state.ended:
                fresh.append(stack)
                self._news.append((stack, f"SLURM job {task.id} ended ({state}){self._log_end(task)}"))
            else:
                self._tasks[stack] = task
                self._news.append((stack, f"SLURM job {task.id} ({state})"))
        if fresh:
            number = self._submit(fresh)
            self._news.append((None, f"SLURM job {number}: {count(len(fresh), 'stack')} submitted"))

    def follow(self, display: SweepDisplay) -> None:
        """Show how the stacks fare until all have ended; with wait=false, where they are now."""
        for stack, text in self._news:
            display.say(text, stack)
        try:
            if self.options.wait:
                self._wait(display)
        finally:
            if self._tasks:
                self.queued = {job: f"SLURM job {task.id}" for task in self._tasks.values() for job in task.jobs}
                numbers = _numbers(task.id for task in self._tasks.values())
                display.say(
                    f"{count(len(self._tasks), 'stack')} left to SLURM (scancel {numbers} ends it); "
                    f"hydra.sweep.dir={self.sweep} resume=true collects the results"
                )

    def _wait(self, display: SweepDisplay) -> None:
        tries: Counter[int] = Counter()
        pause, look = FIRST_PAUSE, 0.0
        while self._show(display):
            if time.monotonic() >= look:
                ended = self._ended()
                for stack, state in ended.items():
                    display.say(self._after(stack, state, tries), stack)
                pause = FIRST_PAUSE if ended else min(1.5 * pause, LONGEST_PAUSE)
                look = time.monotonic() + pause
            time.sleep(REPORT_SECONDS)

    def _show(self, display: SweepDisplay) -> bool:
        """Show how far the stacks are; whether SLURM still has any."""
        for stack, task in list(self._tasks.items()):
            done = not missing(self._stacks[stack])
            state = self._state(task)
            waits = Progress(live="queued" if state.ended else str(state))
            progress = Progress.read(self._folder, task.id) or waits
            live = progress.live or ("all failed" if done else None)
            display.update(stack, progress.step, progress.total, live, done)
            if done:
                del self._tasks[stack]
        return bool(self._tasks)

    def _ended(self) -> dict[int, State]:
        """The stacks whose SLURM job has ended with jobs missing."""
        try:
            self._states = self._record.states()
        except ConfigError:  # SLURM's controller is away at times
            return {}
        now = time.monotonic()
        ended = {}
        for stack, task in self._tasks.items():
            state = self._state(task)
            if state.ended and missing(self._stacks[stack]):
                killed = state.name not in ("", "COMPLETED")
                if killed or now - self._seen_ended.setdefault(task.id, now) > SETTLE_SECONDS:
                    ended[stack] = state
        return ended

    def _state(self, task: Task) -> State:
        state = self._states[task.id]
        if not state.name and not self._paths(task).stderr.exists():
            return State("CANCELLED")  # before it began: SLURM forgets such a member of an array at once
        return state

    def _after(self, stack: int, state: State, tries: Counter[int]) -> str:
        """Submit a stack again if it was killed, or count it as lost; returns what to say of it."""
        task, rest = self._tasks.pop(stack), missing(self._stacks[stack])
        reason = self._no_use(task, state)
        if reason is None and tries[stack] < self.options.resubmissions:
            tries[stack] += 1
            try:
                return f"SLURM job {task.id} died ({state}), submitted again as {self._submit([stack])}"
            except ConfigError as error:
                reason = f"died ({state}), and cannot be submitted again: {error}"
        reason = reason or f"died ({state})" + (f", {tries[stack] + 1} times" if tries[stack] else "")
        self.lost.append(
            f"{count(len(rest), 'job')} missing: SLURM job {task.id} {reason}; "
            f"hydra.sweep.dir={self.sweep} resume=true submits them again{self._log_end(task)}"
        )
        return f"SLURM job {task.id} {reason}"

    def _no_use(self, task: Task, state: State) -> str | None:
        """Why an ended stack would end in the same way again; None if it was killed."""
        progress = Progress.read(self._folder, task.id)
        if progress is not None and progress.given_up is not None:
            return progress.given_up
        if self._paths(task).result_pickle.is_file():  # of a task that returned or raised by itself
            return "ended with an error"
        return f"ended ({state})" if state.name in NOT_AGAIN else None

    def _log_end(self, task: Task) -> str:
        """The last lines of a log, indented, after its name."""
        paths = self._paths(task)
        for log in (paths.stderr, paths.stdout):
            with suppress(OSError):
                lines = [line.rstrip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
                if lines:
                    end = "".join(f"\n    {line}" for line in lines[-LOG_LINES:])
                    return f"; {self.sweep / 'slurm' / log.name} ends:{end}"
        return "; it left no log"

    def _paths(self, task: Task) -> JobPaths:
        from submitit.core.utils import JobPaths

        return JobPaths(self._folder, task.id)

    def _submit(self, stacks: Sequence[int]) -> str:
        """Submit what is missing of these stacks as one job array; returns its number.

        Raises:
            ConfigError: SLURM refuses it.
        """
        import submitit

        rests = [missing(self._stacks[stack]) for stack in stacks]
        name = self._record.begin([[job.index for job in rest] for rest in rests])
        executor = submitit.AutoExecutor(self._folder, cluster="slurm", slurm_max_num_timeout=ENOUGH)
        executor.update_parameters(
            **self.options.parameters(),
            name=name,
            slurm_array_parallelism=self.parallel or len(stacks),
            slurm_signal_delay_s=WARNING_SECONDS,
        )
        limits = (self.options.timeout_min, self.options.resubmissions)
        complaints = io.StringIO()
        try:
            with redirect_stderr(complaints):  # submitit prints what sbatch says
                submitted = executor.submit_array([StackTask(rest, self._folder, *limits) for rest in rests])
        except RuntimeError:
            self._record.drop(name)
            raise self._refusal(complaint(complaints.getvalue())) from None
        tasks = self._record.complete(name, submitted[0].job_id)
        self._tasks |= dict(zip(stacks, tasks, strict=True))
        return submitted[0].job_id.partition("_")[0]

    def _refusal(self, reason: str) -> ConfigError:
        """Why sbatch takes nothing; what submitit wrote for it is removed."""
        for file in (*self._folder.glob(".submission_file_*.sh"), *self._folder.glob(f"{'[0-9a-f]' * 32}.pkl")):
            if not file.is_symlink():  # those are of earlier submissions
                file.unlink()
        partition = self.options.partition
        if partition is None or "invalid partition" not in reason.lower():
            return ConfigError(*EXECUTOR, reason)
        command = ["sinfo", "--noheader", "--format=%R"]
        names = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
        return ConfigError(f"{NODE}.partition", partition, no_such("partition", partition, sorted(set(names))))
