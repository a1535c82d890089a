"""Training any number of runs of one signature as one stack, and writing their folders."""

from __future__ import annotations

import dataclasses
import platform
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

import lipexp
from lipexp.config import one_line
from lipexp.datasets.preprocessing import FILE as PREPROCESSING
from lipexp.evaluate import Evaluation, Evaluator
from lipexp.loop import Checkpoint, Failure, Value, fit
from lipexp.members import Member, stack
from lipexp.process import cpu_threads, holding_interrupts
from lipexp.record import Metrics
from lipexp.runs import NotFinite, RunFolder
from lipexp.screen import Screen
from lipexp.wording import shown_path


class Progress(Protocol):
    """What training reports to a display."""

    def training(self, total: int) -> AbstractContextManager[None]:
        """Shows the progress of `total` steps while the body runs."""

    def tick(self, step: int) -> None:
        """`step` steps are done."""

    def checkpoint(self, step: int, rows: Sequence[Mapping[str, float | None]]) -> None:
        """New lines of history.csv, one per run; empty for a failed one."""

    def stage(self, text: str) -> None:
        """What is done after the last step."""


@dataclass
class Trained:
    """How one run ended: with metrics, or with a failure."""

    metrics: Metrics | None
    failure: Failure | None


def train_many(
    members: Sequence[Member], folders: Sequence[RunFolder], display: Progress, figures: bool = True
) -> list[Trained]:
    """Train runs of one signature as one stack and write each run's folder.

    Args:
        figures: draw each run's picture.

    Returns:
        How each run ended, in order. A run whose numbers stop being finite does not disturb the others.
    """
    started = time.perf_counter()
    config = members[0].config
    device = members[0].device
    history: list[list[Mapping[str, float | None]]] = [[] for _ in members]
    evaluating = 0.0

    def evaluate(checkpoint: Checkpoint) -> list[Value | None]:
        nonlocal evaluating
        before = time.perf_counter()
        rows = evaluator.history(checkpoint)
        for past, row in zip(history, rows, strict=True):
            past += [row] if row else []
        display.checkpoint(checkpoint.step, rows)
        evaluating += time.perf_counter() - before
        return [evaluator.value(row) for row in rows]

    with ExitStack() as held:
        for folder in folders:  # so that others can tell a run that is trained from one that was killed
            with suppress(OSError):  # a file system without locks
                held.enter_context(folder.locked())
        runs = stack(members)  # before threads are limited, since drawing data may load libraries that have some
        held.enter_context(cpu_threads(config.threads))
        evaluator = Evaluator(runs, display.stage)
        with display.training(runs.steps):
            last = fit(runs, evaluate, display.tick, device)
            before = time.perf_counter()
            evaluations = evaluator.final(last)
        evaluating += time.perf_counter() - before
        timing = {
            "train_seconds": time.perf_counter() - started - evaluating,
            "evaluate_seconds": evaluating,
            "runs_in_stack": len(members),
        }
        ended = []
        for run, (member, folder, found) in enumerate(zip(members, folders, evaluations, strict=True)):
            folder.write_rows("history", history[run])
            if found is None:
                failure = last.failures[run]
                folder.write_failure(failure.reason, failure.step)
                ended.append(Trained(None, failure))
                continue
            try:
                ended.append(Trained(_write(member, folder, found, timing, device), None))
            except NotFinite as error:  # such as a loss that overflows for test points only
                folder.write_failure(str(error), runs.steps)
                ended.append(Trained(None, Failure(str(error), runs.steps)))
                continue
            if figures:
                _draw(member, folder, found)
    return ended


def _write(
    member: Member, folder: RunFolder, found: Evaluation, timing: Mapping[str, float], device: str
) -> Metrics:
    """Write the other files of a finished run but its picture, metrics.json last, and return its content."""
    preprocessing, columns = member.parts["dataset"].preprocessing, None
    radii = None if found.robustness is None else found.robustness.columns
    if preprocessing is not None:
        folder.write_json(PREPROCESSING, dataclasses.asdict(preprocessing))
        with holding_interrupts():  # pandas, which only tables need
            from lipexp.prediction import Predictor, in_units
        reaches, columns = in_units(Predictor(found.network, found.certificate, preprocessing), radii)
        radii = radii and {**radii, **reaches}
    folder.write_columns("gradients", found.gradients)
    folder.write_rows("layers", found.layers)
    if radii is not None:
        folder.write_columns("radii", radii)
    metrics = Metrics(
        seed=int(member.config.seed),
        step=found.step,
        train=found.scores["train"],
        val=found.scores["val"],
        test=found.scores["test"],
        gradient_norm=found.gradient_norm,
        lipschitz=found.certificate.interval(found.measured),
        robustness=None if found.robustness is None else found.robustness.summary(member.config.radii),
        monotone=found.monotone,
        columns=columns,
        search=found.search,
        model_sha256=folder.write_model(found.network.state_dict()),
        timing=dict(timing),
        environment=_environment(device, member.config.threads),
    )
    metrics.write(folder)
    return metrics


def _draw(member: Member, folder: RunFolder, found: Evaluation) -> None:
    """Draw figure.png. An error is one line: the results are written, and a picture must not cost them."""
    try:
        with holding_interrupts():
            from lipexp.figures.run import run_figure

        folder.write_figure(run_figure(found, member))
    except Exception as error:
        line = f"lipexp: {shown_path(folder.path / 'figure.png')}: cannot be drawn: {one_line(error)}"
        Screen(stderr=True).show(line)


def _environment(device: str, threads: int) -> dict[str, Any]:
    return {
        "lipexp": lipexp.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": threads,
    }
