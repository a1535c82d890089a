"""`lipexp train -m` trains the jobs of a sweep as stacked models; see lipexp/sweep/launch.py, which does the work.

Every Hydra application in this environment imports this file when it starts, so it imports nothing of lipexp.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class StackLauncher(Launcher):
    """Trains all jobs of a sweep as a few stacked models."""

    def __init__(self, **options: Any) -> None:
        pass  # they are read from the configuration

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from lipexp.sweep.launch import launch

        return launch(self.context, self.config, job_overrides, initial_job_idx)


class StackSweeper(BasicSweeper):
    """Hydra's own grid of overrides, handed over whole: the launcher composes each job, once, before all else."""

    def sweep(self, arguments: list[str]) -> Any:
        if not isinstance(self.launcher, StackLauncher):
            return super().sweep(arguments)
        assert self.hydra_context is not None
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        overrides = parser.parse_overrides([*self._parse_config(), *arguments])
        # `resume` is read once, for the whole sweep.
        jobs = [line for line in overrides if line.key_or_group != "resume" or line.is_sweep_override()]
        (batch,) = self.split_arguments(jobs, max_batch_size=None)
        return [self.launcher.launch(batch, initial_job_idx=0)]
