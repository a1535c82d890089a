"""The plane on which enumerations of regions draw their lines, each of which can be had in integers."""

from __future__ import annotations

import bisect
from typing import Protocol

from lipexp.polygons import ExactLine, Integers, Plane


class Drawer(Protocol):
    """An enumeration of the regions of one network."""

    def exact_kink(self, layer: int, region: int, pair: Integers) -> ExactLine:
        """The line z_i - z_j = 0 behind `layer` in a region, in integers, up to a positive factor."""


class Sheet(Plane):
    """The plane that the regions of one network cut, or of several at once, and whose line is whose."""

    def __init__(self) -> None:
        super().__init__(self._line)
        self.box_lines: dict[int, ExactLine] = {}
        # Regions are counted on through all layers of all networks; each such block begins with one of these.
        self._first_owners: list[int] = []
        self._owners: list[tuple[Drawer, int]] = []
        self._n_owners = 0

    def number(self, regions: int, drawer: Drawer, layer: int) -> int:
        """The number of the first of so many regions, in which the kinks behind `layer` are to be drawn."""
        first = self._n_owners
        self._first_owners.append(first)
        self._owners.append((drawer, layer))
        self._n_owners += regions
        return first

    def _line(self, line: int) -> ExactLine:
        if line in self.box_lines:
            return self.box_lines[line]
        owner, pair = int(self.lines["owner"][line]), self.lines["pair"][line]
        block = bisect.bisect_right(self._first_owners, owner) - 1
        drawer, layer = self._owners[block]
        return drawer.exact_kink(layer, owner - self._first_owners[block], pair)
