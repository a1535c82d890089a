"""Which jobs of a sweep train together: grouped by signature, split for memory and workers, and written down."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from lipexp.config import ConfigError, one_line
from lipexp.process import holding_interrupts
from lipexp.reading import LARGE_BYTES, Missing, Unreadable, read_record, refuse_links_out
from lipexp.runs import write_file
from lipexp.sweep.compose import Job
from lipexp.sweep.options import LauncherOptions

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
    preferred: int = LARGEST_STACK


def split(jobs: Mapping[int, Needs], processes: int, memory: int) -> list[list[int]]:
    """Jobs of equal signature as stacks, small enough for caches and memory, and enough of them for all processes.

    Args:
        jobs: job number -> what it needs.
        memory: bytes for one stack.
    """
    groups: dict[str, list[int]] = {}
    for job, needs in jobs.items():
        groups.setdefault(needs.signature, []).append(job)
    per_process = -(-len(jobs) // processes)
    stacks: list[list[int]] = []
    for group in groups.values():
        needs = jobs[group[0]]
        largest = max(1, min(LARGEST_STACK, per_process, needs.preferred, memory // needs.run_bytes))
        pieces = -(-len(group) // largest)
        if len(groups) < processes:  # so that no process stays idle
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
    executor: str  # inline, process or slurm

    @classmethod
    def read(cls, folder: Path) -> Plan:
        """The plan that an earlier call wrote into `folder`.

        Raises:
            ConfigError: there is none, or it cannot be read.
        """
        try:
            plan = read_record(cls, folder, RECORD, LARGE_BYTES)
            planned = [job for stack in plan.stacks for job in stack] + list(plan.refused)
            if sorted(planned) != list(range(len(plan.jobs))):
                raise Unreadable(RECORD, "its stacks are not its jobs")
            refuse_links_out(folder)
        except Missing:
            raise ConfigError("resume", "true", f"{folder} holds no sweep that could be continued") from None
        except Unreadable as error:
            raise ConfigError("resume", "true", f"{folder}: {error}") from None
        return plan

    def write(self, folder: Path) -> None:
        content = json.dumps(asdict(self))
        write_file(folder / RECORD, lambda path: path.write_text(content))


def make_plan(jobs: Sequence[Job], options: LauncherOptions, made: dict[str, Any]) -> Plan:
    """Group jobs by signature and split the groups. A job that cannot be built is in no stack.

    With executor=auto, several stacks train in worker processes where there are several cores, and one stack, or
    all on a GPU, here.

    Args:
        made: takes the objects of the jobs; see `members.build`.
    """
    with holding_interrupts():
        import torch

        from lipexp.members import build, preferred_stack_size, run_bytes, signature

    needs, refused, cuda = {}, {}, False
    for job in jobs:
        try:
            member = build(job.resolved, job.choices, here=options.executor != "slurm", made=made)
            on_gpu = member.config.device != "cpu" and torch.cuda.is_available()
            # In SLURM each stack is a job, which should be worth its wait.
            alone = on_gpu or options.executor == "slurm"
            preferred = LARGEST_STACK if alone else preferred_stack_size(member)
            needs[job.index] = Needs(signature(member), run_bytes(member), preferred)
            cuda = cuda or on_gpu
        except ConfigError as error:
            refused[job.index] = str(error)
        except Exception as error:  # a user's class may raise anything
            refused[job.index] = one_line(error)
    free = free_memory(cuda and options.executor != "slurm")
    if options.executor == "auto":
        here = replace(options, executor="inline")
        several = len(split(needs, 1, here.memory(free))) > 1 and options.processes > 1
        options = replace(options, executor="process") if several and not cuda else here
    stacks = split(needs, options.processes, options.memory(free))
    largest = max((need.run_bytes for need in needs.values()), default=0)
    return Plan([list(job.overrides) for job in jobs], digest(jobs), stacks, refused, largest, options.executor)


def digest(jobs: Iterable[Job]) -> str:
    """Equal for jobs of equal configurations, all of them resolved."""
    content = json.dumps([job.resolved for job in jobs], default=str)
    return hashlib.sha256(content.encode()).hexdigest()
