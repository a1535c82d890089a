"""The progress of a stack, reported through a file by another process or another machine."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from lipexp.reading import Unreadable, printable, read_record
from lipexp.runs import RunFolder, write_file
from lipexp.sweep.compose import Job

REPORT_SECONDS = 0.5  # between two reports of a stack


def missing(jobs: Sequence[Job]) -> list[Job]:
    """The jobs that have neither a result nor a failure."""
    return [job for job in jobs if not RunFolder(job.folder).ended]


class Progress(NamedTuple):
    """How far a stack is."""

    step: int = 0
    total: int | None = None
    live: str | None = None
    given_up: str | None = None  # why it cannot be finished

    @classmethod
    def read(cls, file: Path) -> Progress | None:
        """What a `Reporter` has written; None before it starts."""
        with suppress(Unreadable):  # a file that another machine replaces may be gone
            found = read_record(cls, file.parent, file.name)
            return found._replace(live=found.live and printable(found.live))
        return None


class Reporter:
    """Writes the progress of a stack into a file, every half a second, for the process that waits for it."""

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
        write_file(self._file, lambda path: path.write_text(text), flush=False)
        self._written = time.monotonic()
