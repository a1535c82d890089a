"""The verb `train` as a Hydra application: composition, the task, and one clear line for bad input.

Torch is imported only once a configuration is to be trained: `--help`, `--cfg job` and completion do without it.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lipexp.config import GROUPS, ConfigError, Settings, conf_dir, no_such, one_line
from lipexp.explain import explain
from lipexp.imports import quick_imports
from lipexp.interrupts import INTERRUPTED, admit_interrupts, find_lost_interrupts, hold_interrupts
from lipexp.runs import RunFolder, SweepFailed

log = logging.getLogger(__name__)

# Hydra's flags, those with a value and those without; --info may have one.
FLAGS_WITH_VALUE = {
    *("--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn"),
    *("--config-dir", "-cd", "--experimental-rerun"),
}
FLAGS = {
    *("--help", "-h", "--hydra-help", "--version", "--resolve", "--run", "-r", "--multirun", "-m"),
    *("--shell-completion", "-sc", "--info", "-i"),
}


class RunFailed(Exception):
    """A run ended without a result; its folder says why."""


def main(arguments: Sequence[str]) -> int:
    """Run `lipexp train` with Hydra's own arguments; returns the exit status."""
    failures: list[RunFailed] = []
    RefuseEarly.claimed.clear()

    def task(config: DictConfig) -> None:
        # Not raised: Hydra would print a page, and of a sweep only the first failure.
        try:
            run_one(config)
        except RunFailed as error:
            failures.append(error)

    sys.path.append(os.getcwd())  # a user's own class lies where they work, as with `python -m`
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises, and what the user reads is written here
    ConfigStore.instance().store(name="lipexp_schema", node=Settings)
    try:
        sys.argv[1:] = flags_first(arguments)
        with hold_interrupts():
            hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(task)()
    except ConfigError as error:
        RefuseEarly.release()
        complain(error)
        return 2
    except SweepFailed as error:
        failures.extend(RunFailed(line) for line in error.failures)
    except (HydraException, OmegaConfBaseException) as error:
        RefuseEarly.release()
        complain(explain(error))
        return 2
    except KeyboardInterrupt:
        RefuseEarly.release()
        complain("interrupted")
        return INTERRUPTED
    for failure in failures:
        complain(failure)
    return 1 if failures else 0


def run_one(config: DictConfig) -> None:
    """The task that Hydra runs: one configuration, one run folder.

    Raises:
        RunFailed: it ended without a result; failed.json is written.
    """
    running = HydraConfig.get()
    output = os.path.relpath(running.runtime.output_dir)
    folder = RunFolder(Path(running.runtime.output_dir if output.startswith("..") else output))
    try:
        with admit_interrupts():
            _train(config, running, folder)
    except KeyboardInterrupt:
        if not folder.ended:
            folder.write_failure("interrupted", step=0)
        raise


def _train(config: DictConfig, running: Any, folder: RunFolder) -> None:
    """`run_one` in a folder of Hydra's."""
    with quick_imports():
        from lipexp.display import Display
        from lipexp.train import build, train_many
        from lipexp.wording import broken_bound

    try:
        with find_lost_interrupts():
            member = build(config, running.runtime.choices)
    except ConfigError as error:  # a job of a sweep; a single run was refused before it had a folder
        folder.write_failure(str(error), step=0)
        raise RunFailed(f"{error} ({folder.path})") from None
    sweeping = running.mode == RunMode.MULTIRUN
    display = Display(brief=sweeping)
    display.header(member.names, config)
    try:
        with find_lost_interrupts():
            (outcome,) = train_many([member], [folder], display, figures=not sweeping)
    except KeyboardInterrupt:
        if not folder.complete:
            folder.write_failure("interrupted", display.step)
        raise
    except (Exception, SystemExit) as error:  # a user's class may raise anything
        reason = one_line(error)
        log.exception("the run ended with an error")
        folder.write_failure(reason, display.step)
        raise RunFailed(f"{reason} (traceback in {folder.path / 'train.log'})") from error
    if outcome.metrics is None:
        assert outcome.failure is not None
        raise RunFailed(f"{outcome.failure.reason} at step {outcome.failure.step} ({folder.path})")
    display.result(outcome.metrics, folder.path)
    if outcome.metrics["lipschitz"]["verdict"] == "FAIL":
        raise RunFailed(f"{broken_bound(outcome.metrics['lipschitz'])} ({folder.path})")


class RefuseEarly(Callback):
    """Checks a configuration before Hydra creates anything, so bad input leaves no folder behind.

    Hydra turns the exceptions of a callback into warnings, so this one exits.
    """

    claimed: ClassVar[list[Path]] = []  # folders made for this command

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        with quick_imports(keep=True):
            from lipexp.train import build

        try:
            if config.get("resume"):  # a replayed configuration may lack it
                raise ConfigError("resume", "true", "continues a sweep, which needs -m")
            own = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
            with admit_interrupts(), find_lost_interrupts():
                build(own, config.hydra.runtime.choices)
            self.claim("hydra.run.dir", Path(config.hydra.run.dir))
        except ConfigError as error:
            complain(error)
            raise SystemExit(2) from None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        if config.hydra.launcher._target_.startswith("hydra_plugins.lipexp"):
            return  # lipexp's launcher composes every job first, and knows which folder it may continue
        try:
            if config.get("resume"):
                raise ConfigError("resume", "true", "is for hydra/launcher=stack")
            self.claim("hydra.sweep.dir", Path(config.hydra.sweep.dir))
        except ConfigError as error:
            complain(error)
            raise SystemExit(2) from None

    def claim(self, option: str, folder: Path) -> None:
        """Make `folder`, or raise ConfigError: it cannot be made, or holds what would be overwritten."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            used = any(folder.iterdir())
        except OSError as error:
            raise ConfigError(option, folder, f"cannot be written: {error.strerror}") from None
        if used:
            raise ConfigError(option, folder, "is not empty; results are never overwritten")
        self.claimed.append(folder)

    @classmethod
    def release(cls) -> None:
        """Remove the folders made for this command that are still empty."""
        for folder in cls.claimed:
            RunFolder(folder).discard_if_empty()


def flags_first(arguments: Sequence[str]) -> list[str]:
    """The same arguments with all flags before the overrides, the order that Hydra 1.3 wants.

    Raises:
        ConfigError: what Hydra would answer with a page: an unknown flag, a sweep together with a display of
            the configuration, or a group without an option.
    """
    flags, overrides = [], []
    rest = iter(arguments)
    for argument in rest:
        if argument.partition("=")[0] in GROUPS and argument.endswith("=null"):
            raise ConfigError(argument.partition("=")[0], "null", "needs one option")
        if not argument.startswith("-"):
            overrides.append(argument)
            continue
        name = argument.partition("=")[0]
        if name not in FLAGS | FLAGS_WITH_VALUE:
            raise ConfigError(name, None, no_such("flag", name, sorted(FLAGS | FLAGS_WITH_VALUE)))
        flags.append(argument)
        if argument in FLAGS_WITH_VALUE:
            flags.extend(value for value in [next(rest, None)] if value is not None)
    if {"-m", "--multirun"} & set(flags) and {"-c", "--cfg", "-i", "--info"} & set(flags):
        raise ConfigError("--multirun", None, "shows nothing together with --cfg or --info; use one of them")
    return flags + overrides


def complain(message: object) -> None:
    """One line on stderr."""
    print(f"lipexp: {message}", file=sys.stderr)
