"""The run folder: the one place that names, writes and reads its files.

Every file is written under a temporary name and renamed; metrics.json comes last and only for a completed run,
so a folder that has it is complete. A failed run has failed.json instead. All that is read passes reading.py.
"""

from __future__ import annotations

import csv
import fcntl
import hashlib
import io
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import yaml
from omegaconf._utils import get_omega_conf_dumper

from lipexp.reading import (
    LARGE_BYTES,
    Unreadable,
    is_whole_json,
    printable,
    read_bytes,
    read_json,
    read_yaml,
    walk,
)

if TYPE_CHECKING:
    import numpy.typing as npt
    import pandas as pd

# What is in a folder before a run or a sweep has left anything there: Hydra's own files, and the lock.
BEGUN = {".hydra", "train.log", "multirun.yaml", ".lock"}
CONFIG, HYDRA = ".hydra/config.yaml", ".hydra/hydra.yaml"


class NotFinite(ValueError):
    """A number of a result is infinite, or none at all."""


class RunFailed(Exception):
    """A run ended without a result; its folder says why."""


class SweepFailed(RunFailed):
    """Some jobs of a sweep failed; `failures` has a line for each."""

    def __init__(self, failures: Sequence[str]) -> None:
        super().__init__("\n".join(failures))
        self.failures = list(failures)


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run, finished or not."""

    path: Path

    def __str__(self) -> str:
        return printable(str(self.path))

    @property
    def complete(self) -> bool:
        return is_whole_json(self.path / "metrics.json")

    @property
    def failed(self) -> bool:
        return is_whole_json(self.path / "failed.json")

    @property
    def ended(self) -> bool:
        return self.complete or self.failed

    def write_model(self, state: Mapping[str, Any]) -> str:
        """model.pt, a plain state dict; returns its SHA-256."""
        import torch

        # Saved through memory: a file's own name would go into the archive, and equal runs would differ.
        buffer = io.BytesIO()
        torch.save(dict(state), buffer)
        content = buffer.getvalue()
        self._write("model.pt", lambda path: path.write_bytes(content))
        return hashlib.sha256(content).hexdigest()

    def write_columns(self, name: str, columns: Mapping[str, npt.NDArray[Any]]) -> None:
        """`name`.csv from columns of equal length; every float keeps all its digits."""
        lines = map(",".join, zip(*(_texts(column) for column in columns.values()), strict=True))
        content = "\n".join([",".join(columns), *lines, ""])
        self._write(f"{name}.csv", lambda path: path.write_text(content), flush=False)

    def write_rows(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """`name`.csv from rows; see `write_csv`."""
        write_csv(self.path / f"{name}.csv", rows)

    def write_figure(self, figure: Any) -> None:
        """figure.png from a matplotlib figure."""
        self._write("figure.png", lambda path: figure.savefig(path, format="png"), flush=False)

    def write_failure(self, reason: str, step: int) -> None:
        """failed.json: the run ended without a result."""
        self.write_json("failed.json", {"reason": reason, "step": step})

    def write_config(self, content: Mapping[str, Any]) -> None:
        """.hydra/config.yaml: what the run was made from, resolved, wherever Hydra puts its own files."""
        (self.path / CONFIG).parent.mkdir(exist_ok=True)
        self._write(CONFIG, lambda path: path.write_text(dump(content)), flush=False)

    def config(self) -> dict[str, Any]:
        """What `write_config` wrote; Unreadable if it cannot be read."""
        return read_yaml(self.path, CONFIG)

    def recorded(self) -> tuple[dict[str, Any], dict[str, str]]:
        """The configuration, and the option chosen in each group; each is empty where Hydra recorded none."""
        config: dict[str, Any] = {}
        choices: dict[str, Any] = {}
        with suppress(Unreadable):
            config = self.config()
        with suppress(Unreadable):
            choices = read_yaml(self.path, HYDRA, inside="    choices:")  # of hydra.runtime
        return config, {str(group): str(option) for group, option in choices.items()}

    def table(self, name: str) -> pd.DataFrame:
        """`name`.csv: history, gradients, radii or layers; Unreadable if it cannot be read."""
        import pandas as pd

        try:
            return pd.read_csv(io.BytesIO(read_bytes(self.path, f"{name}.csv", LARGE_BYTES)))
        except Unreadable:
            raise
        except ValueError as error:
            raise Unreadable(f"{name}.csv", error) from None

    def tables(self) -> list[str]:
        """The names of the tables that are there."""
        return sorted(path.stem for path in self.path.glob("*.csv"))

    def model_bytes(self) -> bytes:
        """The content of model.pt."""
        return read_bytes(self.path, "model.pt", LARGE_BYTES)

    def discard_if_empty(self) -> None:
        """Remove a folder in which nothing has been left yet, and its parent if that is empty then."""
        if not self.path.is_dir() or {entry.name for entry in self.path.iterdir()} - BEGUN:
            return
        shutil.rmtree(self.path)
        with suppress(OSError):  # not empty, or the folder that the command runs in
            self.path.parent.rmdir()

    def read_json(self, name: str) -> dict[str, Any]:
        """The JSON object in a file; Unreadable, or Missing, where there is none."""
        return read_json(self.path, name)

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Raises NotFinite, and writes nothing, if a number in it is not finite: JSON has no name for it."""
        for key, value in flat(content).items():
            if not _is_finite(value):
                raise NotFinite(f"{key} is not finite")
        text = json.dumps(content, indent=2, allow_nan=False) + "\n"
        self._write(name, lambda path: path.write_text(text))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Locks the folder for this process, once no other process holds it; leaves no file behind."""
        handle = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def _write(self, name: str, write: Callable[[Path], Any], flush: bool = True) -> None:
        write_file(self.path / name, write, flush)


class _Dumper(yaml.CDumper):  # in C, five times as fast as OmegaConf's
    """Writes as OmegaConf.to_yaml does."""

    def ignore_aliases(self, data: Any) -> bool:
        return True  # an object that is there twice is written twice


_Dumper.add_representer(str, cast(Any, get_omega_conf_dumper().str_representer))


def dump(content: Any) -> str:
    """YAML as OmegaConf.to_yaml writes it, faster."""
    return yaml.dump(content, default_flow_style=False, allow_unicode=True, sort_keys=False, Dumper=_Dumper)


def write_file(path: Path, write: Callable[[Path], Any], flush: bool = True) -> None:
    """Let `write` make a temporary file, and put it in place of `path` once it is whole.

    Args:
        flush: and once it is on the disk, so that a power failure leaves the old file or the new one.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        if flush:
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A CSV file of rows, whose columns are the keys of all of them in the order of their first appearance."""

    def write(file: Path) -> None:
        with file.open("w", newline="") as stream:
            table = csv.DictWriter(
                stream, list(dict.fromkeys(k for row in rows for k in row)), lineterminator="\n"
            )
            table.writeheader()
            table.writerows(rows)

    write_file(path, write, flush=False)


def _texts(column: npt.NDArray[Any]) -> list[str]:
    """The elements of a column as text. orjson spells floats in the shortest way, eight times as fast as repr."""
    if not len(column) or column.dtype.kind not in "iuf":
        return [*map(str, column.tolist())]
    import numpy as np  # readers of run folders need neither
    import orjson

    column = np.ascontiguousarray(column)
    texts = orjson.dumps(column, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1].decode().split(",")
    for i in np.flatnonzero(~np.isfinite(column)).tolist():  # JSON has no name for them
        texts[i] = str(column[i])
    return texts


def flat(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}; lists stay whole."""
    leaves: dict[str, Any] = {}
    for key, value in node.items():
        nested = isinstance(value, Mapping) and value
        leaves |= flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return leaves


def _is_finite(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def find(folders: Sequence[Path]) -> list[RunFolder]:
    """The runs at or under `folders`, finished and failed, in the order of their paths."""
    marks = ("metrics.json", "failed.json")
    found = {entry.path for folder in folders for entry in walk(folder) if entry.name in marks}
    return [RunFolder(path) for path in sorted({Path(path).parent for path in found})]
