"""Where an activation changes its affine map, at homogeneous points.

Shapes: P polygons, H features, M breakpoints. A homogeneous point (x, y, t) is t times (x, y, 1), and so are the
features there.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lipexp.activations import Activation
from lipexp.exact import Exact, add, integers
from lipexp.norms import UNIT_ROUNDOFF
from lipexp.proven.regions.maps import Maps
from lipexp.proven.regions.polygons import SAFETY, TINY, ExactLine, Floats, Integers


class Breakpoints(NamedTuple):
    """The breakpoints z_i - z_j = c of a layer, or z_i = c for j = -1."""

    pairs: Integers  # (M, 2) i and j
    thresholds: Floats | None  # (M,) c; None: 0

    @classmethod
    def of(cls, act: Activation, width: int) -> Breakpoints:
        pairs = act.breakpoints(width)
        assert pairs is not None
        return cls(pairs, act.thresholds(width))

    def take(self, chosen: Integers) -> Breakpoints:
        return Breakpoints(self.pairs[chosen], None if self.thresholds is None else self.thresholds[chosen])

    def gaps(self, points: Floats, error: Floats, maps: Maps, regions: Integers) -> tuple[Floats, Floats, Floats]:
        """z, z_i - z_j - c t, and a bound on the errors of these differences, at homogeneous points.

        Args:
            points, error: (P, n, 3), off by at most `error`.
            maps: those onto the features.
            regions: (P,) of `maps`.

        Returns:
            (P, n, H), (P, n, M) and (P, n, 1).
        """
        z = points @ maps.value[regions]
        size, own = (part[regions][:, None] for part in (maps.size, maps.error))  # (P, 1, 3)
        most = np.abs(points) + error
        single = (
            size * error + own * most + 4 * UNIT_ROUNDOFF * size * most + TINY * ((size + own > 0) & (most > 0))
        )
        unsure = 3 * single.sum(axis=-1, keepdims=True)  # of two features, and of their difference
        first, second = self.pairs.T
        found = z[..., first]
        if (second >= 0).any():
            found = found - np.where(second < 0, 0.0, z[..., second])
        if self.thresholds is not None:
            found = found - self.thresholds * points[..., 2:]
            largest = float(np.abs(self.thresholds).max(initial=0))
            distance = largest * (error[..., 2:] + 4 * UNIT_ROUNDOFF * most[..., 2:]) + TINY * (largest > 0)
            unsure = SAFETY * (unsure * (1 + 4 * UNIT_ROUNDOFF) + distance)
        return z, found, unsure

    def lines(self, maps: Maps, regions: Integers) -> tuple[Floats, Floats]:
        """The lines (M, 3) of breakpoint m on region m of `maps`, with their error bounds."""
        first = maps.value[regions, :, self.pairs[:, 0]]
        second = np.where(self.pairs[:, 1:] < 0, 0.0, maps.value[regions, :, self.pairs[:, 1]])
        value = first - second
        rounding = np.abs(value)
        if self.thresholds is not None:
            value[:, 2] -= self.thresholds
            rounding += np.abs(value)
        return value, SAFETY * (2 * maps.error[regions] + UNIT_ROUNDOFF * rounding)

    def exact_line(self, m: int, rows: Exact) -> ExactLine:
        """The line of breakpoint m in integers, up to a positive factor, from the exact map (H, 3) onto z."""
        i, j = self.pairs[m]
        line = rows[0][i] if j < 0 else rows[0][i] - rows[0][j]
        if self.thresholds is not None and self.thresholds[m]:
            line, _ = add((line, rows[1]), integers(np.array([0.0, 0.0, -self.thresholds[m]])))
        x, y, t = line
        return x, y, t
