"""The picture of a single run: contour lines over 2-D classes, the curve over 1-D data, else distributions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lipexp.evaluate import Evaluation
from lipexp.figures.style import BLACK, BLUE, CLASS_COLOURS, GREY, ORANGE, PAGE, Mesh, contours, look, panels
from lipexp.measured.gradients import scan
from lipexp.norms import norm_name
from lipexp.wording import SUBSCRIPT, above, below

CURVE_POINTS = 2001
BINS = 40


def run_figure(run: Evaluation, names: Mapping[str, str]) -> Figure:
    """The picture of one run, of its test points."""
    test = run.gradients["split"] == "test"
    points = {name: column[test] for name, column in run.gradients.items()}
    classes = np.issubdtype(points["y"].dtype, np.integer)
    with look():
        if run.network.n_inputs == 2 and classes:
            figure = _contours(run, points)
        elif run.network.n_inputs == 1:
            figure = _curve(run, points, classes)
        else:
            figure = _distributions(run, points, classes)
        scores = run.scores["test"]
        metric = next(key for key in scores if key != "loss")
        subject = ", ".join(names[group] for group in ("dataset", "act", "constraint", "loss"))
        figure.suptitle(f"{subject}\ntest {metric} {scores[metric]:.4g}, {_interval(run)}", fontsize=8.5)
        figure.draw_without_rendering()  # axes of equal scale find their place in a second pass of the layout
    return figure


Columns = Mapping[str, npt.NDArray[Any]]  # those of gradients.csv


def _contours(run: Evaluation, points: Columns) -> Figure:
    """Level lines of f over the points, the line f = 0 emphasised."""
    x = np.stack([points[f"x{i}"] for i in range(2)], axis=1)
    mesh = Mesh(x)
    f = mesh.over(scan(run.network, torch.from_numpy(mesh.points).unsqueeze(0)).f[0, :, 0].numpy())
    wide, high = np.ptp(x, axis=0)
    figure, (ax,) = panels(6.0, float(np.clip(5.3 * high / wide if wide else 6, 1.2, 5.2)) + 0.85)
    contours(ax, x, points["y"] == 1, mesh, f)
    return figure


def _curve(run: Evaluation, points: Columns, classes: bool) -> Figure:
    """f, with its targets or with the points of both classes, and the slope of f below."""
    x = points["x0"]
    along = np.linspace(x.min(), x.max(), CURVE_POINTS)
    scanned = scan(run.network, torch.from_numpy(along.reshape(1, -1, 1)))
    figure, (above_ax, below_ax) = panels(5.0, 4.2, 2, 1, sharex=True, height_ratios=[2, 1])
    if classes:
        for y, colour in enumerate(CLASS_COLOURS):
            own = points["y"] == y
            above_ax.plot(x[own], points["f"][own], "o", color=colour, markersize=3.5, label=f"class {y}")
    else:
        order = np.argsort(x)
        above_ax.plot(x[order], points["y"][order], color=GREY, linewidth=4, alpha=0.5, label="target")
    above_ax.plot(along, scanned.f[0, :, 0].numpy(), color=BLACK if classes else BLUE, label="f")
    above_ax.set_ylabel("f(x)")
    above_ax.legend()
    below_ax.plot(along, scanned.gradient[0, :, 0, 0].numpy(), color=BLUE)
    target = run.certificate.chain.target
    for bound in () if target is None else (-target, target):
        below_ax.axhline(bound, color=BLACK, linewidth=0.8, linestyle="dashed", label=f"±L = ±{target:g}")
    if target is not None:
        below_ax.legend(*(part[:1] for part in below_ax.get_legend_handles_labels()), loc="upper left")
        below_ax.set_ylim(-1.6 * target, 1.6 * target)
    below_ax.set(xlabel="x", ylabel="f ′(x)")
    return figure


def _distributions(run: Evaluation, points: Columns, classes: bool) -> Figure:
    """f by class or against its targets, the gradient norms, and the certified radii where there are some."""
    robustness = run.robustness
    radii = None if robustness is None or robustness.columns is None else robustness.of("test")
    figure, (f_ax, gradient_ax, *rest) = panels(PAGE, 2.3, 1, 2 if radii is None else 3)
    y, f = points["y"], points["f"]
    if classes:
        for one, colour in enumerate(CLASS_COLOURS):
            f_ax.hist(f[y == one], _bins(f), color=colour, alpha=0.6, label=f"class {one}")
        f_ax.set(xlabel="f(x)", ylabel="test points")
        f_ax.ticklabel_format(axis="x", useOffset=False)
        _legend_above(f_ax)
    else:
        ends = [min(y.min(), f.min()), max(y.max(), f.max())]
        f_ax.plot(ends, ends, color=GREY, linewidth=0.8)
        f_ax.plot(y, f, "o", color=BLUE, markersize=2, alpha=0.5, markeredgewidth=0)
        f_ax.set(xlabel="target", ylabel="f(x)")
    q = norm_name(run.certificate.chain.q)
    steepness = points[f"grad_{q}"]
    gradient_ax.hist(steepness, _bins(steepness), color=BLUE, alpha=0.6)
    marks = {
        "measured": (run.measured.value, "solid", ORANGE),
        "certified": (run.certificate.value, "dashed", GREY),
    }
    for name, (value, style, colour) in (marks | {"L": (run.certificate.chain.target, "dotted", BLACK)}).items():
        if value is not None:
            gradient_ax.axvline(value, color=colour, linestyle=style, label=name)
    gradient_ax.set(xlabel=f"‖∇f‖{SUBSCRIPT[q]}", ylabel="test points", xlim=(0, None))
    _legend_above(gradient_ax)
    if radii is not None:
        (ax,) = rest
        held = np.sort(radii["radius"][(radii["correct"] == 1) & (radii["radius"] > 0)])
        share = np.arange(len(held), -1, -1) / len(radii["radius"])
        finite = int(np.isfinite(held).sum())  # a constant f leaves every point its class, however far it moves
        ax.step([0, *held[:finite]], [share[0], *share[:finite]], where="pre", color=BLUE)
        ax.set(xlabel=f"radius, ‖δ‖{SUBSCRIPT[norm_name(run.certificate.chain.p)]}", ylabel="certified accuracy")
        ax.set_ylim(0, 1.03)
    return figure


def _bins(values: npt.NDArray[Any]) -> list[float]:
    """The edges of bins over the range of `values`, or around them where they are nearly equal."""
    low, high = float(values.min()), float(values.max())
    least = 1e-3 * max(abs(low), abs(high)) or 1.0
    margin = max(0.0, least - (high - low)) / 2
    return [float(edge) for edge in np.linspace(low - margin, high + margin, BINS + 1)]


def _legend_above(ax: Axes) -> None:
    """The legend in a row above the panel, where it covers nothing."""
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, columnspacing=1, handlelength=1.4)


def _interval(run: Evaluation) -> str:
    certificate = run.certificate
    text = f"‖∇f‖{SUBSCRIPT[norm_name(certificate.chain.q)]}: measured {below(run.measured.value)}"
    if certificate.value is not None:
        word = "exact" if certificate.method == "exact" else "certified"
        text += f" ≤ {word} {above(certificate.value, certificate.chain.target)}"
    return text
