"""Activations: maps between layers, 1-Lipschitz in the norms that they declare.

Shapes: K runs, B points, H features; every map takes and returns (K, B, H).

To add one: a class derived from `Activation` with a `forward`, and one file in conf/act/. The table in
`Activation` says what else it may declare, and what each declaration buys.
"""

from lipexp.activations.base import ALL_NORMS, LOST_BITS, Activation, ActiveMap, Array, as_activation
from lipexp.activations.elementwise import Abs, Elementwise, Identity, LeakyReLU, ReLU
from lipexp.activations.learnable import Householder, LipschitzSpline, NActivation
from lipexp.activations.smooth import ELU, GELU, Sigmoid, SiLU, Softplus, Tanh
from lipexp.activations.sorting import GroupSort

__all__ = [
    "ALL_NORMS",
    "ELU",
    "GELU",
    "LOST_BITS",
    "Abs",
    "Activation",
    "ActiveMap",
    "Array",
    "Elementwise",
    "GroupSort",
    "Householder",
    "Identity",
    "LeakyReLU",
    "LipschitzSpline",
    "NActivation",
    "ReLU",
    "SiLU",
    "Sigmoid",
    "Softplus",
    "Tanh",
    "as_activation",
]
