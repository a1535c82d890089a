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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from lipexp import record
from lipexp.arguments import Parser
from lipexp.config import ConfigError, conf_dir, norm_order, number, one_line, whole
from lipexp.loading import LoadedRun, load_run
from lipexp.loop import Streams, generator
from lipexp.measured import monotone, overall, sources, steepest
from lipexp.measured.attack import RECORDED, Attack, attack
from lipexp.measured.gradients import Maximum, scan
from lipexp.networks import BakedNetwork
from lipexp.process import cpu_threads
from lipexp.proven import METHODS, Certificate, Chain, Problem, Proof, prove
from lipexp.proven.radii import Robustness, assess, decided
from lipexp.runs import RunFolder, find
from lipexp.screen import Screen
from lipexp.tasks import TASKS
from lipexp.wording import above, below, broken_bound, interval_line, monotone_line, robustness_line

CONTENTS = conf_dir() / "config.yaml"
PAIRS = 100_000  # compared in an attack on a monotone network
EFFORT = 8  # of the search in more than two dimensions; training takes 1

HELP = """\
RUN is the folder of a finished run, or one that holds some, such as a sweep's. Of a run nothing is changed but the
section `certify` of its metrics.json, and certify_radii.csv. With --p, in another norm than the run was trained
in, L is no bound, and the section is `certify_in`, the table certify_radii_1.csv, _2.csv or _inf.csv.

exit status: 0; 1 if a bound is broken or a radius refuted; 2 if a run cannot be read or is not trusted

example: lipexp certify outputs/2026-01-31 --attack"""


# One run ---------------------------------------------------------------------------------------------------------


@dataclass
class Finding:
    """What was found about one run."""

    digest: str  # SHA-256 of model.pt
    changed: bool  # it is not the one that the run recorded
    interval: record.Interval
    certificate: Certificate
    broken_layers: list[str]
    by: dict[str, Maximum]  # source of points -> the steepest
    robustness: Robustness | None  # None where nothing is classified
    monotone: record.Monotone | None  # None where it need not be
    attack: Attack | None

    @property
    def refuted(self) -> bool:
        found = self.attack is not None and bool(self.attack.flips)
        return self.interval.verdict == "FAIL" or found or self.breaks_direction

    @property
    def breaks_direction(self) -> bool:
        """Whether it rises where it may only fall, or that is not proven."""
        return self.monotone is not None and (not self.monotone.proven or bool(self.monotone.violations))

    def section(self, radii: Sequence[float]) -> record.Certification:
        """The section of metrics.json."""
        proofs = self.certificate.proofs.items()
        return record.Certification(
            model_sha256=self.digest,
            changed=self.changed,
            lipschitz=self.interval,
            bounds={name: record.Bound(proof.value, proof.reason, proof.everywhere) for name, proof in proofs},
            broken_layers=self.broken_layers,
            gradient_norm={source: found._asdict() for source, found in self.by.items()},
            robustness=None if self.robustness is None else self.robustness.summary(radii),
            monotone=self.monotone,
            attack=None if self.attack is None else self.attack.record(),
        )


def examine(run: LoadedRun, options: argparse.Namespace, report: Callable[[str], None]) -> Finding:
    """Certify one run; `report` is told what takes its time.

    Raises:
        ConfigError: it is not trusted, or fits neither its data nor the options.
    """
    dataset, constraint, data = run.parts()
    network = constraint.prove(run.baked)
    chain = Chain.of(constraint, network.layers)
    p = options.p or chain.p
    if chain.target is None or p != chain.p:
        network, chain = Chain.without_bound(network, p)
    search = Streams.of(whole("seed", run.config.get("seed"), least=0)).search
    x = torch.from_numpy(data.x).double().unsqueeze(0)  # (1, N, D)
    report("measuring")
    scanned = scan(network, x)
    points = sources(network, x, scanned, chain.q, [generator(search)], EFFORT, chain.output_p)
    by = steepest(network, points, 0, chain.q, chain.output_p)
    measured = overall(by)
    max_regions = setting(run.config, "max_regions") if options.max_regions is None else options.max_regions
    problem = Problem(
        network,
        chain,
        (x[0].amin(dim=0), x[0].amax(dim=0)),
        measured,
        whole("max_regions", max_regions, least=0),
        gap=options.gap,
        seconds=options.max_seconds,
        report=report,
    )
    certificate = prove(problem, options.method)
    for name, proof in certificate.proofs.items():
        if proof.best is not None and proof.best.value > measured.value:  # a search came across a steeper point
            by[name] = measured = proof.best
    robustness = attacked = None
    if TASKS[dataset.task].decides:
        parts = decided(data)
        robustness = assess(network, parts, certificate)
        if options.attack and robustness.columns is not None:
            (test_x, _), radius = parts["test"], robustness.of("test")["radius"]
            report(f"attacking {len(test_x):,} points")
            attacked = attack(network, test_x, radius, chain.p, generator(search))
    directions = None
    if constraint.signs is not None:
        directions = monotone.assess(network, points, 0, constraint.signs, run.config["model"]["monotone"])
        if options.attack:
            report(f"comparing {PAIRS:,} pairs of points")
            tried = monotone.violations(network, problem.box, constraint.signs, generator(search), PAIRS)
            directions = replace(directions, violations=tried)
    digest = hashlib.sha256(RunFolder(run.folder).model_bytes()).hexdigest()
    return Finding(
        digest,
        digest != run.metrics.model_sha256,
        certificate.interval(measured),
        certificate,
        _broken_layers(network, chain),
        by,
        robustness,
        directions,
        attacked,
    )


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
        "--p", metavar="P", help="the norm in which inputs move: 1, 2 or inf (default: that of the constraint)"
    )
    parser.add_argument(
        "--max-regions", metavar="N", type=int, help="linear regions to enumerate (default: the run's own)"
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
    return parser.answer(arguments, certify_all)


def certify_all(options: argparse.Namespace) -> int:
    """Certify the runs that are asked for, and go on where one cannot be read; returns the exit status."""
    check(options)
    folders, screen = finished(options.runs), Screen()
    statuses = []
    for place, folder in enumerate(folders, start=1):
        which = f"run {place} of {len(folders)}, " if len(folders) > 1 else ""
        statuses.append(certify(folder, options, screen, which))
    return 1 if 1 in statuses else max(statuses)


def check(options: argparse.Namespace) -> None:
    """Raise ConfigError for a number that makes no sense, and read the list of radii."""
    if options.p is not None:
        options.p = norm_order("--p", options.p)
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
    kept = [folder for folder in found if folder.complete or not folder.failed]  # what is torn is named later
    for folder in sorted({*found} - {*kept}, key=lambda folder: folder.path):
        print(f"lipexp: {folder}: failed, left out", file=sys.stderr)
    if not kept:
        raise ConfigError("RUN", ", ".join(paths), "no finished run found there (a finished run has metrics.json)")
    return kept


def certify(folder: RunFolder, options: argparse.Namespace, screen: Screen, which: str) -> int:
    """Certify one run, show and record what is found; returns the exit status.

    Args:
        which: its place among the runs to be certified, for whoever waits.
    """
    try:
        with screen.waiting(f"{which}{folder.path}") as waiting_for:
            run = load_run(folder.path, trust=options.trust)
            radii = radii_of(run.config) if options.radii is None else options.radii
            with cpu_threads(whole("threads", run.config.get("threads", 1), least=1)):
                finding = examine(run, options, lambda text: waiting_for(f"{which}{folder.path}: {text}"))
        for line in described(folder, finding, radii, options.attack):
            screen.show(line)
        largest = record.certify(folder, finding.section(radii))
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
        print(f"lipexp: {folder}: {failure(finding)}", file=sys.stderr)
    return int(finding.refuted)


def failure(finding: Finding) -> str:
    """What is refuted, in one line."""
    interval, found = finding.interval, finding.attack
    if finding.broken_layers:
        return f"certified is above L: {', '.join(finding.broken_layers)}"
    if interval.verdict == "FAIL":
        return broken_bound(interval)
    if finding.monotone is not None and finding.breaks_direction:
        return monotone_line(finding.monotone)
    assert found is not None
    return f"{len(found.flips)} certified radii are refuted"


def radii_of(config: Mapping[str, Any]) -> list[float]:
    """The distances at which the run reports certified accuracy."""
    radii = setting(config, "radii")
    if not isinstance(radii, list):
        raise ConfigError("radii", radii, "must be a list of numbers")
    return [number("radii", radius, above=0) for radius in radii]


def setting(config: Mapping[str, Any], name: str) -> Any:
    """A run setting; one that the configuration lacks has its default."""
    return config[name] if name in config else OmegaConf.select(OmegaConf.load(CONTENTS), name)


def described(folder: RunFolder, finding: Finding, radii: Sequence[float], attacked: bool) -> Iterator[str]:
    """What was found about one run, line by line."""
    settings = record.settings(folder)
    names = "  ".join(f"{settings.get(key, '?')}" for key in ("dataset", "act", "constraint", "loss"))
    yield f"{folder}  {names}  seed {settings.get('seed', '?')}"
    if finding.changed:
        yield "model.pt was changed: its SHA-256 is not the one that the run recorded"
    proofs = finding.certificate.proofs
    if len(proofs) > 1:
        yield "bounds: " + "  ".join(
            f"{name} {_bound(proof, finding.interval.target)}" for name, proof in proofs.items()
        )
    yield interval_line(finding.interval)
    yield from finding.broken_layers
    if finding.robustness is not None:
        yield robustness_line(finding.robustness.summary(radii))
    elif attacked and finding.monotone is None:
        yield "no attack: a regression has no radii"
    if finding.monotone is not None:
        yield monotone_line(finding.monotone)
    if finding.attack is not None:
        yield from _attack_lines(finding.attack)


def _bound(proof: Proof, target: float | None) -> str:
    if proof.value is None:
        return f"- ({proof.reason})"
    return above(proof.value, target if proof.value == target else None) + (
        "" if proof.everywhere else " (over the box of the data)"
    )


def _attack_lines(found: Attack) -> Iterator[str]:
    power = ", ".join(f"{100 * fraction:.3g} % at {times:g} times it" for times, fraction in found.power.items())
    yield f"attack on {found.points} points: {len(found.flips)} flipped within their radius; {power}"
    for flip in found.flips[:RECORDED]:
        yield f"counterexample: test point {flip.index}, {flip.point}, has f = {flip.f!r}, radius {flip.radius!r}"
        yield f"  but {flip.moved}, which is nearer than that, has f = {flip.f_moved!r}"
    if len(found.flips) > RECORDED:
        yield f"... and {len(found.flips) - RECORDED} more"
