"""The picture of a single run: contour lines over 2-D data, the fitted curve over 1-D."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from matplotlib.figure import Figure

from lipexp.evaluate import Evaluation
from lipexp.figures.style import BLACK, BLUE, GREY, Mesh, contours, look, panels
from lipexp.measured.gradients import scan
from lipexp.norms import norm_name
from lipexp.wording import SUBSCRIPT, above, below

CURVE_POINTS = 2001


def run_figure(run: Evaluation, names: Mapping[str, str]) -> Figure | None:
    """The picture of one run: contour lines over 2-D data, the fitted curve over 1-D data, else None."""
    with look():
        if run.network.n_inputs == 2 and "accuracy" in run.test:
            return _contours(run, names)
        if run.network.n_inputs == 1 and "mse" in run.test:
            return _curve(run, names)
    return None


def _contours(run: Evaluation, names: Mapping[str, str]) -> Figure:
    """Level lines of f over the test points, the decision line f = 0 emphasised."""
    test = run.gradients["split"] == "test"
    points = np.stack([run.gradients[f"x{i}"][test] for i in range(2)], axis=1)
    mesh = Mesh(points)
    f = mesh.over(scan(run.network, torch.from_numpy(mesh.points).unsqueeze(0)).f[0].numpy())
    figure, (ax,) = panels(6.0, 3.7)
    contours(ax, points, run.gradients["y"][test] == 1, mesh, f)
    ax.set_title(f"{_subject(names)}\ntest accuracy {run.test['accuracy']:.4g}, {_interval(run)}")
    return figure


def _curve(run: Evaluation, names: Mapping[str, str]) -> Figure:
    """f against its target, and the slope of f below."""
    x = run.gradients["x0"]
    order = np.argsort(x)
    along = np.linspace(x.min(), x.max(), CURVE_POINTS)
    scanned = scan(run.network, torch.from_numpy(along.reshape(1, -1, 1)))
    figure, (above_ax, below_ax) = panels(5.0, 4.2, 2, 1, sharex=True, height_ratios=[2, 1])
    above_ax.plot(x[order], run.gradients["y"][order], color=GREY, linewidth=4, alpha=0.5, label="target")
    above_ax.plot(along, scanned.f[0].numpy(), color=BLUE, label="f")
    above_ax.set_ylabel("f(x)")
    above_ax.legend()
    below_ax.plot(along, scanned.gradient[0, :, 0].numpy(), color=BLUE)
    target = run.certificate.chain.target
    if target is not None:
        for bound in (-target, target):
            below_ax.axhline(bound, color=BLACK, linewidth=0.8, linestyle="dashed")
        below_ax.annotate(f"L = {target:g}", (x.min(), target), (2, -9), textcoords="offset points", fontsize=7)
    below_ax.set(xlabel="x", ylabel="f ′(x)")
    above_ax.set_title(f"{_subject(names)}\ntest MSE {run.test['mse']:.3g}, {_interval(run)}")
    return figure


def _subject(names: Mapping[str, str]) -> str:
    return ", ".join(names[group] for group in ("dataset", "act", "constraint", "loss"))


def _interval(run: Evaluation) -> str:
    certificate = run.certificate
    text = f"‖∇f‖{SUBSCRIPT[norm_name(certificate.chain.q)]}: measured {below(run.measured.value)}"
    if certificate.value is not None:
        word = "exact" if certificate.method == "exact" else "certified"
        text += f" ≤ {word} {above(certificate.value, certificate.chain.target)}"
    return text
