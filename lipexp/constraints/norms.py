"""The operator norms of single layers: how training keeps each, how baking does, and its proof.

Shapes: K runs, weights (K, out, in).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lipexp.blocks import Affine, Block
from lipexp.norms import UNIT_ROUNDOFF, is_semidefinite, operator_norm_bound, row_norm_bound, spectral_norm_bound

# A spectral norm is scaled to just below its bound before it is rounded to float32: rounding can raise it by some
# 1e-7, and rounding toward zero would not help, since smaller entries can make a larger spectral norm.
SPECTRAL_SHRINK = 1 - 2.0**-20


class OperatorNorm(ABC):
    """The norm of one layer: how training keeps it, how baking does, and its proof.

    | member                      | what it is                                                              |
    |-----------------------------|-------------------------------------------------------------------------|
    | `name`                      | what screens and layers.csv call it                                     |
    | `start(weight)`             | the state that `within_one` is handed at every step; None: it needs none|
    | `restore(weight)`           | brings free parameters (K, out, in) back, in place, before each step    |
    | `within_one(weight, state)` | free parameters (K, out, in) as matrices of norm at most 1, or nearly   |
    |                             | so, differentiably; it may update its state in place                    |
    | `scaled(weight, bound)`     | the float64 matrices (K, out, in) that training has arrived at, scaled  |
    |                             | to norm `bound` (K,) or just below                                      |
    | `rounded(weight)`           | float64 to float32 in the way that enlarges the norm least              |
    | `proven(weight)`            | an upper bound on the norm of one stored float32 matrix (out, in)       |
    """

    name = ""

    def start(self, weight: Tensor) -> Any:
        return None

    def restore(self, weight: Tensor) -> None:
        return None  # most norms take any parameters

    @abstractmethod
    def within_one(self, weight: Tensor, state: Any) -> Tensor: ...

    @abstractmethod
    def scaled(self, weight: Tensor, bound: Tensor) -> Tensor: ...

    def rounded(self, weight: Tensor) -> Tensor:
        return weight.float()

    @abstractmethod
    def proven(self, weight: Tensor) -> float: ...

    def bake(self, weight: Tensor, bound: Tensor) -> tuple[Tensor, list[float]]:
        """The float32 matrices for free parameters (K, out, in), and their proven norms, each within `bound` (K,).

        Raises:
            ArithmeticError: rounding alone breaks the bound, however much the matrix is shrunk.
        """
        weight = self.scaled(weight.double(), bound)
        baked, norms = self.rounded(weight), []
        for run in range(len(baked)):
            shrink = 1 - SPECTRAL_SHRINK
            while not (norm := self.proven(baked[run])) <= float(bound[run]):
                if shrink > 0.5:
                    raise ArithmeticError(f"no {self.name} within {float(bound[run])} could be proven")
                baked[run] = self.rounded(weight[run] * (1 - shrink))
                shrink *= 2
            norms.append(norm)
        return baked, norms


def proven_norm(norm: OperatorNorm, layer: Block, run: int) -> float:
    """A proven upper bound on the norm of one layer of one network.

    A residual layer is 1-Lipschitz in the 2-norm, for slopes in [0, 1], or nothing is proven of it: inf.
    """
    if isinstance(layer, Affine):
        return norm.proven(layer.weight[run])
    return 1.0 if is_contraction(layer.weight[run], layer.t[run, 0]) else math.inf


def is_contraction(weight: Tensor, t: Tensor) -> bool:
    """Whether 2 diag(1/t) - W^T W is proven positive semidefinite, for float32 numbers W (H, M) and t (M,) > 0.

    Each entry of W^T W is a sum of H products that are exact in float64, off by at most gamma_H times the sum of
    their sizes; `is_semidefinite` allows for twice the error that it is given.
    """
    matrix, rates = weight.double().numpy(), t.double().numpy()
    if not (np.isfinite(matrix).all() and np.isfinite(rates).all() and (rates > 0).all()):
        return False
    gram = matrix.T @ matrix
    error = (len(matrix) + 4) * UNIT_ROUNDOFF * (np.abs(matrix).T @ np.abs(matrix)) + 2.0**-1000
    diagonal = np.diag(np.nextafter(2 / rates, 0))
    return is_semidefinite(diagonal - gram, error + UNIT_ROUNDOFF * np.abs(diagonal - gram))


class AnyNorm(OperatorNorm):
    """The operator norm p -> h of a layer that is not bounded, or a bound on it; see `operator_norm_bound`."""

    def __init__(self, p: float, h: float) -> None:
        self.p, self.h = p, h
        self.name = SpectralNorm.name if p == h == 2 else f"norm {p:g} -> {h:g}"

    def within_one(self, weight: Tensor, state: None) -> Tensor:
        return weight

    def scaled(self, weight: Tensor, bound: Tensor) -> Tensor:
        return weight

    def proven(self, weight: Tensor) -> float:
        return operator_norm_bound(weight.numpy(), self.p, self.h)


class RowNorm(OperatorNorm):
    """The operator norm p -> inf, the largest ||row||_q with 1/p + 1/q = 1: longer rows are scaled to length 1."""

    def __init__(self, q: float) -> None:
        self.q = q
        self.name = {1.0: "row 1-norm", 2.0: "row 2-norm"}.get(q, "largest entry")

    def within_one(self, weight: Tensor, state: None) -> Tensor:
        return _ScaledRows.apply(weight, self.q)

    def scaled(self, weight: Tensor, bound: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(weight, ord=self.q, dim=-1, keepdim=True)
        rounding = 1 - (weight.shape[-1] + 8) * 2.0**-52  # of the sum, the quotient and the product
        return weight * (bound.view(-1, 1, 1) * rounding / length.clamp_min(1))

    def rounded(self, weight: Tensor) -> Tensor:
        return toward_zero(weight)

    def proven(self, weight: Tensor) -> float:
        return row_norm_bound(weight.numpy(), self.q)


class ColumnNorm(RowNorm):
    """The operator norm 1 -> 1, the largest ||column||_1: longer columns are scaled to length 1."""

    def __init__(self) -> None:
        super().__init__(1)
        self.name = "column 1-norm"

    def within_one(self, weight: Tensor, state: None) -> Tensor:
        return super().within_one(weight.mT, state).mT

    def scaled(self, weight: Tensor, bound: Tensor) -> Tensor:
        return super().scaled(weight.mT, bound).mT

    def proven(self, weight: Tensor) -> float:
        return super().proven(weight.T)


class FrobeniusNorm(RowNorm):
    """The Frobenius norm, at least the operator norm 2 -> 2: a longer matrix is scaled to length 1."""

    def __init__(self) -> None:
        super().__init__(2)
        self.name = "Frobenius norm"

    def within_one(self, weight: Tensor, state: None) -> Tensor:
        return super().within_one(weight.flatten(1).unsqueeze(1), state).view(weight.shape)

    def scaled(self, weight: Tensor, bound: Tensor) -> Tensor:
        return super().scaled(weight.flatten(1).unsqueeze(1), bound).view(weight.shape)

    def proven(self, weight: Tensor) -> float:
        return super().proven(weight.reshape(1, -1))


class ProjectedRows(RowNorm):
    """The operator norm p -> inf: longer rows are moved to the nearest row, in the 2-norm, of length ||.||_q = 1.

    For q = 1 every entry shrinks by the same amount, sign(w) max(0, |w| - t), so that small ones become zero; with
    s_k the sum of the k largest |w_i|, t = max(0, max_k (s_k - 1) / k). For q = inf entries are clamped to +- 1,
    and for q = 2 rows are scaled.

    Reference: Duchi, Shalev-Shwartz, Singer and Chandra 2008, "Efficient projections onto the l1-ball for learning
    in high dimensions", figure 1.
    """

    def within_one(self, weight: Tensor, state: None) -> Tensor:
        if self.q == 2:
            return super().within_one(weight, state)
        if self.q != 1:
            return weight.clamp(-1, 1)
        sizes = weight.abs()
        sums = sizes.sort(dim=-1, descending=True).values.cumsum(dim=-1)
        counts = torch.arange(1, weight.shape[-1] + 1, dtype=weight.dtype, device=weight.device)
        threshold = ((sums - 1) / counts).amax(dim=-1, keepdim=True).clamp_min(0)
        return weight.sgn() * (sizes - threshold).clamp_min(0)

    def scaled(self, weight: Tensor, bound: Tensor) -> Tensor:
        return super().scaled(self.within_one(weight, None), bound)


class SpectralNorm(OperatorNorm):
    """The operator norm 2 -> 2, the largest singular value, which is divided out.

    Training estimates it by one warm-started step of power iteration per optimiser step, so its weights may exceed
    the bound slightly. The baked matrix is divided by the singular value itself.
    """

    name = "spectral norm"

    def start(self, weight: Tensor) -> Tensor:
        """(K, 1, in) the leading right singular vectors, as rows: products with rows are the faster ones."""
        return torch.linalg.svd(weight.detach(), full_matrices=False).Vh[:, :1].contiguous()

    def within_one(self, weight: Tensor, state: Tensor) -> Tensor:
        return _DividedBySigma.apply(weight, state)

    def scaled(self, weight: Tensor, bound: Tensor) -> Tensor:
        sigma = torch.linalg.matrix_norm(weight, ord=2)
        scale = torch.where(sigma > 0, bound * SPECTRAL_SHRINK / sigma, 0)
        return weight * scale.view(-1, 1, 1)

    def proven(self, weight: Tensor) -> float:
        return spectral_norm_bound(weight.numpy())


class _ScaledRows(torch.autograd.Function):
    """w -> w s for each row w of (K, out, in), with s = 1 / max(1, ||w||_q).

    Backwards, a row that is scaled takes g to s (g - (g . s w) n) with n = d ||w|| / dw, which depends on the
    direction of w alone; a row that is not takes g to g. Autograd does the same in twice as many operations, and
    small operations cost mostly their start.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, q: float) -> Tensor:
        scale = _row_norm(weight, q).clamp_min_(1).reciprocal_()
        scaled = weight * scale
        ctx.save_for_backward(scaled, scale)
        ctx.q = q
        return scaled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0].contiguous()  # matrix products leave it transposed
        scaled, scale = ctx.saved_tensors
        along = (gradient * scaled).sum(dim=-1, keepdim=True).mul_(scale < 1)
        return torch.addcmul(gradient, along, _row_norm_gradient(scaled, ctx.q), value=-1).mul_(scale), None


def _row_norm(weight: Tensor, q: float) -> Tensor:
    """(K, out, 1) the ||.||_q of each row; torch's own vector_norm is ten times slower for q = 1 and inf."""
    if q == 2:
        return torch.linalg.vector_norm(weight, dim=-1, keepdim=True)
    sizes = weight.abs()
    return sizes.sum(dim=-1, keepdim=True) if q == 1 else sizes.amax(dim=-1, keepdim=True)


def _row_norm_gradient(unit: Tensor, q: float) -> Tensor:
    """d ||w||_q / dw at rows w (..., in) with ||w||_q = 1."""
    if q == 1:
        return unit.sgn()
    if q == 2:
        return unit
    sizes = unit.abs()
    largest = sizes == sizes.amax(dim=-1, keepdim=True)
    return unit.sgn() * largest / largest.sum(dim=-1, keepdim=True)


class _DividedBySigma(torch.autograd.Function):
    """W -> W / sigma for (K, out, in), with sigma = |u W| after one step of power iteration from `v` (K, 1, in).

    u = v W^T / |v W^T| (K, 1, out) and the new v = u W / sigma, which is written back, count as constants. Then
    sigma = u W v^T, d sigma / dW = u^T v, and backwards it is G -> (G - <G, W / sigma> u^T v) / sigma.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, v: Tensor) -> Tensor:
        u = torch.bmm(v, weight.mT)
        u = u.div_(_row_norm(u, 2))
        towards = torch.bmm(u, weight)
        sigma = _row_norm(towards, 2)  # (K, 1, 1)
        v.copy_(towards.div_(sigma))
        divided = weight / sigma
        ctx.save_for_backward(divided, u, towards, sigma)
        return divided

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0].contiguous()  # matrix products leave it transposed
        divided, u, v, sigma = ctx.saved_tensors
        along = (gradient * divided).sum(dim=(-2, -1), keepdim=True)
        return torch.addcmul(gradient, (along * u).mT, v, value=-1).div_(sigma), None


def spectral_norm_estimate(weight: Tensor, v: Tensor) -> Tensor:
    """(K, 1, 1) about the largest singular values, differentiable: |u W| after a step of power iteration from `v`.

    Args:
        v: (K, 1, in), see `SpectralNorm.start`; the new one is written back. It counts as a constant, as u does.
    """
    with torch.no_grad():
        u = torch.bmm(v, weight.mT)
        u = u / _row_norm(u, 2).clamp_min(torch.finfo(u.dtype).tiny)
        towards = torch.bmm(u, weight)
        v.copy_(towards / _row_norm(towards, 2).clamp_min(torch.finfo(u.dtype).tiny))
    return torch.bmm(torch.bmm(u, weight), v.mT)


def toward_zero(x: Tensor) -> Tensor:
    """float64 -> float32, rounded toward zero: no entry grows, so no row does."""
    nearest = x.float()
    smaller = torch.nextafter(nearest, torch.zeros_like(nearest))
    return torch.where(nearest.double().abs() > x.abs(), smaller, nearest)
