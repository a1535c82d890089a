"""The picture of a single run: contour lines over 2-D data, the fitted curve over 1-D."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn

from lipexp.certificates import norm_name
from lipexp.evaluate import Record
from lipexp.figures.style import BLACK, BLUE, GREY, Mesh, contours, look, panels
from lipexp.measures import scan
from lipexp.models import Layer, run_layers
from lipexp.wording import SUBSCRIPT, above, below

CURVE_POINTS = 2001


def run_figure(
    layers: Sequence[Layer], act: nn.Module, run: int, record: Record, names: Mapping[str, str]
) -> Figure | None:
    """The picture of one run: contour lines over 2-D data, the fitted curve over 1-D data, else None."""
    layers = run_layers(layers, run)
    dims = layers[0].weight.shape[2]
    with look():
        if dims == 2 and "accuracy" in record.test:
            return _contours(layers, act, record, names)
        if dims == 1:
            return _curve(layers, act, record, names)
    return None


def _contours(layers: Sequence[Layer], act: nn.Module, record: Record, names: Mapping[str, str]) -> Figure:
    """Level lines of f over the test points, the decision line f = 0 emphasised."""
    test = record.gradients["split"] == "test"
    points = np.stack([record.gradients[f"x{i}"][test] for i in range(2)], axis=1)
    mesh = Mesh(points)
    f = mesh.over(scan(layers, act, torch.from_numpy(mesh.points).unsqueeze(0)).f[0].numpy())
    figure, (ax,) = panels(6.0, 3.7)
    contours(ax, points, record.gradients["y"][test] == 1, mesh, f)
    ax.set_title(f"{_subject(names)}\ntest accuracy {record.test['accuracy']:.4g}, {_interval(record)}")
    return figure


def _curve(layers: Sequence[Layer], act: nn.Module, record: Record, names: Mapping[str, str]) -> Figure:
    """f against its target, and the slope of f below."""
    x = record.gradients["x0"]
    order = np.argsort(x)
    along = np.linspace(x.min(), x.max(), CURVE_POINTS)
    scanned = scan(layers, act, torch.from_numpy(along.reshape(1, -1, 1)))
    figure, (above_ax, below_ax) = panels(5.0, 4.2, 2, 1, sharex=True, height_ratios=[2, 1])
    above_ax.plot(x[order], record.gradients["y"][order], color=GREY, linewidth=4, alpha=0.5, label="target")
    above_ax.plot(along, scanned.f[0].numpy(), color=BLUE, label="f")
    above_ax.set_ylabel("f(x)")
    above_ax.legend()
    below_ax.plot(along, scanned.gradient[0, :, 0].numpy(), color=BLUE)
    target = record.certificate.target
    if target is not None:
        for bound in (-target, target):
            below_ax.axhline(bound, color=BLACK, linewidth=0.8, linestyle="dashed")
        below_ax.annotate(f"L = {target:g}", (x.min(), target), (2, -9), textcoords="offset points", fontsize=7)
    below_ax.set(xlabel="x", ylabel="f ′(x)")
    above_ax.set_title(f"{_subject(names)}\ntest MSE {record.test['mse']:.3g}, {_interval(record)}")
    return figure


def _subject(names: Mapping[str, str]) -> str:
    return ", ".join(names[group] for group in ("dataset", "act", "constraint", "loss"))


def _interval(record: Record) -> str:
    certificate = record.certificate
    text = f"‖∇f‖{SUBSCRIPT[norm_name(certificate.q)]}: measured {below(record.measured.value)}"
    if certificate.value is not None:
        word = "exact" if certificate.method == "exact" else "certified"
        text += f" ≤ {word} {above(certificate.value, certificate.target)}"
    return text
