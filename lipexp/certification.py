"""The verb `certify`: the certificate of finished runs, proven again from what lies in their folders.

It reads `model.pt` and `.hydra/` and believes nothing else: a run may have been trained elsewhere, or changed
since. The data are drawn again from the run's seed. What it finds goes into the section `certify` of the run's
metrics.json and into certify_radii.csv; in another norm than the run's own, into `certify_in` and
certify_radii_1.csv, _2.csv or _inf.csv.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lipexp import record
from lipexp.arguments import Parser
from lipexp.config import ConfigError, number, one_line, whole
from lipexp.finding import Finding, Request, Subject, default, look
from lipexp.loading import LoadedRun, load_run
from lipexp.loop import Streams, generator
from lipexp.networks import BakedNetwork
from lipexp.process import cpu_threads
from lipexp.proven import METHODS, Chain
from lipexp.proven.radii import decided
from lipexp.runs import RunFolder, find
from lipexp.screen import Screen
from lipexp.tasks import TASKS
from lipexp.wording import above, below

HELP = """\
RUN is the folder of a finished run, or one that holds some, such as a sweep's. Of a run nothing is changed but the
section `certify` of its metrics.json, and certify_radii.csv. With --p, in another norm than the run was trained
in, L is no bound, and the section is `certify_in`, the table certify_radii_1.csv, _2.csv or _inf.csv.

With --data, NET is a network that lipexp has not trained: an ONNX file (.onnx), a program of torch.export (.pt2)
or TorchScript, or a state dict, whose activation --act names. It is read and never run. The points are the columns
of FILE, in the order of its inputs, or by their names if it has an input for each. One output decides by its sign,
several by the largest; a last softmax, sigmoid or argmax is left off. Radii are those of the classes in the column
y, or in --target, and without any those of the predicted classes. What cannot be read is named with its node.

exit status: 0; 1 if a bound is broken or a radius refuted; 2 if a run cannot be read or is not trusted

examples:
  lipexp certify outputs/2026-01-31 --attack
  lipexp certify outputs/2026-01-31 --method bnb --around=-0.5,0.25 --within 0.1
  lipexp certify net.onnx --data points.csv --p inf --json found.json"""


# One run ---------------------------------------------------------------------------------------------------------


def examine(run: LoadedRun, request: Request, report: Callable[[str], None]) -> Finding:
    """Certify one run; `report` is told what takes its time.

    Raises:
        ConfigError: it is not trusted, or fits neither its data nor what is asked.
    """
    dataset, constraint, data = run.parts()
    network = constraint.prove(run.baked)
    chain = Chain.of(constraint, network.layers)
    p = request.p or chain.p
    if chain.target is None or p != chain.p:
        network, chain = Chain.without_bound(network, p)
    streams = Streams.of(whole("seed", run.config.get("seed"), least=0))
    max_regions = setting(run.config, "max_regions") if request.max_regions is None else request.max_regions
    subject = Subject(
        network,
        chain,
        torch.from_numpy(data.x).double(),
        decided(data) if TASKS[dataset.task].decides else None,
        whole("max_regions", max_regions, least=0),
        lambda: generator(streams.search),
        constraint.signs,
        run.config["model"].get("monotone"),
    )
    return replace(look(subject, request, report), broken_layers=_broken_layers(network, chain))


def _broken_layers(network: BakedNetwork, chain: Chain) -> list[str]:
    """`layer 1: spectral norm 1.5 > its bound 1`, for each layer whose norm is not proven within its bound."""
    bounds = [chain.bound_of(layer) for layer in network.layers]
    broken = [
        f"layer {i}: {name} {above(norm, None, digits=9)} > its bound {below(bound, digits=9)}"
        for i, (name, bound, (norm,)) in enumerate(zip(chain.layer_norms, bounds, network.norms, strict=True))
        if bound is not None and norm > bound
    ]
    whole = "the multipliers of the network prove nothing of its stored weights"
    return [*broken, whole] if any(map(math.isinf, network.whole)) else broken


# The verb --------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str]) -> int:
    """Run `lipexp certify`; returns the exit status: 0, 1 something is refuted, 2 bad input."""
    parser = Parser("lipexp certify")
    parser.description = (
        "Prove the Lipschitz constants and the certified radii of finished runs again, or those of a network from "
        "elsewhere."
    )
    parser.epilog = HELP
    parser.add_argument(
        "runs", metavar="RUN", nargs="+", help="a run's folder, or one that holds runs; with --data NET, a file"
    )
    parser.add_argument("--attack", action="store_true", help="also try to refute every certified radius")
    parser.add_argument(
        "--method",
        metavar="NAME",
        choices=list(METHODS),
        help=f"one of {', '.join(METHODS)}; default: all but bnb, branch and bound over the box of the data",
    )
    parser.add_argument(
        "--around",
        metavar="X,X,…",
        help="with bnb: the constant over a ball around this point only (see --within)",
    )
    parser.add_argument(
        "--within", metavar="R", type=float, help="the radius of that ball, in the norm of the run"
    )
    parser.add_argument(
        "--p",
        metavar="P",
        help="the norm in which inputs move: 1, 2 or inf (default: that of the constraint, or 2)",
    )
    parser.add_argument(
        "--max-regions",
        metavar="N",
        type=int,
        help="linear regions to enumerate (default: the run's own, or 200000)",
    )
    parser.add_argument(
        "--gap", metavar="G", type=float, default=1e-3, help="bnb stops at upper / lower - 1 <= G (default: 0.001)"
    )
    parser.add_argument(
        "--max-seconds",
        metavar="S",
        type=float,
        default=60.0,
        help="each method stops after S seconds (default: 60)",
    )
    parser.add_argument(
        "--radii", metavar="R,R,…", help="distances for certified accuracy (default: the run's own)"
    )
    parser.add_trust()
    _add_foreign(parser)
    return parser.answer(arguments, certify_all)


def _add_foreign(parser: Parser) -> None:
    """The options for a network from elsewhere."""
    group = parser.add_argument_group("a network from elsewhere")
    group.add_argument("--data", metavar="FILE", help="its points, as .csv, .tsv, .parquet or .npy")
    group.add_argument(
        "--act", metavar="NAME", help="of a state dict: the activation, as relu, or leaky_relu,slope=0.2"
    )
    group.add_argument(
        "--task", choices=["classification", "regression"], help="regression: the constant alone, and no radii"
    )
    group.add_argument(
        "--target", metavar="COL", help="the column of the classes (default: y, if there is one); for .npy a file"
    )
    group.add_argument("--json", metavar="FILE", help="write what is found, as in metrics.json")
    group.add_argument("-o", "--output", metavar="FILE", help="write the radius of each point, as CSV")
    group.add_argument("--force", action="store_true", help="replace files that are there")


def certify_all(options: argparse.Namespace) -> int:
    """Certify the runs that are asked for, and go on where one cannot be read; returns the exit status."""
    if options.data is not None:
        from lipexp.foreign.certificates import certify_file  # which knows more formats than runs need

        return certify_file(options)
    for name in ("act", "task", "target", "json", "output"):
        if getattr(options, name) is not None:
            option = "-o" if name == "output" else f"--{name}"
            raise ConfigError(option, getattr(options, name), "is for a network from elsewhere, with its --data")
    request = Request.of(options)
    folders, screen = finished(options.runs), Screen()
    statuses = []
    for place, folder in enumerate(folders, start=1):
        which = f"run {place} of {len(folders)}, " if len(folders) > 1 else ""
        statuses.append(certify(folder, request, options.trust, screen, which))
    return 1 if 1 in statuses else max(statuses)


def finished(paths: Sequence[str]) -> list[RunFolder]:
    """The finished runs at or under `paths`; those that failed are named and left out.

    Raises:
        ConfigError: there is none.
    """
    for path in paths:
        if not Path(path).is_dir():
            is_file = "is no folder; a network from elsewhere needs its points, as --data"
            raise ConfigError("RUN", path, is_file if Path(path).exists() else "does not exist")
    found = find([Path(path) for path in paths])
    kept = [folder for folder in found if folder.complete or not folder.failed]  # what is torn is named later
    for folder in sorted({*found} - {*kept}, key=lambda folder: folder.path):
        print(f"lipexp: {folder}: failed, left out", file=sys.stderr)
    if not kept:
        raise ConfigError("RUN", ", ".join(paths), "no finished run found there (a finished run has metrics.json)")
    return kept


def certify(folder: RunFolder, request: Request, trust: bool, screen: Screen, which: str) -> int:
    """Certify one run, show and record what is found; returns the exit status.

    Args:
        which: its place among the runs to be certified, for whoever waits.
    """
    try:
        with screen.waiting(f"{which}{folder.path}") as waiting_for:
            run = load_run(folder.path, trust=trust)
            radii = radii_of(run.config) if request.radii is None else request.radii
            with cpu_threads(whole("threads", run.config.get("threads", 1), least=1)):
                finding = examine(run, request, lambda text: waiting_for(f"{which}{folder.path}: {text}"))
        digest = hashlib.sha256(folder.model_bytes()).hexdigest()
        changed = digest != run.metrics.model_sha256
        for line in described(folder, finding, changed, radii, request.attack):
            screen.show(line)
        largest = record.certify(folder, finding.section(digest, changed, radii))
        if largest and finding.robustness is not None and finding.robustness.columns is not None:
            p = finding.interval.p
            suffix = "" if p == run.metrics.lipschitz.p else f"_{p}"
            folder.write_columns(f"certify_radii{suffix}", finding.robustness.columns)
    except ConfigError as error:
        print(f"lipexp: {folder}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"lipexp: {folder}: cannot be written: {error.strerror}", file=sys.stderr)
        return 2
    except Exception as error:  # a class may raise anything, and there are other runs
        print(f"lipexp: {folder}: cannot be certified: {one_line(error)}", file=sys.stderr)
        return 2
    if finding.refuted:
        print(f"lipexp: {folder}: {finding.failure()}", file=sys.stderr)
    return int(finding.refuted)


def radii_of(config: Mapping[str, Any]) -> list[float]:
    """The distances at which the run reports certified accuracy."""
    radii = setting(config, "radii")
    if not isinstance(radii, list):
        raise ConfigError("radii", radii, "must be a list of numbers")
    return [number("radii", radius, above=0) for radius in radii]


def setting(config: Mapping[str, Any], name: str) -> Any:
    """A run setting; one that the configuration lacks has its default."""
    return config[name] if name in config else default(name)


def described(
    folder: RunFolder, finding: Finding, changed: bool, radii: Sequence[float], attacked: bool
) -> Iterator[str]:
    """What was found about one run, line by line."""
    settings = record.settings(folder)
    names = "  ".join(f"{settings.get(key, '?')}" for key in ("dataset", "act", "constraint", "loss"))
    yield f"{folder}  {names}  seed {settings.get('seed', '?')}"
    if changed:
        yield "model.pt was changed: its SHA-256 is not the one that the run recorded"
    yield from finding.described(radii, attacked)
