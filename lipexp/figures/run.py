"""The picture of a single run: a plane of two inputs, the curves over one input, else distributions."""

from __future__ import annotations

import math
import textwrap
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lipexp.datasets import Dataset
from lipexp.datasets.preprocessing import NUMBER
from lipexp.evaluate import Evaluation
from lipexp.figures.style import (
    BLACK,
    BLUE,
    CLASS_COLOURS,
    DPI,
    GREY,
    ORANGE,
    PAGE,
    Mesh,
    class_colour,
    contours,
    look,
    panels,
    regions,
)
from lipexp.measured.gradients import scan
from lipexp.members import Member
from lipexp.norms import norm_name
from lipexp.tasks import TASKS
from lipexp.wording import SUBSCRIPT, above, below, dataset_name, monotone_line

CURVE_POINTS = 2001
BINS = 40
MOST_NAMED = 12  # classes or features that have a row of their own in a panel
STANDARDISED = ", standardised"  # behind the name of a column of numbers
CHARACTERS = 16  # of a title in an inch

Array = npt.NDArray[Any]


class Shown(NamedTuple):
    """The test points of a run, and what things are called."""

    x: Array  # (N, D)
    y: Array  # (N,) classes, or (N, C) targets
    f: Array  # (N, C)
    steepness: Array  # (N,) the gradient norms
    signs: Array  # (D,) 1 and -1 for monotone features
    inputs: list[str]  # (D)
    outputs: list[str]  # (C)
    classes: list[str]  # such as `class 0` or `ill=yes`; empty for a regression
    short: list[str]  # such as `0` or `yes`
    target: str

    @property
    def prediction(self) -> Array:
        """(N,) the classes of several outputs."""
        return self.f.argmax(axis=1)


def run_figure(run: Evaluation, member: Member) -> Figure:
    """The picture of one run, of its test points.

    | inputs | classes                                                      | numbers                    |
    |--------|--------------------------------------------------------------|----------------------------|
    | 1      | the outputs, with the points, and their slopes               | the same, with the targets |
    | 2      | level lines of f, or the regions of the classes              | distributions              |
    | more   | distributions: f or margins, gradient norms, certified radii | f and target, gradient     |
    |        | and how often each class is taken for another                | norms                      |

    Distributions include the slopes of monotone features.
    """
    dataset: Dataset = member.parts["dataset"]
    shown = _shown(run, member)
    with look():
        if run.network.n_inputs == 2 and shown.classes:
            figure = _plane(run, shown)
        elif run.network.n_inputs == 1:
            figure = _curves(run, shown)
        else:
            figure = _distributions(run, shown)
        names = member.names | {"dataset": dataset_name(member.names["dataset"], getattr(dataset, "path", None))}
        scores = ", ".join(f"{key} {value:.4g}" for key, value in run.scores["test"].items() if key != "loss")
        lines = [
            _text(", ".join(names[group] for group in ("dataset", "act", "constraint", "loss")), 200),
            f"test {scores}, {_interval(run)}",
        ]
        lines += [] if run.monotone is None else [_text(monotone_line(run.monotone), 300)]
        width = int(figure.get_figwidth() * CHARACTERS)
        figure.suptitle("\n".join(textwrap.fill(line, width) for line in lines), fontsize=8.5)
        figure.draw_without_rendering()  # axes of equal scale find their place in a second pass of the layout
    return figure


def _shown(run: Evaluation, member: Member) -> Shown:
    dataset: Dataset = member.parts["dataset"]
    test, table, n_outputs = run.gradients["split"] == "test", dataset.preprocessing, run.network.n_outputs

    def columns(name: str) -> Array:
        """(N, number of them) those called `name`, or `name` and a number."""
        return np.stack([v[test] for key, v in run.gradients.items() if key.rstrip("0123456789") == name], axis=1)

    x, y, f = columns("x"), columns("y"), columns("f")
    inputs = ["x"] if x.shape[1] == 1 else [f"$x_{{{i}}}$" for i in range(x.shape[1])]
    if dataset.features:
        numbers = set() if table is None else {column.name for column in table.columns if column.kind == NUMBER}
        inputs = [_text(name) + STANDARDISED * (name in numbers) for name in dataset.features]
    short: list[str] = []
    target = "target"
    if TASKS[dataset.task].has_classes:
        short = [_text(name) for name in dataset.classes or map(str, range(max(2, n_outputs)))]
    what = "class " if table is None else f"{_text(table.targets[0].name)}="
    classes = [what + name for name in short]
    outputs = classes if classes and n_outputs > 1 else [f"$f_{{{i}}}$" for i in range(n_outputs)]
    if table is not None and not classes:
        outputs = [_text(one.name) for one in table.targets]
        target = (outputs[0] if n_outputs == 1 else "target") + STANDARDISED
    return Shown(
        x,
        y[:, 0] if classes else y,
        f,
        run.gradients[f"grad_{norm_name(run.certificate.chain.q)}"][test],
        np.zeros(len(inputs)) if member.signs is None else member.signs.numpy(),
        inputs,
        outputs if n_outputs > 1 else ["f"],
        classes,
        short,
        target,
    )


def _text(name: str, most: int = 24) -> str:
    """A user's name, of at most so many characters, with a $ that begins no formula."""
    return (name if len(name) <= most else name[: most - 1] + "…").replace("$", r"\$")


# Two inputs ------------------------------------------------------------------------------------------------------


def _plane(run: Evaluation, shown: Shown) -> Figure:
    """Level lines of f over the points, the line f = 0 emphasised; of several outputs the regions they decide."""
    mesh = Mesh(shown.x)
    f = run.network.double(torch.from_numpy(mesh.points).unsqueeze(0))[0].numpy()  # (rows * columns, C)
    wide, high = np.ptp(shown.x, axis=0)
    figure, (ax,) = panels(6.0, float(np.clip(4.5 * high / wide if wide else 6, 1.2, 5.2)) + 0.85)
    if f.shape[1] == 1:
        contours(ax, shown.x, shown.y, mesh, mesh.over(f[:, 0]), shown.classes)
        lines = "f"
    else:
        grids = np.stack([mesh.over(output) for output in f.T], axis=2)
        regions(ax, shown.x, shown.y, mesh, grids, shown.classes)
        lines = "margin of the\nlargest output"
    ax.set(xlabel=shown.inputs[0], ylabel=shown.inputs[1])
    ax.plot([], [], color=GREY, linewidth=0.8, label=lines)
    _legend_beside(ax, len(shown.classes))
    return figure


def _legend_beside(ax: Axes, n: int) -> None:
    """The legend right of the panel, in full colours.

    Args:
        n: how many of its first entries have colours of classes; one stands for all that share a colour.
    """
    handles, names = ax.get_legend_handles_labels()
    most = len(CLASS_COLOURS)
    if n > most:
        handles = handles[:most] + handles[n:]
        names = [*names[: most - 1], f"{n - most + 1} others", *names[n:]]
    legend = ax.legend(handles, names, loc="upper left", bbox_to_anchor=(1, 1), handlelength=1, markerscale=2)
    for handle in legend.legend_handles:
        if handle is not None:
            handle.set_alpha(1)


# One input -------------------------------------------------------------------------------------------------------


def _curves(run: Evaluation, shown: Shown) -> Figure:
    """The outputs, with their targets or with the points of all classes, and their slopes below."""
    x, n_outputs = shown.x[:, 0], shown.f.shape[1]
    along = np.linspace(x.min(), x.max(), CURVE_POINTS)
    scanned = scan(run.network, torch.from_numpy(along.reshape(1, -1, 1)))
    figure, (above_ax, below_ax) = panels(5.0, 4.2, 2, 1, sharex=True, height_ratios=[2, 1])
    several = n_outputs > 1
    for c, name in enumerate(shown.outputs):
        colour = class_colour(c) if several else BLACK if shown.classes else BLUE
        if not shown.classes:
            dots: Any = {"color": colour if several else GREY, "alpha": 0.35, "markersize": 4, "mew": 0}
            above_ax.plot(x, shown.y[:, c], "o", label=None if several else shown.target, **dots)
        above_ax.plot(along, scanned.f[0, :, c].numpy(), color=colour, label=name)
        below_ax.plot(along, scanned.gradient[0, :, c, 0].numpy(), color=colour if several else BLUE)
    for c, name in enumerate(shown.classes):
        own = shown.y == c  # on the largest output, whose colour is that of the class if the decision is right
        dots = {"color": class_colour(c), "markersize": 3.5, "label": None if several else name}
        above_ax.plot(x[own], shown.f[own].max(axis=1), "o", **dots)
    if several:
        _legend_beside(above_ax, n_outputs)
    else:
        above_ax.legend()
    above_ax.set_ylabel("f(x)")
    target = run.certificate.chain.target
    for bound in () if target is None else (-target, target):
        below_ax.axhline(bound, color=BLACK, linewidth=0.8, linestyle="dashed", label=f"±L = ±{target:g}")
    if target is not None:
        below_ax.legend(*(part[:1] for part in below_ax.get_legend_handles_labels()), loc="upper left")
        below_ax.set_ylim(-1.6 * target, 1.6 * target)
    below_ax.set(xlabel=shown.inputs[0], ylabel="f ′(x)")
    return figure


# Distributions ---------------------------------------------------------------------------------------------------


def _distributions(run: Evaluation, shown: Shown) -> Figure:
    """Decisions or fitted targets, gradient norms, and what else there is: radii, confusion, monotone features."""
    several, decides = shown.f.shape[1] > 1, bool(shown.classes)
    drawers = [_against_targets if not decides else _margins if several else _by_class]
    drawers.append(partial(_steepness, run))
    if run.robustness is not None and run.robustness.columns is not None:
        drawers.append(partial(_certified_accuracy, run))
    if decides and several and len(shown.classes) <= MOST_NAMED:
        drawers.append(_confusion)
    if run.monotone is not None:
        drawers.append(partial(_monotone_slopes, run))
    rows = 1 if len(drawers) <= 3 else 2
    columns = -(-len(drawers) // rows)
    figure = Figure(figsize=(PAGE, 2.3 if rows == 1 else 4.8), dpi=DPI)
    grid = figure.add_gridspec(rows, columns)
    for place, drawer in enumerate(drawers):
        drawer(shown, figure.add_subplot(grid[place // columns, place % columns]))
    return figure


def _by_class(shown: Shown, ax: Axes) -> None:
    """f by class."""
    f = shown.f[:, 0]
    for c, name in enumerate(shown.classes):
        ax.hist(f[shown.y == c], _bins(f), color=class_colour(c), alpha=0.6, label=name)
    ax.set(xlabel="f(x)", ylabel="test points")
    ax.ticklabel_format(axis="x", useOffset=False)
    _legend_above(ax)


def _margins(shown: Shown, ax: Axes) -> None:
    """The output of the true class less the largest other one: negative where the decision is wrong."""
    own = np.arange(shown.f.shape[1]) == shown.y[:, None]
    margin = shown.f[own] - np.where(own, -np.inf, shown.f).max(axis=1)
    right = shown.prediction == shown.y
    bins = _bins(margin)
    if margin.min() < 0 < margin.max():  # so that no bar holds points of both kinds
        width = bins[1] - bins[0]
        bins = [width * i for i in range(math.floor(margin.min() / width), math.ceil(margin.max() / width) + 1)]
    for chosen, colour, name in ((right, BLUE, "right"), (~right, ORANGE, "wrong")):
        ax.hist(margin[chosen], bins, color=colour, alpha=0.6, label=f"{chosen.sum()} {name}")
    ax.set(xlabel="f of the true class − largest other f", ylabel="test points")
    ax.ticklabel_format(axis="x", useOffset=False)
    _legend_above(ax)


def _against_targets(shown: Shown, ax: Axes) -> None:
    """f against the targets, which it meets on the diagonal."""
    y, f = shown.y, shown.f
    ends = [min(y.min(), f.min()), max(y.max(), f.max())]
    ax.plot(ends, ends, color=GREY, linewidth=0.8)
    for c, name in enumerate(shown.outputs):
        ax.plot(y[:, c], f[:, c], "o", color=class_colour(c), markersize=2, alpha=0.5, mew=0, label=name)
    ax.set(xlabel=shown.target, ylabel="f(x)")
    if f.shape[1] > 1:
        _legend_beside(ax, f.shape[1])


def _steepness(run: Evaluation, shown: Shown, ax: Axes) -> None:
    """The gradient norms, and what bounds them."""
    marks = {
        "measured": (run.measured.value, "solid", ORANGE),
        "certified": (run.certificate.value, "dashed", GREY),
        "L": (run.certificate.chain.target, "dotted", BLACK),
    }
    # The last bar ends at `measured`, which no point exceeds, and all are as wide as BINS in the panel.
    top = max(float(shown.steepness.max()), run.measured.value)
    widest = max([top, *(value for value, _, _ in marks.values() if value is not None)])
    n_bars = max(1, round(BINS * top / widest)) if top else 1
    ax.hist(shown.steepness, np.linspace(0, top or 1, n_bars + 1).tolist(), color=BLUE, alpha=0.6)
    for name, (value, style, colour) in marks.items():
        if value is not None:
            ax.axvline(value, color=colour, linestyle=style, label=name)
    ax.set(xlabel=_norm(run), ylabel="test points", xlim=(0, None))
    _legend_above(ax)


def _certified_accuracy(run: Evaluation, shown: Shown, ax: Axes) -> None:
    """The fraction of points that are right, and proven to stay so, against the radius."""
    assert run.robustness is not None
    radii = run.robustness.of("test")
    styles = {"radius_local": ("local constants", "solid", BLUE), "radius": ("one constant", "dashed", GREY)}
    for name, (label, style, colour) in styles.items():
        held = np.sort(radii[name][(radii["correct"] == 1) & (radii[name] > 0)])
        share = np.arange(len(held), -1, -1) / len(radii[name])
        finite = int(np.isfinite(held).sum())  # a constant f leaves every point its class, however far it moves
        steps = [0, *held[:finite]], [share[0], *share[:finite]]
        ax.step(*steps, where="pre", color=colour, linestyle=style, label=label)
    _legend_above(ax)
    ax.set(xlabel=f"radius, ‖δ‖{SUBSCRIPT[norm_name(run.certificate.chain.p)]}", ylabel="certified accuracy")
    ax.set_ylim(0, 1.03)


def _confusion(shown: Shown, ax: Axes) -> None:
    """How many points of each class (rows) are taken for each class (columns)."""
    n = len(shown.short)
    counts = np.zeros((n, n), dtype=int)
    np.add.at(counts, (shown.y, shown.prediction), 1)
    shares = counts / counts.sum(axis=1, keepdims=True).clip(1)
    ax.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.argwhere(counts):
        light = shares[row, column] > 0.5
        ax.text(column, row, str(counts[row, column]), color="white" if light else BLACK, ha="center", va="center")
    ax.set(xlabel="predicted class", ylabel="true class", xticks=range(n), yticks=range(n))
    ax.set_yticklabels(shown.short)
    ax.set_xticklabels(shown.short, rotation=90 if max(map(len, shown.short)) > 2 else 0)


def _monotone_slopes(run: Evaluation, shown: Shown, ax: Axes) -> None:
    """The slopes s_k df/dx_k of the monotone features, in their directions: none is negative.

    A box holds half of the points, its whiskers all of them.
    """
    gradient = scan(run.network, torch.from_numpy(shown.x).unsqueeze(0)).gradient[0, :, 0].numpy()
    chosen = np.flatnonzero(shown.signs)
    slopes = gradient[:, chosen] * shown.signs[chosen]
    names = [shown.inputs[k].removesuffix(STANDARDISED) + (" ↑" if shown.signs[k] > 0 else " ↓") for k in chosen]
    if len(chosen) > MOST_NAMED:
        slopes, names = slopes.reshape(-1, 1), [f"all {len(chosen)}"]
    parts = ("boxprops", "whiskerprops", "capprops")
    black: Any = {part: {"color": BLUE} for part in parts} | {"medianprops": {"color": ORANGE}}
    ax.boxplot(slopes, orientation="horizontal", tick_labels=names, whis=(0, 100), widths=0.5, **black)
    ax.invert_yaxis()
    ax.axvline(0, color=BLACK, linewidth=0.7)
    ax.set(xlabel="slope of f along the arrow", xlim=(min(0.0, float(slopes.min())), None))


def _bins(values: Array) -> list[float]:
    """The edges of bins over the range of `values`, or around them where they are nearly equal."""
    low, high = float(values.min()), float(values.max())
    least = 1e-3 * max(abs(low), abs(high)) or 1.0
    margin = max(0.0, least - (high - low)) / 2
    return [float(edge) for edge in np.linspace(low - margin, high + margin, BINS + 1)]


def _legend_above(ax: Axes) -> None:
    """The legend in a row above the panel, where it covers nothing."""
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, columnspacing=1, handlelength=1.4)


# Texts -----------------------------------------------------------------------------------------------------------


def _norm(run: Evaluation) -> str:
    """What is measured: the norm of the gradient, or of several outputs' Jacobian J."""
    chain, several = run.certificate.chain, run.network.n_outputs > 1
    name = "‖∇f‖" if not several else "maxᵢ ‖∇fᵢ‖" if np.isinf(chain.output_p) else "‖J‖"
    return name + SUBSCRIPT[norm_name(chain.q)]


def _interval(run: Evaluation) -> str:
    certificate = run.certificate
    text = f"{_norm(run)}: measured {below(run.measured.value)}"
    if certificate.value is not None:
        word = "exact" if certificate.method == "exact" else "certified"
        text += f" ≤ {word} {above(certificate.value, certificate.chain.target)}"
    return text
