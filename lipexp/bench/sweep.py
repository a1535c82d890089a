"""`lipexp bench sweep`: what a run of a stack costs, against runs by themselves."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import torch
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.utils import _save_config
from hydra.types import RunMode
from omegaconf import OmegaConf, open_dict
from rich.console import Console
from torch import nn

from lipexp.bench.steps import BATCH, LIPEXP, command, composed, mlp, peer_networks, torch_step
from lipexp.bench.timing import Case, cpu_seconds, table, take_turns
from lipexp.config import conf_dir
from lipexp.hydra_app import register_schemas
from lipexp.loop import Stack, Trainer
from lipexp.members import build, stack
from lipexp.sweep.compose import Composer

RUNS, WIDTH = 64, 64
STEP_CALLS = 4  # in a round
EMPTY_JOB_MS = 80
IN_PROCESSES = "hydra.launcher.executor=process"
BY_HYDRA = ("hydra/launcher=basic", "hydra/sweeper=basic")


def sweep(console: Console, rounds: int) -> None:
    """All tables: steps, arithmetic, composition, and whole commands (minutes)."""
    steps(console, rounds, RUNS)
    arithmetic(console, rounds, RUNS)
    composition(console, rounds)
    empty_jobs(console, RUNS)
    commands(console, RUNS)


def stacked(runs: int, constraint: str) -> Stack:
    """A stack of the default job with MaxMin, one seed a run."""
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


def arithmetic(console: Console, rounds: int, runs: int) -> None:
    """The whole step against its matrix products alone: a ratio of 2 is half of their throughput."""
    cases = [
        Case("torch.bmm alone", products(runs)),
        Case("linf + MaxMin", Trainer(stacked(runs, "linf")).step, 2.0),
    ]
    take_turns(cases, rounds, STEP_CALLS)
    console.print(table(f"a step of {runs} runs against its matrix products", cases))


def products(runs: int) -> Callable[[], object]:
    """The matrix products of one step: x W^T, g W but for the first layer, g^T x or, where it is faster, x^T g."""
    pairs = []
    for layer, (n_in, n_out) in enumerate(((2, WIDTH), (WIDTH, WIDTH), (WIDTH, 1))):
        x, g = torch.randn(runs, BATCH, n_in), torch.randn(runs, BATCH, n_out)
        weight = torch.randn(runs, n_out, n_in)
        pairs += [(x, weight.mT), (g.mT, x) if n_out <= n_in else (x.mT, g)] + [(g, weight)] * (layer > 0)
    return lambda: [torch.bmm(a, b) for a, b in pairs]


def composition(console: Console, rounds: int) -> None:
    """One job of a sweep composed and recorded in `.hydra/`, by Hydra and by lipexp."""
    with tempfile.TemporaryDirectory(prefix="lipexp-bench-") as folder, hydra_loader(folder) as (loader, master):
        composer = Composer(loader, master)
        numbers = count()

        def overrides(number: int) -> list[str]:
            return ["act=maxmin", f"seed={number}", "optim.lr=0.01"]

        def by_hydra() -> None:
            number = next(numbers)
            loader.load_sweep_config(master, overrides(number))  # its sweeper tries every job first
            config = loader.load_sweep_config(master, overrides(number))
            with open_dict(config):
                config.hydra.job.id = config.hydra.job.num = number
            record = Path(folder) / str(number) / ".hydra"
            own = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
            _save_config(own, "config.yaml", record)
            _save_config(OmegaConf.create({"hydra": config.hydra}), "hydra.yaml", record)
            _save_config(config.hydra.overrides.task, "overrides.yaml", record)

        def by_lipexp() -> None:
            number = next(numbers)
            composer.job(number, overrides(number)).write_hydra_files()

        cases = [Case("Hydra", by_hydra), Case("lipexp", by_lipexp, 1 / 8)]
        take_turns(cases, rounds, calls=1, warm_up=1)
    console.print(table("composition and .hydra/, a job", cases))


@contextmanager
def hydra_loader(folder: str) -> Iterator[tuple[Any, Any]]:
    """Hydra's configuration loader, and the configuration of a sweep into `folder`."""
    register_schemas()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        yield loader, loader.load_configuration("config", [f"hydra.sweep.dir={folder}"], RunMode.MULTIRUN)


def empty_jobs(console: Console, runs: int, settings: Sequence[str] = ()) -> None:
    """A job without a step, from its overrides to its files: what each job beyond the first costs."""
    seconds = []
    with tempfile.TemporaryDirectory(prefix="lipexp-bench-") as folder:
        for jobs in (1, runs):
            seeds = f"seed=range({jobs})"
            before = cpu_seconds()
            command(folder, LIPEXP, "train", "-m", seeds, "steps=0", IN_PROCESSES, *settings)()
            seconds.append(cpu_seconds() - before)
    each = 1000 * (seconds[1] - seconds[0]) / (runs - 1)
    console.print(f"an empty job (steps=0) of {runs}, with all its files: {each:.0f} CPU-ms (≤ {EMPTY_JOB_MS})")


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
