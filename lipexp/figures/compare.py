"""Every constraint with every activation that it takes, on five problems, on equal terms.

Equal are the width, the depth, the optimiser, its learning rate, the steps and the seeds; the learning rate is not
tuned for any of them. What is compared are test points; which activation stands for a constraint in the short
table is chosen on validation.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from rich.table import Table
from torch import nn

from lipexp.bench.steps import composed, mlp, torch_step
from lipexp.bench.timing import Case, quartiles, take_turns
from lipexp.figures.claims import Verdict, verdict
from lipexp.figures.story import Runs, Story, Summary
from lipexp.figures.style import BLACK, BLUE, GREEN, GREY, ORANGE, PAGE, panels
from lipexp.loop import Trainer
from lipexp.members import build, stack
from lipexp.process import cpu_threads
from lipexp.screen import Wide


@dataclass(frozen=True)
class Problem:
    """One experiment, and what is compared of its runs: `measure`, on validation and on test points."""

    experiment: str
    name: str
    measure: str  # a key of metrics.json, with SPLIT for the part of the data
    unit: str
    larger_is_better: bool
    ticks: tuple[float, ...] = ()  # of an axis that is logarithmic

    @property
    def val(self) -> str:
        """The column of its means on validation."""
        return f"{self.name}, val"

    @property
    def test(self) -> str:
        """That of its means on test points."""
        return f"{self.name}, test"

    @property
    def error(self) -> str:
        """That of their standard errors."""
        return f"{self.name}, error"

    def of(self, runs: pd.DataFrame, split: str) -> pd.Series:
        """The measure of each run; a score is divided by the constant that is proven of the run."""
        values = runs[self.measure.replace("SPLIT", split)].astype(float)
        return values / runs["lipschitz.certified"].astype(float) if self.measure.endswith("score") else values


PROBLEMS = (
    Problem("compare_two_moons", "two moons", "robustness.SPLIT.certified_accuracy.0.4", "certified at 0.4", True),
    Problem("compare_cones", "three cones", "SPLIT.score", "share of optimum", True),
    Problem("compare_n_shape", "n-shape", "SPLIT.mse", "mse", False, (1e-2, 1e-4, 1e-6)),
    Problem("compare_flower", "flower", "SPLIT.loss", "|f − y| / L", False, (0.2, 0.1, 0.05, 0.02)),
    Problem("compare_digits", "digits", "robustness.SPLIT.certified_accuracy.0.25", "certified at 0.25", True),
)
PAIR = ["constraint", "act"]
KEEPING = ("groupsort", "fullsort", "abs", "householder", "n_activation", "lipschitz_spline")
SMOOTH = ("tanh", "sigmoid", "softplus", "elu")
KINDS = {
    "can keep the gradient norm": BLUE,
    "monotone, piecewise linear": ORANGE,
    "smooth": GREEN,
    "identity": GREY,
}
DOT: dict[str, Any] = {"alpha": 0.7, "markersize": 3.5}
ROUNDS, CALLS = 7, 5


def kind(act: str) -> str:
    """The legend's word for an activation."""
    names = list(KINDS)
    return (
        names[0] if act in KEEPING else names[2] if act in SMOOTH else names[3] if act == "identity" else names[1]
    )


def folded(runs: Runs) -> pd.DataFrame:
    """One row for each pair: of each problem the mean over seeds on val and test, and its standard error on test.

    Beside them the medians, over problems and seeds, of `tightness`, measured / certified, and of `gradient`, the
    median gradient norm over the certified bound; and `bounded`, whether L was kept.
    """
    parts = {}
    for problem in PROBLEMS:
        own = runs[problem.experiment]
        pair = [own[key] for key in PAIR]
        parts[problem.val] = problem.of(own, "val").groupby(pair).mean()
        parts[problem.test] = problem.of(own, "test").groupby(pair).mean()
        parts[problem.error] = problem.of(own, "test").groupby(pair).sem()
    every = pd.concat([runs[problem.experiment] for problem in PROBLEMS])
    certified = every["lipschitz.certified"].astype(float)
    for name, key in (("tightness", "lipschitz.measured"), ("gradient", "gradient_norm.median")):
        parts[name] = (every[key].astype(float) / certified).groupby([every[key] for key in PAIR]).median()
    parts["bounded"] = every["lipschitz.target"].notna().groupby([every[key] for key in PAIR]).all()
    return pd.DataFrame(parts)


def best(rows: pd.DataFrame, problem: Problem) -> pd.DataFrame:
    """The row of each constraint that is best on validation."""
    values = rows[problem.val].fillna(-np.inf if problem.larger_is_better else np.inf)
    groups = values.groupby(level="constraint")
    return rows.loc[groups.idxmax() if problem.larger_is_better else groups.idxmin()]


@functools.cache
def step_times(pairs: tuple[tuple[str, str], ...]) -> pd.Series:
    """The CPU time of a train step of each pair, over that of a plain torch network with ReLU and Adam.

    One run on two moons, in a network of the benchmark's shape: the median over rounds in which all take turns.
    """
    stacks = {pair: stack([build(composed(f"constraint={pair[0]}", f"act={pair[1]}"))]) for pair in pairs}
    with cpu_threads(1):
        plain = Case("plain", torch_step(mlp(nn.Linear, nn.ReLU), next(iter(stacks.values()))))
        cases = {pair: Case(" ".join(pair), Trainer(runs).step) for pair, runs in stacks.items()}
        take_turns([plain, *cases.values()], ROUNDS, CALLS)
    ratios = {
        pair: quartiles([own / of_plain for own, of_plain in zip(case.cpu, plain.cpu, strict=True)])[1]
        for pair, case in cases.items()
    }
    return pd.Series(ratios)


def keeps_bound(rows: pd.DataFrame) -> pd.Series:
    """Whether each constraint has kept L."""
    return rows["bounded"].groupby(level="constraint").all()


def ranked(rows: pd.DataFrame) -> list[str]:
    """The constraints by their mean rank over the problems, each by its best activation; the best first.

    Those that keep no bound follow the others.
    """
    ranks, bounded = [], keeps_bound(rows)
    for problem in PROBLEMS:
        values = best(rows, problem)[problem.test].droplevel("act")
        ranks.append(values.rank(ascending=not problem.larger_is_better))
    mean = pd.concat(ranks, axis=1).mean(axis=1)
    return [*mean[bounded].sort_values(kind="stable").index, *mean[~bounded].sort_values(kind="stable").index]


def draw(runs: Runs) -> Figure:
    """A dot for each activation under each constraint, the mean over the seeds; better is further to the right.

    Below the line stand constraints that keep no bound.
    """
    rows = folded(runs)
    order = ranked(rows)[::-1]
    pairs: list[tuple[str, str]] = [*rows.index]
    times = step_times(tuple(pairs))
    figure, axes = panels(1.5 * PAGE, 0.9 + 0.19 * len(order), columns=len(PROBLEMS) + 1, sharey=True)
    for ax, problem in zip(axes, PROBLEMS, strict=False):
        values = rows[problem.test]
        for constraint, act in pairs:
            ax.plot(values[constraint, act], order.index(constraint), "o", color=KINDS[kind(act)], **DOT)
        ax.set(title=problem.name, xlabel=problem.unit)
        if problem.ticks:
            ax.set_xscale("log")
            ax.set_xticks(problem.ticks, [f"{tick:g}" for tick in problem.ticks])
            ax.set_xticks([], minor=True)
            ax.invert_xaxis()
    last = axes[-1]
    for constraint, act in pairs:
        last.plot(times[constraint, act], order.index(constraint), "o", color=KINDS[kind(act)], **DOT)
    last.set(title="step time", xlabel="plain network = 1", xlim=(0, None))
    axes[0].set_yticks(range(len(order)), order)
    axes[0].set_ylim(-0.7, len(order) - 0.3)
    n_unbounded = int((~keeps_bound(rows)).sum())
    for ax in axes:
        ax.axhline(n_unbounded - 0.5, color=BLACK, linewidth=0.7)
        ax.grid(axis="y", color=GREY, alpha=0.25, linewidth=0.5)
    marks = [Line2D([], [], marker="o", linestyle="", color=colour, label=name) for name, colour in KINDS.items()]
    figure.legend(handles=marks, loc="outside lower center", ncols=len(KINDS), fontsize=7.5)
    return figure


def long_table(rows: pd.DataFrame) -> Table:
    """A row for each pair, a column for each measure."""
    pairs: list[tuple[str, str]] = [*rows.index]
    times, table = step_times(tuple(pairs)), _table(["constraint", "act"])
    for pair in pairs:
        row = rows.loc[pair]
        table.add_row(*pair, *(_cell(row, problem) for problem in PROBLEMS), *_rest(row, times[pair]))
    return table


def short_table(rows: pd.DataFrame) -> Table:
    """A row for each constraint: of each problem the test value of the activation that is best on validation.

    The other columns are medians over its activations.
    """
    times, chosen = step_times(tuple(rows.index)), {problem: best(rows, problem) for problem in PROBLEMS}
    table = _table(["constraint"])
    for constraint in ranked(rows):
        cells = [_cell(chosen[problem].xs(constraint).iloc[0], problem, False) for problem in PROBLEMS]
        table.add_row(constraint, *cells, *_rest(rows.xs(constraint).median(), times[constraint].median()))
    return table


def _table(names: Sequence[str]) -> Table:
    table = Wide(show_edge=False, box=None, pad_edge=False, header_style="bold")
    for name in names:
        table.add_column(name, no_wrap=True)
    for name in (
        *(problem.name.replace(" ", "\n") for problem in PROBLEMS),
        "tight-\nness",
        "‖∇f‖\n/ L",
        "step\ntime",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    table.repeated = len(names)
    return table


def _cell(row: Any, problem: Problem, with_error: bool = True) -> str:
    value, error = row[problem.test], row[problem.error]
    if np.isnan(value):
        return "-"
    text = f"{value:.3f}" if problem.larger_is_better else f"{value:.2g}"
    return f"{text} ± {error:.1g}" if with_error else text


def _rest(row: Any, time: float) -> list[str]:
    return [f"{row['tightness']:.2f}", f"{row['gradient']:.2f}", f"{time:.2f}"]


def sentences(rows: pd.DataFrame) -> list[str]:
    """What the numbers say of activations, of constraints, and of what constraints cost."""
    times, rows = step_times(tuple(rows.index)), rows[rows["bounded"]]
    cells = chosen_of_both(rows)
    keeping = sum(act in KEEPING for act in cells)
    order = ranked(rows)
    first, second = order[:2]
    by_cost = times.groupby(level=0).median()
    tight = rows["tightness"].groupby(level="constraint").median()
    return [
        f"Where a constraint takes every kind of activation, the one that is best on validation can keep the "
        f"gradient norm in {keeping} of {len(cells)} cells (a constraint on a problem).",
        f"By the mean rank over the problems {', '.join(order[:3])} come first; {first} is within one standard "
        f"error of the best on {near_best(rows, first)} of {len(PROBLEMS)}, {second} on "
        f"{near_best(rows, second)}.",
        f"A train step costs {by_cost.min():.2f} ({by_cost.idxmin()}) to {by_cost.max():.2f} ({by_cost.idxmax()}) "
        f"times one of a plain network; the median of measured over certified is {tight.max():.2f} at most "
        f"({tight.idxmax()}) and {tight.min():.2f} at least ({tight.idxmin()}).",
    ]


def near_best(rows: pd.DataFrame, constraint: str) -> int:
    """On how many problems it is within the standard error of the difference from the best constraint."""
    found = 0
    for problem in PROBLEMS:
        chosen = best(rows, problem).droplevel("act")
        values, errors = chosen[problem.test], chosen[problem.error]
        top: Any = values.idxmax() if problem.larger_is_better else values.idxmin()
        gap = abs(values[top] - values[constraint])
        found += bool(gap <= np.hypot(errors[top], errors[constraint]))
    return found


def chosen_of_both(rows: pd.DataFrame) -> list[str]:
    """The activation that is best on validation of each problem, for each constraint that takes all kinds."""
    kinds = {name: {*map(kind, group.xs(name).index)} for name, group in rows.groupby(level="constraint")}
    takes_all = {name for name, found in kinds.items() if len(found) == len(KINDS)}
    pairs = [pair for problem in PROBLEMS for pair in best(rows, problem).index]
    return [act for constraint, act in pairs if constraint in takes_all]


def summary(runs: Runs) -> Summary:
    rows = folded(runs)
    return Summary(short_table(rows), long_table(rows), sentences(rows))


def judge(runs: Runs) -> list[Verdict]:
    """Claim 9."""
    rows = folded(runs)
    keeping = float(np.mean([act in KEEPING for act in chosen_of_both(rows[rows["bounded"]])]))
    return [verdict("9 best on validation is an activation that can keep the gradient norm, share", keeping)]


EXPERIMENTS = tuple(problem.experiment for problem in PROBLEMS)
STORIES = {"compare": Story(EXPERIMENTS, draw, judge, summary)}
