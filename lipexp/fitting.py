"""One network fitted to arrays, by the loop that trains runs: what is behind the estimators.

Shapes: N rows, D features, C outputs.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from omegaconf import OmegaConf
from sklearn.model_selection import train_test_split

from lipexp.blocks import Affine
from lipexp.config import ConfigError, conf_dir, number, one_of, plain
from lipexp.constraints import Constraint
from lipexp.datasets import Data, Dataset
from lipexp.loop import Checkpoint, Value, fit
from lipexp.members import Member, stack
from lipexp.networks import BakedNetwork
from lipexp.norms import even_split
from lipexp.process import cpu_threads
from lipexp.tasks import TASKS, squeezed

Array = npt.NDArray[Any]
Option = str | Mapping[str, Any]


class Rows(Dataset):
    """The rows that `fit` was given, split into training and validation; there is no test part."""

    def __init__(self, task: str, n_outputs: int, train: tuple[Array, Array], val: tuple[Array, Array]) -> None:
        self.task, self.n_outputs, self.n_inputs = task, n_outputs, train[0].shape[1]
        self.n_train, self.n_val = len(train[0]), len(val[0])
        self._data = Data(*train, *val, train[0][:0], train[1][:0])

    def draw(self, stream: np.random.SeedSequence) -> Data:
        return self._data


def split(y: Array, task: str, fraction: float, seed: int) -> tuple[Array, Array]:
    """The indices of the rows for training and for validation, stratified by class.

    A class with a single row stays in training. Where each other class cannot have a row in both parts, there
    is no validation.
    """
    fraction = number("validation_fraction", fraction, least=0, most=0.9)
    rows, n_val = np.arange(len(y)), int(fraction * len(y))
    classes = y if TASKS[task].has_classes else np.zeros(len(y), dtype=int)
    single = np.bincount(classes)[classes] < 2
    kinds = len(np.unique(classes[~single]))
    if n_val < max(kinds, 1) or np.sum(~single) - n_val < kinds:
        return rows, rows[:0]
    train, val = train_test_split(rows[~single], test_size=n_val, stratify=classes[~single], random_state=seed)
    return np.sort(np.concatenate([train, rows[single]])), np.sort(val)


def trained(member: Member) -> BakedNetwork:
    """The network of one run, trained by the loop of all runs.

    Raises:
        ValueError: its numbers have not stayed finite.
    """
    run = stack([member])
    x, y = (torch.from_numpy(part).double()[None] for part in run.data[0].part("val"))
    score = run.task.scores[run.task.metric]

    def evaluate(checkpoint: Checkpoint) -> list[Value | None]:
        if checkpoint.failures or not len(x[0]):
            return [None]
        f = squeezed(checkpoint.network.double(x))
        return [run.task.value(float(score(f, y)), float(run.loss(f, y).mean()))]

    with cpu_threads(member.config.threads):
        last = fit(run, evaluate, device=member.device)
    for failure in last.failures.values():
        raise ValueError(f"training failed: {failure.reason} at step {failure.step}")
    return last.network


def in_given_units(network: BakedNetwork, x_scale: Array | None, y_scale: Array | None) -> BakedNetwork:
    """The network x -> y_scale f(x / x_scale), its weights rounded to float32; None: scales of 1.

    Its first and its last layer are affine ones.
    """
    layers = list(network.layers)
    if x_scale is not None:
        first = layers[0]
        layers[0] = Affine((first.weight.double() / torch.from_numpy(x_scale)).float(), first.bias)
    if y_scale is not None:
        last, scale = layers[-1], torch.from_numpy(y_scale)
        layers[-1] = Affine((last.weight.double() * scale[:, None]).float(), (last.bias.double() * scale).float())
    return replace(network, layers=layers, norms=(), whole=())


def proven_in_given_units(
    network: BakedNetwork, constraint: Constraint, x_scale: Array | None, y_scale: Array | None
) -> BakedNetwork:
    """The same with what is proven of it.

    Multipliers T that prove L for f prove L' = L max(y_scale) / min(x_scale) for this network once they are
    multiplied by max(y_scale)^2, but for the rounding of its weights, which a slightly larger L' allows for. In
    the units of a constraint they are stored as T_k / b^(2 (n - k)), b = L^(1/n).
    """
    network = in_given_units(network, x_scale, y_scale)
    lipschitz, n = constraint.target(0), len(network.layers)
    if network.multipliers is None or lipschitz is None or not network.is_finite(0):
        return constraint.prove(network)
    largest = 1.0 if y_scale is None else float(y_scale.max())
    shares = [largest**2 * even_split(lipschitz, n) ** (2 * (n - k)) for k in range(1, n)]
    for excess in (2.0**-20, 2.0**-16, 2.0**-12, 2.0**-8):
        wider = copy.copy(constraint)
        wider.lipschitz = (1 + excess) * lipschitz * largest / (1.0 if x_scale is None else float(x_scale.min()))
        b = even_split(wider.lipschitz, n)
        factors = [share / b ** (2 * (n - k)) for k, share in enumerate(shares, start=1)]
        parts = zip(network.multipliers.double().split(network.hidden_widths, dim=1), factors, strict=True)
        multipliers = torch.cat([part * factor for part, factor in parts], dim=1).float()
        found = wider.prove(replace(network, multipliers=multipliers))
        if np.isfinite(found.whole).all():
            break
    return found


def node(group: str, choice: Option, lipschitz: float) -> dict[str, Any]:
    """The configuration node of an option of conf/, or of a class, with its arguments.

    Raises:
        ConfigError: there is no such option.
    """
    if not isinstance(choice, str | Mapping):
        raise ConfigError(group, choice, "must be the name of an option, or a mapping with its arguments")
    arguments: dict[str, Any] = {"option": choice} if isinstance(choice, str) else dict(choice)
    arguments = {name: number_of_python(value) for name, value in arguments.items()}
    if "option" not in arguments:
        return arguments
    folder = conf_dir() / group
    option = one_of(group, arguments.pop("option"), sorted(path.stem for path in folder.glob("*.yaml")))
    leaf = OmegaConf.create({"lipschitz": lipschitz, group: OmegaConf.load(folder / f"{option}.yaml")})
    return plain(leaf[group]) | arguments


def number_of_python(value: Any) -> Any:
    """A number of numpy, such as one of np.logspace, as one of Python."""
    return value.item() if isinstance(value, np.generic) else value
