"""Activations with parameters of their own, which every layer learns for itself."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from lipexp.activations.base import ALL_NORMS, Activation, ActiveMap, Array
from lipexp.config import ConfigError, number, whole

SLOPE_STEP = 2.0**-20  # of a spline, whose slopes are multiples of it


class Householder(Activation):
    """Reflects pairs of features at a line that each pair learns, unless they lie on its positive side.

    The pair z = (z_j, z_{j + H/2}) stays as it is where n . z >= 0, and becomes z - 2 (n . z) n elsewhere, with
    the normal n = (-sin(t / 2), cos(t / 2)) of the learned angle t. At the initial t = pi / 2 it is MaxMin, with
    the smaller feature first, as act=maxmin. The paper has the normal -n, which is that of t + 2 pi.

    Its Jacobian is orthogonal, so it is 1-Lipschitz in the 2-norm and keeps the 2-norm of a gradient. In the
    1-norm and the inf-norm a reflection may stretch by sqrt(2). As sines are no rational numbers, it is measured
    in float64, as an estimate.

    Reference: Singla, Singla and Feizi 2021, "Improved deterministic l2 robustness on CIFAR-10 and CIFAR-100"
    (arXiv 2108.04062).
    """

    norms = frozenset({2.0})

    def check_width(self, width: int) -> None:
        if width % 2:
            raise ConfigError("model.width", width, "must be even, as features are reflected in pairs")

    def n_parameters(self, width: int) -> int:
        return width // 2

    def initial(self, width: int) -> Tensor:
        return torch.full((width // 2,), torch.pi / 2)

    def forward(self, z: Tensor) -> Tensor:
        half = self.theta.unsqueeze(1) / 2
        sine, cosine = torch.sin(half), torch.cos(half)
        first, second = z.chunk(2, dim=-1)
        twice = 2 * (cosine * second - sine * first).clamp_max(0)
        return torch.cat([first + twice * sine, second - twice * cosine], dim=-1)

    def onnx(self, add: Callable[..., str], z: str, theta: str) -> str:
        n = self.theta.shape[1]
        half = add("Mul", theta, np.float32(0.5))
        sine, cosine = add("Sin", half), add("Cos", half)
        first, second = (add("Slice", z, np.array([i]), np.array([i + n]), np.array([1])) for i in (0, n))
        along = add("Sub", add("Mul", cosine, second), add("Mul", sine, first))
        twice = add("Mul", add("Min", along, np.float32(0)), np.float32(2))
        ends = add("Add", first, add("Mul", twice, sine)), add("Sub", second, add("Mul", twice, cosine))
        return add("Concat", *ends, axis=1)


class NActivation(Activation):
    """x - 2 lo below lo, -x between lo and hi, x - 2 hi above hi: three pieces in the shape of an N.

    Each feature learns its own lo <= hi, from -1/2 and 1/2. All slopes are 1 or -1, so it is 1-Lipschitz in every
    p-norm and keeps the norm of a gradient; |x| - 2 hi is the limit lo -> -inf, up to the sign. It is computed as
    x - 2 min(max(x, lo), hi), with one rounding error.

    Reference: Prach and Lampert 2023, "1-Lipschitz neural networks are more expressive with N-activations" (arXiv
    2311.06103).
    """

    norms, slopes = ALL_NORMS, (-1.0, 1.0)

    def n_parameters(self, width: int) -> int:
        return 2 * width

    def initial(self, width: int) -> Tensor:
        return torch.tensor([-0.5, 0.5]).repeat_interleave(width)

    def within(self, theta: Tensor, scale: Tensor) -> Tensor:
        first, second = theta.chunk(2, dim=1)
        return scale * torch.cat([torch.minimum(first, second), torch.maximum(first, second)], dim=1)

    def forward(self, z: Tensor) -> Tensor:
        low, high = self.theta.unsqueeze(1).chunk(2, dim=2)
        return z - 2 * torch.minimum(torch.maximum(z, low), high)

    def active_map(self, z: Array) -> ActiveMap | None:
        low, high = self.thresholds(z.shape[-1]).reshape(2, -1)
        if np.any(z == low) or np.any(z == high):
            return None
        index = np.broadcast_to(np.arange(z.shape[-1]), z.shape)
        below, above = (z < low).astype(bool), (z > high).astype(bool)
        offset = np.where(below, -2 * low, np.where(above, -2 * high, 0.0))
        return ActiveMap(index, np.where(below | above, 1.0, -1.0), offset)

    def breakpoints(self, width: int) -> Array:
        return np.stack([np.tile(np.arange(width), 2), np.full(2 * width, -1)], axis=1)

    def thresholds(self, width: int) -> Array:
        return self.theta[0].double().numpy(force=True)

    def onnx(self, add: Callable[..., str], z: str, theta: str) -> str:
        n = self.theta.shape[1] // 2
        low, high = (add("Slice", theta, np.array([i]), np.array([i + n])) for i in (0, n))
        return add("Sub", z, add("Mul", add("Min", add("Max", z, low), high), np.float32(2)))


class LipschitzSpline(Activation):
    """Piecewise linear and continuous, 0 at 0, with slopes that each feature learns, from those of |x|.

    The slopes s_k change at the knots -m h, ..., -h, 0, h, ..., m h. They are clipped to [-1, 1], so it is
    1-Lipschitz in every p-norm. The start |x| keeps the norm of a gradient, and unlike the identity it is not
    linear. The spacing h stands beside the slopes of each layer, but no gradient reaches it.

    It is computed as the sum of s_k (x_k - e_k) over all pieces, with x_k the point of the piece that is next to x
    and e_k its end that is next to 0: exact zeros but for the pieces between 0 and x. Slopes are rounded to
    multiples of 2^-20, so that float64 holds s_k x + offset_k of each piece exactly. Gradients pass as if slopes
    were neither clipped nor rounded, so that one that has reached 1 can come back.

    Args:
        n_knots: 2 m + 1, an odd number of at most 257.
        spacing: h, in the unit b^i of the features where L is not 1.

    Raises:
        ConfigError: n_knots is no such number, or spacing is not positive.

    References: Bohra, Campos, Gupta, Aziznejad and Unser 2020, "Learning activation functions in deep (spline)
    neural networks"; Ducotterd, Goujon, Bohra, Perdios, Neumayer and Unser 2022, "Improving Lipschitz-constrained
    neural networks by learning activation functions" (arXiv 2210.16222).
    """

    norms, slopes = ALL_NORMS, (-1.0, 1.0)

    def __init__(self, n_knots: int = 5, spacing: float = 0.5) -> None:
        super().__init__()
        self.n_knots = whole("n_knots", n_knots, least=1, most=257)
        if n_knots % 2 == 0:
            raise ConfigError("n_knots", n_knots, "must be odd, as one knot lies at 0")
        self.spacing = number("spacing", spacing, above=0)

    @property
    def _places(self) -> range:
        """The knots in units of h."""
        return range(-(self.n_knots // 2), self.n_knots // 2 + 1)

    def n_parameters(self, width: int) -> int:
        return (self.n_knots + 1) * width + 1

    def initial(self, width: int) -> Tensor:
        slopes = torch.tensor([-1.0, 1.0]).repeat_interleave((self.n_knots + 1) // 2 * width)
        return torch.cat([slopes, torch.tensor([self.spacing])])

    def within(self, theta: Tensor, scale: Tensor) -> Tensor:
        slopes, spacing = theta[:, :-1], theta[:, -1:]
        rounded = (slopes.clamp(-1, 1) / SLOPE_STEP).round() * SLOPE_STEP
        return torch.cat([slopes + (rounded - slopes).detach(), spacing.detach().abs() * scale], dim=1)

    def forward(self, z: Tensor) -> Tensor:
        slopes = self.theta[:, :-1].unflatten(1, (-1, 1, z.shape[-1])).unbind(1)  # (K, 1, H) each
        knots = [place * self.theta[:, -1:, None] for place in self._places]
        out = torch.zeros_like(z)
        for k, slope in enumerate(slopes):
            part = torch.maximum(z, knots[k - 1]) if k > 0 else z
            part = torch.minimum(part, knots[k]) if k < self.n_knots else part
            out = out + slope * (part - knots[k if 2 * k < self.n_knots else k - 1])
        return out

    def active_map(self, z: Array) -> ActiveMap | None:
        width = z.shape[-1]
        places, spacing = np.array(self._places), float(self.theta[0, -1])
        knots = places * spacing
        if np.any(z[..., None] == knots):
            return None
        piece = (z[..., None] > knots).astype(np.int64).sum(axis=-1)
        slopes = self.theta[0, :-1].double().numpy(force=True).reshape(-1, width)  # (n_knots + 1, H)
        # Two pieces meet at their knot; those that meet at 0 have no offset.
        offsets = np.cumsum(np.concatenate([0 * slopes[:1], -np.diff(slopes, axis=0) * places[:, None]]), axis=0)
        offsets = (offsets - offsets[self.n_knots // 2]) * spacing
        index = np.broadcast_to(np.arange(width), z.shape)
        return ActiveMap(index, slopes[piece, index], offsets[piece, index])

    def breakpoints(self, width: int) -> Array:
        features = np.repeat(np.arange(width), self.n_knots)
        return np.stack([features, np.full_like(features, -1)], axis=1)

    def thresholds(self, width: int) -> Array:
        return np.tile(np.array(self._places) * float(self.theta[0, -1]), width)

    def onnx(self, add: Callable[..., str], z: str, theta: str) -> str:
        n = (self.theta.shape[1] - 1) // (self.n_knots + 1)
        spacing = add("Slice", theta, np.array([-1]), np.array([2**31]))
        knots = [add("Mul", spacing, np.float32(place)) for place in self._places]
        out = ""
        for k in range(self.n_knots + 1):
            part = add("Max", z, knots[k - 1]) if k > 0 else z
            part = add("Min", part, knots[k]) if k < self.n_knots else part
            slope = add("Slice", theta, np.array([k * n]), np.array([(k + 1) * n]))
            part = add("Mul", slope, add("Sub", part, knots[k if 2 * k < self.n_knots else k - 1]))
            out = add("Add", out, part) if out else part
        return out

    def extra_repr(self) -> str:
        return f"n_knots={self.n_knots}, spacing={self.spacing}"
