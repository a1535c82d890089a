"""What laws are tested on, and how they say that one is broken."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lipexp.config import GROUPS, ConfigError
from lipexp.loop import Checkpoint, Streams, Trainer, fit
from lipexp.members import Member, build, stack
from lipexp.networks import BakedNetwork
from lipexp.runs import flat

# Small enough for a law to take a moment; what a class does not know is left out.
SMALL: dict[str, Any] = {
    "dataset.n_train": 64,
    "dataset.n_val": 32,
    "dataset.n_test": 32,
    "batch_size": 32,
    "steps": 30,
    "eval_every": 0,
    "device": "cpu",
}  # numbers are upper limits


class Broken(Exception):
    """A law does not hold; the text is the counterexample, in one line."""


Law = Callable[["Subject"], str | None]


def statement(law: Law) -> str:
    """The law as a sentence: the first line of its docstring."""
    return str(law.__doc__).strip().splitlines()[0]


class Subject:
    """One configuration, made small, of which laws build and train runs.

    Args:
        content: the composed configuration, its interpolations resolved.
        choices: the option chosen in each group.
        width: of hidden layers, if the model has such a setting.
    """

    def __init__(self, content: Mapping[str, Any], choices: Mapping[str, Any] = {}, width: int = 8) -> None:
        self.choices = choices
        self.generator = torch.Generator().manual_seed(0)
        self.content = copy.deepcopy(dict(content))
        for key, value in SMALL.items():
            known = flat(self.content).get(key)
            if known is not None:
                self._set(self.content, key, min(value, known) if isinstance(known, int) else value)
        own = copy.deepcopy(self.content)
        if "model.width" in flat(self.content):
            self._set(self.content, "model.width", width)
        try:
            self.member = self.build()
        except ConfigError:  # such as an activation whose groups need the width that was asked for
            self.content = own
            self.member = self.build()

    @staticmethod
    def _set(content: dict[str, Any], key: str, value: Any) -> None:
        *path, name = key.split(".")
        for step in path:
            content = content[step]
        content[name] = value

    def build(self, changes: Mapping[str, Any] = {}) -> Member:
        """One run, with some settings changed, by their dotted keys."""
        content = copy.deepcopy(self.content)
        for key, value in changes.items():
            self._set(content, key, value)
        return build(content, self.choices)

    @property
    def width(self) -> int:
        """The width of the first hidden layer."""
        return self.member.shapes[0][0]

    def variants(self, n: int) -> list[Member]:
        """n runs of one signature, which differ in their seed and in all that may differ within a stack."""
        found = []
        for run in range(n):
            changes: dict[str, Any] = {"seed": run}
            for group in GROUPS:
                for name in getattr(self.member.parts[group], "per_run", ()):
                    value = float(getattr(self.member.parts[group], name))
                    changes[f"{group}.{name}"] = value * (1 - 0.2 * run) if value else 0.001 * run
            try:
                found.append(self.build(changes))
            except ConfigError:  # a value that the class does not take
                found.append(self.build({"seed": run}))
        return found

    def losses(self, members: Sequence[Member], steps: int, dtype: torch.dtype) -> Tensor:
        """(steps, K) the losses of the first steps of these runs, trained as one stack."""
        runs = stack(members)
        runs.steps = steps
        trainer = Trainer(runs, dtype=dtype)
        return torch.stack([trainer.step() for _ in range(steps)])

    def trained(self, members: Sequence[Member]) -> Checkpoint:
        """The last checkpoint of these runs, trained as one stack."""
        return fit(stack(members), lambda checkpoint: None)

    @cached_property
    def network(self) -> BakedNetwork:
        """Two trained runs of this configuration, which differ in their seed."""
        return self.trained([self.build({"seed": seed}) for seed in range(2)]).network

    @cached_property
    def points(self) -> Tensor:
        """(N, D) float64, the data of the first run."""
        data = self.member.drawn(Streams.of(0))
        return torch.from_numpy(data.x).double()

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normally distributed float64 numbers."""
        return scale * torch.randn(*shape, generator=self.generator, dtype=torch.float64)


def shown(values: Tensor | np.ndarray[Any, Any], most: int = 8) -> str:
    """A vector in a counterexample."""
    numbers = torch.as_tensor(values).detach().flatten().tolist()
    return f"[{', '.join(f'{number:.6g}' for number in numbers[:most])}{', …' if len(numbers) > most else ''}]"
