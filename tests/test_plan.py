"""Which jobs of a sweep train together, and where."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from lipexp.members import build, preferred_stack_size
from lipexp.sweep.compose import Job
from lipexp.sweep.options import LauncherOptions
from lipexp.sweep.plan import LARGEST_STACK, Needs, make_plan, split


def sizes(stacks: list[list[int]]) -> list[int]:
    return [len(stack) for stack in stacks]


def test_jobs_are_grouped_and_split():
    def alike(jobs: int, processes: int, preferred: int = LARGEST_STACK) -> list[int]:
        return sizes(split({job: Needs("a", 1, preferred) for job in range(jobs)}, processes, memory=10**9))

    jobs = {job: Needs("ab"[job % 2], 100) for job in range(20)}
    assert split(jobs, processes=1, memory=10_000) == [list(range(0, 20, 2)), list(range(1, 20, 2))]
    assert max(sizes(split(jobs, processes=1, memory=499))) == 4
    assert sizes(split(jobs, processes=1, memory=1)) == [1] * 20  # one run trains, whatever it takes
    for processes in (2, 3, 6, 8):  # none of them is idle, and all end at about the same time
        stacks = split(jobs, processes, memory=10_000)
        assert len(stacks) >= processes
        assert max(sizes(stacks)) <= -(-20 // processes)
        assert sorted(job for stack in stacks for job in stack) == list(range(20))
    assert alike(2, processes=8) == [1, 1]
    assert max(alike(40, processes=1, preferred=16)) <= 16  # the size that trains fastest
    assert alike(40, processes=2, preferred=16) == [10] * 4
    assert max(alike(3 * LARGEST_STACK - 1, processes=1)) == LARGEST_STACK
    assert split({}, processes=2, memory=10) == []


def test_memory_is_shared_by_the_processes():
    assert LauncherOptions(executor="inline").memory(free=1000) == 250
    assert LauncherOptions(executor="inline", memory_gib=1).memory(free=10) == 2**30
    assert LauncherOptions(executor="process", workers=4, memory_gib=1).memory(free=10) == 2**28
    assert LauncherOptions(executor="inline", workers=4).processes == 1
    assert LauncherOptions().processes == os.cpu_count()


@pytest.mark.parametrize(("width", "batch", "runs"), [(64, 256, 16), (16, 32, 512), (1024, 256, 4)])
def test_a_layer_of_a_stack_fits_the_caches(width, batch, runs, compose):
    """1 MiB of float32, but no fewer than four runs."""
    assert preferred_stack_size(build(compose(f"model.width={width}", f"batch_size={batch}"))) == runs


@pytest.fixture
def gpu(monkeypatch, request):
    """A machine with or without a GPU, to the eye of torch."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: request.param)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**40, 2**40))


@pytest.mark.parametrize(
    ("gpu", "executor", "device", "stacks", "becomes"),
    [
        (False, "inline", "auto", 3, "inline"),
        (True, "inline", "auto", 1, "inline"),
        (True, "inline", "cpu", 3, "inline"),
        (False, "slurm", "auto", 1, "slurm"),
        (False, "auto", "auto", 4, "process"),  # as many for each of two processes
        (True, "auto", "cpu", 4, "process"),
    ],
    indirect=["gpu"],
)
def test_caches_count_on_a_cpu_of_this_machine(gpu, executor, device, stacks, becomes, compose):
    content = OmegaConf.to_container(compose(f"device={device}", "model.width=64"), resolve=True)
    jobs = [Job(n, (), {**content, "seed": n}, "", {}, Path(str(n))) for n in range(33)]
    workers = 2 if executor == "auto" else None
    plan = make_plan(jobs, LauncherOptions(executor=executor, workers=workers, memory_gib=1), {})
    assert (len(plan.stacks), plan.executor) == (stacks, becomes)
    assert max(sizes(plan.stacks)) - min(sizes(plan.stacks)) <= 1


@pytest.mark.parametrize("gpu", [True], indirect=True)
def test_auto_trains_several_stacks_on_a_gpu_here(gpu, compose):
    contents = [OmegaConf.to_container(compose(act), resolve=True) for act in ("act=relu", "act=abs")]
    jobs = [Job(n, (), content, "", {}, Path(str(n))) for n, content in enumerate(contents)]
    plan = make_plan(jobs, LauncherOptions(workers=2), {})
    assert (plan.stacks, plan.executor) == ([[0], [1]], "inline")
