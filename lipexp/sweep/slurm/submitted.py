"""What a sweep has submitted to SLURM, in a file of its folder, and what SLURM says of it."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from lipexp.config import ConfigError
from lipexp.reading import LARGE_BYTES, Missing, parse, read_json
from lipexp.runs import write_file
from lipexp.sweep.compose import Job

EXECUTOR = ("hydra.launcher.executor", "slurm")  # an option and its value, as an error names them
KILLED = {"BOOT_FAIL", "FAILED", "NODE_FAIL", "PREEMPTED"}
FORGOTTEN = "no longer known"
ENDED = KILLED | {"CANCELLED", "COMPLETED", "DEADLINE", "OUT_OF_MEMORY", "REVOKED", "TIMEOUT", FORGOTTEN}


def states() -> dict[str, str]:
    """SLURM's number -> state, of all jobs of this user. SLURM forgets a job some minutes after its end.

    This asks squeue, which unlike sacct needs no accounting database.

    Raises:
        ConfigError: SLURM does not answer.
    """
    command = ["squeue", "--noheader", f"--user={os.getuid()}", "--states=all", "--array", "--format=%i|%T|%r"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        raise ConfigError(*EXECUTOR, complaint(answer.stderr))
    found = defaultdict(lambda: FORGOTTEN)
    for line in answer.stdout.splitlines():
        number, state, reason = line.split("|", 2)
        found[number] = f"{state}, {reason}" if state == "PENDING" else state
    return found


def complaint(stderr: str) -> str:
    """What a program of SLURM has to say, in one line."""
    lines = [line.strip().removeprefix("sbatch: ").removeprefix("error: ") for line in stderr.splitlines()]
    return "; ".join(line for line in lines if line) or "SLURM does not answer"


def read(file: Path) -> dict[str, list[Job]]:
    """SLURM's number -> jobs, of all stacks that were submitted, the latest last.

    Raises:
        ConfigError: the file cannot be read.
    """
    try:
        stacks = read_json(file.parent, file.name, LARGE_BYTES)
        for number, jobs in stacks.items():
            if not (re.fullmatch(r"\d+(_\d+)?", number) and isinstance(jobs, list) and jobs):
                raise ValueError(f"{number!r:.40} is no SLURM job with its stack")
        return {number: [parse(Job, entry) for entry in jobs] for number, jobs in stacks.items()}
    except Missing:
        return {}
    except ValueError as error:
        raise ConfigError("resume", "true", f"{file.parent}: {error}") from None


def write(file: Path, stacks: Mapping[str, Sequence[Job]]) -> None:
    """What `read` reads."""
    content = json.dumps({number: [vars(job) for job in jobs] for number, jobs in stacks.items()}, default=str)
    write_file(file, lambda path: path.write_text(content))
