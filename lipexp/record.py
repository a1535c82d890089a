"""The record of a finished run: the schema of metrics.json, and a run as one row of a table.

Every number of metrics.json stands in a dataclass of this module, is written from it and read back into it.
Whatever shows several runs (report, sweep.csv, search, figures) takes its rows from `results` and `settings`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any, TypedDict, get_type_hints

from lipexp.config import GROUPS
from lipexp.reading import Missing, Unreadable, parse, printable, read_record
from lipexp.runs import RunFolder, flat
from lipexp.tasks import SPLITS, TASKS

METRICS, FAILURE = "metrics.json", "failed.json"
SCHEMA = 5  # of metrics.json; raised when its content changes

Norm = Annotated[int | str, (1, 2, "inf")]
Verdict = Annotated[str, ("PASS", "FAIL", "OPEN")]


@dataclass
class GradientNorm:
    """Gradient norms in q: over the data, and the largest that any source of points showed."""

    q: Norm
    max: float  # over all sources
    mean: float  # over the data, as the next four
    median: float
    p05: float
    p95: float
    argmax: list[float]  # the point that has `max`
    by: dict[str, float]  # data, grid, search -> the largest there
    data_max: dict[str, float]  # over the data, in the norms 1, 2 and inf


class Box(TypedDict):
    """The exact constant over the box of the data, where it is attained, and the box."""

    value: float
    point: list[float]
    domain: Any


@dataclass
class Interval:
    """What is known of the Lipschitz constant: measured <= constant <= certified."""

    p: Norm  # inputs move in this norm
    q: Norm  # gradients are measured in this one, its dual
    target: float | None  # L; None without a constraint
    measured: float
    measured_by: str  # "exact arithmetic", "interval arithmetic" or "float64 estimate"
    certified: float | None  # the smallest bound proven to hold everywhere
    method: str  # behind `certified`, an identifier; "none" where nothing is certified
    reason: str | None  # why nothing is certified
    product: float | None  # the product of the layers' norms
    whole: float | None  # what the constraint proves of the network as a whole; None where it bounds each layer
    exact: float | None  # the constant itself, where all linear regions are known
    exact_box: Annotated[dict[str, Any], Box] | None
    regions: int | None
    open: str | None  # why the exact constant is not known, where enumerating was tried
    verdict: Verdict  # OPEN where nothing is certified


@dataclass
class LocalInterval:
    """What is known of the Lipschitz constant over a ball only: measured <= local constant <= certified."""

    around: list[float]
    within: float  # the radius, in p
    p: Norm
    q: Norm
    measured: float
    measured_by: str
    point: list[float]  # that has `measured`; empty if none was looked at
    certified: float


@dataclass
class Certified:
    """Certified accuracy of some points: the fraction whose class is right, and stays so within a radius."""

    certified_accuracy: dict[str, float] | None  # radius -> fraction
    median_radius: float | None  # None also where it is infinite
    local_accuracy: dict[str, float] | None = None  # the same with radii by local constants
    median_local_radius: float | None = None


@dataclass
class Pairs:
    """The proven constants of the differences of two outputs, which radii are divided by."""

    smallest: float
    largest: float
    median_gain: float | None  # of test points: the radius over that by the bound of the whole network alone


@dataclass
class Tightness:
    """The radii of test points over their exact distances from the decision boundary; medians, of finite ones."""

    distance: float  # itself, in the norm p
    radius: float
    local: float  # of radii by local constants


@dataclass
class Robustness:
    """The certified radii of validation and test points."""

    p: Norm
    lipschitz: float | None  # the proven bound of the network; of several outputs each pair has its own
    val: Certified
    test: Certified
    reason: str | None  # why there are no radii, or none for a network evaluated in float32
    pairs: Pairs | None = None  # of several outputs
    exact: Tightness | None = None  # of one or two inputs, where all linear regions are known


@dataclass
class Monotone:
    """The features in which f = h + c s^T x may only rise or fall; it does where |dh/dx_k| <= c."""

    features: dict[str, int]  # 1: f may only rise, -1: it may only fall
    slope: float  # c
    layers: float  # a proven bound on every |dh/dx_k|
    smallest: float  # the smallest derivative of f in these directions that was seen, in float64
    proven: bool
    violations: int | None = None  # of the pairs that `lipexp certify --attack` tried


@dataclass
class SearchedBox:
    """Where gradients were searched."""

    box: list[list[float]]  # [low, high] of each input
    starts: int
    seed: int


@dataclass
class Bound:
    """What one method proved, or why it did not."""

    value: float | None
    reason: str | None
    everywhere: bool  # else over the box of the data only


@dataclass
class Certification:
    """The section `certify` of metrics.json: what `lipexp certify` found since."""

    model_sha256: str
    changed: bool | None  # model.pt is not the one that the run recorded; None: it recorded none
    lipschitz: Interval
    bounds: dict[str, Bound]
    broken_layers: list[str]
    gradient_norm: dict[str, Any]  # source -> the steepest point
    robustness: Robustness | None
    monotone: Monotone | None
    attack: dict[str, Any] | None = None
    local: LocalInterval | None = None  # over the ball that was asked for last


@dataclass(repr=False)
class Metrics:
    """metrics.json."""

    seed: int
    step: int  # after which the network that is kept was reached
    train: dict[str, float]  # loss and the task's scores, on the points that it has learnt from
    val: dict[str, float]  # on those that settings and checkpoints are chosen on
    test: dict[str, float]  # on those that nothing is chosen on
    gradient_norm: GradientNorm
    lipschitz: Interval
    robustness: Robustness | None  # None where nothing is classified
    monotone: Monotone | None
    columns: dict[str, dict[str, float]] | None  # of a table, in its units: see `prediction.in_units`
    search: SearchedBox
    model_sha256: str
    timing: dict[str, float]
    environment: dict[str, Any]
    certify: Certification | None = None  # in the norm of the constraint
    certify_in: dict[str, Certification] = dataclasses.field(default_factory=dict)  # in others, by p

    def __repr__(self) -> str:
        scores = ", ".join(f"{name} {value:.4g}" for name, value in self.test.items())
        return f"Metrics(seed {self.seed}, test {scores}, and more)"

    def write(self, folder: RunFolder) -> None:
        """Write metrics.json: from now on the run is complete."""
        folder.write_json(METRICS, {"schema": SCHEMA, **dataclasses.asdict(self)})

    @classmethod
    def read(cls, folder: RunFolder) -> Metrics:
        """The content of metrics.json.

        Raises:
            Missing: there is none.
            Unreadable: it is torn, of another schema, or otherwise not what a run leaves.
        """
        content = folder.read_json(METRICS)
        schema = content.pop("schema", None)
        try:
            if schema != SCHEMA:
                raise ValueError(f"its schema is {schema}, this lipexp reads {SCHEMA}: train it again")
            return parse(cls, content)
        except ValueError as error:
            raise Unreadable(METRICS, error) from None


@dataclass
class Failure:
    """failed.json."""

    reason: str
    step: int


def certify(folder: RunFolder, found: Certification) -> bool:
    """Put the findings of `lipexp certify` into metrics.json; returns whether its radii are the largest so far.

    What an earlier call proved better for the same model.pt, by another method, stays, and so does its attack.
    """
    with folder.locked():
        metrics = Metrics.read(folder)
        p = found.lipschitz.p
        is_own = p == metrics.lipschitz.p
        old = metrics.certify if is_own else metrics.certify_in.get(str(p))
        best = found
        if old is not None and old.model_sha256 == found.model_sha256:
            known, new = old.lipschitz.certified, found.lipschitz.certified
            best = old if known is not None and (new is None or known < new) else found
            attack = found.attack or (old.attack if best is old or known == new else None)
            directions = found.monotone  # they are assessed anew, and keep what an attack on them found
            if directions is not None and directions.violations is None and old.monotone is not None:
                directions = dataclasses.replace(directions, violations=old.monotone.violations)
            found = dataclasses.replace(
                best,
                bounds=old.bounds | found.bounds,
                broken_layers=found.broken_layers,
                monotone=directions,
                attack=attack,
                local=found.local or old.local,
            )
        if is_own:
            metrics.certify = found
        else:
            metrics.certify_in[str(p)] = found
        metrics.write(folder)
        return best is not old


# A run as a row --------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """How a run ended: `ok`, `failed`, `missing` (never started, or interrupted), or `queued` (still in SLURM)."""

    status: str
    reason: str = ""
    step: int = 0  # at which it failed
    metrics: Metrics | None = None

    @classmethod
    def of(cls, folder: RunFolder) -> Outcome:
        """The outcome that the files of a run's folder tell."""
        try:
            if folder.complete or not folder.failed:
                with suppress(Missing):
                    metrics = Metrics.read(folder)
                    if metrics.lipschitz.verdict == "FAIL":
                        return cls("failed", "a bound is broken", metrics=metrics)
                    return cls("ok", metrics=metrics)
            failure = read_record(Failure, folder.path, FAILURE)
            return cls("failed", printable(" ".join(failure.reason.split())), failure.step)
        except Missing:
            return cls("missing")
        except Unreadable as error:
            return cls("failed" if folder.ended else "missing", str(error))  # what is torn is trained again

    def results(self) -> dict[str, Any]:
        """The numbers of the run as one row, with dotted keys such as `lipschitz.certified`."""
        row: dict[str, Any] = {"status": self.status, "reason": self.reason}
        return row if self.metrics is None else row | flat(dataclasses.asdict(self.metrics))


def settings(folder: RunFolder) -> dict[str, Any]:
    """The option of each group and all settings of a run, with dotted keys; empty where Hydra recorded nothing.

    An option has the name that was chosen, or that of its class where no choice is recorded.
    """
    config, choices = folder.recorded()
    leaves = flat(config)
    classes = {group: str(leaves.get(f"{group}._target_", "")).rpartition(".")[2] for group in GROUPS}
    options = {group: choices.get(group) or classes[group] for group in GROUPS}
    found = {group: option for group, option in options.items() if option} | {
        key: value for key, value in leaves.items() if key not in GROUPS
    }
    return {printable(key): printable(v) if isinstance(v, str) else v for key, v in found.items()}


def numeric_keys(task: str, radii: Iterable[float]) -> list[str]:
    """The dotted keys of all numbers that a finished run of this task records, for the goal of a search."""
    keys = [f"{split}.{name}" for split in SPLITS for name in ("loss", *TASKS[task].scores)]
    if TASKS[task].decides:
        names = ["median_radius", "median_local_radius"]
        for radius in map(radius_name, radii):
            names += [f"certified_accuracy.{radius}", f"local_accuracy.{radius}"]
        keys += [
            "robustness.lipschitz",
            *(f"robustness.{split}.{name}" for split in ("val", "test") for name in names),
        ]
    if TASKS[task].several:
        keys += [f"robustness.pairs.{name}" for name in get_type_hints(Pairs)]
    for section, cls in {"gradient_norm": GradientNorm, "lipschitz": Interval}.items():
        for name, kind in get_type_hints(cls).items():
            keys += [f"{section}.{name}"] * (kind in (float, float | None, int | None))
    return keys


def radius_name(radius: float) -> str:
    """A radius as it is spelled in metrics.json: 0.5, 1."""
    return repr(float(radius)).removesuffix(".0")
