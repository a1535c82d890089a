"""Train steps, activations and whole commands against what others have for the same.

lipexp's own step is `loop.Trainer.step`, the one that `fit` takes, on a stack of one run.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from rich.console import Console
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from lipexp.activations import GroupSort
from lipexp.bench.timing import Case, table, take_turns
from lipexp.config import conf_dir
from lipexp.hydra_app import register_schemas
from lipexp.loop import Stack, Trainer, batch_indices
from lipexp.losses import Hinge
from lipexp.members import build, stack

WIDTH, DEPTH, BATCH = 128, 2, 256
MARGIN = Hinge().margin
STEP_CALLS, ACTIVATION_CALLS = 10, 50  # in a round
COMMAND_ROUNDS = 6  # a command takes seconds: it has one round where others have this many
LIPEXP = str(Path(sys.executable).with_name("lipexp"))
TRAIN = ("train",)  # the default job
IMPORTS = "import torch, sklearn.datasets, matplotlib.pyplot"  # what no such job can do without


def step(console: Console, rounds: int) -> None:
    """Whole train steps of a 2-128-128-1 network on two moons."""
    own = {
        "lipexp none + ReLU": (None, "constraint=none", "act=relu"),
        "lipexp linf + MaxMin": (1.3, "constraint=linf", "act=maxmin"),
        "lipexp spectral + MaxMin": (1.6, "constraint=spectral", "act=maxmin"),
    }
    stacks = {name: (target, one_run(*overrides)) for name, (target, *overrides) in own.items()}
    data = next(iter(stacks.values()))[1]
    cases = [
        Case("torch MLP, ReLU", torch_step(mlp(nn.Linear, nn.ReLU), data)),
        *(Case(name, Trainer(runs).step, target) for name, (target, runs) in stacks.items()),
        *(Case(name, torch_step(network, data)) for name, network in peer_networks(console).items()),
    ]
    take_turns(cases, rounds, STEP_CALLS)
    sizes = "-".join(map(str, [2, *[WIDTH] * DEPTH, 1]))
    console.print(table(f"train step, {sizes}, batch {BATCH}, hinge, Adam", cases))


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
    take_turns(cases, rounds, ACTIVATION_CALLS)
    console.print(table(f"activation, forward and backward, {BATCH} x {WIDTH}", cases))


def commands(console: Console, rounds: int) -> None:
    """Whole commands, as processes."""
    with tempfile.TemporaryDirectory(prefix="lipexp-bench-") as folder:
        for reference, arguments, target in (("pass", ("--help",), 3), (IMPORTS, TRAIN, 4)):
            quoted = f"'{reference}'" if " " in reference else reference
            cases = [
                Case(f"python -c {quoted}", command(folder, sys.executable, "-c", reference)),
                Case(" ".join(["lipexp", *arguments]), command(folder, LIPEXP, *arguments), target),
            ]
            take_turns(cases, -(-rounds // COMMAND_ROUNDS), calls=1, warm_up=1)
            console.print(table("command", cases))


def command(folder: str, *words: str) -> Callable[[], object]:
    """A command that runs in `folder`."""
    return lambda: subprocess.run(words, cwd=folder, check=True, capture_output=True, text=True)


def composed(*overrides: str) -> DictConfig:
    """The configuration of `lipexp train` with these overrides, and with steps that never run out."""
    register_schemas()
    shape = (f"model.width={WIDTH}", f"model.depth={DEPTH}", f"batch_size={BATCH}")
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("config", overrides=[*shape, "steps=1000000", *overrides])


def one_run(*overrides: str) -> Stack:
    """The stack of one run of the benchmark's network with these overrides."""
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


def mlp(
    linear: Callable[[int, int], nn.Module], act: Callable[[], nn.Module], width: int = WIDTH
) -> nn.Sequential:
    """The benchmark's network out of other libraries' parts."""
    parts: list[nn.Module] = []
    for n_in, n_out in pairwise([2, *[width] * DEPTH, 1]):
        parts += [linear(n_in, n_out), act()]
    return nn.Sequential(*parts[:-1])


def peer_networks(console: Console, width: int = WIDTH) -> dict[str, nn.Module]:
    """The networks of other libraries; says which packages are not installed."""

    def torchlip(library: Any) -> nn.Module:
        return mlp(library.SpectralLinear, library.GroupSort2, width)

    def monotonic(library: Any) -> nn.Module:
        def linear(n_in: int, n_out: int) -> nn.Module:
            return library.LipschitzLinear(n_in, n_out, kind="two-inf" if n_in == 2 else "inf")

        return mlp(linear, lambda: library.GroupSort(width // 2), width)

    own = mlp(lambda n_in, n_out: spectral_norm(nn.Linear(n_in, n_out)), MinimumMaximum, width)
    networks: dict[str, nn.Module] = {"torch spectral_norm + MaxMin": own}
    missing = []
    for name, module, package, network in (
        ("torchlip Spectral + GroupSort2", "deel.torchlip", "deel-torchlip", torchlip),
        ("MonotonicNetworks inf + GroupSort", "monotonicnetworks", "monotonicnetworks", monotonic),
    ):
        try:
            networks[name] = network(importlib.import_module(module))
        except ImportError:
            missing.append(package)
    say_missing(console, missing)
    return networks


def say_missing(console: Console, packages: Sequence[str]) -> None:
    """One line, if any package is not installed."""
    if packages:
        names = ", ".join(packages)
        console.print(f"not installed: {names} (pip install {' '.join(packages)})", soft_wrap=True)


class SortedPairs(nn.Module):
    """MaxMin as the sort of neighbouring features."""

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, 2)).sort(dim=-1).values.flatten(-2)


class MinimumMaximum(nn.Module):
    """MaxMin as the minimum and the maximum of two halves."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return torch.cat([torch.minimum(a, b), torch.maximum(a, b)], dim=-1)
