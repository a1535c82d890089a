"""Exact Lipschitz constants: the linear regions of a network of one or two inputs, all of them.

A network with piecewise linear activations is affine on each of finitely many convex regions, so its Lipschitz
constant is the largest gradient norm among them. Layer by layer, the regions found so far are cut along the
breakpoints of the next activation: where z_i = 0 for ReLU, where z_i = z_j for features that are sorted together,
where z_i is a knot of a spline.
The enumeration starts from the box of the data and the parts of the plane around it, so that it gives both the
constant over the box and the one over the whole plane.

Which side of a breakpoint a region lies on is decided exactly (see `polygons`), so no region is lost. The
gradients are computed in float64 with bounds on their rounding errors, and the norm is rounded up: the constants
are proven upper bounds, some 1e-12 above the largest gradient norm.

References: Anil, Lucas and Grosse 2019 (GroupSort networks); Hanin and Rolnick 2019, "Complexity of linear regions
in deep networks" (few regions, in practice).
"""

from __future__ import annotations

import bisect
import contextlib
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from lipexp.activations import ActiveMap
from lipexp.activations.ties import untied
from lipexp.exact import Exact, ExactArray, add, integers
from lipexp.networks import BakedNetwork
from lipexp.norms import UNIT_ROUNDOFF
from lipexp.proven.regions.boundary import Boundary, find
from lipexp.proven.regions.breakpoints import Breakpoints
from lipexp.proven.regions.domain import Domain
from lipexp.proven.regions.layers import affine_layers
from lipexp.proven.regions.maps import Maps
from lipexp.proven.regions.polygons import SAFETY, TINY, ExactLine, Floats, Integers, Plane, Polygons

_CHUNK = 2**18  # numbers in one temporary array
_CACHED_MAPS = 1000  # exact maps that are kept
MOST_NUMBERS = 2**27  # of the maps of all regions onto one layer, which take a gigabyte then


class Steepest(NamedTuple):
    """The largest gradient norm, rounded up, and the centre of a region that has it."""

    value: float
    point: tuple[float, ...]


class Constants(NamedTuple):
    """What an enumeration finds."""

    everywhere: Steepest
    box: Steepest | None  # None: the box has no interior
    domain: list[list[float]]  # [low, high] of each coordinate of the box
    regions: int  # in the whole plane or line; the edges of the box count as breakpoints
    pairs: Floats | None = None  # (C, C) the constants of f_i - f_j everywhere, for the norm p; of several outputs
    boundary: Boundary | None = None  # of its decisions, if that is wanted and not given up

    def within(self, bound: float) -> Constants:
        """The same with no value above `bound`."""
        everywhere = self.everywhere._replace(value=min(self.everywhere.value, bound))
        box = self.box and self.box._replace(value=min(self.box.value, bound))
        return self._replace(everywhere=everywhere, box=box)

    def in_box(self) -> dict[str, Any] | None:
        """What metrics.json says of the constant over the box."""
        return None if self.box is None else {**self.box._asdict(), "domain": self.domain}


class TooManyRegions(Exception):
    """The cap on the number of regions is passed, or that on the memory or time that they take: it says which."""


def why_not_enumerable(network: BakedNetwork) -> str | None:
    """Why the regions of this network cannot be enumerated; None if they can."""
    if network.n_inputs > 2:
        return "is for one or two inputs"
    for width, act in network.placed:
        if not act.is_piecewise_linear:
            return f"{act.label} does not declare its active linear map"
        if act.breakpoints(width) is None:
            return f"{act.label} does not declare its breakpoints"
    return None


def constants(
    network: BakedNetwork,
    box: tuple[Floats, Floats],
    q: float,
    max_regions: int,
    seconds: float = math.inf,
    report: Callable[[str], None] | None = None,
    h: float = 2.0,
    decides: bool = False,
) -> Constants:
    """sup ||J||_{p -> h} over the box and everywhere, for one output sup ||grad f||_q with 1/p + 1/q = 1.

    Args:
        network: K = 1; `why_not_enumerable` must be None.
        box: low and high, (D,).
        seconds: after which it is given up. Most networks take a few, but where many breakpoints meet in one point
            nearly all sides have to be decided in integers.
        report: is told the number of regions after each layer.
        h: the norm of several outputs: inf, 2 where q is 2, or 1 where q is inf.
        decides: whether the boundary of its decisions is wanted as well.

    Raises:
        TooManyRegions: there are more than `max_regions`, or so many that they take too much memory or time.
        TooLarge: float64 does not hold the numbers of the network.
    """
    enumeration = Enumeration(network, box, max_regions, seconds, report)
    found = enumeration.constants(q, h)
    if decides:
        with contextlib.suppress(TooManyRegions):  # no time is left for it
            found = found._replace(boundary=enumeration.boundary())
    return found


class Enumeration:
    """The linear regions of one network.

    Args:
        max_regions, seconds: the number of regions and the time at which it is given up.
        report: see `constants`.

    Raises:
        TooManyRegions: it was given up.
        TooLarge: float64 does not hold the numbers of the network.
    """

    def __init__(
        self,
        network: BakedNetwork,
        box: tuple[Floats, Floats],
        max_regions: int,
        seconds: float = math.inf,
        report: Callable[[str], None] | None = None,
    ) -> None:
        self.seconds, self._end = seconds, time.monotonic() + seconds
        layers, self.acts = affine_layers(network)
        self.dims = network.n_inputs
        self.weights = [layer.weight[0].numpy() for layer in layers]
        self.biases = [layer.bias[0, 0].numpy() for layer in layers]
        self.linear = None if network.linear is None else network.linear[0].numpy().astype(np.float64)
        if self.dims == 1:  # a plane on which f does not depend on y
            self.weights[0] = np.concatenate([self.weights[0], np.zeros_like(self.weights[0])], axis=1)
        self.plane = Plane(self._exact_line)
        low, high = (np.asarray(end, dtype=np.float64) for end in box)
        self.domain = Domain(self.plane, low, high)
        self.cells, self.inside = self.domain.cells, self.domain.inside
        # For each hidden layer: the region of the layer before that a region is part of, and the active map there.
        self.parents: list[Integers] = []
        self.active: list[ActiveMap] = []
        # Regions are numbered through all layers; this is the number of the first region of each layer.
        self._first_region = [0]
        self._exact_maps: dict[tuple[int, int], Exact] = {}
        self._exact_layers: dict[int, tuple[Exact, Exact]] = {}
        self.maps = Maps.identity(len(self.cells), self.dims)
        for layer in range(len(self.weights) - 1):
            self._cut(layer, max_regions)
            if report is not None:
                report(f"proving: exact, {len(self.cells):,} regions")

    def _check_time(self) -> None:
        if time.monotonic() > self._end:
            raise TooManyRegions(f"not done after {self.seconds:g} s (--max-seconds)")

    # Layers ------------------------------------------------------------------------------------------------------

    def _cut(self, layer: int, max_regions: int) -> None:
        """Replace the regions by their parts on which the activation behind `layer` is linear."""
        most = min(max_regions, MOST_NUMBERS // (3 * len(self.weights[layer])))
        name = "max_regions" if most == max_regions else f"of {len(self.weights[layer])} features, a gigabyte"
        self.maps = maps = self.maps.affine(self.weights[layer], self.biases[layer])
        breakpoints = Breakpoints.of(self.acts[layer], maps.value.shape[2])
        cells = Polygons(self.cells.start, self.cells.corner, self.cells.edge, np.arange(len(self.cells)))
        where, which = self._cutting(cells, maps, layer, breakpoints)
        cutting = breakpoints.take(which)
        value, error = cutting.lines(maps, where)
        lines = self.plane.add_lines(value, error, self._first_region[layer] + where, *cutting)
        self._first_region.append(self._first_region[layer] + len(cells))
        parts = self.plane.arrange(cells, (where, lines), most)
        if parts is None:
            raise TooManyRegions(f"more than {most:,} linear regions ({name})")
        self.inside = self.inside[parts.parent]
        active = self._active_maps(parts, maps, layer, breakpoints)
        self.parents.append(parts.parent)
        self.active.append(active)
        self.cells = parts
        # The maps behind the last hidden layer are needed once, a few at a time.
        if layer < len(self.weights) - 2:
            self.maps = maps.activated(parts.parent, active)

    # Breakpoints -------------------------------------------------------------------------------------------------

    def _cutting(
        self, cells: Polygons, maps: Maps, layer: int, breakpoints: Breakpoints
    ) -> tuple[Integers, Integers]:
        """(where, which): breakpoint which[i] cuts the interior of cell where[i]; `where` ascending."""
        found = []
        counts = np.diff(cells.start)
        value, error = self.plane.corners["value"], self.plane.corners["error"]
        for n in np.unique(counts):  # all cells with n corners, as one array
            alike = np.flatnonzero(counts == n)
            for block in _blocks(alike, n * max(len(breakpoints.pairs), maps.value.shape[2])):
                self._check_time()
                corner = cells.corner[cells.start[block][:, None] + np.arange(n)]  # (P, n)
                _, gap, unsure = breakpoints.gaps(value[corner], error[corner], maps, block)
                sides = np.stack([gap < -unsure, gap > unsure]).any(axis=2)
                cut = np.logical_and.reduce(sides)
                # Where a sign is open, and would matter, it is decided in integers.
                open_ = ((np.abs(gap) <= unsure) & (unsure > 0)).any(axis=1)
                for row, m in np.argwhere(~cut & open_):
                    line = breakpoints.exact_line(m, self._exact_map(layer, int(block[row])))
                    cut[row, m] = self._exactly_cut(corner[row], line)
                rows, which = np.nonzero(cut)
                found.append((block[rows], which))
        where, which = (np.concatenate([part[i] for part in found]) for i in (0, 1))
        order = np.lexsort((which, where))
        return where[order], which[order]

    def _exactly_cut(self, corners: Integers, line: ExactLine) -> bool:
        if not any(line):
            return False
        signs = [
            sum(a * b for a, b in zip(self.plane.exact_corner(int(corner)), line, strict=True))
            for corner in corners
        ]
        return min(signs) < 0 < max(signs)

    def _active_maps(self, parts: Polygons, maps: Maps, layer: int, breakpoints: Breakpoints) -> ActiveMap:
        """The active map of the activation on each part, with numbers (P, H)."""
        act, shape = self.acts[layer], (len(parts), maps.value.shape[2])
        value, error = self.plane.corners["value"], self.plane.corners["error"]
        offset = None if act.is_homogeneous else np.empty(shape)
        found = ActiveMap(np.empty(shape, dtype=np.int64), np.empty(shape), offset)
        counts = np.diff(parts.start)
        middle = np.add.reduceat(value[parts.corner], parts.start[:-1]) / counts[:, None]
        middle_error = np.add.reduceat(error[parts.corner], parts.start[:-1]) / counts[:, None]
        middle_error = SAFETY * (middle_error + (counts[:, None] + 2) * UNIT_ROUNDOFF)  # entries are at most 1
        for block in _blocks(np.arange(len(parts)), max(len(breakpoints.pairs), shape[1])):
            self._check_time()
            points = middle[block, None], middle_error[block, None]
            z, gap, unsure = (part[:, 0] for part in breakpoints.gaps(*points, maps, parts.parent[block]))
            if not act.is_homogeneous:
                with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
                    z = z / middle[block, 2:]  # on the side of each threshold that `gap` says
            # A difference of exactly zero, which no rounding explains, is a tie as well.
            tied = (np.abs(gap) <= unsure).any(axis=1)
            exact = [self._untied(parts, int(part), layer) for part in block[tied]]
            for chosen, features in ((block[~tied], z[~tied]), (block[tied], exact)):
                if len(chosen):
                    active = act.active_map(np.asarray(features))
                    assert active is not None
                    found.put(chosen, active)
        return found

    def _untied(self, parts: Polygons, part: int, layer: int) -> ExactArray:
        """The exact z at the middle of a part, without ties: breakpoints on which it lies hold all of the part."""
        corners = parts.corner[parts.start[part] : parts.start[part + 1]]
        exact = [self.plane.exact_corner(int(corner)) for corner in corners]
        # Corners have any positive scale here, so this is no longer the centroid; it is an interior point.
        bits = max(max(abs(entry) for entry in corner).bit_length() for corner in exact)
        middle = [0, 0, 0]
        for corner in exact:
            shift = bits - max(abs(entry) for entry in corner).bit_length()
            middle = [total + (entry << shift) for total, entry in zip(middle, corner, strict=True)]
        rows, exponent = self._exact_map(layer, int(parts.parent[part]))
        return untied(self.acts[layer], (rows.dot(np.array(middle, dtype=object)), exponent), middle[2])

    # Exact arithmetic --------------------------------------------------------------------------------------------

    def _exact_line(self, line: int) -> ExactLine:
        """Line number `line`, a breakpoint, in integers, up to a positive factor."""
        region, pair, threshold = (self.plane.lines[name] for name in ("owner", "pair", "threshold"))
        layer = bisect.bisect_right(self._first_region, region[line]) - 1
        rows = self._exact_map(layer, int(region[line]) - self._first_region[layer])
        return Breakpoints(pair, threshold).exact_line(line, rows)

    def _exact_map(self, layer: int, region: int) -> Exact:
        """The affine map behind `layer` on a region of the layer before, (H, 3) integers times 2^exponent."""
        self._check_time()  # one map can take 0.1 s, and there may be one for every side of every breakpoint
        known = self._exact_maps.get((layer, region))
        if known is not None:
            return known
        if layer == 0:
            before, exponent = np.array([[1, 0, 0], [0, 1, 0]], dtype=object), 0
        else:
            active = self.active[layer - 1].take(region)
            before, exponent = self._exact_map(layer - 1, int(self.parents[layer - 1][region]))
            factor, more = integers(active.factor)
            before, exponent = factor[:, None] * before[active.index], exponent + more
            if active.offset is not None:
                offset = integers(np.stack([0 * active.offset] * 2 + [active.offset], axis=1))
                before, exponent = add((before, exponent), offset)
        if layer not in self._exact_layers:  # most layers never need them
            self._exact_layers[layer] = integers(self.weights[layer]), integers(self.biases[layer])
        (weight, weight_exponent), (bias, bias_exponent) = self._exact_layers[layer]
        exponent += weight_exponent
        lowest = min(exponent, bias_exponent)
        rows = weight.dot(before) << (exponent - lowest)
        rows[:, 2] += bias << (bias_exponent - lowest)
        if self.linear is not None and layer == len(self.weights) - 1:
            beside = np.zeros((len(rows), 3))
            beside[:, : self.dims] = self.linear
            rows, lowest = add((rows, lowest), integers(beside))
        if len(self._exact_maps) > _CACHED_MAPS:
            self._exact_maps.clear()
        self._exact_maps[layer, region] = rows, lowest
        return rows, lowest

    # The result --------------------------------------------------------------------------------------------------

    def boundary(self) -> Boundary:
        """Where the largest output changes, or the sign of a single one."""
        blocks = _blocks(np.arange(len(self.cells)), 3 * self.weights[-1].shape[1])
        parts = [self._gradients(block) for block in blocks]
        names = ("value", "error", "error_2")
        maps = Maps(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))
        return find(self.plane, self.cells, maps, self._first_region[-1])

    def constants(self, q: float, h: float = 2.0) -> Constants:
        """The largest norms of a Jacobian, and where they are; see the function `constants`."""
        norm = np.empty(len(self.cells))
        n_outputs = len(self.weights[-1])
        first, second = np.triu_indices(n_outputs, 1)
        apart = np.zeros(len(first))
        for block in _blocks(np.arange(len(self.cells)), 3 * max(self.weights[-1].shape[1], len(first))):
            maps = self._gradients(block)
            norm[block] = _operator_norm_above(maps, q, h)
            if len(first):
                difference = maps.value[:, :2, first] - maps.value[:, :2, second]
                unsure = 2 * maps.error[:, :2, None] + UNIT_ROUNDOFF * np.abs(difference)
                slopes = _norm_above(SAFETY * unsure + np.abs(difference), q)
                apart = np.maximum(apart, slopes.max(axis=0))
        pairs = np.zeros((n_outputs, n_outputs))
        pairs[first, second] = pairs[second, first] = apart
        inside = np.flatnonzero(self.inside)
        box = self._steepest(norm, inside) if len(inside) else None
        everywhere = self._steepest(norm, np.arange(len(norm)))
        if box is not None and box.value == everywhere.value:
            everywhere = box
        return Constants(everywhere, box, self.domain.sides, len(norm), pairs if len(first) else None)

    def _gradients(self, block: Integers) -> Maps:
        """The map onto the output on some regions."""
        if not self.active:
            before = self.maps.take(block)
        else:
            before = self.maps.activated(self.cells.parent[block], self.active[-1].take(block))
        maps = before.affine(self.weights[-1], self.biases[-1])
        return maps if self.linear is None else maps.plus(self.linear)

    def _steepest(self, norm: Floats, among: Integers) -> Steepest:
        region = int(among[norm[among].argmax()])
        corners = self.plane.corners["value"][self.cells.corner[slice(*self.cells.start[region : region + 2])]]
        x, y, t = corners.mean(axis=0)
        return Steepest(float(norm[region]), (x / t, y / t)[: self.dims])


def _blocks(chosen: Integers, numbers: int) -> list[Integers]:
    """`chosen` in parts, so that temporary arrays with `numbers` entries for each of them stay in the cache."""
    step = max(1, _CHUNK // numbers)
    return [chosen[i : i + step] for i in range(0, len(chosen), step)]


def _operator_norm_above(maps: Maps, q: float, h: float) -> Floats:
    """(P,) the norms p -> h of the gradients (C, 2) of maps, rounded up; see `gradients.operator_norms`.

    For p = h = 2 the square of the norm is the larger eigenvalue of the Gram matrix [[a, b], [b, d]] of the
    columns, (a + d) / 2 + hypot((a - d) / 2, b). Its terms are off by no more than 2 (C + 8) u (a + d) in all, and
    it is at least (a + d) / 2. The errors E of the maps add ||E||_2 <= ||E||_F at most.
    """
    n = maps.value.shape[2]
    if n == 1 or math.isinf(h):
        return _norm_above(np.abs(maps.value[:, :2]) + maps.error[:, :2, None], q).max(axis=1)
    if h == 1 and math.isinf(q):
        columns = (np.abs(maps.value[:, :2]) + maps.error[:, :2, None]).sum(axis=2).max(axis=1)
        return np.where(columns > 0, columns * (1 + 4 * (n + 8) * UNIT_ROUNDOFF) + TINY, 0.0)
    if not q == h == 2:
        raise ArithmeticError(f"the norms of {n} outputs are not known")
    # Scaled by powers of two, so that no square that counts underflows.
    exponent = np.frexp(np.abs(maps.value[:, :2]).max(axis=(1, 2)))[1]
    x, y = np.moveaxis(np.ldexp(maps.value[:, :2], -exponent[:, None, None]), 1, 0)  # (P, C) each
    a, b, d = ((left * right).sum(axis=1) for left, right in ((x, x), (x, y), (y, y)))
    value = np.ldexp(np.sqrt((a + d) / 2 + np.hypot((a - d) / 2, b)), exponent)
    unsure = SAFETY * np.hypot(*maps.error_2[:, :2].T) + TINY * (value > 0)
    return value * (1 + 4 * (n + 8) * UNIT_ROUNDOFF) + SAFETY * unsure


def _norm_above(sizes: Floats, q: float) -> Floats:
    """||.||_q over the second axis of non-negative numbers (N, 2, ...), rounded up."""
    # Squares may underflow; hypot's do not.
    value = np.hypot(sizes[:, 0], sizes[:, 1]) if q == 2 else np.linalg.norm(sizes, q, axis=1)
    return np.where(value > 0, value * (1 + 8 * UNIT_ROUNDOFF) + TINY, 0.0)
