"""A user's own arrays: split or taken as they are split, and what does not fit is one line."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from lipexp.config import ConfigError
from lipexp.datasets import Arrays


def drawn(dataset):
    """The data of a run."""
    return dataset.draw(np.random.SeedSequence(0))


X = np.arange(60.0).reshape(20, 3)
ONES = np.arange(20) % 2


@pytest.fixture
def saved(tmp_path):
    """saved(x=..., y=...) -> the path of an .npz file."""

    def save(**arrays):
        np.savez(tmp_path / "my.npz", **arrays)
        return str(tmp_path / "my.npz")

    return save


@pytest.mark.parametrize(
    ("y", "task", "expected", "classes", "targets"),
    [
        (ONES == 1, "auto", "classification", ("False", "True"), ONES),
        (ONES * 4 - 7, "auto", "classification", ("-7", "-3"), ONES),
        (np.where(ONES, "cat", "dog"), "auto", "classification", ("cat", "dog"), 1 - ONES),
        (np.arange(20) % 3 * 10, "auto", "multiclass", ("0", "10", "20"), np.arange(20) % 3),
        (ONES, "multiclass", "multiclass", ("0", "1"), ONES),
        (ONES * 0.5, "classification", "classification", ("0.0", "0.5"), ONES),
        (ONES * 0.5, "auto", "regression", (), ONES * 0.5),
        (np.arange(20)[:, None], "regression", "regression", (), np.arange(20)),
        (X[:, :2], "auto", "regression", (), X[:, :2]),
    ],
)
def test_the_task_of_arrays_follows_from_y_or_is_given(saved, y, task, expected, classes, targets):
    dataset = Arrays(saved(x=X, y=y), task=task)
    assert (dataset.task, dataset.classes, dataset.n_inputs) == (expected, classes, 3)
    assert dataset.n_outputs == (len(classes) if expected == "multiclass" else targets[0].size)
    assert (dataset.n_train, dataset.n_val, dataset.n_test) == (12, 4, 4)
    data = drawn(dataset)
    assert data.x.dtype == data.y.dtype == np.float32
    order = (data.x[:, 0] / 3).astype(int)
    assert sorted(order) == list(range(20))
    assert np.array_equal(data.x, X[order])
    assert np.array_equal(data.y, targets[order])


def test_arrays_that_are_split_already_stay_so_for_every_seed(saved):
    names = np.array(["b", "a", "c"])
    parts = {"train": (X[:12], ONES[:12]), "val": (X[12:17], ONES[12:17]), "test": (X[17:], np.array([0, 1, 2]))}
    arrays = {
        f"{key}_{split}": part for split, (x, y) in parts.items() for key, part in (("x", x), ("y", names[y]))
    }
    for n_val, seed in ((None, 0), (3, 1)):
        dataset = Arrays(saved(**arrays), n_val=n_val)
        data = dataset.draw(np.random.SeedSequence(seed))
        assert (dataset.task, dataset.classes, dataset.n_val) == ("multiclass", ("a", "b", "c"), n_val or 5)
        for split, (x, y) in parts.items():
            found, targets = data.part(split)
            size = n_val if split == "val" and n_val else len(x)
            assert np.array_equal(found, x[:size])
            assert np.array_equal(targets, [[1, 0, 2][c] for c in y[:size]])


SPLIT = {f"{key}_{split}": part for split in ("train", "val", "test") for key, part in (("x", X), ("y", ONES))}
BAD_ARRAYS = [
    ({}, "has nothing; it needs x and y, or x_train, y_train, x_val, y_val, x_test and y_test"),
    ({"x": X, "z": ONES}, "has x, z; it needs x and y, or "),
    (
        {key: part for key, part in SPLIT.items() if key != "x_val"},
        "has x_train, y_train, y_val, x_test, y_test; it needs",
    ),
    ({"x": X, "y": ONES[:19]}, r"x has 20 rows, but y has the shape \(19,\)"),
    ({**SPLIT, "y_val": ONES[:3]}, r"x_val has 20 rows, but y_val has the shape \(3,\)"),
    ({**SPLIT, "x_test": X[:, :2]}, r"x_train has the shape \(20, 3\), but x_test \(20, 2\)"),
    ({"x": X[:, 0], "y": ONES}, r"x has the shape \(20,\); it must be \(N, D\)"),
    ({"x": X.reshape(20, 3, 1), "y": ONES}, r"x has the shape \(20, 3, 1\); it must be \(N, D\)"),
    ({"x": X[:0], "y": ONES[:0]}, r"x has the shape \(0, 3\); it must be \(N, D\)"),
    (
        {"x": X, "y": X.reshape(20, 3, 1)},
        r"y has the shape \(20, 3, 1\) and the type float64; it must be \(N,\) or",
    ),
    ({"x": X.astype(str), "y": ONES}, "x is of type <U32; it must be numbers"),
    ({"x": X + 1j, "y": ONES}, "x is of type complex128; it must be numbers"),
    ({"x": X.astype(object), "y": ONES}, r"its x is damaged, or holds Python objects \(save x.astype\(float\)"),
    ({"x": X, "y": np.array([None, "a"] * 10)}, r"its y is damaged, or holds Python objects"),
    ({"x": np.where(X == 31, np.nan, X), "y": ONES}, r"x\[10, 1\] is nan, which is no finite number in float32"),
    ({"x": np.where(X == 31, 1e39, X), "y": ONES}, r"x\[10, 1\] is 1e\+39, which is no finite number in float32"),
    ({"x": X, "y": np.where(ONES, np.inf, 0.5)}, r"y\[1\] is inf, which is no finite number in float32"),
    ({**SPLIT, "y_val": np.where(ONES, np.inf, 0.5)}, r"y_val\[1\] is inf, which is no finite number in float32"),
    ({"x": X, "y": 0 * ONES}, "y has 1 different values; multiclass needs 2 to 100"),
    ({"x": X, "y": X[:, 0].astype("M8[D]")}, r"y has the shape \(20,\) and the type datetime64\[D\]"),
    (
        {"x": X, "y": np.arange(20), "task": "classification"},
        "y has 20 different values; classification needs two",
    ),
    ({"x": X, "y": np.where(ONES, "a", "b"), "task": "regression"}, "y is of type <U1; it must be numbers"),
    ({"x": X, "y": X, "task": "multiclass"}, r"y has the shape \(20, 3\); multiclass needs \(N,\)"),
    (
        {"x": np.zeros((101, 1)), "y": np.arange(101)},
        "y has 101 different values; multiclass needs 2 to 100",
    ),
]


@pytest.mark.parametrize(("arrays", "message"), BAD_ARRAYS)
def test_arrays_that_do_not_fit_are_refused_in_one_line(saved, arrays, message):
    arrays = dict(arrays)
    task = arrays.pop("task", "auto")
    with pytest.raises(ConfigError, match=f"^path=.*/my.npz: {message}") as caught:
        Arrays(saved(**arrays), task=task)
    assert "\n" not in str(caught.value)


def single(path, saved):
    with path.open("wb") as file:
        np.save(file, X)


def damaged(path, saved):
    content = Path(saved(x=X, y=ONES)).read_bytes()
    path.write_bytes(content[:200] + b"0" * 60 + content[260:])


BAD_FILES = [
    (lambda path, saved: None, "cannot be read: No such file or directory"),
    (lambda path, saved: path.mkdir(), "cannot be read: Is a directory"),
    (lambda path, saved: path.write_bytes(b""), "is no .npz file"),
    (lambda path, saved: path.write_text("a,b\n1,2\n"), "is no .npz file"),
    (lambda path, saved: path.write_bytes(b"PK\x03\x04" + bytes(100)), "is no .npz file"),
    (lambda path, saved: path.write_bytes(pickle.dumps({"x": 1})), "is no .npz file"),
    (lambda path, saved: path.write_bytes(Path(saved(x=X, y=ONES)).read_bytes()[:-100]), "is no .npz file"),
    (single, "is no .npz file, but a single array"),
    (damaged, "its x is damaged, or holds Python objects"),
]


@pytest.mark.parametrize("number", range(len(BAD_FILES)))
def test_a_file_that_is_no_npz_is_one_line_and_leaves_no_run(lipexp, saved, tmp_path, number):
    write, message = BAD_FILES[number]
    write(tmp_path / "bad.npz", saved)
    done = lipexp("train", "dataset=npz", "dataset.path=bad.npz")
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert done.err.startswith(f"lipexp: dataset.path=bad.npz: {message}")
    assert not list(Path("outputs").rglob("*"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((), "dataset.path: must be set"),
        (("dataset.path=7",), "dataset.path=7: must be the name of a file"),
        (
            ("dataset.path=my.npz", "dataset.task=multi"),
            "dataset.task=multi: no such option; did you mean multiclass?",
        ),
        (
            ("dataset.path=my.npz", "dataset.n_val=9", "dataset.n_test=11"),
            "dataset.n_train=1: n_train + n_val + n_test",
        ),
        (("dataset.path=my.npz", "dataset.n_val=0"), "dataset.n_val=0: must be a whole number, at least 1"),
        (("dataset.path=my.npz", "batch_size=8", "dataset.task=multiclass"), "loss=hinge: is for two classes"),
    ],
)
def test_settings_that_do_not_fit_the_arrays_are_refused_in_one_line(lipexp, saved, overrides, message):
    saved(x=X, y=ONES)
    done = lipexp("train", "dataset=npz", *overrides)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert done.err.startswith(f"lipexp: {message}")
