"""The space of a search, in Hydra's own grammar: overrides that sweep are its axes, all others are settings.

optim.lr=interval(1e-4,1e-1)             a number in between; tag(log, interval(…)) evenly in its logarithm
'model.width=int(interval(8,64))'        a whole number in between
model.width=range(16,65,16)              an evenly spaced one
act=relu,groupsort   'act=glob(*)'       one of these
'seed=range(4)'                          no axis: every trial has these seeds, and its value is their mean
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep

from lipexp.config import ConfigError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution


@dataclass(frozen=True)
class Axis:
    """One searched override: all its values, or the ends between which they lie."""

    key: str
    values: tuple[str, ...] = ()  # as the command line spells them
    low: float = 0
    high: float = 0
    step: float | None = None
    log: bool = False
    whole: bool = False

    def distribution(self) -> BaseDistribution:
        """The same axis for optuna."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.values:
            return CategoricalDistribution(self.values)
        if self.whole:
            return IntDistribution(int(self.low), int(self.high), log=self.log, step=int(self.step or 1))
        return FloatDistribution(self.low, self.high, log=self.log, step=self.step)

    def examples(self) -> list[str]:
        """Values that between them choose every file that a trial can choose."""
        return list(self.values) or [self.spell(self.low)]

    def others(self) -> list[str]:
        """Values that show what differs along the axis from the first of `examples`."""
        return list(self.values[1:]) or [self.spell(self.high)]

    def spell(self, value: Any) -> str:
        """A value as the command line takes it."""
        if self.values:
            return str(value)
        return repr(int(value) if self.whole else float(value))


@dataclass(frozen=True)
class Space:
    """What is searched, and what is common to all trials."""

    axes: tuple[Axis, ...]
    settings: tuple[str, ...]  # the other overrides, in their order
    seeds: tuple[str, ...]  # of every trial; none: the default one

    @classmethod
    def of(cls, overrides: Sequence[Override]) -> Space:
        """The space that parsed overrides span.

        Raises:
            ConfigError: nothing is searched, or an axis that cannot be.
        """
        axes: list[Axis] = []
        settings: list[str] = []
        seeds: tuple[str, ...] = ()
        for override in overrides:
            key, line = override.key_or_group, override.input_line or ""
            if override.is_delete():
                raise ConfigError(line, None, "cannot be part of a search, whose best is saved as an experiment")
            if not override.is_sweep_override():
                settings.append(line)
            elif key == "seed":
                seeds = _seeds(override)
            elif any(axis.key == _full_key(override) for axis in axes):
                raise ConfigError(key, None, "is searched twice")
            else:
                axes.append(_axis(override))
        if not axes:
            allowed = "has nothing to search: sweep something but the seed, such as optim.lr=interval(1e-4,1e-1)"
            raise ConfigError("hydra/sweeper", "search", allowed)
        return cls(tuple(axes), tuple(settings), seeds)

    def distributions(self) -> dict[str, BaseDistribution]:
        return {axis.key: axis.distribution() for axis in self.axes}

    def jobs(self, values: Mapping[str, Any]) -> list[list[str]]:
        """The overrides of the runs of one trial, one for each seed."""
        lines = [*self.settings, *(f"{axis.key}={axis.spell(values[axis.key])}" for axis in self.axes)]
        return [[*lines, f"seed={seed}"] for seed in self.seeds] if self.seeds else [lines]

    def probes(self) -> list[list[str]]:
        """A few trials that between them choose every file that a trial can choose."""
        others = [{axis.key: value} for axis in self.axes for value in axis.examples()[1:]]
        return [self.probe(values) for values in [{}, *others]]

    def probe(self, values: Mapping[str, str]) -> list[str]:
        """The overrides of a trial with the first value of each axis, and some others instead."""
        chosen = {axis.key: axis.examples()[0] for axis in self.axes} | dict(values)
        seed = [f"seed={seed}" for seed in self.seeds[:1]]
        return [*self.settings, *(f"{key}={value}" for key, value in chosen.items()), *seed]


def _seeds(override: Override) -> tuple[str, ...]:
    if override.is_interval_sweep():
        raise ConfigError("seed", None, "is averaged over, so it takes a list or a range(…)")
    return tuple(str(value) for value in override.sweep_string_iterator())


def _full_key(override: Override) -> str:
    """The key with its sign, as it is repeated for each trial."""
    return override.get_key_element()


def _axis(override: Override) -> Axis:
    key, value = _full_key(override), override.value()
    if not isinstance(value, IntervalSweep | RangeSweep):
        values = tuple(str(part) for part in override.sweep_string_iterator())
        if not values:
            raise ConfigError(key, None, "has no value to choose from")
        return Axis(key, values=values)
    if isinstance(value, IntervalSweep):
        low, high = value.start, value.end
        if low is None or high is None or not low < high:
            raise ConfigError(key, f"interval({low},{high})", "must rise from its first to its second end")
        log = "log" in value.tags
        if log and low <= 0:
            raise ConfigError(key, f"interval({low},{high})", "must lie above 0 for tag(log, …)")
        return Axis(key, low=low, high=high, log=log, whole=isinstance(low, int) and isinstance(high, int))
    if value.shuffle or "log" in value.tags:
        raise ConfigError(key, None, "takes tag(log, …) with an interval, and no shuffle")
    numbers = list(value.range())
    if not numbers:
        raise ConfigError(key, None, "is an empty range")
    numbers.sort()
    whole = all(isinstance(number, int) for number in numbers)
    step = numbers[1] - numbers[0] if len(numbers) > 1 else 1
    return Axis(key, low=numbers[0], high=numbers[-1], step=step, whole=whole)
