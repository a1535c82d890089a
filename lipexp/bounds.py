"""Upper bounds on the Lipschitz constant of one network: one table of methods, and the best of what they prove."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor, nn

from lipexp.config import ConfigError
from lipexp.constraints import Constraint
from lipexp.evaluate import Certificate
from lipexp.measures import Maximum
from lipexp.models import Layer


class Problem(NamedTuple):
    """What a method may use."""

    layers: Sequence[Layer]  # one network, K = 1, hidden features in the usual order
    act: nn.Module
    constraint: Constraint
    product: Certificate  # by the product of the layers' norms
    box: tuple[Tensor, Tensor]  # low and high (D,), of the data
    measured: Maximum
    gap: float  # upper / lower - 1, below which a method that searches may stop
    seconds: float | None  # after which it must


class Proof(NamedTuple):
    """A proven upper bound on the Lipschitz constant, or why a method has none for this network."""

    value: float | None
    reason: str | None = None
    everywhere: bool = True  # else over the box only: no bound for a point that may leave it


def product(problem: Problem) -> Proof:
    """The product of the layers' norms, in the constraint's own chain."""
    return Proof(problem.product.value, problem.product.reason)


METHODS: dict[str, Callable[[Problem], Proof]] = {
    "product": product,
}


def prove(problem: Problem, method: str | None) -> tuple[Certificate, str, dict[str, Proof]]:
    """The certificate with the smallest bound that holds everywhere, its method, and the proof of every method.

    Args:
        method: the one to take besides the product; None: all.

    Raises:
        ConfigError: `method` has no bound for this network.
    """
    chosen = METHODS if method is None else {"product": METHODS["product"], method: METHODS[method]}
    proofs = {name: prove(problem) for name, prove in chosen.items()}
    if method is not None and proofs[method].value is None and method != "product":
        raise ConfigError("--method", method, f"has no bound for this network: {proofs[method].reason}")
    values = {name: proof.value for name, proof in proofs.items() if proof.value is not None and proof.everywhere}
    best = min(values, key=lambda name: values[name], default="product")
    reason = None if values else problem.product.reason
    return replace(problem.product, value=values.get(best), reason=reason), best, proofs
