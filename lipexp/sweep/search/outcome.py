"""What a search leaves behind: a table of the best trials, importances, a picture, and the best experiment."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from hydra.core.override_parser.overrides_parser import OverridesParser
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from lipexp.figures.style import BLUE, DPI, GREY, ORANGE, PAGE, look
from lipexp.runs import write_file
from lipexp.sweep.search.space import Space
from lipexp.wording import shown_path

BEST = 5  # rows of the table


def ranked(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """The trials that have a value, best first, and the earlier one of equals first."""
    done = [trial for trial in study.trials if trial.value is not None]
    maximize = study.direction == optuna.study.StudyDirection.MAXIMIZE
    return sorted(done, key=lambda trial: float(trial.value or 0), reverse=maximize)


def importances(study: optuna.Study) -> dict[str, float]:
    """The share of each axis in the variance of the values (fANOVA), largest first; empty if all values are equal.

    Reference: Hutter, Hoos and Leyton-Brown 2014, "An efficient approach for assessing hyperparameter importance".
    """
    if len({trial.value for trial in ranked(study)}) < 2:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        return optuna.importance.get_param_importances(study, evaluator=evaluator)


def show(console: Console, study: optuna.Study, space: Space, metric: str) -> None:
    """Print the best trials and the importances."""
    table = Table(show_edge=False, box=None, pad_edge=False, header_style="bold")
    for name in ("trial", metric, *space.axes):
        table.add_column(name.replace(".", ".\n", 1), justify="right", vertical="bottom")
    for trial in ranked(study)[:BEST]:
        values = (trial.params[key] for key in space.axes)
        shown = (f"{value:.4g}" if isinstance(value, float) else str(value) for value in values)
        table.add_row(str(trial.number), f"{trial.value:.6g}", *shown)
    console.print(table, soft_wrap=True)
    shares = [f"{key} {share:.2f}" for key, share in importances(study).items()]
    if shares:
        console.print("importance:", "  ".join(shares), soft_wrap=True)
    failed = sum(trial.value is None for trial in study.trials)
    if failed:
        console.print(f"{failed} of {len(study.trials)} trials have no value; sweep.csv says why")


def write_best(
    folder: Path, study: optuna.Study, space: Space, metric: str, is_group: Callable[[str], bool]
) -> Path:
    """experiment/best.yaml, the best trial as an experiment; returns the file.

    Args:
        is_group: whether a key is that of a configuration group.
    """
    best = ranked(study)[0]
    lines = space.jobs(best.params)[0]
    defaults: list[Any] = ["_self_"]
    content = OmegaConf.create({})
    for override in OverridesParser.create().parse_overrides(lines[:-1] if space.seeds else lines):
        key, value = override.key_or_group, override.value()
        if key == "experiment":
            defaults[:0] = value if isinstance(value, list) else [value]
        elif is_group(key) and not isinstance(value, dict):
            defaults.insert(-1, {f"{'' if override.is_add() else 'override '}/{key}": value})
        else:
            OmegaConf.update(content, key, value)
    seeds = f", the mean of {len(space.seeds)} seeds" if len(space.seeds) > 1 else ""
    text = (
        "# @package _global_\n"
        f"# lipexp train -cd {os.path.relpath(folder)} experiment=best\n"
        f"# The best of {len(study.trials)} trials: {metric} {best.value:.6g}{seeds}.\n"
    )
    parts = [OmegaConf.create({"defaults": defaults}), *[content] * bool(content)]
    text += "".join(map(OmegaConf.to_yaml, parts))
    file = folder / "experiment" / "best.yaml"
    file.parent.mkdir(exist_ok=True)
    write_file(file, lambda path: path.write_text(text))
    return file


def write_picture(folder: Path, study: optuna.Study, space: Space, metric: str) -> Path:
    """search.png: the values in the order of the trials and along each axis, with a ring around the best one."""
    trials = ranked(study)
    values = np.array([float(trial.value or 0) for trial in trials])
    numbers = np.array([trial.number for trial in trials])
    better = np.maximum if values[0] >= values[-1] else np.minimum
    spread = np.random.default_rng(0).uniform(-0.18, 0.18, len(trials))  # sets trials of one category apart
    # Two or three panels fill each row.
    rows = np.array_split(["", *space.axes], -(-(1 + len(space.axes)) // 3))
    with look():
        figure = Figure(figsize=(PAGE, 2 * len(rows)), dpi=DPI)
        panels = figure.subplot_mosaic([list(np.repeat(row, 6 // len(row))) for row in rows], sharey=True)
        so_far = better.accumulate(values[np.argsort(numbers)])
        panels[""].step(np.sort(numbers), so_far, where="post", color=ORANGE, label="best so far", zorder=1)
        for key, ax in panels.items():
            places = np.array([trial.params[key] for trial in trials]) if key else numbers
            choices = getattr(space.axes.get(key), "choices", ())
            if choices:
                places = np.array([choices.index(choice) for choice in places]) + spread
                names = [name if len(name) <= 12 else f"{name[:11]}…" for name in choices]
                ax.set_xticks(range(len(names)), names, rotation=20 if sum(map(len, names)) > 24 else 0)
                ax.set_xlim(-0.5, len(names) - 0.5)
            elif getattr(space.axes.get(key), "log", False):
                ax.set_xscale("log")
            ax.scatter(places, values, s=8, color=BLUE, linewidth=0, alpha=0.7, label="trial")
            ax.scatter(places[:1], values[:1], s=28, facecolor="none", edgecolor=ORANGE, zorder=3)
            ax.set_xlabel(key or "trial")
            ax.grid(axis="y", color=GREY, alpha=0.2, linewidth=0.5)
        for row in rows:
            panels[row[0]].set_ylabel(metric.partition(".")[2])
        panels[""].legend()
        file = folder / "search.png"
        write_file(file, lambda path: figure.savefig(path, format="png"))
    return file
