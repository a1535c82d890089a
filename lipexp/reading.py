"""The one door for what is read back from the folders of runs, sweeps and searches.

Such a folder may come from elsewhere, or be damaged. So only plain files that lie in it are opened, none is larger
than what it holds can be, and content is data of the expected types, never code. What is refused is an
`Unreadable`, one line that names the file.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import takewhile
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints, is_typeddict

import yaml

YAML_BYTES = 2**22
JSON_BYTES = 2**24
LARGE_BYTES = 2**30  # of a model, a table, a database, or what describes all jobs of a sweep
DEPTH = 30  # of nested objects and lists
WORDS = {int: "a whole number", float: "a finite number", str: "a text", bool: "true or false"}

T = TypeVar("T")


class Unreadable(ValueError):
    """A file that cannot be used. Its text is one line that names it."""

    def __init__(self, name: str, why: object) -> None:
        super().__init__(printable(" ".join(f"{name} cannot be read: {why}".split())))


class Missing(Unreadable):
    """A file that is not there."""

    def __init__(self, name: str) -> None:
        ValueError.__init__(self, f"there is no {name}")


def printable(text: str) -> str:
    """`text` with every character that a terminal would not simply show, such as an escape, spelled out."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


# Files -----------------------------------------------------------------------------------------------------------


def plain_file(folder: Path, name: str, limit: int) -> Path:
    """The file `name` of `folder`, which is one, lies in it, is no link, and has at most `limit` bytes.

    Raises:
        Missing: there is none.
        Unreadable: it is something else.
    """
    path = Path(os.path.realpath(folder), name)
    try:
        if os.path.realpath(path) != str(path):
            raise Unreadable(name, "it is a link")
        status = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        raise Missing(name) from None
    except OSError as error:
        raise Unreadable(name, error.strerror) from None
    if not stat.S_ISREG(status.st_mode):
        raise Unreadable(name, "it is no file")
    if status.st_size > limit:
        raise Unreadable(name, f"it is larger than {limit / 2**20:.0f} MiB")
    return path


def read_bytes(folder: Path, name: str, limit: int) -> bytes:
    """The content of a file; see `plain_file`."""
    try:
        return plain_file(folder, name, limit).read_bytes()
    except OSError as error:
        raise Unreadable(name, error.strerror) from None


def careful(path: str, flags: int) -> int:
    """An `opener` for `open` that follows no link and waits for no other end of a pipe."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


def is_whole_json(file: Path) -> bool:
    """Whether an object in JSON is there and has its end, which a file torn by a power failure lacks.

    Asked of every run whenever a sweep looks what is missing, so it reads only the ends.
    """
    try:
        handle = careful(str(file), os.O_RDONLY)
    except OSError:
        return False
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            return False
        first, last = os.pread(handle, 1, 0), os.pread(handle, 8, max(0, status.st_size - 8))
        return first == b"{" and last.rstrip().endswith(b"}")
    finally:
        os.close(handle)


def walk(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Everything below `folder`; links are not followed, and folders that cannot be read are passed over."""
    folders = [str(folder)]
    while folders:
        try:
            with os.scandir(folders.pop()) as entries:
                found = list(entries)
        except OSError:
            continue
        yield from found
        folders += [entry.path for entry in found if entry.is_dir(follow_symlinks=False)]


def refuse_links_out(folder: Path) -> None:
    """Raise Unreadable if a link below `folder` leads out of it: what is written there would land elsewhere.

    Those of submitit, which nobody writes to, lead to where the folder lay when it was submitted.
    """
    inside = os.path.realpath(folder)
    links = (entry for entry in walk(folder) if entry.is_symlink() and ".submission_file_" not in entry.name)
    for entry in links:
        if not Path(os.path.realpath(entry.path)).is_relative_to(inside):
            raise Unreadable(os.path.relpath(entry.path, folder), f"it is a link out of {folder}")


# Content ---------------------------------------------------------------------------------------------------------


def read_json(folder: Path, name: str, limit: int = JSON_BYTES) -> dict[str, Any]:
    """The JSON object in a file: text in Unicode, no deeper than DEPTH.

    Raises:
        Missing: there is no such file.
        Unreadable: it is none that may be read, or holds something else.
    """
    content = read_bytes(folder, name, limit)
    try:
        found = json.loads(content)
        if not isinstance(found, dict):
            raise ValueError("it is no JSON object")
        _check(found)
    except RecursionError:
        raise Unreadable(name, "it is nested too deeply") from None
    except ValueError as error:
        raise Unreadable(name, error) from None
    return found


def _check(node: Any, depth: int = 0) -> None:
    if depth > DEPTH:
        raise ValueError("it is nested too deeply")
    if isinstance(node, dict):
        for key, value in node.items():
            if not isinstance(key, str | int | float | None):
                raise ValueError(f"it has the key {key}")
            _check(key)
            _check(value, depth + 1)
    elif isinstance(node, list):
        for value in node:
            _check(value, depth + 1)
    elif isinstance(node, str) and not node.isascii():
        node.encode()  # half a surrogate pair cannot be


def read_yaml(folder: Path, name: str, inside: str = "") -> dict[str, Any]:
    """The mapping in a YAML file, without tags and aliases, no deeper than DEPTH.

    Args:
        inside: the line before the block to read, with its indentation; all the rest, which may be long, is passed
            over. For files that a program writes.

    Raises:
        Missing: there is no such file.
        Unreadable: it is none that may be read, or holds something else.
    """
    content = read_bytes(folder, name, YAML_BYTES)
    if inside:
        lines = content.partition(f"\n{inside}\n".encode())[2].splitlines(keepends=True)
        indented = b" " * (len(inside) - len(inside.lstrip()) + 1)
        block = list(takewhile(lambda line: line.startswith(indented), lines))
        content = b"".join(block)
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the C parser is ten times as fast
    try:
        depth = 0
        for event in yaml.parse(content, loader):  # one by one: the C code that nests them has no limit of its own
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEPTH:
                raise ValueError("it is nested too deeply")
            if isinstance(event, yaml.AliasEvent) or getattr(event, "tag", None) is not None:
                raise ValueError("it has aliases or tags")
        found = yaml.load(content, loader)
        if not isinstance(found, dict):
            raise ValueError("it is no mapping")
        _check(found)
        return found
    except (ValueError, yaml.YAMLError) as error:
        raise Unreadable(name, error) from None


# Types -----------------------------------------------------------------------------------------------------------


def parse(cls: type[T], content: Any) -> T:
    """A dataclass or named tuple from its JSON, or a typed dict.

    Raises:
        ValueError: a key is missing or unknown, or a value has another type; one line says which.
    """
    fields: Any = _fields  # which mypy does not take for hashable
    kinds, required = fields(cls)
    if not isinstance(content, Mapping):
        raise ValueError(f"{cls.__name__} must be an object, not {content!r:.40}")
    lacking, foreign = (
        [key for key in required if key not in content],
        [key for key in content if key not in kinds],
    )
    if lacking or foreign:
        word = "lacks" if lacking else "does not know"
        raise ValueError(f"{cls.__name__} {word} {(lacking or foreign)[0]!r:.40}")
    return cls(**{key: _value(kinds[key], value, f"{cls.__name__}.{key}") for key, value in content.items()})


def read_record(cls: type[T], folder: Path, name: str, limit: int = JSON_BYTES) -> T:
    """`parse` of the JSON object in a file; Missing or Unreadable where that fails."""
    content = read_json(folder, name, limit)
    try:
        return parse(cls, content)
    except ValueError as error:
        raise Unreadable(name, error) from None


@cache
def _fields(cls: type) -> tuple[dict[str, Any], list[str]]:
    """The types of the fields, and those that have no default."""
    kinds = get_type_hints(cls, include_extras=True)
    if is_typeddict(cls):
        return kinds, list(kinds)
    parameters = inspect.signature(cls).parameters.values()
    return kinds, [each.name for each in parameters if each.default is each.empty]


def _value(kind: Any, value: Any, name: str) -> Any:
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin is Annotated and is_typeddict(inner[1]):
        return parse(inner[1], value)
    if origin is Annotated:
        if not any(type(value) is type(allowed) and value == allowed for allowed in inner[1]):
            raise ValueError(f"{name} must be one of {', '.join(map(str, inner[1]))}, not {value!r:.40}")
        return value
    if origin in (Union, UnionType):
        if value is None and NoneType in inner:
            return None
        (kind,) = (each for each in inner if each is not NoneType)
        return _value(kind, value, name)
    if origin in (list, tuple) and isinstance(value, list):
        return origin(_value(inner[0], each, name) for each in value)
    if origin is not None and issubclass(origin, Mapping) and isinstance(value, dict):
        convert = int if inner[0] is int else str
        return {convert(key): _value(inner[1], each, name) for key, each in value.items()}
    if origin is None and kind is not float and kind is not Path and kind not in WORDS:
        return parse(kind, value)
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float and type(value) is int and abs(value) < 2**1000:
        return float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise ValueError(f"{name} must be {WORDS.get(kind, 'a list or an object')}, not {value!r:.40}")
    return value
