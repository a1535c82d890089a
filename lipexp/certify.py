"""The verb `certify`: the certificate of finished runs, proven again from what lies in their folders.

It reads `model.pt` and `.hydra/` and believes nothing else: a run may have been trained elsewhere, or changed
since. The data are drawn again from the run's seed. What it finds goes into the section `certify` of the run's
metrics.json and into certify_radii.csv.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from lipexp.arguments import Parser
from lipexp.attack import RECORDED, Attack, attack
from lipexp.bounds import METHODS, Certificate, Problem, Proof, product_certificate, prove
from lipexp.config import ConfigError, conf_dir, number, one_line, whole
from lipexp.constraints import Constraint
from lipexp.loading import LoadedRun, load_run, part_of
from lipexp.loop import Streams, generator
from lipexp.measures import Maximum, MeasuredNetwork, grid, largest, scan
from lipexp.models import Layer
from lipexp.robustness import Robustness, assess
from lipexp.runs import RunFolder, find
from lipexp.search import search
from lipexp.threads import cpu_threads
from lipexp.train import NEEDED
from lipexp.wording import above, broken_bound, interval_line, robustness_line

CONTENTS = conf_dir() / "config.yaml"
EFFORT = 8  # of the search in more than two dimensions; training takes 1

HELP = """\
RUN is the folder of a finished run, or one that holds some, such as a sweep's. Of a run nothing is changed but the
section `certify` of its metrics.json, and certify_radii.csv.

exit status: 0; 1 if a bound is broken or a radius refuted; 2 if a run cannot be read or is not trusted

example: lipexp certify outputs/2026-01-31 --attack"""


# One run ---------------------------------------------------------------------------------------------------------


@dataclass
class Finding:
    """What was found about one run."""

    digest: str  # SHA-256 of model.pt
    changed: bool | None  # it is not the one that the run recorded; None: that recorded none
    interval: dict[str, Any]
    proofs: dict[str, Proof]
    broken_layers: list[str]
    by: dict[str, Maximum]  # source of points -> the steepest
    robustness: Robustness | None  # None for a regression
    attack: Attack | None

    @property
    def refuted(self) -> bool:
        return self.interval["verdict"] == "FAIL" or (self.attack is not None and self.attack.refuted)

    def section(self, radii: Sequence[float]) -> dict[str, Any]:
        """The section of metrics.json."""
        section: dict[str, Any] = {
            "model_sha256": self.digest,
            "changed": self.changed,
            "lipschitz": self.interval,
            "bounds": {
                name: {"value": proof.value, "reason": proof.reason, "everywhere": proof.everywhere}
                for name, proof in self.proofs.items()
            },
            "broken_layers": self.broken_layers,
            "gradient_norm": {source: found._asdict() for source, found in self.by.items()},
            "robustness": None if self.robustness is None else self.robustness.summary(radii),
        }
        return section if self.attack is None else {**section, "attack": self.attack.record()}


def examine(run: LoadedRun, options: argparse.Namespace) -> Finding:
    """Certify one run.

    Raises:
        ConfigError: it is not trusted, or fits neither its data nor the options.
    """
    dataset, constraint = (_part(run, group, options.trust) for group in ("dataset", "constraint"))
    layers, act = run.layers(), run.network.act
    _check_network(run, layers, dataset.n_inputs)
    streams = Streams.of(whole("seed", run.config.get("seed"), least=0))
    data = dataset.draw(streams.data)
    x = torch.from_numpy(np.concatenate([data.train_x, data.test_x])).double()
    by = measure(layers, act, x, constraint.q, streams)
    measured = max(by.values(), key=lambda found: found.value, default=Maximum(0.0, ()))
    by_product, box = product_certificate(constraint, act, layers, 0), (x.amin(dim=0), x.amax(dim=0))
    max_regions = setting(run.config, "max_regions") if options.max_regions is None else options.max_regions
    problem = Problem(
        layers,
        act,
        constraint,
        by_product,
        box,
        measured,
        max_regions,
        gap=options.gap,
        seconds=options.max_seconds,
        report=lambda line: print(line, flush=True),
    )
    certificate = prove(problem, options.method)
    for name, proof in certificate.proofs.items():
        if proof.best is not None and proof.best.value > measured.value:  # a search came across a steeper point
            by[name] = measured = proof.best
    robustness = attacked = None
    if dataset.task == "classification":
        test_x, test_y = (torch.from_numpy(part).double() for part in (data.test_x, data.test_y))
        robustness = assess(layers, act, test_x, test_y, certificate)
        if options.attack and robustness.columns is not None:
            radius, lipschitz = robustness.columns["radius"], float(certificate.value or 0)
            attacked = attack(layers, act, test_x, radius, constraint.p, lipschitz, generator(streams.search))
    interval, broken = certificate.interval(measured), _broken_layers(constraint, certificate)
    return Finding(*_fingerprint(run), interval, certificate.proofs, broken, by, robustness, attacked)


def measure(layers: Sequence[Layer], act: nn.Module, x: Tensor, q: float, streams: Streams) -> dict[str, Maximum]:
    """The steepest point among the data x (N, D), on a grid over their box, and of a search."""
    draws = [generator(streams.search)]
    gradients = scan(layers, act, x.unsqueeze(0)).gradient
    points = {
        "data": x.unsqueeze(0),
        "grid": grid(x.amin(dim=0, keepdim=True), x.amax(dim=0, keepdim=True), draws),
        "search": search(layers, act, x.unsqueeze(0), gradients, q, draws, effort=EFFORT),
    }
    network = MeasuredNetwork(layers, act, 0)
    found = {
        source: largest(network, part[0], scan(layers, act, part).gradient[0], q)
        for source, part in points.items()
        if part is not None
    }
    return {source: maximum for source, maximum in found.items() if maximum is not None}


def _part(run: LoadedRun, group: str, trust: bool) -> Any:
    part = part_of(run.config, group, trust)
    lacking = [name for name in NEEDED[group] if not hasattr(part, name)]
    if lacking:
        raise ConfigError(group, type(part).__name__, f"cannot be used as {group}: it has no {', '.join(lacking)}")
    return part


def _check_network(run: LoadedRun, layers: Sequence[Layer], n_inputs: int) -> None:
    """Raise ConfigError if these are no numbers, or no network of one output for this dataset."""
    file, (n_outputs, dims) = run.folder / "model.pt", (layers[-1].weight.shape[1], layers[0].weight.shape[2])
    if not all(torch.isfinite(part).all() for layer in layers for part in layer):
        raise ConfigError("model.pt", file, "holds numbers that are not finite")
    if n_outputs != 1:
        raise ConfigError("model.pt", file, f"has {n_outputs} outputs; certify needs one")
    if dims != n_inputs:
        raise ConfigError("model.pt", file, f"has {dims} inputs, its dataset {n_inputs}")


def _fingerprint(run: LoadedRun) -> tuple[str, bool | None]:
    digest = hashlib.sha256(RunFolder(run.folder).model_bytes()).hexdigest()
    recorded = run.metrics.get("model_sha256")
    return digest, None if recorded is None else digest != recorded


def _broken_layers(constraint: Constraint, certificate: Certificate) -> list[str]:
    """`layer 1: spectral norm 1.5 > its bound 1`, for each layer whose norm is not proven within its bound."""
    bound = certificate.layer_bound
    norms = zip(constraint.norms(len(certificate.layer_norms)), certificate.layer_norms, strict=True)
    return [
        f"layer {i}: {norm.name} {above(value, None, digits=9)} > its bound {bound:.9g}"
        for i, (norm, value) in enumerate(norms)
        if bound is not None and value > bound
    ]


# The verb --------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str]) -> int:
    """Run `lipexp certify`; returns the exit status: 0, 1 something is refuted, 2 bad input."""
    parser = Parser("lipexp certify")
    parser.description = "Prove the Lipschitz constants and the certified radii of finished runs again."
    parser.epilog = HELP
    parser.add_argument("runs", metavar="RUN", nargs="+", help="a run's folder, or one that holds runs")
    parser.add_argument("--attack", action="store_true", help="also try to refute every certified radius")
    parser.add_argument(
        "--method",
        metavar="NAME",
        choices=list(METHODS),
        help=f"one of {', '.join(METHODS)}; default: all but bnb, branch and bound over the box of the data",
    )
    parser.add_argument(
        "--max-regions", metavar="N", type=int, help="linear regions to enumerate (default: the run's own)"
    )
    parser.add_argument(
        "--gap", metavar="G", type=float, default=1e-3, help="bnb stops at upper / lower - 1 <= G (default: 0.001)"
    )
    parser.add_argument(
        "--max-seconds", metavar="S", type=float, default=60.0, help="bnb stops after S seconds (default: 60)"
    )
    parser.add_argument(
        "--radii", metavar="R,R,…", help="distances for certified accuracy (default: the run's own)"
    )
    parser.add_argument("--trust", action="store_true", help="allow classes from outside lipexp: runs their code")
    try:
        options = parser.parse_intermixed_args(arguments)
        check(options)
        folders = finished(options.runs)
    except SystemExit as stop:  # argparse has said what it had to say
        return stop.code if isinstance(stop.code, int) else 0
    except ConfigError as error:
        print(f"lipexp: {error}", file=sys.stderr)
        return 2
    if options.trust:
        sys.path.append(os.getcwd())  # a user's own class lies where they work, as with `python -m`
    statuses = [certify(folder, options) for folder in folders]
    return 1 if 1 in statuses else max(statuses)


def check(options: argparse.Namespace) -> None:
    """Raise ConfigError for a number that makes no sense, and read the list of radii."""
    number("--gap", options.gap, above=0)
    number("--max-seconds", options.max_seconds, above=0)
    if options.max_regions is not None:
        whole("--max-regions", options.max_regions, least=0)
    if options.radii is not None:
        try:
            options.radii = [float(part) for part in options.radii.split(",")]
        except ValueError:
            raise ConfigError("--radii", options.radii, "must be numbers, such as 0.1,0.25") from None
        for radius in options.radii:
            number("--radii", radius, above=0)


def finished(paths: Sequence[str]) -> list[RunFolder]:
    """The finished runs at or under `paths`; those that failed are named and left out.

    Raises:
        ConfigError: there is none.
    """
    for path in paths:
        if not Path(path).is_dir():
            raise ConfigError("RUN", path, "is no folder" if Path(path).exists() else "does not exist")
    found = find([Path(path) for path in paths])
    for folder in found:
        if not folder.complete:
            print(f"lipexp: {folder.path}: failed, left out", file=sys.stderr)
    complete = [folder for folder in found if folder.complete]
    if not complete:
        raise ConfigError("RUN", ", ".join(paths), "no finished run found there (a finished run has metrics.json)")
    return complete


def certify(folder: RunFolder, options: argparse.Namespace) -> int:
    """Certify one run, print and record what is found; returns the exit status."""
    try:
        run = load_run(folder.path, trust=options.trust)
        radii = radii_of(run.config) if options.radii is None else options.radii
        with cpu_threads(whole("threads", run.config.get("threads", 1), least=1)):
            finding = examine(run, options)
        show(folder, finding, radii, options.attack)
        record(folder, finding, radii)
    except ConfigError as error:
        print(f"lipexp: {folder.path}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"lipexp: {folder.path}: cannot be written: {error.strerror}", file=sys.stderr)
        return 2
    except Exception as error:  # a class may raise anything, and there are other runs
        print(f"lipexp: {folder.path}: cannot be certified: {one_line(error)}", file=sys.stderr)
        return 2
    if finding.refuted:
        print(f"lipexp: {folder.path}: {failure(finding)}", file=sys.stderr)
    return int(finding.refuted)


def failure(finding: Finding) -> str:
    """What is refuted, in one line."""
    interval, found = finding.interval, finding.attack
    if finding.broken_layers:
        return f"certified is above L: {', '.join(finding.broken_layers)}"
    if interval["verdict"] == "FAIL":
        return broken_bound(interval)
    assert found is not None
    return (
        f"{len(found.flips)} certified radii are refuted" if found.flips else "a secant is steeper than certified"
    )


def radii_of(config: Mapping[str, Any]) -> list[float]:
    """The distances at which the run reports certified accuracy."""
    return [number("radii", radius, above=0) for radius in setting(config, "radii")]


def setting(config: Mapping[str, Any], name: str) -> Any:
    """A run setting; runs of an older version lack some, and get the default."""
    return config[name] if name in config else OmegaConf.select(OmegaConf.load(CONTENTS), name)


def record(folder: RunFolder, finding: Finding, radii: Sequence[float]) -> None:
    """Write certify_radii.csv and the section of metrics.json.

    What another call found about the same model.pt and this one did not look for, such as an attack, stays.
    """
    if finding.robustness is not None and finding.robustness.columns is not None:
        folder.write_columns("certify_radii", finding.robustness.columns)
    new = finding.section(radii)

    def merged(old: Any) -> dict[str, Any]:
        if not isinstance(old, dict) or old.get("model_sha256") != finding.digest:
            return new
        return {**old, **new, "bounds": {**old.get("bounds", {}), **new["bounds"]}}

    folder.update_metrics("certify", merged)


def show(folder: RunFolder, finding: Finding, radii: Sequence[float], attacked: bool) -> None:
    """Print what was found about one run."""
    settings = folder.settings()
    names = "  ".join(f"{settings.get(key, '?')}" for key in ("dataset", "act", "constraint", "loss"))
    print(f"{folder.path}  {names}  seed {settings.get('seed', '?')}")
    if finding.changed:
        print("model.pt was changed: its SHA-256 is not the one that the run recorded")
    elif finding.changed is None:
        print("model.pt may have been changed: the run recorded no SHA-256")
    if len(finding.proofs) > 1:
        print("bounds: " + "  ".join(f"{name} {_bound(proof)}" for name, proof in finding.proofs.items()))
    print(interval_line(finding.interval))
    for layer in finding.broken_layers:
        print(layer)
    if finding.robustness is not None:
        print(robustness_line(finding.robustness.summary(radii)))
    elif attacked:
        print("no attack: a regression has no radii")
    if finding.attack is not None:
        _show_attack(finding.attack)


def _bound(proof: Proof) -> str:
    if proof.value is None:
        return f"- ({proof.reason})"
    return above(proof.value, None) + ("" if proof.everywhere else " (over the box of the data)")


def _show_attack(found: Attack) -> None:
    power = ", ".join(f"{share:.1%} at {times:g} times it" for times, share in found.power.items())
    print(f"attack on {found.points} points: {len(found.flips)} flipped within their radius; {power}")
    for flip in found.flips[:RECORDED]:
        print(
            f"counterexample: test point {flip.index}, {flip.point}, has f = {flip.f!r} and radius {flip.radius!r}"
        )
        print(f"  but {flip.moved}, which is nearer than that, has f = {flip.f_moved!r}")
    if len(found.flips) > RECORDED:
        print(f"... and {len(found.flips) - RECORDED} more")
    secant = found.secant
    if secant is not None and secant.slope > found.lipschitz:
        print(f"counterexample: the secant from {secant.x} to {secant.y} has slope {secant.slope!r}")
