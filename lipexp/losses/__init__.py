"""Losses: how far the outputs f(x) are from the targets y, sample by sample.

Shapes: K runs, B points, C outputs. Outputs f and targets y are (K, B), and a loss returns (K, B), of which the
loop takes the mean over B for each run. If the dataset has more than one output, f is (K, B, C), and so is y for a
regression with several targets. Targets are 0 and 1 for classification and transport, 0, 1, ..., C - 1 for
multiclass, any number for regression; all of them come as floating-point numbers.

A network that is trained under a bound L has outputs f, and derivatives of f by its parameters, that are
proportional to L. Each loss is divided by what keeps its own derivatives by the parameters at a size of about 1,
which Adam can use, for every L.

To add one: a class derived from `Loss`, and one file in conf/loss/. Any other module that returns one number per
sample, such as torch.nn.SmoothL1Loss(reduction="none"), works as it is.
"""

from lipexp.losses.base import Loss, Plain, as_loss, check_loss, column, losses_for, tasks_of
from lipexp.losses.classification import (
    BCE,
    HKR,
    CertifiedRadius,
    Cosine,
    CrossEntropy,
    Hinge,
    Kantorovich,
    MultiMargin,
    SoftHKR,
    SoftMargin,
)
from lipexp.losses.regression import MAE, MSE, Huber

__all__ = [
    "BCE",
    "HKR",
    "MAE",
    "MSE",
    "CertifiedRadius",
    "Cosine",
    "CrossEntropy",
    "Hinge",
    "Huber",
    "Kantorovich",
    "Loss",
    "MultiMargin",
    "Plain",
    "SoftHKR",
    "SoftMargin",
    "as_loss",
    "check_loss",
    "column",
    "losses_for",
    "tasks_of",
]
