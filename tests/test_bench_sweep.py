"""`lipexp bench sweep` at toy size: what it compares, and that it compares like with like."""

from __future__ import annotations

from itertools import count

import pytest
import torch
from rich.console import Console

from lipexp.bench import bench
from lipexp.bench import sweep as bench_sweep
from lipexp.bench.bench import Case, take_turns
from lipexp.loop import Trainer


@pytest.fixture
def screen():
    """A console, and what it has printed."""
    console = Console(width=200, record=True, quiet=False, force_terminal=False)
    return console, lambda: [line.rstrip() for line in console.export_text().splitlines() if line.strip()]


def test_the_time_of_a_stack_is_that_of_one_of_its_runs(monkeypatch):
    ticks = count()  # a clock that shows one second more at every look
    monkeypatch.setattr(bench, "cpu_seconds", lambda: float(next(ticks)))
    calls = []
    one, four = (Case("case", lambda: calls.append(1), runs=runs) for runs in (1, 4))
    take_turns([one, four], rounds=3, inner=2, warm_up=0)
    assert len(calls) == 12
    assert (one.cpu, four.cpu) == ([1 / 2] * 3, [1 / 8] * 3)


def test_steps_are_those_of_the_stacked_default_job(screen):
    runs = bench_sweep.stacked(3, "linf")
    assert [tuple(layer.weight.shape) for layer in Trainer(runs).layers] == [(3, 64, 2), (3, 64, 64), (3, 1, 64)]
    assert not torch.equal(*(torch.from_numpy(data.train_x) for data in runs.data[:2]))
    console, printed = screen
    bench_sweep.steps(console, rounds=1, runs=2)
    assert any(line.startswith("linf + MaxMin, a run of 2") for line in printed())


def test_the_products_are_those_of_a_step(screen):
    shapes = {tuple(result.shape) for result in bench_sweep.products(2)()}
    forward = {(2, 256, 64), (2, 256, 1)}
    gradients = {(2, 2, 64), (2, 64, 64), (2, 1, 64)}  # the first transposed, as it is faster
    assert shapes == forward | gradients
    assert len(bench_sweep.products(2)()) == 8  # three layers thrice, but for the gradient of the input
    console, printed = screen
    bench_sweep.arithmetic(console, rounds=1, runs=2)
    assert any("≤ 2" in line for line in printed())


def test_composition_writes_the_same_files(screen, tmp_path, monkeypatch):
    console, printed = screen
    bench_sweep.composition(console, rounds=1)
    assert [line.split()[0] for line in printed()[2:]] == ["Hydra", "lipexp"]


@pytest.mark.slow
def test_an_empty_job_is_what_more_jobs_cost_more(screen, monkeypatch):
    console, printed = screen
    clock = iter([0.0, 3.0, 10.0, 13.2])  # of one job and of three, before and after
    monkeypatch.setattr(bench_sweep, "cpu_seconds", lambda: next(clock))
    bench_sweep.empty_jobs(console, 3, ["experiment=debug", "device=cpu"])
    assert printed() == ["an empty job (steps=0) of 3, with all its files: 100 CPU-ms (≤ 80)"]


@pytest.mark.slow
def test_whole_commands_are_compared_a_job(screen):
    console, printed = screen
    bench_sweep.commands(console, 2, ["experiment=debug", "steps=2", "device=cpu"])
    lines = printed()
    assert sum("stacks, in processes" in line for line in lines) == 2
    assert any(line.startswith("basic launcher") for line in lines)
    assert any(line.startswith("a process a job") for line in lines)
