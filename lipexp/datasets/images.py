"""Images in files that a user already has."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from lipexp.config import ConfigError, whole
from lipexp.datasets.arrays import read_npz
from lipexp.datasets.base import Data, Dataset, shuffled

# The images and the labels to train on, and those to test.
IDX = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
NPZ = ("x_train", "y_train", "x_test", "y_test")
NEEDED = f"it must be a folder with {', '.join(IDX)}, each also as .gz, or an .npz file with {', '.join(NPZ)}"


class Mnist(Dataset):
    """Handwritten digits, ten classes: grey images of 28 x 28 pixels, divided by 255, so in [0, 1]^784.

    Test rows are the files' own, the same for every seed, and evenly spaced if fewer are asked for. The stream of
    a run draws validation and training rows from the images to train on, both with the shares of the classes, up
    to rounding. Evaluation needs about 0.2 MB of memory for each row. Other images with the classes 0 to 9 in such
    files, as those of Fashion-MNIST, do as well; D is the number of their pixels.

    Args:
        path: a folder with train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and
            t10k-labels-idx1-ubyte, each as it is or as .gz; or an .npz file with x_train, y_train, x_test and
            y_test.
        n_train: together with n_val at most the 60,000 images to train on.
        n_val: the number of validation rows.
        n_test: at most the 10,000 images to test.

    Raises:
        ConfigError: a file is missing or not as it should be; one line says why.

    Reference: LeCun, Bottou, Bengio and Haffner 1998, "Gradient-based learning applied to document recognition".
    """

    task = "multiclass"
    n_outputs = 10
    classes = tuple(map(str, range(10)))

    def __init__(self, path: str, n_train: int = 10_000, n_val: int = 2000, n_test: int = 2000) -> None:
        if not isinstance(path, str):
            raise ConfigError("path", path, "must be the name of a folder or of a file")
        self.path = path
        if not Path(path).exists():
            self._refuse(f"does not exist; {NEEDED}")
        names = IDX if Path(path).is_dir() else NPZ
        found = {name: self._idx(name) for name in IDX} if names is IDX else read_npz(path, [NPZ])
        self.train_x, self.train_y = self._checked(found, *names[:2])
        self.test_x, self.test_y = self._checked(found, *names[2:])
        (n_rows, self.n_inputs), (n_test_rows, n_pixels) = self.train_x.shape, self.test_x.shape
        if n_pixels != self.n_inputs:
            self._refuse(f"{names[0]} has {self.n_inputs} pixels an image, but {names[2]} {n_pixels}")
        self.n_train = whole("n_train", n_train, least=1)
        self.n_val = whole("n_val", n_val, least=1)
        if self.n_train + self.n_val > n_rows:
            room = f"n_train + n_val must be at most {n_rows}, the number of images to train on"
            raise ConfigError("n_train", n_train, f"{room} (n_val={n_val})")
        self.n_test = whole("n_test", n_test, least=1, most=n_test_rows)

    def draw(self, stream: np.random.SeedSequence) -> Data:
        order = shuffled(self.train_y, classes=True, rng=np.random.default_rng(stream))
        val, train = order[: self.n_val], order[self.n_val : self.n_val + self.n_train]
        test = np.arange(self.n_test) * len(self.test_x) // self.n_test
        x = [self.train_x[train], self.train_x[val], self.test_x[test]]
        x_train, x_val, x_test = (np.divide(part, 255, dtype=np.float32) for part in x)
        y = [self.train_y[train], self.train_y[val], self.test_y[test]]
        y_train, y_val, y_test = (part.astype(np.float32) for part in y)
        return Data(x_train, y_train, x_val, y_val, x_test, y_test)

    def _refuse(self, text: str) -> NoReturn:
        raise ConfigError("path", self.path, text)

    def _idx(self, name: str) -> npt.NDArray[Any]:
        """The bytes in an IDX file: after 0, 0, 8 and the number of axes, their lengths in four bytes each."""
        file = next((file for end in ("", ".gz") if (file := Path(self.path, name + end)).exists()), None)
        if file is None:
            self._refuse(f"has no {name}; {NEEDED}")
        try:
            content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        except (OSError, EOFError, zlib.error) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else "it is damaged"
            self._refuse(f"{file.name} cannot be read: {reason}")
        n_axes = 3 if "images" in name else 1
        start = 4 + 4 * n_axes
        kind, *shape = struct.unpack_from(f">{1 + n_axes}I", content.ljust(start, b"\0"))
        if kind != 0x800 + n_axes or len(content) - start != math.prod(shape):
            self._refuse(f"{file.name} is no whole IDX file of {'images' if n_axes == 3 else 'labels'}")
        return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape)

    def _checked(
        self, found: dict[str, npt.NDArray[Any]], x_name: str, y_name: str
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
        """The pixels (N, D) and the labels (N,) of these names."""
        for name, most in ((x_name, 255), (y_name, 9)):
            array = found[name]
            if array.dtype.kind not in "iu" or not array.size or array.min() < 0 or array.max() > most:
                self._refuse(f"{name} must have whole numbers from 0 to {most}")
        x, y = found[x_name].astype(np.uint8), found[y_name].astype(np.uint8)
        if x.ndim not in (2, 3) or y.shape != x.shape[:1]:
            shapes = f"{x.shape} and {y.shape}, not (N, height, width) and (N,)"
            self._refuse(f"{x_name} and {y_name} have the shapes {shapes}")
        return x.reshape(len(x), -1), y
