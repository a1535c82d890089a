"""The smallest L^2 that given multipliers allow, stage by stage, and multipliers in closed form: ECLipsE-Fast.

Let |x_0|^2 >= x^T P^-1 x be proven of the features x that a stage takes. With N = 1 / (2 T) for its multipliers,
r = (beta - alpha) / 2 and m = (alpha + beta) / 2, the same holds of the next features with

    P_next = M P M^T + M P R^T (N / r^2 - R P R^T)^-1 R P M^T + G N G^T,   M = F + m G R,

as long as N / r^2 - R P R^T is positive definite: with d = m R x + e the inequality of the stage bounds e^T N^-1 e
by r^2 x^T R^T N^-1 R x, and what is left of the bound of x and e behaves as the covariances of two independent
normal vectors. The sum is one of semidefinite matrices, so that nothing cancels. At the end L^2 is the largest
eigenvalue of W_n P W_n^T. As the matrix inequality of the network is positive semidefinite exactly where this
goes through, nothing is lost: its Cholesky factorisation, taken stage by stage, is this recursion.

Shapes: H features, M scalars of a stage.

Reference: Xu and Sivaranjani 2024, "ECLipsE: efficient compositional Lipschitz constant estimation for deep
neural networks" (arXiv 2404.04375), for slopes in [0, 1].
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lipexp.inequality import Array, Slopes
from lipexp.proven.semidefinite.stages import Stage, Stages

MARGIN = 2.0**-20  # by which N / r^2 stays away from R P R^T
ATTEMPTS = 40


class Maps(NamedTuple):
    """What a stage does, as tensors; see `stages`."""

    rows: Tensor  # (M, H) R
    kept: Tensor | None  # (H', H) F; None: 0
    changed: Tensor | None  # (H', M) G; None: I
    slopes: Slopes
    multiplier: Tensor  # (M,)
    factor: Tensor  # (M,)

    @classmethod
    def of(cls, stage: Stage, n_beside: int) -> Maps:
        """Those of a stage, with so many inputs of the network carried along behind the features."""
        first, second, third = stage.before(), stage.kept(), stage.changed()
        rows, kept, changed = first.values, second and second.values, third and third.values
        if kept is None and (n_beside or stage.back is not None):
            kept = np.zeros((stage.n_out, stage.n_in)) if stage.back is None else np.eye(stage.n_out)
        if kept is not None and n_beside:
            kept = np.pad(kept, ((0, n_beside), (0, n_beside)))
            kept[-n_beside:, -n_beside:] = np.eye(n_beside)
            changed = np.eye(stage.n_out) if changed is None else changed
            rows, changed = np.pad(rows, ((0, 0), (0, n_beside))), np.pad(changed, ((0, n_beside), (0, 0)))
        split = stage.split
        slopes, index, factor = (0.0, 0.0), np.arange(0), np.zeros(0)
        if split is not None:
            slopes, index, factor = split.slopes, split.multiplier, split.factor
        f, g = (None if part is None else torch.from_numpy(part) for part in (kept, changed))
        return cls(torch.from_numpy(rows), f, g, slopes, torch.from_numpy(index), torch.from_numpy(factor))

    @property
    def n_multipliers(self) -> int:
        return int(self.multiplier.max()) + 1 if len(self.multiplier) else 0

    def next(self, p: Tensor, noise: Tensor) -> tuple[Tensor, Tensor] | None:
        """P_next, and log det(I - r^2 N^-1 R P R^T); None where the multipliers are not feasible.

        Args:
            noise: (M,) N.
        """
        middle, half = sum(self.slopes) / 2, (self.slopes[1] - self.slopes[0]) / 2
        rp = self.rows @ p
        bound = noise / half**2 if half else noise
        factor, failed = torch.linalg.cholesky_ex(torch.diag(bound) - _symmetric(rp @ self.rows.T))
        if failed:
            return None
        room = 2 * factor.diagonal().log().sum() - bound.log().sum()
        found = torch.diag(noise) if self.changed is None else (self.changed * noise) @ self.changed.T
        if self.kept is not None or middle:
            through = self.rows if self.changed is None else self.changed @ self.rows
            through = middle * through if self.kept is None else self.kept + middle * through
            part = torch.linalg.solve_triangular(factor, rp @ through.T, upper=False)
            found = found + through @ p @ through.T + part.T @ part
        return _symmetric(found), room


def closed(stages: Stages) -> tuple[Stages, Array, Array]:
    """The stages in units in which P is near 1, for them multipliers in closed form, and W_n P W_n^T (C, C).

    They minimise the largest eigenvalue of P_next over a single number a stage. With s the largest eigenvalue of
    W P W^T that is N = max(|alpha|, |beta|) (beta - alpha) s / 2 feature by feature, after which P_next is at most
    max(alpha^2, beta^2) s: ECLipsE-Fast where alpha = 0, and the product of norms where alpha = -beta. For sorting
    and reflecting it is N = s / factor, with P_next <= s. For a residual layer it is N = p / (2 t), with p the
    largest eigenvalue of P, and P_next <= p where the norm of the layer is at most 1 by `blocks.Residual`.
    """
    hidden, found, exponent, n_beside = [], [np.zeros(0)], 0, stages.n_beside
    p = torch.eye(stages.n_inputs, dtype=torch.float64)
    p = p.tile(2, 2) if n_beside else p  # a linear term needs x_0 beside the features
    for stage in stages.hidden:
        features = p[: stage.n_in, : stage.n_in].numpy()
        moved = _exponent(stage.weight, features)
        stage, exponent = stage.scaled(moved), exponent + (moved if stage.back is None else 0)
        maps, noise = Maps.of(stage, n_beside), torch.from_numpy(_noise(stage, features))
        for _ in range(ATTEMPTS):
            if (next_p := maps.next(p, noise)) is not None:
                break
            noise = 1.25 * noise
        else:
            raise np.linalg.LinAlgError("no multipliers were found to start from")
        p, multipliers = next_p[0], np.zeros(maps.n_multipliers)
        multipliers[maps.multiplier.numpy()] = (0.5 / (noise * maps.factor)).numpy()
        hidden.append(stage)
        found.append(multipliers)
    exponent += (moved := _exponent(stages.last, p[: stages.last.shape[1], : stages.last.shape[1]].numpy()))
    if stages.linear is not None and abs(exponent) > 700:
        raise ArithmeticError("the linear term and the layers differ too much in size")
    linear = None if stages.linear is None else np.ldexp(stages.linear, -exponent)
    scaled = Stages(hidden, np.ldexp(stages.last, -moved), linear, exponent)
    out = scaled.last if linear is None else np.concatenate([scaled.last, linear], axis=1)
    return scaled, np.concatenate(found), out @ p.numpy() @ out.T


def _exponent(weight: Array, p: Array) -> int:
    """That of the root of the largest eigenvalue of W P W^T, roughly, for a P near 1 and a W of any size."""
    unit = math.frexp(float(np.abs(weight).max(initial=0.0)))[1]
    small = np.ldexp(weight, -unit)
    size = float(np.linalg.norm(small @ p @ small.T))
    return unit + (math.frexp(size)[1] // 2 if size > 0 else 0)


def _noise(stage: Stage, p: Array) -> Array:
    """N (M,) of a stage."""
    split = stage.split
    if split is None or not stage.n_scalars:
        return np.zeros(0)
    alpha, beta = split.slopes
    steepest, half = max(abs(alpha), abs(beta)), (beta - alpha) / 2
    shape = 1 / split.factor
    if stage.back is None:
        alone = split.features is not None and steepest > half * (
            1 + 2.0**-10
        )  # N / r^2 stays away from R P R^T by itself
        largest = steepest * half * _largest(stage.weight @ p @ stage.weight.T) or 1.0
        return shape * largest if alone else shape * largest * (1 + MARGIN)
    # What W^T diag(t) is over W^T in the unit of the stage.
    sizes = np.linalg.norm(stage.weight, axis=1)
    t = np.divide(np.linalg.norm(stage.back, axis=0), sizes, out=np.ones_like(sizes), where=sizes > 0)
    shape = 1 / t[split.features] if split.features is not None else shape / t[sizes > 0].mean()
    rows = stage.before().values / np.sqrt(shape)[:, None]
    wanted, least = steepest * half * _largest(p), half**2 * _largest(rows @ p @ rows.T)
    return shape * (wanted if wanted >= least else 2 * least) * (1 + MARGIN)


def _largest(gram: Array) -> float:
    """The largest eigenvalue of a positive semidefinite matrix, or 0."""
    return max(0.0, float(np.linalg.eigvalsh(gram)[-1]))


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.mT) / 2
