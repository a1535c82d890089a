"""Accuracy against L: hinge classifies at any L, cross-entropy only at a large one, or a large temperature."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lipexp.figures.claims import Verdict, verdict
from lipexp.figures.story import Runs, Story
from lipexp.figures.style import BLUE, COLUMN, GREEN, ORANGE, RED, band, label, panels

LOSSES, TEMPERATURES = "any_lipschitz", "temperature"


def draw(runs: Runs) -> Figure:
    """Test accuracy against L, with the range over the seeds as a band."""
    figure, (ax,) = panels(COLUMN, 2.5)
    losses, temperatures = runs[LOSSES], runs[TEMPERATURES]
    _curve(ax, losses[losses["loss"] == "bce"], ORANGE, "o")
    label(ax, "cross-entropy\nT = 1", 1, 0.905, ORANGE, xytext=(6, -8))
    for temperature, colour, at, marker in ((10, RED, 0.1, "^"), (100, GREEN, 0.01, "v")):
        _curve(ax, temperatures[temperatures["loss.temperature"] == temperature], colour, marker)
        label(ax, f"T = {temperature}", at, 0.905, colour, xytext=(6, -4))
    _curve(ax, losses[losses["loss"] == "hinge"], BLUE, "s")
    label(ax, "hinge", 0.01, 1.0, BLUE, xytext=(2, 7), ha="left")
    ax.set(xscale="log", xlabel="Lipschitz constant L (‖∇f‖₂ ≤ L)", ylabel="test accuracy", ylim=(0.77, 1.025))
    return figure


def _curve(ax: Axes, runs: pd.DataFrame, colour: str, marker: str) -> None:
    accuracy = runs.groupby("lipschitz")["test.accuracy"]
    lipschitz = list(accuracy.mean().index)
    band(ax, lipschitz, accuracy.min(), accuracy.mean(), accuracy.max(), colour, marker=marker, markersize=3)


def judge(runs: Runs) -> list[Verdict]:
    """Claim 6 at all L."""
    losses = runs[LOSSES]
    hinge = losses[losses["loss"] == "hinge"]
    return [verdict("6 hinge at any L: test accuracy, worst run", hinge["test.accuracy"].min())]


STORIES = {"any-lipschitz": Story((LOSSES, TEMPERATURES), draw, judge)}
