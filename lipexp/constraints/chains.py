"""Constraints that bound every layer by an operator norm of its own."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

from lipexp.config import lipschitz_constant, norm_order
from lipexp.constraints.base import Constraint
from lipexp.constraints.norms import (
    AnyNorm,
    ColumnNorm,
    FrobeniusNorm,
    OperatorNorm,
    ProjectedRows,
    RowNorm,
    SpectralNorm,
)


class Unconstrained(Constraint):
    """No bound: parameters are the weights. The constant is measured and certified for the norm p.

    Several outputs are measured in the 2-norm for p = 2, else each by itself.

    Args:
        p: the norm in which inputs move: 1, 2 or inf. That of the hidden spaces is 2 for p = 2, else inf.
    """

    def __init__(self, p: float | str = 2) -> None:
        self.p = norm_order("p", p)
        self.hidden_p = 2.0 if self.p == 2 else math.inf

    @property
    def output_p(self) -> float:
        return 2.0 if self.p == 2 else math.inf

    def norms(self, n_layers: int) -> Sequence[OperatorNorm]:
        spaces = [self.p, *[self.hidden_p] * (n_layers - 1), self.output_p]
        return [AnyNorm(p, h) for p, h in itertools.pairwise(spaces)]


class Spectral(Constraint):
    """||W||_2 <= b for every layer: L-Lipschitz for the 2-norm.

    Reference: Miyato et al. 2018, "Spectral normalization" (arXiv 1802.05957), section 2.1.
    """

    per_run = ("lipschitz",)
    layer_norm: Callable[[], OperatorNorm] = SpectralNorm  # of every layer

    def __init__(self, lipschitz: float = 1.0) -> None:
        self.lipschitz = lipschitz_constant("lipschitz", lipschitz)

    def norms(self, n_layers: int) -> Sequence[OperatorNorm]:
        return [self.layer_norm() for _ in range(n_layers)]


class LInf(Constraint):
    """||W||_{p -> inf} <= b for the first layer, ||W||_inf <= b for later ones: L-Lipschitz for the norm p.

    Args:
        p: the norm in which inputs move: 1, 2 or inf.
        lipschitz: L.

    Reference: Anil, Lucas and Grosse 2019, "Sorting out Lipschitz function approximation", section 4.2.
    """

    per_run = ("lipschitz",)
    hidden_p = math.inf

    def __init__(self, p: float | str = 2, lipschitz: float = 1.0) -> None:
        self.p = norm_order("p", p)
        self.lipschitz = lipschitz_constant("lipschitz", lipschitz)

    def norms(self, n_layers: int) -> Sequence[OperatorNorm]:
        return [RowNorm(self.q), *(RowNorm(1) for _ in range(n_layers - 1))]


class LInfProjection(LInf):
    """As `LInf`, but by the Euclidean projection of rows instead of scaling; see `ProjectedRows`.

    A projection makes rows sparse: an entry that it has made zero gets no gradient until others shrink.

    Reference: Anil, Lucas and Grosse 2019, "Sorting out Lipschitz function approximation", section 4.2.
    """

    def norms(self, n_layers: int) -> Sequence[OperatorNorm]:
        return [ProjectedRows(self.q), *(ProjectedRows(1) for _ in range(n_layers - 1))]


class One(Spectral):
    """||W||_1 <= b for every layer, the largest 1-norm of a column: L-Lipschitz for the 1-norm.

    Several outputs share L: their changes add up to at most L times the 1-norm of the change of the input.
    """

    p = hidden_p = 1.0
    layer_norm = ColumnNorm


class Frobenius(Spectral):
    """||W||_F <= b for every layer, which is at least ||W||_2: L-Lipschitz for the 2-norm, with room to spare.

    A matrix of rank r and Frobenius norm 1 has a spectral norm of 1 only if r = 1, so deep networks lose most of
    their gradient.
    """

    layer_norm = FrobeniusNorm


class UnitRows(Spectral):
    """||W||_2 <= b for all layers but the last, whose rows have ||w||_2 <= b: each output is L-Lipschitz.

    L then bounds the 2-norm of the gradient of each output, not that of the Jacobian, so that several outputs do
    not share it. With one output this is `Spectral`.

    Reference: Singla, Singla and Feizi 2021, "Improved deterministic l2 robustness on CIFAR-10 and CIFAR-100"
    (arXiv 2108.04062), "last layer normalization".
    """

    output_p = math.inf

    def norms(self, n_layers: int) -> Sequence[OperatorNorm]:
        return [*super().norms(n_layers - 1), RowNorm(2)]
