"""Multipliers in closed form: ECLipsE-Fast, for any slopes, for sorting and for residual layers.

Let |x_0|^2 >= x^T P^-1 x be proven of the features x that a stage takes. With N = 1 / (2 T) for its multipliers,
r = (beta - alpha) / 2 and m = (alpha + beta) / 2, the same holds of the next features with

    P_next = (F + m G R) P' (F + m G R)^T + G N G^T,   P' = P + P R^T (N / r^2 - R P R^T)^-1 R P,

as long as N / r^2 - R P R^T is positive definite: the scalars d = m R x + e are bounded by e^T N^-1 e less
x^T R^T (N / r^2)^-1 R x, and P is to a quadratic form what a covariance is to a normal density. The sums are of
semidefinite matrices, so that nothing cancels. At the end L^2 is the largest eigenvalue of W_n P W_n^T.

N is chosen for the smallest largest eigenvalue of P_next that a single number a stage can reach, with s the largest
eigenvalue of W P W^T: N = max(|alpha|, |beta|) (beta - alpha) s / 2 feature by feature, after which P_next <=
max(alpha^2, beta^2) s; that is ECLipsE-Fast where alpha = 0, and the product of norms where alpha = -beta. N = s, in
units of 1 / factor, for sorting and reflecting, where P_next <= s. N = p / (2 t), with p the largest eigenvalue of P,
for a residual layer, which proves P_next <= p wherever the norm of the layer is at most 1 (see `blocks.Residual`).

References: Xu and Sivaranjani 2024, "ECLipsE: efficient compositional Lipschitz constant estimation for deep neural
networks" (arXiv 2404.04375), for slopes in [0, 1].
"""

from __future__ import annotations

import math

import numpy as np
import torch

from lipexp.inequality import Array
from lipexp.proven.semidefinite.stages import Stage, Stages

MARGIN = 2.0**-20  # by which N / r^2 stays away from the boundary of what is allowed
ATTEMPTS = 40


def closed(stages: Stages) -> tuple[Stages, Array, float]:
    """The stages in units in which P is near 1, multipliers for them, and the L that these allow up to rounding."""
    hidden, found, exponent = [], [], 0
    x0 = 0 if stages.linear is None else stages.n_inputs  # a linear term needs x_0 beside the features
    p = np.eye(stages.n_inputs + x0) if not x0 else np.tile(np.eye(x0), (2, 2))
    for stage in stages.hidden:
        n_in = len(p) - x0
        stage, moved = _in_unit(stage, p[:n_in, :n_in])
        exponent += moved
        p, multipliers = _through(stage, p, x0)
        hidden.append(stage)
        found.append(multipliers)
    moved = _exponent(stages.last, p[: len(p) - x0, : len(p) - x0])
    last, linear, exponent = np.ldexp(stages.last, -moved), None, exponent + moved
    out = last
    if stages.linear is not None:
        linear = np.ldexp(stages.linear, -exponent)
        out = np.concatenate([last, linear], axis=1)
    scaled = Stages(hidden, last, linear, exponent)
    return scaled, np.concatenate([np.zeros(0), *found]), math.sqrt(_largest(out @ p @ out.T))


def _in_unit(stage: Stage, p: Array) -> tuple[Stage, int]:
    """The stage in a unit in which W P W^T is near 1, and by how much that moves the unit of later features."""
    exponent = _exponent(stage.weight, p)
    return stage.scaled(exponent), exponent if stage.back is None else 0


def _exponent(weight: Array, p: Array) -> int:
    """Half the exponent of the largest eigenvalue of W P W^T, for a P near 1 and a W of any size."""
    unit = math.frexp(float(np.abs(weight).max(initial=0.0)))[1]
    small = np.ldexp(weight, -unit)
    size = _largest(small @ p @ small.T)
    return unit + (math.frexp(size)[1] // 2 if size > 0 else 0)


def _through(stage: Stage, p: Array, x0: int) -> tuple[Array, Array]:
    """P_next and the multipliers of a stage, with x_0 carried along behind the features."""
    rows, changed = stage.before().values, stage.changed().values
    kept = stage.kept()
    through = np.zeros((stage.n_out, len(p) - x0)) if kept is None else kept.values
    if x0:
        rows = np.pad(rows, ((0, 0), (0, x0)))
        changed = np.pad(changed, ((0, x0), (0, 0)))
        through = np.pad(through, ((0, x0), (0, x0)))
        through[-x0:, -x0:] = np.eye(x0)
    if stage.split is None or not stage.n_scalars:
        return _symmetric(through @ p @ through.T), np.zeros(0)
    alpha, beta = stage.split.slopes
    m, r = (alpha + beta) / 2, (beta - alpha) / 2
    noise = _noise(stage, p[: len(p) - x0, : len(p) - x0])
    rp = rows @ p
    inside = _symmetric(rp @ rows.T)
    if through.any() or m:
        for _ in range(ATTEMPTS):
            try:
                factor = np.linalg.cholesky(np.diag(noise / r**2) - inside)
                break
            except np.linalg.LinAlgError:
                noise = noise * 1.25
        else:
            raise np.linalg.LinAlgError("no multipliers were found to start from")
        half = solved(factor, rp)
        through = through + m * changed @ rows
        p = through @ (p + half.T @ half) @ through.T
    else:
        p = np.zeros_like(through @ through.T)
    t = 1 / (2 * noise * stage.split.factor)
    multipliers = np.zeros(int(stage.split.multiplier.max()) + 1)
    multipliers[stage.split.multiplier] = t
    return _symmetric(p + (changed * noise) @ changed.T), multipliers


def _noise(stage: Stage, p: Array) -> Array:
    """N (M,) of a stage."""
    assert stage.split is not None
    alpha, beta = stage.split.slopes
    shape, unit = 1 / stage.split.factor, max(abs(alpha), abs(beta)) * (beta - alpha) / 2
    if stage.back is None:
        weight = stage.weight
        largest = _largest(weight @ p @ weight.T) or 1.0
        least = 0.0
    else:
        # W^T diag(t) of the layer over W^T, entry by entry the same in a row, and in the unit of the stage.
        chosen = stage.split.a.argmax(axis=1) if stage.split.by_feature else np.arange(len(stage.weight))
        sizes = np.linalg.norm(stage.weight, axis=1)
        t = np.divide(np.linalg.norm(stage.back, axis=0), sizes, out=np.ones_like(sizes), where=sizes > 0)
        shape = 1 / t[chosen] if stage.split.by_feature else shape / t[sizes > 0].mean()
        largest = _largest(p)
        rows = stage.before().values / np.sqrt(shape)[:, None]
        least = ((beta - alpha) / 2) ** 2 * _largest(rows @ p @ rows.T)
    return shape * max(unit * largest, least) * (1 + MARGIN)


def _largest(gram: Array) -> float:
    """The largest eigenvalue of a positive semidefinite matrix, or 0."""
    return max(0.0, float(np.linalg.eigvalsh(gram)[-1])) if len(gram) else 0.0


def _symmetric(matrix: Array) -> Array:
    return (matrix + matrix.T) / 2


def solved(factor: Array, right: Array) -> Array:
    """factor^-1 right, by substitution, which is accurate whatever the condition of a Cholesky factor."""
    solution = torch.linalg.solve_triangular(torch.from_numpy(factor), torch.from_numpy(right), upper=False)
    return np.asarray(solution)
