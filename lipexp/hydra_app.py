"""The verb `train` as a Hydra application: composition, the task, and one clear line for bad input.

Torch is imported only once a configuration is to be trained: `--help`, `--cfg job` and completion do without it.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
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

from lipexp.config import GROUPS, ConfigError, Settings, conf_dir, no_such, one_line, plain
from lipexp.explain import explain
from lipexp.process import begin_work
from lipexp.runs import RunFolder, SweepFailed
from lipexp.sweep.options import LauncherOptions
from lipexp.sweep.search.options import SearchOptions

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
    RefuseEarly.member = None

    def task(config: DictConfig) -> None:
        # Not raised: Hydra would print a page, and of a sweep only the first failure.
        try:
            run_one(config)
        except RunFailed as error:
            failures.append(error)

    sys.path.append(os.getcwd())  # a user's own class lies where they work, as with `python -m`
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises, and the error is explained in one line here
    register_schemas()
    try:
        sys.argv[1:] = flags_first(arguments)
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(task)()
    except ConfigError as error:
        complain(error)
        return 2
    except SweepFailed as error:
        failures.extend(RunFailed(line) for line in error.failures)
    except (HydraException, OmegaConfBaseException) as error:
        complain(explain(error))
        return 2
    finally:
        RefuseEarly.release()
    for failure in failures:
        complain(failure)
    return 1 if failures else 0


def register_schemas() -> None:
    """Tell Hydra the types of all settings: those of a run, of the launcher and of the sweeper."""
    store = ConfigStore.instance()
    store.store(name="lipexp_schema", node=Settings)
    store.store(group="hydra/launcher", name="stack_schema", node=LauncherOptions)
    store.store(group="hydra/sweeper", name="search_schema", node=SearchOptions)


def run_one(config: DictConfig) -> None:
    """The task that Hydra runs: one configuration, one run folder.

    Raises:
        RunFailed: it ended without a result; failed.json is written.
    """
    from lipexp.display import Display
    from lipexp.members import build
    from lipexp.train import train_many
    from lipexp.wording import broken_bound

    begin_work()
    running = HydraConfig.get()
    sweeping = running.mode == RunMode.MULTIRUN
    output = os.path.relpath(running.runtime.output_dir)
    folder = RunFolder(Path(running.runtime.output_dir if output.startswith("..") else output))
    display = Display(brief=sweeping)
    try:
        folder.write_config(plain(config))  # in place of Hydra's, which leaves interpolations
        member = RefuseEarly.member or build(config, running.runtime.choices)
        display.header(member)
        (trained,) = train_many([member], [folder], display, figures=not sweeping)
    except KeyboardInterrupt:
        if not folder.ended:
            folder.write_failure("interrupted", display.step)
        raise
    except ConfigError as error:  # a job of a sweep, or data that contradict their dataset
        folder.write_failure(str(error), step=0)
        raise RunFailed(f"{error} ({folder.path})") from None
    except Exception as error:  # a user's class may raise anything
        reason = one_line(error)
        log.exception("the run ended with an error")
        folder.write_failure(reason, display.step)
        raise RunFailed(f"{reason} (traceback in {folder.path / 'train.log'})") from error
    if trained.metrics is None:
        assert trained.failure is not None
        raise RunFailed(f"{trained.failure.reason} at step {trained.failure.step} ({folder.path})")
    display.result(trained.metrics, folder.path)
    if trained.metrics.lipschitz.verdict == "FAIL":
        raise RunFailed(f"{broken_bound(trained.metrics.lipschitz)} ({folder.path})")


class RefuseEarly(Callback):
    """Checks a configuration before Hydra creates anything, so bad input leaves no folder behind.

    Hydra turns the exceptions of a callback into warnings, so whatever is raised here ends in SystemExit.
    """

    claimed: ClassVar[list[Path]] = []  # folders made for this command
    member: ClassVar[Any] = None  # the single run that was checked; a replayed configuration has no callbacks

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        import lipexp.train  # noqa: F401  # what the run needs, while Ctrl-C may still end the process
        from lipexp.members import build

        def check() -> None:
            if config.get("resume"):  # a replayed configuration may lack it
                raise ConfigError("resume", "true", "continues a sweep, which needs -m")
            own = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
            RefuseEarly.member = build(own, config.hydra.runtime.choices)
            self.claim("hydra.run.dir", Path(config.hydra.run.dir))

        self._or_exit(check)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        def check() -> None:
            if config.hydra.launcher._target_.startswith("hydra_plugins.lipexp"):
                return  # lipexp's launcher composes every job first, and knows which folder it may continue
            if config.get("resume"):
                raise ConfigError("resume", "true", "is for hydra/launcher=stack")
            self.claim("hydra.sweep.dir", Path(config.hydra.sweep.dir))

        self._or_exit(check)

    def _or_exit(self, check: Callable[[], None]) -> None:
        try:
            check()
        except (HydraException, OmegaConfBaseException) as error:
            complain(explain(error))
        except Exception as error:
            complain(one_line(error))
        else:
            return
        raise SystemExit(2)

    def claim(self, option: str, folder: Path) -> None:
        """Make `folder`, or raise ConfigError: it cannot be made, or holds what would be overwritten."""
        begin_work()
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
