"""One baked network as a torch module, which users are handed.

Shapes: B points, D inputs, C outputs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lipexp.blocks import Affine, Block, Residual, is_activated
from lipexp.networks import BakedNetwork


class Network(nn.Module):
    """One baked network as a plain torch module, (B, D) -> (B, C): what `lipexp.load` hands out.

    | called with           | it returns                                                                      |
    |-----------------------|---------------------------------------------------------------------------------|
    | a tensor (B, D)       | a tensor (B, C), as any module: of the number type of its weights, as its input |
    | a numpy array (B, D)  | a numpy array (B, C) of the number type of its weights                          |
    | a DataFrame           | a DataFrame with the same index and the column f, or f0, f1, … for several; it  |
    |                       | has the columns x0, x1, …, as in gradients.csv, or just D columns in that order |

    `torch.jit.trace` and `torch.export` take it.
    """

    def __init__(self, baked: BakedNetwork) -> None:
        super().__init__()
        self.linear: Tensor | None
        for name, of_all in (("linear", baked.linear), ("multipliers", baked.multipliers)):
            self.register_buffer(name, None if of_all is None else of_all[0].clone())
        self.layers = nn.ModuleList(
            _ResidualLayer(*layer.weight.shape[1:]) if layer.is_residual else nn.Linear(*layer.weight.shape[:0:-1])
            for layer in baked.layers
        )
        thetas = {str(i): nn.Parameter(act.theta[0]) for i, act in enumerate(baked.acts) if act.theta.numel()}
        self.acts = nn.ParameterDict(thetas)
        self._acts, self._labels = list(baked.acts), baked.labels
        self._activated = [is_activated(baked.layers, i) for i in range(len(baked.layers))]
        self.load_state_dict(baked.state_dict())
        self.eval().requires_grad_(False)

    @property
    def baked(self) -> BakedNetwork:
        """What it computes now, as lipexp measures and proves it.

        Raises:
            ValueError: its numbers are no longer float32.
        """
        parts = [*self.parameters(), *self.buffers()]
        if any(part.dtype != torch.float32 for part in parts):
            raise ValueError("its numbers are no longer float32")
        layers: list[Block] = []
        for layer in self.layers:
            weight, *others = (part.detach().cpu() for part in layer.parameters())
            kind: Any = Residual if isinstance(layer, _ResidualLayer) else Affine
            layers.append(kind(weight[None], *(part[None, None] for part in others)))
        thetas = {name: part.detach().cpu()[None] for name, part in self.acts.items()}
        acts = [act.at(thetas.get(str(i), act.theta)) for i, act in enumerate(self._acts)]
        beside: Any = self.linear, self.multipliers
        linear, multipliers = (None if part is None else part.cpu()[None] for part in beside)
        return BakedNetwork(layers, acts, linear=linear, multipliers=multipliers)

    def __call__(self, x: Any) -> Any:
        if isinstance(x, Tensor):
            return super().__call__(x)
        weight: Any = self.layers[0].weight
        names = [f"x{i}" for i in range(weight.shape[1])]
        if hasattr(x, "columns") and set(names) & set(x.columns):
            if not set(names) <= set(x.columns):
                raise ValueError(f"the network takes the columns {', '.join(names)}, not {', '.join(map(str, x))}")
            x = x[names]
        points = torch.as_tensor(np.ascontiguousarray(x), dtype=weight.dtype, device=weight.device)
        if np.ndim(x) != 2 or points.shape[1] != weight.shape[1]:
            raise ValueError(f"the network takes points (B, {weight.shape[1]}), not {np.shape(x)}")
        f = super().__call__(points).numpy(force=True)
        if not hasattr(x, "columns"):
            return f
        import pandas as pd

        names = ["f"] if f.shape[1] == 1 else [f"f{i}" for i in range(f.shape[1])]
        return pd.DataFrame(f, index=x.index, columns=names)

    def __repr__(self) -> str:
        shapes: list[Any] = [layer.weight.shape for layer in self.layers]
        sizes = [shapes[0][1], *(n_out for n_out, _ in shapes)]
        dtype = str(self.layers[0].weight.dtype).removeprefix("torch.")
        return f"Network({' -> '.join(map(str, sizes))}{self._labels}, {dtype})"

    def forward(self, x: Tensor) -> Tensor:
        points = x
        for i, layer in enumerate(self.layers):
            act = self._acts[i]
            if str(i) in self.acts:
                act = act.at(self.acts[str(i)].unsqueeze(0))
            x = layer(x, act) if isinstance(layer, _ResidualLayer) else layer(x)
            if self._activated[i]:
                x = act(x.unsqueeze(0)).squeeze(0)  # an activation sees (K, B, H)
        return x if self.linear is None else x + points @ self.linear.T


class _ResidualLayer(nn.Module):
    """`Residual` as a module, for one network."""

    def __init__(self, n_out: int, n_in: int) -> None:
        super().__init__()
        self.weight, self.bias, self.t = (nn.Parameter(torch.empty(*n)) for n in ((n_out, n_in), (n_in,), (n_in,)))

    def forward(self, x: Tensor, act: nn.Module) -> Tensor:
        z = x @ self.weight + self.bias
        return x - (self.t * act(z.unsqueeze(0)).squeeze(0)) @ self.weight.T
