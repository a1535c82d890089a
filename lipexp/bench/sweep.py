"""`lipexp bench sweep`: what a run of a stack costs, against runs by themselves."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence

from rich.console import Console
from torch import nn

from lipexp.bench.steps import BATCH, LIPEXP, command, composed, mlp, peer_networks, torch_step
from lipexp.bench.timing import Case, table, take_turns
from lipexp.loop import Stack, Trainer
from lipexp.members import build, stack

RUNS, WIDTH = 64, 64
STEP_CALLS = 4  # in a round
IN_PROCESSES = "hydra.launcher.executor=process"
BY_HYDRA = ("hydra/launcher=basic", "hydra/sweeper=basic")


def sweep(console: Console, rounds: int) -> None:
    """Steps of a stack, and whole commands, which take minutes."""
    steps(console, rounds, RUNS)
    commands(console, RUNS)


def stacked(runs: int, constraint: str) -> Stack:
    """A stack of the default job with MaxMin, whose runs differ in their seed."""
    config = composed(f"constraint={constraint}", "act=maxmin", f"model.width={WIDTH}")
    members = []
    for seed in range(runs):
        config.seed = seed
        members.append(build(config.copy()))
    return stack(members)


def steps(console: Console, rounds: int, runs: int) -> None:
    """A step of one run of a stack, against a step of another library's network of the same size."""
    single = stacked(1, "none")
    networks = {"torch MLP, ReLU": mlp(nn.Linear, nn.ReLU, WIDTH)} | peer_networks(console, WIDTH)
    for name, target in (("torch MLP, ReLU", 0.35), ("torchlip Spectral + GroupSort2", 1 / 12)):
        if name not in networks:
            continue
        cases = [
            Case(name, torch_step(networks[name], single)),
            Case(f"linf + MaxMin, a run of {runs}", Trainer(stacked(runs, "linf")).step, target, runs=runs),
            Case(f"spectral + MaxMin, a run of {runs}", Trainer(stacked(runs, "spectral")).step, runs=runs),
        ]
        take_turns(cases, rounds, STEP_CALLS)
        console.print(table(f"train step, 2-{WIDTH}-{WIDTH}-1, batch {BATCH}, a run of a stack", cases))


def commands(console: Console, runs: int, settings: Sequence[str] = ()) -> None:
    """Whole commands, each once: a sweep as stacks, by Hydra's launcher, and as single processes."""
    with tempfile.TemporaryDirectory(prefix="lipexp-bench-") as folder:

        def train(*arguments: str) -> Callable[[], object]:
            return command(folder, LIPEXP, "train", *arguments, *settings)

        many = ("-m", f"seed=range({runs})")
        for reference, target in (
            (Case("basic launcher", train(*many, *BY_HYDRA), runs=runs), 1 / 6),
            (Case("a process a job", train()), 1 / 15),
        ):
            case = Case("stacks, in processes", train(*many, IN_PROCESSES), target, runs)
            take_turns([reference, case], rounds=1, calls=1, warm_up=0)
            console.print(table(f"whole commands, {runs} jobs, a job", [reference, case], clock="wall"))
