"""How stacks are submitted: the settings hydra.launcher.slurm, and what a machine needs for it."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from lipexp.config import ConfigError, known_settings, number, whole

NODE = "hydra.launcher.slurm"
EXECUTOR = ("hydra.launcher.executor", "slurm")  # an option and its value, as an error names them


@dataclass(frozen=True)
class SlurmOptions:
    """The settings hydra.launcher.slurm. Resources have submitit's names, and are those of one stack.

    Args:
        wait: until all stacks have ended; false returns once they are submitted.
        resubmissions: how often a stack that was killed or preempted is submitted again.
        partition, account, qos, gpus_per_node: null leaves them to the cluster.
        timeout_min: the time limit, in minutes.
        cpus_per_task: cores; how many of them training uses is the setting `threads`.
        setup: lines of shell that come before lipexp, such as `module load …`.
        additional_parameters: other options of sbatch.
    """

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
    additional_parameters: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self._check("wait", bool, "true or false")
        for name in ("partition", "account", "qos"):
            self._check(name, str | None, "a name")
        self._check("setup", list | None, "a list of shell commands")
        self._check("additional_parameters", dict | None, "options of sbatch, {nodelist: n1}")
        for name, least in (("resubmissions", 0), ("timeout_min", 2), ("cpus_per_task", 1)):
            whole(f"{NODE}.{name}", getattr(self, name), least=least)
        if self.gpus_per_node is not None:
            whole(f"{NODE}.gpus_per_node", self.gpus_per_node, least=1)
        number(f"{NODE}.mem_gb", self.mem_gb, above=0)

    def _check(self, name: str, kind: Any, allowed: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, kind):
            raise ConfigError(f"{NODE}.{name}", value, f"must be {allowed}")

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> SlurmOptions:
        """The options from the node hydra.launcher.slurm.

        Raises:
            ConfigError: one that does not exist, or has a value that is not allowed.
        """
        known_settings(settings, [option.name for option in fields(cls)], f"{NODE}.")
        return cls(**settings)

    def parameters(self) -> dict[str, Any]:
        """What submitit is told; it wants a prefix on what only SLURM has."""
        shared = ("timeout_min", "mem_gb", "cpus_per_task", "gpus_per_node")
        own = ("partition", "account", "qos", "setup", "additional_parameters")
        return {name: getattr(self, name) for name in shared} | {
            f"slurm_{name}": getattr(self, name) for name in own
        }


def check_machine() -> None:
    """Refuse a machine that cannot submit.

    Raises:
        ConfigError: submitit is not installed, or SLURM is not.
    """
    if importlib.util.find_spec("submitit") is None:
        raise ConfigError(*EXECUTOR, "needs submitit, which is not installed: pip install 'lipexp[slurm]'")
    for program in ("sbatch", "srun", "squeue"):
        if shutil.which(program) is None:
            raise ConfigError(*EXECUTOR, f"there is no {program} on this machine (inline, process)")
