"""Constraints with matrices whose singular values are all 1, or nearly: they keep the norm of a gradient.

A matrix W with out >= in has orthonormal columns, one with out < in orthonormal rows. What is said of W below is
for out >= in; otherwise it is done to its transpose.

Shapes: K runs, weights (K, out, in).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lipexp.config import one_of, whole
from lipexp.constraints.chains import Spectral
from lipexp.constraints.norms import SPECTRAL_SHRINK, OperatorNorm, SpectralNorm


class Contraction(SpectralNorm):
    """A differentiable map to matrices of spectral norm 1 at most, which is the same in training and in baking."""

    def start(self, weight: Tensor) -> Any:
        return None

    def within_one(self, weight: Tensor, state: Any) -> Tensor:
        return self.tall(weight) if weight.shape[1] >= weight.shape[2] else self.tall(weight.mT).mT

    @abstractmethod
    def tall(self, weight: Tensor) -> Tensor:
        """The map for (K, out, in) with out >= in."""

    def scaled(self, weight: Tensor, bound: Tensor) -> Tensor:
        # For very large parameters rounding errors may leave a matrix of a larger norm, or none at all.
        mapped = self.within_one(weight, None).nan_to_num(nan=0, posinf=0, neginf=0)
        largest = torch.linalg.matrix_norm(mapped, ord=2).clamp_min(1)
        return mapped * (bound * SPECTRAL_SHRINK / largest).view(-1, 1, 1)


class PolarFactor(SpectralNorm):
    """The polar factor Q of W = Q P, the orthogonal matrix that is nearest to W, by a fixed number of iterations.

    | method          | iteration, with G = W^T W        | matrix products | order of convergence |
    |-----------------|----------------------------------|-----------------|----------------------|
    | `bjorck`        | W <- W (3 I - G) / 2             | 2               | 2                    |
    | `newton_schulz` | W <- W (15 I - 10 G + 3 G^2) / 8 | 3               | 3                    |

    W is divided by a bound on its spectral norm first, where that exceeds 1; both iterations then bring all
    singular values up to 1. Training writes the result back into the free parameters. So each step starts from a
    matrix that was orthogonal before the last step of the optimiser, a few iterations suffice, and what they leave
    is made up for in later steps. At W = Q the derivative of the polar factor is the projection onto the tangent
    space of orthogonal matrices, G -> G - Q (Q^T G + G^T Q) / 2, which needs no iteration. Until the iterations
    have converged singular values are below 1, never above. The baked matrix is the polar factor itself, by a
    singular value decomposition.

    References: Björck and Bowie 1971, "An iterative algorithm for computing the best estimate of an orthogonal
    matrix"; Anil, Lucas and Grosse 2019, section 4.1; Higham 2008, "Functions of matrices", chapter 8.
    """

    def __init__(self, method: str, iterations: int) -> None:
        self.iterate = METHODS[method]
        self.iterations = iterations

    def start(self, weight: Tensor) -> Any:
        return None

    def restore(self, weight: Tensor) -> None:
        weight = weight.detach()
        is_tall = weight.shape[1] >= weight.shape[2]
        weight.copy_(self._towards(weight) if is_tall else self._towards(weight.mT).mT)

    def within_one(self, weight: Tensor, state: Any) -> Tensor:
        return _Tangent.apply(weight)

    def _towards(self, weight: Tensor) -> Tensor:
        """`weight` (K, out, in), out >= in, after the iterations."""
        if weight.shape[2] == 1:  # the polar factor of a vector needs no iterations
            return torch.nn.functional.normalize(weight, dim=1)
        gram = weight.mT @ weight
        fourth = gram @ gram
        fourth = fourth @ fourth
        # (sum of sigma^16)^(1/16) is at least the largest singular value, and for many equal ones hardly more.
        largest = torch.linalg.matrix_norm(fourth, keepdim=True) ** 0.125
        scale = largest.clamp_min(1)
        weight = self.iterate(weight / scale, gram / scale.square())
        for _ in range(self.iterations - 1):
            weight = self.iterate(weight, weight.mT @ weight)
        return weight

    def scaled(self, weight: Tensor, bound: Tensor) -> Tensor:
        u, _, vh = torch.linalg.svd(weight, full_matrices=False)
        return u @ vh * (bound * SPECTRAL_SHRINK).view(-1, 1, 1)


def _bjorck(weight: Tensor, gram: Tensor) -> Tensor:
    return torch.baddbmm(weight, weight, gram, beta=1.5, alpha=-0.5)


def _newton_schulz(weight: Tensor, gram: Tensor) -> Tensor:
    return torch.baddbmm(weight, weight, torch.baddbmm(gram, gram, gram, beta=-1.25, alpha=0.375), beta=1.875)


METHODS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"newton_schulz": _newton_schulz, "bjorck": _bjorck}


class _Tangent(torch.autograd.Function):
    """Q -> Q for (K, out, in) with orthonormal columns or rows; backwards onto the tangent space at Q."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        q = weight.clone()
        ctx.save_for_backward(q)
        return q

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].contiguous()  # matrix products leave it transposed
        (q,) = ctx.saved_tensors
        if q.shape[1] >= q.shape[2]:
            product = torch.bmm(q.mT, gradient)
            return torch.baddbmm(gradient, q, product + product.mT, alpha=-0.5)
        product = torch.bmm(gradient, q.mT)
        return torch.baddbmm(gradient, product + product.mT, q, alpha=-0.5)


class CayleyTransform(Contraction):
    """[2 X - I; -2 V X] of W = [U; V], U square, with X = (I + U - U^T + V^T V)^-1: its columns are orthonormal.

    For square W that is the Cayley transform (I - A) (I + A)^-1 of the skew-symmetric A = U - U^T.
    """

    def tall(self, weight: Tensor) -> Tensor:
        n = weight.shape[2]
        u, v = weight[:, :n], weight[:, n:]
        identity = torch.eye(n, dtype=weight.dtype, device=weight.device)
        # Without an error for a matrix that cannot be inverted, which is the fault of one run alone.
        x = torch.linalg.inv_ex(identity + (u - u.mT) + v.mT @ v).inverse
        return torch.cat([2 * x - identity, -2 * v @ x], dim=1)


class QRFactor(Contraction):
    """The factor Q of W = Q R, with signs such that the diagonal of R is positive."""

    def tall(self, weight: Tensor) -> Tensor:
        q, r = torch.linalg.qr(weight)
        signs = r.diagonal(dim1=1, dim2=2).sgn()
        return q * torch.where(signs == 0, 1.0, signs).unsqueeze(1)


class Exponential(Contraction):
    """The first columns of exp(A), with the skew-symmetric A = [U - U^T, -V^T; V, 0] of W = [U; V], U square."""

    def tall(self, weight: Tensor) -> Tensor:
        n_out, n = weight.shape[1:]
        padded = torch.nn.functional.pad(weight, (0, n_out - n))
        return torch.linalg.matrix_exp(padded - padded.mT)[:, :, :n]


class AlmostOrthogonal(Contraction):
    """W diag(d)^-1/2 with d_i = sum_j |W^T W|_ij, whose spectral norm is at most 1.

    diag(d) - W^T W is diagonally dominant, hence positive semidefinite. Columns that are orthogonal are scaled to
    length 1, and then the result is orthogonal.
    """

    def tall(self, weight: Tensor) -> Tensor:
        sums = (weight.mT @ weight).abs().sum(dim=1, keepdim=True)
        return weight * sums.clamp_min(torch.finfo(weight.dtype).tiny).rsqrt()


class Orthogonal(Spectral):
    """Every layer is b times an orthogonal matrix, by iteration: L-Lipschitz for the 2-norm; see `PolarFactor`.

    Args:
        method: `newton_schulz` or `bjorck`.
        iterations: per optimiser step.
        lipschitz: L.
    """

    def __init__(self, method: str = "newton_schulz", iterations: int = 4, lipschitz: float = 1.0) -> None:
        super().__init__(lipschitz)
        self.method = one_of("method", method, list(METHODS))
        self.iterations = whole("iterations", iterations, least=1)

    def layer_norm(self) -> OperatorNorm:
        return PolarFactor(self.method, self.iterations)


class Cayley(Spectral):
    """Every layer is b times an orthogonal matrix, by the Cayley transform: L-Lipschitz for the 2-norm.

    References: Helfrich, Willmott and Ye 2018, "Orthogonal recurrent neural networks with scaled Cayley transform"
    (arXiv 1707.09520); Trockman and Kolter 2021, "Orthogonalizing convolutional layers with the Cayley transform"
    (arXiv 2104.07167), and Wang and Manchester 2023 (arXiv 2301.11526) for matrices that are not square.
    """

    layer_norm = CayleyTransform


class QR(Spectral):
    """Every layer is b times an orthogonal matrix, by a QR decomposition: L-Lipschitz for the 2-norm.

    Its Householder reflections are what products of reflections are made of.

    Reference: Golub and Van Loan 2013, "Matrix computations", section 5.2.
    """

    layer_norm = QRFactor


class MatrixExp(Spectral):
    """Every layer is b times an orthogonal matrix, by the matrix exponential: L-Lipschitz for the 2-norm.

    Reference: Lezcano-Casado and Martínez-Rubio 2019, "Cheap orthogonal constraints in neural networks" (arXiv
    1901.08428).
    """

    layer_norm = Exponential


class AOL(Spectral):
    """Every layer is b times an almost orthogonal matrix: L-Lipschitz for the 2-norm; see `AlmostOrthogonal`.

    Reference: Prach and Lampert 2022, "Almost-orthogonal layers for efficient general-purpose Lipschitz networks"
    (arXiv 2208.03160), theorem 1, here for rows as well as for columns, whichever are fewer.
    """

    layer_norm = AlmostOrthogonal
