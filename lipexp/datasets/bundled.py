"""Real data that come with scikit-learn."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt

from lipexp.datasets.base import Finite
from lipexp.process import holding_interrupts


class DigitsParity(Finite):
    """Handwritten digits in 64 dimensions, odd (1) against even (0): scikit-learn's 8 x 8 images, in [0, 1].

    There are 1,797 of them, all different.
    """

    task = "classification"
    n_inputs = 64
    n_points = 1797

    def __init__(self, n_train: int = 1197, n_val: int = 200, n_test: int = 400) -> None:
        super().__init__(n_train, n_val, n_test)

    def load(self) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        with holding_interrupts():
            from sklearn.datasets import load_digits

        images, digits = load_digits(return_X_y=True)
        return images / 16, digits % 2
