"""Constraints that bound nothing: a term of the loss asks for small gradients, or for robust outputs.

They are what people compare with. Weights are free, so that L is neither kept nor proven; the constant of the
trained network is certified as for constraint=none.

Shapes: K runs, B points, D inputs, C outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from lipexp.activations import Activation
from lipexp.blocks import Block
from lipexp.config import lipschitz_constant, number
from lipexp.constraints.chains import Unconstrained
from lipexp.constraints.norms import SpectralNorm, spectral_norm_estimate
from lipexp.losses import column
from lipexp.models import Free


class GradientPenalty(Unconstrained):
    """Adds weight * mean over the points and outputs of max(0, ||grad f_c(x)||_2 / goal - 1)^2 to the loss.

    It sees the training points alone: between and beyond them gradients may be of any size.

    Args:
        weight: of the penalty.
        goal: the gradient norm up to which nothing is penalised.

    Reference: Gulrajani, Ahmed, Arjovsky, Dumoulin and Courville 2017, "Improved training of Wasserstein GANs"
    (arXiv 1704.00028); one-sided as in Petzka, Fischer and Lukovnikov 2018 (arXiv 1709.08894).
    """

    per_run = ("weight", "goal")
    needs_gradients = True

    def __init__(self, weight: float = 10.0, goal: float = 1.0) -> None:
        self.weight = number("weight", weight, least=0)
        self.goal = lipschitz_constant("goal", goal)

    def penalty(self, blocks: Sequence[Block], acts: Sequence[Activation], x: Tensor, f: Tensor) -> Tensor:
        excess = torch.zeros_like(f[..., 0])
        for c in range(f.shape[2]):
            (gradient,) = torch.autograd.grad(f[..., c].sum(), x, create_graph=True)
            # The derivative of a norm at 0 is not finite.
            norm = (gradient.square().sum(dim=2) + torch.finfo(f.dtype).tiny).sqrt()
            excess = excess + (norm / column(self.goal, norm) - 1).relu().square()
        return column(self.weight, excess[:, 0]) * excess.mean(dim=1) / f.shape[2]


class GloRo(Unconstrained):
    """Adds an output that wins wherever the decision may change within `radius`, by the network's own bound.

    With outputs f, the predicted class c, and the bound L_cj = ||w_c - w_j||_2 times the spectral norms of the
    layers before the last for the difference of two outputs, that output is

        f_bottom = max over j != c of f_j + radius L_cj,

    and with it the cross-entropy of f grows by log(1 + exp(f_bottom - log sum_j exp(f_j))), which is what is added
    to the loss. So the network learns a bound of its own, which is small where its margins ask for it. One output
    f counts as the two outputs (-f/2, f/2). Use loss=cross_entropy, or loss=bce, with a temperature of 1.

    Training estimates the spectral norms by one warm-started step of power iteration per optimiser step.

    Args:
        radius: within which decisions shall not change, in the units of the input.

    Reference: Leino, Wang and Fredrikson 2021, "Globally-robust neural networks" (arXiv 2102.08452), section 3.
    """

    per_run = ("radius",)
    needs_classes = True

    def __init__(self, radius: float = 0.5) -> None:
        self.radius = number("radius", radius, least=0)

    def start(self, layers: Sequence[Free]) -> None:
        self._state = [SpectralNorm().start(layer.weight.detach()) for layer in layers[:-1]]

    def penalty(self, blocks: Sequence[Block], acts: Sequence[Activation], x: Tensor, f: Tensor) -> Tensor:
        bound = f.new_ones(1, 1, 1)
        for block, state in zip(blocks[:-1], self._state, strict=True):
            bound = bound * spectral_norm_estimate(block.weight, state)
        last = blocks[-1].weight  # (K, C, H)
        if f.shape[2] == 1:
            f, last = torch.cat([-f, f], dim=2) / 2, torch.cat([-last, last], dim=1) / 2
        top = f.argmax(dim=2, keepdim=True)  # (K, B, 1)
        rows = last.gather(1, top.expand(-1, -1, last.shape[2]))  # (K, B, H)
        square = (rows.unsqueeze(2) - last.unsqueeze(1)).square().sum(dim=3)  # (K, B, C)
        apart = bound * (square + torch.finfo(f.dtype).tiny).sqrt()
        bottom = (f + column(self.radius, f) * apart).scatter(2, top, -torch.inf).amax(dim=2)
        return functional.softplus(bottom - f.logsumexp(dim=2)).mean(dim=1)
