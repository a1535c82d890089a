"""Two moons at L = 1, the pictures of the blog post: cross-entropy misclassifies, the hinge loss does not."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lipexp.figures.claims import Verdict, verdict
from lipexp.figures.experiments import evaluated, table
from lipexp.figures.story import Runs, Story
from lipexp.figures.style import LOSS_NAME, PAGE, Mesh, contours, panels
from lipexp.wording import SUBSCRIPT, above, below

EXPERIMENT = "two_moons"
SHOWN = "spectral"  # of the constraints, with seed 0


def draw(runs: Runs, losses: tuple[str, ...]) -> Figure:
    """Level lines over the test points, one panel a loss."""
    figure, axes = panels(PAGE if len(losses) > 1 else 5.0, 3.3 if len(losses) == 1 else 2.5, 1, len(losses))
    moons = runs[EXPERIMENT]
    chosen = moons[(moons["constraint"] == SHOWN) & (moons["seed"] == 0)]
    for ax, loss in zip(axes, losses, strict=True):
        _panel(ax, chosen[chosen["loss"] == loss].iloc[0], LOSS_NAME[loss])
    return figure


def _panel(ax: Axes, run: pd.Series, loss: str) -> None:
    points = table(run["run"], "gradients")
    points = points[points["split"] == "test"]
    x = points[["x0", "x1"]].to_numpy()
    mesh = Mesh(x)
    f = mesh.over(evaluated(run["run"], mesh.points)[0])
    contours(ax, x, points["y"].to_numpy(), mesh, f, ("class 0", "class 1"))
    ax.set(xlabel="$x_0$", ylabel="$x_1$")
    word = "exact" if run["lipschitz.method"] == "exact" else "certified"
    interval = (
        f"measured {below(run['lipschitz.measured'])} ≤ "
        f"{word} {above(run['lipschitz.certified'], run['lipschitz.target'])}"
    )
    q = SUBSCRIPT[run["lipschitz.q"]]
    ax.set_title(f"{loss}: test accuracy {run['test.accuracy']:.4g}\n‖∇f‖{q}: {interval}")


def accuracies(runs: Runs, loss: str, constraint: str) -> npt.NDArray[Any]:
    """The test accuracy of each seed."""
    moons = runs[EXPERIMENT]
    return moons[(moons["loss"] == loss) & (moons["constraint"] == constraint)]["test.accuracy"].to_numpy()


def judge(runs: Runs, losses: tuple[str, ...]) -> list[Verdict]:
    """Claim 5, claim 6 at L = 1, and claim 7."""
    verdicts = []
    if "bce" in losses:
        for constraint in ("spectral", "linf"):
            claim = f"5 L = 1, cross-entropy, {constraint}: test accuracy, mean"
            verdicts.append(verdict(claim, accuracies(runs, "bce", constraint).mean()))
        free = accuracies(runs, "bce", "none")
        verdicts.append(verdict("7 no constraint, cross-entropy: test accuracy, worst run", free.min()))
    if "hinge" in losses:
        worst = min(accuracies(runs, "hinge", constraint).min() for constraint in ("spectral", "linf"))
        verdicts.append(verdict("6 L = 1, hinge: test accuracy, worst run", worst))
    return verdicts


STORIES = {
    name: Story((EXPERIMENT,), partial(draw, losses=losses), partial(judge, losses=losses))
    for name, losses in {
        "two-moons-bce": ("bce",),
        "two-moons-hinge": ("hinge",),
        "two-moons": ("bce", "hinge"),
    }.items()
}
