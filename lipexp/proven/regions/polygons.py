"""The plane, cut by lines into convex polygons, with exact decisions.

Points and lines are homogeneous: a point v = (x, y, t), t >= 0, stands for (x, y) / t, and for a point at infinity
where t = 0; a line c is the set c . v = 0, and its sides are the signs of c . v. Unbounded polygons need no
special treatment, so an enumeration covers the whole plane.

Each corner is stored as the two lines that meet there, and each line is available in exact integers. In float64
corners and lines carry bounds on their rounding errors. Where such a bound leaves a sign open, which is rare, the
sign of the determinant of three lines is computed in integers. So no polygon is lost, however thin, and none is
cut by a line that only touches it.

Reference: Shewchuk 1997, "Adaptive precision floating-point arithmetic and fast robust geometric predicates", for
the filter; the error bounds here are simpler and looser.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lipexp.norms import UNIT_ROUNDOFF

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
ExactLine = tuple[int, int, int]

# A bound that is itself computed in float64 is enlarged by this; the least normal number covers underflow.
SAFETY, TINY = 1.001, 2.0**-1000
INFINITY = (0, 0, 1)  # the line t = 0


class Table:
    """A table of rows that grows in blocks, stored as one array per column."""

    def __init__(self, **columns: tuple[tuple[int, ...], type]) -> None:
        self.size = 0
        self._columns: dict[str, npt.NDArray[Any]] = {
            name: np.empty((64, *shape), dtype) for name, (shape, dtype) in columns.items()
        }

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        return self._columns[name][: self.size]

    def append(self, **blocks: npt.NDArray[Any]) -> Integers:
        """Append one block per column; returns the indices of the new rows."""
        n = len(next(iter(blocks.values())))
        for name, block in blocks.items():
            column = self._columns[name]
            if self.size + n > len(column):
                column = np.concatenate([column, np.empty((self.size + n, *column.shape[1:]), column.dtype)])
                self._columns[name] = column
            column[self.size : self.size + n] = block
        self.size += n
        return np.arange(self.size - n, self.size)


@dataclass
class Polygons:
    """P convex polygons: the corners of polygon i are the entries start[i] to start[i + 1], in cyclic order."""

    start: Integers  # (P + 1,)
    corner: Integers  # (E,) indices of corners
    edge: Integers  # (E,) the line from this corner to the next
    parent: Integers  # (P,) a number that the parts of a polygon inherit

    def __len__(self) -> int:
        return len(self.parent)

    def take(self, chosen: Integers) -> Polygons:
        counts = np.diff(self.start)[chosen]
        entries = ranges(self.start[chosen], counts)
        return Polygons(offsets(counts), self.corner[entries], self.edge[entries], self.parent[chosen])

    @staticmethod
    def join(parts: Sequence[Polygons]) -> Polygons:
        return Polygons(
            offsets(np.concatenate([np.diff(part.start) for part in parts])),
            np.concatenate([part.corner for part in parts]),
            np.concatenate([part.edge for part in parts]),
            np.concatenate([part.parent for part in parts]),
        )


def offsets(counts: Integers) -> Integers:
    """(P + 1,) where lists with these numbers of entries begin and end when they are joined."""
    return np.concatenate([[0], np.cumsum(counts)])


def ranges(starts: Integers, counts: Integers) -> Integers:
    """Concatenated ranges: `counts[i]` consecutive integers from `starts[i]`, for each i."""
    before = np.cumsum(counts) - counts
    return np.repeat(starts - before, counts) + np.arange(int(counts.sum()))


def scaled(values: Floats, error: Floats) -> tuple[Floats, Floats]:
    """Rows of (N, 3), each multiplied by the power of two that brings its largest entry between 1/2 and 1."""
    x, y, t = np.abs(values).T  # ufunc.reduce over an axis of length 3 takes ten times as long
    exponent = -np.frexp(np.maximum(np.maximum(x, y), t))[1][:, None]
    return np.ldexp(values, exponent), np.ldexp(error, exponent)


def dot(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """(N,) the dot products of rows (N, 3); for truth values, whether both are true in some column."""
    return np.einsum("ij,ij->i", a, b)


class Plane:
    """The lines and corners of a partition, and the signs of corners with respect to lines.

    Args:
        exact: returns line i as three integers, up to any positive factor, unless it is in `known`.
    """

    def __init__(self, exact: Callable[[int], ExactLine]) -> None:
        self._exact = exact
        self.known: dict[int, ExactLine] = {}
        # `owner`, `pair` and `threshold` say which difference of two features a line is: see `add_lines`.
        self.lines = Table(
            value=((3,), np.float64),
            error=((3,), np.float64),
            owner=((), np.int64),
            pair=((2,), np.int64),
            threshold=((), np.float64),
        )
        self.corners = Table(
            value=((3,), np.float64), error=((3,), np.float64), lines=((2,), np.int64), sign=((), np.int64)
        )

    def add_lines(
        self, value: Floats, error: Floats, owner: Integers, pair: Integers, threshold: Floats | None = None
    ) -> Integers:
        """Append lines (N, 3) that are off by at most `error`; returns their indices.

        Args:
            owner, pair, threshold: the line z_i - z_j = c of an affine map z has the pair (i, j), the threshold c
                (None: 0), and the index of that map as owner, which is -1 for a line that belongs to no map.
        """
        value, error = scaled(value, error)
        threshold = np.zeros(len(value)) if threshold is None else threshold
        return self.lines.append(value=value, error=error, owner=owner, pair=pair, threshold=threshold)

    def exact_line(self, line: int) -> ExactLine:
        """The line in integers, up to a positive factor."""
        return self.known[line] if line in self.known else self._exact(line)

    def exact_corner(self, corner: int) -> ExactLine:
        """The corner in integers, up to a positive factor."""
        first, second = self.corners["lines"][corner]
        sign = int(self.corners["sign"][corner])
        x, y, t = cross(self.exact_line(int(first)), self.exact_line(int(second)))
        return sign * x, sign * y, sign * t

    # Signs -----------------------------------------------------------------------------------------------------

    def signs(self, corners: Integers, lines: Integers) -> Integers:
        """(N,) the sign of line i at corner i: -1, 0 or 1, exactly."""
        point, point_error = self.corners["value"][corners], self.corners["error"][corners]
        line, line_error = self.lines["value"][lines], self.lines["error"][lines]
        size, line_size = np.abs(point), np.abs(line)
        most = size + point_error
        value = dot(point, line)
        error = dot(line_size, point_error) + dot(line_error, most)
        error = SAFETY * (error + 4 * UNIT_ROUNDOFF * dot(size, line_size))
        # A product of two nonzero numbers may underflow to zero.
        error += TINY * dot(most > 0, line_size + line_error > 0)
        signs = np.sign(value).astype(np.int64)
        open_ = np.flatnonzero((np.abs(value) <= error) & ((value != 0) | (error != 0)))
        if len(open_):
            signs[open_] = 0
            rest = open_[~self._meets(corners[open_], lines[open_])]
            for i in rest:
                signs[i] = self.exact_sign(int(corners[i]), int(lines[i]))
        return signs

    def exact_sign(self, corner: int, line: int) -> int:
        """The sign of a line at a corner, in integers."""
        value = sum(a * b for a, b in zip(self.exact_corner(corner), self.exact_line(line), strict=True))
        return (value > 0) - (value < 0)

    def _meets(self, corners: Integers, lines: Integers) -> npt.NDArray[np.bool_]:
        """Whether a line goes through the corner because z_a = z_b and z_b = z_c there, and it is z_a = z_c."""
        first, second = self.corners["lines"][corners].T
        owner, pair, threshold = (self.lines[name] for name in ("owner", "pair", "threshold"))
        same = (owner[first] == owner[lines]) & (owner[second] == owner[lines]) & (owner[lines] >= 0)
        same &= (threshold[first] == 0) & (threshold[second] == 0) & (threshold[lines] == 0)
        a, b, c = pair[first], pair[second], np.sort(pair[lines], axis=1)
        found = np.zeros(len(corners), dtype=bool)
        for i in (0, 1):
            for j in (0, 1):
                ends = np.sort(np.stack([a[:, 1 - i], b[:, 1 - j]], axis=1), axis=1)
                found |= (a[:, i] == b[:, j]) & (ends == c).all(axis=1)
        return found & same

    # Corners ---------------------------------------------------------------------------------------------------

    def meet(self, edges: Integers, lines: Integers, ends: tuple[Integers, Integers]) -> Integers:
        """Append the corners where lines cross edges, strictly between the edges' ends; returns their indices."""
        value, error = _cross_floats(
            (self.lines["value"][edges], self.lines["error"][edges]),
            (self.lines["value"][lines], self.lines["error"][lines]),
        )
        value, error = scaled(value, error)
        u, w = (self.corners["value"][end] for end in ends)
        u_error = self.corners["error"][ends[0]]
        # The corner is a positive combination of the ends. Where one of them is finite, its t is positive.
        finite = (u[:, 2] > 0) | (w[:, 2] > 0)
        # Both at infinity, less than half a turn apart: the corner lies on the side of u on which w lies.
        side, side_error = _turn(u, u_error, value, error)
        other, other_error = _turn(u, u_error, w, self.corners["error"][ends[1]])
        sign = np.where(finite, np.sign(value[:, 2]), np.sign(side) * np.sign(other)).astype(np.int64)
        certain = np.where(
            finite,
            np.abs(value[:, 2]) > error[:, 2],
            (np.abs(side) > side_error) & (np.abs(other) > other_error),
        )
        for i in np.flatnonzero(~certain):
            sign[i] = self._exact_orientation(int(edges[i]), int(lines[i]), int(ends[0][i]), int(ends[1][i]))
        pair = np.stack([edges, lines], axis=1)
        return self.corners.append(value=sign[:, None] * value, error=error, lines=pair, sign=sign)

    def _exact_orientation(self, edge: int, line: int, u: int, w: int) -> int:
        """The sign s for which s (edge x line) is a positive combination of the corners u and w."""
        x, y, t = cross(self.exact_line(edge), self.exact_line(line))
        if t != 0:
            return 1 if t > 0 else -1
        (u_x, u_y, _), (w_x, w_y, _) = self.exact_corner(u), self.exact_corner(w)
        return 1 if (u_x * y - u_y * x > 0) == (u_x * w_y - u_y * w_x > 0) else -1

    # Cutting ---------------------------------------------------------------------------------------------------

    def cuts(self, polygons: Polygons, of: Integers, lines: Integers) -> npt.NDArray[np.bool_]:
        """(N,) whether line i has corners of polygon of[i] strictly on both sides."""
        counts = np.diff(polygons.start)[of]
        sign = self.signs(polygons.corner[ranges(polygons.start[of], counts)], np.repeat(lines, counts))
        start = offsets(counts)[:-1]
        return (np.minimum.reduceat(sign, start) < 0) & (np.maximum.reduceat(sign, start) > 0)

    def cut(self, polygons: Polygons, lines: Integers) -> Polygons:
        """Both parts of each polygon i, which line i cuts: the P parts on the positive sides, then the others."""
        sign = self.signs(polygons.corner, np.repeat(lines, np.diff(polygons.start)))
        line = np.repeat(lines, np.diff(polygons.start))
        following = np.arange(len(sign)) + 1
        following[polygons.start[1:] - 1] = polygons.start[:-1]
        crossed = np.flatnonzero(sign * sign[following] < 0)
        new = np.full(len(sign), -1)
        ends = polygons.corner[crossed], polygons.corner[following[crossed]]
        new[crossed] = self.meet(polygons.edge[crossed], line[crossed], ends)
        return Polygons.join([_side(polygons, side * sign, following, new, line) for side in (1, -1)])

    def arrange(self, polygons: Polygons, lists: Sequence[Integers], most: int) -> Polygons | None:
        """Cut each polygon with the lines that `lists` has for it, until none of them cuts any part.

        Each polygon is cut by the line in the middle of its list first, and its other lines are then tried on both
        parts. This takes far fewer tests than trying each line on all parts in turn.

        Args:
            lists: (where, lines): line lines[i] cuts polygon where[i]; `where` ascending.
            most: the largest number of polygons; None is returned when there would be more.
        """
        where, lines = lists
        done: list[Polygons] = []
        n_done = 0
        while len(polygons):
            counts = np.bincount(where, minlength=len(polygons))
            finished = np.flatnonzero(counts == 0)
            done.append(polygons.take(finished))
            n_done += len(finished)
            rest = np.flatnonzero(counts)
            # Each line that cuts a polygon adds at least one part.
            so_far = n_done + len(rest)
            if so_far + len(lines) > most and so_far + self._distinct(where, lines) > most:
                return None
            if not len(rest):
                break
            counts = counts[rest]
            first = offsets(counts)[:-1]
            middle = first + counts // 2
            polygons = self.cut(polygons.take(rest), lines[middle])
            others = np.ones(len(lines), dtype=bool)
            others[middle] = False
            where, lines = np.repeat(np.arange(len(rest)), counts)[others], lines[others]
            where, lines = np.concatenate([where, where + len(rest)]), np.concatenate([lines, lines])
            if len(where):
                still = self.cuts(polygons, where, lines)
                where, lines = where[still], lines[still]
        return Polygons.join(done)

    def _distinct(self, where: Integers, lines: Integers) -> int:
        """The number of lines in all polygons; lines of one polygon that are equal in float64 count once."""
        value = self.lines["value"][lines]
        largest = np.take_along_axis(value, np.abs(value).argmax(axis=1)[:, None], axis=1)
        # Copies of one line may have different scales, and differ by rounding errors.
        return len(np.unique(np.column_stack([where, np.round(value / largest, 9)]), axis=0))


def _side(part: Polygons, sign: Integers, following: Integers, new: Integers, line: Integers) -> Polygons:
    """The parts of polygons, cut by `line` (E,), that lie where `sign` (E,) is positive.

    Args:
        following: (E,) the entry of the next corner.
        new: (E,) the corner where the edge after an entry is cut, or -1.
    """
    # Each entry has two places: for the corner itself, and for a new corner on the edge after it.
    keeps, cuts = sign >= 0, new >= 0
    kept = np.stack([keeps, cuts], axis=1)
    corner = np.stack([part.corner, new], axis=1)
    # Where the boundary leaves this side, it continues along the line.
    leaves = (sign == 0) & (sign[following] < 0)
    edge = np.stack([np.where(leaves, line, part.edge), np.where(sign > 0, line, part.edge)], axis=1)
    counts = np.add.reduceat(keeps.astype(np.int64) + cuts, part.start[:-1])
    return Polygons(offsets(counts), corner[kept], edge[kept], part.parent)


def cross(a: ExactLine, b: ExactLine) -> ExactLine:
    """The point where two lines meet, up to a factor."""
    return a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]


def _cross_floats(first: tuple[Floats, Floats], second: tuple[Floats, Floats]) -> tuple[Floats, Floats]:
    """The cross products of rows (N, 3), each with its error bound."""
    (a, a_error), (b, b_error) = first, second
    one, two = [1, 2, 0], [2, 0, 1]
    left, right = a[:, one] * b[:, two], a[:, two] * b[:, one]
    error = _product_error(a[:, one], a_error[:, one], b[:, two], b_error[:, two])
    error += _product_error(a[:, two], a_error[:, two], b[:, one], b_error[:, one])
    return left - right, SAFETY * (error + 2 * UNIT_ROUNDOFF * (np.abs(left) + np.abs(right)))


def _product_error(a: Floats, a_error: Floats, b: Floats, b_error: Floats) -> Floats:
    """How far the product of two numbers with errors is off, before it is rounded itself."""
    a_most, b_most = np.abs(a) + a_error, np.abs(b) + b_error
    return np.abs(a) * b_error + a_error * b_most + TINY * ((a_most > 0) & (b_most > 0))


def _turn(u: Floats, u_error: Floats, w: Floats, w_error: Floats) -> tuple[Floats, Floats]:
    """u_x w_y - u_y w_x, which is positive where w lies to the left of u, with its error bound."""
    first, second = u[:, 0] * w[:, 1], u[:, 1] * w[:, 0]
    error = _product_error(u[:, 0], u_error[:, 0], w[:, 1], w_error[:, 1])
    error += _product_error(u[:, 1], u_error[:, 1], w[:, 0], w_error[:, 0])
    return first - second, SAFETY * (error + 2 * UNIT_ROUNDOFF * (np.abs(first) + np.abs(second)))
