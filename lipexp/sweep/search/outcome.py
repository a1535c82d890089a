"""What a search leaves behind: a table of the best trials, importances, a picture, and the best experiment."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from rich.table import Table

from lipexp.process import holding_interrupts
from lipexp.runs import write_file
from lipexp.screen import Screen
from lipexp.sweep.compose import Composer
from lipexp.sweep.search.options import WARNING, is_of_test
from lipexp.sweep.search.space import Space
from lipexp.wording import count, shown_path

SHOWN = 5  # trials in the table


def ranked(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """The trials that have a value, best first, and the earlier one of equals first."""
    done = [trial for trial in study.trials if trial.value is not None]
    maximize = study.direction == optuna.study.StudyDirection.MAXIMIZE
    return sorted(done, key=lambda trial: float(trial.value or 0), reverse=maximize)


def show(folder: Path, study: optuna.Study, space: Space, metric: str) -> None:
    """Print the best trials, the share of each axis in the variance of the values (fANOVA), and the files."""
    table = Table(show_edge=False, box=None, pad_edge=False, header_style="bold")
    for name in ("trial", metric, *space.axes):
        table.add_column(name.replace(".", ".\n", 1), justify="right", vertical="bottom", no_wrap=True)
    best = ranked(study)
    for trial in best[:SHOWN]:
        settings = map(trial.params.get, space.axes)
        cells = (f"{setting:.4g}" if isinstance(setting, float) else str(setting) for setting in settings)
        table.add_row(str(trial.number), f"{trial.value:.6g}", *cells)
    screen = Screen()
    if len(best) > SHOWN:
        screen.show(f"the best {SHOWN} of {count(len(best), 'trial')}:")
    screen.show(table)
    if best[0].value != best[-1].value:
        with screen.waiting("the importance of each axis"):
            evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
            shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
        screen.show("importance: " + "  ".join(f"{key} {share:.2f}" for key, share in shares.items()))
    if is_of_test(metric):
        screen.show(f"{metric}: {WARNING}")
    if failed := len(study.trials) - len(best):
        screen.show(f"{failed} of {len(study.trials)} trials have no value; sweep.csv says why")
    for name in ("experiment/best.yaml", "search.png", "sweep.csv"):
        screen.show(shown_path(folder / name))


def write_best(folder: Path, study: optuna.Study, space: Space, metric: str, composer: Composer) -> None:
    """experiment/best.yaml: the best trial as an experiment."""
    best = ranked(study)[0]
    lines = space.jobs(best.params)[0]
    defaults: list[Any] = ["_self_"]
    content = OmegaConf.create({"defaults": []})
    for override in OverridesParser.create().parse_overrides(lines[:-1] if space.seeds else lines):
        key, value = override.key_or_group, override.value()
        if key == "experiment":
            defaults[:0] = value if isinstance(value, list) else [value]
        elif composer.is_group(key) and not isinstance(value, dict):
            defaults.insert(-1, {f"{'' if override.is_add() else 'override '}/{key}": value})
        else:
            OmegaConf.update(content, key, value)
    content.defaults = defaults
    seeds = f", the mean of {len(space.seeds)} seeds" if len(space.seeds) > 1 else ""
    seeds += f" ({WARNING})" if is_of_test(metric) else ""
    text = (
        "# @package _global_\n"
        f"# lipexp train -cd {shlex.quote(shown_path(folder))} experiment=best\n"
        f"# The best of {len(study.trials)} trials: {metric} {best.value:.6g}{seeds}.\n"
    )
    file = folder / "experiment" / "best.yaml"
    file.parent.mkdir(exist_ok=True)
    write_file(file, lambda path: path.write_text(text + OmegaConf.to_yaml(content)))


def write_picture(folder: Path, study: optuna.Study, space: Space, metric: str) -> None:
    """search.png: the values in the order of the trials and along each axis, with a ring around the best one."""
    with holding_interrupts():
        from matplotlib.figure import Figure

        from lipexp.figures.style import BLUE, DPI, GREY, ORANGE, PAGE, look

    trials = ranked(study)
    numbers, values = np.array([(trial.number, trial.value) for trial in trials]).T
    better = np.maximum if values[0] > values[-1] else np.minimum
    # Two or three panels fill each row.
    rows = np.array_split(["", *space.axes], -(-(1 + len(space.axes)) // 3))
    with look():
        figure = Figure(figsize=(PAGE, 2 * len(rows)), dpi=DPI)
        panels = figure.subplot_mosaic([list(np.repeat(row, 6 // len(row))) for row in rows], sharey=True)
        so_far = better.accumulate(values[np.argsort(numbers)])
        panels[""].step(np.sort(numbers), so_far, where="post", color=ORANGE, label="best so far", zorder=1)
        for key, ax in panels.items():
            places: Any = [trial.params[key] for trial in trials] if key else numbers
            choices = getattr(space.axes.get(key), "choices", ())
            if choices:  # trials of one category stand a little apart
                spread = np.random.default_rng(0).uniform(-0.18, 0.18, len(trials))
                places = [choices.index(place) for place in places] + spread
                names = [f"{name:.12}" for name in choices]
                ax.set(xticks=range(len(names)), xticklabels=names, xlim=(-0.5, len(names) - 0.5))
                ax.tick_params("x", rotation=20 if len("".join(names)) > 24 else 0)
            elif getattr(space.axes.get(key), "log", False):
                ax.set_xscale("log")
            elif not isinstance(space.axes.get(key), optuna.distributions.FloatDistribution):
                ax.locator_params(axis="x", integer=True)
            ax.scatter(places, values, s=8, color=BLUE, linewidth=0, alpha=0.7, label="trial")
            ax.scatter(places[:1], values[:1], s=28, facecolor="none", edgecolor=ORANGE, zorder=3)
            ax.set_xlabel(key or "trial")
            ax.grid(axis="y", color=GREY, alpha=0.2, linewidth=0.5)
        figure.supylabel(metric, fontsize="medium")
        if is_of_test(metric):
            figure.suptitle(WARNING, fontsize="small")
        panels[""].legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
        write_file(folder / "search.png", lambda path: figure.savefig(path, format="png"))
