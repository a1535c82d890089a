"""What a figure is: the experiments it needs, how it is drawn from their runs, and what it claims."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pandas as pd
from matplotlib.figure import Figure

from lipexp.figures.claims import Verdict

Runs = Mapping[str, pd.DataFrame]  # experiment -> its runs, one a row


@dataclass(frozen=True)
class Story:
    """One figure."""

    experiments: tuple[str, ...]  # of conf/experiment/
    draw: Callable[[Runs], Figure]
    judge: Callable[[Runs], list[Verdict]]
