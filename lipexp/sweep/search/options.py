"""How a search is carried out: the settings hydra.sweeper, whose names and types Hydra checks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from omegaconf import DictConfig

from lipexp.config import ConfigError, no_such, one_of, whole
from lipexp.record import numeric_keys
from lipexp.sweep.options import typed
from lipexp.tasks import METRICS, TASKS

WARNING = "chosen on the test set, whose scores then look better than those of new data"
CERTIFIED = ("certified_accuracy", "local_accuracy", "median_radius", "median_local_radius")
LARGER_IS_BETTER = METRICS | {"r2": True, "loss": False} | dict.fromkeys(CERTIFIED, True)


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
        options: SearchOptions = typed("hydra.sweeper", node, cls)
        one_of("hydra.sweeper.direction", options.direction or "maximize", ("maximize", "minimize"))
        one_of("hydra.sweeper.sampler", options.sampler, ("tpe", "random"))
        for name, least in (("trials", 1), ("round", 1), ("stack", 1), ("seed", 0)):
            whole(f"hydra.sweeper.{name}", getattr(options, name), least=least)
        return options

    def goal(self, task: str, radii: Iterable[float]) -> tuple[str, str]:
        """The metric and its direction, for runs of this task; raises ConfigError if one of them is not known."""
        metric, keys = self.metric or f"val.{TASKS[task].metric}", numeric_keys(task, radii)
        if metric not in keys:
            raise ConfigError("hydra.sweeper.metric", metric, no_such("number in metrics.json", metric, keys))
        known = [LARGER_IS_BETTER[word] for word in metric.split(".") if word in LARGER_IS_BETTER]
        if not (self.direction or known):
            raise ConfigError(
                "hydra.sweeper.direction", "null", f"must be given for {metric}: maximize or minimize"
            )
        return metric, self.direction or ("maximize" if known[-1] else "minimize")


def is_of_test(metric: str) -> bool:
    """Whether a key of metrics.json is a number of the test set, on which nothing should be chosen."""
    return "test" in metric.split(".")
