"""Datasets: points and targets, drawn from a run's own random stream.

Shapes: N points, D inputs, C outputs. Points are (N, D) and targets (N,), both float32; a regression with several
targets has (N, C). Classes are 0, 1, ..., C - 1; two classes need one output only, whose sign decides.

To add one: a class derived from `Dataset`, or from `Generated` for one that can draw any number of points, and one
file in conf/dataset/.
"""

from lipexp.datasets.arrays import Arrays
from lipexp.datasets.base import Data, Dataset, Finite, Generated
from lipexp.datasets.bundled import BreastCancer, Diabetes, Digits, DigitsParity, Wine
from lipexp.datasets.functions import AbsoluteValue, Flower, LogOutliers, NShape, SquareWave
from lipexp.datasets.images import Mnist
from lipexp.datasets.planar import Checkerboard, Circles, Spirals, TwoMoons
from lipexp.datasets.spheres import Annulus, Cones, on_sphere
from lipexp.datasets.table import Table

__all__ = [
    "AbsoluteValue",
    "Annulus",
    "Arrays",
    "BreastCancer",
    "Checkerboard",
    "Circles",
    "Cones",
    "Data",
    "Dataset",
    "Diabetes",
    "Digits",
    "DigitsParity",
    "Finite",
    "Flower",
    "Generated",
    "LogOutliers",
    "Mnist",
    "NShape",
    "Spirals",
    "SquareWave",
    "Table",
    "TwoMoons",
    "Wine",
    "on_sphere",
]
