"""Which jobs of a sweep train together: grouped by signature, split for memory and workers, and written down."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from lipexp.compose import Job
from lipexp.config import ConfigError
from lipexp.runs import write_file

RECORD = "sweep.json"  # the jobs and their split into stacks
LARGEST_STACK = 128  # runs; larger ones are no faster, and keep results back for longer


def free_memory(cuda: bool = False) -> int:
    """Bytes that are free for new programs; with `cuda`, on the GPU as well."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # not Linux
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    if cuda:
        import torch

        free = min(free, torch.cuda.mem_get_info()[0])
    return free


class Needs(NamedTuple):
    """What a job can be stacked with, the memory it takes, and how many of its kind train fastest together."""

    signature: str
    run_bytes: int
    best: int = LARGEST_STACK


def split(jobs: Mapping[int, Needs], processes: int, memory: int) -> list[list[int]]:
    """Jobs of equal signature as stacks, small enough for caches and memory, and enough of them for all processes.

    Args:
        jobs: job number -> what it needs.
        memory: bytes for one stack.
    """
    groups: dict[str, list[int]] = {}
    for job, needs in jobs.items():
        groups.setdefault(needs.signature, []).append(job)
    stacks: list[list[int]] = []
    for group in groups.values():
        largest = max(1, min(LARGEST_STACK, jobs[group[0]].best, memory // jobs[group[0]].run_bytes))
        pieces = -(-len(group) // largest)
        if len(groups) < processes:  # so that none stays idle, at the end neither
            at_once = -(-processes // len(groups))
            pieces = min(len(group), at_once * -(-pieces // at_once))
        ends = [len(group) * piece // pieces for piece in range(pieces + 1)]
        stacks.extend(group[start:end] for start, end in pairwise(ends))
    return stacks


@dataclass(frozen=True)
class Plan:
    """What a sweep has to do: its jobs in order, and the stacks they train in, as job numbers."""

    jobs: list[list[str]]  # the overrides of each job
    digest: str  # of their configurations, as conf/ may have changed since
    stacks: list[list[int]]
    refused: dict[int, str]  # jobs that cannot be trained, and why
    run_bytes: int  # the memory of the largest run

    @classmethod
    def read(cls, folder: Path) -> Plan:
        """The plan that an earlier call wrote into `folder`.

        Raises:
            ConfigError: there is none, or it cannot be read.
        """
        try:
            record = json.loads((folder / RECORD).read_text())
            refused = {int(job): str(reason) for job, reason in record.pop("refused").items()}
            return cls(**record, refused=refused)
        except FileNotFoundError:
            raise ConfigError("resume", "true", f"{folder} holds no sweep that could be continued") from None
        except (ValueError, TypeError, KeyError, AttributeError):
            raise ConfigError("resume", "true", f"{folder / RECORD} cannot be read") from None

    def write(self, folder: Path) -> None:
        content = json.dumps(asdict(self))
        write_file(folder / RECORD, lambda path: path.write_text(content))


def digest(jobs: Iterable[Job]) -> str:
    """Equal for jobs of equal configurations and environments."""
    content = json.dumps([[job.config, job.env] for job in jobs], default=str)
    return hashlib.sha256(content.encode()).hexdigest()
