"""The linear regions of a network as cones of rational corners, with no code of lipexp's but its definitions."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

from lipexp.activations import Elementwise, GroupSort, PiecewiseLinear
from lipexp.models import Layer


def gradients_by_hand(layers: list[Layer], act: PiecewiseLinear, box) -> set[tuple[Fraction, Fraction]]:
    """The gradients on all regions within the box (the plane: None) that have an interior.

    A pattern is the order of features, or their signs. Those that hold nowhere are found by cutting the plane, as
    cones of homogeneous corners, with Fractions.
    """
    one, none = Fraction(1), Fraction(0)
    if box is None:
        start = [
            [(s * one, none, none), (none, t * one, none), (none, none, one)] for s in (1, -1) for t in (1, -1)
        ]
    else:
        (x0, y0), (x1, y1) = (tuple(Fraction(float(v)) for v in end) for end in box)
        start = [[(x0, y0, one), (x1, y0, one), (x1, y1, one), (x0, y1, one)]]
    found: set[tuple[Fraction, Fraction]] = set()
    for cone in start:
        follow(layers, act, cone, [(one, none, none), (none, one, none)], 0, found)
    return found


def follow(layers, act, cone, features, i, found) -> None:
    weight, bias = layers[i].weight[0].tolist(), layers[i].bias[0, 0].tolist()
    forms = [
        tuple(sum(Fraction(w) * form[c] for w, form in zip(row, features, strict=True)) for c in (0, 1, 2))
        for row in weight
    ]
    forms = [(x, y, t + Fraction(b)) for (x, y, t), b in zip(forms, bias, strict=True)]
    if i == len(layers) - 1:
        found.add(forms[0][:2])
        return
    if isinstance(act, Elementwise):
        for part, signs in split(cone, forms):
            out = [
                form if sign >= 0 else tuple(Fraction(act.slope) * v for v in form)
                for form, sign in zip(forms, signs, strict=True)
            ]
            follow(layers, act, part, out, i + 1, found)
        return
    assert isinstance(act, GroupSort)
    n, size = len(forms), act.size(len(forms))
    places = [(g * size, 1) if act.neighbours else (g, n // size) for g in range(n // size)]  # first, distance
    groups = [[first + k * distance for k in range(size)] for first, distance in places]
    pairs = [pair for group in groups for pair in itertools.combinations(group, 2)]
    gaps = [tuple(a - b for a, b in zip(forms[j], forms[k], strict=True)) for j, k in pairs]
    for part, signs in split(cone, gaps):
        larger = dict(zip(pairs, signs, strict=True))
        larger |= {(k, j): -sign or -1 for (j, k), sign in larger.items()}  # equal ones in any order
        out = list(forms)
        for group in groups:
            for j in group:
                out[group[sum(larger[j, k] >= 0 for k in group if k != j)]] = forms[j]
        follow(layers, act, part, out, i + 1, found)


def split(cone, forms):
    """(part, signs of the forms on it), for all parts with interior."""
    parts = [(cone, [])]
    for form in forms:
        parts = [(side, [*signs, sign]) for corners_, signs in parts for sign, side in sides(corners_, form)]
    return parts


def sides(cone, form):
    values = [sum(a * b for a, b in zip(form, corner, strict=True)) for corner in cone]
    if not (min(values) < 0 < max(values)):
        return [((max(values) > 0) - (min(values) < 0), cone)]
    kept = []
    for sign in (1, -1):
        side = []
        around = list(zip(cone, values, strict=True))
        for (corner, value), (after, following) in itertools.pairwise([*around, around[0]]):
            if sign * value >= 0:
                side.append(corner)
            if value * following < 0:
                a, b = abs(following), abs(value)
                side.append(tuple(a * u + b * w for u, w in zip(corner, after, strict=True)))
        kept.append((sign, side))
    return kept


def largest(gradients: set[tuple[Fraction, Fraction]], q: float) -> float:
    if q == 2:
        square = max(x * x + y * y for x, y in gradients)
        # More digits than float64 has, before the root.
        return math.isqrt(int(square * 2**240)) / 2**120
    return float(max(abs(x) + abs(y) if q == 1 else max(abs(x), abs(y)) for x, y in gradients))
