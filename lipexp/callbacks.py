"""Hydra's callbacks of the jobs of a sweep, which `hydra.callbacks` names: on_job_start and on_job_end.

They are called in the process that the command runs in, whichever trains the jobs: there lives the state that a
callback keeps from on_multirun_start to on_multirun_end.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import yaml
from hydra._internal.callbacks import Callbacks
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobRuntime, JobStatus, env_override
from hydra.experimental.callback import Callback
from hydra.types import TaskFunction
from omegaconf import DictConfig, OmegaConf

from lipexp.compose import Job
from lipexp.interrupts import hold_interrupts
from lipexp.runs import SweepFailed


class JobFailed(Exception):
    """What a JobReturn holds of a job that ended without a result."""


class JobCallbacks:
    """Calls Hydra's callbacks for the jobs of one sweep.

    The jobs of a stack train at the same time: all of them start before the first has ended.

    Args:
        callbacks: Hydra's own.
        task: what Hydra runs as a job.
        master: the configuration of the sweep itself.
    """

    def __init__(self, callbacks: Callbacks, task: TaskFunction, master: DictConfig) -> None:
        self.callbacks, self.task, self.master = callbacks, task, master
        # The usual ones, which do nothing for a job, do not cost a configuration of Hydra's for each.
        self._wanted = any(
            getattr(type(one), name, None) is not getattr(Callback, name)
            for one in callbacks.callbacks
            for name in ("on_job_start", "on_job_end")
        )

    @contextmanager
    def whole_sweep(self) -> Iterator[None]:
        """Hydra tells of the end of a sweep that succeeds; here of one whose jobs failed, too."""
        try:
            yield
        except SweepFailed:
            self.callbacks.on_multirun_end(config=self.master, config_name=self.master.hydra.job.config_name)
            raise

    def start(self, jobs: Sequence[Job]) -> None:
        """These jobs are about to train."""
        for job in jobs if self._wanted else ():
            config = self._as_hydra_knows_it(job)
            with _running(config), env_override(job.env):
                self.callbacks.on_job_start(config=config, task_function=self.task)

    def end(self, job: Job, result: object, failure: str | None) -> None:
        """A job has ended, with a result or a failure."""
        if not self._wanted:
            return
        config = self._as_hydra_knows_it(job)
        returned = job_return(job, result, failure)
        with hold_interrupts():
            returned.cfg, returned.hydra_cfg = job.composed(), OmegaConf.create({"hydra": config.hydra})
        returned.working_dir = os.getcwd()
        returned.task_name = JobRuntime.instance().get("name")
        with _running(config):
            self.callbacks.on_job_end(config=config, job_return=returned)

    def _as_hydra_knows_it(self, job: Job) -> DictConfig:
        """The configuration of a job together with Hydra's own node."""
        with hold_interrupts():
            config = OmegaConf.create({**job.config, **yaml.load(job.hydra, Loader=yaml.CSafeLoader)})
            OmegaConf.copy_cache(from_config=self.master, to_config=config)
            OmegaConf.set_struct(config, True)
        return config


def job_return(job: Job, result: object, failure: str | None = None) -> JobReturn:
    """What Hydra hands on of a job that has ended."""
    returned = JobReturn(overrides=job.overrides)
    returned.status = JobStatus.COMPLETED if failure is None else JobStatus.FAILED
    returned.return_value = result if failure is None else JobFailed(failure)
    return returned


@contextmanager
def _running(config: DictConfig) -> Iterator[None]:
    """HydraConfig is that of a job while the body runs."""
    running: Any = HydraConfig.instance()
    before, running.cfg = running.cfg, config
    try:
        yield
    finally:
        running.cfg = before
