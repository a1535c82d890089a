"""A finished run, rebuilt from its folder."""

from __future__ import annotations

import io
import pickle
import warnings
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml
from omegaconf import OmegaConf

from lipexp.activations import Activation
from lipexp.config import ConfigError, instantiate, one_line
from lipexp.models import Network
from lipexp.runs import RunFolder


@dataclass
class LoadedRun:
    """What `lipexp.load` returns."""

    network: Network  # (B, D) -> (B, C), float32, the weights of model.pt
    config: dict[str, Any]
    metrics: dict[str, Any]
    folder: Path

    def table(self, name: str) -> pd.DataFrame:
        """One of the run's tables: `history`, `gradients` or `layers`."""
        return RunFolder(self.folder).table(name)


def load_run(run: str | PathLike[str], trust: bool = False) -> LoadedRun:
    """See `lipexp.load`."""
    folder = RunFolder(Path(run))
    if not folder.complete:
        raise ConfigError("run", run, "is not a finished run: it has no metrics.json")
    try:
        config = folder.config()
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError("run", run, f"has no configuration that can be read: {one_line(error)}") from None
    state = _state_dict(folder)
    act = instantiate(OmegaConf.create(config)["act"], "act", trust=trust)
    try:
        weights = [state[f"layers.{i}.weight"] for i in range((len(state) + 1) // 2)]
        shapes = [(weight.shape[0], weight.shape[1]) for weight in weights]
        network = Network(shapes, act.baked() if isinstance(act, Activation) else act)
        network.load_state_dict(state)
    except (KeyError, IndexError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError("model.pt", folder.path / "model.pt", f"holds no such network: {reason}") from None
    return LoadedRun(network.eval().requires_grad_(False), config, folder.metrics(), folder.path)


def _state_dict(folder: RunFolder) -> dict[str, torch.Tensor]:
    """model.pt, read without running anything that a pickle may carry."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of foreign pickles before it refuses them
            state: dict[str, torch.Tensor] = torch.load(io.BytesIO(folder.model_bytes()), weights_only=True)
    except (OSError, RuntimeError, LookupError, ValueError, EOFError, pickle.UnpicklingError) as error:
        reason = one_line(error)
        raise ConfigError("model.pt", folder.path / "model.pt", f"is not a plain state dict: {reason}") from None
    return state
