"""Upper bounds for ReLU and leaky ReLU networks in the 2-norm, for any number of inputs, by semidefinite matrices.

For f(x) = w x_n + b with x_i = phi(W_i x_{i-1} + b_i), each difference of two points obeys, feature by feature,
dx_i (dz_i - dx_i) >= 0, as phi has slopes in [0, 1]. With multipliers T_i, diagonal and positive, the sum of these
products, times two, is added to |dx_0|^2 - |w dx_n|^2 / rho; what results is a quadratic form, and f is
sqrt(rho)-Lipschitz if its matrix is positive semidefinite:

        |  I        -W_1^T T_1                          |
        | -T_1 W_1   2 T_1      -W_2^T T_2              |
    M = |            ...         ...                    |
        |                       -T_n W_n   2 T_n   w^T  |
        |                                  w       rho  |

It is if all S_i = 2 T_i - T_i W_i S_{i-1}^-1 W_i^T T_i are positive definite, S_0 = I, and rho >= w S_n^-1 w^T.
Every choice of T_i is a bound; the methods differ in how they choose. Whatever they find in floating point, the
bound that is returned is proven: M, whose entries are exact, passes a Cholesky factorisation that allows for its
rounding errors.

The bounds hold everywhere, for differences of any two points. They do not cover q other than 2, and no activation
that falls (abs) or mixes features (GroupSort).

References: Fazlyab et al. 2019, "Efficient and accurate estimation of Lipschitz constants for deep neural
networks" (LipSDP-Neuron: its multipliers, one for each feature, are these); Xu and Sivaranjani 2024, "ECLipsE"
(the recursion, and the closed form ECLipsE-Fast).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lipexp.activations import Elementwise, is_piecewise_linear
from lipexp.certificates import is_semidefinite, root_up
from lipexp.models import Layer

Floats = npt.NDArray[np.float64]

STEPS = 100  # of the descent; on networks of 2 to 4 layers of 64 to 256 features more of them gain less than 1e-3


def refusal(layers: Sequence[Layer], act: nn.Module, q: float) -> str | None:
    """Why these bounds do not hold for a network; None if they do."""
    if q != 2:
        return "is for gradients in the 2-norm"
    if not (is_piecewise_linear(act) and isinstance(act, Elementwise) and 0 <= act.slope <= 1):
        return f"{type(act).__name__} has no slopes in [0, 1], feature by feature"
    if layers[-1].weight.shape[1] != 1:
        return "is for one output"
    return None


def eclipse(layers: Sequence[Layer]) -> float | None:
    """ECLipsE-Fast: T_i = I / ||W_i S_{i-1}^-1 W_i^T||_2, layer by layer.

    Args:
        layers: one baked network, K = 1; `refusal` must be None.

    Returns:
        L; None if rounding errors leave nothing proven.
    """
    weights = _weights(layers)
    multipliers = closed_form(weights)
    return None if multipliers is None else prove(weights, multipliers)


def lipsdp(layers: Sequence[Layer]) -> float | None:
    """The smallest w S_n^-1 w^T that L-BFGS finds over log T, from ECLipsE-Fast on.

    Iterates for which a factorisation fails are not feasible, and turned away by the line search.

    Args, returns: as `eclipse`.
    """
    weights = _weights(layers)
    start = closed_form(weights)
    if start is None:
        return None
    best, lowest = start, math.inf
    variables = [multiplier.log().requires_grad_() for multiplier in start]
    optimiser = torch.optim.LBFGS(variables, max_iter=STEPS, history_size=20, line_search_fn="strong_wolfe")

    def height() -> Tensor:
        nonlocal best, lowest
        multipliers = [variable.exp() for variable in variables]
        value = recursion(weights, multipliers)
        if value is None or not value.isfinite():
            for variable in variables:
                variable.grad = torch.zeros_like(variable)
            return torch.tensor(1e3, dtype=torch.float64)
        height = value.log()
        for variable, gradient in zip(variables, torch.autograd.grad(height, variables), strict=True):
            variable.grad = gradient
        if value.item() < lowest:
            best, lowest = [multiplier.detach() for multiplier in multipliers], value.item()
        return height

    optimiser.step(height)
    return prove(weights, best)


def closed_form(weights: Sequence[Tensor]) -> list[Tensor] | None:
    """The multipliers of ECLipsE-Fast, (H,) each; None for a network that some layer makes constant."""
    multipliers: list[Tensor] = []
    factor = None
    for weight in weights[:-1]:
        gram = _gram(weight, factor)
        largest = float(torch.linalg.eigvalsh(gram)[-1])
        if not 0 < largest < math.inf:
            return None
        multipliers.append(torch.full((len(weight),), 1 / largest, dtype=torch.float64))
        factor = _factor(gram, multipliers[-1])
        if factor is None:
            return None
    return multipliers


def recursion(weights: Sequence[Tensor], multipliers: Sequence[Tensor]) -> Tensor | None:
    """rho = w S_n^-1 w^T; None where some S_i is not positive definite."""
    factor = None
    for weight, multiplier in zip(weights[:-1], multipliers, strict=True):
        factor = _factor(_gram(weight, factor), multiplier)
        if factor is None:
            return None
    return _gram(weights[-1], factor)[0, 0]


def _gram(weight: Tensor, factor: Tensor | None) -> Tensor:
    """W S^-1 W^T for S = C C^T with the Cholesky factor C; None is the identity."""
    half = weight if factor is None else torch.linalg.solve_triangular(factor, weight.mT, upper=False).mT
    return half @ half.mT


def _factor(gram: Tensor, multiplier: Tensor) -> Tensor | None:
    """The Cholesky factor of S = 2 T - T G T; None if there is none."""
    factor, failed = torch.linalg.cholesky_ex(2 * multiplier.diag() - multiplier.unsqueeze(1) * gram * multiplier)
    return None if failed else factor


# Proof -----------------------------------------------------------------------------------------------------------


def prove(weights: Sequence[Tensor], multipliers: Sequence[Tensor]) -> float | None:
    """L = sqrt(rho), rounded up, for a rho for which M is proven; None if none near the one of the recursion is.

    Args:
        multipliers: rounded to 24 bits here, so that their products with float32 weights are exact in float64.
    """
    rounded = [_to_24_bits(multiplier.numpy()) for multiplier in multipliers]
    rho = recursion(weights, [torch.from_numpy(part) for part in rounded])
    if rho is None or not 0 < float(rho) < math.inf:
        return None
    excess = 1e-12
    while excess < 0.1:
        candidate = float(rho) * (1 + excess)
        if is_semidefinite(matrix([weight.numpy() for weight in weights], rounded, candidate)):
            return root_up(Fraction(candidate))
        excess *= 4
    return None


def matrix(weights: Sequence[Floats], multipliers: Sequence[Floats], rho: float) -> Floats:
    """M, exactly: weights are float32 numbers, multipliers have 24 bits."""
    sizes = [weights[0].shape[1], *(len(weight) for weight in weights)]
    ends = np.cumsum([0, *sizes])
    blocks = [slice(*pair) for pair in pairwise(ends.tolist())]
    m = np.zeros((ends[-1], ends[-1]))
    m[np.diag_indices(sizes[0])] = 1
    for i, (weight, multiplier) in enumerate(zip(weights[:-1], multipliers, strict=True)):
        before, own = blocks[i], blocks[i + 1]
        m[own, own] = np.diag(2 * multiplier)
        m[own, before] = -multiplier[:, None] * weight
        m[before, own] = m[own, before].T
    m[-1, blocks[-2]] = m[blocks[-2], -1] = weights[-1][0]
    m[-1, -1] = rho
    return m


def _to_24_bits(values: Floats) -> Floats:
    mantissa, exponent = np.frexp(values)
    return np.ldexp(np.round(np.ldexp(mantissa, 24)), exponent - 24)


def _weights(layers: Sequence[Layer]) -> list[Tensor]:
    return [layer.weight[0].double() for layer in layers]
