"""Networks with residual layers as affine layers alone, with the same numbers, so that nothing is rounded.

Shapes: H features, M features inside a residual layer.
"""

from __future__ import annotations

from collections.abc import Sequence

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

    @property
    def is_homogeneous(self) -> bool:
        return not self.inside or self.act.is_homogeneous

    def active_map(self, z: Array) -> ActiveMap | None:
        shape = (*z.shape[:-1], z.shape[-1] - self.inside)
        passing = np.broadcast_to(np.arange(self.inside, z.shape[-1]), shape)
        if not self.inside:
            return ActiveMap(passing, np.ones(shape, dtype=np.int64))
        found = self.act.active_map(z[..., : self.inside])
        if found is None:
            return None
        index = np.concatenate([found.index, passing], axis=-1)
        factor = np.concatenate([found.factor, np.ones(shape, dtype=np.int64)], axis=-1)
        offset = None if found.offset is None else np.concatenate([found.offset, np.zeros(shape)], axis=-1)
        return ActiveMap(index, factor, offset)

    def breakpoints(self, width: int) -> Array | None:
        return self.act.breakpoints(self.inside) if self.inside else np.empty((0, 2), dtype=np.int64)

    def thresholds(self, width: int) -> Array | None:
        return self.act.thresholds(self.inside) if self.inside else None


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
