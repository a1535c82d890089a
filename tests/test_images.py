"""A user's own MNIST: its four files or one .npz, the same either way, and what does not fit is one line."""

from __future__ import annotations

import gzip
import re
import struct

import numpy as np
import pytest

from lipexp.config import ConfigError
from lipexp.datasets import Mnist

SIZES = {"n_train": 40, "n_val": 20, "n_test": 8}
RANDOM = np.random.default_rng(0)
ARRAYS = {
    "x_train": RANDOM.integers(256, size=(70, 28, 28), dtype=np.uint8),
    "y_train": np.repeat(np.arange(10, dtype=np.uint8), 7),
    "x_test": RANDOM.integers(256, size=(16, 28, 28), dtype=np.uint8),
    "y_test": RANDOM.integers(10, size=16, dtype=np.uint8),
}
NAMES = {
    "x_train": "train-images-idx3-ubyte",
    "y_train": "train-labels-idx1-ubyte",
    "x_test": "t10k-images-idx3-ubyte",
    "y_test": "t10k-labels-idx1-ubyte",
}


def idx(array):
    """As the files of MNIST have it."""
    return struct.pack(f">BBBB{array.ndim}i", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def folder(tmp_path):
    """With the four files."""
    for key, array in ARRAYS.items():
        (tmp_path / NAMES[key]).write_bytes(idx(array))
    return tmp_path


def saved(path, **changes):
    np.savez(path, **(ARRAYS | changes))
    return str(path)


def test_files_compressed_files_and_an_npz_give_the_same(folder):
    file = saved(folder / "mnist.npz", y_train=ARRAYS["y_train"].astype(np.int64))
    first, again = (Mnist(path, **SIZES).draw(np.random.SeedSequence(3)) for path in (str(folder), file))
    for name in list(NAMES.values())[:3]:
        (folder / f"{name}.gz").write_bytes(gzip.compress((folder / name).read_bytes()))
        (folder / name).unlink()
    compressed = Mnist(str(folder), **SIZES).draw(np.random.SeedSequence(3))
    for name in first._fields:
        assert np.array_equal(getattr(first, name), getattr(again, name))
        assert np.array_equal(getattr(first, name), getattr(compressed, name))


def test_test_rows_are_the_files_own_and_the_others_are_drawn_from_those_to_train_on(folder):
    dataset = Mnist(str(folder), **SIZES)
    assert (dataset.n_inputs, dataset.n_outputs, dataset.task) == (784, 10, "multiclass")
    known = {
        tuple(image.ravel()): label for image, label in zip(ARRAYS["x_train"], ARRAYS["y_train"], strict=True)
    }
    seen = []
    for seed in (0, 1):
        data = dataset.draw(np.random.SeedSequence(seed))
        assert data.x.dtype == data.y.dtype == np.float32
        assert np.array_equal(data.test_x, (ARRAYS["x_test"][::2].reshape(8, 784) / 255).astype(np.float32))
        assert np.array_equal(data.test_y, ARRAYS["y_test"][::2])
        drawn = [tuple(row) for x in (data.train_x, data.val_x) for row in np.rint(255 * x).astype(int)]
        assert len(set(drawn)) == 60
        assert [known[row] for row in drawn] == [*data.train_y, *data.val_y]
        assert np.bincount(data.train_y.astype(int)).tolist() == [4] * 10
        assert np.bincount(data.val_y.astype(int)).tolist() == [2] * 10
        seen.append(drawn)
    assert seen[0] != seen[1]


def test_all_test_rows_come_in_their_order(folder):
    data = Mnist(str(folder), 50, 20, 16).draw(np.random.SeedSequence(0))
    assert np.array_equal(data.test_y, ARRAYS["y_test"])
    assert sorted(np.r_[data.train_y, data.val_y]) == sorted(ARRAYS["y_train"])


def without_labels(folder):
    (folder / NAMES["y_test"]).unlink()


def written(name, change):
    """Changes the bytes of a file of the folder."""
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def as_folder(folder):
    (folder / NAMES["x_train"]).unlink()
    (folder / NAMES["x_train"]).mkdir()


def badly_compressed(folder):
    (folder / NAMES["x_test"]).rename(folder / f"{NAMES['x_test']}.gz")


def cut_short(folder):
    content = gzip.compress((folder / NAMES["x_test"]).read_bytes())
    (folder / NAMES["x_test"]).unlink()
    (folder / f"{NAMES['x_test']}.gz").write_bytes(content[:-20])


ALL_FOUR = (
    "it must be a folder with train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte, "
    "t10k-labels-idx1-ubyte, each also as .gz, or an .npz file with x_train, y_train, x_test, y_test"
)
BAD_FOLDERS = [
    (without_labels, f"has no t10k-labels-idx1-ubyte; {ALL_FOUR}"),
    (as_folder, "train-images-idx3-ubyte cannot be read: Is a directory"),
    (badly_compressed, "t10k-images-idx3-ubyte.gz cannot be read: it is damaged"),
    (cut_short, "t10k-images-idx3-ubyte.gz cannot be read: it is damaged"),
    (
        written(NAMES["x_test"], lambda content: content[:-1]),
        "t10k-images-idx3-ubyte is no whole IDX file of images",
    ),
    (
        written(NAMES["x_test"], lambda content: content[:9]),
        "t10k-images-idx3-ubyte is no whole IDX file of images",
    ),
    (written(NAMES["y_train"], lambda content: b""), "train-labels-idx1-ubyte is no whole IDX file of labels"),
    (
        written(NAMES["y_train"], lambda content: b"\0\0\x09" + content[3:]),
        "train-labels-idx1-ubyte is no whole IDX file of labels",
    ),
    (
        written(NAMES["y_train"], lambda content: idx(ARRAYS["x_train"])),
        "train-labels-idx1-ubyte is no whole IDX file of labels",
    ),
    (
        written(NAMES["y_train"], lambda content: idx(ARRAYS["y_train"] + 1)),
        "train-labels-idx1-ubyte must have whole numbers from 0 to 9",
    ),
    (
        written(NAMES["y_test"], lambda content: idx(ARRAYS["y_train"])),
        "t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte have the shapes (16, 28, 28) and (70,), not ",
    ),
    (
        written(NAMES["x_test"], lambda content: idx(ARRAYS["x_test"][:, :20])),
        "train-images-idx3-ubyte has 784 pixels an image, but t10k-images-idx3-ubyte 560",
    ),
]


@pytest.mark.parametrize(("spoil", "message"), BAD_FOLDERS)
def test_a_folder_that_does_not_fit_is_refused_in_one_line(folder, spoil, message):
    spoil(folder)
    with pytest.raises(ConfigError, match=f"^path={re.escape(f'{folder}: {message}')}") as caught:
        Mnist(str(folder), **SIZES)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_train": ARRAYS["x_train"] / 255}, "x_train must have whole numbers from 0 to 255"),
        ({"x_test": ARRAYS["x_test"].astype(int) - 1}, "x_test must have whole numbers from 0 to 255"),
        ({"x_test": ARRAYS["x_test"][:0]}, "x_test must have whole numbers from 0 to 255"),
        ({"y_test": ARRAYS["y_test"].astype(str)}, "y_test must have whole numbers from 0 to 9"),
        (
            {"x_test": ARRAYS["x_test"][..., None]},
            "x_test and y_test have the shapes (16, 28, 28, 1) and (16,), not",
        ),
        ({"y_test": np.eye(10, dtype=int)}, "x_test and y_test have the shapes (16, 28, 28) and (10, 10), not"),
        ({"y_test": np.array([{}] * 16)}, "its y_test is damaged, or holds Python objects"),
    ],
)
def test_an_npz_that_does_not_fit_is_refused_in_one_line(tmp_path, changes, message):
    path = saved(tmp_path / "mnist.npz", **changes)
    with pytest.raises(ConfigError, match=f"^path={re.escape(f'{path}: {message}')}"):
        Mnist(path, **SIZES)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((), "dataset.path: must be set"),
        (("dataset.path=7",), "dataset.path=7: must be the name of a folder or of a file"),
        (("dataset.path=nowhere",), f"dataset.path=nowhere: does not exist; {ALL_FOUR}"),
        (
            ("dataset.path=other.npz",),
            "dataset.path=other.npz: has x; it needs x_train, y_train, x_test and y_test",
        ),
        (
            ("dataset.path=.",),
            "dataset.n_train=10000: n_train + n_val must be at most 70, the number of images to ",
        ),
        (
            ("dataset.path=.", "dataset.n_train=50", "dataset.n_val=20", "dataset.n_test=17"),
            "dataset.n_test=17: must be a whole number, at least 1, at most 16",
        ),
    ],
)
def test_settings_that_do_not_fit_the_images_are_refused_in_one_line(lipexp, folder, overrides, message):
    np.savez(folder / "other.npz", x=np.zeros(3))
    done = lipexp("train", "dataset=mnist", *overrides)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert done.err.startswith(f"lipexp: {message}")
