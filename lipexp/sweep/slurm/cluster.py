"""The stacks of one sweep in SLURM: submitting them, following them, submitting again what was killed."""

from __future__ import annotations

import importlib.util
import io
import shlex
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import redirect_stderr, suppress
from pathlib import Path

from lipexp.config import GROUPS, ConfigError, is_of_the_house
from lipexp.display import StackDisplay, SweepDisplay
from lipexp.reading import LARGE_BYTES, Unreadable, printable, read_bytes
from lipexp.sweep.compose import Job, in_folder
from lipexp.sweep.options import SlurmOptions
from lipexp.sweep.progress import REPORT_SECONDS, Progress, Reporter, missing
from lipexp.sweep.slurm.submitted import ENDED, EXECUTOR, FORGOTTEN, KILLED, complaint, read, states, write
from lipexp.wording import count, shown_path

SUBMITTED = "submitted.json"
PROGRESS = "{}_progress.json"  # of a SLURM job, by its number
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds between two calls of squeue; each is half as long again
SETTLE_SECONDS = 60.0  # until what another machine has written is surely seen here
LOG_LINES = 5


def check_machine() -> None:
    """Refuse a machine that cannot submit.

    Raises:
        ConfigError: submitit is not installed, or SLURM is not.
    """
    if importlib.util.find_spec("submitit") is None:
        raise ConfigError(*EXECUTOR, "needs submitit, which is not installed: pip install 'lipexp[slurm]'")
    for program in ("sbatch", "srun", "squeue"):
        if shutil.which(program) is None:
            raise ConfigError(*EXECUTOR, f"there is no {program} on this machine (inline, process)")


def refuse_second(sweep: Path, executor: str) -> None:
    """Refuse another executor as long as SLURM works on this sweep.

    Raises:
        ConfigError: it does.
    """
    submitted = read(sweep / "slurm" / SUBMITTED)
    if not submitted or shutil.which("squeue") is None:  # the folder may come from another machine
        return
    now = states()
    active = [number for number in submitted if now[number] not in ENDED]
    if active:
        end = f"scancel {_array_numbers(active)}"
        allowed = f"SLURM still works on this sweep (executor=slurm waits for it; {end} ends it)"
        raise ConfigError("hydra.launcher.executor", executor, allowed)


def _array_numbers(numbers: Iterable[str]) -> str:
    """What scancel takes for all of these: 17 for 17_0 and 17_2."""
    return " ".join(dict.fromkeys(number.partition("_")[0] for number in numbers))


def train(jobs: Sequence[Job], folder: Path) -> None:
    """What a SLURM job does: it trains a stack, or what is missing of it when SLURM starts it again.

    Args:
        folder: where it reports how far it is.
    """
    import submitit

    from lipexp.sweep.work import train_stack

    environment = submitit.JobEnvironment()
    # SLURM sends this signal before the time limit, and submitit would raise an exception within the training.
    signal.signal(signal.Signals[f"SIG{environment.USR_SIG}"], signal.SIG_IGN)
    reporter = Reporter(folder / PROGRESS.format(environment.job_id))
    display = StackDisplay(reporter.update, 0)
    rest = missing(jobs)
    if rest:
        train_stack(rest, display)
        display.done()


class Cluster:
    """The stacks of one sweep in SLURM.

    Args:
        sweep: the folder of the sweep.
        resumed_in: the hydra.sweep.dir with which the command continues it.
        parallel: how many stacks may run at the same time; None: as many as SLURM allows.

    Raises:
        ConfigError: what was submitted before cannot be read.
    """

    def __init__(self, sweep: Path, resumed_in: Path, options: SlurmOptions, parallel: int | None = None) -> None:
        self.options, self.resumed_in, self.parallel = options, resumed_in, parallel
        self.queued: dict[int, str] = {}  # the jobs that are left to SLURM, and where they are
        self.lost: list[str] = []  # a line for each stack that cannot be finished
        self._folder = (sweep / "slurm").absolute()
        self._submitted = read(self._folder / SUBMITTED)
        self._stacks: Sequence[Sequence[Job]] = []
        self._active: dict[int, str] = {}  # the stacks that SLURM has, and its number of each
        self._states: dict[str, str] = {}
        self._retries: Counter[int] = Counter()  # of each stack
        self._ended: dict[str, float] = {}  # when a SLURM job was first seen to have ended
        self._news: list[tuple[str, int | None]] = []

    def submitted_jobs(self) -> dict[int, Job]:
        """The jobs as they were composed when they were submitted.

        Raises:
            ConfigError: they have classes from outside lipexp, which a folder from elsewhere must not bring along.
        """
        for job in (job for jobs in self._submitted.values() for job in jobs):
            for group in GROUPS:
                node = job.resolved.get(group)
                target = str(node.get("_target_")) if isinstance(node, dict) else "none"
                if not is_of_the_house(target, group):
                    allowed = (
                        f"the configuration has changed, and the submitted one has a class of its own, {target}"
                    )
                    raise ConfigError("resume", "true", allowed)
        self._news.append(("the configuration has changed; the sweep goes on with the submitted one", None))
        return {job.index: job for jobs in self._submitted.values() for job in jobs}

    def submit(self, stacks: Sequence[Sequence[Job]]) -> None:
        """Submit the stacks that SLURM does not have yet.

        Raises:
            ConfigError: SLURM does not answer, or refuses; nothing is submitted.
        """
        self._stacks = stacks
        self._states = states()
        last = {job.index: number for number, jobs in self._submitted.items() for job in jobs}
        for stack, jobs in enumerate(stacks):
            number = last.get(jobs[0].index)
            if number is not None:
                state = self._states[number]
                log = self._end_of_log(number) if state in ENDED else ""
                self._news.append((f"SLURM job {number} ({state}){log}", stack))
                if state not in ENDED:
                    self._active[stack] = number
        new = [stack for stack in range(len(stacks)) if stack not in self._active]
        if new:
            number = _array_numbers(self._submit(new))
            self._news.append((f"SLURM job {number}: {count(len(new), 'stack')} submitted", None))

    def follow(self, display: SweepDisplay) -> None:
        """Show how far the stacks are until all have ended; with wait=false, where they are now."""
        for text, stack in self._news:
            display.say(text, stack)
        pause, next_look = FIRST_PAUSE, 0.0
        try:
            while self.options.wait and self._show(display):
                if time.monotonic() >= next_look:
                    self._retry_killed(display)
                    next_look = time.monotonic() + pause
                    pause = min(1.5 * pause, LONGEST_PAUSE)
                time.sleep(REPORT_SECONDS)
        finally:
            if self._active:
                numbers = list(self._active.values())
                self.queued = {job.index: f"SLURM job {one}" for one in numbers for job in self._submitted[one]}
                display.say(
                    f"{count(len(numbers), 'stack')} left to SLURM (scancel {_array_numbers(numbers)} ends it); "
                    f"{shlex.quote(in_folder(self.resumed_in))} resume=true collects the results"
                )

    def _show(self, display: SweepDisplay) -> bool:
        """Show how far the stacks are; whether SLURM still has any."""
        for stack, number in list(self._active.items()):
            done = not missing(self._stacks[stack])
            waiting = Progress(live=self._states[number])
            progress = Progress.read(self._folder / PROGRESS.format(number)) or waiting
            display.update(stack, progress.step, progress.total, progress.live, done)
            if done:
                del self._active[stack]
        return bool(self._active)

    def _retry_killed(self, display: SweepDisplay) -> None:
        """Submit the stacks again that were killed; give up those that would end in the same way."""
        with suppress(ConfigError):  # SLURM's controller is away at times
            self._states = states()
        now = time.monotonic()
        for stack, number in list(self._active.items()):
            state, rest = self._states[number], missing(self._stacks[stack])
            if state not in ENDED or not rest:
                continue
            if state in (FORGOTTEN, "COMPLETED") and now - self._ended.setdefault(number, now) < SETTLE_SECONDS:
                continue
            del self._active[stack]
            reason = self._reason_not_to_retry(stack, number)
            if reason is None:
                try:
                    (again,) = self._submit([stack])
                except ConfigError as error:
                    reason = f"died ({state}), and cannot be submitted again: {error}"
                else:
                    self._retries[stack] += 1
                    display.say(f"SLURM job {number} died ({state}), submitted again as {again}", stack)
                    continue
            display.died(stack, f"SLURM job {number} {reason}")
            again = f"{shlex.quote(in_folder(self.resumed_in))} resume=true submits them again"
            lost = f"{count(len(rest), 'job')} missing: SLURM job {number} {reason}"
            self.lost.append(f"{lost}; {again}{self._end_of_log(number)}")

    def _reason_not_to_retry(self, stack: int, number: str) -> str | None:
        """Why a stack whose SLURM job has ended is not submitted again; None if it is."""
        state, retries = self._states[number], self._retries[stack]
        raised = (self._folder / f"{number}_0_result.pkl").exists()  # submitit writes it, unless it is killed
        if state == "FAILED" and raised:
            return "ended with an error"
        if state not in KILLED:
            return f"ended ({state})"
        done = retries >= self.options.resubmissions
        return f"died ({state}) after {count(retries, 'resubmission')}" if done else None

    def _end_of_log(self, number: str) -> str:
        """The last lines of a log, indented, after its name."""
        for log in (self._folder / f"{number}_0_log.{stream}" for stream in ("err", "out")):
            with suppress(Unreadable):
                text = read_bytes(self._folder, log.name, LARGE_BYTES).decode(errors="replace")
                lines = [printable(line.rstrip()) for line in text.splitlines() if line.strip()]
                if lines:
                    return "\n    ".join([f"; {shown_path(log)} ends:", *lines[-LOG_LINES:]])
        return "; it left no log"

    def _submit(self, stacks: Sequence[int]) -> list[str]:
        """Submit what is missing of these stacks as one job array; returns SLURM's number of each.

        Raises:
            ConfigError: SLURM refuses it.
        """
        import submitit

        rests = [missing(self._stacks[stack]) for stack in stacks]
        executor = submitit.AutoExecutor(self._folder, cluster="slurm")
        limit = self.parallel or len(stacks)
        executor.update_parameters(**self.options.parameters(), name="lipexp", slurm_array_parallelism=limit)
        try:
            with redirect_stderr(io.StringIO()):  # submitit prints what sbatch says
                jobs = executor.map_array(train, rests, [self._folder] * len(rests))
        except RuntimeError as error:
            for file in (*self._folder.glob(".submission_file_*.sh"), *self._folder.glob(f"{'?' * 32}.pkl")):
                if not file.is_symlink():  # those are of earlier submissions
                    file.unlink()
            raise ConfigError(*EXECUTOR, complaint(str(error))) from None
        numbers = [str(job.job_id) for job in jobs]
        self._submitted |= dict(zip(numbers, rests, strict=True))
        write(self._folder / SUBMITTED, self._submitted)
        self._active |= dict(zip(stacks, numbers, strict=True))
        self._states |= dict.fromkeys(numbers, "SUBMITTED")
        return numbers
