"""Upper bounds on the Lipschitz constant in the 2-norm from a matrix inequality: ECLipsE-Fast and LipSDP.

What `lipexp.inequality` proves needs multipliers T, and any will do, wherever they come from:

- ECLipsE-Fast takes T_k = I / sigma, with sigma the largest eigenvalue of W_k S_{k-1}^-1 W_k^T, S_0 = I and
  S_k = 2 T_k - T_k W_k S_{k-1}^-1 W_k^T T_k, in units of L^2: a closed form, for slopes in [0, 1];
- LipSDP takes nearly the best T, found by `interior`. Only diagonal T_k are used; the multipliers that couple
  features ("LipSDP-Network") prove too much (Pauli et al. 2021).

Shapes: weights (out, in) of each layer; multipliers (H,) of all hidden features together.

References: Fazlyab, Robey, Hassani, Morari and Pappas 2019, "Efficient and accurate estimation of Lipschitz
constants for deep neural networks" (arXiv 1906.04893), theorem 2; Xu and Sivaranjani 2024, "ECLipsE: efficient
compositional Lipschitz constant estimation for deep neural networks" (arXiv 2404.04375); Pauli, Koch, Berberich,
Kohler and Allgöwer 2021, "Training robust neural networks using Lipschitz bounds" (arXiv 2005.02929), on coupling.
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
from lipexp.inequality import Array, Slopes, inequality_matrix, proves
from lipexp.networks import BakedNetwork
from lipexp.norms import UNIT_ROUNDOFF, is_semidefinite, round_up
from lipexp.proven.interior import Inequality, maximise

LARGEST = 4096  # rows of a matrix that is factorised: some 1 GB, with all its copies
FALLS = 60  # attempts to find a feasible start
LARGEST_EXCESS = 2.0**-6  # of a proven bound over the smallest one that its multipliers allow


def why_not_applicable(network: BakedNetwork, q: float, h: float = 2.0) -> str | None:
    """Why these bounds do not hold for the gradient norm q and the norm h of several outputs; None if they do."""
    if q != 2:
        return "bounds the 2-norm of gradients only"
    if network.n_outputs > 1 and h < 2:  # a larger h makes the norm of a Jacobian no larger
        return "bounds several outputs in the 2-norm only"
    for _, act in network.placed:
        reason = why_no_slopes(act)
        if reason is not None:
            return reason
    size = network.n_inputs + sum(network.hidden_widths)
    return f"{size:,} inputs and features, more than {LARGEST:,}: would take gigabytes" if size > LARGEST else None


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
    """A proven bound by the multipliers of ECLipsE-Fast, for slopes in [0, 1]; None where no proof is found.

    Args:
        network: K = 1, float32; `why_not_applicable` must be None.
    """
    reduced = Reduced.of(network)
    return 0.0 if reduced is None else reduced.closed_bound()


def lipsdp(
    network: BakedNetwork, enough: float = 0.0, seconds: float = math.inf
) -> tuple[float | None, Array | None]:
    """A proven bound by nearly the best multipliers, for the slopes of the activation, and these multipliers.

    It is never above that of `eclipse`, whose multipliers are the first that are tried. None: no proof is found.

    Args:
        network: K = 1, float32; `why_not_applicable` must be None.
        enough: the search for multipliers stops at a bound this small.
        seconds: the search stops after this time.
    """
    slopes, reduced = _slopes(network), Reduced.of(network)
    if reduced is None:
        return 0.0, None
    with np.errstate(over="ignore"):
        square = np.ldexp(enough, -reduced.exponent) ** 2
    sigma = float(1 / square) if square > 0 else math.inf
    multipliers = lipsdp_multipliers(reduced, slopes, sigma, seconds)
    found = [reduced.closed_bound(), reduced.bound(slopes, multipliers)]
    return min((bound for bound in found if bound is not None), default=None), multipliers


def bounds_of_pairs(network: BakedNetwork, multipliers: Array | None = None, seconds: float = 0.0) -> Array:
    """(P,) proven bounds for f_i - f_j, i < j in the order of np.triu_indices; inf: no proof is found.

    They hold for the differences of rows w_i - w_j as float64 rounds them.

    The layers before are proven once. With multipliers in units of L^2, M / L^2 = K - w^T w / L^2 for the last row
    w, and K - Q is proven positive semidefinite for a Q that acts on the last features alone, nearly the Schur
    complement of K. Then L is a bound for every w with L^2 Q - w^T w positive semidefinite.

    Args:
        network: K = 1, float32; `why_not_applicable` must be None.
        multipliers: that `lipsdp` found; None: those of ECLipsE-Fast.
        seconds: that the search for the best multipliers of every single pair may take; 0: it is left out.
    """
    reduced, (first, second) = Reduced.of(network), np.triu_indices(network.n_outputs, 1)
    if reduced is None:
        return np.zeros(len(first))
    rows = reduced.weights[-1][first] - reduced.weights[-1][second]
    if multipliers is None:
        return reduced.bounds_of_rows(rows, (0.0, 1.0), reduced.closed)
    slopes = _slopes(network)
    found = reduced.bounds_of_rows(rows, slopes, multipliers)
    end = time.monotonic() + seconds
    for k, row in enumerate(rows):
        left = (end - time.monotonic()) / (len(rows) - k)
        if left > 0 and row.any():
            alone = reduced._replace(weights=[*reduced.weights[:-1], row[None]])
            own = lipsdp_multipliers(alone, slopes, seconds=left)
            found[k] = min(found[k], alone.bounds_of_rows(row[None], slopes, own)[0])
    return found


def _slopes(network: BakedNetwork) -> Slopes:
    """Between which the slopes of all activations lie."""
    ends = [slope for _, act in network.placed for slope in act.slopes or ()]
    return (min(ends), max(ends)) if ends else (0.0, 1.0)


def size(network: BakedNetwork) -> int:
    """The number of rows of the matrices that `lipsdp` factorises in every step."""
    first, *rest = (layer.weight.shape[1:] for layer in network.layers)
    return min(first) + sum(n_in for _, n_in in rest)


class Reduced(NamedTuple):
    """The weights that take part in the inequality, scaled; their product is 2^-exponent times that of all."""

    weights: list[Array]  # float64, exactly
    exponent: int
    closed: Array  # (H,) the multipliers of ECLipsE-Fast for these weights, each between 1/2 and 2
    smallest: float  # the L that they allow, up to rounding

    @classmethod
    def of(cls, network: BakedNetwork) -> Reduced | None:
        """Without features that are constant or unused, each layer scaled by a power of two.

        Both are exact: the differences x_i of such features are 0 or multiplied by 0, and the inequality is
        homogeneous. The powers are those that bring ECLipsE's multipliers near 1. With layers of norm 1 they would
        grow by up to 8 from each layer to the next, and rounding would leave nothing of a deep network's bound.
        None for a constant function.
        """
        weights = [layer.weight[0].numpy().astype(np.float64) for layer in network.layers]
        before = None
        while before != (shapes := [weight.shape for weight in weights]):
            before = shapes
            weights[0] = weights[0][:, weights[0].any(axis=0)]
            for k in range(len(weights) - 1):
                alive = weights[k].any(axis=1) & weights[k + 1].any(axis=0)
                weights[k], weights[k + 1] = weights[k][alive], weights[k + 1][:, alive]
        if not all(weight.any() for weight in weights):
            return None
        exponents, multipliers = [], [np.empty(0)]
        half: Array = weights[0].T  # S_{k-1}^-1/2 W_k^T, of which sigma is the square of the norm
        for k, weight in enumerate(weights):
            exponent = math.frexp(float(np.linalg.norm(half)))[1]
            half = np.ldexp(half, -exponent)
            if k < len(weights) - 1:
                gram = half.T @ half
                sigma = float(np.linalg.eigvalsh(gram)[-1])
                further = math.frexp(sigma)[1] // 2
                exponent, gram, t = exponent + further, np.ldexp(gram, -2 * further), 4.0**further / sigma
                multipliers.append(np.full(len(weight), t))
                half = _solved(np.linalg.cholesky(t * (2 * np.eye(len(weight)) - t * gram)), weights[k + 1].T)
            weights[k] = np.ldexp(weight, -exponent)
            exponents.append(exponent)
        return cls(weights, sum(exponents), np.concatenate(multipliers), float(np.linalg.norm(half, ord=2)))

    def closed_bound(self) -> float | None:
        """The Lipschitz constant of the network itself that ECLipsE's multipliers prove, for slopes in [0, 1]."""
        return self._proven(self.smallest, (0.0, 1.0), self.closed)

    def bound(self, slopes: Slopes, multipliers: Array) -> float | None:
        """The Lipschitz constant of the network itself that these multipliers prove, in units of L^2."""
        smallest = best_bound(self.weights, slopes, multipliers)
        return None if smallest is None else self._proven(smallest, slopes, multipliers)

    def bounds_of_rows(self, rows: Array, slopes: Slopes, multipliers: Array) -> Array:
        """The bounds (P,) with each of these last rows (P, H); inf where the layers before have no proof."""
        *hidden, out = self.weights
        matrix, terms = inequality_matrix([*hidden, np.zeros_like(out)], slopes, multipliers, 1.0)
        last = slice(len(matrix) - out.shape[1], None)
        m = max(len(weight) for weight in self.weights)
        nothing = np.full(len(rows), math.inf)
        if not (np.isfinite(matrix).all() and np.all(multipliers >= 0)):
            return nothing
        try:
            corner = np.linalg.cholesky(matrix)[last, last]
        except np.linalg.LinAlgError:
            return nothing
        for excess in self._excesses():
            q = (1 - excess) * (corner @ corner.T)
            q = (q + q.T) / 2
            rest, of_rest = matrix.copy(), terms.copy()
            rest[last, last] -= q
            of_rest[last, last] += np.abs(q)
            if is_semidefinite(rest, (m + 8) * (UNIT_ROUNDOFF * of_rest + 2.0**-1070)):
                break
        else:
            return nothing
        smallest = np.linalg.norm(_solved(np.linalg.cholesky(q), rows.T), axis=0)
        return np.array([self._bound_of_row(row, q, float(low)) for row, low in zip(rows, smallest, strict=True)])

    def _bound_of_row(self, row: Array, q: Array, smallest: float) -> float:
        """The first L above `smallest` for which L^2 Q - w^T w is proven positive semidefinite."""
        if not row.any():
            return 0.0
        for excess in self._excesses():
            lipschitz = smallest * (1 + excess)
            square = math.nextafter(lipschitz * lipschitz, 0)
            terms = square * np.abs(q) + np.abs(np.outer(row, row))
            if is_semidefinite(square * q - np.outer(row, row), 8 * (UNIT_ROUNDOFF * terms + 2.0**-1070)):
                return round_up(Fraction(lipschitz) * Fraction(2) ** self.exponent)
        return math.inf

    def _excesses(self) -> Iterator[float]:
        """By how much to try to stay away from the smallest bound.

        The proof allows for errors of some n^2 u; a smaller excess would be tried in vain.
        """
        excess = 8 * (self.weights[0].shape[1] + len(self.closed)) ** 2 * UNIT_ROUNDOFF
        while excess <= LARGEST_EXCESS:
            yield excess
            excess *= 8

    def _proven(self, smallest: float, slopes: Slopes, multipliers: Array) -> float | None:
        """The first bound above `smallest` for which the proof goes through."""
        for excess in self._excesses():
            lipschitz = smallest * (1 + excess)
            if proves(lipschitz, self.weights, slopes, multipliers * lipschitz**2):
                return round_up(Fraction(lipschitz) * Fraction(2) ** self.exponent)
        return None


# Multipliers, in units of L^2 ------------------------------------------------------------------------------------


def lipsdp_multipliers(
    reduced: Reduced, slopes: Slopes, enough: float = math.inf, seconds: float = math.inf
) -> Array:
    """(H,) those of nearly the smallest L; those of ECLipsE where the search for them fails.

    Args:
        enough: stop at this 1 / L^2.
    """
    weights = _without_idle_inputs(reduced.weights)
    if len(weights) == 1:
        return reduced.closed
    inequality = Inequality([torch.from_numpy(weight) for weight in weights], slopes)
    start = torch.from_numpy(reduced.closed)
    depths = torch.cat([torch.full((len(weight),), float(k)) for k, weight in enumerate(weights[:-1], start=1)])
    # ECLipsE's are feasible for slopes in [0, 1]; for alpha > 0 they may have to fall off faster with the depth.
    for _ in range(FALLS):
        found = maximise(inequality, start, enough, seconds)
        if found is not None:
            return found.numpy()
        start = start * 0.5**depths
    return reduced.closed


def _without_idle_inputs(weights: Sequence[Array]) -> list[Array]:
    """Weights of the same W_1 W_1^T, on which alone the multipliers depend, with no more inputs than features."""
    first, *rest = weights
    return [np.asarray(np.linalg.qr(first.T, mode="r")).T if first.shape[0] < first.shape[1] else first, *rest]


def best_bound(weights: Sequence[Array], slopes: Slopes, multipliers: Array) -> float | None:
    """The smallest L for which M is positive semidefinite, up to rounding; None if there is none.

    With multipliers in units of L^2, M / L^2 = K - W_n^T W_n / L^2, so that L^2 is the largest eigenvalue of
    W_n K^-1 W_n^T.
    """
    *hidden, out = weights
    inside, _ = inequality_matrix([*hidden, np.zeros_like(out)], slopes, multipliers, 1.0)
    try:
        factor = np.linalg.cholesky(inside)
    except np.linalg.LinAlgError:
        return None
    n = out.shape[1]  # W_n sees the last features only, and so does the solution
    return float(np.linalg.norm(_solved(factor[-n:, -n:], out.T), ord=2))


def _solved(factor: npt.NDArray[Any], right: Array) -> Array:
    """factor^-1 right, by substitution, which is accurate whatever the condition of a Cholesky factor."""
    solution = torch.linalg.solve_triangular(torch.from_numpy(factor), torch.from_numpy(right), upper=False)
    return np.asarray(solution)
