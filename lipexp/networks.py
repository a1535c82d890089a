"""Networks: the blocks that they are made of, and the baked network that everything after training works on.

Shapes: K runs, B or N points, D inputs, C outputs, H width. Points are (K, B, D), outputs (K, B, C), weights
(K, out, in), biases (K, 1, out).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lipexp.activations import Activation, ActiveMap
from lipexp.exact import Exact, ExactArray, add, break_ties, integers


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


def inputs_and_output(
    layers: Sequence[Affine], act: nn.Module, x: Tensor, linear: Tensor | None = None
) -> tuple[list[Tensor], Tensor]:
    """The input of every layer at points x (K, B, D), x itself first, and the outputs (K, B, C).

    Args:
        linear: (K, C, D) A: A x is added to the outputs.
    """
    points, inputs = x, []
    for i, layer in enumerate(layers):
        if i > 0 and not (layer.is_residual or layers[i - 1].is_residual):
            x = act(x)
        inputs.append(x)
        x = layer(x, act)
    return inputs, x if linear is None else torch.baddbmm(x, points, linear.mT)


class LinearRegion(NamedTuple):
    """The affine map x -> gradient x + offset on one linear region, exactly: integers times 2^exponent."""

    gradient: ExactArray  # (C, D)
    offset: ExactArray  # (C,)
    exponent: int


@dataclass(frozen=True, repr=False)
class BakedNetwork:
    """K networks of one shape with their final, stored numbers: what is measured, proven, drawn, saved and loaded.

    f = layer_n o act o ... o act o layer_1 with plain float32 weights on the CPU, plus A x where there is a linear
    term A beside the layers, which makes a network monotone. Callers ask for outputs,
    gradients (by autograd through `inputs_and_output`), the linear region around a point and the proven norms.
    Proofs, and ascents to steep points, also look at the numbers in `layers`, where the network `is_plain`.

    Another kind of layer, such as x -> x - W diag(t) act(W^T x + b), is a named tuple of tensors (K, ...) that can
    be called as `Affine` can and whose `is_residual` is True. All that measures, evaluates and draws takes it so.
    """

    layers: Sequence[Affine]
    act: Activation  # on the CPU
    norms: Sequence[
        Sequence[float]
    ] = ()  # norms[i][k]: proven for layer i of run k, as the constraint chains them
    linear: Tensor | None = None  # (K, C, D) A, in float32

    def __repr__(self) -> str:
        sizes = " -> ".join(map(str, [self.n_inputs, *self.hidden_widths, self.n_outputs]))
        return f"BakedNetwork({self.n_runs} of {sizes}, {self.act.label})"

    @property
    def n_runs(self) -> int:
        return len(self.layers[0].weight)

    @property
    def n_inputs(self) -> int:
        return self.layers[0].weight.shape[2]

    @property
    def n_outputs(self) -> int:
        return self.layers[-1].weight.shape[1]

    @property
    def hidden_widths(self) -> list[int]:
        return [layer.weight.shape[1] for layer in self.layers[:-1]]

    def run(self, k: int) -> BakedNetwork:
        """Network k alone, as K = 1."""
        layers = [type(layer)(*(part[k : k + 1] for part in layer)) for layer in self.layers]
        linear = None if self.linear is None else self.linear[k : k + 1]
        return replace(self, layers=layers, norms=[[per_run[k]] for per_run in self.norms], linear=linear)

    @property
    def is_plain(self) -> bool:
        """Whether all layers are affine."""
        return not any(layer.is_residual for layer in self.layers)

    @cached_property
    def double(self) -> BakedNetwork:
        """The same numbers in float64."""
        layers = [type(layer)(*(part.double() for part in layer)) for layer in self.layers]
        return replace(self, layers=layers, linear=None if self.linear is None else self.linear.double())

    def __call__(self, x: Tensor) -> Tensor:
        """The outputs (K, B, C) at points (K, B, D) of the same number type."""
        return inputs_and_output(self.layers, self.act, x, self.linear)[1]

    def inputs_and_output(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """The input of every layer at points x (K, B, D), x itself first, and the outputs (K, B, C)."""
        return inputs_and_output(self.layers, self.act, x, self.linear)

    def is_finite(self, k: int) -> bool:
        """Whether all numbers of network k are finite."""
        parts = [part for layer in self.layers for part in layer]
        parts += [] if self.linear is None else [self.linear]
        return all(bool(torch.isfinite(part[k]).all()) for part in parts)

    # Saving and loading ------------------------------------------------------------------------------------------

    def state_dict(self, k: int = 0) -> dict[str, Tensor]:
        """The plain state dict of network k: `layers.<i>.weight` (out, in) and `layers.<i>.bias` (out,).

        A linear term is `linear` (C, D).
        """
        state = {}
        for i, (weight, bias) in enumerate(self.layers):
            state[f"layers.{i}.weight"] = weight[k].clone()
            state[f"layers.{i}.bias"] = bias[k, 0].clone()
        if self.linear is not None:
            state["linear"] = self.linear[k].clone()
        return state

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], act: Activation) -> BakedNetwork:
        """The network, K = 1, whose numbers `state` holds.

        Raises:
            ValueError: it is no state dict of such a network: what is missing, or does not fit.
        """
        layers: list[Affine] = []
        names = set(state) - {"linear"}
        while names:
            i = len(layers)
            parts: list[Tensor] = []
            for name, dims in ((f"layers.{i}.weight", 2), (f"layers.{i}.bias", 1)):
                part = state.get(name)
                if part is None:
                    raise ValueError(f"{name} is missing" if not i or parts else f"unexpected entry {min(names)}")
                if not isinstance(part, Tensor) or part.dtype != torch.float32:
                    kind = str(getattr(part, "dtype", type(part).__name__)).removeprefix("torch.")
                    raise ValueError(f"{name} is {kind}, not float32")
                if part.dim() != dims or part.numel() == 0:
                    raise ValueError(f"{name} has shape {tuple(part.shape)}")
                parts.append(part.detach())
                names.remove(name)
            layer = Affine(parts[0][None], parts[1][None, None])
            if layer.bias.shape[2] != layer.weight.shape[1]:
                raise ValueError(f"layers.{i} has {layer.weight.shape[1]} rows and {layer.bias.shape[2]} biases")
            if layers and layer.weight.shape[2] != layers[-1].weight.shape[1]:
                given = layers[-1].weight.shape[1]
                raise ValueError(
                    f"layers.{i} takes {layer.weight.shape[2]} features, layers.{i - 1} gives {given}"
                )
            if layers:
                act.check_width(layers[-1].weight.shape[1])
            layers.append(layer)
        if not layers:
            raise ValueError("there are no layers in it")
        linear = state.get("linear")
        if linear is None:
            return cls(layers, act)
        shape = (layers[-1].weight.shape[1], layers[0].weight.shape[2])
        if not isinstance(linear, Tensor) or linear.dtype != torch.float32 or linear.shape != shape:
            raise ValueError(f"linear is no float32 tensor of shape {shape}")
        return cls(layers, act, linear=linear.detach()[None])

    # The linear region around a point ----------------------------------------------------------------------------

    @cached_property
    def _exact_layers(self) -> list[tuple[Exact, Exact]]:
        return [(integers(weight[0].numpy()), integers(bias[0, 0].numpy())) for weight, bias in self.layers]

    def linear_region(self, point: npt.NDArray[np.float64]) -> LinearRegion | None:
        """The affine map of the linear region around `point` (D,), for K = 1 and a piecewise linear activation.

        Returns:
            None where `point` lies on the border of a region.
        """
        found = self._active_maps(point) or self._active_maps_with_ties(point)
        if found is None:
            return None
        maps, (output, output_exponent) = found
        (gradient, exponent), _ = self._exact_layers[-1]
        for ((weight, weight_exponent), _), active in zip(self._exact_layers[-2::-1], reversed(maps), strict=True):
            back = np.full(gradient.shape, 0, dtype=object)
            np.add.at(back.T, active.index, (active.factor * gradient).T)
            gradient = back.dot(weight)
            exponent += weight_exponent + active.exponent
        x, x_exponent = integers(point)
        offset, lowest = add((output, output_exponent), (-gradient.dot(x), exponent + x_exponent))
        if self.linear is not None:  # which has no part in the offset
            gradient, exponent = add((gradient, exponent), integers(self.linear[0].numpy()))
        common = min(exponent, lowest)
        return LinearRegion(gradient << (exponent - common), offset << (lowest - common), common)

    def _active_maps(self, point: npt.NDArray[np.float64]) -> tuple[list[ActiveMap], Exact] | None:
        """The active map of each hidden layer at `point`, and the outputs there; None at a breakpoint."""
        x = integers(point)
        maps: list[ActiveMap] = []
        for i, ((weight, exponent), bias) in enumerate(self._exact_layers):
            z, z_exponent = add((weight.dot(x[0]), exponent + x[1]), bias)
            if i == len(self.layers) - 1:
                return maps, (z, z_exponent)
            active = self.act.active_map(z)
            if active is None:
                return None
            maps.append(active)
            x = active.factor * z[active.index], z_exponent + active.exponent
        return None

    def _active_maps_with_ties(self, point: npt.NDArray[np.float64]) -> tuple[list[ActiveMap], Exact] | None:
        """As `_active_maps`, for points where some features are equal, or zero, in a whole neighbourhood.

        Such ties are no breakpoints: any order gives the same gradient. Training produces them, and no point
        avoids them. They show in the affine maps of the features near the point, whose rows are value and
        gradient.
        """
        x, exponent = integers(point)
        lowest = min(exponent, 0)
        rows = np.diag([1 << -lowest] * len(x)).astype(object)
        rows = np.concatenate([x[:, None] << (exponent - lowest), rows], axis=1)  # (in, 1 + D)
        maps: list[ActiveMap] = []
        exponent = lowest
        for i, ((weight, weight_exponent), (bias, bias_exponent)) in enumerate(self._exact_layers):
            offset = np.full((len(bias), rows.shape[1]), 0, dtype=object)
            offset[:, 0] = bias
            rows, exponent = add((weight.dot(rows), weight_exponent + exponent), (offset, bias_exponent))
            if i == len(self.layers) - 1:
                return maps, (rows[:, 0], exponent)
            breakpoints = self.act.breakpoints(len(rows))
            if breakpoints is None:
                return None
            with_zero = np.concatenate([rows, 0 * rows[:1]])  # a zero row at index -1
            first, second = breakpoints[with_zero[breakpoints[:, 0], 0] == with_zero[breakpoints[:, 1], 0]].T
            if (with_zero[first] != with_zero[second]).any():
                return None
            active = self.act.active_map(break_ties(rows[:, 0]))
            if active is None:
                return None
            maps.append(active)
            rows, exponent = active.factor[:, None] * rows[active.index], exponent + active.exponent
        return None


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
        shapes = [layer.weight.shape[1:] for layer in baked.layers]
        self.linear: Tensor | None
        self.register_buffer("linear", None if baked.linear is None else baked.linear[0].clone())
        self.layers = nn.ModuleList(nn.Linear(n_in, n_out) for n_out, n_in in shapes)
        self.act = baked.act
        self.load_state_dict(baked.state_dict())
        self.eval().requires_grad_(False)

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
        sizes = [self.layers[0].in_features, *(layer.out_features for layer in self.layers)]
        dtype = str(self.layers[0].weight.dtype).removeprefix("torch.")
        return f"Network({' -> '.join(map(str, sizes))}, {self.act.label}, {dtype})"

    def forward(self, x: Tensor) -> Tensor:
        points = x
        for i, layer in enumerate(self.layers):
            if i > 0:
                x = self.act(x.unsqueeze(0)).squeeze(0)  # an activation sees (K, B, H)
            x = layer(x)
        return x if self.linear is None else x + points @ self.linear.T
