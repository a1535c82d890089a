"""`lipexp train -m hydra/sweeper=search` searches a space; see lipexp/sweep/search, which does the work.

Every Hydra application in this environment imports this file when it starts, so it imports nothing of lipexp.
"""

from __future__ import annotations

from typing import Any

from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class SearchSweeper(Sweeper):
    """Asks for rounds of trials, and trains each as a sweep of its own."""

    def __init__(self, **options: Any) -> None:
        pass  # they are read from the configuration

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.context, self.config = hydra_context, config

    def sweep(self, arguments: list[str]) -> Any:
        from lipexp.sweep.search.rounds import search

        assert self.config is not None
        return search(self.context, self.config, arguments)
