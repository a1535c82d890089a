"""Which jobs of a sweep train together: grouped by signature, split for memory and workers, and written down."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from hydra.core.utils import env_override

from lipexp.compose import Job
from lipexp.config import ConfigError, one_line
from lipexp.executors import in_worker
from lipexp.imports import quick_imports
from lipexp.interrupts import find_lost_interrupts
from lipexp.options import Options
from lipexp.runs import write_file
from lipexp.workers import WorkerDied

RECORD = "sweep.json"  # the jobs and their split into stacks
DIED = "its worker process died while its classes were made, of too little memory perhaps"
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
    share = -(-len(jobs) // processes)  # of each process, about
    stacks: list[list[int]] = []
    for group in groups.values():
        largest = max(1, min(LARGEST_STACK, share, jobs[group[0]].best, memory // jobs[group[0]].run_bytes))
        pieces = -(-len(group) // largest)
        if len(groups) < processes:  # so that none stays idle
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


class Checked(NamedTuple):
    """What jobs need, or why they cannot be trained."""

    needs: dict[int, Needs]  # job number -> what it needs
    refused: dict[int, str]
    free: int  # bytes for all stacks that train at a time


def make_plan(jobs: Sequence[Job], options: Options) -> Plan:
    """Groups jobs by signature and splits the groups. A job that its constructors refuse is in no stack."""
    # A worker has imported torch, and this process need not.
    checked = _check_in_worker(jobs, options) if options.executor == "process" else check(jobs, options)
    stacks = split(checked.needs, options.processes, options.memory(checked.free))
    largest = max((need.run_bytes for need in checked.needs.values()), default=0)
    return Plan([list(job.overrides) for job in jobs], digest(jobs), stacks, checked.refused, largest)


def _check_in_worker(jobs: Sequence[Job], options: Options) -> Checked:
    """`check`, in a worker process. A job whose classes end their process, twice, is refused as well."""
    for _ in range(2 if len(jobs) == 1 else 1):
        with suppress(WorkerDied):
            return in_worker(check, jobs, options)
    if len(jobs) == 1:
        return Checked({}, {jobs[0].index: DIED}, sys.maxsize)
    half = len(jobs) // 2
    one, two = (_check_in_worker(part, options) for part in (jobs[:half], jobs[half:]))
    return Checked(one.needs | two.needs, one.refused | two.refused, min(one.free, two.free))


def check(jobs: Sequence[Job], options: Options) -> Checked:
    """Builds each job, in its own environment."""
    with quick_imports(keep=True):
        import torch

        from lipexp.train import build, cached_runs, run_bytes, signature

    needs, refused, cuda = {}, {}, False
    here = options.executor != "slurm"
    for job in jobs:
        try:
            with find_lost_interrupts(), env_override(job.env):
                member = build(job.resolved, job.choices, here=here)
            # A stack trains in one environment.
            together = f"{signature(member)} {sorted(job.env.items())}"
            on_gpu = here and member.config.device != "cpu" and torch.cuda.is_available()
            # In SLURM each stack is a job, which should be worth its wait.
            best = cached_runs(member) if here and not on_gpu else LARGEST_STACK
            needs[job.index] = Needs(together, run_bytes(member), best)
            cuda = cuda or on_gpu
        except ConfigError as error:
            refused[job.index] = str(error)
        except (Exception, SystemExit) as error:  # a user's class may raise anything
            refused[job.index] = one_line(error)
    return Checked(needs, refused, free_memory(cuda))


def digest(jobs: Iterable[Job]) -> str:
    """Equal for jobs of equal configurations and environments."""
    content = json.dumps([[job.config, job.env] for job in jobs], default=str)
    return hashlib.sha256(content.encode()).hexdigest()
