"""Which jobs of a sweep train together."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from lipexp import train
from lipexp.sweep.compose import Job
from lipexp.config import ConfigError
from lipexp.sweep.options import Options
from lipexp.sweep.plan import LARGEST_STACK, Needs, make_plan, split


def sizes(stacks: list[list[int]]) -> list[int]:
    return [len(stack) for stack in stacks]


def test_jobs_are_grouped_and_split():
    jobs = {job: Needs("ab"[job % 2], 100) for job in range(20)}
    assert split(jobs, processes=1, memory=10_000) == [list(range(0, 20, 2)), list(range(1, 20, 2))]
    assert sizes(split(jobs, processes=1, memory=499)) == [3, 3, 4, 3, 3, 4]
    assert sizes(split(jobs, processes=1, memory=1)) == [1] * 20  # one run trains, whatever it takes
    assert sizes(split(jobs, processes=6, memory=10_000)) == [3, 3, 4, 3, 3, 4]  # none of them is idle
    assert sizes(split({0: Needs("a", 1), 1: Needs("a", 1)}, processes=8, memory=10)) == [1, 1]
    # Stacks of the size that trains fastest; as many as keep both processes busy to the end.
    assert sizes(split({job: Needs("a", 1, 16) for job in range(40)}, processes=1, memory=10**9)) == [13, 13, 14]
    assert sizes(split({job: Needs("a", 1, 16) for job in range(40)}, processes=2, memory=10**9)) == [10] * 4
    uneven = {job: Needs("ab"[job >= 20], 1) for job in range(25)}
    assert sizes(split(uneven, processes=2, memory=10**9)) == [10, 10, 5]
    assert sizes(split(uneven, processes=1, memory=10**9)) == [20, 5]
    assert sizes(split({job: Needs("a", 1, 200) for job in range(200)}, processes=1, memory=10**9)) == [100, 100]
    many = split({job: Needs("a", 1) for job in range(3 * LARGEST_STACK - 1)}, processes=1, memory=10**9)
    assert max(sizes(many)) == LARGEST_STACK
    assert sorted(job for stack in many for job in stack) == list(range(3 * LARGEST_STACK - 1))
    assert split({}, processes=2, memory=10) == []


def test_memory_is_shared_by_the_processes():
    assert Options().memory(free=1000) == 250
    assert Options(memory_gib=1).memory(free=10) == 2**30
    assert Options("process", workers=4, memory_gib=1).memory(free=10) == 2**28
    assert Options("inline", workers=4).processes == 1
    with pytest.raises(ConfigError):
        Options(memory_gib=0)


@pytest.fixture
def job(compose: Callable[..., DictConfig]) -> Callable[..., Job]:
    """job(3, "act=relu", env={"A": "1"}) -> job number 3 of a sweep with these settings."""

    def job(number: int, *overrides: str, env: Mapping[str, str] = {}) -> Job:
        content = OmegaConf.to_container(compose("device=auto", *overrides), resolve=True)
        return Job(number, overrides, content, content, "", {}, Path(str(number)), env=dict(env))

    return job


def test_jobs_train_together_if_signature_and_environment_are_the_same(job):
    jobs = [
        job(0, "seed=1"),
        job(1, "seed=2", "lipschitz=3", "loss.margin=0.1", "optim.lr=0.1", "dataset.noise=0.2"),
        job(2, "act=relu"),
        job(3, "steps=7"),
        job(4, env={"A": "1"}),
        job(5, "seed=3", env={"A": "1"}),
        job(6, "loss.margin=-1"),
    ]
    plan = make_plan(jobs, Options())
    assert plan.stacks == [[0, 1], [2], [3], [4, 5]]
    assert list(plan.refused) == [6]
    assert "margin" in plan.refused[6]
    assert plan.jobs == [list(one.overrides) for one in jobs]


@pytest.mark.parametrize(
    ("settings", "runs"),
    [
        (("model.width=64", "batch_size=256"), 16),
        (("model.width=64", "batch_size=64"), 64),
        (("model.width=16", "batch_size=32"), 512),
        (("model.width=1024", "batch_size=256"), 4),
    ],
)
def test_a_layer_of_a_stack_fits_the_caches(settings, runs, compose):
    """1 MiB of float32, but no fewer than four runs."""
    assert train.cached_runs(train.build(compose(*settings))) == runs


@pytest.mark.parametrize(
    ("gpu", "executor", "device", "stacks"),
    [
        (False, "inline", "auto", [11, 11, 11]),
        (True, "inline", "auto", [33]),
        (True, "inline", "cpu", [11, 11, 11]),
        (False, "slurm", "auto", [33]),
    ],
)
def test_caches_count_on_a_cpu_of_this_machine(gpu, executor, device, stacks, job, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**40, 2**40))
    jobs = [job(number, f"seed={number}", f"device={device}", "model.width=64") for number in range(33)]
    plan = make_plan(jobs, Options(executor, memory_gib=1))
    assert sizes(plan.stacks) == stacks


class Needy(torch.nn.Module):
    """A class of the user's that cannot be made without its environment."""

    def __init__(self) -> None:
        super().__init__()
        self.needed = os.environ["NEEDED"]


def test_a_job_is_checked_in_its_own_environment(job, monkeypatch):
    monkeypatch.delenv("NEEDED", raising=False)
    act = {"_target_": f"{__name__}.Needy"}
    with_it, without = job(0, "constraint=none", env={"NEEDED": "1"}), job(1, "constraint=none")
    for one in (with_it, without):
        one.resolved["act"] = act
    plan = make_plan([with_it, without], Options())
    assert plan.stacks == [[0]]
    assert "NEEDED" in plan.refused[1]
