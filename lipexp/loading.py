"""A finished run, rebuilt from its folder."""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lipexp.config import ConfigError, one_line
from lipexp.members import part
from lipexp.networks import BakedNetwork, Network
from lipexp.record import Metrics
from lipexp.runs import RunFolder


@dataclass
class LoadedRun:
    """What `lipexp.load` returns."""

    network: Network  # (B, D) -> (B, C), float32, the weights of model.pt
    baked: BakedNetwork  # the same, as lipexp measures and proves it
    config: dict[str, Any]
    metrics: Metrics
    folder: Path

    def table(self, name: str) -> pd.DataFrame:
        """One of the run's tables: `history`, `gradients`, `radii` or `layers`."""
        return RunFolder(self.folder).table(name)


def load_run(run: str | PathLike[str], trust: bool = False) -> LoadedRun:
    """See `lipexp.load`."""
    folder = RunFolder(Path(run))
    if not folder.complete:
        raise ConfigError("run", run, "is not a finished run: it has no metrics.json")
    try:
        metrics = Metrics.read(folder)
    except (OSError, ValueError) as error:
        raise ConfigError("run", run, f"has no metrics.json that can be read: {one_line(error)}") from None
    try:
        config = folder.config()
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError("run", run, f"has no configuration that can be read: {one_line(error)}") from None
    state = _state_dict(folder)
    act = part_of(config, "act", trust)
    try:
        baked = BakedNetwork.from_state_dict(state, act)
    except (ValueError, TypeError) as error:
        raise ConfigError("model.pt", folder.path / "model.pt", f"holds no such network: {error}") from None
    return LoadedRun(Network(baked), baked, config, metrics, folder.path)


def part_of(config: Mapping[str, Any], group: str, trust: bool) -> Any:
    """The object of `group` in the configuration of a run, which may come from elsewhere.

    Raises:
        ConfigError: there is none, it cannot be made, or is not trusted.
    """
    try:
        node = OmegaConf.create(dict(config)).get(group)
    except OmegaConfBaseException as error:  # such as an interpolation that leads nowhere
        raise ConfigError(group, None, f"cannot be read: {one_line(error)}") from None
    if not isinstance(node, DictConfig):
        raise ConfigError(group, node, "needs an option with a _target_")
    try:
        return part(node, group, str(node.get("_target_", "")).rpartition(".")[2], trust)
    except OmegaConfBaseException as error:
        raise ConfigError(group, None, f"cannot be read: {one_line(error)}") from None


def _state_dict(folder: RunFolder) -> dict[str, torch.Tensor]:
    """model.pt, read without running anything that a pickle may carry."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of foreign pickles before it refuses them
            state: object = torch.load(io.BytesIO(folder.model_bytes()), weights_only=True)
        if not isinstance(state, dict):
            raise ValueError(f"it holds a {type(state).__name__}")
    except (OSError, RuntimeError, LookupError, ValueError, EOFError, pickle.UnpicklingError) as error:
        reason = one_line(error)
        raise ConfigError("model.pt", folder.path / "model.pt", f"is not a plain state dict: {reason}") from None
    return state
