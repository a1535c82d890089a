"""exp, log and the normal distribution in float64, with proven bounds on their errors.

Nothing is known for certain about the last bits of a library's own functions. These use +, -, *, / and rounding
to whole numbers alone, which IEEE 754 rounds correctly, so that their errors follow from the sums themselves. They
are slower, and proofs alone use them. u is the unit roundoff 2^-53; inputs are float64 tensors of any shape.

Reference: Muller 2016, "Elementary Functions: Algorithms and Implementation", chapter 11 (reduction of the
argument by a logarithm of two in two parts).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# ln 2 = _LN2 + _LN2_REST, of which the first is a multiple of 2^-32: its products with whole numbers below 2^20
# are exact.
_LN2, _LN2_REST = 0.6931471803691238, 1.9082149292705877e-10
_SMALLEST = -700.0  # below it exp is taken to be exp(-700)
_POWERS = torch.tensor([2.0**-k for k in range(1012)], dtype=torch.float64)
_EXP_TERMS, _LOG_TERMS, _NORMAL_TERMS = 14, 18, 150
FARTHEST = 8.0  # the normal distribution holds less than 2^-50 beyond it


def exp(x: Tensor) -> Tensor:
    """exp(x) for x <= 0, off by a factor of at most 1 +- 2^-48, and by less than 2^-1009 below -700.

    x = r - k ln 2 with a whole number k and |r| <= 0.35. r is off by less than 3 u. The Taylor sum of degree 13
    leaves out less than u / 16, and Horner's scheme adds 4 u.
    """
    x = x.clamp(_SMALLEST, 0)
    k = (x * (-1 / math.log(2))).round()
    r = (x + k * _LN2) + k * _LN2_REST
    total = torch.ones_like(r)
    for n in range(_EXP_TERMS - 1, 0, -1):
        total = 1 + r * total / n
    return total * _POWERS[k.nan_to_num().long()]


def log_of_one_plus(y: Tensor) -> Tensor:
    """log(1 + y) for 0 <= y <= 1, off by a factor of at most 1 +- 2^-48.

    2 (t + t^3 / 3 + t^5 / 5 + ...) with t = y / (2 + y) <= 1/3, of which less than u / 8 is left out.
    """
    t = y / (2 + y)
    square, total = t * t, torch.zeros_like(t)
    for n in range(_LOG_TERMS - 1, -1, -1):
        total = total * square + 1 / (2 * n + 1)
    return 2 * t * total


def logistic(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)), off by a factor of at most 1 +- 2^-46."""
    tail = exp(-x.abs())
    return torch.where(x >= 0, 1.0, tail) / (1 + tail)


def normal(x: Tensor) -> tuple[Tensor, Tensor]:
    """The distribution function of the standard normal distribution and its density, each off by at most 2^-44.

    With d the density, the distribution function is 1/2 + d(x) (x + x^3 / 3 + x^5 / 15 + ...), n-th term x^(2n +
    1) / (1 3 5 ... (2n + 1)). All terms have the sign of x. Once each is less than half of the one before it, and
    the last one less than u / 128 of their sum, what is left out is less than u / 64; for |x| <= 8 that is so
    after 150 terms at most. The n-th is off by a factor of 1 +- 3 n u, adding them up by 1 +- 150 u, and the
    density by 1 +- 80 u, since its argument is up to 32 and rounded once. Beyond 8 both are taken to be those at
    8.
    """
    x = x.clamp(-FARTHEST, FARTHEST)
    square = x * x
    density = exp(-square / 2) * (1 / math.sqrt(2 * math.pi))
    term = total = x
    for n in range(1, _NORMAL_TERMS):
        term = term * square / (2 * n + 1)
        total = total + term
        if n % 8 == 0 and bool(((2 * square <= 2 * n + 3) & (term.abs() <= 2.0**-60 * total.abs())).all()):
            break
    return 0.5 + density * total, density
