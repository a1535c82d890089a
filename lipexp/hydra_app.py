"""The verb `train` as a Hydra application: composition, the task, and one clear line for bad input.

Torch is imported only once a configuration is to be trained: `--help`, `--cfg job` and completion do without it.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from lipexp.config import ConfigError, Settings, conf_dir, content, one_line
from lipexp.explain import explain
from lipexp.gate import Gate, Refused, checked, complain
from lipexp.process import Terminated, begin_work, has_begun
from lipexp.runs import RunFailed, RunFolder, SweepFailed
from lipexp.sweep.options import LauncherOptions
from lipexp.sweep.search.options import SearchOptions


def main(arguments: Sequence[str]) -> int:
    """Run `lipexp train` with Hydra's own arguments; returns the exit status."""
    failures: list[RunFailed] = []
    refused: list[ConfigError] = []
    Gate.begin()
    sys.path.append(os.getcwd())  # a user's own class lies where they work, as with `python -m`
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises, and the error is explained in one line here
    register_schemas()
    try:
        sys.argv[1:] = checked(arguments)
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")(
            collecting(failures, refused)
        )()
    except ConfigError as error:
        complain(error)
        return 2
    except Refused as stop:
        complain(explain(stop.error))
        return 2
    except SweepFailed as error:
        failures.extend(RunFailed(line) for line in error.failures)
    except BrokenPipeError:  # the reader of --help or --cfg has gone
        raise
    except Exception as error:  # Hydra may raise anything at bad input
        expected = isinstance(error, HydraException | OmegaConfBaseException)
        if not expected and has_begun() and {"-m", "--multirun"} & set(arguments):
            raise
        complain(explain(error))
        return 2
    finally:
        Gate.release()
    for refusal in refused:
        complain(refusal)
    for failure in failures:
        complain(*str(failure).split("\n"))
    return 2 if refused else int(bool(failures))


def collecting(failures: list[RunFailed], refused: list[ConfigError]) -> Callable[[DictConfig], None]:
    """The task that Hydra runs; it raises no failure, since of a sweep Hydra would report only the first."""

    def task(config: DictConfig) -> None:
        try:
            run_one(config)
        except RunFailed as error:
            failures.append(error)
        except ConfigError as error:
            refused.append(error)

    return task


def register_schemas() -> None:
    """Tell Hydra the types of all settings: those of a run, of the launcher and of the sweeper."""
    store = ConfigStore.instance()
    store.store(name="lipexp_schema", node=Settings)
    store.store(group="hydra/launcher", name="stack_schema", node=LauncherOptions)
    store.store(group="hydra/sweeper", name="search_schema", node=SearchOptions)


def run_one(config: DictConfig) -> None:
    """One configuration, one run folder.

    Raises:
        RunFailed: it ended without a result; failed.json is written.
        ConfigError: the data of a single run contradict their dataset.
    """
    from lipexp.display import Display
    from lipexp.members import build
    from lipexp.training import train_many
    from lipexp.wording import broken_bound, shown_path

    begin_work()
    running = HydraConfig.get()
    sweeping = running.mode == RunMode.MULTIRUN
    folder = RunFolder(Path(running.runtime.output_dir))  # absolute, as a user's class may change the folder
    shown = shown_path(folder.path)
    display = Display(brief=sweeping)
    if sweeping and folder.ended:  # Hydra's own launcher does not look
        raise RunFailed(f"hydra.sweep.subdir: gives two jobs the same folder, {shown}")
    try:
        folder.write_config(content(config))  # in place of Hydra's, which leaves interpolations
        member = Gate.member or build(config, running.runtime.choices)
        display.header(member)
        (trained,) = train_many([member], [folder], display, figures=not sweeping)
    except KeyboardInterrupt as error:
        if not folder.ended:
            reason = "terminated" if isinstance(error, Terminated) else "interrupted"
            _write_failure(folder, reason, display.step)
        raise
    except ConfigError as error:
        if not sweeping:
            raise
        _write_failure(folder, str(error), step=0)
        raise RunFailed(f"{error} ({shown})") from None
    except Exception as error:  # a user's class may raise anything
        reason, written = one_line(error), f"{running.job.name}.log"
        with suppress(OSError), (folder.path / written).open("a") as log:  # the disk may be full
            log.write(traceback.format_exc())
        _write_failure(folder, reason, display.step)
        where = f"traceback in {Path(shown, written)}" if (folder.path / written).is_file() else shown
        raise RunFailed(f"{reason} ({where})") from error
    if trained.metrics is None:
        assert trained.failure is not None
        raise RunFailed(f"{trained.failure.reason} at step {trained.failure.step} ({shown})")
    display.result(trained.metrics, Path(shown))
    if trained.metrics.lipschitz.verdict == "FAIL":
        raise RunFailed(f"{broken_bound(trained.metrics.lipschitz)} ({shown})")


def _write_failure(folder: RunFolder, reason: str, step: int) -> None:
    try:
        folder.write_failure(reason, step)
    except OSError as error:  # such as a disk that is full, which may be why the run has failed
        complain(f"{folder.path}: failed.json cannot be written: {error.strerror}")
