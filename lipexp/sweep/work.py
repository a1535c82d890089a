"""Training one stack of a sweep: the one door from sweeps to training, here, in a worker process and in SLURM.

Worker processes are forked from a server that has imported this module, so that none of them imports torch anew.
"""

from __future__ import annotations

import contextlib
import gc
import os
import traceback
from collections.abc import Sequence
from typing import Any

import sklearn.datasets  # noqa: F401  # for the worker processes

from lipexp.config import one_line
from lipexp.display import StackDisplay
from lipexp.members import build
from lipexp.runs import RunFolder
from lipexp.sweep.compose import Job
from lipexp.training import train_many

gc.freeze()  # a collection in a worker would copy the memory that it shares with the server


def train_stack(jobs: Sequence[Job], display: StackDisplay, made: dict[str, Any] | None = None) -> None:
    """Train jobs of one signature as one stack; each leaves a result or a failure in its folder.

    A user's class that raises an exception breaks the whole stack; then each job is trained alone, so that only
    those that cannot be trained fail.

    Args:
        made: see `members.build`.

    Raises:
        OSError: for want of room, or of a file, some jobs have neither result nor failure, and can be tried again.
    """
    folders = [RunFolder(job.folder) for job in jobs]
    for job in jobs:
        job.write_hydra_files()
    try:
        members = [build(job.resolved, job.choices, made=made) for job in jobs]
        with contextlib.chdir(os.getcwd()):  # which a user's class may change
            train_many(members, folders, display, figures=False)
    except Exception as error:
        if len(jobs) == 1:
            if isinstance(error, OSError):
                raise
            (folders[0].path / "train.log").write_text(traceback.format_exc())
            folders[0].write_failure(one_line(error), display.step)
            return
        lacking: OSError | None = None
        for job, folder in zip(jobs, folders, strict=True):
            if not folder.ended:
                try:
                    train_stack([job], display, made)
                except OSError as one:
                    lacking = one
        if lacking is not None:
            raise lacking from None
