"""How all pictures look: sizes, palette, lines, and the few marks that they share."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

# Okabe and Ito's palette, whose colours can be told apart with any colour vision.
BLUE, ORANGE, GREEN, RED, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9"
PURPLE, YELLOW = "#CC79A7", "#F0E442"
BLACK, GREY = "#222222", "#8a8a8a"
ACT_COLOUR = {"relu": ORANGE, "groupsort": BLUE}
ACT_NAME = {"relu": "ReLU", "groupsort": "GroupSort"}
LOSS_NAME = {"bce": "cross-entropy", "hinge": "hinge"}
WINE = "#882255"  # of Tol's palette, which has the same property
# Of classes, or of several outputs, in their order; from the tenth on they share the last.
CLASS_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, RED, YELLOW, BLACK, WINE, GREY)

COLUMN, PAGE = 3.5, 7.0  # inches: one column and both of a two-column paper
DPI = 200

_LOOK: Any = {
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
    "legend.frameon": False,
    "legend.fontsize": 7,
    "figure.constrained_layout.use": True,
    "svg.hashsalt": "lipexp",  # the same picture is the same file
}


def look() -> AbstractContextManager[None]:
    """Everything that is drawn and saved while it is open has the common look."""
    return rc_context(_LOOK)


def panels(
    width: float, height: float, rows: int = 1, columns: int = 1, **options: Any
) -> tuple[Figure, list[Axes]]:
    """A figure of `width` x `height` inches and its panels, row by row. Draw and save it under `look()`."""
    figure = Figure(figsize=(width, height), dpi=DPI)
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, list(axes.flat)


def save(figure: Figure, stem: Path) -> list[Path]:
    """`stem`.png and `stem`.svg."""
    files = [stem.with_suffix(suffix) for suffix in (".png", ".svg")]
    stem.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(files[0])
    figure.savefig(files[1], metadata={"Date": None})
    return files


def band(ax: Axes, x: Sequence[float], low: Any, middle: Any, high: Any, colour: str, **line: Any) -> None:
    """A line with the range of the seeds, or of the data, around it."""
    ax.fill_between(x, low, high, color=colour, alpha=0.17, linewidth=0)
    ax.plot(x, middle, color=colour, **line)


def label(ax: Axes, text: str, x: float, y: float, colour: str = BLACK, **options: Any) -> None:
    """A name written beside a line, in its colour, instead of a legend."""
    settings: dict[str, Any] = {"xytext": (3, 0), "va": "center", "fontsize": 7.5} | options
    ax.annotate(text, (x, y), textcoords="offset points", color=colour, **settings)


def scatter(ax: Axes, points: npt.NDArray[Any], y: npt.NDArray[Any], names: Sequence[str], **dots: Any) -> None:
    """Points (N, 2) in the colour of their class y (N,); `names` are those of the classes, for a legend."""
    marks: Any = {"s": 5, "alpha": 0.45, "linewidths": 0, "rasterized": True} | dots
    for c, name in enumerate(names):
        own, colour = points[y == c], class_colour(c)
        ax.scatter(own[:, 0], own[:, 1], color=colour, label=name, **marks)
    ax.set_aspect("equal")


def class_colour(c: int) -> str:
    return CLASS_COLOURS[min(c, len(CLASS_COLOURS) - 1)]


def contours(
    ax: Axes, points: npt.NDArray[Any], y: npt.NDArray[Any], mesh: Mesh, f: npt.NDArray[Any], names: Sequence[str]
) -> None:
    """Points of two classes, labelled level lines of f (rows, columns), and the decision line f = 0 emphasised."""
    scatter(ax, points, y, names)
    level_lines(ax, mesh, f, _levels(f, 12), 0.8, GREY)
    level_lines(ax, mesh, f, [0.0], 2.0, BLACK)


def regions(
    ax: Axes, points: npt.NDArray[Any], y: npt.NDArray[Any], mesh: Mesh, f: npt.NDArray[Any], names: Sequence[str]
) -> None:
    """Points of several classes on the colour of the class that outputs f (rows, columns, C) decide for.

    Level lines show the margin of the largest output over the second, which is 0 on the thick lines.
    """
    ordered = np.sort(f, axis=2)
    colours = [to_rgb(class_colour(c)) for c in range(f.shape[2])]
    (left, *_, right), (low, *_, high) = mesh.axes
    shown = np.array(colours)[f.argmax(axis=2)]
    ax.imshow(
        shown, extent=(left, right, low, high), origin="lower", alpha=0.16, interpolation="nearest", zorder=0
    )
    scatter(ax, points, y, names, s=8, alpha=0.9, linewidths=0.25, edgecolors=BLACK)
    margin = ordered[..., -1] - ordered[..., -2]
    level_lines(ax, mesh, margin, _levels(margin, 7), 0.8, GREY)
    for c in np.unique(f.argmax(axis=2)):
        over_others = f[..., c] - np.delete(f, c, axis=2).max(axis=2)
        level_lines(ax, mesh, over_others, [0.0], 2.0, BLACK, labelled=False)


def level_lines(
    ax: Axes,
    mesh: Mesh,
    f: npt.NDArray[Any],
    levels: Sequence[float],
    width: float,
    colour: str,
    labelled: bool = True,
) -> None:
    """The lines on which f (rows, columns) has a value of `levels`."""
    drawn = [level for level in levels if f.min() < level < f.max()]
    if not drawn:
        return
    lines = ax.contour(*mesh.axes, f, drawn, linewidths=width, colors=colour, linestyles="solid")
    if labelled:
        # Not inline: a label that is left out would leave a gap in its line.
        for text in ax.clabel(lines, fontsize=7, fmt=_signed, colors=BLACK, inline=False):
            text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.6})
            text.set_visible(mesh.well_inside(text.get_position()))


def _signed(level: float) -> str:
    return f"{level:g}".replace("-", "−")


def _levels(f: npt.NDArray[Any], n: int) -> list[float]:
    """Some n round levels over the range of f, without 0, which is drawn by itself."""
    from matplotlib.ticker import MaxNLocator

    return [float(v) for v in MaxNLocator(n).tick_values(f.min(), f.max()) if abs(v) > 1e-12 * np.abs(f).max()]


class Mesh:
    """A grid of points around 2-D data, on which f is drawn."""

    PER_AXIS = 201

    def __init__(self, points: npt.NDArray[Any]) -> None:
        low, high = points.min(axis=0), points.max(axis=0)
        margin = 0.06 * (high - low)
        ends = zip(low - margin, high + margin, strict=True)
        self.axes = [np.linspace(start, end, self.PER_AXIS) for start, end in ends]

    def well_inside(self, position: tuple[float, float]) -> bool:
        """Whether a label there is not cut off by the frame."""
        ends = ((axis[0], axis[-1]) for axis in self.axes)
        return all(0.04 < (at - low) / (high - low) < 0.96 for at, (low, high) in zip(position, ends, strict=True))

    @property
    def points(self) -> npt.NDArray[Any]:
        """(rows * columns, 2)"""
        return np.stack(np.meshgrid(*self.axes), axis=-1).reshape(-1, 2)

    def over(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """`values` at `points`, as (rows, columns)."""
        return values.reshape(len(self.axes[1]), len(self.axes[0]))
