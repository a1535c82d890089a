"""Networks with residual layers as affine layers alone, with the same numbers, so that nothing is rounded.

Shapes: H features, M features inside a residual layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from lipexp.activations import Activation, ActiveMap, Array
from lipexp.blocks import Affine, is_activated
from lipexp.networks import BakedNetwork


class Partly(Activation):
    """An activation of the first M of the features, beside which the others pass as they are."""

    def __init__(self, act: Activation, inside: int) -> None:
        super().__init__()
        self.act, self.inside = act, inside

    @property
    def label(self) -> str:
        return self.act.label

    def active_map(self, z: Array) -> ActiveMap | None:
        shape = (*z.shape[:-1], z.shape[-1] - self.inside)
        passing = np.broadcast_to(np.arange(self.inside, z.shape[-1]), shape)
        if not self.inside:
            return ActiveMap(passing, np.ones(shape, dtype=np.int64))
        found = self.act.active_map(z[..., : self.inside])
        if found is None:
            return None
        up, down = max(found.exponent, 0), min(found.exponent, 0)  # of a factor 2^exponent, and of 1
        factors = [found.factor << up, np.full(shape, 1 << -down)]
        index, factor = (np.concatenate(parts, axis=-1) for parts in ([found.index, passing], factors))
        return replace(found, index=index, factor=factor, exponent=down)

    def breakpoints(self, width: int) -> Array | None:
        return self.act.breakpoints(self.inside) if self.inside else np.empty((0, 2), dtype=np.int64)


def affine_layers(network: BakedNetwork) -> tuple[Sequence[Affine], Sequence[Activation]]:
    """Affine layers, and the activation behind each of them, that compute what `network` does, for K = 1.

    A residual layer h - W diag(t) act(W^T h + b) is three of them: [W^T; I] h + [b; 0], of which the activation
    takes the first M features; then diag(t, 1), and [-W I].
    """
    layers, acts = list[Affine](), list[Activation]()
    for i, (layer, act) in enumerate(zip(network.layers, network.acts, strict=True)):
        if isinstance(layer, Affine):
            layers.append(layer)
            acts.append(act if is_activated(network.layers, i) else Partly(act, 0))
            continue
        width, inside = layer.weight.shape[1:]
        same, none = torch.eye(width).unsqueeze(0), torch.zeros(1, 1, width)
        rates = torch.cat([layer.t[0, 0], torch.ones(width)]).diag().unsqueeze(0)
        layers += [
            Affine(torch.cat([layer.weight.mT, same], dim=1), torch.cat([layer.bias, none], dim=2)),
            Affine(rates, torch.zeros(1, 1, inside + width)),
            Affine(torch.cat([-layer.weight, same], dim=2), none),
        ]
        acts += [Partly(act, inside), Partly(act, 0), Partly(act, 0)]
    return layers, acts
