"""The baked network, which everything after training works on.

Shapes: K runs, B or N points, D inputs, C outputs, H width. Points are (K, B, D), outputs (K, B, C), weights
(K, out, in), biases (K, 1, out).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lipexp.activations import Activation, ActiveMap
from lipexp.activations.ties import exact_map, untied_map
from lipexp.blocks import Affine, Block, Residual, act_width, inputs_and_output, is_activated
from lipexp.exact import Exact, ExactArray, add, integers

Choice = Callable[[Activation, Exact], ActiveMap | None]


class LinearRegion(NamedTuple):
    """The affine map x -> gradient x + offset on one linear region, exactly: integers times 2^exponent."""

    gradient: ExactArray  # (C, D)
    offset: ExactArray  # (C,)
    exponent: int


@dataclass(frozen=True, repr=False)
class BakedNetwork:
    """K networks of one shape with their final, stored numbers: what is measured, proven, drawn, saved and loaded.

    f = layer_n o act_{n-1} o ... o act_1 o layer_1 with plain float32 weights on the CPU, plus A x where there is
    a linear term A beside the layers, which makes a network monotone. A residual layer has its activation inside,
    and none beside it. Callers ask for outputs, gradients (by autograd through `inputs_and_output`), the linear
    region around a point and the proven norms. Proofs, and ascents to steep points, also look at the numbers in
    `layers`, where the network `is_plain`.
    """

    layers: Sequence[Block]
    # Of each layer, on the CPU, with float32 parameters (K, n): behind the layer, or inside a residual one. Where
    # no activation stands, as behind the last layer, the entry is not used; see `placed`.
    acts: Sequence[Activation]
    # norms[i][k]: proven for layer i of run k, as the constraint chains them
    norms: Sequence[Sequence[float]] = ()
    linear: Tensor | None = None  # (K, C, D) A, in float32
    # (K, H) of all hidden features, in float32, with which the constraint proves the network as a whole; and the
    # constants of the K runs that it has proven so
    multipliers: Tensor | None = None
    whole: Sequence[float] = ()

    def __repr__(self) -> str:
        sizes = " -> ".join(map(str, [self.n_inputs, *self.hidden_widths, self.n_outputs]))
        return f"BakedNetwork({self.n_runs} of {sizes}{self.labels})"

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
        norms, acts = [[per_run[k]] for per_run in self.norms], [act.at(act.theta[k : k + 1]) for act in self.acts]
        multipliers = None if self.multipliers is None else self.multipliers[k : k + 1]
        one = replace(self, layers=layers, acts=acts, norms=norms, linear=linear)
        return replace(one, multipliers=multipliers, whole=self.whole[k : k + 1])

    @cached_property
    def placed(self) -> Sequence[tuple[int, Activation]]:
        """The activations that the network applies, each with the number of its features, first one first."""
        widths = [act_width(self.layers, i) for i in range(len(self.layers))]
        return [(width, act) for width, act in zip(widths, self.acts, strict=True) if width]

    @property
    def labels(self) -> str:
        """The activations that are placed, as a suffix of what represents the network."""
        return "".join(f", {label}" for label in dict.fromkeys(act.label for _, act in self.placed))

    def act_constants(self, p: float) -> Sequence[float] | None:
        """Proven Lipschitz constants, in the p-norm, of the activations that stand between two layers.

        None where one of them has none.
        """
        between = [act for i, act in enumerate(self.acts) if is_activated(self.layers, i)]
        found = [constant for act in between if (constant := act.lipschitz(p)) is not None]
        return found if len(found) == len(between) else None

    @property
    def is_piecewise_linear(self) -> bool:
        """Whether all its activations declare their active maps."""
        return all(act.is_piecewise_linear for _, act in self.placed)

    @property
    def is_plain(self) -> bool:
        """Whether all layers are affine."""
        return not any(layer.is_residual for layer in self.layers)

    @property
    def affine(self) -> Sequence[Affine]:
        """The layers of a plain network."""
        return [layer for layer in self.layers if isinstance(layer, Affine)]

    @cached_property
    def double(self) -> BakedNetwork:
        """The same numbers in float64."""
        layers = [type(layer)(*(part.double() for part in layer)) for layer in self.layers]
        linear = None if self.linear is None else self.linear.double()
        return replace(self, layers=layers, acts=[act.at(act.theta.double()) for act in self.acts], linear=linear)

    def __call__(self, x: Tensor) -> Tensor:
        """The outputs (K, B, C) at points (K, B, D) of the same number type."""
        return inputs_and_output(self.layers, self.acts, x, self.linear)[1]

    def inputs_and_output(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """The input of every layer at points x (K, B, D), x itself first, and the outputs (K, B, C)."""
        return inputs_and_output(self.layers, self.acts, x, self.linear)

    def is_finite(self, k: int) -> bool:
        """Whether all numbers of network k are finite."""
        parts = [part for layer in self.layers for part in layer]
        parts += [act.theta for _, act in self.placed if act.theta.numel()]
        parts += [] if self.linear is None else [self.linear]
        return all(bool(torch.isfinite(part[k]).all()) for part in parts)

    # Saving and loading ------------------------------------------------------------------------------------------

    def state_dict(self, k: int = 0) -> dict[str, Tensor]:
        """The plain state dict of network k: `layers.<i>.weight` (out, in) and `layers.<i>.bias` (out,).

        A residual layer has `layers.<i>.t` (M,) as well, a linear term is `linear` (C, D), parameters of the
        activation are `acts.<i>` (n,), and those of a proof `multipliers` (H,).
        """
        state = {}
        for i, layer in enumerate(self.layers):
            state[f"layers.{i}.weight"] = layer.weight[k].clone()
            for name, part in list(layer._asdict().items())[1:]:
                state[f"layers.{i}.{name}"] = part[k, 0].clone()
        for i, act in enumerate(self.acts):
            if act.theta.numel():
                state[f"acts.{i}"] = act.theta[k].clone()
        for name, of_all in (("linear", self.linear), ("multipliers", self.multipliers)):
            if of_all is not None:
                state[name] = of_all[k].clone()
        return state

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], act: Activation) -> BakedNetwork:
        """The network, K = 1, whose numbers `state` holds, with the activation `act` throughout.

        Raises:
            ValueError: it is no state dict of such a network: what is missing, or does not fit.
        """
        left = dict(state)

        def take(name: str, *shape: int | None) -> Tensor:
            """An entry, as a float32 tensor of this shape; None: any size from 1."""
            part = left.pop(name, None)
            if part is None:
                raise ValueError(f"{name} is missing")
            if not isinstance(part, Tensor) or part.dtype != torch.float32:
                kind = str(getattr(part, "dtype", type(part).__name__)).removeprefix("torch.")
                raise ValueError(f"{name} is {kind}, not float32")
            fits = part.dim() == len(shape) and part.numel() > 0
            if not fits or any(n is not None and n != m for n, m in zip(shape, part.shape, strict=True)):
                wanted = f", not {tuple(shape)}" if None not in shape else ""
                raise ValueError(f"{name} has shape {tuple(part.shape)}{wanted}")
            return part.detach()

        layers: list[Block] = []
        while not layers or any(name.startswith(f"layers.{len(layers)}.") for name in left):
            i = len(layers)
            weight = take(f"layers.{i}.weight", None, None)
            n_out, n_in = weight.shape
            is_residual = f"layers.{i}.t" in left
            bias = take(f"layers.{i}.bias", n_in if is_residual else n_out)[None, None]
            if layers and (given := layers[-1].weight.shape[1]) != (n_out if is_residual else n_in):
                raise ValueError(f"layers.{i} takes {n_in} features, layers.{i - 1} gives {given}")
            if is_residual:
                layers.append(Residual(weight[None], bias, take(f"layers.{i}.t", n_in)[None, None]))
            else:
                layers.append(Affine(weight[None], bias))
        if layers[0].is_residual or layers[-1].is_residual:
            raise ValueError("its first or last layer is a residual one")
        acts = []
        for i in range(len(layers)):
            width = act_width(layers, i)
            if width:
                act.check_width(width)
            n = act.n_parameters(width) if width else 0
            theta = take(f"acts.{i}", n)[None] if n else act.theta
            acts.append(act.at(theta))
            if n and not torch.equal(act.within(theta, torch.ones(1, 1)), theta):
                raise ValueError(f"acts.{i} holds no parameters of {act.label}")
        n_inputs, widths = layers[0].weight.shape[2], [layer.weight.shape[1] for layer in layers]
        linear = take("linear", widths[-1], n_inputs)[None] if "linear" in left else None
        multipliers = take("multipliers", sum(widths[:-1]))[None] if "multipliers" in left else None
        if left:
            raise ValueError(f"unexpected entry {min(left)}")
        return cls(layers, acts, linear=linear, multipliers=multipliers)

    # The linear region around a point ----------------------------------------------------------------------------

    @cached_property
    def _exact_layers(self) -> list[list[Exact]]:
        """The parts of each layer as integers: weight (out, in), then bias, and t, as columns (n, 1)."""
        return [
            [integers(part[0].numpy().T if j else part[0].numpy()) for j, part in enumerate(layer)]
            for layer in self.layers
        ]

    def linear_region(self, point: npt.NDArray[np.float64]) -> LinearRegion | None:
        """The affine map of the linear region around `point` (D,), for K = 1 and a piecewise linear activation.

        Returns:
            None where `point` lies on the border of a region.
        """
        x, x_exponent = integers(point)
        found = self._forward((x[:, None], x_exponent), _at_point) or self._forward(
            _near(x, x_exponent), untied_map
        )
        if found is None:
            return None
        maps, (outputs, output_exponent) = found
        gradient, exponent = self._gradient(maps)
        offset, lowest = add((outputs[:, 0], output_exponent), (-gradient.dot(x), exponent + x_exponent))
        if self.linear is not None:  # which has no part in the offset
            gradient, exponent = add((gradient, exponent), integers(self.linear[0].numpy()))
        common = min(exponent, lowest)
        return LinearRegion(gradient << (exponent - common), offset << (lowest - common), common)

    def _forward(self, x: Exact, choose: Choice) -> tuple[list[ActiveMap], Exact] | None:
        """The active map of each activation that is passed, and the outputs; None at a breakpoint.

        Args:
            x: the point in its first column, (D, M); others are carried along by the linear maps.
            choose: the active map for features (H, M).
        """
        maps: list[ActiveMap] = []

        def activated(act: Activation, z: Exact) -> Exact | None:
            active = choose(act, z)
            if active is None:
                return None
            maps.append(active)
            factor, exponent = integers(active.factor)
            out = factor[:, None] * z[0][active.index], z[1] + exponent
            if active.offset is None:
                return out
            offset, exponent = integers(active.offset)
            return _plus(out, (offset[:, None], exponent))

        for i, (layer, act, parts) in enumerate(zip(self.layers, self.acts, self._exact_layers, strict=True)):
            weight, bias = parts[:2]
            z = _plus(_times((weight[0].T, weight[1]) if layer.is_residual else weight, x), bias)
            if not (layer.is_residual or is_activated(self.layers, i)):
                x = z
                continue
            inside = activated(act, z)
            if inside is None:
                return None
            if layer.is_residual:
                t = parts[2]
                back, exponent = _times(weight, (t[0] * inside[0], t[1] + inside[1]))
                inside = add(x, (-back, exponent))
            x = inside
        return maps, x

    def _gradient(self, maps: Sequence[ActiveMap]) -> Exact:
        """The Jacobian (C, D) of the layers, with these active maps."""
        left = list(maps)
        gradient, exponent = np.diag([1] * self.n_outputs).astype(object), 0

        def pulled_back(rows: ExactArray) -> tuple[ExactArray, int]:
            active = left.pop()
            factor, exponent = integers(active.factor)
            back = np.full(rows.shape, 0, dtype=object)
            np.add.at(back.T, active.index, (factor * rows).T)
            return back, exponent

        for i in reversed(range(len(self.layers))):
            (weight, weight_exponent), *others = self._exact_layers[i]
            if self.layers[i].is_residual:
                t, t_exponent = others[1]
                back, more = pulled_back(gradient.dot(weight) * t.T)
                lowest = exponent + 2 * weight_exponent + t_exponent + more
                gradient, exponent = add((gradient, exponent), (-back.dot(weight.T), lowest))
                continue
            if is_activated(self.layers, i):
                gradient, more = pulled_back(gradient)
                exponent += more
            gradient, exponent = gradient.dot(weight), exponent + weight_exponent
        return gradient, exponent


def _at_point(act: Activation, z: Exact) -> ActiveMap | None:
    return exact_map(act, (z[0][:, 0], z[1]))


def _near(x: ExactArray, exponent: int) -> Exact:
    """The point x and the axes as columns, (D, 1 + D): what `BakedNetwork._forward` makes of them is affine."""
    lowest = min(exponent, 0)
    axes = np.diag([1 << -lowest] * len(x)).astype(object)
    return np.concatenate([x[:, None] << (exponent - lowest), axes], axis=1), lowest


def _times(matrix: Exact, x: Exact) -> Exact:
    return matrix[0].dot(x[0]), matrix[1] + x[1]


def _plus(x: Exact, bias: Exact) -> Exact:
    """x (H, M) with bias (H, 1) added to its first column."""
    padded = np.zeros_like(x[0])
    padded[:, :1] = bias[0]
    return add(x, (padded, bias[1]))
