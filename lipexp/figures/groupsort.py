"""What GroupSort does to a vector: it sorts within groups, and changes no number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from lipexp.activations import GroupSort
from lipexp.figures.claims import Verdict, verdict
from lipexp.figures.story import Runs, Story
from lipexp.figures.style import BLACK, BLUE, GREY, ORANGE, PAGE, panels

D = 8
VECTOR = (0.9, -0.5, 0.3, 1.4, -1.1, 0.6, -0.2, -0.8)
GROUPS = (D // 2, D // 4, 1)


def draw(runs: Runs) -> Figure:
    """The vector, and the vector sorted in d/2, d/4 groups and one; a bar keeps its colour, groups are framed."""
    figure, axes = panels(PAGE, 1.7, 1, 1 + len(GROUPS), sharey=True)
    x = np.array(VECTOR)
    shades = np.linspace(0, 1, D)[np.argsort(np.argsort(x))]
    colours = [tuple((1 - s) * np.array(to_rgb(BLUE)) + s * np.array(to_rgb(ORANGE))) for s in shades]
    _bars(axes[0], x, colours, "x")
    for ax, n_groups in zip(axes[1:], GROUPS, strict=True):
        y = sorted_in(n_groups, x)
        # Every number stands once in `x`, so it is known where it came from.
        _bars(ax, y, [colours[VECTOR.index(value)] for value in y.tolist()], _title(n_groups))
        size = D // n_groups
        for edge in range(size, D, size):
            ax.axvline(edge - 0.5, color=GREY, linewidth=0.8, linestyle="dashed")
    axes[0].set_ylabel("value")
    return figure


def _bars(ax: Axes, values: npt.NDArray[Any], colours: Sequence[Any], title: str) -> None:
    ax.bar(range(D), values, color=colours, width=0.75)
    ax.axhline(0, color=BLACK, linewidth=0.7)
    ax.set(title=title, xlabel="feature", xticks=range(D))


def _title(n_groups: int) -> str:
    return f"n_groups = {n_groups}" + {D // 2: " = d/2", D // 4: " = d/4", 1: ", FullSort"}[n_groups]


def sorted_in(n_groups: int, x: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """x (D,) sorted within groups of neighbours. GroupSort itself puts feature j into group j mod n_groups."""
    act = GroupSort(n_groups)
    neighbours = act.groups(D).ravel()
    spread = np.empty_like(x)
    spread[neighbours] = x
    return act(torch.from_numpy(spread)).numpy()[neighbours]


def judge(runs: Runs) -> list[Verdict]:
    """GroupSort is a permutation: random vectors come out with the very numbers that went in."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((1000, D))
    kept = [
        np.array_equal(np.sort(sorted_in(n_groups, vector)), np.sort(vector))
        for n_groups in GROUPS
        for vector in vectors
    ]
    return [
        verdict("4 GroupSort only permutes: outputs that hold their input's numbers, share", float(np.mean(kept)))
    ]


STORIES = {"groupsort": Story((), draw, judge)}
