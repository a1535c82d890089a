"""The space of a search, in Hydra's own grammar: overrides that sweep are its axes, all others are settings.

optim.lr=interval(1e-4,1e-1)             a real number; with tag(log, interval(…)) its logarithm is uniform
'model.width=int(interval(8,64))'        a whole number
model.width=range(16,65,16)              an evenly spaced number
act=relu,groupsort   'act=glob(*)'       one of several values
'seed=range(4)'                          not an axis: each trial has these seeds, and its value is their mean
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.types import Override
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from lipexp.config import ConfigError


@dataclass(frozen=True)
class Space:
    """What is searched, and what all trials have in common."""

    axes: dict[
        str, Any
    ]  # optuna's distributions by their keys on the command line; categories are spelled as there
    settings: list[str]  # the other overrides, in their order
    seeds: list[str]  # of each trial; if there is none, trials have the default seed

    @classmethod
    def of(cls, overrides: Sequence[Override]) -> Space:
        """The space that parsed overrides span; raises ConfigError if it cannot be searched."""
        space = cls({}, [], [])
        for override in overrides:
            key, line = override.get_key_element(), override.input_line or ""
            if override.is_delete():
                raise ConfigError(line, None, "cannot be part of a search, whose best is saved as an experiment")
            if not override.is_sweep_override():
                space.settings.append(line)
            elif _is_single(override):
                space.settings.append(f"{key}={next(iter(override.sweep_string_iterator()))}")
            elif key != "seed":
                try:
                    space.axes[key] = _axis(override)
                except ValueError as error:
                    raise ConfigError(line, None, str(error)) from None
            elif override.is_interval_sweep():
                raise ConfigError(line, None, "is averaged over, so it takes a list or a range(…)")
            else:
                space.seeds.extend(override.sweep_string_iterator())
        if not space.axes:
            allowed = "has nothing to search: sweep something but the seed, such as optim.lr=interval(1e-4,1e-1)"
            raise ConfigError("hydra/sweeper", "search", allowed)
        return space

    def jobs(self, values: Mapping[str, Any]) -> list[list[str]]:
        """The overrides of the runs of one trial, one for each seed."""
        lines = [*self.settings, *(f"{key}={values[key]}" for key in self.axes)]
        return [[*lines, f"seed={seed}"] for seed in self.seeds] or [lines]

    def examples(self) -> list[dict[str, Any]]:
        """The values of a few trials that between them choose every file that a trial can choose."""
        among = {k: getattr(a, "choices", None) or [a.low] for k, a in self.axes.items()}
        first = {key: values[0] for key, values in among.items()}
        return [first, *(first | {key: value} for key, values in among.items() for value in values[1:])]


def _is_single(override: Override) -> bool:
    """Whether it is a choice of one value, which is a setting."""
    return override.is_choice_sweep() and len(getattr(override.value(), "list", ())) == 1


def _axis(override: Override) -> BaseDistribution:
    """The distribution that optuna samples from; raises ValueError for a sweep that has none."""
    value: Any = override.value()
    interval, log = override.is_interval_sweep(), "log" in getattr(value, "tags", ())
    if getattr(value, "shuffle", False) or (log and not interval):
        raise ValueError("a search takes tag(log, …) with an interval, and no shuffle")
    if override.is_choice_sweep():
        return CategoricalDistribution(list(dict.fromkeys(override.sweep_string_iterator())))
    # Rounded, because the ends must be a whole number of steps apart.
    numbers = [value.start, value.end] if interval else sorted(round(number, 12) for number in value.range())
    if not numbers:
        raise ValueError("the range is empty")
    kind: Any = IntDistribution if all(isinstance(number, int) for number in numbers) else FloatDistribution
    return kind(numbers[0], numbers[-1], **({"log": log} if interval else {"step": abs(value.step)}))
