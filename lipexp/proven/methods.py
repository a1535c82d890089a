"""The methods that bound the Lipschitz constant of one network, one function each, and what each of them found."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from lipexp.blocks import Block
from lipexp.constraints import Constraint, Unconstrained
from lipexp.inequality import Array
from lipexp.measured.gradients import Maximum
from lipexp.networks import BakedNetwork
from lipexp.norms import conversion, product_bound
from lipexp.proven import branching, rows, semidefinite
from lipexp.proven.regions import Constants, TooLarge, TooManyRegions, constants, why_not_enumerable

OVERFLOW = "its numbers overflow float64"
WORTHWHILE = 1.1  # certified / measured above which LipSDP is tried without being asked for
UNASKED = 10.0  # seconds that it takes at most then


class Proof(NamedTuple):
    """A proven upper bound on the Lipschitz constant, or why a method has none for this network."""

    value: float | None
    reason: str | None = None
    everywhere: bool = True  # else over the box only: no bound for a point that may leave it
    constants: Constants | None = None  # where all linear regions are known
    best: Maximum | None = None  # the steepest point that the method came across
    gave_up: bool = False  # the method applies to this network, but reached its limit
    multipliers: Array | None = None  # that LipSDP found

    def within(self, bound: float | None) -> Proof:
        """With constants of at most `bound`, which is proven too: their own rounding may put them above it."""
        if self.constants is None or bound is None:
            return self
        constants = self.constants.within(bound)
        return self._replace(value=constants.everywhere.value, constants=constants)


@dataclass(frozen=True)
class Chain:
    """The norms and the bound that one run was trained under."""

    p: float  # inputs move in this norm
    q: float  # gradients are measured in this one, its dual
    hidden_p: float  # the norm of the hidden spaces
    output_p: float  # that of several outputs
    target: float | None  # L; None without a constraint
    layer_bound: float | None  # b
    layer_norms: tuple[str, ...]  # what the norm of each layer is called

    @classmethod
    def of(cls, constraint: Constraint, layers: Sequence[Block], run: int = 0) -> Chain:
        """The chain of one run of a stack."""
        bound = constraint.layer_bound(layers)
        return cls(
            constraint.p,
            constraint.q,
            constraint.hidden_p,
            constraint.output_p,
            constraint.target(run),
            None if bound is None else float(bound[run if len(bound) > 1 else 0]),
            constraint.names(layers),
        )

    @classmethod
    def without_bound(cls, network: BakedNetwork, p: float) -> tuple[BakedNetwork, Chain]:
        """The chain p -> h -> ... -> h with the smallest product of norms, and the network with these norms.

        Whatever the network was trained under, nothing is asked of its constant. Residual layers have a norm in
        the 2-norm alone.

        Args:
            network: K = 1.
        """
        spaces = (2.0, math.inf, 1.0) if network.is_plain else (2.0,)
        found: list[tuple[float, int, BakedNetwork, Chain]] = []
        for h in spaces:
            constraint, constants = Unconstrained(p), network.act_constants(h)
            constraint.hidden_p = h
            proven = constraint.prove(network)
            known = [] if constants is None else [*(norm for (norm,) in proven.norms), *constants]
            product = product_bound(known) if known else math.inf
            found.append((product, len(found), proven, cls.of(constraint, network.layers)))
        return min(found)[2:]

    def bound_of(self, layer: Block) -> float | None:
        """The norm that a layer may have; None: it has no bound of its own."""
        return 1.0 if layer.is_residual else self.layer_bound


class Problem(NamedTuple):
    """What a method may use."""

    network: BakedNetwork  # K = 1, with the proven norms of its layers
    chain: Chain
    box: tuple[Tensor, Tensor]  # low and high (D,), of the data
    measured: Maximum
    max_regions: int  # to be enumerated; 0: none
    decides: bool = False  # the network tells classes apart, so that the boundary between them is wanted
    best: float | None = None  # the smallest bound proven so far; None: one method alone is asked for
    gap: float = 1e-3  # a method that searches may stop where certified / measured - 1 is at most this
    seconds: float = 60.0  # after which a method must stop, with what it has
    report: Callable[[str], None] | None = None  # is told the method and how far it is


def by_product(problem: Problem) -> Proof:
    """The product of the layers' norms and the activations' constants, in the norm of the hidden spaces.

    The norm of a residual layer is proven for slopes in [0, 1].
    """
    reason = semidefinite.why_no_residual_norms(problem.network)
    if reason is not None:
        return Proof(None, reason)
    constants = problem.network.act_constants(problem.chain.hidden_p)
    if constants is None:
        return Proof(None, f"the activation declares no bound in the {problem.chain.hidden_p:g}-norm")
    return Proof(product_bound([*(norm for (norm,) in problem.network.norms), *constants]))


def by_multipliers(problem: Problem) -> Proof:
    """What the constraint has proven of the network as a whole, for slopes in [0, 1], by its own multipliers.

    It is a bound in the 2-norm, which is converted to others; see `conversion`.
    """
    network = problem.network
    whole = network.whole
    if not whole:
        return Proof(None, "the network has no multipliers of its own")
    reasons = [semidefinite.why_no_slopes(act) for _, act in problem.network.placed]
    reason = next(filter(None, reasons), None)
    if reason is None and math.isinf(whole[0]):
        reason = "they prove nothing of the stored weights"
    if reason is not None:
        return Proof(None, reason)
    return Proof(product_bound([whole[0], _conversion(problem)]))


def by_regions(problem: Problem) -> Proof:
    """The largest gradient norm of all linear regions, for one or two inputs; see `regions`."""
    reason = why_not_enumerable(problem.network)
    if reason is not None or problem.max_regions == 0:
        return Proof(None, reason or "max_regions=0")
    low, high = (end.numpy() for end in problem.box)
    try:
        found = constants(
            problem.network,
            (low, high),
            problem.chain.q,
            problem.max_regions,
            problem.seconds,
            problem.report,
            problem.chain.output_p,
            problem.decides,
        )
    except TooManyRegions as limit:
        return Proof(None, str(limit), gave_up=True)
    except TooLarge:
        return Proof(None, OVERFLOW)
    return Proof(found.everywhere.value, constants=found)


def by_rows(problem: Problem) -> Proof:
    """Bounds on the gradient of every feature, layer by layer, everywhere and in any norm; see `rows`."""
    reason = rows.why_not_applicable(problem.network)
    if reason is not None:
        return Proof(None, reason)
    return Proof(rows.bound(problem.network, problem.chain.q, problem.chain.output_p))


def by_eclipse(problem: Problem) -> Proof:
    """Multipliers of a matrix inequality in closed form, everywhere; see `semidefinite.closed`.

    The bound in the 2-norm is converted to other norms, see `conversion`.
    """
    reason = semidefinite.why_not_applicable(problem.network)
    return Proof(None, reason) if reason else _semidefinite(problem, semidefinite.eclipse(problem.network))


def by_lipsdp(problem: Problem) -> Proof:
    """LipSDP, everywhere; see `semidefinite`. The bound in the 2-norm is converted as that of `by_eclipse`.

    Unless it is asked for alone, only where the gap is above 10 %, and for some seconds.
    """
    reason = semidefinite.why_not_applicable(problem.network)
    measured, seconds = problem.measured.value, problem.seconds
    if reason is None and problem.best is not None:
        seconds = min(seconds, UNASKED)
        if problem.best <= WORTHWHILE * measured:
            reason = "the gap is below 10 %"
    if reason is not None:
        return Proof(None, reason)
    enough = measured * (1 + problem.gap) / _conversion(problem)
    value, multipliers = semidefinite.lipsdp(problem.network, enough, seconds)
    return _semidefinite(problem, value)._replace(multipliers=multipliers)


def _semidefinite(problem: Problem, value: float | None) -> Proof:
    if value is None:
        return Proof(None, "rounding errors leave nothing proven")
    return Proof(product_bound([value, _conversion(problem)]))


def _conversion(problem: Problem) -> float:
    network, chain = problem.network, problem.chain
    return conversion(chain.p, chain.output_p, network.n_inputs, network.n_outputs)


def by_branching(problem: Problem) -> Proof:
    """Branch and bound over the box of the data, for up to six inputs; see `branching`."""
    chain = problem.chain
    reason = branching.why_not_applicable(problem.network, chain.q, chain.output_p)
    if reason is not None:
        return Proof(None, reason)
    found = branching.branch_and_bound(
        problem.network,
        branching.Domain(problem.box, chain.q, chain.output_p),
        problem.best,
        problem.measured,
        problem.gap,
        problem.seconds,
        problem.report,
    )
    return Proof(found.upper, everywhere=False, best=found.best)


METHODS: dict[str, Callable[[Problem], Proof]] = {
    "product": by_product,
    "multipliers": by_multipliers,
    "rows": by_rows,
    "exact": by_regions,
    "eclipse": by_eclipse,
    "lipsdp": by_lipsdp,
    "bnb": by_branching,
}
ON_REQUEST = {"bnb"}  # takes long
QUICK = ("product", "multipliers")  # what baking has proven
