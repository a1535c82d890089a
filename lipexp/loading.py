"""A finished run, rebuilt from its folder."""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lipexp.activations import Activation
from lipexp.config import ConfigError, instantiate, one_line
from lipexp.models import Layer, Network
from lipexp.runs import RunFolder


@dataclass
class LoadedRun:
    """What `lipexp.load` returns."""

    network: Network  # (B, D) -> (B, C), float32, the weights of model.pt
    config: dict[str, Any]
    metrics: dict[str, Any]
    folder: Path

    def layers(self) -> list[Layer]:
        """The weights as a stack of one."""
        parts: Any = self.network.layers
        return [Layer(part.weight.detach()[None], part.bias.detach()[None, None]) for part in parts]

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
    act = part_of(config, "act", trust)
    try:
        weights = [state[f"layers.{i}.weight"] for i in range((len(state) + 1) // 2)]
        shapes = [(weight.shape[0], weight.shape[1]) for weight in weights]
        network = Network(shapes, act.baked() if isinstance(act, Activation) else act)
        network.load_state_dict(state)
        _check_layers(weights, act)
    except (KeyError, IndexError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError("model.pt", folder.path / "model.pt", f"holds no such network: {reason}") from None
    try:
        metrics = folder.metrics()
        if not isinstance(metrics, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError) as error:
        raise ConfigError("run", run, f"has no metrics.json that can be read: {one_line(error)}") from None
    return LoadedRun(network.eval().requires_grad_(False), config, metrics, folder.path)


def part_of(config: Mapping[str, Any], group: str, trust: bool) -> Any:
    """The object of `group` in the configuration of a run, which may come from elsewhere.

    Raises:
        ConfigError: there is none, it cannot be made, or is not trusted.
    """
    try:
        node = OmegaConf.create(dict(config)).get(group)
        if not isinstance(node, DictConfig):
            raise ConfigError(group, node, "needs an option with a _target_")
        return instantiate(node, group, trust=trust)
    except OmegaConfBaseException as error:  # such as an interpolation that leads nowhere
        raise ConfigError(group, None, f"cannot be read: {one_line(error)}") from None


def _check_layers(weights: Sequence[torch.Tensor], act: Any) -> None:
    """Raise ValueError if there are no layers, they do not follow one another, or are not what lipexp stores."""
    if not weights:
        raise ValueError("there are no layers in it")
    for i, weight in enumerate(weights):
        if weight.dtype != torch.float32:
            raise ValueError(f"layers.{i}.weight is {str(weight.dtype).removeprefix('torch.')}, not float32")
        if weight.numel() == 0:
            raise ValueError(f"layers.{i}.weight is empty")
        if i > 0 and weight.shape[1] != weights[i - 1].shape[0]:
            given = weights[i - 1].shape[0]
            raise ValueError(f"layers.{i} takes {weight.shape[1]} features, layers.{i - 1} gives {given}")
        if i < len(weights) - 1 and isinstance(act, Activation):
            act.check_width(weight.shape[0])


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
