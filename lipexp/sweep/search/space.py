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
from decimal import Decimal
from typing import Any

from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from lipexp.config import ConfigError

Axis = CategoricalDistribution | FloatDistribution | IntDistribution


@dataclass(frozen=True)
class Space:
    """What is searched, and what all trials have in common."""

    axes: dict[str, Axis]  # by their keys on the command line; categories are spelled as there
    settings: tuple[str, ...]  # the other overrides, in their order
    seeds: tuple[str, ...]  # of each trial; if there is none, trials have the default seed

    @classmethod
    def of(cls, overrides: Sequence[Override]) -> Space:
        """The space that parsed overrides span; raises ConfigError if it cannot be searched."""
        axes: dict[str, Axis] = {}
        settings: list[str] = []
        seeds: tuple[str, ...] = ()
        for override in overrides:
            key, line = override.get_key_element(), override.input_line or ""
            if override.is_delete():
                raise ConfigError(line, None, "cannot be part of a search, whose best is saved as an experiment")
            if not override.is_sweep_override():
                settings.append(line)
            elif key != "seed":
                axes[key] = _axis(key, override)
            elif override.is_interval_sweep():
                raise ConfigError(key, None, "is averaged over, so it takes a list or a range(…)")
            else:
                seeds = tuple(override.sweep_string_iterator())
        if not axes:
            allowed = "has nothing to search: sweep something but the seed, such as optim.lr=interval(1e-4,1e-1)"
            raise ConfigError("hydra/sweeper", "search", allowed)
        return cls(axes, tuple(settings), seeds)

    @property
    def shared(self) -> list[str]:
        """The axes on which the trials of a stack agree; none if trials that agree on them would be the same."""
        shared = [key for key, axis in self.axes.items() if not isinstance(axis, FloatDistribution)]
        return shared if len(shared) < len(self.axes) else []

    def jobs(self, values: Mapping[str, Any]) -> list[list[str]]:
        """The overrides of the runs of one trial, one for each seed."""
        lines = [*self.settings, *(f"{key}={values[key]}" for key in self.axes)]
        return [[*lines, f"seed={seed}"] for seed in self.seeds] or [lines]

    def examples(self) -> list[dict[str, Any]]:
        """The values of a few trials that between them choose every file that a trial can choose."""
        values: dict[str, Any] = {
            key: axis.choices if isinstance(axis, CategoricalDistribution) else [axis.low]
            for key, axis in self.axes.items()
        }
        first = {key: among[0] for key, among in values.items()}
        return [first, *(first | {key: value} for key, among in values.items() for value in among[1:])]


def _axis(key: str, override: Override) -> Axis:
    """The distribution that optuna samples from, for a sweep of any key but the seed."""
    value: Any = override.value()
    log = "log" in getattr(value, "tags", ())
    if isinstance(value, IntervalSweep):
        low, high = value.start or 0, value.end or 0
        if not low < high or (log and low <= 0):
            allowed = "must rise from its first to its second end, and lie above 0 for tag(log, …)"
            raise ConfigError(key, f"interval({low},{high})", allowed)
        if isinstance(low, int) and isinstance(high, int):
            return IntDistribution(low, high, log=log)
        return FloatDistribution(low, high, log=log)
    if log or getattr(value, "shuffle", False):
        raise ConfigError(key, None, "takes tag(log, …) with an interval, and no shuffle")
    choices = tuple(dict.fromkeys(override.sweep_string_iterator()))
    if not choices:
        raise ConfigError(key, None, "has no value to choose from")
    if not isinstance(value, RangeSweep):
        return CategoricalDistribution(choices)
    # In decimal numbers, so that its ends are a whole number of steps apart.
    start, step = Decimal(str(value.start)), Decimal(str(value.step))
    first, last = sorted((start, start + step * (len(choices) - 1)))
    if isinstance(value.range(), range):
        return IntDistribution(int(first), int(last), step=int(abs(step)))
    return FloatDistribution(float(first), float(last), step=float(abs(step)))
