"""How a sweep is carried out: the settings hydra.launcher, whose names and types Hydra checks."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lipexp.config import ConfigError, no_such, number, one_of, whole

EXECUTORS = ("auto", "inline", "process", "slurm")
FRACTION_OF_FREE_MEMORY = 0.25  # for the stacks that train at the same time, unless a limit is given
FRACTION_OF_SLURM_JOB = 0.5  # of its memory, for the stack; the rest is for Python and torch
SLURM = "hydra.launcher.slurm"
MOST_GIB = 1e9  # that can be asked for


def typed(option: str, node: DictConfig, cls: type[Any]) -> Any:
    """The node of Hydra's launcher or sweeper as its dataclass; ConfigError for a setting that is unknown."""
    for key in map(str, node):
        if key not in cls.__dataclass_fields__:
            names = [name for name in cls.__dataclass_fields__ if name != "_target_"]
            raise ConfigError(f"{option}.{key}", None, no_such("setting", key, names))
    return OmegaConf.to_object(node)


@dataclass
class SlurmOptions:
    """The settings hydra.launcher.slurm; see conf/hydra/launcher/stack.yaml. Resources have submitit's names."""

    wait: bool = True
    resubmissions: int = 2
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    timeout_min: int = 60
    mem_gb: float = 4
    cpus_per_task: int = 1
    gpus_per_node: int | None = None
    setup: list[str] | None = None
    additional_parameters: Any = None  # a dict, of which Hydra would refuse unknown keys

    def check(self) -> None:
        """Raise ConfigError for a value that is not allowed."""
        for name, least in (("resubmissions", 0), ("timeout_min", 2), ("cpus_per_task", 1)):
            whole(f"{SLURM}.{name}", getattr(self, name), least=least)
        if self.gpus_per_node is not None:
            whole(f"{SLURM}.gpus_per_node", self.gpus_per_node, least=1)
        number(f"{SLURM}.mem_gb", self.mem_gb, above=0, most=MOST_GIB)
        if not isinstance(self.additional_parameters, dict | None):
            allowed = "must be options of sbatch, {nodelist: n1}"
            raise ConfigError(f"{SLURM}.additional_parameters", self.additional_parameters, allowed)

    def parameters(self) -> dict[str, Any]:
        """The resources as submitit takes them, which wants a prefix on what only SLURM has."""
        shared = ("timeout_min", "mem_gb", "cpus_per_task", "gpus_per_node")
        own = ("partition", "account", "qos", "setup", "additional_parameters")
        return {name: getattr(self, name) for name in shared} | {
            f"slurm_{name}": getattr(self, name) for name in own
        }


@dataclass
class LauncherOptions:
    """The settings hydra.launcher; see conf/hydra/launcher/stack.yaml."""

    _target_: str = "hydra_plugins.lipexp_stack.stack.StackLauncher"
    executor: str = "auto"
    workers: int | None = None
    memory_gib: float | None = None
    table: bool = True
    skip_unfit: bool = False
    slurm: SlurmOptions = field(default_factory=SlurmOptions)

    @classmethod
    def of(cls, node: DictConfig) -> LauncherOptions:
        """The options in the node hydra.launcher.

        Raises:
            ConfigError: a value out of range.
        """
        options = typed("hydra.launcher", node, cls)
        one_of("hydra.launcher.executor", options.executor, EXECUTORS)
        if options.workers is not None:
            whole("hydra.launcher.workers", options.workers, least=1)
        if options.memory_gib is not None:
            number("hydra.launcher.memory_gib", options.memory_gib, above=0, most=MOST_GIB)
        options.slurm.check()
        return options

    @property
    def processes(self) -> int:
        """How many stacks train at the same time; in SLURM, at least how many."""
        if self.executor == "inline":
            return 1
        return self.workers or (1 if self.executor == "slurm" else len(os.sched_getaffinity(0)))

    def memory(self, free: int) -> int:
        """Bytes for one stack, of those that are free here."""
        if self.executor == "slurm":
            return int((self.memory_gib or FRACTION_OF_SLURM_JOB * self.slurm.mem_gb) * 2**30)
        total = FRACTION_OF_FREE_MEMORY * free if self.memory_gib is None else self.memory_gib * 2**30
        return int(total / self.processes)
