"""Exact constants from all linear regions of a network of one or two inputs.

enumeration finds the regions, layer by layer; domain is the box of the data and the plane around it, polygons cuts
them by lines with exact decisions, maps carries the affine maps of the regions with bounds on their rounding
errors, and layers writes residual layers as affine ones.
"""

from lipexp.proven.regions.enumeration import (
    Constants,
    Steepest,
    TooManyRegions,
    constants,
    why_not_enumerable,
)
from lipexp.proven.regions.maps import TooLarge

__all__ = ["Constants", "Steepest", "TooLarge", "TooManyRegions", "constants", "why_not_enumerable"]
