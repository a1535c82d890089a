"""Datasets: points and targets, drawn from a run's own random stream.

Shapes: N points, D inputs, C outputs. Points are (N, D) and targets (N,), both float32; a regression with several
targets has (N, C). Classes are 0, 1, ..., C - 1; two classes need one output only, whose sign decides.

To add one: a class derived from `Dataset`, or from `Generated` for one that can draw any number of points, and one
file in conf/dataset/.
"""

from lipexp.datasets.base import Data, Dataset, Finite, Generated
from lipexp.datasets.bundled import DigitsParity
from lipexp.datasets.synthetic import AbsoluteValue, Circles, Cones, Spirals, TwoMoons, on_sphere

__all__ = [
    "AbsoluteValue",
    "Circles",
    "Cones",
    "Data",
    "Dataset",
    "DigitsParity",
    "Finite",
    "Generated",
    "Spirals",
    "TwoMoons",
    "on_sphere",
]
