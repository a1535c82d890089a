"""How a search is carried out: the settings hydra.sweeper."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from lipexp.config import ConfigError, known_settings, one_of, whole

SAMPLERS = ("tpe", "random")
DIRECTIONS = ("maximize", "minimize")
# By the last word of a metric's key that stands here.
KNOWN = {
    **dict.fromkeys(("accuracy", "certified_accuracy", "median_radius", "score"), "maximize"),
    **dict.fromkeys(("loss", "mse"), "minimize"),
}
OF_TASK = {"classification": "test.accuracy", "regression": "test.mse", "transport": "test.score"}


@dataclass(frozen=True)
class Options:
    """The settings of the sweeper; see conf/hydra/sweeper/search.yaml.

    Args:
        metric: a number of metrics.json by its dotted key; null is the one of the dataset's task.
        direction: whether it shall be large or small; null is what is known of the metric.
        sampler: which points are asked for.
        trials: how many in all.
        round: how many before the next are asked for.
        stack: of these, how many at a time agree in what cannot differ within a stack.
        seed: of the sampler.
    """

    metric: str | None = None
    direction: str | None = None
    sampler: str = "tpe"
    trials: int = 100
    round: int = 25
    stack: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.metric is not None and not isinstance(self.metric, str):
            raise ConfigError("hydra.sweeper.metric", self.metric, "must be a key of metrics.json: test.accuracy")
        if self.direction is not None:
            one_of("hydra.sweeper.direction", self.direction, DIRECTIONS)
        one_of("hydra.sweeper.sampler", self.sampler, SAMPLERS)
        for name, least in (("trials", 1), ("round", 1), ("stack", 1), ("seed", 0)):
            whole(f"hydra.sweeper.{name}", getattr(self, name), least=least)

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Options:
        """The options from the node hydra.sweeper.

        Raises:
            ConfigError: one that does not exist, or has a value that is not allowed.
        """
        known_settings(settings, [option.name for option in fields(cls)], "hydra.sweeper.")
        return cls(**settings)

    def metric_for(self, task: str) -> str:
        """The metric, for a dataset of this task."""
        return self.metric or OF_TASK[task]

    def direction_of(self, metric: str) -> str:
        """The direction of a metric.

        Raises:
            ConfigError: it is neither given nor known.
        """
        if self.direction is not None:
            return self.direction
        known = [KNOWN[word] for word in metric.split(".") if word in KNOWN]
        if not known:
            allowed = f"must be given for {metric}: {' or '.join(DIRECTIONS)}"
            raise ConfigError("hydra.sweeper.direction", "null", allowed)
        return known[-1]
