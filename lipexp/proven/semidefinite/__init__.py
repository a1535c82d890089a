"""Upper bounds on the Lipschitz constant in the 2-norm from a matrix inequality: ECLipsE-Fast and LipSDP.

What `lipexp.inequality` proves needs multipliers T, and any will do, wherever they come from:

- ECLipsE-Fast has them in closed form, stage by stage; see `closed`;
- LipSDP takes nearly the best T, found by `interior`. Only diagonal T are used; the multipliers that couple
  features ("LipSDP-Network") prove too much (Pauli et al. 2021).

Both cover activations feature by feature with any slopes, sorting and reflections of pairs (`splits`), residual
layers and a linear term (`stages`). Nothing is relaxed up to LARGEST rows. A network whose
matrix is larger is cut into parts of consecutive layers, and the bounds of the parts, from the 2-norm to the
2-norm, are multiplied.

Shapes: N variables, P multipliers, C outputs; see `lipexp.inequality`.

References: Fazlyab, Robey, Hassani, Morari and Pappas 2019, "Efficient and accurate estimation of Lipschitz
constants for deep neural networks" (arXiv 1906.04893), theorem 2; Xu and Sivaranjani 2024, "ECLipsE: efficient
compositional Lipschitz constant estimation for deep neural networks" (arXiv 2404.04375); Pauli, Havens, Araujo,
Garg, Khorrami, Allgöwer and Hu 2024 (arXiv 2401.14033), on sorting; Pauli, Koch, Berberich, Kohler and Allgöwer
2021, "Training robust neural networks using Lipschitz bounds" (arXiv 2005.02929), on coupling.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from lipexp.activations import Activation
from lipexp.blocks import act_width
from lipexp.inequality import Array, Inequality, inequality_matrix, proves
from lipexp.networks import BakedNetwork
from lipexp.norms import UNIT_ROUNDOFF, is_semidefinite, product_bound, root_up, round_up
from lipexp.proven.semidefinite.descent import descend
from lipexp.proven.semidefinite.interior import maximise
from lipexp.proven.semidefinite.recursion import closed
from lipexp.proven.semidefinite.splits import why_none
from lipexp.proven.semidefinite.stages import Stages

LARGEST = 4096  # rows of a matrix that is factorised: some 1 GB, with all its copies
INTERIOR = 1024  # variables up to which the interior-point method is taken, some 20 s of one core
WEIGHTS = (0.0, 2.0**-20, 2.0**-16, 2.0**-12, 2.0**-8)  # of ECLipsE's multipliers among the best
LARGEST_EXCESS = 2.0**-6  # of a proven bound over the smallest one that its multipliers allow


def why_not_applicable(network: BakedNetwork) -> str | None:
    """Why these bounds do not hold for the network; None if they do."""
    for i, act in enumerate(network.acts):
        width = act_width(network.layers, i)
        if width and (reason := why_none(act, width)):
            return reason
    parts = Stages.of(network).parts(LARGEST)
    n = max(part.size for part in parts)
    if n > LARGEST:
        return f"a layer of {n:,} inputs and features, more than {LARGEST:,}: would take gigabytes"
    if len(parts) > 1 and network.linear is not None:
        return f"{size(network):,} inputs and features beside a linear term, more than {LARGEST:,}"
    return None


def why_no_slopes(act: Activation) -> str | None:
    """Why the inequality for slopes in [0, 1] says nothing of this activation; None if it does."""
    if act.slopes is None:
        return f"{act.label} declares no slopes"
    if not act.has_unit_slopes:
        return f"needs slopes in [0, 1]; {act.label} has [{act.slopes[0]:g}, {act.slopes[1]:g}]"
    return None


def why_no_residual_norms(network: BakedNetwork) -> str | None:
    """Why the norms of its residual layers, if it has any, are no bounds; None if they are."""
    inside = [i for i, layer in enumerate(network.layers) if layer.is_residual]
    for i in inside:
        if reason := why_no_slopes(network.acts[i]):
            return reason
    unproven = [str(i) for i in inside if math.isinf(network.norms[i][0])]
    return f"not proven to be 1-Lipschitz: residual layer {', '.join(unproven)}" if unproven else None


def eclipse(network: BakedNetwork) -> float | None:
    """A proven bound by multipliers in closed form; None where no proof is found.

    Args:
        network: K = 1, float32; `why_not_applicable` must be None.
    """
    return _product([part.bound(part.closed) for part in Reduced.parts(network)])


def lipsdp(
    network: BakedNetwork, enough: float = 0.0, seconds: float = math.inf
) -> tuple[float | None, Array | None]:
    """A proven bound by nearly the best multipliers, and these multipliers if the network was not cut.

    It is never above that of `eclipse`, whose multipliers are the first that are tried. None: no proof is found.

    Args:
        network: K = 1, float32; `why_not_applicable` must be None.
        enough: the search for multipliers stops at a bound this small.
        seconds: the search stops after this time.
    """
    parts = Reduced.parts(network)
    one = len(parts) == 1
    found = [part.best(enough if one else 0.0, seconds / len(parts)) for part in parts]
    return _product([bound for bound, _ in found]), found[0][1] if one else None


def _product(bounds: Sequence[float | None]) -> float | None:
    """The bound of a network from those of its parts; no parts: it is constant."""
    known = [bound for bound in bounds if bound is not None]
    return None if len(known) < len(bounds) else product_bound(known) if known else 0.0


def bounds_of_pairs(network: BakedNetwork, multipliers: Array | None = None, seconds: float = 0.0) -> Array:
    """(P,) proven bounds for f_i - f_j, i < j in the order of np.triu_indices; inf: no proof is found.

    One proof is enough for all: with S >= C K^-1 C^T the constant of f_i - f_j is (S_ii - 2 S_ij + S_jj)^(1/2).

    Args:
        network: K = 1, float32; `why_not_applicable` must be None.
        multipliers: that `lipsdp` found; None: those of ECLipsE-Fast.
        seconds: that the search for the best multipliers of every single pair may take; 0: it is left out.
    """
    parts, (first, second) = Reduced.parts(network), np.triu_indices(network.n_outputs, 1)
    if not parts:
        return np.zeros(len(first))
    *before, reduced = parts
    found = reduced.bounds_of_pairs(reduced.closed if multipliers is None else multipliers)
    end = time.monotonic() + seconds
    for k in range(len(first) if seconds else 0):
        left = (end - time.monotonic()) / (len(first) - k)
        if left > 0:
            bound, _ = reduced.of_difference(int(first[k]), int(second[k])).best(seconds=left)
            found[k] = found[k] if bound is None else min(found[k], bound)
    if not before:
        return found
    factor = _product([part.bound(part.closed) for part in before])
    return np.array([math.inf if factor is None else product_bound([factor, bound]) for bound in found])


def size(network: BakedNetwork) -> int:
    """The number of rows of the matrices that `lipsdp` factorises in every step."""
    n = min(network.layers[0].weight.shape[1:])
    for i, act in enumerate(network.acts):
        width = act_width(network.layers, i)
        groups = act.groups(width) if act.slopes is None and width else None
        fewer = width // 2 if act.slopes is None and groups is None else 0 if groups is None else len(groups)
        n += width - fewer
    return n


class Reduced(NamedTuple):
    """A network in the units in which ECLipsE's multipliers are near 1."""

    stages: Stages
    inequality: Inequality
    closed: Array  # (P,) the multipliers of ECLipsE-Fast
    smallest: Array  # (C, C) the smallest S that they allow, up to rounding

    @classmethod
    def parts(cls, network: BakedNetwork) -> list[Reduced]:
        """A network, or the parts that it is cut into as it is too large; none for a constant function."""
        if not network.is_finite(0):
            raise ArithmeticError("its numbers are not all finite")
        stages = Stages.of(network)
        if not all(weight.any() for weight in (*(s.weight for s in stages.hidden if s.back is None), stages.last)):
            if stages.linear is None:
                return []
            stages = Stages([], stages.linear, None)
        found = [cls.of(part) for part in stages.parts(LARGEST)]
        return [each for each in found if each is not None] if None not in found else []

    @classmethod
    def of(cls, stages: Stages) -> Reduced | None:
        """None for a constant function.

        With layers of norm 1 the multipliers would grow by up to 8 from each layer to the next, and rounding would
        leave nothing of a deep network's bound. The units are powers of two, so that nothing is rounded.
        """
        stages, multipliers, square = closed(stages)
        inequality = stages.inequality()
        values, off, _ = inequality.outputs
        return cls(stages, inequality, multipliers, square) if values.any() or off.any() else None

    @property
    def exponent(self) -> int:
        """The outputs are in a unit of 2^exponent."""
        return self.stages.exponent

    def bound(self, multipliers: Array) -> float | None:
        """The Lipschitz constant that these multipliers prove: the first above the smallest that goes through."""
        square = self.smallest if multipliers is self.closed else best_outputs(self.inequality, multipliers)
        if square is None:
            return None
        smallest = math.sqrt(max(0.0, float(np.linalg.eigvalsh(square)[-1]))) or 2.0**-500
        for excess in self._excesses():
            lipschitz = smallest * (1 + excess)
            square = np.diag(np.full(len(square), math.nextafter(lipschitz * lipschitz, 0)))
            if proves(self.inequality, multipliers, square):
                return round_up(Fraction(lipschitz) * Fraction(2) ** self.exponent)
        return None

    def bounds_of_pairs(self, multipliers: Array) -> Array:
        """The bounds of f_i - f_j, i < j; inf where the multipliers prove nothing."""
        first, second = np.triu_indices(len(self.inequality.outputs.values), 1)
        square = best_outputs(self.inequality, multipliers)
        if square is None:
            return np.full(len(first), math.inf)
        sizes = np.maximum(np.diagonal(square), 2.0**-60 * np.diagonal(square).max(initial=0.0) + 2.0**-900)
        for excess in self._excesses():
            raised = square + np.diag(excess * sizes)
            if proves(self.inequality, multipliers, raised):
                unit, exact = Fraction(2) ** self.exponent, [[Fraction(v) for v in row] for row in raised.tolist()]
                squares = (exact[i][i] - 2 * exact[i][j] + exact[j][j] for i, j in zip(first, second, strict=True))
                return np.array([round_up(Fraction(root_up(each)) * unit) for each in squares])
        return np.full(len(first), math.inf)

    def of_difference(self, i: int, j: int) -> Reduced:
        """That of the single output f_i - f_j."""
        last, linear = self.stages.last, self.stages.linear
        linear = None if linear is None else linear[[i]] - linear[[j]]
        stages = self.stages._replace(last=last[[i]] - last[[j]], linear=linear)
        square = self.smallest[[i]] - self.smallest[[j]]
        inequality = self.inequality.of_difference(i, j)
        return Reduced(stages, inequality, self.closed, square[:, [i]] - square[:, [j]])

    def best(self, enough: float = 0.0, seconds: float = math.inf) -> tuple[float | None, Array | None]:
        """The smallest bound that is proven, and its multipliers.

        Args:
            enough: stop at this bound.
            seconds: stop the search after this time.
        """
        with np.errstate(over="ignore"):
            square = np.ldexp(enough, -self.exponent) ** 2
        found = self._multipliers(float(1 / square) if square > 0 else math.inf, seconds)
        bounds = [(bound, i) for i, each in enumerate(found) if (bound := self.bound(each)) is not None]
        return (min(bounds)[0], found[min(bounds)[1]]) if bounds else (None, None)

    def _multipliers(self, enough: float, seconds: float) -> list[Array]:
        """Those in closed form, and nearly the best, if the search for them finds any.

        Args:
            enough: stop at this 1 / L^2, in this unit.
        """
        if not len(self.closed):
            return [self.closed]
        search = self.stages.compressed()
        if self.inequality.size <= INTERIOR:
            best = maximise(search.inequality(), self.closed, enough, seconds)
        else:
            best = descend(search, self.closed, enough, seconds)
        return [self.closed] if best is None else [self.closed, self._provable(best)]

    def _provable(self, multipliers: Array) -> Array:
        """The multipliers, or a mean of them and those in closed form, for which K is proven semidefinite.

        At the optimum K may be so near to singular that the proof's allowance for rounding is more than is left.
        A mean with the weight w loses at most w / 2 of L, as 1 / L^2 is concave in the multipliers.
        """
        for weight in WEIGHTS:
            mean = (1 - weight) * multipliers + weight * self.closed
            if is_semidefinite(*inequality_matrix(self.inequality, mean)):
                return mean
        return self.closed

    def _excesses(self) -> Iterator[float]:
        """By how much to try to stay away from the smallest bound.

        The proof allows for errors of some n^2 u; a smaller excess would be tried in vain.
        """
        excess = 8 * (self.inequality.size + 1) ** 2 * UNIT_ROUNDOFF
        while excess <= LARGEST_EXCESS:
            yield excess
            excess *= 8


def best_outputs(inequality: Inequality, multipliers: Array) -> Array | None:
    """C K^-1 C^T (C, C), the smallest S that these multipliers allow, up to rounding; None if there is none."""
    if not (np.isfinite(multipliers).all() and np.all(multipliers >= 0)):
        return None
    values, _, on = inequality.outputs
    try:
        factor = np.linalg.cholesky(inequality_matrix(inequality, multipliers)[0])
    except np.linalg.LinAlgError:
        return None
    # Where the outputs see the last variables only, so does the solution.
    half = solved(factor[on.start :, on.start :], np.pad(values, ((0, 0), (0, inequality.size - on.stop))).T)
    square = half.T @ half
    return np.asarray((square + square.T) / 2)


def solved(factor: npt.NDArray[Any], right: Array) -> Array:
    """factor^-1 right, by substitution, which is accurate whatever the condition of a Cholesky factor."""
    solution = torch.linalg.solve_triangular(torch.from_numpy(factor), torch.from_numpy(right), upper=False)
    return np.asarray(solution)
