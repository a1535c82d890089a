"""Upper bounds on the Lipschitz constant of one network: one table of methods, and the best of what they prove."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from lipexp import branching, propagation, regions, semidefinite
from lipexp.activations import PiecewiseLinear, declared_norms, declared_slopes
from lipexp.certificates import dual, norm_name, product_bound
from lipexp.config import ConfigError
from lipexp.constraints import Constraint
from lipexp.maps import TooLarge
from lipexp.measures import Maximum
from lipexp.models import Layer

OVERFLOW = "its numbers overflow float64"
WORTHWHILE = 1.1  # certified / measured above which LipSDP is tried without being asked for
LARGEST = 640  # inputs and features of such a network; some 5 s of one core


class Proof(NamedTuple):
    """A proven upper bound on the Lipschitz constant, or why a method has none for this network."""

    value: float | None
    reason: str | None = None
    everywhere: bool = True  # else over the box only: no bound for a point that may leave it
    constants: regions.Constants | None = None  # where all linear regions are known
    best: Maximum | None = None  # the steepest point that the method came across
    gave_up: bool = False  # the method is for this network, but reached its limit


@dataclass
class Certificate:
    """The best proven upper bound on the Lipschitz constant of one network, or why there is none."""

    p: float
    target: float | None  # L; None without a constraint
    layer_norms: list[float]  # proven, in the constraint's own chain
    layer_bound: float | None  # b
    value: float | None  # the smallest bound that holds everywhere
    reason: str | None  # why `value` is None
    method: str = "product"  # behind `value`
    proofs: dict[str, Proof] = field(default_factory=dict)  # of every method that was asked

    @property
    def q(self) -> float:
        return dual(self.p)

    def verdict(self, measured: float) -> str:
        """PASS, or FAIL when the exact comparison measured <= certified <= L does not hold; OPEN: no bound.

        A bound over the box of the data counts as well: that is where `measured` was found. Where that comes from
        exact arithmetic both sides are rigorous, and a FAIL is a bug in lipexp.
        """
        if self.value is None:
            return "OPEN"
        bounds = [self.value, *(proof.value for proof in self.proofs.values() if proof.value is not None)]
        bounds += [
            proof.constants.box.value for proof in self.proofs.values() if proof.constants and proof.constants.box
        ]
        holds = measured <= min(bounds) and (self.target is None or self.value <= self.target)
        return "PASS" if holds else "FAIL"

    def interval(self, measured: Maximum) -> dict[str, Any]:
        """What metrics.json says of the Lipschitz constant."""
        product, exact = self.proofs.get("product"), self.proofs.get("exact")
        constants = None if exact is None else exact.constants
        return {
            "p": norm_name(self.p),
            "q": norm_name(self.q),
            "target": self.target,
            "measured": measured.value,
            "measured_by": "exact arithmetic" if measured.exact else "float64 estimate",
            "certified": self.value,
            "method": self.method if self.value is not None else self.reason,
            "product": self.value if product is None else product.value,
            "exact": None if constants is None else constants.everywhere.value,
            "exact_box": None if constants is None else constants.in_box(),
            "regions": None if constants is None else constants.regions,
            "open": None if exact is None or not exact.gave_up else exact.reason,
            "verdict": self.verdict(measured.value),
        }


def product_certificate(constraint: Constraint, act: nn.Module, layers: Sequence[Layer], run: int) -> Certificate:
    """The product of the layers' norms, in the constraint's own chain, proven on the stored weights.

    Args:
        layers: K baked networks; `run` chooses one, and its L where `constraint` has one for each.
    """
    chain = constraint.norms(len(layers))
    proven = [norm.proven(layer.weight[run]) for norm, layer in zip(chain, layers, strict=True)]
    target = layer_bound = None
    if constraint.lipschitz is not None:
        target = float(torch.as_tensor(constraint.lipschitz, dtype=torch.float64).reshape(-1)[run])
        layer_bound = float(constraint.bound(len(layers))[run])
    if constraint.hidden_p in declared_norms(act):
        return Certificate(constraint.p, target, proven, layer_bound, product_bound(proven), None)
    reason = f"the activation declares no bound in the {constraint.hidden_p:g}-norm"
    return Certificate(constraint.p, target, proven, layer_bound, None, reason)


# Methods ---------------------------------------------------------------------------------------------------------


class Problem(NamedTuple):
    """What a method may use."""

    layers: Sequence[Layer]  # one network, K = 1
    act: nn.Module
    constraint: Constraint
    product: Certificate  # by the product of the layers' norms
    box: tuple[Tensor, Tensor]  # low and high (D,), of the data
    measured: Maximum
    max_regions: int  # to be enumerated; 0: none
    best: float | None = None  # what is proven so far; None: prove it whether that helps or not
    gap: float = 1e-3  # upper / lower - 1, below which a method that searches may stop
    seconds: float | None = None  # after which it must
    report: Callable[[str], None] | None = None  # is told how a search goes
    constants: regions.Constants | None = None  # where all linear regions have been found before


def product(problem: Problem) -> Proof:
    """The product of the layers' norms, in the constraint's own chain."""
    return Proof(problem.product.value, problem.product.reason)


def exact(problem: Problem) -> Proof:
    """The largest gradient norm of all linear regions, for one or two inputs; see `regions`."""
    reason = regions.refusal(problem.layers, problem.act)
    if reason is not None or problem.max_regions == 0:
        return Proof(None, reason or "max_regions=0")
    if problem.constants is not None:
        return Proof(problem.constants.everywhere.value, constants=problem.constants)
    act, (low, high) = cast(PiecewiseLinear, problem.act), (end.numpy() for end in problem.box)
    try:
        found = regions.constants(problem.layers, act, (low, high), problem.constraint.q, problem.max_regions)
    except regions.TooManyRegions:
        reason = f"more than {problem.max_regions:,} linear regions (max_regions)"
        return Proof(None, reason, gave_up=True)
    except TooLarge:
        return Proof(None, OVERFLOW)
    return Proof(found.everywhere.value, constants=found)


def rows(problem: Problem) -> Proof:
    """Bounds on the gradient of every feature, layer by layer: u = ||rows of W_1||_q, then |W_i| max(u).

    The triangle inequality, for activations that declare their slopes, or sort: of features that are sorted
    together each may be any, so it gets the largest of their bounds. Everywhere, in any norm. See `propagation`.
    """
    reason = propagation.refusal(problem.layers, problem.act)
    if reason is not None:
        return Proof(None, reason)
    value = propagation.bound(problem.layers, problem.act, problem.constraint.q)
    return Proof(value) if math.isfinite(value) else Proof(None, OVERFLOW)


def eclipse(problem: Problem) -> Proof:
    """ECLipsE-Fast, for slopes in [0, 1] and the 2-norm, everywhere; see `semidefinite`."""
    reason = semidefinite.refusal(problem.act, problem.constraint.q)
    return Proof(None, reason) if reason else _semidefinite(semidefinite.eclipse(problem.layers))


def lipsdp(problem: Problem) -> Proof:
    """LipSDP, for slopes in [0, 1] and the 2-norm, everywhere; see `semidefinite`.

    Unless it is asked for alone, only where the gap is above 10 %, and for networks whose matrix is of moderate
    size: its time grows with the cube of that.
    """
    reason = semidefinite.refusal(problem.act, problem.constraint.q)
    measured, size = problem.measured.value, semidefinite.size(problem.layers)
    if reason is None and problem.best is not None:
        if problem.best <= WORTHWHILE * measured:
            reason = "the gap is below 10 %"
        elif size > LARGEST:
            reason = f"{size} inputs and features, more than {LARGEST}; --method lipsdp takes its time"
    slopes = declared_slopes(problem.act)
    if reason is not None or slopes is None:
        return Proof(None, reason)
    enough = measured * (1 + problem.gap)
    return _semidefinite(semidefinite.lipsdp(problem.layers, slopes, enough, problem.seconds))


def _semidefinite(value: float | None) -> Proof:
    return Proof(value, None if value is not None else "rounding errors leave nothing proven")


def bnb(problem: Problem) -> Proof:
    """Branch and bound over the box of the data, for up to four inputs; see `branching`."""
    reason = branching.refusal(problem.layers, problem.act)
    if reason is not None:
        return Proof(None, reason)
    q, root = problem.constraint.q, problem.best if problem.best is not None else problem.product.value
    found = branching.search(
        problem.layers,
        problem.act,
        problem.box,
        q,
        root,
        problem.measured,
        problem.gap,
        problem.seconds,
        problem.report,
    )
    if not math.isfinite(found.upper):
        return Proof(None, OVERFLOW, best=found.best)
    return Proof(found.upper, everywhere=False, best=found.best)


METHODS: dict[str, Callable[[Problem], Proof]] = {
    "product": product,
    "rows": rows,
    "exact": exact,
    "eclipse": eclipse,
    "lipsdp": lipsdp,
    "bnb": bnb,
}
ON_REQUEST = {"bnb"}  # takes long


def prove(problem: Problem, method: str | None = None) -> Certificate:
    """The certificate with the smallest bound that holds everywhere, and the proof of every method.

    Args:
        method: the one to take besides the product; None: all, until the exact constant is known. Branch and bound
            is only taken when it is named, and starts from what the others prove everywhere.

    Raises:
        ConfigError: `method` has no bound for this network.
    """
    proofs: dict[str, Proof] = {}
    several = method is None or method in ON_REQUEST
    for name in METHODS if several else dict.fromkeys(["product", str(method)]):
        if name != method and (name in ON_REQUEST or (name == "exact" and method in ON_REQUEST)):
            continue
        proofs[name] = METHODS[name](problem)
        if proofs[name].constants is not None:
            break  # nothing proves less than the exact constant
        if several:
            problem = problem._replace(best=_smallest(proofs))
    if method is not None and proofs[method].value is None and method != "product":
        raise ConfigError("--method", method, f"has no bound for this network: {proofs[method].reason}")
    value = _smallest(proofs)
    best = next((name for name, proof in proofs.items() if proof.everywhere and proof.value == value), "product")
    reason = problem.product.reason if value is None else None
    return replace(problem.product, value=value, reason=reason, method=best, proofs=proofs)


def _smallest(proofs: dict[str, Proof]) -> float | None:
    """The smallest bound that holds everywhere."""
    values = [proof.value for proof in proofs.values() if proof.value is not None and proof.everywhere]
    return min(values, default=None)
