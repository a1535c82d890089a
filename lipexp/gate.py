"""The gate: what is wrong with a command line is found here, before anything is made.

`checked` reads the words of `lipexp train`. `Gate` looks at the configuration that Hydra has composed of them, and
takes the folder. Hydra calls it as a callback and turns what callbacks raise into warnings, so that whatever is
raised here becomes a `Refused`, a SystemExit, which Hydra lets pass.
"""

from __future__ import annotations

import fcntl
import math
import re
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, flag_override

from lipexp.config import GROUPS, SETTINGS, ConfigError, content, no_such, one_of
from lipexp.process import begin_work
from lipexp.reading import careful, printable
from lipexp.runs import RunFolder

LOCK = ".lock"  # in a sweep's folder
MOST_JOBS = 100_000  # of a sweep

# Hydra's flags. None: it takes no value; an empty tuple: any value.
FLAGS: dict[str, tuple[str, ...] | None] = {
    **dict.fromkeys(("--help", "-h", "--hydra-help", "--version", "--resolve", "--run", "-r"), None),
    **dict.fromkeys(("--multirun", "-m", "--shell-completion", "-sc"), None),
    **dict.fromkeys(
        ("--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd"), ()
    ),
    **dict.fromkeys(("--cfg", "-c"), ("job", "hydra", "all")),
    **dict.fromkeys(("--info", "-i"), ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")),
}
LONG = {"-m": "--multirun", "-c": "--cfg", "-i": "--info", "-p": "--package", "-sc": "--shell-completion"}


# The words of the command line -----------------------------------------------------------------------------------


def checked(arguments: Sequence[str]) -> list[str]:
    """The arguments as Hydra 1.3 wants them, all flags before the overrides.

    Raises:
        ConfigError: what Hydra would answer with a page, ignore, or get wrong.
        HydraException: an override that cannot be read.
    """
    flags: dict[str, list[str]] = {}
    overrides, rest = [], deque(arguments)
    while rest:
        word = rest.popleft()
        if not word.startswith("-"):
            overrides.append(word)
            continue
        name, given, value = word.partition("=")
        if name not in FLAGS:
            raise ConfigError(name, None, no_such("flag", name, sorted(FLAGS)))
        flags[LONG.get(name, name)] = _flag(name, value if given else None, rest)
    ordered = [word for name, words in flags.items() for word in (name, *words)]
    if "--shell-completion" in flags:
        return ordered + overrides
    modes = [name for name in ("--multirun", "--cfg", "--info") if name in flags]
    if len(modes) > 1:
        raise ConfigError(modes[0], None, f"cannot be used together with {modes[1]}")
    for name in ("--package", "--resolve"):
        if name in flags and not {"--cfg", "--help", "-h"} & set(flags):
            raise ConfigError(name, None, "is for --cfg")
    overrides = checked_overrides(overrides, sweep="--multirun" in flags)
    if "--cfg" not in flags:
        # Last, so that no other override takes it away.
        overrides.append("++hydra.callbacks.gate={_target_: lipexp.gate.Gate}")
    return ordered + overrides


def _flag(name: str, value: str | None, rest: deque[str]) -> list[str]:
    """The words that follow a flag: its value, which may be the next one of the `rest`."""
    allowed = FLAGS[name]
    if allowed is None:
        if value is not None:
            raise ConfigError(name, value, "takes no value")
        return []
    if value is None and name in ("--info", "-i"):  # whose value may be left out
        value = rest.popleft() if rest and rest[0] in allowed else "all"
    elif value is None:
        if not rest:
            raise ConfigError(name, None, "needs a value" + (f": {', '.join(allowed)}" if allowed else ""))
        value = rest.popleft()
    if allowed:
        one_of(name, value, allowed)
    return [value]


def checked_overrides(lines: Sequence[str], sweep: bool) -> list[str]:
    """The overrides of a run or a sweep as Hydra gets them right.

    Raises:
        ConfigError: what it would ignore, or get wrong.
        HydraException: one that cannot be read.
    """
    parsed = OverridesParser.create().parse_overrides(list(lines))
    files = any(o.is_sweep_override() and o.key_or_group in (*GROUPS, "experiment") for o in parsed)
    seen: dict[Any, bool] = {}  # -> it is swept
    found, jobs = [], 1
    for line, override in zip(lines, parsed, strict=True):
        head, _, value = line.partition("=")
        key = override.key_or_group
        # Of two plain values the last one wins, as everywhere; of a sweep some values would be lost.
        name, swept = (key, override.package), override.is_sweep_override()
        if name in seen and (swept or seen[name]):
            raise ConfigError(head, value, f"{key} is swept, and given twice")
        seen[name] = swept
        if key == "hydra.mode":
            raise ConfigError(head, value, "is what -m chooses")
        if key == "hydra.verbose" and override.value() is None:
            raise ConfigError(head, value, "must be true, false, or names of loggers")
        if re.search(r"\bsort\s*\(\s*range\b", value):
            raise ConfigError(head, value, "Hydra sorts a range(…) wrongly; write it in the order that is wanted")
        if override.is_sweep_override():
            jobs *= _length(override, head, value)
        if key in (*GROUPS, "experiment") or "/" in key:
            if key == "experiment" and override.value() is None:
                continue  # the default
            _check_option(override, head, value)
        elif sweep and files and "." in key and not (override.is_sweep_override() or override.is_hydra_override()):
            # Hydra would apply it to the default options, too, which may lack it. A choice it leaves to the jobs.
            line = line if override.is_delete() else f"{head}=choice({value})"
        found.append(line)
    if jobs > MOST_JOBS:
        raise ConfigError("--multirun", None, f"there are {jobs:,} jobs in this sweep; at most {MOST_JOBS:,}")
    return found


def _length(override: Override, head: str, value: str) -> int:
    """The number of values of a sweep; ConfigError for a range or an interval that makes no sense."""
    swept: Any = override.value()
    if isinstance(swept, ChoiceSweep):
        return len(swept.list)
    numbers: list[Any] = []
    if isinstance(swept, IntervalSweep):
        numbers = [swept.start, swept.end]
    elif isinstance(swept, RangeSweep):
        numbers = [swept.start, swept.stop, swept.step]
    if not all(isinstance(end, int | float) and math.isfinite(end) for end in numbers):
        raise ConfigError(head, value, "its ends must be finite numbers")
    if not isinstance(swept, RangeSweep):
        return 1
    start, stop, step = map(float, numbers)
    if not step:
        raise ConfigError(head, value, "its step must not be 0")
    return max(0, math.ceil((stop - start) / step))


def _check_option(override: Override, head: str, value: str) -> None:
    """Raise ConfigError if the value of a group is no name of an option."""
    key, swept = override.key_or_group, override.value()
    if isinstance(swept, RangeSweep | IntervalSweep):
        raise ConfigError(head, value, "must be the name of an option")
    if override.is_sweep_override() and not isinstance(swept, ChoiceSweep):
        return  # a glob, which matches names
    values = [override._convert_value(one) for one in swept.list] if isinstance(swept, ChoiceSweep) else [swept]
    for one in values:
        if isinstance(one, dict) and "/" not in key:
            continue  # settings of the group
        if isinstance(one, list) and key == "experiment" and all(isinstance(name, str) for name in one):
            continue
        if override.is_delete() or one is None:
            raise ConfigError(head, value or None, "needs one option")
        if isinstance(one, list):
            raise ConfigError(head, value, f"takes one option; a sweep over several is {key}=a,b with -m")
        if not isinstance(one, str):
            raise ConfigError(head, value, "must be the name of an option")


# The composed configuration --------------------------------------------------------------------------------------


def check_composed(config: DictConfig, choices: dict[str, Any], loader: Any) -> None:
    """What is asked of every configuration, of a run and of a sweep.

    Raises:
        ConfigError: something that was asked for would have no effect, or the run could not be read back.
    """
    if config.hydra.output_subdir != ".hydra":
        raise ConfigError(
            "hydra.output_subdir", config.hydra.output_subdir, "must stay .hydra, where runs are read"
        )
    check_experiment(choices, loader)
    text = repr(OmegaConf.to_container(config, resolve=False))
    for key in map(str, config):
        if key not in ("hydra", *SETTINGS) and f"${{{key}" not in text:  # others can refer to it
            raise ConfigError(key, None, no_such("setting", key, SETTINGS))


def check_experiment(choices: dict[str, Any], loader: Any) -> None:
    """Refuse an experiment whose choice of a launcher or a sweeper has no effect, as config.yaml made its own."""
    for name in re.findall(r"[^\[\],\s']+", str(choices.get("experiment") or "")):
        found = loader.repository.load_config(f"experiment/{name}")
        for default in (found.defaults_list or []) if found is not None else []:
            group, option = str(getattr(default, "group", "")).lstrip("/"), getattr(default, "value", None)
            if group.startswith("hydra/") and choices.get(group) != option:
                raise ConfigError("experiment", name, f"cannot choose {group}={option}; the command line can")


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Holds `folder` for this process, where its file system knows locks.

    Raises:
        ConfigError: another process holds it.
    """
    with open(folder / LOCK, "a", opener=careful) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError("hydra.sweep.dir", folder, "is in use by another lipexp process") from None
        except OSError:  # the file system has no locks
            pass
        yield


class Refused(SystemExit):
    """The configuration is refused because of `error`, which may be of any kind."""

    def __init__(self, error: Exception) -> None:
        super().__init__(2)
        self.error = error


class Gate(Callback):
    """Checks a configuration before Hydra creates anything, so that bad input leaves no folder behind."""

    member: ClassVar[Any] = None  # the single run that was checked
    folder: ClassVar[Path | None] = None  # that it or the sweep leaves its results in
    _claimed: ClassVar[list[Path]] = []  # folders made for this command
    _held: ClassVar[ExitStack] = ExitStack()  # their locks

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        import lipexp.training  # noqa: F401  # what the run needs, while Ctrl-C may still end the process
        from lipexp.members import build

        def check() -> None:
            running: Any = HydraConfig.instance()
            running.cfg = config  # for the resolver `hydra:`
            with flag_override(config.hydra.runtime, ["readonly", "struct"], [False, False]):
                Gate.folder = Path(config.hydra.run.dir).absolute()
                config.hydra.runtime.output_dir = str(Gate.folder)
            check_composed(config, config.hydra.runtime.choices, GlobalHydra.instance().config_loader())
            if config.get("resume"):  # a replayed configuration may lack it
                raise ConfigError("resume", "true", "continues a sweep, which needs -m")
            if config.hydra.sweeper.get("params"):
                raise ConfigError(
                    "experiment", config.hydra.runtime.choices.get("experiment"), "is a sweep, which needs -m"
                )
            Gate.member = build(content(config), config.hydra.runtime.choices)
            self._claim("hydra.run.dir", Path(config.hydra.run.dir), locked=False)

        _or_refused(check)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        def check() -> None:
            check_composed(config, config.hydra.runtime.choices, GlobalHydra.instance().config_loader())
            Gate.folder = Path(config.hydra.sweep.dir).absolute()
            if config.hydra.launcher._target_.startswith("hydra_plugins.lipexp"):
                if config.hydra.sweeper.get("max_batch_size") is not None:
                    value = config.hydra.sweeper.max_batch_size
                    raise ConfigError("hydra.sweeper.max_batch_size", value, "is for hydra/launcher=basic")
                return  # lipexp's launcher composes every job first, and knows which folder it may continue
            if config.get("resume"):
                raise ConfigError("resume", "true", "is for hydra/launcher=stack")
            self._claim("hydra.sweep.dir", Path(config.hydra.sweep.dir), locked=True)

        _or_refused(check)

    def _claim(self, option: str, folder: Path, locked: bool) -> None:
        """Make `folder` for this command alone.

        Raises:
            ConfigError: it cannot be made, holds what would be overwritten, or another process has just taken it.
        """
        begin_work()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if any(folder.iterdir()):
                raise ConfigError(option, folder, "is not empty; results are never overwritten")
            if locked:
                self._held.enter_context(exclusive(folder))
            else:
                (folder / ".hydra").mkdir()  # the one that makes it has the folder
            self._claimed.append(folder)
        except FileExistsError:
            raise ConfigError(option, folder, "is in use by another lipexp process") from None
        except OSError as error:
            raise ConfigError(option, folder, f"cannot be written: {error.strerror}") from None

    @classmethod
    def begin(cls) -> None:
        """A new command."""
        cls.member = cls.folder = None
        cls._claimed.clear()

    @classmethod
    def release(cls) -> None:
        """Let go of the folders made for this command, and remove those that are still empty."""
        cls._held.close()
        for folder in cls._claimed:
            with suppress(OSError):  # a disk that can only be read by now
                RunFolder(folder).discard_if_empty()


def _or_refused(check: Callable[[], None]) -> None:
    try:
        check()
    except Exception as error:  # a user's class may raise anything
        raise Refused(error) from None


def complain(message: object, *more: str) -> None:
    """One line on stderr, and perhaps further ones, such as the end of a log."""
    print(f"lipexp: {printable(str(message))}", *map(printable, more), sep="\n", file=sys.stderr)
