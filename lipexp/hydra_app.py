"""The verb `train` as a Hydra application: composition, the task, and one clear line for bad input.

Torch is imported only once a configuration is to be trained: `--help`, `--cfg job` and completion do without it.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lipexp.config import ConfigError, Settings, conf_dir
from lipexp.explain import explain
from lipexp.runs import RunFolder

log = logging.getLogger(__name__)

FLAGS_WITH_VALUE = {
    *("--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn"),
    *("--config-dir", "-cd", "--experimental-rerun"),
}


class RunFailed(Exception):
    """A run ended without a result; its folder says why."""


def main(arguments: Sequence[str]) -> int:
    """Run `lipexp train` with Hydra's own arguments; returns the exit status."""
    failures: list[str] = []

    def task(config: DictConfig) -> None:
        try:
            run_one(config)
        except (ConfigError, RunFailed) as error:
            failures.append(str(error))
            raise

    sys.path.append(os.getcwd())  # a user's own class lies where they work, as with `python -m`
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises, and what the user reads is written here
    ConfigStore.instance().store(name="lipexp_schema", node=Settings)
    try:
        sys.argv[1:] = flags_first(arguments)
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(task)()
    except (ConfigError, RunFailed) as error:
        # A sweep goes on after a failed job and raises the first failure at its end: all of them are listed.
        for failure in failures or [str(error)]:
            complain(failure)
        return 2 if isinstance(error, ConfigError) and len(failures) <= 1 else 1
    except (HydraException, OmegaConfBaseException) as error:
        complain(explain(error))
        return 2
    except KeyboardInterrupt:
        complain("interrupted")
        return 130
    return 0


def run_one(config: DictConfig) -> None:
    """The task that Hydra runs: one configuration, one run folder.

    Raises:
        ConfigError: refused; what Hydra has put into the folder is removed.
        RunFailed: it ended without a result; failed.json is written.
    """
    from lipexp.display import Display, interval_line
    from lipexp.train import build, train_many

    running = HydraConfig.get()
    folder = RunFolder(Path(running.runtime.output_dir))
    try:
        member = build(config, running.runtime.choices)
    except ConfigError:
        folder.discard_if_empty()
        raise
    display = Display(brief=running.mode == RunMode.MULTIRUN)
    display.header(member.names, config)
    try:
        (outcome,) = train_many([member], [folder], display)
    except KeyboardInterrupt:
        folder.write_failure("interrupted", display.step)
        raise
    except Exception as error:  # a user's class may raise anything: the run fails, with its traceback in the log
        reason = f"{type(error).__name__}: {error}"
        log.exception("the run ended with an error")
        folder.write_failure(reason, display.step)
        raise RunFailed(f"{reason} (traceback in {folder.path / 'train.log'})") from error
    if outcome.metrics is None:
        assert outcome.failure is not None
        raise RunFailed(f"{outcome.failure.reason} at step {outcome.failure.step} ({folder.path})")
    display.result(outcome.metrics, folder.path)
    if outcome.metrics["lipschitz"]["verdict"] == "FAIL":
        line = interval_line(outcome.metrics["lipschitz"])
        raise RunFailed(f"{line}: a bound is broken, a bug in lipexp; please report it with {folder.path}")


class RefuseEarly(Callback):
    """Checks a configuration before Hydra creates anything, so bad input leaves no folder behind.

    Hydra turns the exceptions of a callback into warnings, so this one exits.
    """

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        from lipexp.train import build

        try:
            build(
                OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"]),
                config.hydra.runtime.choices,
            )
            claim("hydra.run.dir", Path(config.hydra.run.dir))
        except ConfigError as error:
            complain(error)
            raise SystemExit(2) from None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        try:
            claim("hydra.sweep.dir", Path(config.hydra.sweep.dir))
        except ConfigError as error:
            complain(error)
            raise SystemExit(2) from None


def claim(option: str, folder: Path) -> None:
    """Make `folder`, or raise ConfigError: it cannot be made, or holds something that would be overwritten."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        used = any(folder.iterdir())
    except OSError as error:
        raise ConfigError(option, folder, f"cannot be written: {error.strerror}") from None
    if used:
        raise ConfigError(option, folder, "is not empty; results are never overwritten")


def flags_first(arguments: Sequence[str]) -> list[str]:
    """The same arguments with all flags before the overrides, the order that Hydra 1.3 wants.

    Raises:
        ConfigError: a sweep and a display of the configuration at once, which Hydra answers with a traceback.
    """
    flags, overrides = [], []
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith("-"):
            overrides.append(argument)
            continue
        flags.append(argument)
        if argument in FLAGS_WITH_VALUE:
            flags.extend(value for value in [next(rest, None)] if value is not None)
    if {"-m", "--multirun"} & set(flags) and {"-c", "--cfg", "-i", "--info"} & set(flags):
        raise ConfigError("--multirun", "with --cfg or --info", "use one of them")
    return flags + overrides


def complain(message: object) -> None:
    """One line on stderr."""
    print(f"lipexp: {message}", file=sys.stderr)
