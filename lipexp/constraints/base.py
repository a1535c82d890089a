"""What every constraint is: the chain of operator norms, and the maps from free parameters to weights.

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

from lipexp.activations import Activation
from lipexp.blocks import Affine, Block
from lipexp.config import ConfigError
from lipexp.constraints.norms import OperatorNorm, proven_norm, toward_zero
from lipexp.models import Free, Layout, Shapes
from lipexp.networks import BakedNetwork
from lipexp.norms import dual, even_split


class Constraint(ABC):
    """The chain of operator norms, and the two maps from free parameters to weights.

    | member              | what it is                                                                      |
    |---------------------|---------------------------------------------------------------------------------|
    | `p`                 | the norm in which inputs move: 1, 2 or inf; `q`, its dual, measures gradients   |
    | `hidden_p`          | the norm of the hidden spaces, in which activations must be 1-Lipschitz         |
    | `lipschitz`         | L; None: there is no bound                                                      |
    | `output_p`          | the norm of several outputs; that of the hidden spaces by default               |
    | `norms(n_layers)`   | the operator norm of each layer, first layer first; from p to hidden_p, then    |
    |                     | from hidden_p to hidden_p, at last to output_p. Their product bounds the network|
    | `per_run`           | the arguments that may differ between the runs of a stack: each is an attribute |
    |                     | of the same name, a number that may become a (K,) tensor                        |
    | `needs_classes`     | whether it is for classifiers alone                                             |
    | `needs_gradients`   | whether `penalty` takes derivatives by the points                               |
    | `signs`             | (D,) of monotone features, 1 where f may only rise and -1 where it may only     |
    |                     | fall, else 0; None: there are none. See `linear`                                |
    | `check(act, name)`  | refuses an activation that breaks the bound                                     |
    | `target(run)`       | L of one run                                                                    |
    | `bound(n_layers)`   | b, the norm that each layer may have                                            |
    | `layout(shapes,act)`| which free parameters there are, for the weight matrices of the model           |
    | `start(layers)`     | begins training from these free parameters                                      |
    | `apply(layers)`     | the layers for free parameters, differentiable, once per step                   |
    | `acts(layers, act)` | the activation of each layer, with its parameters                               |
    | `penalty(…)`        | a term that is added to the loss of each run; None: there is none               |
    | `bake(layers, act)` | the network to report, float32 on the CPU, with its proven norms                |
    | `prove(network)`    | a stored network with its proven norms, as `bake` found them                    |
    | `names(layers)`     | what screens and layers.csv call the norm of each layer                         |

    Only `norms` has to be written; the others follow from it unless the constraint is of another kind.
    """

    p: float = 2.0
    hidden_p: float = 2.0
    lipschitz: Any = None
    per_run: tuple[str, ...] = ()
    signs: Tensor | None = None
    _scale: Tensor | None = None  # b in training, where it is not 1
    needs_classes = False
    needs_gradients = False

    @property
    def q(self) -> float:
        """The norm in which gradients are measured, the dual of p."""
        return dual(self.p)

    @property
    def output_p(self) -> float:
        """The norm in which several outputs are measured."""
        return self.hidden_p

    @abstractmethod
    def norms(self, n_layers: int) -> Sequence[OperatorNorm]: ...

    def names(self, layers: Sequence[Block]) -> tuple[str, ...]:
        """What the norm of each layer is called."""
        norms = zip(self.norms(len(layers)), layers, strict=True)
        return tuple("residual layer" if layer.is_residual else norm.name for norm, layer in norms)

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

    def layer_bound(self, layers: Sequence[Block]) -> Tensor | None:
        """(K,) or (1,) the norm that each affine layer may have; None: they have no bound of their own."""
        return self.bound(len([layer for layer in layers if not layer.is_residual]))

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

    def layout(self, shapes: Shapes, act: Activation) -> Layout:
        """The free parameters for weight matrices (out, in), the activation standing between two."""
        widths = [*(n_out for n_out, _ in shapes[:-1]), 0]
        return Layout.of(shapes, [0] * len(shapes), widths, act)

    def start(self, layers: Sequence[Free]) -> None:
        bound = self.bound(len(layers))
        if bound is None:
            return
        self._norms = self.norms(len(layers))
        self._state = [norm.start(layer.weight.detach()) for norm, layer in zip(self._norms, layers, strict=True)]
        scale = bound.to(layers[0].weight).view(-1, 1, 1)
        self._scale = None if bool((scale == 1).all()) else scale  # L = 1 needs none

    def apply(self, layers: Sequence[Free]) -> list[Block]:
        """Layer i becomes (b N(W), b^i bias) with N the map to norm 1; without a bound it stays as it is.

        With an activation that is positively homogeneous, act(c x) = c act(x) for c > 0, or whose parameters that
        are lengths are scaled as well, training is then the same for every L up to the scale b^i of the features.
        """
        if self.lipschitz is None:
            return [Affine(layer.weight, layer.bias) for layer in layers]
        for norm, layer in zip(self._norms, layers, strict=True):
            norm.restore(layer.weight)
        weights = [
            norm.within_one(layer.weight, state)
            for norm, state, layer in zip(self._norms, self._state, layers, strict=True)
        ]
        if self._scale is None:
            return [Affine(weight, layer.bias) for weight, layer in zip(weights, layers, strict=True)]
        return [
            Affine(self._scale * weight, self._scale**i * layer.bias)
            for i, (weight, layer) in enumerate(zip(weights, layers, strict=True), start=1)
        ]

    def acts(self, layers: Sequence[Free], act: Activation) -> Sequence[Activation]:
        """The activation of each layer, with the parameters that `act.within` makes of the free ones."""
        scale = layers[0].weight.new_ones(1) if self._scale is None else self._scale
        thetas = self._thetas([layer.theta for layer in layers], self.depths(layers), act, scale)
        return [act.at(theta) for theta in thetas] or [act] * len(layers)

    @staticmethod
    def _thetas(free: list[Tensor], depths: Sequence[int], act: Activation, scale: Tensor) -> list[Tensor]:
        """What `act.within` makes of the free parameters of each layer; none where no layer has any."""
        if not any(theta.numel() for theta in free):
            return []
        return [act.within(theta, scale.view(-1, 1) ** n) for theta, n in zip(free, depths, strict=True)]

    def depths(self, layers: Sequence[Free]) -> Sequence[int]:
        """The power of b that is the scale of the features behind each layer."""
        return range(1, len(layers) + 1)

    def penalty(self, blocks: Sequence[Block], acts: Sequence[Activation], x: Tensor, f: Tensor) -> Tensor | None:
        """(K,) what is added to the losses, at points x (K, B, D) with the outputs f (K, B, C); None: nothing."""
        return None

    def bake(self, layers: Sequence[Free], act: Activation) -> BakedNetwork:
        bound = self.bound(len(layers))
        if bound is None:
            stored = [Affine(*(part.detach().cpu().float().clone() for part in layer[:2])) for layer in layers]
            return self.prove(self.baked(stored, layers, act))
        bound = bound.expand(len(layers[0].weight))
        out, norms = [], []
        for i, (norm, layer) in enumerate(zip(self.norms(len(layers)), layers, strict=True), start=1):
            weight, proven = norm.bake(layer.weight.detach().cpu(), bound)
            out.append(Affine(weight, (bound.view(-1, 1, 1) ** i * layer.bias.detach().cpu().double()).float()))
            norms.append(proven)
        return replace(self.baked(out, layers, act), norms=norms)

    def baked(self, blocks: Sequence[Block], layers: Sequence[Free], act: Activation) -> BakedNetwork:
        """The network of these stored blocks, with all else that free parameters say."""
        runs, linear, depths = len(layers[0].weight), self.linear(), self.depths(layers)
        bound = self.bound(depths[-1])
        scale = torch.ones(1, dtype=torch.float64) if bound is None else bound
        free = [layer.theta.detach().cpu().double() for layer in layers]
        thetas = [theta.float() for theta in self._thetas(free, depths, act, scale)]
        acts = [act.at(theta) for theta in thetas] or [act] * len(layers)
        return BakedNetwork(blocks, acts, linear=None if linear is None else linear.expand(runs, -1, -1))

    def prove(self, network: BakedNetwork) -> BakedNetwork:
        """`network` with the norms of its layers proven from the stored numbers; inf for those of a broken run."""
        finite = [network.is_finite(run) for run in range(network.n_runs)]
        norms = [
            [proven_norm(norm, layer, run) if finite[run] else math.inf for run in range(network.n_runs)]
            for norm, layer in zip(self.norms(len(network.layers)), network.layers, strict=True)
        ]
        return replace(network, norms=norms)


def check_slopes(act: Activation, name: str, what: str) -> None:
    """Raise ConfigError if the activation `act`, called `name`, has not slopes in [0, 1], which `what` needs."""
    if not act.has_unit_slopes:
        found = "none" if act.slopes is None else f"[{act.slopes[0]:g}, {act.slopes[1]:g}]"
        raise ConfigError(
            "act", name, f"must declare slopes in [0, 1] for {what}, as relu does; it declares {found}"
        )
