"""Constraints: which operator norm bounds each layer, in training and in the baked network.

f is L-Lipschitz for the input norm p iff ||grad f||_q <= L almost everywhere, with 1/p + 1/q = 1. A chain of
operator norms proves it: p -> h for the first layer, h -> h for every later one, times activations that are
1-Lipschitz in the norm h of the hidden space. Several outputs are measured in h as well: L bounds the norm p -> h
of the Jacobian, for h = 2 its singular values, for h = inf the q-norm of each row.

| constraint          | layer 1         | layers i > 1    | p   | q   | h   |
|---------------------|-----------------|-----------------|-----|-----|-----|
| Unconstrained       | -               | -               | 2   | 2   | 2   |
| Spectral            | ||W||_2 <= b    | ||W||_2 <= b    | 2   | 2   | 2   |
| LInf, p = 2         | rows ||w||_2    | rows ||w||_1    | 2   | 2   | inf |
| LInf, p = inf       | rows ||w||_1    | rows ||w||_1    | inf | 1   | inf |
| LInf, p = 1         | entries |w|     | rows ||w||_1    | 1   | inf | inf |

The budget L is split evenly, b = L^(1/n) for n weight matrices. Training works on free parameters: `apply` maps
them to weights within the bound, once per step. `bake` makes the network that is reported, whose stored float32
numbers are proven to obey the bound with no tolerance.

To add one: a class derived from `Constraint`, an `OperatorNorm` for it if none here serves, and one file in
conf/constraint/.

Shapes: K runs, weights (K, out, in), biases (K, 1, out).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lipexp.activations import Activation
from lipexp.config import ConfigError, lipschitz_constant, norm_order
from lipexp.networks import Affine, BakedNetwork
from lipexp.norms import dual, even_split, row_norm_bound, spectral_norm_bound

# A spectral norm is scaled to just below its bound before it is rounded to float32: rounding can raise it by some
# 1e-7, and rounding toward zero would not help, since smaller entries can make a larger spectral norm.
SPECTRAL_SHRINK = 1 - 2.0**-20


class OperatorNorm(ABC):
    """The norm of one layer: how training keeps it, how baking does, and its proof.

    | member                      | what it is                                                              |
    |-----------------------------|-------------------------------------------------------------------------|
    | `name`                      | what screens and layers.csv call it                                     |
    | `start(weight)`             | the state that `within_one` is handed at every step; None: it needs none|
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


def toward_zero(x: Tensor) -> Tensor:
    """float64 -> float32, rounded toward zero: no entry grows, so no row does."""
    nearest = x.float()
    smaller = torch.nextafter(nearest, torch.zeros_like(nearest))
    return torch.where(nearest.double().abs() > x.abs(), smaller, nearest)


class Constraint(ABC):
    """The chain of operator norms, and the two maps from free parameters to weights.

    | member              | what it is                                                                      |
    |---------------------|---------------------------------------------------------------------------------|
    | `p`                 | the norm in which inputs move: 1, 2 or inf; `q`, its dual, measures gradients   |
    | `hidden_p`          | the norm of the hidden spaces, in which activations must be 1-Lipschitz         |
    | `lipschitz`         | L; None: there is no bound                                                      |
    | `norms(n_layers)`   | the operator norm of each layer, first layer first; from p to hidden_p, then    |
    |                     | from hidden_p to hidden_p. Their product bounds the network                     |
    | `per_run`           | the arguments that may differ between the runs of a stack: each is an attribute |
    |                     | of the same name, a number that may become a (K,) tensor                        |
    | `signs`             | (D,) of monotone features, 1 where f may only rise and -1 where it may only     |
    |                     | fall, else 0; None: there are none. See `linear`                                |
    | `check(act, name)`  | refuses an activation that breaks the bound                                     |
    | `target(run)`       | L of one run                                                                    |
    | `bound(n_layers)`   | b, the norm that each layer may have                                            |
    | `start(layers)`     | begins training from these free parameters                                      |
    | `apply(layers)`     | the weights for free parameters, differentiable, once per step                  |
    | `bake(layers, act)` | the network to report, float32 on the CPU, with its proven norms                |
    | `prove(network)`    | a stored network with its proven norms, as `bake` found them                    |

    Only `norms` has to be written; the others follow from it unless the constraint is of another kind.
    """

    p: float = 2.0
    hidden_p: float = 2.0
    lipschitz: Any = None
    per_run: tuple[str, ...] = ()
    signs: Tensor | None = None

    @property
    def q(self) -> float:
        """The norm in which gradients are measured, the dual of p."""
        return dual(self.p)

    @abstractmethod
    def norms(self, n_layers: int) -> Sequence[OperatorNorm]: ...

    def check(self, act: Activation, name: str) -> None:
        """Raise ConfigError if the activation `act`, called `name` in the configuration, breaks the bound."""
        if self.lipschitz is not None and self.hidden_p not in act.norms:
            declared = ", ".join(f"{p:g}" for p in sorted(act.norms)) or "none"
            raise ConfigError(
                "act",
                name,
                f"must be 1-Lipschitz in the {self.hidden_p:g}-norm of the hidden space; it declares "
                f"norms: {declared} (constraint=none takes any activation)",
            )

    def target(self, run: int) -> float | None:
        """L of one run."""
        if self.lipschitz is None:
            return None
        values = torch.as_tensor(self.lipschitz, dtype=torch.float64).reshape(-1)
        return float(values[run if len(values) > 1 else 0])

    def bound(self, n_layers: int) -> Tensor | None:
        """(K,) or (1,) b, the norm that each of n layers may have, in float64; None: there is no bound."""
        if self.lipschitz is None:
            return None
        return torch.tensor([even_split(float(budget), n_layers) for budget in self._budget], dtype=torch.float64)

    @property
    def _budget(self) -> Tensor:
        """(K,) or (1,) in float64: L, with signs s a float32 number c just below L / (1 + ||s||_q)."""
        lipschitz = torch.as_tensor(self.lipschitz, dtype=torch.float64).reshape(-1)
        if self.signs is None:
            return lipschitz
        length = torch.linalg.vector_norm(self.signs.double(), ord=self.q)
        return toward_zero(lipschitz / (1 + length) * (1 - 2.0**-20)).double()

    def linear(self) -> Tensor | None:
        """(K or 1, 1, D) A = c s^T, which is added to one output of layers of norm c; None without signs s.

        With ||grad h||_q <= c for the layers h, each partial derivative of h is at most c, so that those of
        f = h + c s^T x have the signs s; and ||grad f||_q <= c + c ||s||_q <= L.

        Reference: Kitouni, Nolte and Williams 2023, "Expressive monotonic neural networks" (arXiv 2307.07512).
        """
        return None if self.signs is None else (self._budget.view(-1, 1, 1) * self.signs.double()).float()

    def start(self, layers: Sequence[Affine]) -> None:
        bound = self.bound(len(layers))
        if bound is None:
            return
        self._norms = self.norms(len(layers))
        self._state = [norm.start(layer.weight.detach()) for norm, layer in zip(self._norms, layers, strict=True)]
        scale = bound.to(layers[0].weight).view(-1, 1, 1)
        self._scale = None if bool((scale == 1).all()) else scale  # L = 1 needs none

    def apply(self, layers: Sequence[Affine]) -> list[Affine]:
        """Layer i becomes (b N(W), b^i bias) with N the map to norm 1; without a bound it stays as it is.

        With an activation that is positively homogeneous, act(c x) = c act(x) for c > 0, as all of lipexp's are,
        training is then the same for every L up to the scale b^i of the features.
        """
        if self.lipschitz is None:
            return list(layers)
        out = [
            Affine(norm.within_one(weight, state), bias)
            for norm, state, (weight, bias) in zip(self._norms, self._state, layers, strict=True)
        ]
        if self._scale is None:
            return out
        return [Affine(self._scale * w, self._scale**i * bias) for i, (w, bias) in enumerate(out, start=1)]

    def bake(self, layers: Sequence[Affine], act: Activation) -> BakedNetwork:
        bound = self.bound(len(layers))
        if bound is None:
            return self.prove(BakedNetwork([Affine(*(_stored(part) for part in layer)) for layer in layers], act))
        bound = bound.expand(len(layers[0].weight))
        out, norms = [], []
        for i, (norm, (weight, bias)) in enumerate(zip(self.norms(len(layers)), layers, strict=True), start=1):
            baked, proven = norm.bake(weight.detach().cpu(), bound)
            out.append(Affine(baked, (bound.view(-1, 1, 1) ** i * bias.detach().cpu().double()).float()))
            norms.append(proven)
        linear = self.linear()
        return BakedNetwork(out, act, norms, None if linear is None else linear.expand(len(bound), -1, -1))

    def prove(self, network: BakedNetwork) -> BakedNetwork:
        """`network` with the norms of its layers proven from the stored numbers; inf for those of a broken run."""
        finite = [network.is_finite(run) for run in range(network.n_runs)]
        norms = [
            [norm.proven(layer.weight[run]) if finite[run] else math.inf for run in range(network.n_runs)]
            for norm, layer in zip(self.norms(len(network.layers)), network.layers, strict=True)
        ]
        return replace(network, norms=norms)


def _stored(part: Tensor) -> Tensor:
    return part.detach().cpu().float().clone()


class Unconstrained(Constraint):
    """No bound: parameters are the weights. The constant is measured and certified for p = 2."""

    def norms(self, n_layers: int) -> Sequence[OperatorNorm]:
        return [SpectralNorm()] * n_layers


class Spectral(Constraint):
    """||W||_2 <= b for every layer: L-Lipschitz for the 2-norm.

    Reference: Miyato et al. 2018, "Spectral normalization" (arXiv 1802.05957), section 2.1.
    """

    per_run = ("lipschitz",)

    def __init__(self, lipschitz: float = 1.0) -> None:
        self.lipschitz = lipschitz_constant("lipschitz", lipschitz)

    def norms(self, n_layers: int) -> Sequence[OperatorNorm]:
        return [SpectralNorm() for _ in range(n_layers)]


class LInf(Constraint):
    """||W||_{p -> inf} <= b for the first layer, ||W||_inf <= b for later ones: L-Lipschitz for the norm p.

    Args:
        p: the norm in which inputs move: 1, 2 or inf.
        lipschitz: L.

    Reference: Anil, Lucas and Grosse 2019, "Sorting out Lipschitz function approximation", section 4.2.
    """

    per_run = ("lipschitz",)
    hidden_p = math.inf

    def __init__(self, p: float | str = 2, lipschitz: float = 1.0) -> None:
        self.p = norm_order("p", p)
        self.lipschitz = lipschitz_constant("lipschitz", lipschitz)

    def norms(self, n_layers: int) -> Sequence[OperatorNorm]:
        return [RowNorm(self.q), *(RowNorm(1) for _ in range(n_layers - 1))]
