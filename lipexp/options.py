"""How a sweep is carried out: the settings hydra.launcher."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from lipexp.config import ConfigError, known_settings, number, one_of, plain, whole
from lipexp.slurm.options import SlurmOptions

EXECUTORS = ("inline", "process", "slurm")
SHARE_OF_FREE_MEMORY = 0.25  # for the stacks that train at the same time, unless a limit is given
SHARE_OF_SLURM_JOB = 0.5  # of its memory, for the stack; the rest is Python's and torch's


@dataclass(frozen=True)
class Options:
    """How a sweep is carried out: the settings of the launcher.

    Args:
        executor: `inline` trains in this process, `process` spreads stacks over worker processes, `slurm` submits
            them.
        workers: how many stacks train at the same time; null is one a core, or what SLURM allows.
        memory_gib: for all stacks that train at the same time; null is a quarter of what is free. For slurm: for
            each stack; null is half of what its SLURM job has.
        table: print a table of the jobs at the end.
        slurm: how stacks are submitted.
    """

    executor: str = "inline"
    workers: int | None = None
    memory_gib: float | None = None
    table: bool = True
    slurm: SlurmOptions = field(default_factory=SlurmOptions)

    def __post_init__(self) -> None:
        one_of("hydra.launcher.executor", self.executor, EXECUTORS)
        if not isinstance(self.table, bool):
            raise ConfigError("hydra.launcher.table", self.table, "must be true or false")
        if self.workers is not None:
            whole("hydra.launcher.workers", self.workers, least=1)
        if self.memory_gib is not None:
            number("hydra.launcher.memory_gib", self.memory_gib, above=0)

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Options:
        """The options from the node hydra.launcher.

        Raises:
            ConfigError: one that does not exist, or has a value that is not allowed.
        """
        known_settings(settings, [option.name for option in fields(cls)], "hydra.launcher.")
        slurm = settings.get("slurm") or {}
        if not isinstance(slurm, Mapping):
            raise ConfigError("hydra.launcher.slurm", slurm, "has settings of its own: hydra.launcher.slurm.wait")
        return cls(**{**settings, "slurm": SlurmOptions.of(plain(slurm))})

    @property
    def processes(self) -> int:
        """How many stacks train at the same time; for SLURM, at least how many it is given."""
        if self.executor == "inline":
            return 1
        return self.workers or (1 if self.executor == "slurm" else os.cpu_count() or 1)

    def memory(self, free: int) -> int:
        """Bytes for one stack, of those that are free here."""
        if self.executor == "slurm":
            return int((self.memory_gib or SHARE_OF_SLURM_JOB * self.slurm.mem_gb) * 2**30)
        total = SHARE_OF_FREE_MEMORY * free if self.memory_gib is None else self.memory_gib * 2**30
        return int(total / self.processes)
