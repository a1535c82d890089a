"""Finished runs, rebuilt from their folders: one, or all that lie in a folder as a table and a list."""

from __future__ import annotations

import hashlib
import pickle
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, overload

import pandas as pd
import torch

from lipexp.config import ConfigError, no_such, one_line, whole
from lipexp.constraints import Constraint
from lipexp.datasets import Data, Dataset
from lipexp.datasets.preprocessing import NUMBER, Column, Preprocessing, Target
from lipexp.loop import Streams
from lipexp.measured.gradients import Maximum
from lipexp.members import drawn, part
from lipexp.models import signs
from lipexp.modules import Network
from lipexp.networks import BakedNetwork
from lipexp.prediction import Predictor
from lipexp.proven import Chain, Problem, prove, prove_quickly
from lipexp.reading import LARGE_BYTES, Missing, Unreadable, plain_file
from lipexp.record import Metrics, Outcome, settings
from lipexp.runs import RunFolder, find
from lipexp.wording import interval_line


@dataclass(repr=False)
class LoadedRun:
    """One run, as `lipexp.load` returns it."""

    network: Network  # (B, D) -> (B, C), float32, the weights of model.pt
    baked: BakedNetwork  # the same, as lipexp measures and proves it
    config: dict[str, Any]
    metrics: Metrics
    folder: Path
    trusted: bool = False  # classes from outside lipexp are allowed

    def predict(self, frame: pd.DataFrame, reach: bool = False) -> pd.DataFrame:
        """What the run predicts for the rows of a table, as `lipexp predict` writes it; see `Predictor`.

        Args:
            frame: it has the columns of the table that the run was trained on, but needs no target; of a run on
                other data, x0, x1, … as in gradients.csv.
            reach: also how far each column of numbers may change alone, in its own unit.

        Raises:
            ConfigError: a column is missing, or a value that it cannot take; the first such row is named.
        """
        return self.predictor(frame, reach)

    @cached_property
    def predictor(self) -> Predictor:
        """What `predict` asks."""
        constraint, preprocessing = part_of(self.config, "constraint", self.trusted), self._preprocessing()
        network = constraint.prove(self.baked)
        value, reason = self._certified()
        problem = Problem(
            network,
            Chain.of(constraint, network.layers),
            tuple(torch.tensor(self.metrics.search.box, dtype=torch.float64).T),
            Maximum(self.metrics.lipschitz.measured, ()),
            whole("max_regions", self.config.get("max_regions", 0), least=0),
        )
        # The constant of the whole network is recorded. Of several classes each pair has its own.
        certificate = prove(problem) if preprocessing.task == "multiclass" else prove_quickly(problem)
        if value is not None and certificate.value is not None:
            value = min(value, certificate.value)
        return Predictor(network, replace(certificate, value=value, reason=reason), preprocessing)

    def _certified(self) -> tuple[float | None, str | None]:
        """The smallest constant that is recorded as proven for this model.pt, or why there is none."""
        digest = hashlib.sha256(RunFolder(self.folder).model_bytes()).hexdigest()
        found = [self.metrics.lipschitz] if self.metrics.model_sha256 == digest else []
        again = self.metrics.certify
        found += [again.lipschitz] if again is not None and again.model_sha256 == digest else []
        if not found:
            return None, "model.pt was changed since it was certified; lipexp certify proves its constant"
        proven = [each.certified for each in found if each.certified is not None and each.verdict == "PASS"]
        return min(proven, default=None), None if proven else found[-1].reason or "its bounds are broken"

    def _preprocessing(self) -> Preprocessing:
        """That of the run; without any, the columns are x0, x1, … and classes are numbers."""
        try:
            return Preprocessing.of(self.folder)
        except Missing:
            outputs = range(self.baked.n_outputs)
        except Unreadable as error:
            raise ConfigError("run", self.folder, str(error)) from None
        columns = [Column(f"x{i}", NUMBER) for i in range(self.baked.n_inputs)]
        if "accuracy" not in self.metrics.test:
            names = [f"y{i}" for i in outputs] if len(outputs) > 1 else ["y"]
            return Preprocessing(columns, [Target(name) for name in names], "regression", [], "")
        task = "multiclass" if len(outputs) > 1 else "classification"
        classes = [str(i) for i in range(max(2, len(outputs)))]
        return Preprocessing(columns, [Target("y")], task, classes, "")

    def parts(self) -> tuple[Dataset, Constraint, Data]:
        """Its dataset, its constraint, and its data, drawn again from its seed.

        Raises:
            ConfigError: a class is not trusted, the network is none for this dataset, or a table has changed.
        """
        dataset, constraint, model = (
            part_of(self.config, group, self.trusted) for group in ("dataset", "constraint", "model")
        )
        file, network = self.folder / "model.pt", self.baked
        if not network.is_finite(0):
            raise ConfigError("model.pt", file, "holds numbers that are not finite")
        sizes, expected = (network.n_inputs, network.n_outputs), (dataset.n_inputs, dataset.n_outputs)
        if sizes != expected:
            allowed = "has {} inputs and {} outputs, its dataset {} and {}".format(*sizes, *expected)
            raise ConfigError("model.pt", file, allowed)
        constraint.signs = signs(model, dataset.features, dataset.n_inputs)
        if (network.linear is None) != (constraint.signs is None):
            raise ConfigError("model.pt", file, "has a linear term, or lacks it, against model.monotone")
        if dataset.preprocessing is not None and dataset.preprocessing != self._preprocessing():
            allowed = "reads another table than the one that the run was trained on"
            raise ConfigError("dataset", type(dataset).__name__, allowed)
        streams = Streams.of(whole("seed", self.config.get("seed"), least=0))
        return dataset, constraint, drawn(dataset, streams.data, type(dataset).__name__)

    def table(self, name: str) -> pd.DataFrame:
        """One of the run's tables: `history`, `gradients`, `layers`, and of a classifier `radii`.

        Raises:
            ConfigError: there is no such table, or it cannot be read.
        """
        folder = RunFolder(self.folder)
        names = folder.tables()
        if name not in names:
            raise ConfigError("table", name, no_such("table", name, names))
        try:
            return folder.table(name)
        except Unreadable as error:
            raise ConfigError("table", name, str(error)) from None

    def __repr__(self) -> str:
        return f"<run {RunFolder(self.folder)}: {interval_line(self.metrics.lipschitz)}>"


class LoadedRuns(Sequence[LoadedRun]):
    """The finished runs of a folder, as `lipexp.load` returns them: run i belongs to row i of `table`.

    `table` has their settings and their results, with dotted keys as in `lipexp report`. A run itself is read when
    it is asked for. `left_out` says of the others in the folder why they are not here.
    """

    def __init__(self, folder: Path, trust: bool) -> None:
        self.folder, self.left_out = folder, dict[Path, str]()
        self._trust = trust
        rows = []
        for run in find([folder]):
            outcome = Outcome.of(run)
            if outcome.metrics is None:
                self.left_out[run.path] = outcome.reason
            else:
                rows.append({"run": str(run.path)} | settings(run) | outcome.results())
        self.table = pd.DataFrame(rows)

    def __len__(self) -> int:
        return len(self.table)

    @overload
    def __getitem__(self, index: int) -> LoadedRun: ...
    @overload
    def __getitem__(self, index: slice) -> list[LoadedRun]: ...
    def __getitem__(self, index: int | slice) -> LoadedRun | list[LoadedRun]:
        paths = self.table["run"].iloc[index]
        return (
            load_run(paths, self._trust) if isinstance(paths, str) else [load_run(p, self._trust) for p in paths]
        )

    def __iter__(self) -> Iterator[LoadedRun]:
        return (load_run(path, self._trust) for path in self.table["run"])

    def __repr__(self) -> str:
        return f"<{len(self)} runs under {RunFolder(self.folder)}, {len(self.left_out)} left out>"


def load(path: str | PathLike[str], trust: bool = False) -> LoadedRun | LoadedRuns:
    """See `lipexp.load`."""
    folder = RunFolder(Path(path))
    if not folder.path.is_dir():
        raise ConfigError("run", path, "is no folder" if folder.path.exists() else "does not exist")
    if not folder.complete and not folder.failed:
        runs = LoadedRuns(folder.path, trust)
        if len(runs):
            return runs
    return load_run(path, trust)


def load_run(run: str | PathLike[str], trust: bool = False) -> LoadedRun:
    """One finished run; see `lipexp.load`."""
    folder = RunFolder(Path(run))
    try:
        metrics = Metrics.read(folder)
        config = folder.config()
    except Missing as error:
        reason = Outcome.of(folder).reason
        raise ConfigError("run", run, f"is no finished run: {reason or error}") from None
    except Unreadable as error:
        raise ConfigError("run", run, str(error)) from None
    state = _state_dict(folder)
    act = part_of(config, "act", trust)
    try:
        baked = BakedNetwork.from_state_dict(state, act)
    except (ValueError, TypeError) as error:
        raise ConfigError("model.pt", folder.path / "model.pt", f"holds no such network: {error}") from None
    return LoadedRun(Network(baked), baked, config, metrics, folder.path, trust)


def part_of(config: Mapping[str, Any], group: str, trust: bool) -> Any:
    """The object of `group` in the configuration of a run, which may come from elsewhere.

    Raises:
        ConfigError: there is none, it cannot be made, or is not trusted.
    """
    node = config.get(group)
    if not isinstance(node, dict):
        raise ConfigError(group, node, "needs an option with a _target_")
    if "${" in str(node):  # today's environment may hold other values than the one that the run had
        raise ConfigError(group, node, "is not resolved: what the run was made from is not recorded")
    return part(node, group, str(node.get("_target_", "")).rpartition(".")[2], trust)


def _state_dict(folder: RunFolder) -> dict[str, torch.Tensor]:
    """The numbers of model.pt; see `plain_state`."""
    try:
        return plain_state(plain_file(folder.path, "model.pt", LARGE_BYTES))
    except Unreadable as error:
        raise ConfigError("run", folder.path, f"{error}") from None
    except ValueError as error:
        raise ConfigError("model.pt", folder.path / "model.pt", f"is not a plain state dict: {error}") from None


def plain_state(file: Path) -> dict[str, torch.Tensor]:
    """A state dict, read without running anything that a pickle may carry, or believing the sizes that it claims.

    Raises:
        ValueError: it is none.
    """
    try:
        size = file.stat().st_size
        with zipfile.ZipFile(file) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > size:
                raise ValueError("it is compressed")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of foreign pickles before it refuses them
            # Mapped, so that a tensor is a view of the file and cannot be larger than it.
            state: object = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(state, dict):
            raise ValueError(f"it holds a {type(state).__name__}")
        tensors = [entry for entry in state.values() if isinstance(entry, torch.Tensor)]
        if any(entry.layout != torch.strided or entry.is_quantized for entry in tensors):
            raise ValueError("it holds a tensor that is not dense")
        if sum(entry.numel() * entry.element_size() for entry in tensors) > size:
            raise ValueError("it claims more numbers than it holds")
        return {k: v.detach().clone() if isinstance(v, torch.Tensor) else v for k, v in state.items()}
    except pickle.UnpicklingError:
        saved = "save its state_dict(), or torch.export.save it"
        raise ValueError(f"it holds a pickled module, or another object that is no tensor; {saved}") from None
    except Exception as error:  # the libraries raise anything
        raise ValueError(one_line(error)) from None
