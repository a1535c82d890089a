"""Baked networks in exact arithmetic: every float is an integer times a power of two.

Shapes: D inputs, H features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from lipexp.activations import Piece, PiecewiseLinear, declared_kinks
from lipexp.certificates import round_down
from lipexp.models import Layer

ExactArray = npt.NDArray[np.object_]  # Python integers


class ExactNetwork:
    """One baked network in exact integer arithmetic.

    Every float is an integer times a power of two, so a layer is an integer matrix and one exponent.
    """

    def __init__(self, layers: Sequence[Layer], act: PiecewiseLinear, run: int) -> None:
        self.act = act
        self.layers = [
            (integers(layer.weight[run].numpy()), integers(layer.bias[run, 0].numpy())) for layer in layers
        ]

    def gradient(self, point: npt.NDArray[np.float64]) -> tuple[ExactArray, int] | None:
        """The gradient at `point` (D,) as (integers (D,), e), standing for integers * 2^e; None on a kink."""
        pieces = self._pieces(point) or self._pieces_of_equals(point)
        if pieces is None:
            return None
        (weight, exponent), _ = self.layers[-1]
        gradient = weight[0]
        for (weight, weight_exponent), _ in reversed(self.layers[:-1]):
            piece = pieces.pop()
            back = np.full(len(gradient), 0, dtype=object)
            np.add.at(back, piece.index, piece.factor * gradient)
            gradient = back.dot(weight)
            exponent += weight_exponent + piece.exponent
        return gradient, exponent

    def _pieces(self, point: npt.NDArray[np.float64]) -> list[Piece] | None:
        """The linear piece of each hidden layer at `point`; None where the activation calls it a kink."""
        x, exponent = integers(point)
        pieces: list[Piece] = []
        for (weight, weight_exponent), bias in self.layers[:-1]:
            x, exponent = _add((weight.dot(x), weight_exponent + exponent), bias)
            piece = self.act.piece(x)
            if piece is None:
                return None
            pieces.append(piece)
            x, exponent = piece.factor * x[piece.index], exponent + piece.exponent
        return pieces

    def _pieces_of_equals(self, point: npt.NDArray[np.float64]) -> list[Piece] | None:
        """The same where features are equal, or zero, all around `point`: which makes no kink, in any order.

        Training leaves such features, and no point avoids them. They show in the affine maps of the features near
        the point, rows of value and gradient.
        """
        x, exponent = integers(point)
        lowest = min(exponent, 0)
        rows = np.diag([1 << -lowest] * len(x)).astype(object)
        rows = np.concatenate([x[:, None] << (exponent - lowest), rows], axis=1)  # (in, 1 + D)
        pieces: list[Piece] = []
        exponent = lowest
        for (weight, weight_exponent), (bias, bias_exponent) in self.layers[:-1]:
            offset = np.full((len(bias), rows.shape[1]), 0, dtype=object)
            offset[:, 0] = bias
            rows, exponent = _add((weight.dot(rows), weight_exponent + exponent), (offset, bias_exponent))
            kinks = declared_kinks(self.act, len(rows))
            if kinks is None:
                return None
            with_zero = np.concatenate([rows, 0 * rows[:1]])  # at index -1
            first, second = kinks[with_zero[kinks[:, 0], 0] == with_zero[kinks[:, 1], 0]].T
            if (with_zero[first] != with_zero[second]).any():
                return None
            piece = self.act.piece(untied(rows[:, 0]))
            if piece is None:
                return None
            pieces.append(piece)
            rows, exponent = piece.factor[:, None] * rows[piece.index], exponent + piece.exponent
        return pieces


def untied(values: ExactArray) -> npt.NDArray[np.float64]:
    """(H,) small numbers in the order of exact ones, with their signs: none is zero, and no two are equal.

    What is equal may come in any order, and zero gets any sign: for features that are so all around a point.
    """
    ranks = np.empty(len(values))
    ranks[sorted(range(len(values)), key=lambda i: values[i])] = np.arange(len(values))
    return ranks - sum(value < 0 for value in values) + 0.5


def integers(values: npt.NDArray[Any]) -> tuple[ExactArray, int]:
    """(integers, e) with values = integers * 2^e, exactly."""
    if not np.isfinite(values).all():
        raise ArithmeticError("numbers that are not finite have no exact value")
    mantissas, exponents = np.frexp(values.astype(np.float64))
    whole = np.ldexp(mantissas, 53).astype(np.int64)
    exponents = np.where(mantissas == 0, exponents.max(), exponents) - 53
    lowest = int(exponents.min())
    # Numbers of float32 end in 29 zeros or more. Without them arithmetic is faster, and most shifts fit 64 bits.
    zeros = _trailing_zeros(int(np.bitwise_or.reduce(whole, axis=None)))
    whole, shifts = whole >> zeros, exponents - lowest
    if 53 - zeros + int(shifts.max(initial=0)) < 63:
        return (whole << shifts).astype(object), lowest + zeros
    return whole.astype(object) << shifts.astype(object), lowest + zeros


def _trailing_zeros(value: int) -> int:
    """Of a binary number; 0 of 0."""
    return (value & -value).bit_length() - 1 if value else 0


def _add(a: tuple[ExactArray, int], b: tuple[ExactArray, int]) -> tuple[ExactArray, int]:
    exponent = min(a[1], b[1])
    return (a[0] << (a[1] - exponent)) + (b[0] << (b[1] - exponent)), exponent


def norm_below(integers: ExactArray, exponent: int, q: float) -> float:
    """||integers * 2^exponent||_q as a float64, rounded down."""
    sizes = [abs(int(value)) for value in integers]
    if q == 2:
        # 64 more bits before the integer square root, so that cutting off its fraction costs nothing visible.
        return round_down(Fraction(math.isqrt(sum(s * s for s in sizes) << 128)) * Fraction(2) ** (exponent - 64))
    return round_down((sum(sizes) if q == 1 else max(sizes)) * Fraction(2) ** exponent)
