"""Small networks for tests, and the same in rational arithmetic with no code of lipexp's."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import torch

from lipexp.activations import GroupSort, ReLU
from lipexp.models import Layer


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def network(*sizes: int, runs: int = 1, seed: int = 0) -> list[Layer]:
    """Random float32 layers with these numbers of features, outputs of size 1."""
    layers = []
    for i, (n_in, n_out) in enumerate(itertools.pairwise(sizes)):
        weight = normal(runs, n_out, n_in, seed=100 * seed + 2 * i) / math.sqrt(n_in)
        layers.append(Layer(weight.float(), normal(runs, 1, n_out, seed=100 * seed + 2 * i + 1).float()))
    return layers


def by_hand(*layers: tuple[list[list[float]], list[float]]) -> list[Layer]:
    """One network from nested lists."""
    return [Layer(torch.tensor([weight]), torch.tensor([[bias]])) for weight, bias in layers]


# An independent network in rational arithmetic ------------------------------------------------------------------

Matrix = list[list[Fraction]]


def times(a: Matrix, b: Matrix) -> Matrix:
    return [
        [sum((x * y for x, y in zip(row, column, strict=True)), Fraction()) for column in zip(*b, strict=True)]
        for row in a
    ]


def fraction_layers(layers: list[Layer], run: int = 0) -> list[tuple[Matrix, Matrix]]:
    """(weight, bias as one column), exactly."""
    exact = [
        (layer.weight[run].double().tolist(), [[value] for value in layer.bias[run, 0].double().tolist()])
        for layer in layers
    ]
    return [tuple([[Fraction(v) for v in row] for row in matrix] for matrix in pair) for pair in exact]


def relu_piece(z: list[Fraction]) -> Matrix:
    """The Jacobian of ReLU at z."""
    assert all(z)
    return [[Fraction(i == j and z[i] > 0) for j in range(len(z))] for i in range(len(z))]


def maxmin_piece(z: list[Fraction]) -> Matrix:
    """The Jacobian at z of sorting neighbours in pairs."""
    source = list(range(len(z)))
    for i in range(0, len(z), 2):
        assert z[i] != z[i + 1]
        if z[i] > z[i + 1]:
            source[i], source[i + 1] = i + 1, i
    return [[Fraction(source[i] == j) for j in range(len(z))] for i in range(len(z))]


def fraction_gradient(layers: list[Layer], piece, point, run: int = 0) -> list[Fraction]:
    x = [[Fraction(float(v))] for v in point]
    jacobian: Matrix = [[Fraction(i == j) for j in range(len(x))] for i in range(len(x))]
    for i, (weight, bias) in enumerate(fraction_layers(layers, run)):
        if i > 0:
            linear = piece([v for (v,) in x])
            x, jacobian = times(linear, x), times(linear, jacobian)
        x = [[a + b] for (a,), (b,) in zip(times(weight, x), bias, strict=True)]
        jacobian = times(weight, jacobian)
    return jacobian[0]


def relu_patterns(width: int):
    for signs in itertools.product((-1, 1), repeat=width):
        yield relu_piece([Fraction(s) for s in signs])


def maxmin_patterns(width: int):
    for swaps in itertools.product((0, 1), repeat=width // 2):
        yield maxmin_piece([Fraction(value) for swap in swaps for value in ((1, 0) if swap else (0, 1))])


def greatest_power(layers: list[Layer], patterns, q: float) -> Fraction:
    """The largest ||gradient||_q (q = 2: its square) over every pattern of pieces, reachable or not."""
    (first, _), *rest = fraction_layers(layers)
    jacobians = [first]
    for weight, _ in rest:
        pieces = list(patterns(len(jacobians[0])))
        jacobians = [times(weight, times(piece, jacobian)) for piece in pieces for jacobian in jacobians]
    return max(power(jacobian[0], q) for jacobian in jacobians)


def power(vector: list[Fraction], q: float) -> Fraction:
    """||vector||_q, for q = 2 its square."""
    if q == 2:
        return sum((v * v for v in vector), Fraction())
    return sum(map(abs, vector), Fraction()) if q == 1 else max(map(abs, vector))


def is_rounded_down(value: float, true_power: Fraction, q: float) -> bool:
    """`value` is the largest float64 that is no more than the norm."""
    exponent = 2 if q == 2 else 1
    above = math.nextafter(value, math.inf)
    return Fraction(value) ** exponent <= true_power < Fraction(above) ** exponent


PIECEWISE = {
    "relu": (ReLU(), relu_piece, relu_patterns),
    "maxmin": (GroupSort(group_size=2, neighbours=True), maxmin_piece, maxmin_patterns),
}
