"""What is wrong with a command line, in one line, for the errors that Hydra and OmegaConf raise."""

from __future__ import annotations

import re
from typing import Any

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException, ValidationError
from yaml import MarkedYAMLError

from lipexp.config import no_such, one_line
from lipexp.runs import flat


def explain(error: BaseException) -> str:
    """`option=value: what is allowed`, as far as the error tells, which may be of any kind."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _missing_option(error.missing_cfg_file, list(error.options or []), str(error))
    if isinstance(error, OverrideParseException):
        return f"{error.override}: cannot be read as option=value ({_first_line(error)})"
    if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{mark.name}, line {mark.line + 1}: {error.problem}"
    if not isinstance(error, HydraException | OmegaConfBaseException):
        return one_line(error)
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__ or error.__context__
    if isinstance(cause, ValidationError):
        return _wrong_type(cause)
    if isinstance(cause, ConfigKeyError | AttributeError) and isinstance(error, HydraException):
        return _unknown_key(error, cause)
    if "does not support sweep type : INTERVAL_SWEEP" in str(error):
        return "interval(…): is for a search, hydra/sweeper=search; a sweep takes choice(…) and range(…)"
    ambiguous = re.match(r"Ambiguous value for argument '(.*)'", str(error))
    if ambiguous:
        return f"{ambiguous[1]}: several values are a sweep, which needs -m; a list is written in [brackets]"
    return _first_line(error)


def _missing_option(name: str, options: list[str], message: str) -> str:
    group, _, option = name.rpartition("/")
    if not group:
        return _first_line(message)
    return f"{group}={option}: {no_such('option', option, sorted(options), f'{group}=')}"


def _wrong_type(error: ValidationError) -> str:
    if "is not Optional" in str(error):
        return f"{error.full_key}=null: must be set"
    if "is not a ListConfig" in str(error):
        return f"{error.full_key}: must be a list in [brackets]"
    value = re.search(r"Value '(.*?)' of type '.*?' could not be converted to (\w+)", str(error))
    if value is None:
        return f"{error.full_key}: {_first_line(error)}"
    kind = {"Integer": "a whole number", "Float": "a number", "Boolean": "true or false"}
    return f"{error.full_key}={value[1]}: must be {kind.get(value[2], value[2])}"


def _unknown_key(error: HydraException, cause: BaseException) -> str:
    found = re.search(r"'([^']+)'", _first_line(error))
    key = found[1] if found else "this option"
    where = ""
    if _first_line(error).startswith("In "):  # a file, whose name is quoted there
        where, key = f" (in {key})", str(getattr(cause, "full_key", None) or getattr(cause, "key", key))
    parent = getattr(cause, "parent_node", None)
    if not isinstance(parent, DictConfig):
        return f"{key}: {_first_line(error)}"
    # The part of the key that is wrong is the one that its parent lacks: `los` of `los.margin`.
    parts = key.split(".")
    depth = next((i for i, part in enumerate(parts) if part == str(getattr(cause, "key", ""))), len(parts) - 1)
    prefix, last = ".".join(parts[:depth]), parts[depth]
    allowed = [str(name) for name in parent if name not in ("hydra", "_target_")]
    leaves: Any = OmegaConf.to_container(parent, resolve=False)
    deeper = [leaf for leaf in flat(leaves) if leaf.endswith(f".{last}") and not leaf.startswith("hydra.")]
    if deeper and not prefix:
        return f"{key}: no such setting; did you mean {deeper[0]}?{where}"
    return f"{key}: {no_such('setting', last, allowed, f'{prefix}.' if prefix else '')}{where}"


def _first_line(message: object) -> str:
    lines = [line.strip() for line in str(message).splitlines() if line.strip()]
    return lines[0] if lines else type(message).__name__
