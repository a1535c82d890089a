"""ReLU loses gradient norm from layer to layer, GroupSort keeps it: before training and after."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lipexp.figures.claims import Verdict, verdict
from lipexp.figures.experiments import table
from lipexp.figures.story import Runs, Story
from lipexp.figures.style import ACT_COLOUR, ACT_NAME, BLACK, PAGE, band, label, panels

START, TRAINED = "attenuation_start", "attenuation"
ACTS = ("groupsort", "relu")
BINS = np.linspace(0, 1, 41)
# Where the name of each activation stands in the histogram.
PLACE: dict[str, dict[str, Any]] = {"relu": {"xytext": (7, -4)}, "groupsort": {"xytext": (0, 5), "ha": "right"}}


def at_hidden_layers(runs: pd.DataFrame) -> npt.NDArray[np.float64]:
    """(runs, layers) the median gradient norm at the input of each layer after the first.

    The first layer is left out: its input has two features, and a 64 x 2 matrix passes back only the part of a
    gradient that lies in its two-dimensional range.
    """
    return np.array([table(run, "layers")["gradient_median"].to_numpy()[1:] for run in runs["run"]])


def draw(runs: Runs) -> Figure:
    """Norms along the layers before training, against depth after it, and their distribution."""
    figure, axes = panels(PAGE, 2.4, 1, 3)
    start, trained = runs[START], runs[TRAINED]
    _before(axes[0], start)
    _after(axes[1], trained)
    _distribution(axes[2], trained)
    return figure


def _before(ax: Axes, start: pd.DataFrame) -> None:
    for act in ACTS:
        norms = at_hidden_layers(start[start["act"] == act])
        layers = range(1, 1 + norms.shape[1])
        band(
            ax,
            layers,
            norms.min(0),
            np.median(norms, 0),
            norms.max(0),
            ACT_COLOUR[act],
            marker="o",
            markersize=2.5,
        )
        where, offset = (5, (0, -9)) if act == "groupsort" else (4, (8, -6))
        label(ax, ACT_NAME[act], where, np.median(norms, 0)[where - 1], ACT_COLOUR[act], xytext=offset)
    ax.set(
        title=f"before training, {start['constraint'].iloc[0]}",
        yscale="log",
        xlabel="h: output of hidden layer",
        xticks=[1, *range(2, 11, 2)],
    )
    ax.set_ylabel("median ‖∂f/∂h‖₂ over the data")


def _after(ax: Axes, trained: pd.DataFrame) -> None:
    for act in ACTS:
        one = trained[trained["act"] == act].groupby("model.depth")
        medians = one["gradient_norm.median"]
        depths = list(medians.median().index)
        low, high = one["gradient_norm.p05"].median(), one["gradient_norm.p95"].median()
        band(ax, depths, low, medians.median(), high, ACT_COLOUR[act], marker="o", markersize=2.5)
        label(
            ax, ACT_NAME[act], depths[2], medians.median().iloc[2], ACT_COLOUR[act], xytext=(0, -11), ha="center"
        )
    ax.axhline(1, color=BLACK, linewidth=0.7, linestyle="dashed")
    label(ax, "L = 1", 2, 1, xytext=(0, 5), fontsize=7)
    ax.set(
        title=f"trained, {trained['constraint'].iloc[0]}, hinge",
        xlabel="hidden layers",
        xticks=range(2, 11, 2),
        ylim=(0, 1.12),
    )
    ax.set_ylabel("‖∇f‖₂: median, 5 to 95 %")


def _distribution(ax: Axes, trained: pd.DataFrame) -> None:
    deepest = trained[trained["model.depth"] == trained["model.depth"].max()]
    for act in ACTS:
        runs = deepest[deepest["act"] == act]["run"]
        norms = np.concatenate([table(run, "gradients")["grad_2"].to_numpy() for run in runs])
        share, _ = np.histogram(norms, BINS)
        ax.stairs(share / len(norms), BINS, color=ACT_COLOUR[act], fill=True, alpha=0.35)
        ax.stairs(share / len(norms), BINS, color=ACT_COLOUR[act], linewidth=1)
        at = int(share.argmax())
        label(ax, ACT_NAME[act], BINS[at], share[at] / len(norms), ACT_COLOUR[act], **PLACE[act])
    ax.set(
        title=f"trained, {deepest['model.depth'].max()} hidden layers",
        xlabel="‖∇f(x)‖₂",
        ylabel="share of the data",
    )
    ax.set(xlim=(0, 1))
    ax.margins(y=0.15)


def judge(runs: Runs) -> list[Verdict]:
    """Claim 4."""
    norms = {act: at_hidden_layers(runs[START][runs[START]["act"] == act]) for act in ACTS}
    middle = np.median(norms["relu"], axis=0)
    factors = middle[:-1] / middle[1:]
    medians = runs[TRAINED].groupby(["act", "model.depth"])["gradient_norm.median"]
    relu, sorting = (medians.median()[act] for act in ("relu", "groupsort"))
    target = float(runs[TRAINED]["lipschitz.target"].iloc[0])
    start = "4 before training, "
    return [
        verdict(start + "GroupSort: gradient norm at hidden layers, smallest median", norms["groupsort"].min()),
        verdict(start + "GroupSort: gradient norm at hidden layers, largest median", norms["groupsort"].max()),
        verdict(start + "ReLU: the factor of a layer, smallest", factors.min()),
        verdict(start + "ReLU: the factor of a layer, largest", factors.max()),
        verdict("4 trained, ReLU: median ‖∇f‖ at depth 10 over that at depth 2", relu[10] / relu[2]),
        verdict("4 trained, GroupSort: median ‖∇f‖ over L at any depth, smallest", sorting.min() / target),
        verdict(
            "4 trained, GroupSort over ReLU: median ‖∇f‖ at any depth, smallest ratio",
            (medians.min()["groupsort"] / medians.max()["relu"]).min(),
        ),
    ]


STORIES = {"attenuation": Story((START, TRAINED), draw, judge)}
