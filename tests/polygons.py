"""The linear regions of two inputs, in rational arithmetic."""

import itertools
import math
from fractions import Fraction
from typing import Any

from networks import Form, ahead, behind, curve, dot, exact_layers, groups_of, piece

from lipexp.networks import BakedNetwork


def region_gradients(network: BakedNetwork, box: Any = None) -> set[tuple[Fraction, ...]]:
    """The gradients on all linear regions of two inputs with an interior in the box (low, high), or the plane.

    Layer by layer, the lines of all breakpoints cut polygons of homogeneous corners (x, y, t), which are integers.
    """
    start = [[(s, 0, 0), (0, t, 0), (0, 0, 1)] for s in (1, -1) for t in (1, -1)]
    if box is not None:
        (x0, y0), (x1, y1) = ([int(v) for v in end] for end in box)
        start = [[(x0, y0, 1), (x1, y0, 1), (x1, y1, 1), (x0, y1, 1)]]
    forms, *layers = exact_layers(network)
    parts = [(polygon, forms) for polygon in start]
    for act, rows in zip(network.acts, layers, strict=False):
        width = len(rows[0]) - 1
        groups = groups_of(act, width)
        pairs = [pair for group in groups or [] for pair in itertools.combinations(group, 2)]
        knots = [(j, knot) for j in range(width) for knot in curve(act, j, width)[0]] if groups is None else []
        cut = []
        for polygon, forms in parts:
            gaps = [[a - b for a, b in zip(forms[i], forms[j], strict=True)] for i, j in pairs]
            for gap, (i, j) in zip(gaps, pairs, strict=True):
                gap[-1] += ahead(act, i) - ahead(act, j)
            gaps += [[*forms[j][:-1], forms[j][-1] - knot] for j, knot in knots]
            polygons = [polygon]
            for gap in gaps:
                polygons = [side for part in polygons for side in sides(part, gap)]
            for part in polygons:
                middle = [Fraction(sum(column)) for column in zip(*part, strict=True)]
                z = [dot(form, middle) / middle[-1] for form in forms]
                cut.append((part, behind(rows, forms, piece(act, z))))
        parts = cut
    return {tuple(forms[0][:2]) for _, forms in parts}


def sides(polygon: list[Any], form: Form) -> list[Any]:
    """The polygon, cut where the form is 0."""
    scale = math.lcm(*(v.denominator for v in form))
    values = [dot([int(v * scale) for v in form], corner) for corner in polygon]
    if not min(values) < 0 < max(values):
        return [polygon]
    found: list[list[Any]] = [[], []]
    around = list(zip(polygon, values, strict=True))
    for (corner, v), (after, w) in zip(around, [*around[1:], around[0]], strict=True):
        for sign, side in zip((1, -1), found, strict=True):
            if sign * v >= 0:
                side.append(corner)
            if v * w < 0:
                between = [abs(w) * a + abs(v) * b for a, b in zip(corner, after, strict=True)]
                side.append(tuple(entry // math.gcd(*between) for entry in between))
    return found
