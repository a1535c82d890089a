"""What a search leaves behind: the table of the best, importances, a picture, and an experiment to run again."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from lipexp.imports import quick_imports
from lipexp.runs import write_file
from lipexp.sweep.search.space import Axis, Space
from lipexp.wording import shown_path

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

BEST = 5  # rows of the table


def ranked(study: Study) -> list[FrozenTrial]:
    """The trials that have a value, best first, the earlier one of equals first."""
    from optuna.study import StudyDirection

    sign = -1 if study.direction == StudyDirection.MAXIMIZE else 1
    done = [trial for trial in study.trials if trial.value is not None]
    return sorted(done, key=lambda trial: (sign * float(trial.value or 0), trial.number))


def best_line(study: Study, metric: str) -> str:
    """`best test.accuracy 0.995 (trial 17)`."""
    best = ranked(study)
    return f"best {metric} {best[0].value:.6g} (trial {best[0].number})" if best else "none has a value"


def importances(study: Study) -> dict[str, float]:
    """The share of each axis in the variance of the values (fANOVA), largest first; empty where there is none.

    Reference: Hutter, Hoos and Leyton-Brown 2014, "An efficient approach for assessing hyperparameter importance".
    """
    with quick_imports():
        from optuna.exceptions import ExperimentalWarning
        from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    values = {trial.value for trial in study.trials if trial.value is not None}
    if len(values) < 2:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        found = get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0))
    return {name: float(value) for name, value in found.items()}


def show(console: Console, study: Study, space: Space, metric: str, files: Sequence[Path]) -> None:
    """Print the best trials, the importances, and where everything lies."""
    table = Table(show_edge=False, box=None, pad_edge=False, header_style="bold")
    for name in ("trial", metric, *(axis.key for axis in space.axes)):
        table.add_column(name, justify="right", min_width=len(name))
    for trial in ranked(study)[:BEST]:
        settings = (_shown(axis, trial.params[axis.key]) for axis in space.axes)
        table.add_row(str(trial.number), f"{trial.value:.6g}", *settings)
    console.print(table, soft_wrap=True)
    shares = importances(study)
    if shares:
        console.print(
            "importance: " + "  ".join(f"{key} {share:.2f}" for key, share in shares.items()), soft_wrap=True
        )
    failed = sum(trial.value is None for trial in study.trials)
    if failed:
        console.print(f"{failed} of {len(study.trials)} trials have no value; sweep.csv says why")
    for file in files:
        console.print(shown_path(file), soft_wrap=True)


def _shown(axis: Axis, value: Any) -> str:
    return str(value) if axis.values or axis.whole else f"{value:.4g}"


def write_best(folder: Path, study: Study, space: Space, metric: str, is_group: Callable[[str], bool]) -> Path:
    """experiment/best.yaml, the best trial as an experiment; returns the file.

    Args:
        is_group: whether a key is that of a configuration group.
    """
    best = ranked(study)[0]
    values = {axis.key: axis.spell(best.params[axis.key]) for axis in space.axes}
    pairs = [(key.lstrip("+"), value) for key, _, value in (line.partition("=") for line in space.settings)]
    pairs += [(key.lstrip("+"), value) for key, value in values.items()]
    defaults: list[Any] = [value for key, value in pairs if key == "experiment"]
    defaults += [{f"override /{key}": value} for key, value in pairs if is_group(key) and key != "experiment"]
    content = OmegaConf.create({})
    for key, value in pairs:
        if not is_group(key):
            OmegaConf.update(content, key, OmegaConf.from_dotlist([f"x={value}"]).x)
    text = OmegaConf.to_yaml(OmegaConf.create({"defaults": [*defaults, "_self_"]}))
    text += OmegaConf.to_yaml(content) if content else ""
    head = (
        "# @package _global_\n"
        f"# lipexp train -cd {os.path.relpath(folder)} experiment=best\n"
        f"# The best of {len(study.trials)} trials: {metric} {best.value:.6g}"
        f"{f', the mean of {len(space.seeds)} seeds' if len(space.seeds) > 1 else ''}.\n"
    )
    file = folder / "experiment" / "best.yaml"
    file.parent.mkdir(exist_ok=True)
    write_file(file, lambda path: path.write_text(head + text))
    return file


def write_picture(folder: Path, study: Study, space: Space, metric: str) -> Path:
    """search.png: the values in the order of the trials, and along each axis; returns the file."""
    with quick_imports():
        from optuna.study import StudyDirection

        from lipexp.figures.style import BLUE, GREY, ORANGE, look, panels

    trials = [trial for trial in study.trials if trial.value is not None]
    values = np.array([float(trial.value or 0) for trial in trials])
    numbers = np.array([trial.number for trial in trials])
    better = np.maximum if study.direction == StudyDirection.MAXIMIZE else np.minimum
    best = ranked(study)[0]
    columns = min(3, 1 + len(space.axes))
    rows = -(-(1 + len(space.axes)) // columns)
    with look():
        figure, axes = panels(2.4 * columns, 2.0 * rows, rows, columns, sharey=True)
        best_so_far = better.accumulate(values)
        axes[0].step(numbers, best_so_far, where="post", color=ORANGE, label="best so far", zorder=1)
        axes[0].scatter(numbers, values, s=8, color=BLUE, linewidth=0, alpha=0.7, label="trial")
        axes[0].set_xlabel("trial")
        axes[0].legend(loc="best")
        for axis, ax in zip(space.axes, axes[1:], strict=False):
            _along(ax, axis, [trial.params[axis.key] for trial in trials], values, BLUE)
            at = best.params[axis.key]
            place = axis.values.index(at) if axis.values else at
            ax.scatter([place], [float(best.value or 0)], s=28, facecolor="none", edgecolor=ORANGE, zorder=3)
        for ax in axes[1 + len(space.axes) :]:
            ax.set_visible(False)
        for ax in axes[::columns]:
            ax.set_ylabel(metric.partition(".")[2] or metric)
        for ax in axes:
            ax.grid(axis="y", color=GREY, alpha=0.2, linewidth=0.5)
        file = folder / "search.png"
        write_file(file, lambda path: figure.savefig(path, format="png"))
    return file


def _along(ax: Any, axis: Axis, settings: Sequence[Any], values: np.ndarray[Any, Any], colour: str) -> None:
    """The values against one axis; names stand side by side, their trials a little apart."""
    ax.set_xlabel(axis.key)
    if not axis.values:
        ax.scatter(settings, values, s=8, color=colour, linewidth=0, alpha=0.7)
        if axis.log:
            ax.set_xscale("log")
        return
    places = np.array([axis.values.index(setting) for setting in settings])
    spread = np.random.default_rng(0).uniform(-0.18, 0.18, len(places))
    ax.scatter(places + spread, values, s=8, color=colour, linewidth=0, alpha=0.7)
    names = [name if len(name) <= 12 else f"{name[:11]}…" for name in axis.values]
    ax.set_xticks(range(len(names)), names, rotation=20 if sum(map(len, names)) > 24 else 0)
    ax.set_xlim(-0.5, len(names) - 0.5)
