"""The blocks that networks are made of.

Shapes: K runs, B points, H features. Points are (K, B, in), weights (K, out, in), biases (K, 1, out).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Affine(NamedTuple):
    """The affine layers x -> x W^T + b of K networks."""

    weight: Tensor  # (K, out, in)
    bias: Tensor  # (K, 1, out)

    @property
    def is_residual(self) -> bool:
        """Whether the layer applies the activation inside, so that none stands beside it."""
        return False

    def __call__(self, x: Tensor, act: nn.Module) -> Tensor:
        """(K, B, in) -> (K, B, out)."""
        if self.weight.shape[1] <= self.weight.shape[2]:
            return _Affine.apply(x, self.weight, self.bias)
        return torch.baddbmm(self.bias, x, self.weight.mT)


class Residual(NamedTuple):
    """The layers x -> x - W diag(t) act(W^T x + b) of K networks, with the activation inside.

    W and t are kept apart, since a bound holds for these very numbers: where act has slopes in [0, 1], t > 0 and
    2 diag(1/t) - W^T W is positive semidefinite, the layer is 1-Lipschitz in the 2-norm. For z = W^T (x - x'), and
    a the difference of the activations, a^T diag(t) (z - a) >= 0, so that

        |x - x'|^2 - |x - x' - W diag(t) a|^2 = 2 a^T diag(t) z - |W diag(t) a|^2
                                              >= (diag(t) a)^T (2 diag(1/t) - W^T W) (diag(t) a).

    Reference: Meunier, Delattre, Araujo and Allauzen 2022, "A dynamical system perspective for Lipschitz neural
    networks" (arXiv 2110.12690); Araujo, Havens, Delattre, Allauzen and Hu 2023 (arXiv 2303.03169).
    """

    weight: Tensor  # (K, H, M) W
    bias: Tensor  # (K, 1, M)
    t: Tensor  # (K, 1, M)

    @property
    def is_residual(self) -> bool:
        """See `Affine`."""
        return True

    def __call__(self, x: Tensor, act: nn.Module) -> Tensor:
        """(K, B, H) -> (K, B, H)."""
        return torch.baddbmm(x, self.t * act(torch.baddbmm(self.bias, x, self.weight)), self.weight.mT, alpha=-1)


Block = Affine | Residual


class _Affine(torch.autograd.Function):
    """x W^T + b, for no more outputs than inputs.

    Backwards autograd computes x^T g and transposes it. g^T x is the gradient of W as W lies in memory, and for a
    single output ten times faster.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.baddbmm(bias, x, weight.mT)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (gradient,) = gradients  # (K, B, out)
        x, weight = ctx.saved_tensors
        wanted_x, wanted_weight, wanted_bias = ctx.needs_input_grad
        return (
            (gradient * weight if weight.shape[1] == 1 else torch.bmm(gradient, weight)) if wanted_x else None,
            torch.bmm(gradient.mT, x) if wanted_weight else None,
            gradient.sum(dim=1, keepdim=True) if wanted_bias else None,
        )


def is_activated(layers: Sequence[Block], i: int) -> bool:
    """Whether the activation stands behind layer i."""
    return i + 1 < len(layers) and not (layers[i].is_residual or layers[i + 1].is_residual)


def act_width(layers: Sequence[Block], i: int) -> int:
    """The features of the activation that stands behind layer i, or inside it; 0: there is none."""
    if layers[i].is_residual:
        return layers[i].weight.shape[2]
    return layers[i].weight.shape[1] if is_activated(layers, i) else 0


def inputs_and_output(
    layers: Sequence[Block], acts: Sequence[nn.Module], x: Tensor, linear: Tensor | None = None
) -> tuple[list[Tensor], Tensor]:
    """The input of every layer at points x (K, B, D), x itself first, and the outputs (K, B, C).

    Args:
        acts: the activation of each layer: behind it, where two affine layers follow each other, or inside it.
        linear: (K, C, D) A: A x is added to the outputs.
    """
    points, inputs = x, []
    for i, (layer, act) in enumerate(zip(layers, acts, strict=True)):
        inputs.append(x)
        x = layer(x, act)
        if is_activated(layers, i):
            x = act(x)
    return inputs, x if linear is None else torch.baddbmm(x, points, linear.mT)
