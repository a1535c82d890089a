"""The runs that figures are drawn from: trained by `lipexp train -m experiment=…`, kept, and read as one table."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from lipexp.config import ConfigError
from lipexp.loading import load_run
from lipexp.measures import scan
from lipexp.models import Layer
from lipexp.runs import RunFolder, find, flat


def train(experiment: str, folder: Path, fresh: bool) -> int:
    """Train the sweep of `experiment` in `folder`, or what it lacks; returns the exit status of `lipexp train`.

    Args:
        fresh: train all of it anew; what was there is kept beside it.
    """
    from lipexp import hydra_app

    if fresh and folder.exists():
        made = time.strftime("%Y-%m-%d-%H-%M-%S", time.localtime(folder.stat().st_mtime))
        folder.rename(folder.with_name(f"{folder.name}-until-{made}"))
    where = [f"hydra.sweep.dir={folder}", "resume=true"]
    how = ["hydra.launcher.executor=process", "hydra.launcher.table=false"]
    return hydra_app.main(["-m", f"experiment={experiment}", *where, *how])


def read(folder: Path) -> pd.DataFrame:
    """The finished runs in `folder`: their settings and metrics with dotted keys, and `run`, the folder.

    Raises:
        ConfigError: there is none, or one of them failed.
    """
    runs = find([folder])
    failed = [run for run in runs if not run.complete]
    if failed or not runs:
        raise ConfigError("runs", folder, f"{failed[0].path} failed" if failed else "holds no finished run")
    return pd.DataFrame([_row(run) for run in runs])


def _row(run: RunFolder) -> dict[str, Any]:
    try:
        return run.settings() | flat(run.metrics()) | {"run": run}
    except (OSError, ValueError) as error:
        raise unreadable(run, error) from None


def table(run: RunFolder, name: str) -> pd.DataFrame:
    """One of a run's tables; ConfigError if the file is missing or not whole."""
    try:
        return run.table(name)
    except (OSError, ValueError) as error:
        raise unreadable(run, error) from None


def unreadable(run: RunFolder, error: Exception) -> ConfigError:
    reason = " ".join(str(error).split())
    return ConfigError("runs", run.path, f"cannot be read ({reason}); --fresh trains them anew")


def evaluated(run: RunFolder, points: npt.NDArray[np.float64]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """f (N,) and its gradient (N, D) at points (N, D), in float64, from the run's model.pt."""
    network = load_run(run.path, trust=True).network
    layers = [
        Layer(layer.weight.unsqueeze(0), layer.bias.view(1, 1, -1)) for layer in linear_layers(network.layers)
    ]
    scanned = scan(layers, network.act, torch.from_numpy(points).unsqueeze(0))
    return scanned.f[0].numpy(), scanned.gradient[0].numpy()


def linear_layers(layers: torch.nn.ModuleList) -> Sequence[torch.nn.Linear]:
    return [layer for layer in layers if isinstance(layer, torch.nn.Linear)]
