"""What a SLURM job of a sweep does, where it runs: it trains one stack and reports how far it is."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lipexp.sweep.compose import Job
from lipexp.display import StackDisplay
from lipexp.sweep.executors import train_stack
from lipexp.runs import RunFolder, write_file

if TYPE_CHECKING:
    from submitit.core.utils import DelayedSubmission

REPORT_SECONDS = 1.0  # between two reports of a stack
WARNING_SECONDS = 30  # SLURM warns a job so long before its time limit, or up to a minute earlier


class Progress(NamedTuple):
    """How far a stack is."""

    step: int = 0
    total: int | None = None
    live: str | None = None
    given_up: str | None = None  # why there is no use in submitting it again

    @staticmethod
    def file(folder: Path, task: str) -> Path:
        """Where the SLURM job `task` reports."""
        return folder / f"{task}_progress.json"

    @classmethod
    def read(cls, folder: Path, task: str) -> Progress | None:
        """What it has reported; None before it starts."""
        with suppress(OSError, ValueError, TypeError):  # a file that another machine replaces may be gone
            return cls(**json.loads(cls.file(folder, task).read_text()))
        return None


class Reporter:
    """Writes the progress of a stack for the process that waits for it, about once a second."""

    def __init__(self, file: Path) -> None:
        self._file, self._progress = file, Progress()
        self._write()

    def update(self, number: int, step: int, total: int | None, live: str | None, done: bool = False) -> None:
        """Takes what StackDisplay reports."""
        old = self._progress
        self._progress = Progress(step, old.total if total is None else total, old.live if live is None else live)
        if done or live is not None or time.monotonic() - self._written >= REPORT_SECONDS:
            self._write()

    def give_up(self, reason: str) -> None:
        self._progress = self._progress._replace(given_up=reason)
        self._write()

    def _write(self) -> None:
        text = json.dumps(self._progress._asdict())
        write_file(self._file, lambda path: path.write_text(text))
        self._written = time.monotonic()


def missing(jobs: Sequence[Job]) -> list[Job]:
    """The jobs that have neither a result nor a failure."""
    return [job for job in jobs if not RunFolder(job.folder).ended]


@dataclass
class StackTask:
    """Trains what is missing of a stack: all of it when it first starts, the rest when SLURM starts it again.

    Args:
        folder: for its reports.
        timeout_min: its time limit.
        restarts: how often it may be interrupted without having finished a run.
    """

    jobs: Sequence[Job]
    folder: Path
    timeout_min: int
    restarts: int

    def __call__(self) -> None:
        import submitit

        environment = submitit.JobEnvironment()
        self.started = time.monotonic()
        self.rest = missing(self.jobs)
        self.reporter = Reporter(Progress.file(self.folder, environment.job_id))
        _let_nothing_catch(signal.Signals[f"SIG{environment.USR_SIG}"])
        try:
            if self.rest:
                display = StackDisplay(self.reporter.update, 0)
                train_stack(self.rest, display)
                display.done()
        except _TaskEnds as end:
            sys.exit(end.args[0])

    def checkpoint(self) -> DelayedSubmission:
        """What SLURM is to start again; submitit asks when SLURM warns that it is about to end the job.

        A job that would end in the same way again is left to end.
        """
        import submitit

        if len(missing(self.rest)) == len(self.rest):
            left = 60 * self.timeout_min - (time.monotonic() - self.started)
            if left < WARNING_SECONDS + 90:
                self._give_up(f"ran into its time limit, hydra.launcher.slurm.timeout_min={self.timeout_min}")
            if int(os.environ.get("SLURM_RESTART_COUNT", 0)) >= self.restarts:
                self._give_up(f"was interrupted {self.restarts + 1} times")
        return submitit.helpers.DelayedSubmission(replace(self))

    def _give_up(self, reason: str) -> None:
        self.reporter.give_up(reason)
        sys.exit(reason)


class _TaskEnds(BaseException):
    """By order of SLURM, with this exit status or reason: not an error of a run, as even SystemExit can be."""


def _let_nothing_catch(number: signal.Signals) -> None:
    """What the handler of this signal raises ends the task, also where a user's class may raise anything."""
    handler: Any = signal.getsignal(number)

    def handle(*received: Any) -> None:
        try:
            handler(*received)
        except SystemExit as error:
            raise _TaskEnds(error.code) from None
        except Exception as error:
            raise _TaskEnds(str(error)) from error

    signal.signal(number, handle)
