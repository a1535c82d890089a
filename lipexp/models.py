"""Networks: K stacked ones for training and measuring, and one plain torch module for use afterwards.

Shapes: K runs, B points, D inputs, C outputs, H width. Weights are (K, out, in), biases (K, 1, out), points
(K, B, D). All parameters of a run lie in one row of a (K, P) tensor, so an optimiser makes one pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lipexp.config import whole


class Layer(NamedTuple):
    """One affine layer of K networks: x -> x W^T + b."""

    weight: Tensor  # (K, out, in)
    bias: Tensor  # (K, 1, out)


class MLP:
    """A fully connected network: `depth` hidden layers of `width` features, depth + 1 weight matrices."""

    per_run: tuple[str, ...] = ()

    def __init__(self, width: int = 64, depth: int = 2) -> None:
        self.width = whole("width", width, least=1)
        self.depth = whole("depth", depth, least=1)

    def shapes(self, n_inputs: int, n_outputs: int = 1) -> list[tuple[int, int]]:
        """(out, in) of each weight matrix."""
        sizes = [n_inputs, *[self.width] * self.depth, n_outputs]
        return list(zip(sizes[1:], sizes[:-1], strict=True))

    def initial(self, shapes: Sequence[tuple[int, int]], generator: torch.Generator) -> Tensor:
        """(P,) the parameters of one run before training.

        Weights are orthogonal, every singular value 1: a network that starts with all of its gradient norm.
        Biases are uniform on +- 1/sqrt(in), so that the kinks start at different places.
        """
        rows = []
        for n_out, n_in in shapes:
            rows.append(nn.init.orthogonal_(torch.empty(n_out, n_in), generator=generator).flatten())
            rows.append(torch.empty(n_out).uniform_(-(n_in**-0.5), n_in**-0.5, generator=generator))
        return torch.cat(rows)


def unflatten(parameters: Tensor, shapes: Sequence[tuple[int, int]]) -> list[Layer]:
    """The layers whose parameters lie in the rows of `parameters` (K, P), as views."""
    runs = parameters.shape[0]
    sizes = [n for n_out, n_in in shapes for n in (n_out * n_in, n_out)]
    parts = iter(parameters.split(sizes, dim=1))
    return [Layer(next(parts).view(runs, n_out, n_in), next(parts).view(runs, 1, n_out)) for n_out, n_in in shapes]


def run_layers(layers: Sequence[Layer], run: int) -> list[Layer]:
    """The layers of one of K networks, as a stack of one."""
    return [Layer(weight[run : run + 1], bias[run : run + 1]) for weight, bias in layers]


def hidden_inputs(layers: Sequence[Layer], act: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The outputs (K, B, C) at points (K, B, D), and the input of every layer, x first."""
    inputs = []
    for i, (weight, bias) in enumerate(layers):
        if i > 0:
            x = act(x)
        inputs.append(x)
        x = _affine(x, weight, bias)
    return x, inputs


def _affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x W^T + b, (K, B, in) -> (K, B, out)."""
    if weight.shape[1] <= weight.shape[2]:
        return _Affine.apply(x, weight, bias)
    return torch.baddbmm(bias, x, weight.mT)


class _Affine(torch.autograd.Function):
    """x W^T + b, for no more outputs than inputs.

    Backwards autograd takes x^T g and transposes it. g^T x is the gradient of W as W lies in memory, and for a
    single output ten times faster.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.baddbmm(*_as_of_several(bias, x, weight.mT))[: len(x)]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (gradient,) = gradients  # (K, B, out)
        x, weight = ctx.saved_tensors
        wanted_x, wanted_weight, wanted_bias = ctx.needs_input_grad
        return (
            (gradient * weight if weight.shape[1] == 1 else torch.bmm(gradient, weight)) if wanted_x else None,
            torch.bmm(*_as_of_several(gradient.mT, x))[: len(x)] if wanted_weight else None,
            gradient.sum(dim=1, keepdim=True) if wanted_bias else None,
        )


def _as_of_several(*operands: Tensor) -> Sequence[Tensor]:
    """The operands of a product (K, m, n) (K, n, k); those of one run twice, where a matrix is a vector.

    For such a product alone torch calls a routine that adds in another order. So a run has the same numbers by
    itself as in a stack, to the last bit.
    """
    several = len(operands[-1]) > 1 or min(operands[-2].shape[1], operands[-1].shape[2]) > 1
    return operands if several else [operand.expand(2, -1, -1) for operand in operands]


def forward(layers: Sequence[Layer], act: nn.Module, x: Tensor) -> Tensor:
    """The outputs (K, B, C) of K networks at points (K, B, D)."""
    return hidden_inputs(layers, act, x)[0]


class Network(nn.Module):
    """One baked network as a plain torch module, (B, D) -> (B, C).

    Its state dict is what model.pt holds: `layers.<i>.weight` (out, in) and `layers.<i>.bias` (out,), float32.
    """

    def __init__(self, shapes: Sequence[tuple[int, int]], act: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(n_in, n_out) for n_out, n_in in shapes)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            if i > 0:
                x = self.act(x.unsqueeze(0)).squeeze(0)  # an activation sees (K, B, H)
            x = layer(x)
        return x


def state_dict(layers: Sequence[Layer], run: int) -> dict[str, Tensor]:
    """The plain state dict of one of K baked networks."""
    state = {}
    for i, (weight, bias) in enumerate(layers):
        state[f"layers.{i}.weight"] = weight[run].cpu().clone()
        state[f"layers.{i}.bias"] = bias[run, 0].cpu().clone()
    return state
