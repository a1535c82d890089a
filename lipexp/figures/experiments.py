"""The runs that figures are drawn from: trained by `lipexp train -m experiment=…`, kept, and read as one table."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from lipexp.config import ConfigError
from lipexp.loading import load_run
from lipexp.measured.gradients import scan
from lipexp.networks import BakedNetwork
from lipexp.record import Outcome, settings
from lipexp.runs import RunFolder, find


def train(experiment: str, folder: Path, fresh: bool) -> int:
    """Train the sweep of `experiment` in `folder`, or what it lacks; returns the exit status of `lipexp train`.

    Args:
        fresh: train all of it anew; what was there is kept beside it.
    """
    from lipexp import hydra_app
    from lipexp.sweep.compose import in_folder

    if fresh and folder.exists():
        made = time.strftime("%Y-%m-%d-%H-%M-%S", time.localtime(folder.stat().st_mtime))
        folder.rename(folder.with_name(f"{folder.name}-until-{made}"))
    where = [in_folder(folder), "resume=true"]
    return hydra_app.main(["-m", f"experiment={experiment}", *where, "hydra.launcher.table=false"])


def read(folder: Path) -> pd.DataFrame:
    """The finished runs in `folder`: their settings and results with dotted keys, and `run`, the folder.

    Raises:
        ConfigError: there is none, or one of them failed or cannot be read.
    """
    runs = find([folder])
    rows = []
    for run in runs:
        outcome = Outcome.of(run)
        if outcome.metrics is None:
            raise unreadable(run, outcome.reason)
        rows.append(settings(run) | outcome.results() | {"run": run})
    if not runs:
        raise ConfigError("runs", folder, "holds no finished run")
    return pd.DataFrame(rows)


def table(run: RunFolder, name: str) -> pd.DataFrame:
    """One of a run's tables; ConfigError if the file is missing or not whole."""
    try:
        return run.table(name)
    except (OSError, ValueError) as error:
        raise unreadable(run, " ".join(str(error).split())) from None


def unreadable(run: RunFolder, reason: str) -> ConfigError:
    return ConfigError("runs", run.path, f"cannot be used ({reason}); --fresh trains them anew")


def loaded(run: RunFolder) -> BakedNetwork:
    """The network of a run."""
    return load_run(run.path, trust=True).baked


def evaluated(run: RunFolder, points: npt.NDArray[np.float64]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """f (N,) and its gradient (N, D) at points (N, D), in float64, from the run's model.pt."""
    scanned = scan(loaded(run), torch.from_numpy(points).unsqueeze(0))
    return scanned.f[0, :, 0].numpy(), scanned.gradient[0, :, 0].numpy()
