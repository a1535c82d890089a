"""`lipexp bench predict`: predicting a large table, against pandas alone reading it and writing it again."""

from __future__ import annotations

import resource
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Console

from lipexp.bench.steps import LIPEXP, command
from lipexp.bench.timing import Case, table, take_turns

ROWS, COLUMNS = 2_000_000, 30
COPY = "import sys, pandas; pandas.read_csv(sys.argv[1]).to_csv(sys.argv[2], index=False)"
TARGET = 3.0  # times as long as pandas alone


def predict(console: Console, rounds: int) -> None:
    """One round, whatever `rounds` says: a minute or two."""
    with tempfile.TemporaryDirectory(prefix="lipexp-bench-") as folder:
        file = Path(folder) / "large.csv"
        rng = np.random.default_rng(0)
        names = [f"column{i}" for i in range(COLUMNS)]
        for start in range(0, ROWS, ROWS // 20):
            frame = pd.DataFrame(rng.normal(size=(ROWS // 20, COLUMNS)).round(6), columns=names)
            frame["y"] = (frame.sum(axis=1) > 0).astype(int)
            frame.to_csv(file, index=False, header=start == 0, mode="a")
            if start == 0:
                frame.head(2000).to_csv(Path(folder) / "small.csv", index=False)
        small = ("dataset=table", "dataset.path=small.csv", "dataset.target=y", "steps=200", "hydra.run.dir=run")
        command(folder, LIPEXP, "train", *small)()
        ours = command(folder, LIPEXP, "predict", "run", str(file), "-o", "predictions.csv", "--force")
        ours()  # alone, so that the largest child so far is it
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
        cases = [
            Case("pandas reads and writes", command(folder, sys.executable, "-c", COPY, str(file), "copy.csv")),
            Case("lipexp predict", ours, TARGET),
        ]
        take_turns(cases, rounds=1, calls=1, warm_up=0)
        console.print(table(f"{ROWS:,} rows of {COLUMNS} columns", cases, clock="wall"))
        console.print(f"lipexp predict takes {peak:.2f} GB of memory at most")
