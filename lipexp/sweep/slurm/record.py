"""What a sweep has submitted to SLURM, and what SLURM says of it.

A submission is written down before it is made, under a name that squeue finds: an interruption at any moment loses
sight of no SLURM job. What became of a job squeue knows, too; unlike sacct, it needs no accounting database.
"""

from __future__ import annotations

import json
import os
import subprocess
import uuid
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

from lipexp.config import ConfigError
from lipexp.runs import write_file
from lipexp.sweep.slurm.options import EXECUTOR

ENDED = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"),
    *("REVOKED", "TIMEOUT"),
}


class State(NamedTuple):
    """What SLURM says of a job."""

    name: str = ""  # PENDING, RUNNING, …; none where SLURM knows it no more
    reason: str = ""  # why it waits

    @property
    def ended(self) -> bool:
        return not self.name or self.name in ENDED

    def __str__(self) -> str:
        return f"{self.name}, {self.reason}" if self.name == "PENDING" else self.name or "no longer known"


class Task(NamedTuple):
    """A stack in SLURM."""

    id: str  # 17_2, or 17 where it was submitted alone
    jobs: frozenset[int]


@dataclass(frozen=True)
class Submission:
    """One call of sbatch."""

    name: str
    stacks: list[list[int]]  # the jobs of each
    id: str | None = None  # until sbatch has told it

    @property
    def tasks(self) -> list[Task]:
        if self.id is None:
            return []
        ids = [self.id] if len(self.stacks) == 1 else [f"{self.id}_{n}" for n in range(len(self.stacks))]
        return [Task(task, frozenset(jobs)) for task, jobs in zip(ids, self.stacks, strict=True)]


class Record:
    """All submissions of a sweep, as they stand in `file`.

    Raises:
        ConfigError: it cannot be read.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._submissions: list[Submission] = []
        try:
            with suppress(FileNotFoundError):
                self._submissions = [Submission(**entry) for entry in json.loads(file.read_text())]
        except (ValueError, TypeError):
            raise ConfigError("resume", "true", f"{file} cannot be read") from None

    @property
    def tasks(self) -> list[Task]:
        """All stacks that were submitted, the latest last."""
        return [task for submission in self._submissions for task in submission.tasks]

    def last(self, jobs: Iterable[int]) -> Task | None:
        """Where these jobs were submitted last."""
        wanted = set(jobs)
        return next((task for task in reversed(self.tasks) if task.jobs & wanted), None)

    def begin(self, stacks: Sequence[Sequence[int]]) -> str:
        """The name of a submission that is about to be made."""
        submission = Submission(f"lipexp-{uuid.uuid4().hex[:8]}", [list(jobs) for jobs in stacks])
        self._submissions.append(submission)
        self._write()
        return submission.name

    def complete(self, name: str, task: str) -> list[Task]:
        """SLURM gave this submission the number that `task` begins with; returns its stacks."""
        (position,) = [n for n, submission in enumerate(self._submissions) if submission.name == name]
        self._submissions[position] = replace(self._submissions[position], id=task.partition("_")[0])
        self._write()
        return self._submissions[position].tasks

    def drop(self, name: str) -> None:
        """SLURM refused this submission."""
        self._submissions = [submission for submission in self._submissions if submission.name != name]
        self._write()

    def states(self) -> Mapping[str, State]:
        """id -> state, of all that was submitted.

        Raises:
            ConfigError: SLURM does not answer.
        """
        states: dict[str, State] = defaultdict(State)
        unknown = {submission.name for submission in self._submissions if submission.id is None}
        for name, task, state in squeue([submission.name for submission in self._submissions]):
            states[task] = state
            if name in unknown:
                unknown.remove(name)
                self.complete(name, task)
        return states

    def _write(self) -> None:
        self._file.parent.mkdir(exist_ok=True)
        content = json.dumps([asdict(submission) for submission in self._submissions])
        write_file(self._file, lambda path: path.write_text(content))


def squeue(names: Sequence[str]) -> list[tuple[str, str, State]]:
    """(name, id, state) of the SLURM jobs of these names, for as long as SLURM remembers them.

    Raises:
        ConfigError: SLURM does not answer.
    """
    if not names:
        return []
    choice = [f"--user={os.getuid()}", f"--name={','.join(names)}", "--states=all", "--array"]
    command = ["squeue", "--noheader", *choice, "--format=%j|%i|%T|%r"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        raise ConfigError(*EXECUTOR, complaint(answer.stderr))
    rows = [line.split("|", 3) for line in answer.stdout.splitlines()]
    return [(name, task, State(state, reason)) for name, task, state, reason in rows]


def complaint(stderr: str) -> str:
    """What a program of SLURM has to say, in one line."""
    lines = [line.strip().removeprefix("sbatch: ").removeprefix("error: ") for line in stderr.splitlines()]
    return "; ".join(line for line in lines if line) or "SLURM does not answer"
