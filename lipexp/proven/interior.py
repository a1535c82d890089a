"""The multipliers of `semidefinite` that give nearly the smallest bound: a primal-dual interior-point method.

Over the multipliers T and sigma = 1 / L^2, the matrix inequality of a network is linear,

    maximise sigma  such that  S(sigma, T) = E_0 - sigma E_out + sum_i T_i (u_i v_i^T + v_i u_i^T) >= 0,  T >= 0,

with E_0 the identity on the inputs, E_out = W_n^T W_n on the last features, u_i = e_i - alpha w_i and
v_i = e_i - beta w_i, where w_i is the row of weights of feature i, on the features before it. Its dual is

    minimise tr(E_0 Z)  such that  tr(E_out Z) = 1,  2 u_i^T Z v_i + x_i = 0,  Z >= 0,  x >= 0.

Each step solves a linear system of H + 1 equations for Z S = mu I, T x = mu (the direction of Helmberg et al.
1996, with Mehrotra's corrector). As the matrix of each T_i has rank 2, the system costs a few products of matrices
of the size of S. Every iterate S is positive definite, so each is a bound, and the method may stop anywhere. It
proves nothing itself: what it returns is proven elsewhere.

Shapes: N inputs and features together, H features, C outputs.

References: Helmberg, Rendl, Vanderbei and Wolkowicz 1996, "An interior-point method for semidefinite programming";
Mehrotra 1992, "On the implementation of a primal-dual interior point method".
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

STEPS = 60  # 25 to 35 are usual
CLOSED = 1e-3  # the relative gap in sigma, twice that in L, at which it stops
TO_BOUNDARY = 0.95  # how much of the way to the boundary of the cone a step goes
STALLED = 1e-6  # a step this short changes nothing


class Forms(NamedTuple):
    """The values of a symmetric (N, N) matrix X on the vectors of the inequality."""

    uu: Tensor  # (H, H) u_i^T X u_j
    uv: Tensor
    vv: Tensor
    out_u: Tensor  # (C, H) of the outputs' weights and u_j
    out_v: Tensor
    out_out: Tensor  # (C, C)


class Inequality:
    """The matrices E_0, E_out and u v^T + v u^T of one network, without storing them.

    Args:
        weights: (out, in) of each layer, float64.
        slopes: alpha and beta.
    """

    def __init__(self, weights: Sequence[Tensor], slopes: tuple[float, float]) -> None:
        *self.hidden, self.out = weights
        self.alpha, self.beta = slopes
        sizes = [weights[0].shape[1], *(weight.shape[0] for weight in self.hidden)]
        ends = torch.tensor(sizes).cumsum(0).tolist()
        self.blocks = [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]
        self.n_inputs, self.size = sizes[0], ends[-1]

    def combine(self, one: float, y: Tensor) -> Tensor:
        """one E_0 - y_0 E_out + sum_i y_i (u_i v_i^T + v_i u_i^T), for y = (sigma, T)."""
        matrix = self.out.new_zeros(self.size, self.size)
        matrix.diagonal()[: self.n_inputs] = one
        matrix.diagonal()[self.n_inputs :] = 2 * y[1:]
        multipliers = y[1:].split([len(weight) for weight in self.hidden])
        for weight, t, before, rows in zip(self.hidden, multipliers, self.blocks, self.blocks[1:], strict=False):
            scaled = t.unsqueeze(1) * weight
            matrix[rows, before] = -(self.alpha + self.beta) * scaled
            matrix[before, rows] = matrix[rows, before].T
            if self.alpha:
                matrix[before, before] += 2 * self.alpha * self.beta * weight.T @ scaled
        last = self.blocks[-1]
        matrix[last, last] -= y[0] * self.out.T @ self.out
        return matrix

    def forms(self, x: Tensor) -> Forms:
        """The values of x (N, N), symmetric."""
        alpha, beta, n = self.alpha, self.beta, self.n_inputs
        xw, ww = self._rows(x)
        e, we, ew = x[n:, n:], xw[n:].T, xw[n:]
        last = self.out @ x[self.blocks[-1]]  # (C, N)
        last_w = self.out @ xw[self.blocks[-1]]
        return Forms(
            e - alpha * (ew + we) + alpha**2 * ww,
            e - beta * ew - alpha * we + alpha * beta * ww,
            e - beta * (ew + we) + beta**2 * ww,
            last[:, n:] - alpha * last_w,
            last[:, n:] - beta * last_w,
            last[:, self.blocks[-1]] @ self.out.T,
        )

    def traces(self, x: Tensor) -> Tensor:
        """(H + 1,) the traces of x (N, N), symmetric, with -E_out and with each u v^T + v u^T."""
        ew, ww = self._rows(x)
        n, last = self.n_inputs, self.blocks[-1]
        uv = x.diagonal()[n:] - (self.alpha + self.beta) * ew[n:].diagonal()
        uv = uv + self.alpha * self.beta * ww.diagonal()
        return torch.cat([-((self.out @ x[last, last]) * self.out).sum().view(1), 2 * uv])

    def _rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x w_j (N, H), and w_i^T x w_j (H, H)."""
        right = [x[:, before] @ weight.T for weight, before in zip(self.hidden, self.blocks, strict=False)]
        if not right:
            return x[:, :0], x[:0, :0]
        xw = torch.cat(right, dim=1)
        return xw, torch.cat(
            [weight @ xw[before] for weight, before in zip(self.hidden, self.blocks, strict=False)]
        )


def maximise(
    inequality: Inequality, multipliers: Tensor, enough: float = math.inf, seconds: float = math.inf
) -> Tensor | None:
    """The multipliers (H,) of nearly the largest sigma; None where S(0, T) is not positive definite at the start.

    Args:
        multipliers: where to start, all positive.
        enough: stop at this sigma.
        seconds: stop after this time.
    """
    started = time.perf_counter()
    y = torch.cat([multipliers.new_zeros(1), multipliers])
    inverse = _inverse(inequality.combine(1, y))
    if inverse is None:
        return None
    y[0] = 0.1 / torch.linalg.matrix_norm(inequality.forms(inverse).out_out, ord=2)
    slack = inequality.combine(1, y)
    inverse = _inverse(slack)
    if inverse is None:
        return multipliers
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
    return y[1:]


State = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # y = (sigma, T), S, its inverse, Z, x


def _step(inequality: Inequality, y: Tensor, slack: Tensor, inverse: Tensor, z: Tensor, x: Tensor) -> State | None:
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


def _system(inequality: Inequality, inverse: Tensor, z: Tensor, ratio: Tensor) -> tuple[Tensor, Tensor | None]:
    """A Cholesky factor of tr(B_i Z B_j S^-1), for the matrices B of y, and the scale that made its diagonal 1.

    Args:
        ratio: x / T, (H,).
    """
    p, d = inequality.forms(inverse), inequality.forms(z)
    system = z.new_empty(len(ratio) + 1, len(ratio) + 1)
    system[1:, 1:] = d.uv.T * p.uv + d.vv * p.uu + d.uu * p.vv + d.uv * p.uv.T
    system[1:, 1:].diagonal().add_(ratio)
    system[0, 1:] = system[1:, 0] = -(d.out_u * p.out_v + d.out_v * p.out_u).sum(dim=0)
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
