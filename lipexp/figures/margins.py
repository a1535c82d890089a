"""Accuracy and certified robust accuracy against the margin that the hinge loss asks for."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure
from sklearn.neighbors import NearestNeighbors

from lipexp.figures.claims import Verdict
from lipexp.figures.experiments import table
from lipexp.figures.story import Runs, Story
from lipexp.figures.style import BLACK, BLUE, COLUMN, GREEN, GREY, SKY, band, label, panels
from lipexp.runs import RunFolder

EXPERIMENT = "margins"
RADII = {0.1: SKY, 0.25: BLUE, 0.4: GREEN}


def certified_accuracy(run: pd.Series, radius: float) -> float:
    """The fraction of test points whose class is right, and proven to stay so within `radius`."""
    points = table(run["run"], "radii")
    points = points[points["split"] == "test"]
    return float(((points["correct"] == 1) & (points["radius"] >= radius)).mean())


def half_distance(run: RunFolder) -> float:
    """Half the smallest distance between training points of different classes: no larger margin can be met."""
    points = table(run, "gradients")
    points = points[points["split"] == "train"]
    first, second = (points[points["y"] == y][["x0", "x1"]].to_numpy() for y in (0, 1))
    distances, _ = NearestNeighbors(n_neighbors=1).fit(first).kneighbors(second)
    return float(distances.min()) / 2


def draw(runs: Runs) -> Figure:
    """Test accuracy and certified accuracy at fixed radii, with the range over the seeds as a band."""
    figure, (ax,) = panels(COLUMN, 2.6)
    moons = runs[EXPERIMENT].copy()
    limit = min(half_distance(run) for run in moons["run"])
    for radius in RADII:
        moons[f"certified {radius}"] = [certified_accuracy(run, radius) for _, run in moons.iterrows()]
    curves = {"test.accuracy": BLACK} | {f"certified {radius}": colour for radius, colour in RADII.items()}
    for column, colour in curves.items():
        values = moons.groupby("loss.margin")[column]
        margins = list(values.mean().index)
        name = column.replace("test.", "test ").replace("certified", "certified, r =")
        band(
            ax, margins, values.min(), values.mean(), values.max(), colour, marker="o", markersize=2.5, label=name
        )
    ax.legend(loc="center right", fontsize=7.5)
    ax.axvline(limit, color=GREY, linewidth=0.8, linestyle="dashed")
    label(ax, f"half the distance\nof the classes, {limit:.3g}", limit, 0.12, GREY, fontsize=6.5)
    ax.set(xlabel="hinge margin (distance in input space, p = 2)", ylabel="share of the test points")
    ax.set(ylim=(-0.02, 1.03), xlim=(0, 1.55))
    ax.set_xticks([0, 0.5, 1, 1.5])
    return figure


def judge(runs: Runs) -> list[Verdict]:
    return []


STORIES = {"margins": Story((EXPERIMENT,), draw, judge)}
