"""What is asked of a certificate, and what is found: of the network of a run, or of one from elsewhere.

Shapes: N points, D inputs, C outputs, of one network, K = 1.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from lipexp import record
from lipexp.config import ConfigError, conf_dir, norm_order, number, one_of, whole
from lipexp.measured import monotone, overall, sources, steepest
from lipexp.measured.attack import RECORDED, Attack, attack
from lipexp.measured.gradients import Maximum, scan
from lipexp.networks import BakedNetwork
from lipexp.proven import METHODS, Certificate, Chain, Problem, Proof, prove
from lipexp.proven.balls import bound_on_ball
from lipexp.proven.radii import Robustness, assess
from lipexp.wording import above, broken_bound, interval_line, local_line, monotone_line, robustness_line

CONTENTS = conf_dir() / "config.yaml"
PAIRS = 100_000  # compared in an attack on a monotone network
EFFORT = 8  # of the search in more than two dimensions; training takes 1


def default(name: str) -> Any:
    """The default of a run setting."""
    value = OmegaConf.select(OmegaConf.load(CONTENTS), name)
    return OmegaConf.to_object(value) if OmegaConf.is_config(value) else value


@dataclass(frozen=True)
class Request:
    """What is asked: the options of `lipexp certify`."""

    p: Any = None  # the norm in which inputs move; None: that of the constraint
    method: str | None = None  # besides the product; None: all but bnb
    attack: bool = False
    gap: float = 1e-3
    max_seconds: float = 60.0
    max_regions: int | None = None  # None: what the run says, or the default
    radii: Any = None  # for certified accuracy; None: the same
    around: Any = None  # with bnb: the centre of a ball over which alone the constant is bounded, ...
    within: float | None = None  # ... and its radius in p

    @classmethod
    def of(cls, options: argparse.Namespace) -> Request:
        """The options of the command line.

        Raises:
            ConfigError: a number makes no sense.
        """
        return cls(**{part.name: getattr(options, part.name) for part in fields(cls)}).checked("--")

    def checked(self, dashes: str = "") -> Request:
        """With numbers in place of words.

        Args:
            dashes: what stands before the names of options in messages.

        Raises:
            ConfigError: a number makes no sense.
        """
        p = None if self.p is None else norm_order(f"{dashes}p", self.p)
        if self.method is not None:
            one_of(f"{dashes}method", self.method, list(METHODS))
        number(f"{dashes}gap", self.gap, above=0)
        number(f"{dashes}max{'-' if dashes else '_'}seconds", self.max_seconds, above=0)
        if self.max_regions is not None:
            whole(f"{dashes}max{'-' if dashes else '_'}regions", self.max_regions, least=0)
        radii, around = (_numbers(f"{dashes}{name}", getattr(self, name)) for name in ("radii", "around"))
        for radius in radii or []:
            number(f"{dashes}radii", radius, above=0)
        if (around is None) != (self.within is None):
            given, missing = ("within", "around") if around is None else ("around", "within")
            raise ConfigError(f"{dashes}{given}", getattr(self, given), f"needs {dashes}{missing} as well")
        if around is not None:
            if self.method != "bnb":
                raise ConfigError(f"{dashes}around", self.around, f"is for {dashes}method bnb")
            number(f"{dashes}within", self.within, above=0)
        return replace(self, p=p, radii=radii, around=around)


def _numbers(option: str, value: Any) -> list[float] | None:
    """A list of finite numbers, or one in words: 0.1,0.25."""
    if value is None:
        return None
    try:
        found = [float(part) for part in (value.split(",") if isinstance(value, str) else value)]
    except (TypeError, ValueError):
        raise ConfigError(option, value, "must be numbers, such as 0.1,0.25") from None
    return [number(option, part) for part in found]


@dataclass(frozen=True)
class Subject:
    """A network whose layers have proven norms, and the data that it is certified on."""

    network: BakedNetwork
    chain: Chain
    x: Tensor  # (N, D), float64
    decided: Mapping[str, tuple[Tensor, Tensor]] | None  # val, test -> points and classes; None: no classifier
    max_regions: int
    draws: Callable[[], torch.Generator]  # the random stream of its searches, from its start
    signs: Tensor | None = None  # (D,) of features in which it must rise or fall; see `Constraint.signs`
    monotone: Any = None  # what model.monotone says of them


@dataclass
class Finding:
    """What was found about one network."""

    chain: Chain
    interval: record.Interval
    certificate: Certificate
    by: dict[str, Maximum]  # source of points -> the steepest
    robustness: Robustness | None  # None where nothing is classified
    monotone: record.Monotone | None  # None where it need not be
    attack: Attack | None
    local: record.LocalInterval | None = None  # over the ball that was asked for
    broken_layers: Sequence[str] = ()  # those whose norms are above their bounds

    @property
    def refuted(self) -> bool:
        found = self.attack is not None and bool(self.attack.flips)
        return self.interval.verdict == "FAIL" or found or self.breaks_direction or self.breaks_ball

    @property
    def breaks_ball(self) -> bool:
        """Whether a steeper point was found in the ball than is proven."""
        return self.local is not None and self.local.measured > self.local.certified

    @property
    def breaks_direction(self) -> bool:
        """Whether it rises where it may only fall, or that is not proven."""
        return self.monotone is not None and (not self.monotone.proven or bool(self.monotone.violations))

    def section(self, digest: str, changed: bool | None, radii: Sequence[float]) -> record.Certification:
        """What is recorded of it: the section `certify` of metrics.json.

        Args:
            digest: the SHA-256 of the file that holds the network.
            changed: it is another file than the one that was recorded; None: none was.
        """
        proofs = self.certificate.proofs.items()
        return record.Certification(
            model_sha256=digest,
            changed=changed,
            lipschitz=self.interval,
            bounds={name: record.Bound(proof.value, proof.reason, proof.everywhere) for name, proof in proofs},
            broken_layers=list(self.broken_layers),
            gradient_norm={source: found._asdict() for source, found in self.by.items()},
            robustness=None if self.robustness is None else self.robustness.summary(radii),
            monotone=self.monotone,
            attack=None if self.attack is None else self.attack.record(),
            local=self.local,
        )

    def described(self, radii: Sequence[float], attacked: bool) -> Iterator[str]:
        """What was found, line by line."""
        proofs = self.certificate.proofs
        if len(proofs) > 1:
            yield "bounds: " + "  ".join(
                f"{name} {_bound(proof, self.interval.target)}" for name, proof in proofs.items()
            )
        yield interval_line(self.interval)
        if self.local is not None:
            yield local_line(self.local)
        yield from self.broken_layers
        if self.robustness is not None:
            yield robustness_line(self.robustness.summary(radii))
        elif attacked and self.monotone is None:
            yield "no attack: a regression has no radii"
        if self.monotone is not None:
            yield monotone_line(self.monotone)
        if self.attack is not None:
            yield from _attack_lines(self.attack)

    def failure(self) -> str:
        """What is refuted, in one line."""
        if self.broken_layers:
            return f"certified is above L: {', '.join(self.broken_layers)}"
        if self.interval.verdict == "FAIL":
            return broken_bound(self.interval)
        if self.local is not None and self.breaks_ball:
            return f"{local_line(self.local)}: a bound is broken, a bug in lipexp; please report it"
        if self.monotone is not None and self.breaks_direction:
            return monotone_line(self.monotone)
        assert self.attack is not None
        return f"{len(self.attack.flips)} certified radii are refuted"


def look(subject: Subject, request: Request, report: Callable[[str], None]) -> Finding:
    """Measure and prove the constant of a network, and its radii; `report` is told what takes its time.

    Raises:
        ConfigError: the method has no bound for this network.
    """
    network, chain, x = subject.network, subject.chain, subject.x.unsqueeze(0)  # (1, N, D)
    report("measuring")
    scanned = scan(network, x)
    points = sources(network, x, scanned, chain.q, [subject.draws()], EFFORT, chain.output_p)
    by = steepest(network, points, 0, chain.q, chain.output_p)
    measured = overall(by)
    problem = Problem(
        network,
        chain,
        (x[0].amin(dim=0), x[0].amax(dim=0)),
        measured,
        subject.max_regions,
        decides=subject.decided is not None,
        gap=request.gap,
        seconds=request.max_seconds,
        report=report,
    )
    certificate = prove(problem, None if request.around else request.method)
    ball = None
    if request.around is not None and request.within is not None:
        ball = bound_on_ball(problem._replace(best=certificate.value), request.around, request.within)
    for name, proof in certificate.proofs.items():
        if proof.best is not None and proof.best.value > measured.value:  # a search came across a steeper point
            by[name] = measured = proof.best
    robustness = attacked = None
    if subject.decided is not None:
        report("proving: radii")
        robustness = assess(network, subject.decided, certificate)
        if request.attack and robustness.columns is not None:
            (test_x, _), radius = subject.decided["test"], robustness.of("test")[robustness.largest]
            report(f"attacking {len(test_x):,} points")
            attacked = attack(network, test_x, radius, chain.p, subject.draws())
    directions = None
    if subject.signs is not None:
        directions = monotone.assess(network, points, 0, subject.signs, subject.monotone)
        if request.attack:
            report(f"comparing {PAIRS:,} pairs of points")
            tried = monotone.violations(network, problem.box, subject.signs, subject.draws(), PAIRS)
            directions = replace(directions, violations=tried)
    interval = certificate.interval(measured)
    return Finding(chain, interval, certificate, by, robustness, directions, attacked, ball)


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
