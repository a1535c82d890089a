"""Smooth activations, feature by feature: torch's functions, with the exact range of their slopes.

They have no linear regions, so they are measured by interval arithmetic: each knows the hull of its slopes between
any two inputs, rounded outwards. `scaled` ones are 1-Lipschitz in every p-norm, as training under a constraint
needs; the plain ones are those of torch, for networks from elsewhere.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor, nn

from lipexp.activations import elementary
from lipexp.activations.base import ALL_NORMS, Activation
from lipexp.config import ConfigError, number
from lipexp.norms import round_up

ERROR = 2.0**-42  # of `curve`, more than it is ever off by


class Smooth(Activation):
    """c g(x) for a smooth function g, feature by feature.

    A class has g as `plain`, for training, and as `curve`, for proofs.

    Args:
        slopes: the range of g', rounded outwards.
        turns: the inputs between which g' rises or falls. Numbers next to them in float64 will do, as g' is flat
            there. Where g' jumps it is constant above.
        scaled: choose c so that the largest slope in size is 1, or hardly less. Else c = 1.
    """

    def __init__(self, slopes: tuple[float, float], turns: Sequence[float], scaled: bool = False) -> None:
        super().__init__()
        if not isinstance(scaled, bool):
            raise ConfigError("scaled", scaled, "must be true or false")
        self.turns, self.factor, self._size = tuple(turns), 1.0, max(1.0, *map(abs, slopes))
        if scaled:  # rounded down to a number of float32, so that it is the same in every number type
            nearest = np.float32(1 / max(map(abs, slopes)))
            small = Fraction(float(nearest)) * max(map(Fraction, map(abs, slopes))) <= 1
            self.factor = float(nearest if small else np.nextafter(nearest, np.float32(0)))
        least, most = (Fraction(slope) * Fraction(self.factor) for slope in slopes)
        self._slopes = (0.0 - round_up(-least), round_up(most))
        self.norms = ALL_NORMS if max(map(abs, self._slopes)) <= 1 else frozenset()

    @property
    def slopes(self) -> tuple[float, float]:
        return self._slopes

    def plain(self, z: Tensor) -> Tensor:
        """g(z), as torch computes it."""
        raise NotImplementedError

    def curve(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """g(z) and g'(z) in float64, off by less than `ERROR` times s max(1, |z|, |g(z)|), and `ERROR` s.

        Here s is the largest of 1 and |g'|. Where g' jumps, that on the left.
        """
        raise NotImplementedError

    def forward(self, z: Tensor) -> Tensor:
        return self.plain(z) if self.factor == 1 else self.factor * self.plain(z)

    def enclosed(self, z: Tensor) -> tuple[Tensor, Tensor]:
        value = self.factor * self.curve(z)[0]
        largest = torch.maximum(self.factor * z.abs(), value.abs()).clamp_min(self.factor)
        return value, 2 * ERROR * self._size * largest

    def slopes_between(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The least and the largest are attained at an end, or at a turn between the ends."""
        ends = self.curve(torch.stack([low, high]))[1]
        (least, most), (bottom, top) = ends.aminmax(dim=0), self._slopes
        for turn, slope in zip(self.turns, self._turning_slopes, strict=True):
            there = torch.where((low <= turn) & (turn <= high), slope, ends[0])
            least, most = torch.minimum(least, there), torch.maximum(most, there)
        # An end that is infinite may have no slope in float64.
        least = (self.factor * (least - 2 * ERROR * self._size)).nan_to_num(nan=bottom)
        most = (self.factor * (most + 2 * ERROR * self._size)).nan_to_num(nan=top)
        return least.clamp(bottom, top), most.clamp(bottom, top)

    @functools.cached_property
    def _turning_slopes(self) -> list[float]:
        slopes: list[float] = self.curve(torch.tensor(self.turns, dtype=torch.float64))[1].tolist()
        return slopes

    def onnx(self, add: Callable[..., str], z: str, theta: str) -> str:
        plain = self.onnx_plain(add, z)
        return plain if self.factor == 1 else add("Mul", plain, np.float32(self.factor))

    def onnx_plain(self, add: Callable[..., str], z: str) -> str:
        """g(z) by operators of ONNX."""
        raise NotImplementedError


class Tanh(Smooth):
    """tanh(x), between -1 and 1: its slope 1 - tanh(x)^2 is 1 at 0 alone, and falls to 0 on both sides."""

    def __init__(self) -> None:
        super().__init__((0.0, 1.0), (0.0,))

    def plain(self, z: Tensor) -> Tensor:
        return torch.tanh(z)

    def curve(self, z: Tensor) -> tuple[Tensor, Tensor]:
        tail = elementary.exp(-2 * z.abs())
        return z.sign() * (1 - tail) / (1 + tail), 4 * tail / (1 + tail).square()

    def onnx_plain(self, add: Callable[..., str], z: str) -> str:
        return add("Tanh", z)


class Sigmoid(Smooth):
    """4 / (1 + exp(-x)), between 0 and 4: its slope is largest at 0, where the factor of 4 makes it 1.

    Args:
        scaled: False: without that factor, with slopes from 0 to 1/4.
    """

    def __init__(self, scaled: bool = True) -> None:
        super().__init__((0.0, 0.25), (0.0,), scaled)

    def plain(self, z: Tensor) -> Tensor:
        return torch.sigmoid(z)

    def curve(self, z: Tensor) -> tuple[Tensor, Tensor]:
        value = elementary.logistic(z)
        return value, value * elementary.logistic(-z)

    def onnx_plain(self, add: Callable[..., str], z: str) -> str:
        return add("Sigmoid", z)


class Softplus(Smooth):
    """log(1 + exp(b x)) / b, ReLU without its corner: the slope 1 / (1 + exp(-b x)) rises from 0 to 1.

    Args:
        beta: b, from 1e-3 to 1e3: the corner is that of ReLU at a distance of more than some 1 / b.

    Raises:
        ConfigError: it lies outside.

    Reference: Dugas, Bengio, Belisle, Nadeau and Garcia 2001, "Incorporating second-order functional knowledge for
    better option pricing".
    """

    def __init__(self, beta: float = 1.0) -> None:
        super().__init__((0.0, 1.0), ())
        if not 1e-3 <= number("beta", beta) <= 1e3:
            raise ConfigError("beta", beta, "must be a number from 0.001 to 1000")
        self.beta = float(beta)

    def plain(self, z: Tensor) -> Tensor:
        # Above its threshold torch returns x, which at the default of 20 is off by 2e-9, too much for float64.
        return nn.functional.softplus(z, self.beta, threshold=40)

    def curve(self, z: Tensor) -> tuple[Tensor, Tensor]:
        tail = elementary.log_of_one_plus(elementary.exp(-self.beta * z.abs()))
        return z.clamp_min(0) + tail / self.beta, elementary.logistic(self.beta * z)

    def onnx_plain(self, add: Callable[..., str], z: str) -> str:
        if self.beta == 1:
            return add("Softplus", z)
        beta = np.float32(self.beta)
        return add("Div", add("Softplus", add("Mul", z, beta)), beta)


class ELU(Smooth):
    """x above 0 and a (exp(x) - 1) below: the slope is 1 above 0 and a exp(x) below.

    Args:
        alpha: a, from 0 to 16; above 1 the largest slope is a.
        scaled: divide by that slope, so that it is 1.

    Raises:
        ConfigError: alpha lies outside.

    Reference: Clevert, Unterthiner and Hochreiter 2016, "Fast and accurate deep network learning by exponential
    linear units (ELUs)" (arXiv 1511.07289).
    """

    def __init__(self, alpha: float = 1.0, scaled: bool = True) -> None:
        if not 0 <= number("alpha", alpha) <= 16:
            raise ConfigError("alpha", alpha, "must be a number from 0 to 16")
        super().__init__((0.0, max(1.0, alpha)), (0.0,), scaled)
        self.alpha = float(alpha)

    def plain(self, z: Tensor) -> Tensor:
        return nn.functional.elu(z, self.alpha)

    def curve(self, z: Tensor) -> tuple[Tensor, Tensor]:
        below = self.alpha * elementary.exp(z)
        return torch.where(z > 0, z, below - self.alpha), torch.where(z > 0, 1.0, below)

    def onnx_plain(self, add: Callable[..., str], z: str) -> str:
        return add("Elu", z, alpha=self.alpha)


class SiLU(Smooth):
    """x / (1 + exp(-x)) (also called Swish), divided by its largest slope of 1.0998.

    Its slope s(x) (1 + x s(-x)), with s(x) = 1 / (1 + exp(-x)), is 1/2 plus an odd function. It turns where
    x tanh(x / 2) = 2, since the slope of the slope is s(x) s(-x) (2 - x tanh(x / 2)), and x tanh(x / 2) rises from
    0 on both sides of 0: at 2.39936 and -2.39936, where it is 1.09984 and -0.09984.

    Args:
        scaled: False: not divided.

    Reference: Elfwing, Uchibe and Doya 2018, "Sigmoid-weighted linear units for neural network function
    approximation in reinforcement learning" (arXiv 1702.03118).
    """

    def __init__(self, scaled: bool = True) -> None:
        turn = 2.3993572805154675
        super().__init__((-0.09983932012886693, 1.099839320128867), (-turn, turn), scaled)

    def plain(self, z: Tensor) -> Tensor:
        return nn.functional.silu(z)

    def curve(self, z: Tensor) -> tuple[Tensor, Tensor]:
        right, left = elementary.logistic(z), elementary.logistic(-z)
        return z * right, right * (1 + z.clamp(-500, 500) * left)

    def onnx_plain(self, add: Callable[..., str], z: str) -> str:
        return add("Mul", z, add("Sigmoid", z))


class GELU(Smooth):
    """x P(x), with P the distribution function of the standard normal distribution, divided by its largest slope.

    With p the density, the slope P(x) + x p(x) is 1/2 plus an odd function. It turns at sqrt(2) and -sqrt(2),
    since the slope of the slope is (2 - x^2) p(x): it is 1.12890 and -0.12890 there.

    The approximation x (1 + tanh u) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3) has nearly the same slopes, from
    -0.12899 to 1.12899, at -1.41850 and 1.41850. It turns nowhere else: with a = 0.044715 and c = sqrt(2 / pi) the
    slope of the slope is 0 where c x (1 + 3 a x^2)^2 / (1 + 6 a x^2) tanh u = 1, and the left side rises with |x|.

    Args:
        approximate: "none" or "tanh", as in torch.
        scaled: False: not divided by the largest slope.

    Raises:
        ConfigError: `approximate` is neither.

    Reference: Hendrycks and Gimpel 2016, "Gaussian error linear units (GELUs)" (arXiv 1606.08415).
    """

    def __init__(self, approximate: str = "none", scaled: bool = True) -> None:
        if approximate not in ("none", "tanh"):
            raise ConfigError("approximate", approximate, "must be none or tanh")
        most, turn = (1.128904145185155, 1.4142135623730951)
        least = -0.1289041451851548
        if approximate == "tanh":
            least, most, turn = -0.12899306865877178, 1.128993068658772, 1.4185040087908283
        super().__init__((least, most), (-turn, turn), scaled)
        self.approximate = approximate

    def plain(self, z: Tensor) -> Tensor:
        return nn.functional.gelu(z, approximate=self.approximate)

    def curve(self, z: Tensor) -> tuple[Tensor, Tensor]:
        if self.approximate == "none":
            below, density = elementary.normal(z)
            return z * below, below + z.clamp(-elementary.FARTHEST, elementary.FARTHEST) * density
        near, twice = z.clamp(-10, 10), 2 * math.sqrt(2 / math.pi)  # beyond, its tails are below 2^-120
        inside = twice * (near + 0.044715 * near**3)
        right, left = elementary.logistic(inside), elementary.logistic(-inside)
        return z * right, right + near * twice * (1 + 3 * 0.044715 * near.square()) * right * left

    def onnx_plain(self, add: Callable[..., str], z: str) -> str:
        half = np.float32(0.5)
        if self.approximate == "none":
            share = add("Erf", add("Mul", z, np.float32(math.sqrt(0.5))))
        else:
            cube = add("Mul", add("Mul", z, z), add("Mul", z, np.float32(0.044715)))
            share = add("Tanh", add("Mul", add("Add", z, cube), np.float32(math.sqrt(2 / math.pi))))
        return add("Mul", z, add("Add", add("Mul", share, half), half))
