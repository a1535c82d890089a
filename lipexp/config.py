"""Configuration: the typed run settings, where conf/ lies, what bad input is, and the one `instantiate`.

A YAML leaf of conf/ holds `_target_` and plain arguments. Only `instantiate` turns it into an object, so the
rule about which targets may be trusted stands in one place.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import math
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf

from lipexp.reading import printable

# group -> its room, and the base class of all that is in it
ROOMS = {
    "dataset": ("lipexp.datasets", "Dataset"),
    "act": ("lipexp.activations", "Activation"),
    "constraint": ("lipexp.constraints", "Constraint"),
    "loss": ("lipexp.losses", "Loss"),
    "model": ("lipexp.models", "Model"),
    "optim": ("lipexp.optim", "Optimiser"),
}
GROUPS = tuple(ROOMS)


@dataclass
class Settings:
    """The schema of conf/config.yaml: one field per flat run setting, one slot per configuration group."""

    seed: int = MISSING
    lipschitz: float = MISSING
    steps: int = MISSING
    batch_size: int = MISSING
    eval_every: int = MISSING
    keep: str = MISSING
    patience: int = MISSING
    device: str = MISSING
    threads: int = MISSING
    radii: list[float] = MISSING
    max_regions: int = MISSING
    resume: bool = MISSING
    dataset: Any = MISSING
    act: Any = MISSING
    constraint: Any = MISSING
    loss: Any = MISSING
    model: Any = MISSING
    optim: Any = MISSING


SETTINGS = tuple(field.name for field in dataclasses.fields(Settings))


class ConfigError(ValueError):
    """Bad input. Its text is the one line that the user reads: `option=value: what is allowed`.

    Without a value (None) it is `option: what is allowed`.
    """

    def __init__(self, option: str, value: object, allowed: str) -> None:
        self.option, self.value, self.allowed = option, value, allowed
        super().__init__(printable(f"{option}: {allowed}" if value is None else f"{option}={value}: {allowed}"))

    def under(self, group: str) -> ConfigError:
        """The same error with its option named as the command line spells it: `noise` -> `dataset.noise`."""
        return ConfigError(f"{group}.{self.option}", self.value, self.allowed)


class Unfit(ConfigError):
    """Options that are right by themselves do not fit each other."""


def number(
    option: str, value: Any, *, above: float | None = None, least: float | None = None, most: float | None = None
) -> float:
    """`value` as a finite float with value > above, value >= least, and value <= most.

    Raises:
        ConfigError: not a number, not finite, or out of range.
    """
    allowed = "a finite number"
    if above is not None:
        allowed += f" above {above:g}"
    if least is not None:
        allowed += f", at least {least:g}"
    if most is not None:
        allowed += f", at most {most:g}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(option, value, f"must be {allowed}")
    try:
        result = float(value)
    except OverflowError:  # an integer of more than 308 digits
        result = math.inf
    inside = (above is None or result > above) and (least is None or result >= least)
    inside = inside and (most is None or result <= most)
    if not (math.isfinite(result) and inside):
        raise ConfigError(option, value, f"must be {allowed}")
    return result


LIPSCHITZ_RANGE = (1e-30, 1e30)  # what float32 weights hold with room to spare


def lipschitz_constant(option: str, value: Any) -> float:
    """`value` as a positive number that float32 weights can realise.

    Raises:
        ConfigError: not a number, not positive, or out of that range.
    """
    constant = number(option, value, above=0)
    low, high = LIPSCHITZ_RANGE
    if not low <= constant <= high:
        raise ConfigError(option, value, f"must be between {low:g} and {high:g}, for float32")
    return constant


def whole(option: str, value: Any, *, least: int, most: int | None = None) -> int:
    """`value` as an integer, at least `least` and at most `most`.

    Raises:
        ConfigError: not a whole number, too small, or too large.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least or (most and value > most):
        limit = f", at most {most}" if most else ""
        raise ConfigError(option, value, f"must be a whole number, at least {least}{limit}")
    return value


def norm_order(option: str, value: Any) -> float:
    """`value` as the p of a p-norm; "inf" may come as a word or as a number.

    Raises:
        ConfigError: it is not 1, 2 or inf.
    """
    with suppress(TypeError, ValueError, OverflowError):
        if not isinstance(value, bool) and float(value) in (1.0, 2.0, math.inf):
            return float(value)
    raise ConfigError(option, value, "must be 1, 2 or inf")


def one_of(option: str, value: Any, allowed: Sequence[str]) -> str:
    """`value` if it stands in `allowed`.

    Raises:
        ConfigError: it does not; the message names the nearest match.
    """
    if value in allowed:
        return str(value)
    raise ConfigError(option, value, no_such("option", str(value), allowed))


def no_such(kind: str, value: str, allowed: Sequence[str], prefix: str = "") -> str:
    """'no such option; did you mean loss=hinge? (bce, hinge, mse)', with kind 'option' and prefix 'loss='."""
    near = get_close_matches(value, allowed, n=1)
    guess = f"; did you mean {prefix}{near[0]}?" if near else ""
    return f"no such {kind}{guess}" + (f" ({', '.join(allowed)})" if allowed else "")


def conf_dir() -> Path:
    """The folder conf/: inside the package in a wheel, beside it in a checkout or an editable install."""
    package = Path(__file__).resolve().parent
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise FileNotFoundError(f"lipexp is installed without its conf/ (looked in {package} and beside it)")


def plain(node: Any) -> dict[str, Any]:
    """A configuration node as a plain dict; the interpolations of a DictConfig are resolved."""
    resolved: Any = OmegaConf.to_container(node, resolve=True) if isinstance(node, DictConfig) else node
    return {str(key): value for key, value in dict(resolved or {}).items()}


def content(config: DictConfig) -> dict[str, Any]:
    """A composed configuration without Hydra's own node, resolved; values have the types of the schema."""
    found: dict[str, Any] = {}
    for key in map(str, config):
        if key != "hydra":
            # From the configuration itself, whose nodes are typed: "3" of an environment variable becomes 3.0.
            node = MISSING if OmegaConf.is_missing(config, key) else config[key]
            found[key] = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    return found


def instantiate(node: Any, group: str, *, trust: bool = True) -> Any:
    """The object that the configuration node of `group` describes.

    Args:
        node: `_target_` and its arguments; interpolations must be resolvable.
        group: names the option in error messages, for example `dataset`.
        trust: False for a configuration read back from a run folder, which may come from elsewhere: then only
            classes of the group's own room are instantiated, and nothing else is imported.

    Raises:
        ConfigError: no `_target_`, one that cannot be imported or is not trusted, or refused arguments.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate as hydra_instantiate

    arguments = plain(node)
    target = arguments.get("_target_")
    if not isinstance(target, str):
        raise ConfigError(group, arguments or "null", "needs an option with a _target_")
    option = f"{group}._target_"
    own = is_of_the_house(target, group)
    if not own and not trust:
        allowed = f"is no class of {ROOMS[group][0]} and may run code; pass trust (--trust) to allow it"
        raise ConfigError(option, target, allowed)
    missing = _import_failure(target)
    if missing is not None:
        raise ConfigError(option, target, f"cannot be used: {missing}")
    for argument, value in arguments.items():
        if value == MISSING:
            raise ConfigError(f"{group}.{argument}", None, "must be set")
    try:
        if not own:
            with contextlib.chdir(os.getcwd()):  # which a user's class may change
                return hydra_instantiate(arguments, _convert_="all")
        # Not by Hydra, which would instantiate nested targets and resolve interpolations in the arguments.
        del arguments["_target_"]
        return _find(target)(**arguments)
    except (InstantiationException, ConfigError, TypeError) as error:
        cause = error.__cause__ if isinstance(error, InstantiationException) else error
        if isinstance(cause, ConfigError):
            raise cause.under(group) from None
        if isinstance(cause, TypeError):
            what = one_line(cause).removeprefix("TypeError: ")
            raise ConfigError(option, target, f"does not take these arguments: {what}") from None
        raise ConfigError(option, target, f"cannot be used: {one_line(cause or error)}") from None


def one_line(error: BaseException) -> str:
    """The first line of what an error says, with its type unless lipexp or the import system raised it."""
    try:
        text = printable(str(error).strip().split("\n")[0])
    except Exception:  # a user's class may raise anything
        text = "its text cannot be printed"
    return text if isinstance(error, ConfigError | ImportError) else f"{type(error).__name__}: {text}"


def _find(target: str) -> Any:
    module, _, name = target.rpartition(".")
    return getattr(importlib.import_module(module), name)


def is_of_the_house(target: str, group: str) -> bool:
    """Whether `target` names a class that lipexp defines in the room of `group`, for use as one of its members."""
    room, base = ROOMS[group]
    module, _, name = target.rpartition(".")
    if module != room:
        return False
    found: Any = getattr(importlib.import_module(room), name, None)
    inside = isinstance(found, type) and f"{found.__module__}.".startswith(f"{room}.")
    return inside and issubclass(found, _find(f"{room}.{base}"))


def _import_failure(target: str) -> str | None:
    """Why `target` cannot be imported, in one line; None if it can."""
    module, _, name = target.rpartition(".")
    if not module or not all(part.isidentifier() for part in target.split(".")):
        return "it is not a dotted path to a class"
    try:
        if not hasattr(importlib.import_module(module), name):
            return f"{module} has no {name}"
    except Exception as error:  # importing a user's module can raise anything
        return one_line(error)
    return None
