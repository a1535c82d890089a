"""Pictures of runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

from lipexp.display import SUBSCRIPT, above, below
from lipexp.evaluate import Record, norm_name
from lipexp.measures import scan
from lipexp.models import Layer, run_layers

# Okabe and Ito's palette, told apart with any colour vision.
BLUE, ORANGE, BLACK, GREY = "#0072B2", "#E69F00", "#222222", "#8a8a8a"
CONTOUR_POINTS = 201
CURVE_POINTS = 2001


def run_figure(
    layers: Sequence[Layer], act: nn.Module, run: int, record: Record, names: Mapping[str, str]
) -> Figure | None:
    """The picture of one run: contour lines over 2-D data, the fitted curve over 1-D data, else None."""
    layers = run_layers(layers, run)
    dims = layers[0].weight.shape[2]
    if dims == 2 and "accuracy" in record.test:
        return _contours(layers, act, record, names)
    if dims == 1:
        return _curve(layers, act, record, names)
    return None


def _contours(layers: Sequence[Layer], act: nn.Module, record: Record, names: Mapping[str, str]) -> Figure:
    """Level lines of f over the test points, the decision line f = 0 emphasised."""
    test = record.gradients["split"] == "test"
    points = np.stack([record.gradients[f"x{i}"][test] for i in range(2)], axis=1)
    label = record.gradients["y"][test] == 1
    low, high = points.min(axis=0), points.max(axis=0)
    margin = 0.06 * (high - low)
    axes_values = [np.linspace(a, b, CONTOUR_POINTS) for a, b in zip(low - margin, high + margin, strict=True)]
    mesh = np.stack(np.meshgrid(*axes_values), axis=-1)  # (rows, columns, 2)
    f = scan(layers, act, torch.from_numpy(mesh.reshape(1, -1, 2))).f.view(mesh.shape[:2]).numpy()

    figure = Figure(figsize=(6.4, 3.9), dpi=150, layout="constrained")
    ax: Axes = figure.add_subplot()
    for inside, colour in ((~label, BLUE), (label, ORANGE)):
        ax.scatter(points[inside, 0], points[inside, 1], s=7, color=colour, alpha=0.45, linewidths=0)
    for levels, width, colour in ((_levels(f), 0.9, GREY), ([0.0], 2.2, BLACK)):
        drawn = [level for level in levels if f.min() < level < f.max()]
        if drawn:
            lines = ax.contour(*axes_values, f, drawn, linewidths=width, colors=colour, linestyles="solid")
            ax.clabel(lines, fontsize=8, fmt="%g", colors=BLACK)
    ax.set(aspect="equal", xlabel="$x_0$", ylabel="$x_1$")
    ax.set_title(
        f"{_subject(names)}\ntest accuracy {record.test['accuracy']:.4g}, {_interval(record)}", fontsize=9
    )
    return figure


def _levels(f: np.ndarray) -> list[float]:
    """Some twelve round levels over the range of f, without 0, which is drawn by itself."""
    from matplotlib.ticker import MaxNLocator

    return [float(v) for v in MaxNLocator(12).tick_values(f.min(), f.max()) if abs(v) > 1e-12 * np.abs(f).max()]


def _curve(layers: Sequence[Layer], act: nn.Module, record: Record, names: Mapping[str, str]) -> Figure:
    """f against its target, and the slope of f below."""
    x = record.gradients["x0"]
    order = np.argsort(x)
    along = np.linspace(x.min(), x.max(), CURVE_POINTS)
    scanned = scan(layers, act, torch.from_numpy(along.reshape(1, -1, 1)))
    figure = Figure(figsize=(6.4, 5.2), dpi=150, layout="constrained")
    above_ax, below_ax = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    above_ax.plot(x[order], record.gradients["y"][order], color=GREY, linewidth=4, alpha=0.5, label="target")
    above_ax.plot(along, scanned.f[0].numpy(), color=BLUE, linewidth=1.5, label="f")
    above_ax.set_ylabel("f(x)")
    above_ax.legend(frameon=False)
    below_ax.plot(along, scanned.gradients[0][0, :, 0].numpy(), color=BLUE, linewidth=1.2)
    target = record.certificate.target
    if target is not None:
        for bound in (-target, target):
            below_ax.axhline(bound, color=BLACK, linewidth=0.8, linestyle="dashed")
        below_ax.annotate(f"L = {target:g}", (x.min(), target), (2, -11), textcoords="offset points", fontsize=8)
    below_ax.set(xlabel="x", ylabel="f ′(x)")
    above_ax.set_title(f"{_subject(names)}\ntest MSE {record.test['mse']:.3g}, {_interval(record)}", fontsize=9)
    return figure


def _subject(names: Mapping[str, str]) -> str:
    return ", ".join(names[group] for group in ("dataset", "act", "constraint", "loss"))


def _interval(record: Record) -> str:
    certificate = record.certificate
    text = f"‖∇f‖{SUBSCRIPT[norm_name(certificate.q)]}: measured {below(record.measured.value)}"
    if certificate.value is not None:
        text += f" ≤ certified {above(certificate.value, certificate.target)}"
    return text
