"""How a search is carried out: the settings hydra.sweeper, whose names and types Hydra checks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from omegaconf import DictConfig, OmegaConf

from lipexp.config import ConfigError, no_such, one_of, whole
from lipexp.record import numeric_keys
from lipexp.tasks import METRICS, TASKS

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
        """The options in the node hydra.sweeper; raises ConfigError for a value that is not allowed."""
        options = OmegaConf.to_object(node)
        assert isinstance(options, cls)
        if options.direction is not None:
            one_of("hydra.sweeper.direction", options.direction, DIRECTIONS)
        one_of("hydra.sweeper.sampler", options.sampler, ("tpe", "random"))
        for name, least in (("trials", 1), ("round", 1), ("stack", 1), ("seed", 0)):
            whole(f"hydra.sweeper.{name}", getattr(options, name), least=least)
        return options

    def goal(self, task: str, radii: Iterable[float]) -> tuple[str, str]:
        """The metric and its direction, for runs of this task with these radii.

        Raises:
            ConfigError: there is no such metric, or its direction is neither given nor known.
        """
        metric, keys = self.metric or f"test.{TASKS[task].metric}", numeric_keys(task, radii)
        if metric not in keys:
            raise ConfigError("hydra.sweeper.metric", metric, no_such("number in metrics.json", metric, keys))
        directions = [KNOWN[word] for word in metric.split(".") if word in KNOWN]
        if not (self.direction or directions):
            allowed = f"must be given for {metric}: {' or '.join(DIRECTIONS)}"
            raise ConfigError("hydra.sweeper.direction", "null", allowed)
        return metric, self.direction or directions[-1]
