"""Upper bounds on the Lipschitz constant: `prove` takes the best of all methods, and says what each found."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

import numpy as np
import torch

from lipexp import record
from lipexp.config import ConfigError
from lipexp.measured.gradients import Maximum
from lipexp.norms import norm_name, round_up, row_norm_bound
from lipexp.proven.methods import METHODS, ON_REQUEST, OVERFLOW, QUICK, Chain, Problem, Proof

__all__ = ["METHODS", "Certificate", "Chain", "Problem", "Proof", "prove", "prove_quickly"]

# Of numerical methods; torch does not say that it exports its own.
FAILURES = (ArithmeticError, np.linalg.LinAlgError, torch.linalg.LinAlgError)  # type: ignore[attr-defined]


@dataclass
class Certificate:
    """The best proven upper bound on the Lipschitz constant of one network, or why there is none."""

    chain: Chain
    box: tuple[Sequence[float], Sequence[float]]  # low and high (D,), of the data
    value: float | None  # the smallest bound that holds everywhere
    reason: str | None  # why `value` is None
    method: str  # behind `value`; "none" without one
    proofs: dict[str, Proof] = field(default_factory=dict)  # of every method that was asked

    def verdict(self, measured: Maximum) -> str:
        """PASS, or FAIL when the exact comparison measured <= certified <= L does not hold; OPEN: no bound.

        A bound over the box of the data counts as well, for a point inside. Where `measured` is no estimate, both
        sides are rigorous, and a FAIL is a bug in lipexp.
        """
        if self.value is None:
            return "OPEN"
        bounds = [self.value]
        # A point that was moved off a breakpoint may lie just outside.
        if all(low <= x <= high for x, low, high in zip(measured.point, *self.box, strict=False)):
            bounds += [proof.value for proof in self.proofs.values() if proof.value is not None]
            boxes = [proof.constants.box for proof in self.proofs.values() if proof.constants is not None]
            bounds += [box.value for box in boxes if box is not None]
        holds = measured.value <= min(bounds) and (self.chain.target is None or self.value <= self.chain.target)
        return "PASS" if holds else "FAIL"

    def interval(self, measured: Maximum) -> record.Interval:
        """What metrics.json says of the Lipschitz constant."""
        product, exact = self.proofs.get("product"), self.proofs.get("exact")
        constants = None if exact is None else exact.constants
        return record.Interval(
            p=norm_name(self.chain.p),
            q=norm_name(self.chain.q),
            target=self.chain.target,
            measured=measured.value,
            measured_by=measured.by,
            certified=self.value,
            method=self.method,
            reason=self.reason,
            product=None if product is None else product.value,
            whole=self.proofs["multipliers"].value if "multipliers" in self.proofs else None,
            exact=None if constants is None else constants.everywhere.value,
            exact_box=None if constants is None else constants.in_box(),
            regions=None if constants is None else constants.regions,
            open=exact.reason if exact is not None and exact.gave_up else None,
            verdict=self.verdict(measured),
        )


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
    for name in METHODS if several else dict.fromkeys([*QUICK, *([method] if method else [])]):
        if name == "multipliers" != method and not problem.network.whole:
            continue
        if name != method and (name in ON_REQUEST or (name == "exact" and method in ON_REQUEST)):
            continue
        if problem.report is not None:
            problem.report(f"proving: {name}")
        proof = _attempt(name, problem)
        proofs[name] = proof.within(_smallest(proofs)) if proof.constants is not None else proof
        if proof.constants is not None:
            break  # nothing proves less than the exact constant
        if several:
            problem = problem._replace(best=_smallest(proofs))
    if method is not None and proofs[method].value is None and method != "product":
        raise ConfigError("--method", method, f"has no bound for this network: {proofs[method].reason}")
    value = _smallest(proofs)
    low, high = (end.tolist() for end in problem.box)
    if value is None:
        return Certificate(problem.chain, (low, high), None, proofs["product"].reason, "none", proofs)
    best = [name for name, proof in proofs.items() if proof.everywhere and proof.value == value]
    return Certificate(problem.chain, (low, high), value, None, "exact" if "exact" in best else best[0], proofs)


def _attempt(name: str, problem: Problem) -> Proof:
    """What a method proves: nothing where its bound is not finite, or where its arithmetic fails."""
    network = problem.network
    if name == "rows" and not network.is_plain:
        return Proof(None, "is for affine layers")
    beside = 0.0
    if network.linear is not None and name not in ("exact", "bnb", "eclipse", "lipsdp"):  # which take that term in
        beside = row_norm_bound(network.linear[0].numpy(), problem.chain.q)
        # What is known of f, less the norm of the term, holds for the layers alone, and says how far to search.
        seen = problem.measured._replace(value=max(0.0, problem.measured.value - beside))
        best = None if problem.best is None else problem.best - beside
        problem = problem._replace(network=replace(network, linear=None), measured=seen, best=best)
    try:
        proof = METHODS[name](problem)
        if beside and proof.value is not None:
            proof = proof._replace(value=round_up(Fraction(proof.value) + Fraction(beside)))
    except FAILURES as error:
        return Proof(None, f"fails numerically: {error}")
    return proof if proof.value is None or math.isfinite(proof.value) else Proof(None, OVERFLOW, best=proof.best)


def prove_quickly(problem: Problem) -> Certificate:
    """The certificate that follows from the norms proven when the network was baked."""
    return prove(problem, "product")


def _smallest(proofs: dict[str, Proof]) -> float | None:
    """The smallest bound that holds everywhere."""
    values = [proof.value for proof in proofs.values() if proof.value is not None and proof.everywhere]
    return min(values, default=None)
