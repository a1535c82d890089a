"""Where a network of one or two inputs changes its decision, and how far points are from there.

The decision boundary is {f = 0}, or for several outputs the points at which two of them are the largest. On each
linear region it is a part of a line: its ends are corners of the region, or lie where the line crosses an edge.
Which is which is decided exactly (see `polygons`), and the regions cover the whole plane, so that the boundary is
found wherever it lies, also where f only touches 0.

Shapes: P regions, K pieces of the boundary, N points, C outputs. A piece is a segment, or a ray.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from lipexp.norms import UNIT_ROUNDOFF, dual
from lipexp.proven.regions.breakpoints import Breakpoints
from lipexp.proven.regions.maps import Maps
from lipexp.proven.regions.polygons import SAFETY, TINY, Floats, Integers, Plane, Polygons, offsets

_CHUNK = 2**18  # numbers in one temporary array
_SMALL = 2.0**-400  # products of two such numbers keep all their digits
_UNSURE = 64 * UNIT_ROUNDOFF  # what all roundings of one distance amount to, relative to the numbers it is made of


class Boundary(NamedTuple):
    """Pieces {start + s step: 0 <= s <= most}, of which the starts and the steps are known up to errors."""

    start: Floats  # (K, 2)
    start_error: Floats  # (K,) in every p-norm
    step: Floats  # (K, 2)
    step_error: Floats  # (K,)
    most: Floats  # (K,) 1 for a segment, infinity for a ray

    def distances(self, x: Floats, p: float) -> Floats:
        """Lower bounds (N,) on the distances in the p-norm of points x (N, D) from the boundary, hardly less.

        They hold for points whose class is certain: a region on all of which f is 0 has only its edges here.
        Infinite where there is no boundary.
        """
        points = np.zeros((len(x), 2))  # one dimension is a plane in which nothing depends on y
        points[:, : x.shape[1]] = x
        found = np.full(len(x), math.inf)
        step = max(1, _CHUNK // max(1, len(self.most)))
        for i in range(0, len(x) if len(self.most) else 0, step):
            found[i : i + step] = self._nearest(points[i : i + step], p)
        return found

    def _nearest(self, x: Floats, p: float) -> Floats:
        """The smallest distance from any piece, less all errors.

        The nearest point of a piece has s ||step|| <= 2 ||start - x||, as all others are farther away than its
        start is. So only the part from a = start - x to b = a + s step with s up to that counts, and an error of
        the step counts s times. The distance of a segment from 0 is the largest min(w a, w b) over ||w||_q <= 1.
        That is attained where w is perpendicular to the segment, or where it is the steepest for one of the ends:
        whichever w is taken, and however it is rounded, the result is a lower bound but for the rounding of w a.
        """
        a = [self.start[:, i] - x[:, i, None] for i in (0, 1)]  # (N, K) each
        away, length = _length(a, p), _length(list(self.step.T), p)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            reach = 2.5 * (away + self.start_error) / np.maximum(length - self.step_error, 0)
            s = np.fmin(reach, self.most)
            b = [a[i] + s * self.step[:, i] for i in (0, 1)]
            across = np.abs(self.step[:, 0] * a[1] - self.step[:, 1] * a[0]) / _length(list(self.step.T), dual(p))
            found = np.fmax(_beyond(a, b, p), np.where(length > _SMALL, across, 0))
            error = self.start_error + s * self.step_error + _UNSURE * (away + s * length) + TINY
            found = np.nan_to_num(found - SAFETY * error, nan=0.0, posinf=0.0)
            found[away > 1 / _SMALL] = 0  # where products may overflow
        return np.maximum(found, 0).min(axis=1)


def _length(vector: list[Floats], p: float) -> Floats:
    x, y = (np.abs(part) for part in vector)
    return np.hypot(x, y) if p == 2 else x + y if p == 1 else np.maximum(x, y)


def _beyond(a: list[Floats], b: list[Floats], p: float) -> Floats:
    """The largest min(w a, w b) over those w of dual norm 1 that are the steepest for a or for b."""
    if p == 2:
        along = a[0] * b[0] + a[1] * b[1]
        ends = [np.hypot(*end) for end in (a, b)]
        return np.fmax(*(np.fmin(size, along / size) for size in ends))
    if p == 1:  # w = (+-1, +-1); for p = inf it has one entry, +-1
        a, b = ([end[0] + end[1], end[0] - end[1]] for end in (a, b))
    return np.maximum(*(np.maximum(np.minimum(v, w), -np.maximum(v, w)) for v, w in zip(a, b, strict=True)))


# Finding it ------------------------------------------------------------------------------------------------------


def pairs_of(n_outputs: int) -> Integers:
    """(M, 2) the features that are equal on the boundary; one output is compared with 0, for which -1 stands."""
    return np.array([[0, -1]]) if n_outputs == 1 else np.stack(np.triu_indices(n_outputs, 1), axis=1)


def find(plane: Plane, cells: Polygons, maps: Maps, first_region: int) -> Boundary:
    """The boundary of the decisions of maps (P, 3, C) on the polygons (P,) that tile the plane.

    Args:
        first_region: the number of the first polygon among the owners of lines, see `Plane.add_lines`.
    """
    breakpoints = Breakpoints(pairs_of(maps.value.shape[2]), None)
    where, which = _candidates(plane, cells, maps, breakpoints)
    chosen = breakpoints.take(which)
    lines = plane.add_lines(*chosen.lines(maps, where), first_region + where, *chosen)
    candidates = cells.take(where)
    of, ends = _pieces(plane, candidates, lines)
    value, error = (plane.corners[name][ends] for name in ("value", "error"))  # (K, 2, 3)
    if maps.value.shape[2] > 2:
        kept, value, error = _largest(value, error, maps, where[of], chosen.pairs[of])
        value, error = value[kept], error[kept]
    return _measured(value, error)


def _candidates(plane: Plane, cells: Polygons, maps: Maps, breakpoints: Breakpoints) -> tuple[Integers, Integers]:
    """(where, which): on cell where[i] the breakpoint which[i] may have a point."""
    found = [(np.empty(0, np.int64), np.empty(0, np.int64))]
    counts = np.diff(cells.start)
    for n in np.unique(counts):  # all cells with n corners, as one array
        alike = np.flatnonzero(counts == n)
        step = max(1, _CHUNK // (int(n) * max(len(breakpoints.pairs), maps.value.shape[2])))
        for i in range(0, len(alike), step):
            block = alike[i : i + step]
            corner = cells.corner[cells.start[block][:, None] + np.arange(n)]  # (B, n)
            points, error = (plane.corners[name][corner] for name in ("value", "error"))
            _, gap, unsure = breakpoints.gaps(points, error, maps, block)
            rows, which = np.nonzero(~((gap > unsure).all(axis=1) | (gap < -unsure).all(axis=1)))
            found.append((block[rows], which))
    where, which = (np.concatenate([part[i] for part in found]) for i in (0, 1))
    return where, which


def _pieces(plane: Plane, polygons: Polygons, lines: Integers) -> tuple[Integers, Integers]:
    """The parts of line i in polygon i, for all i: the polygons (K,), and their two ends as corners (K, 2).

    A polygon on all of which the line's function is 0 has all its edges.
    """
    counts = np.diff(polygons.start)
    line, owner = np.repeat(lines, counts), np.repeat(np.arange(len(polygons)), counts)
    sign = plane.signs(polygons.corner, line)
    following = _next(polygons.start)
    crossed = np.flatnonzero(sign * sign[following] < 0)
    corner = polygons.corner.copy()
    ends = polygons.corner[crossed], polygons.corner[following[crossed]]
    corner[crossed] = plane.meet(polygons.edge[crossed], line[crossed], ends)
    chosen = sign == 0
    chosen[crossed] = True
    corner, owner = corner[chosen], owner[chosen]
    counts = np.bincount(owner, minlength=len(polygons))
    start = offsets(counts)
    following = _next(start[np.append(True, counts > 0)])
    once = (counts[owner] != 2) | (following > np.arange(len(owner)))  # two ends make one piece
    return owner[once], np.stack([corner, corner[following]], axis=1)[once]


def _next(start: Integers) -> Integers:
    """For each entry of lists that begin and end at `start`, the next one of its list, in a cycle."""
    following = np.arange(start[-1]) + 1
    following[start[1:] - 1] = start[:-1]
    return following


def _largest(
    value: Floats, error: Floats, maps: Maps, regions: Integers, pairs: Integers
) -> tuple[Integers, Floats, Floats]:
    """The parts of pieces z_i = z_j on which no other output is surely larger: which, and the ends of all."""
    every = Breakpoints(pairs_of(maps.value.shape[2]), None)
    z, _, unsure = every.gaps(value, error, maps, regions)  # (K, 2, C), and (K, 2, 1)
    above = z - np.take_along_axis(z, pairs[:, None, :1], axis=2)
    np.put_along_axis(above, pairs[:, None, :], -math.inf, axis=2)
    above = above - unsure.max(axis=1, keepdims=True)
    first, last = above[:, 0], above[:, 1]  # (K, C) each; positive: another output is larger at that end
    with np.errstate(divide="ignore", invalid="ignore"):
        cut = first / (first - last)
    low = np.where((first > 0) & (last <= 0), cut, 0.0).max(axis=1) * (1 - 16 * UNIT_ROUNDOFF)
    high = np.where((first <= 0) & (last > 0), cut, 1.0).min(axis=1) * (1 + 16 * UNIT_ROUNDOFF)
    kept = (low <= high) & ~((first > 0) & (last > 0)).any(axis=1)
    part = np.stack([low, np.minimum(high, 1)], axis=1)[:, :, None]  # (K, 2, 1)
    inner = (part > 0) & (part < 1)
    between, unsure = ((1 - part) * ends[:, :1] + part * ends[:, 1:] for ends in (value, error))
    unsure = SAFETY * (unsure + 4 * UNIT_ROUNDOFF * np.abs(value).max(axis=1, keepdims=True) * inner)
    return np.flatnonzero(kept), between, unsure


def _measured(value: Floats, error: Floats) -> Boundary:
    """Pieces between homogeneous ends (K, 2, 3) as points and steps; those at infinity are left out.

    An end that may lie at infinity for all that is known makes the piece a ray, which is longer.
    """
    finite = (value[..., 2] > 0) & (value[..., 2] > 2 * error[..., 2])  # (K, 2)
    kept = (value[..., 2] + error[..., 2] > 0).any(axis=1)
    value, error, finite = value[kept], error[kept], finite[kept]
    # Each piece starts at the end that is not so far away.
    size = np.abs(value[..., :2]).max(axis=2)
    nearness = np.where(finite, value[..., 2] / np.maximum(size + value[..., 2], TINY), -1.0)
    order = np.stack([nearness.argmax(axis=1), 1 - nearness.argmax(axis=1)], axis=1)
    value, error, finite = (
        np.take_along_axis(value, order[..., None], 1),
        np.take_along_axis(error, order[..., None], 1),
        np.take_along_axis(finite, order, 1),
    )
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        t, t_error = value[..., 2:], error[..., 2:]
        point = value[..., :2] / t
        unsure = (error[..., :2] + np.abs(point) * t_error) / (t - t_error) + 4 * UNIT_ROUNDOFF * np.abs(point)
        start, segment = point[:, 0], finite[:, 1, None]
        direction = value[:, 1, :2] - t[:, 1] * start
        rounded = error[:, 1, :2] + np.abs(start) * t_error[:, 1] + t[:, 1] * unsure[:, 0]
        rounded += 4 * UNIT_ROUNDOFF * (np.abs(value[:, 1, :2]) + np.abs(t[:, 1] * start))
        step = np.where(segment, point[:, 1] - start, direction)
        # The rounding of the difference is within that of its two points.
        step_error = np.where(segment, unsure.sum(axis=1), rounded)
    most = np.where(finite[:, 1], 1.0, math.inf)
    errors = [SAFETY * 2 * part.max(axis=1, initial=0) + TINY for part in (unsure[:, 0], step_error)]
    # Where not even the start is known, nothing is.
    errors = [np.where(finite[:, 0], part, math.inf) for part in errors]
    return Boundary(
        np.where(finite[:, :1], start, 0.0), errors[0], np.where(finite[:, :1], step, 0.0), errors[1], most
    )
