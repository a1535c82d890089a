"""Constraints: which operator norm bounds each layer, in training and in the baked network.

f is L-Lipschitz for the input norm p iff ||grad f||_q <= L almost everywhere, with 1/p + 1/q = 1. A chain of
operator norms proves it: p -> h for the first layer, h -> h for every later one, times activations that are
1-Lipschitz in the norm h of the hidden space. Several outputs are measured in h as well: L bounds the norm p -> h
of the Jacobian, for h = 2 its singular values, for h = inf the q-norm of each row, for h = 1 the 1-norm of each
column. Under `UnitRows` outputs are measured as for h = inf.

| constraint                | layer 1         | layers i > 1    | p   | q   | h   |
|---------------------------|-----------------|-----------------|-----|-----|-----|
| Unconstrained             | -               | -               | 2   | 2   | 2   |
| Spectral, Orthogonal, AOL | ||W||_2 <= b    | ||W||_2 <= b    | 2   | 2   | 2   |
| Frobenius                 | ||W||_F <= b    | ||W||_F <= b    | 2   | 2   | 2   |
| UnitRows                  | ||W||_2 <= b    | the last: ||w|| | 2   | 2   | 2   |
| LInf, p = 2               | rows ||w||_2    | rows ||w||_1    | 2   | 2   | inf |
| LInf, p = inf             | rows ||w||_1    | rows ||w||_1    | inf | 1   | inf |
| LInf, p = 1               | entries |w|     | rows ||w||_1    | 1   | inf | inf |
| One                       | columns ||w||_1 | columns ||w||_1 | 1   | inf | 1   |
| SLL, CPL                  | ||W||_2 <= b    | residual blocks | 2   | 2   | 2   |
| Sandwich                  | the network as a whole, by a matrix inequality          | 2   | 2   | 2   |
| GradientPenalty, GloRo    | -               | -               | 2   | 2   | 2   |

The budget L is split evenly, b = L^(1/n) for n weight matrices. Training works on free parameters: `apply` maps
them to weights within the bound, once per step. `bake` makes the network that is reported, whose stored float32
numbers are proven to obey the bound with no tolerance.

To add one: a class derived from `Constraint`, an `OperatorNorm` for it if none here serves, and one file in
conf/constraint/.
"""

from lipexp.constraints.base import Constraint
from lipexp.constraints.chains import Frobenius, LInf, LInfProjection, One, Spectral, Unconstrained, UnitRows
from lipexp.constraints.norms import OperatorNorm, RowNorm, SpectralNorm, toward_zero
from lipexp.constraints.orthogonal import AOL, QR, Cayley, MatrixExp, Orthogonal
from lipexp.constraints.residual import CPL, SLL
from lipexp.constraints.sandwich import Sandwich
from lipexp.constraints.soft import GloRo, GradientPenalty

__all__ = [
    "AOL",
    "CPL",
    "QR",
    "SLL",
    "Cayley",
    "Constraint",
    "Frobenius",
    "GloRo",
    "GradientPenalty",
    "LInf",
    "LInfProjection",
    "MatrixExp",
    "One",
    "OperatorNorm",
    "Orthogonal",
    "RowNorm",
    "Sandwich",
    "Spectral",
    "SpectralNorm",
    "Unconstrained",
    "UnitRows",
    "toward_zero",
]
