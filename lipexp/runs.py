"""The run folder: the one place that names, writes and reads its files.

Every file is written under a temporary name and renamed; metrics.json comes last and only for a completed run,
so a folder that has it is complete. A failed run has failed.json instead.
"""

from __future__ import annotations

import csv
import fcntl
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    import numpy.typing as npt
    import pandas as pd

# What is in a folder before a run or a sweep has left anything there: Hydra's own files, and the lock.
BEGUN = {".hydra", "train.log", "multirun.yaml", ".lock"}


class SweepFailed(Exception):
    """Some jobs of a sweep failed; `failures` has a line for each."""

    def __init__(self, failures: Sequence[str]) -> None:
        super().__init__(f"{len(failures)} jobs failed")
        self.failures = list(failures)


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run, finished or not."""

    path: Path

    @property
    def complete(self) -> bool:
        return (self.path / "metrics.json").is_file()

    @property
    def failed(self) -> bool:
        return (self.path / "failed.json").is_file()

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
        self._write(f"{name}.csv", lambda path: path.write_text(content))

    def write_rows(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """`name`.csv from rows; see `write_csv`."""
        write_csv(self.path / f"{name}.csv", rows)

    def write_figure(self, figure: Any) -> None:
        """figure.png from a matplotlib figure."""
        self._write("figure.png", lambda path: figure.savefig(path, format="png"))

    def write_failure(self, reason: str, step: int) -> None:
        """failed.json: the run ended without a result."""
        self.write_json("failed.json", {"reason": reason, "step": step})

    def config(self) -> dict[str, Any]:
        """The run's configuration as Hydra composed it, without its own node."""
        return self._read_yaml(".hydra/config.yaml")

    def recorded(self) -> tuple[dict[str, Any], dict[str, str]]:
        """The configuration, and the option chosen in each group; each is empty where Hydra recorded none."""
        found: list[dict[str, Any]] = [{}, {}]
        for i, (name, *keys) in enumerate([("config",), ("hydra", "hydra", "runtime", "choices")]):
            with suppress(OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
                node: Any = self._read_yaml(f".hydra/{name}.yaml")
                for key in keys:
                    node = node[key]
                found[i] = dict(node)
        return found[0], {str(group): str(option) for group, option in found[1].items()}

    def table(self, name: str) -> pd.DataFrame:
        """`name`.csv: history, gradients, radii or layers."""
        import pandas as pd

        return pd.read_csv(self.path / f"{name}.csv")

    def model_bytes(self) -> bytes:
        """The content of model.pt."""
        return (self.path / "model.pt").read_bytes()

    def discard_if_empty(self) -> None:
        """Remove a folder in which nothing has been left yet, and its parent if that is empty then."""
        if not self.path.is_dir() or {entry.name for entry in self.path.iterdir()} - BEGUN:
            return
        shutil.rmtree(self.path)
        with suppress(OSError):  # not empty, or the folder that the command runs in
            self.path.parent.rmdir()

    def read_json(self, name: str) -> dict[str, Any]:
        """The JSON object in a file; OSError or ValueError where there is none."""
        content = json.loads((self.path / name).read_text())
        if not isinstance(content, dict):
            raise ValueError("it is no JSON object")
        return content

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
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

    def _read_yaml(self, name: str) -> dict[str, Any]:
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the C parser is ten times as fast
        return dict(yaml.load((self.path / name).read_text(), Loader=loader) or {})

    def _write(self, name: str, write: Callable[[Path], Any]) -> None:
        write_file(self.path / name, write)


def write_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` make a temporary file, and put it in place of `path` once it is whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
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

    write_file(path, write)


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


def find(folders: Sequence[Path]) -> list[RunFolder]:
    """The runs at or under `folders`, finished and failed, in the order of their paths."""
    found: set[Path] = set()
    for folder in folders:
        for marker in ("metrics.json", "failed.json"):
            found.update(path.parent for path in folder.rglob(marker))
    return [RunFolder(path) for path in sorted(found)]
