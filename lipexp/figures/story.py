"""What a figure is: the experiments it needs, how it is drawn from their runs, and what it claims."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pandas as pd
from matplotlib.figure import Figure
from rich.table import Table

from lipexp.figures.claims import Verdict

Runs = Mapping[str, pd.DataFrame]  # experiment -> its runs, one a row


@dataclass(frozen=True)
class Summary:
    """A figure in numbers and words."""

    short: Table  # for the screen
    full: Table  # to be pasted
    sentences: list[str]


@dataclass(frozen=True)
class Story:
    """One figure."""

    experiments: tuple[str, ...]  # of conf/experiment/
    draw: Callable[[Runs], Figure]
    judge: Callable[[Runs], list[Verdict]]
    summary: Callable[[Runs], Summary] | None = None
