"""The claims that the figures illustrate, what counts as holding them, and the verdicts.

Every threshold stands here. A figure measures from its run folders and asks for a verdict by the claim's name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
from rich.table import Table
from rich.text import Text

from lipexp.runs import write_file


@dataclass(frozen=True)
class Threshold:
    """The values, ends included, with which a claim holds."""

    least: float = -math.inf
    most: float = math.inf

    def holds(self, value: float) -> bool:
        return self.least <= value <= self.most

    def __str__(self) -> str:
        if math.isinf(self.least):
            return f"≤ {self.most:.6g}"
        if math.isinf(self.most):
            return f"≥ {self.least:.6g}"
        return f"{self.least:.6g} to {self.most:.6g}" if self.least < self.most else f"= {self.least:.6g}"


def at_least(value: float) -> Threshold:
    return Threshold(least=value)


def at_most(value: float) -> Threshold:
    return Threshold(most=value)


REACHED = 0.98  # of a ceiling, when training has come within 2 % of it


def around(value: float) -> Threshold:
    """Within 2 % of `value`: a score on finitely many samples can lie a little above its ceiling."""
    return Threshold(value * REACHED, value * (2 - REACHED))


# What ReLU can reach with 1 and 2 hidden layers under `spectral`; 1/2 is the ceiling at any depth under `linf`.
RELU_CEILING = {1: 1 / 2, 2: 1 / math.sqrt(3)}
BOUND = "1 runs with measured ≤ certified ≤ L, share"
THRESHOLDS = {
    BOUND: Threshold(1, 1),
    "2 |x|, ReLU, linf: half the range of f′, largest at any depth": at_most(RELU_CEILING[1]),
    "2 |x|, ReLU, spectral, 1 hidden layer: half the range of f′, smallest": at_least(REACHED * RELU_CEILING[1]),
    "2 |x|, ReLU, spectral, 1 hidden layer: half the range of f′, largest": at_most(RELU_CEILING[1]),
    "2 |x|, ReLU, spectral, 2 hidden layers: half the range of f′, median": at_least(REACHED * RELU_CEILING[2]),
    "2 |x|, ReLU, spectral, 2 hidden layers: half the range of f′, largest": at_most(RELU_CEILING[2]),
    "2 |x|, ReLU, spectral: its least rise from one depth to the next": at_least(0),
    "2 |x|, ReLU, spectral, 10 hidden layers: half the range of f′, largest": at_most(0.85),
    "2 |x|, ReLU, 2 hidden layers: test MSE, smallest": at_least(1e-2),
    "3 |x|, GroupSort, linf: test MSE, largest": at_most(1e-8),
    "3 |x|, GroupSort, spectral: test MSE, median": at_most(1e-6),
    "4 GroupSort only permutes: outputs that hold their input's numbers, share": Threshold(1, 1),
    "4 before training, GroupSort: gradient norm at hidden layers, smallest median": at_least(1 - 1e-3),
    "4 before training, GroupSort: gradient norm at hidden layers, largest median": at_most(1 + 1e-3),
    "4 before training, ReLU: the factor of a layer, smallest": at_least(0.6),
    "4 before training, ReLU: the factor of a layer, largest": at_most(0.8),
    "4 trained, ReLU: median ‖∇f‖ at depth 10 over that at depth 2": at_most(0.5),
    "4 trained, GroupSort: median ‖∇f‖ over L at any depth, smallest": at_least(0.5),
    "4 trained, GroupSort over ReLU: median ‖∇f‖ at any depth, smallest ratio": at_least(1),
    "5 L = 1, cross-entropy, spectral: test accuracy, mean": Threshold(0.85, 0.94),
    "5 L = 1, cross-entropy, linf: test accuracy, mean": Threshold(0.85, 0.94),
    "6 L = 1, hinge: test accuracy, worst run": at_least(0.999),
    "6 hinge at any L: test accuracy, worst run": at_least(0.999),
    "7 no constraint, cross-entropy: test accuracy, worst run": at_least(0.999),
    "8 1-D, GroupSort, all constraints: share of the optimum, smallest": at_least(0.999),
    "8 1-D, ReLU, spectral: share of the optimum, median": around(RELU_CEILING[2]),
    "8 1-D, ReLU, linf: share of the optimum, median": around(RELU_CEILING[1]),
    "8 three cones, GroupSort: share of the optimum, median under the worst constraint and norm": at_least(0.90),
    "8 three cones, Cayley, full sort: share of the optimum, smallest": at_least(0.97),
    "8 128-D cone, orthogonal, full sort: share of the optimum, smallest": at_least(0.97),
    "8 128-D cone, spectral, full sort: share of the optimum, smallest": at_least(0.90),
    "8 128-D cone, linf: share of what its first layer allows, smallest": at_least(0.8),
    "8 GroupSort over ReLU: share of the optimum, smallest ratio": at_least(1),
    "9 best on validation is an activation that can keep the gradient norm, share": at_least(0.75),
}


@dataclass(frozen=True)
class Verdict:
    """One line of the table: a claim, what was measured, and whether it holds."""

    figure: str
    claim: str
    measured: float | None  # None: nothing that could be compared
    threshold: str
    holds: bool


def verdict(claim: str, measured: float, figure: str = "") -> Verdict:
    """The verdict on one of THRESHOLDS; a claim does not hold if `measured` is NaN."""
    threshold = THRESHOLDS[claim]
    known = None if math.isnan(measured) else float(measured)
    return Verdict(figure, claim, known, str(threshold), known is not None and threshold.holds(known))


def bound_verdict(runs: Sequence[pd.DataFrame]) -> Verdict:
    """Claim 1 for all runs of a figure: an exact comparison of the recorded numbers."""
    every = pd.concat(runs)
    measured, certified = every["lipschitz.measured"], every["lipschitz.certified"]
    target = every["lipschitz.target"].astype(float).fillna(math.inf)  # without a constraint there is no L
    return verdict(BOUND, float(((measured <= certified) & (certified <= target)).mean()))


def write(file: Path, verdicts: Sequence[Verdict]) -> None:
    """Put `verdicts` into claims.json, in place of what it says of the same figures."""
    drawn = {one.figure for one in verdicts}
    try:
        earlier = [entry for entry in json.loads(file.read_text()) if entry["figure"] not in drawn]
    except (OSError, ValueError, TypeError, KeyError):  # none yet, or not ours
        earlier = []
    entries = sorted(earlier + [asdict(one) for one in verdicts], key=lambda entry: entry["claim"])
    text = json.dumps(entries, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_file(file, lambda path: path.write_text(text))


def table(verdicts: Sequence[Verdict]) -> Table:
    """The verdicts of one figure."""
    rows = Table(box=None, show_edge=False, pad_edge=False, header_style="bold")
    rows.add_column("claim")
    for name in ("measured", "threshold", ""):
        rows.add_column(name, justify="right", no_wrap=True)
    for one in verdicts:
        measured = "?" if one.measured is None else f"{one.measured:.6g}"
        holds = Text("holds") if one.holds else Text("DOES NOT HOLD", style="bold")
        rows.add_row(Text(one.claim), measured, one.threshold, holds)
    return rows
