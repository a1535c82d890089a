"""The plane around a box, as the polygons with which an enumeration of regions begins."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from lipexp.proven.regions.polygons import INFINITY, ExactLine, Floats, Plane, Polygons, offsets


class Domain:
    """The box low..high and the parts around it, cut out by the lines through its sides.

    One dimension is treated as a half-plane on which nothing depends on y. A box without interior is left out: the
    plane is then cut by lines through one of its points.

    Args:
        plane: takes the lines and corners.
        low, high: (D,), D = 1 or 2.
    """

    def __init__(self, plane: Plane, low: Floats, high: Floats) -> None:
        self.plane = plane
        self.dims = len(low)
        self.sides: list[list[float]] = np.stack([low, high], axis=1).tolist()
        self.lines: dict[int, ExactLine] = {}  # index of a line -> the line in integers
        self.cells, self.inside = self._cut_out(low, high)

    def _cut_out(self, low: Floats, high: Floats) -> tuple[Polygons, npt.NDArray[np.bool_]]:
        """The polygons, and a mask that is true for the box."""
        has_box = bool((high > low).all())
        cuts = [[a, b] if has_box else [a] for a, b in zip(low.tolist(), high.tolist(), strict=True)]
        if self.dims == 1:
            cuts.append([0.0])
        lines = [self._parallels(values, axis) for axis, values in enumerate(cuts)]
        infinity = self._line(INFINITY)
        columns, rows = (range(len(part) + 1) for part in lines)
        parts, inside = [], []
        for column in columns:
            for row in rows if self.dims == 2 else rows[1:]:
                parts.append(self._part(lines, column, row, infinity))
                inside.append(has_box and column == 1 and (row == 1))
        counts = np.array([len(part) for part in parts])
        flat = [entry for part in parts for entry in part]
        return (
            Polygons(
                offsets(counts),
                np.array([corner for corner, _ in flat]),
                np.array([edge for _, edge in flat]),
                np.arange(len(parts)),
            ),
            np.array(inside),
        )

    def _parallels(self, values: Sequence[float], axis: int) -> list[int]:
        """The lines x = value, or y = value, in integers."""
        found = []
        for value in values:
            numerator, denominator = value.as_integer_ratio()
            exact = (denominator, 0, -numerator) if axis == 0 else (0, denominator, -numerator)
            found.append(self._line(exact, value, axis))
        return found

    def _line(self, exact: ExactLine, value: float = 0.0, axis: int | None = None) -> int:
        line = [0.0, 0.0, 1.0] if axis is None else [float(axis == 0), float(axis == 1), -value]
        nothing = np.array([-1])
        (number,) = self.plane.add_lines(np.array([line]), np.zeros((1, 3)), nothing, np.array([[-1, -1]]))
        self.lines[int(number)] = exact
        return int(number)

    def _part(self, lines: list[list[int]], column: int, row: int, infinity: int) -> list[tuple[int, int]]:
        """(corner, edge after it) of the part between two neighbouring lines of each axis, anticlockwise."""
        xs, ys = lines
        left, right = (xs[i] if 0 <= i < len(xs) else None for i in (column - 1, column))
        below, above = (ys[i] if 0 <= i < len(ys) else None for i in (row - 1, row))
        # The sides in anticlockwise order, each with its direction.
        walk = [(below, (1, 0)), (right, (0, 1)), (above, (-1, 0)), (left, (0, -1))]
        sides = [(line, direction) for line, direction in walk if line is not None]
        part = []
        for (line, direction), (following, after) in zip(sides, sides[1:] + sides[:1], strict=True):
            turns = direction[0] * after[1] - direction[1] * after[0]
            if turns > 0:
                part.append((self._corner(line, following, None), following))
                continue
            # The part is unbounded here. Opposite directions share one corner at infinity; others have two.
            away, back = direction, (-after[0], -after[1])
            if away == back:
                part.append((self._corner(line, infinity, away), following))
            else:
                part.append((self._corner(line, infinity, away), infinity))
                part.append((self._corner(following, infinity, back), following))
        return part

    def _corner(self, first: int, second: int, direction: tuple[int, int] | None) -> int:
        """The corner where two lines meet; `direction` says where it lies if that is at infinity."""
        a, b = self.lines[first], self.lines[second]
        x, y, t = a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]
        ahead = t if direction is None else x * direction[0] + y * direction[1]
        sign = 1 if ahead > 0 else -1
        if direction is None:
            line_x, line_y = (first, second) if a[0] else (second, first)
            ends = (-self.plane.lines["value"][line] for line in (line_x, line_y))
            over = [self.plane.lines["value"][line_x][0], self.plane.lines["value"][line_y][1]]
            value = [part[2] / scale for part, scale in zip(ends, over, strict=True)] + [1.0]
        else:
            value = [float(direction[0]), float(direction[1]), 0.0]
        (number,) = self.plane.corners.append(
            value=np.array([value]),
            error=np.zeros(
                (1, 3)
            ),  # exact: the ends of the box are float64 numbers, and the scales are powers of two
            lines=np.array([[first, second]]),
            sign=np.array([sign]),
        )
        return int(number)
