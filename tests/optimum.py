"""Optima of the semidefinite program behind LipSDP for small networks, by another formulation and solver.

`python tests/optimum.py`, with cvxpy and clarabel installed, solves the programs anew, and prints what is stored
in OPTIMA. All features behind activations are variables. What sorting and reflecting conserve are equations,
whose null space is taken by a singular value decomposition, so that nothing is shared with lipexp.
"""

from functools import partial
from typing import Any

import numpy as np
import torch
from networks import network, residual

from lipexp.activations import Abs, Activation, GroupSort, Householder, LeakyReLU, ReLU
from lipexp.blocks import is_activated
from lipexp.networks import BakedNetwork


class Steep(Activation):
    """-z / 2 below 0, and 3 z / 2 above."""

    slopes = (-0.5, 1.5)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return torch.where(z > 0, 1.5 * z, -0.5 * z)


ACTS = {
    "relu": ReLU(),
    "leaky": LeakyReLU(0.2),
    "abs": Abs(),
    "steep": Steep(),
    "maxmin": GroupSort(),
    "threes": GroupSort(group_size=3),
    "fullsort": GroupSort(n_groups=1),
    "householder": Householder(),
}
SHAPES = {"3-12-12-1": (3, 12, 12, 1), "10-18-18-1": (10, 18, 18, 1), "6-12-12-12-3": (6, 12, 12, 12, 3)}
CASES = {
    f"{name} {shape}": partial(network, *sizes, act=act)
    for name, act in ACTS.items()
    for shape, sizes in SHAPES.items()
} | {f"{name} residual": partial(residual, 4, 12, 1, inside=12, act=act) for name, act in ACTS.items()}

OPTIMA = {
    "relu 3-12-12-1": 1.617325,
    "relu 10-18-18-1": 1.087066,
    "relu 6-12-12-12-3": 2.563003,
    "leaky 3-12-12-1": 1.458517,
    "leaky 10-18-18-1": 0.996576,
    "leaky 6-12-12-12-3": 2.276022,
    "abs 3-12-12-1": 3.187422,
    "abs 10-18-18-1": 1.916418,
    "abs 6-12-12-12-3": 5.376963,
    "steep 3-12-12-1": 4.444189,
    "steep 10-18-18-1": 2.869955,
    "steep 6-12-12-12-3": 10.719065,
    "maxmin 3-12-12-1": 2.342442,
    "maxmin 10-18-18-1": 1.318202,
    "maxmin 6-12-12-12-3": 3.623126,
    "threes 3-12-12-1": 2.698301,
    "threes 10-18-18-1": 2.075907,
    "threes 6-12-12-12-3": 5.593777,
    "fullsort 3-12-12-1": 5.464454,
    "fullsort 10-18-18-1": 2.558166,
    "fullsort 6-12-12-12-3": 8.291069,
    "householder 3-12-12-1": 2.105495,
    "householder 10-18-18-1": 1.284394,
    "householder 6-12-12-12-3": 4.135395,
    "relu residual": 1.025750,
    "leaky residual": 0.751330,
    "abs residual": 3.018480,
    "steep residual": 2.000485,
    "maxmin residual": 1.746330,
    "threes residual": 2.123306,
    "fullsort residual": 3.549226,
    "householder residual": 1.634739,
}


def solved(net: BakedNetwork) -> float:
    """The smallest L of the program."""
    import cvxpy as cp
    from scipy.linalg import null_space

    weights = [layer.weight[0].double().numpy() for layer in net.layers]
    widths = [weight.shape[layer.is_residual] for weight, layer in zip(weights, net.layers, strict=True)][:-1]
    ends = np.cumsum([net.n_inputs, *widths])
    eye, terms, equations = np.eye(ends[-1]), [], []
    x, used = eye[: net.n_inputs], np.arange(ends[-1]) < net.n_inputs
    for i, (layer, act) in enumerate(zip(net.layers[:-1], net.acts, strict=False)):
        if not layer.is_residual and not is_activated(net.layers, i):
            x = weights[i] @ x
            continue
        z, y = (weights[i].T if layer.is_residual else weights[i]) @ x, eye[ends[i] : ends[i + 1]]
        used[ends[i] : ends[i + 1]] = True
        if act.slopes is not None:
            low, high = (y - slope * z for slope in act.slopes)
            t = cp.diag(cp.Variable(len(z), nonneg=True))
            terms.append(low.T @ t @ high + high.T @ t @ low)
        for before, after, conserved in isometries(act, z, y):
            terms.append(cp.Variable(nonneg=True) * (after.T @ after - before.T @ before))
            equations.append(conserved)
        x = x - (weights[i] * layer.t[0, 0].double().numpy()) @ y if layer.is_residual else y
    out, square = weights[-1] @ x, cp.Variable(nonneg=True)
    matrix = square * np.diag((np.arange(ends[-1]) < net.n_inputs) * 1.0) - out.T @ out + sum(terms)
    free: Any = eye[:, used]
    free = free @ null_space(np.array(equations) @ free) if equations else free
    reduced = free.T @ matrix @ free
    slack = cp.Variable(reduced.shape, PSD=True)
    accurate = {"tol_gap_abs": 1e-9, "tol_gap_rel": 1e-9, "tol_feas": 1e-9}
    cp.Problem(cp.Minimize(square), [slack == (reduced + reduced.T) / 2]).solve(solver="CLARABEL", **accurate)
    return float(np.sqrt(square.value))


def isometries(act: Activation, z: Any, y: Any) -> list[tuple[Any, Any, Any]]:
    """Features before and behind an activation whose distance it does not increase, and what is 0 of them."""
    if isinstance(act, Householder):
        half, found = len(z) // 2, []
        for j, angle in enumerate(act.theta[0].double().tolist()):
            pair = [j, j + half]
            along = np.array([np.cos(angle / 2), np.sin(angle / 2)])
            found.append((z[pair], y[pair], along @ (y[pair] - z[pair])))
        return found
    groups = act.groups(len(z)) if act.slopes is None else None
    return [] if groups is None else [(z[g], y[g], (y[g] - z[g]).sum(axis=0)) for g in groups]


if __name__ == "__main__":
    print("\n".join(f'    "{name}": {solved(case()):.6f},' for name, case in CASES.items()))
