"""The multipliers of `semidefinite` that give nearly the smallest bound: a primal-dual interior-point method.

Over the multipliers T and sigma = 1 / L^2, the matrix inequality of a network is linear,

    maximise sigma  such that  S(sigma, T) = E_0 - sigma E_out + sum_i T_i (u_i v_i^T + v_i u_i^T) >= 0,  T >= 0,

with E_out = C^T C and all else as in `lipexp.inequality`. Its dual is

    minimise tr(E_0 Z)  such that  tr(E_out Z) = 1,  2 u_i^T Z v_i + x_i = 0,  Z >= 0,  x >= 0.

Where scalars share a multiplier, sums over them take the place of what belongs to each T_i here.

Each step solves a linear system of P + 1 equations for Z S = mu I, T x = mu (the direction of Helmberg et al.
1996, with Mehrotra's corrector). As the matrix of each T_i has rank 2, the system costs a few products of matrices
of the size of S. Every iterate S is positive definite, so each is a bound, and the method may stop anywhere. It
proves nothing itself: what it returns is proven elsewhere.

Shapes: N variables, M scalars, P multipliers, C outputs.

References: Helmberg, Rendl, Vanderbei and Wolkowicz 1996, "An interior-point method for semidefinite programming";
Mehrotra 1992, "On the implementation of a primal-dual interior point method".
"""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lipexp.inequality import Array, Inequality

STEPS = 60  # 25 to 35 are usual
CLOSED = 1e-4  # the relative gap in sigma, twice that in L, at which it stops
TO_BOUNDARY = 0.95  # how much of the way to the boundary of the cone a step goes
STALLED = 1e-6  # a step this short changes nothing


class Forms(NamedTuple):
    """The values of a symmetric (N, N) matrix X on the vectors of the inequality."""

    uu: Tensor  # (M, M) u_i^T X u_j
    uv: Tensor
    vv: Tensor
    out_u: Tensor  # (C, M) of the outputs' weights and u_j
    out_v: Tensor
    out_out: Tensor  # (C, C)


class Block(NamedTuple):
    """The vectors of scalars that an activation changes together."""

    rows: Tensor  # (n, m) w_i ...
    on: slice  # ... on these variables
    own: slice  # e_i
    scalars: slice  # which of all M they are


class Matrices:
    """E_0, C^T C and u v^T + v u^T of one network, without storing them.

    The multipliers y[1:] are those of `inequality`, which scalars share.
    """

    def __init__(self, inequality: Inequality) -> None:
        self.n_inputs, self.size = inequality.n_inputs, inequality.size
        self.n_multipliers = inequality.n_multipliers
        blocks, alphas, betas = [], [torch.empty(0).double()], [torch.empty(0).double()]
        for rows, own, slopes, _, factor in inequality.scalars:
            scalars = slice(own.start - self.n_inputs, own.stop - self.n_inputs)
            blocks.append(Block(torch.from_numpy(rows.values), rows.on, own, scalars))
            for slope, of_all in zip(slopes, (alphas, betas), strict=True):
                of_all.append(torch.full((len(factor),), slope).double())
        self.blocks, self.alpha, self.beta = blocks, torch.cat(alphas), torch.cat(betas)
        self.has_corners = bool((self.alpha * self.beta != 0).any())
        self.out, self.last = torch.from_numpy(inequality.outputs.values), inequality.outputs.on
        self.multiplier = torch.from_numpy(np.concatenate([each.multiplier for each in inequality.scalars]))
        self.factor = torch.from_numpy(np.concatenate([each.factor for each in inequality.scalars]))
        self.shared = self.n_multipliers < len(self.multiplier)

    def combine(self, one: float, y: Tensor) -> Tensor:
        """one E_0 - y_0 C^T C + sum_i T_i (u_i v_i^T + v_i u_i^T), for y = (sigma, multipliers)."""
        t = y[1:][self.multiplier] * self.factor
        matrix = self.out.new_zeros(self.size, self.size)
        for rows, on, own, scalars in self.blocks:
            alpha, beta = self.alpha[scalars], self.beta[scalars]
            matrix[own, on] = -((alpha + beta) * t[scalars]).unsqueeze(1) * rows
            matrix[on, own] = matrix[own, on].T
            if self.has_corners:
                matrix[on, on] += rows.T @ ((2 * alpha * beta * t[scalars]).unsqueeze(1) * rows)
        diagonal = matrix.diagonal()
        diagonal[: self.n_inputs] += one
        diagonal[self.n_inputs :] += 2 * t
        matrix[self.last, self.last] -= y[0] * self.out.T @ self.out
        return matrix

    def forms(self, x: Tensor) -> Forms:
        """The values of x (N, N), symmetric."""
        n, alpha, beta = self.n_inputs, self.alpha, self.beta
        xw, ww = self._rows(x)
        e, ew = x[n:, n:], xw[n:]  # e_i^T x e_j, e_i^T x w_j
        we, above, below = ew.T, alpha.unsqueeze(1), beta.unsqueeze(1)
        last = self.out @ x[self.last]  # (C, N)
        last_w = self.out @ xw[self.last]
        return Forms(
            e - alpha * ew - above * we + above * alpha * ww,
            e - beta * ew - above * we + above * beta * ww,
            e - beta * ew - below * we + below * beta * ww,
            last[:, n:] - alpha * last_w,
            last[:, n:] - beta * last_w,
            last[:, self.last] @ self.out.T,
        )

    def traces(self, x: Tensor) -> Tensor:
        """(P + 1,) the traces of x (N, N), symmetric, with -C^T C and with what each multiplier multiplies."""
        diagonals = []
        for rows, on, own, scalars in self.blocks:
            alpha, beta = self.alpha[scalars], self.beta[scalars]
            ew = (x[own, on] * rows).sum(dim=1)
            uv = x.diagonal()[own] - (alpha + beta) * ew
            if self.has_corners:
                uv = uv + alpha * beta * ((rows @ x[on, on]) * rows).sum(dim=1)
            diagonals.append(uv)
        out = -((self.out @ x[self.last, self.last]) * self.out).sum().view(1)
        return torch.cat([out, self.gathered(2 * torch.cat(diagonals))])

    def gathered(self, values: Tensor) -> Tensor:
        """(..., P) the sums of `values` (..., M), times their factors, over the scalars of each multiplier."""
        if not self.shared:
            return values * self.factor
        out = values.new_zeros(*values.shape[:-1], self.n_multipliers)
        return out.index_add_(-1, self.multiplier, values * self.factor)

    def _rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x w_j (N, M), and w_i^T x w_j (M, M)."""
        xw = torch.cat([x[:, block.on] @ block.rows.T for block in self.blocks], dim=1)
        return xw, torch.cat([block.rows @ xw[block.on] for block in self.blocks])


def maximise(given: Inequality, start: Array, enough: float = math.inf, seconds: float = math.inf) -> Array | None:
    """The multipliers (P,) of nearly the largest sigma; None where S(0, T) is not positive definite at the start.

    Args:
        start: where to start, all positive.
        enough: stop at this sigma.
        seconds: stop after this time.
    """
    started, inequality, multipliers = time.perf_counter(), Matrices(given), torch.from_numpy(start)
    y = torch.cat([multipliers.new_zeros(1), multipliers])
    inverse = _inverse(inequality.combine(1, y))
    if inverse is None:
        return None
    y[0] = 0.1 / torch.linalg.matrix_norm(inequality.forms(inverse).out_out, ord=2)
    slack = inequality.combine(1, y)
    inverse = _inverse(slack)
    if inverse is None:
        return start
    # The dual matrix begins near the central path, ten times too large, which proved better than too small.
    z = inverse * (10 / -inequality.traces(inverse)[0])
    x = (z * slack).sum() / len(z) / y[1:]
    for _ in range(STEPS):
        gap = float((z * slack).sum() + x @ y[1:])
        late = time.perf_counter() - started > seconds
        if gap <= CLOSED * float(y[0]) or float(y[0]) >= enough or late:
            break
        stepped = _step(inequality, y, slack, inverse, z, x)
        if stepped is None:
            break
        y, slack, inverse, z, x = stepped
    return y[1:].numpy()


State = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # y = (sigma, T), S, its inverse, Z, x


def _step(inequality: Matrices, y: Tensor, slack: Tensor, inverse: Tensor, z: Tensor, x: Tensor) -> State | None:
    """One step; None if there is no way on."""
    target = torch.zeros_like(y)
    target[0] = -1
    traces = inequality.traces(inverse)
    scale, factor = _system(inequality, inverse, z, x / y[1:])
    if factor is None:
        return None

    def direction(mu: float, correction: Tensor | None, products: Tensor | None) -> tuple[Tensor, ...]:
        """dy, dS, dZ and dx towards Z S = mu I, with the second-order terms of an earlier direction."""
        wanted = mu - products if products is not None else torch.full_like(x, mu)
        right = mu * traces - target
        right[1:] += wanted / y[1:]
        if correction is not None:
            right = right - inequality.traces(correction)
        dy = scale * torch.cholesky_solve((scale * right).unsqueeze(1), factor).squeeze(1)
        d_slack = inequality.combine(0, dy)
        dz = mu * inverse - z - _symmetric(z @ d_slack @ inverse)
        if correction is not None:
            dz = dz - correction
        return dy, d_slack, dz, (wanted - x * dy[1:]) / y[1:] - x

    def lengths(dy: Tensor, d_slack: Tensor, dz: Tensor, dx: Tensor) -> tuple[float, float]:
        return min(_length(slack, d_slack), _ratio(y, dy)), min(_length(z, dz), _ratio(x, dx))

    mu = float((z * slack).sum() + x @ y[1:])
    dy, d_slack, dz, dx = direction(0.0, None, None)
    primal, dual = lengths(dy, d_slack, dz, dx)
    left = float(((z + dual * dz) * (slack + primal * d_slack)).sum() + (x + dual * dx) @ (y + primal * dy)[1:])
    centring = min(1.0, max(1e-6, (left / mu) ** 2))
    mu_next = centring * mu / (len(z) + len(x))
    dy, d_slack, dz, dx = direction(mu_next, _symmetric(dz @ d_slack @ inverse), dx * dy[1:])
    primal, dual = lengths(dy, d_slack, dz, dx)
    y = y + primal * dy
    slack = inequality.combine(1, y)
    next_inverse = _inverse(slack)
    if next_inverse is None or primal < STALLED or not torch.isfinite(y).all():
        return None
    return y, slack, next_inverse, z + dual * dz, x + dual * dx


def _system(inequality: Matrices, inverse: Tensor, z: Tensor, ratio: Tensor) -> tuple[Tensor, Tensor | None]:
    """A Cholesky factor of tr(B_i Z B_j S^-1), for the matrices B of y, and the scale that made its diagonal 1.

    Args:
        ratio: x / T, (P,).
    """
    p, d = inequality.forms(inverse), inequality.forms(z)
    system = z.new_empty(len(ratio) + 1, len(ratio) + 1)
    single = d.uv.T * p.uv + d.vv * p.uu + d.uu * p.vv + d.uv * p.uv.T  # of scalars, (M, M)
    system[1:, 1:] = inequality.gathered(inequality.gathered(single).T)
    system[1:, 1:].diagonal().add_(ratio)
    system[0, 1:] = system[1:, 0] = inequality.gathered(-(d.out_u * p.out_v + d.out_v * p.out_u).sum(dim=0))
    system[0, 0] = (d.out_out * p.out_out).sum()
    scale = system.diagonal().rsqrt()
    system = system * scale * scale.unsqueeze(1)
    system.diagonal().add_(1e-13)
    factor, failed = torch.linalg.cholesky_ex(system)
    return scale, None if failed else factor


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.T) / 2


def _inverse(matrix: Tensor) -> Tensor | None:
    """The inverse of a positive definite matrix; None for another."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    return None if failed else torch.cholesky_inverse(factor)


def _length(matrix: Tensor, step: Tensor) -> float:
    """At most 1: how far along `step` the positive definite `matrix` may go and stay so."""
    length = 1.0
    while length > STALLED:
        if not torch.linalg.cholesky_ex(matrix + length * step)[1]:
            return length if length == 1 else TO_BOUNDARY * length
        length *= 0.85
    return 0.0


def _ratio(values: Tensor, step: Tensor) -> float:
    """At most 1: how far along `step` the positive `values` may go and stay so."""
    falling = step < 0
    return min(1.0, TO_BOUNDARY * float((-values / step)[falling].min())) if falling.any() else 1.0
