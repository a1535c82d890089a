"""The verb `export`: a finished run as one file that runs without lipexp.

Before the file gets its name, it is read back by the runtime that it is for and compared with the run: its outputs
with those that lipexp computes in float64, its weights with those of model.pt, and the bound that is proven of
them with the one that the run recorded.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

import lipexp
from lipexp.arguments import Parser
from lipexp.certification import finished
from lipexp.config import ConfigError, one_line, whole
from lipexp.constraints import Constraint
from lipexp.datasets import Dataset
from lipexp.datasets.preprocessing import NUMBER, listed
from lipexp.export import programs
from lipexp.export.model import Model, Outputs
from lipexp.loading import LoadedRun, load_run
from lipexp.loop import Streams, generator
from lipexp.measured.gradients import Maximum
from lipexp.networks import BakedNetwork
from lipexp.process import cpu_threads
from lipexp.proven import Chain, Problem, prove_quickly
from lipexp.record import Certification, Interval, Metrics
from lipexp.runs import RunFolder, write_file
from lipexp.screen import Screen
from lipexp.tasks import TASKS, decision
from lipexp.wording import above, interval_line, shown_path

FORMATS = ("torch", "torchscript", "onnx")
RANDOM_POINTS = 1000
TOLERANCE = 1e-5  # of the largest output; float32 leaves about 1e-6
SAME_PROOF = 1e-9  # of the bound: other libraries may round its proof in another way
NAMED = 8  # columns on the screen

HELP = """\
RUN is the folder of one finished run. The file needs nothing of lipexp:

 --to torch        a program of torch.export:  f, prediction = torch.export.load("model.pt2").module()(x)
 --to torchscript  for C++ and old versions of torch:  f, prediction = torch.jit.load("model.ts")(x)
                   (torch itself deprecates TorchScript, in favour of torch.export)
 --to onnx         opset 17, from inputs to outputs with names; needs pip install 'lipexp[onnx]'

x is float32 (N, D), for any number N of points. f is float32 (N, C). A classifier also has prediction, int64 (N,),
the number of the class: of two, 1 where f > 0; of several, that of the largest f.

For a run that was trained on a table, the file includes the preprocessing: x has the columns of the table, in the
units of the table, and f of a regression has the unit of its target. False and true are 0 and 1, a missing value
is NaN, and a category is a number, its place in the list of categories. In ONNX prediction is the name of the
class; and a table with categories has an input (N, 1) for each column, by its name, text for categories (a missing
one is empty) and float32 for others. A row that cannot be used, such as one of an unknown category, gets f = NaN
and the prediction -1, in ONNX the empty text.

The file also has the columns, categories, classes and bounds of the run, as JSON: in lipexp.json of a torch file
(torch.export.load and torch.jit.load can read it as an extra file), and in the metadata of ONNX.

exit status: 0; 1 if the file is not equal to the run; 2 if the run cannot be read, is not trusted, or does not fit

example: lipexp export outputs/2026-01-31/12-00-00-000000 --to onnx"""


class Unequal(Exception):
    """The file is not equal to the run."""


class Read(Protocol):
    """A file that was read back by its runtime."""

    @property
    def state(self) -> Mapping[str, Tensor]:
        """The weights and biases in the file, by their names in model.pt."""

    def __call__(self, x: Tensor) -> Outputs:
        """What the runtime computes at x (N, columns)."""


class Format(NamedTuple):
    """A kind of file."""

    name: str
    suffix: str
    runtime: str
    write: Callable[[Model, Mapping[str, Any]], bytes]
    read: Callable[[bytes, Model], Read]


def format_of(name: str) -> Format:
    """The format that `--to` names.

    Raises:
        ConfigError: its packages are not installed.
    """
    version = f"torch {torch.__version__}"
    if name == "torch":
        return Format("torch.export", ".pt2", version, programs.export, programs.read_exported)
    if name == "torchscript":
        return Format("TorchScript", ".ts", version, programs.script, programs.read_script)
    try:
        import onnxruntime

        from lipexp.export import graph
    except ImportError as error:
        needed = f"needs onnx and onnxruntime: pip install 'lipexp[onnx]' ({one_line(error)})"
        raise ConfigError("--to", name, needed) from None
    opset = f"ONNX opset {graph.OPSETS['']}"
    return Format(opset, ".onnx", f"onnxruntime {onnxruntime.__version__}", graph.write, graph.Read)


# One run ---------------------------------------------------------------------------------------------------------


def export(run: LoadedRun, to: Format, path: Path) -> list[str]:
    """Write the file of a run, and return what there is to say of it.

    Raises:
        ConfigError: the run is not trusted, does not fit its data, or cannot be written in this format.
        Unequal: the file is not equal to the run, and there is none.
    """
    dataset, constraint, data = run.parts()
    proven = _proven(run)
    interval = proven.lipschitz
    search = Streams.of(whole("seed", run.config.get("seed"), least=0)).search
    model = Model(run.baked, TASKS[dataset.task], dataset.features, dataset.preprocessing)
    rows, test = (model.rows(torch.from_numpy(points)) for points in (data.x, data.test_x))
    points = torch.cat([test, around(model, rows, generator(search))])
    content = to.write(model, _description(dataset, model, proven))
    share = 0.0

    def save(file: Path) -> None:
        nonlocal share
        file.write_bytes(content)
        read = to.read(file.read_bytes(), model)
        share = difference(read, model, points)
        compare_weights(read, run.baked, constraint, interval)

    write_file(path, save)
    quick = interval.product if interval.whole is None else interval.whole
    name = "product" if interval.whole is None else "multipliers"
    none = interval.reason or "no product of norms"
    bound = none if quick is None else f"{name} {above(quick, interval.target)}"
    behind = "" if model.preprocessing is None else " (of the network, behind the preprocessing)"
    return [
        f"{shown_path(path)}  {to.name}, {len(content):,} bytes",
        _signature(model, to),
        f"equal to the run at {len(test):,} test points and {RANDOM_POINTS:,} random ones in {to.runtime}: "
        f"the largest difference is {share:.1e} of the largest output",
        f"proven again from the weights in the file, as for the run: {bound}{behind}",
        interval_line(interval),
    ]


def _proven(run: LoadedRun) -> Certification | Metrics:
    """The record of model.pt as it is now, by `lipexp certify` or else by training."""
    digest = hashlib.sha256(RunFolder(run.folder).model_bytes()).hexdigest()
    for found in (run.metrics.certify, run.metrics):
        if found is not None and found.model_sha256 == digest:
            if found.lipschitz.verdict == "FAIL":
                raise ConfigError("RUN", run.folder, f"does not keep its bound: {interval_line(found.lipschitz)}")
            return found
    changed = "was changed since the run recorded it; `lipexp certify` proves and records its bounds"
    raise ConfigError("model.pt", run.folder / "model.pt", changed)


def _description(dataset: Dataset, model: Model, proven: Certification | Metrics) -> dict[str, Any]:
    """What is kept in the file beside the program."""
    own = model.preprocessing
    return {
        "lipexp": lipexp.__version__,
        "model_sha256": proven.model_sha256,
        "task": dataset.task,
        "features": list(dataset.features),
        "classes": list(dataset.classes),
        "lipschitz": dataclasses.asdict(proven.lipschitz),
        "preprocessing": None if own is None else dataclasses.asdict(own),
    }


def _signature(model: Model, to: Format) -> str:
    """What goes in and what comes out."""
    names = listed(model.columns, NAMED)
    alone = model.has_categories and to.suffix == ".onnx"
    inputs = f"inputs {names}, each (N, 1)" if alone else f"input x (N, {len(model.columns)}) of {names}"
    prediction = " and prediction (N,)" if model.task.decides else ""
    return f"{inputs}; output f (N, {model.network.n_outputs}){prediction}"


# The comparison --------------------------------------------------------------------------------------------------


def around(model: Model, rows: Tensor, generator: torch.Generator) -> Tensor:
    """1,000 random rows: half of them in the box of `rows` (N, columns), the others in one three times as wide.

    Truth values and categories are drawn from those that there are. Where missing values are filled in, about one
    in ten is missing.
    """
    low, high = rows.double().aminmax(dim=0)
    place = torch.rand(RANDOM_POINTS, rows.shape[1], generator=generator, dtype=torch.float64)
    missing = torch.rand(place.shape, generator=generator) < 0.1
    numbers = place.clone()
    numbers[::2] = 3 * numbers[::2] - 1
    x = low + (high - low) * numbers
    if model.encoding is None or model.preprocessing is None:
        return x.float()
    discrete = torch.tensor([column.kind != NUMBER for column in model.preprocessing.columns])
    x = (low + (high - low + 1) * place).floor().where(discrete, x).float()
    return x.where(~missing | model.encoding.fill.isnan(), torch.nan)


def difference(read: Read, model: Model, x: Tensor) -> float:
    """The largest difference between the outputs of the file and those of lipexp at x, over the largest output.

    Targets of a regression have units of their own, so each is compared with its own largest value.

    Raises:
        Unequal: it is above the tolerance, or a prediction is not that of its outputs.
    """
    found, known = read(x), model(x)
    error, largest = (part.abs().amax(dim=0) for part in (found.f - known.f, known.f))  # (C,)
    share = float((error / (largest if model.unit is not None else largest.max())).where(error != 0, 0.0).max())
    if not share <= TOLERANCE:
        raise Unequal(f"its outputs differ from the run's by {share:.2g} of the largest output")
    if found.prediction is not None and not torch.equal(found.prediction, decision(found.f)):
        raise Unequal("its predictions are not those of its outputs")
    return share


def compare_weights(read: Read, network: BakedNetwork, constraint: Constraint, interval: Interval) -> None:
    """Compare the weights in the file, and the bound that is proven of them alone, with those of the run.

    Raises:
        Unequal: they are others.
    """
    known, found = network.state_dict(), read.state
    if known.keys() != found.keys() or not all(torch.equal(part, found[name]) for name, part in known.items()):
        raise Unequal("its weights are not those of model.pt")
    again = constraint.prove(BakedNetwork.from_state_dict(found, network.acts[0]))
    nowhere = torch.zeros(network.n_inputs, dtype=torch.float64)  # the product of norms holds everywhere
    chain = Chain.of(constraint, network.layers)
    bound = prove_quickly(Problem(again, chain, (nowhere, nowhere), Maximum(0.0, ()), max_regions=0)).value
    of_run = interval.product if interval.whole is None else interval.whole
    if (bound is None) != (of_run is None) or not math.isclose(bound or 0.0, of_run or 0.0, rel_tol=SAME_PROOF):
        raise Unequal(f"its proven bound is {bound}, that of the run {of_run}")


# The verb --------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str]) -> int:
    """Run `lipexp export`; returns the exit status: 0, 1 the file is not equal to the run, 2 bad input."""
    parser = Parser("lipexp export")
    parser.description = "Write a finished run as one file that runs without lipexp."
    parser.epilog = HELP
    parser.add_argument("run", metavar="RUN", help="a run's folder")
    parser.add_argument("--to", metavar="FORMAT", choices=FORMATS, required=True, help=", ".join(FORMATS))
    parser.add_argument(
        "-o", "--output", metavar="FILE", type=Path, help="default: model.pt2, model.ts or model.onnx in RUN"
    )
    parser.add_argument("--force", action="store_true", help="replace a file of the same format that is there")
    parser.add_trust()
    return parser.answer(arguments, _export)


def destination(path: Path, to: Format, force: bool) -> Path:
    """`path`, if a file can and may be written there.

    Raises:
        ConfigError: it cannot, or may not.
    """
    if path.is_dir() or not path.parent.is_dir():
        raise ConfigError("-o", path, "is a folder" if path.is_dir() else "is in no folder that exists")
    if path.exists() and not (force and path.suffix == to.suffix):  # which model.pt and other results have not
        raise ConfigError("-o", path, f"exists; --force replaces files in {to.suffix}")
    return path


def _export(options: argparse.Namespace) -> int:
    to = format_of(options.to)
    folders = finished([options.run])
    if len(folders) > 1:
        raise ConfigError("RUN", options.run, f"holds {len(folders)} runs; export takes one")
    folder, screen = folders[0], Screen()
    path = destination(options.output or folder.path / f"model{to.suffix}", to, options.force)
    try:
        with screen.waiting(str(folder)):
            run = load_run(folder.path, trust=options.trust)
            with cpu_threads(whole("threads", run.config.get("threads", 1), least=1)):
                lines = export(run, to, path)
        screen.show(*lines)
    except ConfigError as error:
        print(f"lipexp: {folder}: {error}", file=sys.stderr)
        return 2
    except Unequal as error:
        print(f"lipexp: {folder}: not exported, since the file is not equal to the run: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"lipexp: {shown_path(path)}: cannot be written: {error.strerror}", file=sys.stderr)
        return 2
    except Exception as error:  # a class may raise anything
        print(f"lipexp: {folder}: cannot be exported: {one_line(error)}", file=sys.stderr)
        return 2
    return 0
