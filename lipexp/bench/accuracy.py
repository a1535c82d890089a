"""`lipexp bench accuracy`: test scores on real data, against the same network without a bound and scikit-learn.

All learn from the same rows, those of the runs' seeds, standardised where the dataset is. Each has its settings
chosen by the mean score on validation: the experiments by the search of 12 or 30 trials that their files tell, the
others by the shorter grids below. No choice looks at test scores. But the splits of different seeds share rows: a
validation row of one seed can be a test row of another, for all models alike.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from sklearn.base import clone
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.linear_model import LogisticRegression, Ridge
from threadpoolctl import threadpool_limits

from lipexp.bench.steps import LIPEXP, command
from lipexp.datasets import Data
from lipexp.loading import LoadedRuns, load, part_of
from lipexp.loop import Streams
from lipexp.members import drawn
from lipexp.wording import above

# experiment -> the distance at which its accuracy is certified
RADII = {"breast_cancer": "0.5", "wine": "0.5", "digits": "0.25", "diabetes": None}
AIMS = {"accuracy": 0.01, "r2": 0.02}  # how much less than the best of the others is still well
OWN, FREE, LINEAR, TREES = "lipexp", "without a bound", "linear", "boosted trees"
RATES = "0.001,0.003,0.01,0.03,0.1"  # of the optimiser without a bound, over the range of the searches
STRENGTHS = (100.0, 10.0, 1.0, 0.1, 0.01)  # of a linear model, alpha or 1 / C; of equals the strongest is taken
TREE_RATES = (0.03, 0.1, 0.3)  # learning rates; 0.1 is scikit-learn's default

LEGEND = (
    "Means over seeds, each with a split of its own, ± the standard error; accuracies in per cent. The "
    "difference is that to the best of the others, seed by seed. Without a bound: the same network, loss and "
    "steps, its learning rate chosen on validation. Linear: logistic regression, ridge regression for diabetes. "
    "Certified: the accuracy that is proven within that distance of each point; for diabetes, how much the "
    "output can change per unit. Units are standard deviations of the training rows; for digits, the range of a "
    "pixel."
)


class Estimator(Protocol):
    """What is used of scikit-learn's models: `score` is the accuracy or r2."""

    def fit(self, x: Any, y: Any) -> Any: ...
    def score(self, x: Any, y: Any) -> float: ...


@dataclass
class Compared:
    """The test scores on one dataset, one a seed, and what is proven of lipexp's."""

    name: str
    metric: str  # accuracy or r2
    scores: dict[str, list[float]]  # OWN and the others -> their scores, seed by seed
    certified: str

    @property
    def best(self) -> str:
        """Which of the others has the largest mean."""
        return max((name for name in self.scores if name != OWN), key=lambda n: statistics.fmean(self.scores[n]))

    @property
    def differences(self) -> list[float]:
        """What lipexp's scores are above those of the best of the others, seed by seed."""
        return [a - b for a, b in zip(self.scores[OWN], self.scores[self.best], strict=True)]

    @property
    def met(self) -> bool:
        """Whether lipexp's mean is at most the aim below that of the best of the others."""
        return statistics.fmean(self.differences) >= -AIMS[self.metric]

    def shown(self, values: Sequence[float], sign: str = "") -> str:
        """The mean and its standard error."""
        scale, digits = (100, 1) if self.metric == "accuracy" else (1, 3)
        if sign:
            digits += self.metric == "accuracy"  # so that a miss by a hair does not look like the aim itself
        mean = f"{scale * statistics.fmean(values):{sign}.{digits}f}".replace("-", "−")
        return mean if len(values) < 2 else f"{mean} ± {scale * standard_error(values):.{digits}f}"


def accuracy(console: Console, rounds: int) -> None:
    """The experiments on real data; takes minutes."""
    with tempfile.TemporaryDirectory(prefix="lipexp-bench-") as folder:
        found = [compared(Path(folder), name, radius) for name, radius in RADII.items()]
    console.print(table(found))
    console.print(LEGEND)


def compared(folder: Path, name: str, radius: str | None, settings: Sequence[str] = ()) -> Compared:
    """Train an experiment, and what it is compared with.

    Args:
        folder: receives the runs.
        radius: one of the experiment's own, or None for a regression.
        settings: further overrides, of both networks.
    """
    experiment = (f"experiment={name}", *settings)
    own = trained(folder / name, *experiment)
    free = trained(folder / f"{name}-free", *experiment, "constraint=none", f"optim.lr={RATES}")
    metric = "accuracy" if radius else "r2"
    scores = {OWN: own.table[f"test.{metric}"].tolist(), FREE: chosen_on_validation(free.table, metric)}
    data = [data_of(run.config) for run in own]
    with threadpool_limits(1):  # on a busy machine the threads of boosted trees mostly wait for each other
        scores |= {kind: best_of(models, data) for kind, models in peers(regression=radius is None).items()}
    if radius is None:
        certified = f"{above(own.table['lipschitz.certified'].mean(), None, digits=3)} a unit"
    else:
        fraction = own.table[f"robustness.test.certified_accuracy.{radius}"].mean()
        certified = f"{100 * fraction:.1f} at {radius}"
    return Compared(name, metric, scores, certified)


def trained(folder: Path, *overrides: str) -> LoadedRuns:
    """The runs of a sweep, in the order of their seeds."""
    command(str(folder.parent), LIPEXP, "train", "-m", *overrides, f"hydra.sweep.dir={folder}")()
    runs = load(folder)
    assert isinstance(runs, LoadedRuns)
    runs.table = runs.table.sort_values("seed", kind="stable", ignore_index=True)
    return runs


def chosen_on_validation(runs: pd.DataFrame, metric: str) -> list[float]:
    """The test scores, in the order of the seeds, of the learning rate with the best mean on validation."""
    best = runs.groupby("optim.lr")[f"val.{metric}"].mean().idxmax()
    return runs[runs["optim.lr"] == best][f"test.{metric}"].tolist()


def data_of(config: Mapping[str, Any]) -> Data:
    """The data that a run has learnt from, drawn again from its seed."""
    return drawn(part_of(config, "dataset", trust=False), Streams.of(config["seed"]).data, "dataset")


def peers(regression: bool) -> dict[str, list[Estimator]]:
    """scikit-learn's models, with the settings among which validation chooses."""
    if regression:
        trees = [HistGradientBoostingRegressor(learning_rate=rate, random_state=0) for rate in TREE_RATES]
        return {LINEAR: [Ridge(alpha=alpha) for alpha in STRENGTHS], TREES: trees}
    trees = [HistGradientBoostingClassifier(learning_rate=rate, random_state=0) for rate in TREE_RATES]
    return {LINEAR: [LogisticRegression(C=1 / s, max_iter=5000) for s in STRENGTHS], TREES: trees}


def best_of(models: Sequence[Estimator], data: Sequence[Data]) -> list[float]:
    """The test scores, one a split, of the model with the best mean on validation; each is fitted anew a split."""

    def scores(model: Estimator) -> list[tuple[float, float]]:
        fitted = [(clone(model).fit(each.train_x, each.train_y), each) for each in data]
        return [(m.score(each.val_x, each.val_y), m.score(each.test_x, each.test_y)) for m, each in fitted]

    best = max(map(scores, models), key=lambda found: np.mean([val for val, _ in found]))
    return [test for _, test in best]


def standard_error(values: Sequence[float]) -> float:
    """That of the mean: the standard deviation of the values over the root of their number."""
    return statistics.stdev(values) / len(values) ** 0.5


def table(found: Sequence[Compared]) -> Table:
    """One column a dataset, one row for each way to learn it, and the difference to the best of the others."""
    out = Table(box=None, pad_edge=False, header_style="bold")
    out.add_column(f"{len(found[0].scores[OWN])} seeds", no_wrap=True)
    for each in found:
        out.add_column(f"{escape(each.name)}\n{each.metric}", justify="right", no_wrap=True)
    for row in found[0].scores:
        out.add_row(row, *(each.shown(each.scores[row]) for each in found))
    out.add_row("difference", *(each.shown(each.differences, "+") for each in found))
    aims = (f"≥ −{100 * AIMS[e.metric]:g}" if e.metric == "accuracy" else f"≥ −{AIMS[e.metric]:g}" for e in found)
    verdicts = ("met" if each.met else "[bold]missed[/bold]" for each in found)
    out.add_row("aim", *(f"{aim}  {verdict}" for aim, verdict in zip(aims, verdicts, strict=True)))
    out.add_row("certified", *(each.certified for each in found))
    return out
