"""The verb `bench`: the speed of lipexp, as ratios to other implementations measured in the same run.

Times on a shared machine are noise, so none is reported alone. The cases of a table take turns in one process with
one thread: a round times each of them once, and what is reported is the median over rounds of the round's ratio to
the first case, in CPU time. Whole commands take turns as processes.

lipexp's own step is `loop.Trainer.step`, the one that `fit` takes, on a stack of one run.
"""

from __future__ import annotations

import gc
import importlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from lipexp.activations import GroupSort
from lipexp.arguments import Parser
from lipexp.config import ConfigError, Settings, conf_dir, no_such, whole
from lipexp.loop import Stack, Trainer, batch_indices
from lipexp.process import cpu_threads
from lipexp.train import build, stack

WIDTH, DEPTH, BATCH = 128, 2, 256
MARGIN = 0.5  # of the hinge loss
WARM_UP = 5  # calls of a case before any is timed
INNER = {"step": 10, "activation": 50, "commands": 1}  # calls of a case in a round
COMMAND_ROUNDS = 6  # a command takes seconds: one round of commands for so many rounds of the others
COMMAND_WARM_UP = 1
TRAIN = ("train",)  # the default job
IMPORTS = "import torch, sklearn.datasets, matplotlib.pyplot"  # what no such job can do without

EPILOG = """\
step        a train step (batch, forward, loss, backward, optimiser) against a plain torch MLP with ReLU and Adam
activation  MaxMin, forward and backward, against ReLU
commands    lipexp --help against an empty Python, lipexp train against its imports
sweep       runs of a stack against single ones; takes minutes, so it runs only when it is named

A time is CPU time, user and system, unless it says wall. Targets are aims: missing one is no error."""


@dataclass
class Case:
    """One thing to time; the first of its table is what the others are compared with."""

    name: str
    work: Callable[[], object]
    target: float | None = None  # the largest ratio aimed at
    runs: int = 1  # that one call trains: times are those of one
    cpu: list[float] = field(default_factory=list)  # seconds a call, one number a round
    wall: list[float] = field(default_factory=list)


def main(arguments: Sequence[str]) -> int:
    """Run `lipexp bench`; returns the exit status: 0, 1 a command failed, 2 bad input."""
    parser = Parser("lipexp bench")
    parser.description = "Speed, as ratios to other implementations measured in the same run."
    parser.epilog = EPILOG
    parser.add_argument(
        "sections", metavar="SECTION", nargs="*", help=f"{', '.join(SECTIONS)} (default: all but sweep)"
    )
    parser.add_argument(
        "--rounds", metavar="N", type=int, default=30, help="times that each case gets its turn (30)"
    )
    options = parser.parse_intermixed_args(arguments)
    try:
        whole("--rounds", options.rounds, least=1)
        for section in options.sections:
            if section not in SECTIONS:
                raise ConfigError(section, None, no_such("section", section, list(SECTIONS)))
    except ConfigError as error:
        print(f"lipexp: {error}", file=sys.stderr)
        return 2
    console = Console(highlight=False)
    try:
        with cpu_threads(1):
            for section in dict.fromkeys(options.sections or DEFAULT):
                SECTIONS[section](console, options.rounds)
    except subprocess.CalledProcessError as error:
        said = (error.stderr or "").strip().splitlines()
        print(f"lipexp: {' '.join(error.cmd)}: {said[-1] if said else error}", file=sys.stderr)
        return 1
    return 0


# The sections ---------------------------------------------------------------------------------------------------


def step(console: Console, rounds: int) -> None:
    """Whole train steps of a 2-128-128-1 network on two moons."""
    own = {
        "lipexp none + ReLU": (None, "constraint=none", "act=relu"),
        "lipexp linf + MaxMin": (1.3, "constraint=linf", "act=maxmin"),
        "lipexp spectral + MaxMin": (1.6, "constraint=spectral", "act=maxmin"),
    }
    stacks = {name: (target, one_run(*overrides)) for name, (target, *overrides) in own.items()}
    data = next(iter(stacks.values()))[1]
    peers, missing = peer_networks()
    cases = [
        Case("torch MLP, ReLU", torch_step(mlp(nn.Linear, nn.ReLU), data)),
        *(Case(name, Trainer(runs).step, target) for name, (target, runs) in stacks.items()),
        *(Case(name, torch_step(network, data)) for name, network in peers.items()),
    ]
    take_turns(cases, rounds, INNER["step"])
    title = f"train step, {'-'.join(map(str, [2, *[WIDTH] * DEPTH, 1]))}, batch {BATCH}, hinge, Adam"
    console.print(table(title, cases, rounds))
    if missing:
        console.print(f"not installed: {', '.join(missing)} (pip install {' '.join(missing)})", soft_wrap=True)


def activation(console: Console, rounds: int) -> None:
    """Activations alone, forward and backward."""
    x = torch.randn(1, BATCH, WIDTH, generator=torch.Generator().manual_seed(0), requires_grad=True)
    gradient = torch.ones_like(x)

    def both_ways(act: nn.Module) -> Callable[[], object]:
        return lambda: torch.autograd.grad(act(x), x, gradient)

    cases = [
        Case("torch ReLU", both_ways(nn.ReLU())),
        Case("lipexp MaxMin", both_ways(GroupSort()), 3.3),
        Case("torch.sort of pairs", both_ways(SortedPairs())),
        Case("torch.minimum, maximum", both_ways(MinimumMaximum())),
    ]
    take_turns(cases, rounds, INNER["activation"])
    console.print(table(f"activation, forward and backward, {BATCH} x {WIDTH}", cases, rounds))


def commands(console: Console, rounds: int) -> None:
    """Whole commands, as processes."""
    lipexp = str(Path(sys.executable).with_name("lipexp"))
    rounds = -(-rounds // COMMAND_ROUNDS)
    with tempfile.TemporaryDirectory(prefix="lipexp-bench-") as folder:
        for cases in (
            [
                Case("python -c pass", command(folder, sys.executable, "-c", "pass")),
                Case("lipexp --help", command(folder, lipexp, "--help"), 3),
            ],
            [
                Case(f"python -c '{IMPORTS}'", command(folder, sys.executable, "-c", IMPORTS)),
                Case(" ".join(["lipexp", *TRAIN]), command(folder, lipexp, *TRAIN), 4),
            ],
        ):
            take_turns(cases, rounds, INNER["commands"], warm_up=COMMAND_WARM_UP)
            console.print(table("command", cases, rounds))


def sweep(console: Console, rounds: int) -> None:
    """Stacked runs against single ones."""
    from lipexp import bench_sweep  # which builds on this module

    bench_sweep.sweep(console, rounds)


SECTIONS = {"step": step, "activation": activation, "commands": commands, "sweep": sweep}
DEFAULT = ("step", "activation", "commands")  # a sweep takes minutes


def command(folder: str, *words: str) -> Callable[[], object]:
    """A command that runs in `folder`."""
    return lambda: subprocess.run(words, cwd=folder, check=True, capture_output=True, text=True)


# Measuring ------------------------------------------------------------------------------------------------------


def take_turns(cases: Sequence[Case], rounds: int, inner: int, warm_up: int = WARM_UP) -> None:
    """Time `inner` calls of each case in every round. The round starts with another case each time."""
    for case in cases:
        for _ in range(warm_up):
            case.work()
    collected = gc.isenabled()
    gc.disable()
    try:
        for turn in range(rounds):
            first = turn % len(cases)
            for case in (*cases[first:], *cases[:first]):
                cpu, wall = cpu_seconds(), time.perf_counter()
                for _ in range(inner):
                    case.work()
                case.cpu.append((cpu_seconds() - cpu) / inner / case.runs)
                case.wall.append((time.perf_counter() - wall) / inner / case.runs)
            gc.collect()
    finally:
        if collected:
            gc.enable()


def cpu_seconds() -> float:
    """What this process and its finished children have used, user and system."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The lower quartile, the median and the upper quartile."""
    if len(values) == 1:
        return (values[0],) * 3
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def table(title: str, cases: Sequence[Case], rounds: int, clock: str = "cpu") -> Table:
    """One row a case: its ratio to the first one by `clock` (cpu, wall), the target, and times for orientation."""
    out = Table(title=escape(title), title_justify="left", box=None, pad_edge=False, header_style="bold")
    out.add_column(f"{rounds} {'rounds' if rounds > 1 else 'round'}", overflow="fold")
    for heading in ("ratio", "quartiles", "target", "", "CPU", "wall"):
        out.add_column(
            heading, justify="left" if heading in ("quartiles", "target", "") else "right", no_wrap=True
        )
    for case in cases:
        low, ratio, high = quartiles(
            [a / b for a, b in zip(getattr(case, clock), getattr(cases[0], clock), strict=True)]
        )
        is_reference = case is cases[0]
        out.add_row(
            escape(case.name),
            "1" if is_reference else f"{ratio:.2f}",
            "" if is_reference else f"{low:.2f} to {high:.2f}",
            "" if case.target is None else f"≤ {case.target:.3g}",
            "" if case.target is None else "met" if ratio <= case.target else "[bold]missed[/bold]",
            *(duration(statistics.median(seconds)) for seconds in (case.cpu, case.wall)),
        )
    return out


def duration(seconds: float) -> str:
    return f"{seconds * 1e6:,.0f} µs" if seconds < 0.01 else f"{seconds * 1e3:,.0f} ms"


# What is measured -----------------------------------------------------------------------------------------------


def composed(*overrides: str) -> DictConfig:
    """The configuration of `lipexp train` with these overrides, without an end."""
    ConfigStore.instance().store(name="lipexp_schema", node=Settings)
    shape = (f"model.width={WIDTH}", f"model.depth={DEPTH}", f"batch_size={BATCH}", f"loss.margin={MARGIN}")
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("config", overrides=[*shape, "steps=1000000", *overrides])


def one_run(*overrides: str) -> Stack:
    """The stack of one run with these overrides, which are those of the benchmark's network."""
    return stack([build(composed(*overrides))])


def torch_step(network: nn.Module, runs: Stack) -> Callable[[], object]:
    """A train step as a user of torch writes it, on the data of `runs`."""
    (data,) = runs.data
    x, y = torch.from_numpy(data.train_x), torch.from_numpy(data.train_y)
    batches = batch_indices(len(x), BATCH, [torch.Generator().manual_seed(0)])
    optimiser = torch.optim.Adam(network.parameters())

    def step() -> Tensor:
        index = next(batches)[0]
        f = network(x[index]).squeeze(-1)
        loss = torch.relu(MARGIN - (2 * y[index] - 1) * f).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        return loss.detach()

    return step


def mlp(linear: Callable[[int, int], nn.Module], act: Callable[[], nn.Module], width: int = WIDTH) -> nn.Module:
    """The benchmark's network out of other libraries' parts."""
    sizes = [2, *[width] * DEPTH, 1]
    parts: list[nn.Module] = []
    for n_in, n_out in pairwise(sizes):
        parts += [linear(n_in, n_out), act()]
    return nn.Sequential(*parts[:-1])


def peer_networks(width: int = WIDTH) -> tuple[dict[str, nn.Module], list[str]]:
    """The networks of other libraries, and the packages that are not installed."""
    networks = {
        "torch spectral_norm + MaxMin": mlp(lambda i, o: spectral_norm(nn.Linear(i, o)), MinimumMaximum, width)
    }
    missing = []
    try:
        torchlip: Any = importlib.import_module("deel.torchlip")
        networks["torchlip Spectral + GroupSort2"] = mlp(torchlip.SpectralLinear, torchlip.GroupSort2, width)
    except ImportError:
        missing.append("deel-torchlip")
    try:
        monotonic: Any = importlib.import_module("monotonicnetworks")
        networks["MonotonicNetworks inf + GroupSort"] = mlp(
            lambda i, o: monotonic.LipschitzLinear(i, o, kind="two-inf" if i == 2 else "inf"),
            lambda: monotonic.GroupSort(width // 2),
            width,
        )
    except ImportError:
        missing.append("monotonicnetworks")
    return networks, missing


class SortedPairs(nn.Module):
    """MaxMin as the sort of neighbouring features."""

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, 2)).sort(dim=-1).values.flatten(-2)


class MinimumMaximum(nn.Module):
    """MaxMin as the minimum and the maximum of two halves."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return torch.cat([torch.minimum(a, b), torch.maximum(a, b)], dim=-1)
