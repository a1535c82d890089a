"""`lipexp train` as a function: what `lipexp.train` does.

It composes as the command does, through Hydra and the gate, and so needs Hydra's global state for a while. That is
put back as it was found, and calls from several threads wait for each other.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.singleton import Singleton
from hydra.core.utils import JobRuntime
from hydra.errors import HydraException
from hydra.types import RunMode
from hydra.version import VersionBase, setbase
from omegaconf.basecontainer import BaseContainer
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from lipexp.config import ConfigError, Settings, conf_dir
from lipexp.explain import explain
from lipexp.gate import Gate, Refused, checked_overrides
from lipexp.hydra_app import collecting, register_schemas
from lipexp.loading import LoadedRun, LoadedRuns, load_run
from lipexp.runs import RunFailed, SweepFailed
from lipexp.screen import SHOWN

GATE = "++hydra.callbacks.gate={_target_: lipexp.gate.Gate}"
# Worker processes import the script that starts them, so without `if __name__ == "__main__":` it would run again.
INLINE = "hydra.launcher.executor=inline"
LISTS = {name for name, kind in get_type_hints(Settings).items() if str(kind).startswith("list")}
EXPECTED = (ConfigError, HydraException, OmegaConfBaseException, YAMLError)  # of bad input
HYDRA_STATE = (GlobalHydra, HydraConfig, JobRuntime, VersionBase)  # Hydra's other singletons are registries
ONE_AT_A_TIME = threading.RLock()


def train(
    overrides: Sequence[str],
    settings: Mapping[str, Any],
    config_dir: str | os.PathLike[str] | None,
    progress: bool,
) -> LoadedRun | LoadedRuns:
    """See `lipexp.train`."""
    lines = [*overrides, *(written(name, value) for name, value in settings.items())]
    shown = SHOWN.set("progress" if progress else "nothing")
    try:
        with hydra_of_our_own(config_dir) as hydra:
            return _train(hydra, lines)
    except (*EXPECTED, Refused) as stop:
        error = stop.error if isinstance(stop, Refused) else stop
        raise _refusal(error) from (None if isinstance(error, EXPECTED) else error)
    finally:
        SHOWN.reset(shown)


def _train(hydra: Hydra, lines: Sequence[str]) -> LoadedRun | LoadedRuns:
    for line in lines:
        if not isinstance(line, str) or line.startswith("-"):
            allowed = "is no override, such as 'loss=hinge'; flags of the command line are none"
            raise ConfigError(str(line), None, allowed)
    keys = {o.key_or_group: o.is_sweep_override() for o in OverridesParser.create().parse_overrides(list(lines))}
    sweep = any(keys.values()) or "hydra/sweeper" in keys or ("experiment" in keys and _is_grid(hydra, lines))
    composed = [*checked_overrides(lines, sweep), GATE]
    if sweep and not keys.keys() & {"hydra/launcher", INLINE.partition("=")[0]}:
        composed.append(INLINE)
    failures: list[RunFailed] = []
    refused: list[ConfigError] = []
    Gate.begin()
    try:
        # Without Hydra's logging, which would replace the handlers of this process.
        carry_out = hydra.multirun if sweep else hydra.run
        carry_out("config", collecting(failures, refused), composed, with_log_configuration=False)
    except SweepFailed as error:
        failures.append(error)
    finally:
        folder = Gate.folder
        Gate.release()
    if refused:
        raise refused[0]
    if len(failures) == 1 and not sweep:
        raise failures[0]
    assert folder is not None
    # Its classes have just run here, so they are trusted.
    if not sweep:
        return load_run(folder, trust=True)
    runs = LoadedRuns(folder, trust=True)
    if failures:
        reasons = [line for failure in failures for line in getattr(failure, "failures", [str(failure)])]
        finished = [f"lipexp.load({str(folder)!r}) reads the {len(runs)} that have finished"] if len(runs) else []
        raise SweepFailed(reasons + finished)
    return runs


def _is_grid(hydra: Hydra, lines: Sequence[str]) -> bool:
    """Whether an experiment among the overrides brings values to sweep over."""
    composed = hydra.compose_config("config", checked_overrides(lines, sweep=True), RunMode.MULTIRUN)
    return bool(composed.hydra.sweeper.get("params"))


@contextmanager
def hydra_of_our_own(config_dir: str | os.PathLike[str] | None) -> Iterator[Hydra]:
    """Hydra on conf/, and on a folder of the user's own.

    Raises:
        ConfigError: that is no folder.
    """
    with ONE_AT_A_TIME:
        instances: dict[Any, Any] = Singleton._instances
        found = {kind: instances.pop(kind) for kind in HYDRA_STATE if kind in instances}
        resolvers = dict(BaseContainer._resolvers)
        try:
            setbase("1.3")
            register_schemas()
            search_path = create_config_search_path(str(conf_dir()))
            if config_dir is not None:
                own = Path(config_dir).absolute()
                if not own.is_dir():
                    raise ConfigError("config_dir", config_dir, "is no folder")
                search_path.prepend("command-line", f"file://{own}", SearchPathQuery(provider="schema"))
            yield Hydra.create_main_hydra2("train", search_path)
        finally:
            for kind in HYDRA_STATE:
                instances.pop(kind, None)
            instances.update(found)
            BaseContainer._resolvers = resolvers


def written(name: str, value: Any) -> str:
    """A setting as an override of the command line; several values are a sweep.

    Raises:
        ConfigError: a value that cannot be written so.
    """
    several = isinstance(value, list | tuple | range | np.ndarray)
    if name in LISTS and not (several and len(value) and isinstance(value[0], list | tuple | np.ndarray)):
        return f"{name}={_text(name, value)}"
    if not several:
        return f"{name}={_text(name, value)}"
    if not len(value):
        raise ConfigError(name, "[]", "there is nothing to sweep over")
    return f"{name}=choice({','.join(_text(name, one) for one in value)})"


def _text(name: str, value: Any) -> str:
    if isinstance(value, list | tuple | np.ndarray):
        return f"[{','.join(_text(name, one) for one in value)}]"
    value = value.item() if isinstance(value, np.generic) else value
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | int | float):
        return str(value)
    raise ConfigError(name, value, "must be a number, true or false, text, or several of them")


def _refusal(error: Exception) -> ConfigError:
    """What the command says of an error, as the error that it is in Python."""
    if isinstance(error, ConfigError):
        return error
    head, found, allowed = explain(error).partition(": ")
    option, _, value = head.partition("=")
    return ConfigError(option, value or None, allowed) if found else ConfigError("train", None, head)
