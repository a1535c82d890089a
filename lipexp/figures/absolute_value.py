"""|x| fitted by bounded networks: GroupSort follows it, ReLU cannot reach the slopes on both sides of the kink."""

from __future__ import annotations

import functools
import math

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lipexp.figures.claims import RELU_CEILING, Verdict, verdict
from lipexp.figures.experiments import evaluated
from lipexp.figures.story import Runs, Story
from lipexp.figures.style import ACT_COLOUR, ACT_NAME, BLACK, DPI, GREY, PAGE, label
from lipexp.runs import RunFolder

FITS, DEPTHS = "absolute_value", "absolute_value_depth"
POINTS = 5_000
CONSTRAINTS = ("spectral", "linf")
CEILING = {"spectral": (RELU_CEILING[2], "1/√3"), "linf": (RELU_CEILING[1], "1/2")}


def between(points: int) -> npt.NDArray[np.float64]:
    """(N, 1) the middles of N equal parts of [-1, 1]: none is 0, the kink of |x|."""
    return ((np.arange(points) + 0.5) / points * 2 - 1).reshape(-1, 1)


@functools.cache
def half_range(run: RunFolder) -> float:
    """(max f' - min f') / 2 over [-1, 1]; |x| has 1."""
    slopes = evaluated(run, between(POINTS))[1]
    return float(slopes.max() - slopes.min()) / 2


def draw(runs: Runs) -> Figure:
    """The fits and their slopes, one column a constraint; and the steepest slopes of ReLU against depth."""
    figure = Figure(figsize=(PAGE, 3.6), dpi=DPI)
    grid = figure.add_gridspec(2, 3, height_ratios=[3, 2])
    fits = runs[FITS][runs[FITS]["seed"] == 0]
    x = between(2000)
    for column, constraint in enumerate(CONSTRAINTS):
        upper, lower = (figure.add_subplot(grid[row, column]) for row in range(2))
        upper.plot(x, np.abs(x), color=GREY, linewidth=4, alpha=0.4)
        label(upper, "|x|", -0.93, 0.93, GREY, xytext=(6, 2))
        for act in ("groupsort", "relu"):
            (run,) = fits[(fits["act"] == act) & (fits["constraint"] == constraint)]["run"]
            f, slope = evaluated(run, x)
            upper.plot(x, f, color=ACT_COLOUR[act])
            lower.plot(x, slope, color=ACT_COLOUR[act])
        label(upper, ACT_NAME["groupsort"], 0, 0.03, ACT_COLOUR["groupsort"], xytext=(0, -6), ha="center")
        label(upper, ACT_NAME["relu"], 0, 0.36, ACT_COLOUR["relu"], xytext=(0, 6), ha="center")
        ceiling, name = CEILING[constraint]
        for sign in (-1, 1):
            lower.axhline(sign * ceiling, color=BLACK, linewidth=0.7, linestyle="dotted")
        label(lower, f"ReLU ceiling {name}", -1, ceiling, xytext=(0, 6), fontsize=6.5)
        upper.set(title=f"constraint={constraint}, L = 1", ylim=(-0.12, 1.05), ylabel="f(x)")
        lower.set(xlabel="x", ylim=(-1.15, 1.15), ylabel="f ′(x)")
    sorting = with_half_range(runs[FITS][runs[FITS]["act"] == "groupsort"])
    _against_depth(figure.add_subplot(grid[:, 2]), with_half_range(runs[DEPTHS]), sorting)
    return figure


def _against_depth(ax: Axes, depths: pd.DataFrame, sorting: pd.DataFrame) -> None:
    """Half the range of f' for ReLU networks of each depth, and for the GroupSort networks of the fits."""
    for constraint, marker in zip(CONSTRAINTS, "os", strict=True):
        one = depths[depths["constraint"] == constraint]
        middle = one.groupby("model.depth")["half_range"].median()
        ax.plot(one["model.depth"], one["half_range"], marker, color=ACT_COLOUR["relu"], alpha=0.35, markersize=3)
        ax.plot(middle.index, middle, color=ACT_COLOUR["relu"], marker=marker)
        label(
            ax, f"ReLU, {constraint}", 10.4, one["half_range"].max(), ACT_COLOUR["relu"], xytext=(0, 9), ha="right"
        )
    for depth, name in ((1, "1/2"), (2, "1/√3")):
        ceiling = RELU_CEILING[depth]
        ax.plot([depth - 0.6, depth + 0.6], [ceiling] * 2, color=BLACK, linewidth=0.9, linestyle="dotted")
        label(ax, name, depth - 0.6, ceiling, xytext=(-2, 0), ha="right", fontsize=6.5)
    ax.axhline(1, color=GREY, linewidth=0.8)
    label(ax, "|x|", 10, 1, GREY, xytext=(0, 6), ha="right")
    ax.plot(sorting["model.depth"], sorting["half_range"], "D", color=ACT_COLOUR["groupsort"])
    label(ax, "GroupSort", 2, 1, ACT_COLOUR["groupsort"], xytext=(5, -7))
    ax.set(
        title="slopes against depth", xlabel="hidden layers", ylabel="(max f ′ − min f ′) / 2", ylim=(0.4, 1.05)
    )
    ax.set(xlim=(-0.8, 10.5), xticks=sorted(depths["model.depth"].unique()))


def with_half_range(runs: pd.DataFrame) -> pd.DataFrame:
    return runs.assign(half_range=runs["run"].map(half_range))


def judge(runs: Runs) -> list[Verdict]:
    """Claims 2 and 3."""
    fits, depths = runs[FITS], with_half_range(runs[DEPTHS])
    spectral, linf = (depths[depths["constraint"] == constraint] for constraint in CONSTRAINTS)
    by_depth = spectral.groupby("model.depth")["half_range"]
    relu = fits[fits["act"] == "relu"]
    sorting = fits[fits["act"] == "groupsort"].groupby("constraint")["test.mse"]
    claim = "2 |x|, ReLU, spectral, "
    return [
        verdict("2 |x|, ReLU, linf: half the range of f′, largest at any depth", linf["half_range"].max()),
        verdict(claim + "1 hidden layer: half the range of f′, smallest", by_depth.min().get(1, math.nan)),
        verdict(claim + "1 hidden layer: half the range of f′, largest", by_depth.max().get(1, math.nan)),
        # The median: some runs stop near 1/2, with one side of |x| cut off, and which ones depends on the machine.
        verdict(claim + "2 hidden layers: half the range of f′, median", by_depth.median().get(2, math.nan)),
        verdict(claim + "2 hidden layers: half the range of f′, largest", by_depth.max().get(2, math.nan)),
        verdict(
            "2 |x|, ReLU, spectral: its least rise from one depth to the next", by_depth.median().diff().min()
        ),
        verdict(claim + "10 hidden layers: half the range of f′, largest", by_depth.max().get(10, math.nan)),
        verdict("2 |x|, ReLU, 2 hidden layers: test MSE, smallest", relu["test.mse"].min()),
        verdict("3 |x|, GroupSort, linf: test MSE, largest", sorting.max().get("linf", math.nan)),
        verdict("3 |x|, GroupSort, spectral: test MSE, median", sorting.median().get("spectral", math.nan)),
    ]


STORIES = {"absolute-value": Story((FITS, DEPTHS), draw, judge)}
