"""Configurations -> objects -> training -> run folders.

`build` checks one configuration and makes its objects; `train_many` trains any number of runs of one signature
as one stack, of which a single run is a case, and writes their folders.
"""

from __future__ import annotations

import dataclasses
import platform
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from omegaconf import MISSING, DictConfig

import lipexp
from lipexp.activations import Activation
from lipexp.config import (
    GROUPS,
    ConfigError,
    Settings,
    instantiate,
    lipschitz_constant,
    number,
    one_of,
    plain,
    whole,
)
from lipexp.constraints import in_usual_order
from lipexp.evaluate import Evaluator, Record
from lipexp.imports import quick_imports
from lipexp.loop import Checkpoint, Failure, Stack, Streams, fit
from lipexp.losses import Loss
from lipexp.models import run_layers, state_dict
from lipexp.runs import RunFolder
from lipexp.threads import cpu_threads

SETTINGS = tuple(field.name for field in dataclasses.fields(Settings))

# What the object of a group must have, whoever wrote its class.
NEEDED = {
    "dataset": ("task", "n_inputs", "n_train", "draw"),
    "act": ("__call__",),
    "constraint": ("p", "q", "hidden_p", "lipschitz", "norms", "check", "start", "apply", "bake"),
    "loss": ("__call__",),
    "model": ("shapes", "initial"),
    "optim": ("start", "step"),
}


@dataclass
class Member:
    """One run before training: its settings, its objects, and what names them on the command line."""

    config: Settings
    names: dict[str, str]  # group -> the option chosen
    parts: dict[str, Any]  # group -> object

    @property
    def seed(self) -> int:
        return int(self.config.seed)


@dataclass
class Outcome:
    """How one run ended: with a record, or with a failure."""

    metrics: dict[str, Any] | None
    failure: Failure | None


def build(content: DictConfig | Mapping[str, Any], choices: Mapping[str, Any] = {}, here: bool = True) -> Member:
    """Check one configuration and instantiate it.

    Args:
        content: the composed configuration, without Hydra's own node.
        choices: the option chosen in each group, for messages.
        here: it will be trained on this machine, which must have its device.

    Raises:
        ConfigError: whatever is wrong with it, by the name that the command line uses.
    """
    config = _settings(plain(content))
    if here and config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device", "cuda", "no CUDA device is available here (auto, cpu)")
    nodes = {group: getattr(config, group) for group in GROUPS}
    names = {
        group: str(choices.get(group) or str(plain(node).get("_target_", "")).rpartition(".")[2])
        for group, node in nodes.items()
    }
    parts = {group: instantiate(node, group) for group, node in nodes.items()}
    for group, needed in NEEDED.items():
        lacking = [name for name in needed if not hasattr(parts[group], name)]
        if lacking:
            raise ConfigError(group, names[group], f"cannot be used as {group}: it has no {', '.join(lacking)}")
    dataset, loss, constraint, act = (parts[group] for group in ("dataset", "loss", "constraint", "act"))
    if config.batch_size > dataset.n_train:
        raise ConfigError("batch_size", config.batch_size, f"must be at most dataset.n_train={dataset.n_train}")
    if getattr(loss, "task", dataset.task) != dataset.task:  # a user's loss need not say
        raise ConfigError(
            "loss",
            names["loss"],
            f"is for {loss.task}, but dataset={names['dataset']} is {dataset.task} ({_losses_for(dataset.task)})",
        )
    if getattr(dataset, "p", constraint.p) != constraint.p:
        moving = f"must be the norm that constraint={names['constraint']} is for, p={constraint.p:g}"
        raise ConfigError("dataset.p", f"{dataset.p:g}", moving)
    if isinstance(act, Activation):
        act.check_width(parts["model"].width)
    constraint.check(act, names["act"])
    return Member(config, names, parts)


def _losses_for(task: str) -> str:
    return ", ".join(cls.__name__.lower() for cls in Loss.__subclasses__() if cls.task == task)


def _settings(content: Mapping[str, Any]) -> Settings:
    for key in SETTINGS:
        if content.get(key) in (None, MISSING):
            raise ConfigError(key, "null", "must be set")
    config = Settings(**{key: content[key] for key in SETTINGS})
    whole("seed", config.seed, least=0)
    lipschitz_constant("lipschitz", config.lipschitz)
    for key, least in (("steps", 0), ("batch_size", 1), ("eval_every", 0), ("threads", 1), ("max_regions", 0)):
        whole(key, content[key], least=least)
    for radius in config.radii:
        number("radii", radius, above=0)
    one_of("device", config.device, ["auto", "cpu", "cuda"])
    return config


def signature(member: Member) -> str:
    """What runs of one stack must share: every argument but those that a class accepts as a (K,) tensor."""
    shared: dict[str, Any] = {
        key: getattr(member.config, key) for key in SETTINGS if key not in (*GROUPS, "seed", "lipschitz", "resume")
    }
    for group in GROUPS:
        per_run = _per_run(group, member.parts[group])
        shared[group] = {k: v for k, v in getattr(member.config, group).items() if k not in per_run}
    return repr(sorted(shared.items()))


def _per_run(group: str, part: Any) -> tuple[str, ...]:
    """The arguments that the class of `part` accepts as a (K,) tensor, one value a run.

    None for an activation: networks are also evaluated one at a time, which must not change what it does.
    """
    return () if group == "act" else tuple(getattr(type(part), "per_run", ()))


def run_bytes(member: Member) -> int:
    """About how much memory one run of a stack takes: what grows with the number of runs, at its largest.

    In training: the batch at each layer, eight times, and the parameters, twelve times, in float32. In evaluation:
    the points, their targets, values, gradients and norms in float64, as numbers and as the text of gradients.csv.
    The factors were fitted to the peak of sweeps of 32 to 128 runs.
    """
    dataset = member.parts["dataset"]
    shapes = member.parts["model"].shapes(dataset.n_inputs)
    features = sum(n_out for n_out, _ in shapes)
    parameters = sum(n_out * (n_in + 1) for n_out, n_in in shapes)
    points = (dataset.n_train + dataset.n_test) * (8 * dataset.n_inputs + 40)
    return 4 * (8 * member.config.batch_size * features + 12 * parameters) + 8 * points


def cached_runs(member: Member) -> int:
    """How many runs a stack should have on a CPU, so that the batches of features of a layer stay in its caches.

    1 MiB of them, about the second-level cache of a core: what an operation leaves there the next one finds there.
    Fewer than four runs would not share enough of what a step costs for itself.
    """
    model, dataset = member.parts["model"], member.parts["dataset"]
    widest = max(n_out for n_out, _ in model.shapes(dataset.n_inputs))
    return max(4, 2**20 // (4 * member.config.batch_size * widest))


def stack(members: Sequence[Member]) -> Stack:
    """One stack of runs that share their signature.

    Raises:
        ValueError: they do not.
    """
    first = members[0]
    if len({signature(member) for member in members}) > 1:
        raise ValueError("runs of different signatures cannot be trained as one stack")
    config = first.config
    streams = [Streams.of(member.seed) for member in members]
    return Stack(
        **{group: _stacked(group, members) for group in ("model", "act", "constraint", "loss", "optim")},
        task=first.parts["dataset"].task,
        data=[m.parts["dataset"].draw(s.data) for m, s in zip(members, streams, strict=True)],
        streams=streams,
        steps=config.steps,
        batch_size=config.batch_size,
        eval_every=config.eval_every,
        max_regions=config.max_regions,
    )


def _stacked(group: str, members: Sequence[Member]) -> Any:
    """The object of `group` for all members: what may differ between them becomes a (K,) tensor."""
    one = members[0].parts[group]
    per_run = _per_run(group, one)
    if not per_run:
        return one
    arguments = {k: v for k, v in getattr(members[0].config, group).items() if k not in {"_target_", *per_run}}
    columns = {
        name: torch.tensor([getattr(member.parts[group], name) for member in members], dtype=torch.float64)
        for name in per_run
    }
    return type(one)(**arguments, **columns)


class Progress(Protocol):
    """What training tells a display."""

    def training(self, total: int) -> AbstractContextManager[None]:
        """Shows the progress of `total` steps while the body runs."""

    def tick(self, step: int) -> None:
        """`step` steps are done."""

    def checkpoint(self, step: int, rows: Sequence[Mapping[str, float | None]]) -> None:
        """New lines of history.csv, one a run; empty for a failed one."""


def train_many(
    members: Sequence[Member], folders: Sequence[RunFolder], display: Progress, figures: bool = True
) -> list[Outcome]:
    """Train runs of one signature as one stack and write each run's folder.

    Args:
        figures: draw each run's picture.

    Returns:
        One outcome a run, in order. A run that fails does not disturb the others.
    """
    started = time.perf_counter()
    runs = stack(members)  # before threads are counted: drawing data may load libraries that have some
    with cpu_threads(members[0].config.threads):
        return _train(runs, started, members, folders, display, figures)


def _train(
    runs: Stack,
    started: float,
    members: Sequence[Member],
    folders: Sequence[RunFolder],
    display: Progress,
    figures: bool,
) -> list[Outcome]:
    config = members[0].config
    device = "cuda" if config.device == "auto" and torch.cuda.is_available() else config.device
    device = "cpu" if device == "auto" else device
    evaluator = Evaluator(runs)
    history: list[list[dict[str, float | None]]] = [[] for _ in members]
    evaluating = 0.0

    def evaluate(checkpoint: Checkpoint) -> None:
        nonlocal evaluating
        before = time.perf_counter()
        rows = evaluator.history(checkpoint)
        for past, row in zip(history, rows, strict=True):
            if row:
                past.append(row)
        display.checkpoint(checkpoint.step, rows)
        evaluating += time.perf_counter() - before

    with display.training(runs.steps):
        last = fit(runs, evaluate, display.tick, device)
    before = time.perf_counter()
    records = evaluator.final(last)
    evaluating += time.perf_counter() - before
    timing = {
        "train_seconds": time.perf_counter() - started - evaluating,
        "evaluate_seconds": evaluating,
        "runs_in_stack": len(members),
    }
    outcomes = []
    for run, (member, folder, record) in enumerate(zip(members, folders, records, strict=True)):
        if record is None:
            failure = last.failures[run]
            folder.write_rows("history", history[run])
            folder.write_failure(failure.reason, failure.step)
            outcomes.append(Outcome(None, failure))
            continue
        metrics = _write(member, folder, record, last, run, history[run], timing, device, figures)
        outcomes.append(Outcome(metrics, None))
    return outcomes


def _write(
    member: Member,
    folder: RunFolder,
    record: Record,
    checkpoint: Checkpoint,
    run: int,
    history: Sequence[Mapping[str, Any]],
    timing: Mapping[str, float],
    device: str,
    figures: bool,
) -> dict[str, Any]:
    """Write all files of a finished run, metrics.json last, and return its content."""
    folder.write_rows("history", history)
    folder.write_columns("gradients", record.gradients)
    folder.write_rows("layers", record.layers)
    robustness = record.robustness
    if robustness is not None and robustness.columns is not None:
        folder.write_columns("radii", robustness.columns)
    layers = in_usual_order(run_layers(checkpoint.layers, run), checkpoint.act)
    digest = folder.write_model(state_dict(layers, run=0))
    metrics = {
        "seed": member.seed,
        "train": record.train,
        "test": record.test,
        "gradient_norm": record.gradient_norm,
        "lipschitz": record.certificate.interval(record.measured),
        "robustness": None if robustness is None else robustness.summary(member.config.radii),
        "search": record.search,
        "model_sha256": digest,
        "timing": dict(timing),
        "environment": {
            "lipexp": lipexp.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
            "threads": member.config.threads,
        },
    }
    if figures:
        with quick_imports():
            from lipexp.figures.run import run_figure

        figure = run_figure(checkpoint.layers, checkpoint.act, run, record, member.names)
        if figure is not None:
            folder.write_figure(figure)
    folder.write_metrics(metrics)
    return metrics
