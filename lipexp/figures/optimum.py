"""Optimal transport with a known answer: how much of it bounded ReLU and GroupSort networks reach."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lipexp.figures.claims import RELU_CEILING, Verdict, verdict
from lipexp.figures.experiments import loaded, table
from lipexp.figures.story import Runs, Story
from lipexp.figures.style import ACT_COLOUR, BLACK, GREY, PAGE, label, panels
from lipexp.runs import RunFolder


class Case(NamedTuple):
    """One place on the axis: the runs of an experiment that share these settings."""

    experiment: str
    problem: str
    where: dict[str, str | float]
    name: str


LINE, PLANE, HIGH = "|x|, 1-D", "three cones, 2-D", "one cone, 128-D"
CASES = (
    Case("optimum_1d", LINE, {"constraint": "spectral"}, "spectral"),
    Case("optimum_1d", LINE, {"constraint": "orthogonal"}, "ortho-\ngonal"),
    Case("optimum_1d", LINE, {"constraint": "linf"}, "linf"),
    Case("optimum_2d_spectral", PLANE, {}, "spectral"),
    Case("optimum_2d_orthogonal", PLANE, {}, "cayley"),
    Case("optimum_2d_linf", PLANE, {"constraint.p": 2}, "linf\np = 2"),
    Case("optimum_2d_linf", PLANE, {"constraint.p": 1}, "linf\np = 1"),
    Case("optimum_2d_linf", PLANE, {"constraint.p": math.inf}, "linf\np = ∞"),
    Case("optimum_128d_spectral", HIGH, {}, "spectral"),
    Case("optimum_128d_orthogonal", HIGH, {}, "ortho-\ngonal"),
    Case("optimum_128d_linf", HIGH, {}, "linf\np = 2"),
)
COLOUR = {"relu": ACT_COLOUR["relu"], "sort": ACT_COLOUR["groupsort"]}


def shares(runs: Runs, case: Case, act: str) -> pd.Series:
    """The score on test samples divided by the product of norms, for each seed; `sort` is any GroupSort."""
    chosen = runs[case.experiment]
    for key, value in case.where.items():
        kept = chosen[key].astype(float) == value if isinstance(value, float | int) else chosen[key] == value
        chosen = chosen[kept]
    chosen = chosen[(chosen["act"] == "relu") == (act == "relu")]
    return chosen.set_index("run")["test.score"] / chosen.set_index("run")["lipschitz.product"]


def first_layer_ceiling(run: RunFolder) -> float:
    """E max_i |<w_i, x>| over the test points around the centre, for the rows w_i of the first layer.

    With rows ||w_i||_2 <= 1 and later layers of norm 1 in the inf-norm, f(0) - f(x) is at most the largest change
    of a feature, |<w_i, x>|. So no network with this first layer scores more; and in many dimensions, where a
    random x has a small component in every fixed direction, no network comes near 1. This is for L = 1, and scales
    with L.
    """
    points = table(run, "gradients")
    points = points[(points["split"] == "test") & (points["y"] == 0)]
    x = points[[column for column in points if str(column).startswith("x")]].to_numpy()
    weight = loaded(run).layers[0].weight[0].double().numpy()
    return float(np.abs(x @ weight.T).max(axis=1).mean())


def ceiling(runs: Runs) -> float:
    """The mean of the seeds' `first_layer_ceiling`."""
    return float(np.mean([first_layer_ceiling(run) for run in shares(runs, CASES[-1], "sort").index]))


def draw(runs: Runs) -> Figure:
    """One dot per seed; the optimum is 1, and dotted lines are ceilings."""
    figure, (ax,) = panels(PAGE, 2.5)
    for place, case in enumerate(CASES):
        for act, shift in (("relu", 0.13), ("sort", -0.13)):
            values = shares(runs, case, act)
            ax.plot([place + shift] * len(values), values, "o", color=COLOUR[act], alpha=0.8)
    _ceilings(ax, ceiling(runs))
    ax.axhline(1, color=GREY, linewidth=0.8)
    label(ax, "optimum", len(CASES) - 0.6, 1, GREY, xytext=(0, 6), ha="right", fontsize=7)
    label(ax, "GroupSort", 0.13, 0.93, COLOUR["sort"], xytext=(-12, 0))
    label(ax, "ReLU", 0.13, shares(runs, CASES[0], "relu").mean(), COLOUR["relu"], xytext=(9, 5))
    problems = [case.problem for case in CASES]
    for problem in dict.fromkeys(problems):
        places = [place for place, name in enumerate(problems) if name == problem]
        ax.text(sum(places) / len(places), 1.13, problem, ha="center", fontsize=8.5)
        if places[0]:
            ax.axvline(places[0] - 0.5, color=GREY, linewidth=0.5)
    ax.set(xlim=(-0.5, len(CASES) - 0.5), ylim=(0, 1.1), ylabel="score / product of norms")
    ax.set_xticks(range(len(CASES)), [case.name for case in CASES])
    return figure


def _ceilings(ax: Axes, first_layer: float) -> None:
    for place, value, name in (
        (0, RELU_CEILING[2], "1/√3"),
        (1, RELU_CEILING[2], ""),
        (2, RELU_CEILING[1], "1/2"),
        (len(CASES) - 1, first_layer, "E max |⟨w, x⟩|"),
    ):
        ax.plot([place - 0.35, place + 0.35], [value] * 2, color=BLACK, linewidth=1, linestyle="dotted")
        label(ax, name, place - 0.35, value, xytext=(0, 6), fontsize=6.5)


def judge(runs: Runs) -> list[Verdict]:
    """Claim 8."""
    line_spectral, line_orthogonal, line_linf, *planes, high_spectral, high_orthogonal, high_linf = CASES
    lines = [shares(runs, case, "sort").min() for case in (line_spectral, line_orthogonal, line_linf)]
    high = shares(runs, high_linf, "sort")
    return [
        verdict("8 1-D, GroupSort, all constraints: share of the optimum, smallest", min(lines)),
        verdict(
            "8 1-D, ReLU, spectral: share of the optimum, median", shares(runs, line_spectral, "relu").median()
        ),
        verdict("8 1-D, ReLU, linf: share of the optimum, median", shares(runs, line_linf, "relu").median()),
        verdict(
            "8 three cones, GroupSort: share of the optimum, median under the worst constraint and norm",
            min(shares(runs, case, "sort").median() for case in planes),
        ),
        verdict(
            "8 three cones, Cayley, full sort: share of the optimum, smallest",
            shares(runs, planes[1], "sort").min(),
        ),
        verdict(
            "8 128-D cone, orthogonal, full sort: share of the optimum, smallest",
            shares(runs, high_orthogonal, "sort").min(),
        ),
        verdict(
            "8 128-D cone, spectral, full sort: share of the optimum, smallest",
            shares(runs, high_spectral, "sort").min(),
        ),
        verdict(
            "8 128-D cone, linf: share of what its first layer allows, smallest",
            (high / [first_layer_ceiling(run) for run in high.index]).min(),
        ),
        verdict(
            "8 GroupSort over ReLU: share of the optimum, smallest ratio",
            min(shares(runs, case, "sort").min() / shares(runs, case, "relu").max() for case in CASES),
        ),
    ]


STORIES = {"optimum": Story(tuple(dict.fromkeys(case.experiment for case in CASES)), draw, judge)}
