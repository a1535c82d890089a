"""How a search is carried out: the settings hydra.sweeper, whose names and types Hydra checks."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import DictConfig, OmegaConf

from lipexp.config import ConfigError, one_of, whole
from lipexp.tasks import METRICS, TASKS

SAMPLERS = ("tpe", "random")
DIRECTIONS = ("maximize", "minimize")
# By the last word of a metric's key that stands here.
KNOWN = {
    **{metric: "maximize" if larger else "minimize" for metric, larger in METRICS.items()},
    **{"certified_accuracy": "maximize", "median_radius": "maximize", "loss": "minimize"},
}


@dataclass
class SearchOptions:
    """The settings of the sweeper; see conf/hydra/sweeper/search.yaml."""

    _target_: str = "hydra_plugins.lipexp_stack.search.SearchSweeper"
    metric: str | None = None
    direction: str | None = None
    sampler: str = "tpe"
    trials: int = 100
    round: int = 25
    stack: int = 5
    seed: int = 0

    @classmethod
    def of(cls, node: DictConfig) -> SearchOptions:
        """The options in the node hydra.sweeper.

        Raises:
            ConfigError: a value that is not allowed.
        """
        options = OmegaConf.to_object(node)
        assert isinstance(options, cls)
        if options.direction is not None:
            one_of("hydra.sweeper.direction", options.direction, DIRECTIONS)
        one_of("hydra.sweeper.sampler", options.sampler, SAMPLERS)
        for name, least in (("trials", 1), ("round", 1), ("stack", 1), ("seed", 0)):
            whole(f"hydra.sweeper.{name}", getattr(options, name), least=least)
        return options

    def metric_for(self, task: str) -> str:
        """The metric, for a dataset of this task."""
        return self.metric or f"test.{TASKS[task].metric}"

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
