"""The plane around a box, as the polygons with which an enumeration of regions begins."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lipexp.proven.regions.polygons import INFINITY, Floats, Plane, Polygons, cross


class Domain:
    """The box low..high and the parts of the plane around it, cut out by the lines through its sides.

    One dimension is treated as the half-plane y >= 0, on which nothing depends on y. A box without interior is
    left out: the plane is then cut by lines through one of its points only.

    Args:
        plane: takes the lines and corners.
        low, high: (D,), D = 1 or 2.
    """

    def __init__(self, plane: Plane, low: Floats, high: Floats) -> None:
        self.plane = plane
        self.sides: list[list[float]] = np.stack([low, high], axis=1).tolist()
        self.cells, self.inside = self._cut_out(low, high)

    def _cut_out(self, low: Floats, high: Floats) -> tuple[Polygons, npt.NDArray[np.bool_]]:
        """The polygons, and a mask that is true for the box."""
        x, y = float(low[0]), float(low[1]) if len(low) == 2 else 0.0
        left, bottom, infinity = self._line(0, x), self._line(1, y), self._line(2, 0.0)
        origin = self._corner(left, bottom, (x, y, 1.0))
        east, west = (self._corner(bottom, infinity, (side, 0.0, 0.0)) for side in (1.0, -1.0))
        north, south = (self._corner(left, infinity, (0.0, side, 0.0)) for side in (1.0, -1.0))
        # The quadrants around the lower left corner, anticlockwise: their corners, and the edge after each corner.
        corners = [(origin, east, north), (origin, north, west), (origin, west, south), (origin, south, east)]
        edges = [(bottom, infinity, left), (left, infinity, bottom)] * 2
        quadrants = 2 * len(low)
        cells = Polygons(
            np.arange(0, 3 * quadrants + 1, 3),
            np.array(corners[:quadrants]).ravel(),
            np.array(edges[:quadrants]).ravel(),
            np.arange(quadrants),
        )
        if not (high > low).all():
            return cells, np.zeros(quadrants, dtype=bool)
        sides = [self._line(axis, float(end)) for axis, end in enumerate(high)]
        where, lines = np.repeat(np.arange(quadrants), len(sides)), np.tile(sides, quadrants)
        chosen = self.plane.cuts(cells, where, lines)
        parts = self.plane.arrange(cells, (where[chosen], lines[chosen]), 9)
        assert parts is not None
        beyond = np.isin(parts.corner, (east, north)[: len(low)])
        inside = (parts.parent == 0) & ~np.logical_or.reduceat(beyond, parts.start[:-1])
        parts.parent = np.arange(len(parts))
        return parts, inside

    def _line(self, axis: int, value: float) -> int:
        """The line x = value for axis 0, y = value for axis 1, or at infinity for axis 2; returns its index."""
        numerator, denominator = value.as_integer_ratio()
        exact = [(denominator, 0, -numerator), (0, denominator, -numerator), INFINITY][axis]
        line = [(1.0, 0.0, -value), (0.0, 1.0, -value), (0.0, 0.0, 1.0)][axis]
        no_map = np.array([-1])
        (index,) = self.plane.add_lines(np.array([line]), np.zeros((1, 3)), no_map, np.array([[-1, -1]]))
        self.plane.known[int(index)] = exact
        return int(index)

    def _corner(self, first: int, second: int, value: tuple[float, float, float]) -> int:
        """The corner where two lines meet, which is exactly `value`; returns its index."""
        axis = 2 if value[2] else int(np.argmax(np.abs(value)))
        exact = cross(self.plane.known[first], self.plane.known[second])
        (index,) = self.plane.corners.append(
            value=np.array([value]),
            error=np.zeros((1, 3)),
            lines=np.array([[first, second]]),
            sign=np.array([1 if (exact[axis] > 0) == (value[axis] > 0) else -1]),
        )
        return int(index)
