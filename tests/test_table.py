"""Tables: a file becomes what scikit-learn makes of it, or one line says why it cannot be used."""

from __future__ import annotations

import dataclasses
import gzip
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from commands import DEBUG
from sklearn.compose import make_column_transformer
from sklearn.impute import SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from lipexp.config import ConfigError
from lipexp.datasets import Table
from lipexp.datasets.preprocessing import FILE, Preprocessing
from lipexp.reading import Unreadable

STREAM = np.random.SeedSequence(0)
N = 40


def csv(**columns):
    """A table of N rows with the column a, some more, and two classes y."""
    a = {"a": [i * 7 % 13 for i in range(N)]}
    y = {"y": ["no" if i * 5 % 3 % 2 else "yes" for i in range(N)]}
    return pd.DataFrame({**a, **columns, **y}).to_csv(index=False)


def with_cell(text, row, column, value):
    """The table with another value in one cell; rows count from 1."""
    lines = [line.split(",") for line in text.splitlines()]
    lines[row][column] = value
    return "\n".join(map(",".join, lines)) + "\n"


def cycle(*values):
    return [values[i % len(values)] for i in range(N)]


GOOD = csv()
# What a file gives: the names of the inputs, or the end of the one line that is said. The settings follow.
FILES = {
    "good": (GOOD, ["a"]),
    "BOM": (b"\xef\xbb\xbf" + GOOD.encode(), ["a"]),
    "CRLF": (GOOD.replace("\n", "\r\n"), ["a"]),
    "semicolons": (GOOD.replace(",", ";"), ["a"]),
    "tabs": (GOOD.replace(",", "\t"), ["a"]),
    "spaces behind commas": (GOOD.replace(",", ", "), ["a"]),
    "an index without a name": ("\n".join(f"{i},{line}" for i, line in enumerate(GOOD.splitlines()))[1:], ["a"]),
    "booleans": (csv(b=cycle(True, False)), ["a", "b"]),
    "categories": (csv(b=cycle("u", "v, w", "ø")), ["a", "b=u", "b=v, w", "b=ø"]),
    "categories that are numbers": (csv(b=cycle("01", "1")), ["a", "b=01", "b=1"], "categorical=b"),
    "a constant": (csv(b=cycle(3), c=cycle("u")), ["a", "b", "c=u"]),
    "ten equal columns": (csv(**{f"b{i}": cycle(1, 2) for i in range(10)}), ["a", *(f"b{i}" for i in range(10))]),
    "numbers beyond 64 bits": (csv(b=[10**30 + i for i in range(N)]), ["a", "b"]),
    "long text": (csv(b=cycle("x" * 10**5, "y")), ["a", "b=" + "x" * 10**5, "b=y"]),
    "chosen columns": (csv(b=cycle(1, 2), c=cycle(1, 3)), ["b"], "columns=[c,b]", "drop=c"),
    "empty": ("", "is empty, or has an empty first line"),
    "blank": ("\n\n", "is empty, or has an empty first line"),
    "header only": ("a,y\n", "has no rows"),
    "one class": (GOOD.replace("yes", "no"), "dataset.target=y: has 1 value ('no'); classification needs two"),
    "a rare class": (
        with_cell(GOOD, 3, 1, "q"),
        "class 'q' has 1 row; each needs 3, one for each part of the data",
    ),
    "duplicate names": (GOOD.replace("a,", "y,", 1), "has the column 'y' twice"),
    "a later column without a name": (csv(**{"": cycle(1, 2)}), "has no name for its column 2"),
    "no such target": (GOOD, "dataset.target=z: no such column (a, y)", "target=z"),
    "the target alone": (GOOD, "has no column to predict y from", "drop=a"),
    "the target as an input": (GOOD, "y: is the target, which cannot be predicted from itself", "columns=[a,y]"),
    "a missing value": (with_cell(GOOD, 3, 0, ""), "row 3, column 'a': there is no value; dataset.missing=impute"),
    "a question mark": (
        with_cell(GOOD, 3, 0, "?"),
        "row 3, column 'a': there is no value; dataset.missing=impute",
    ),
    "imputed": (with_cell(GOOD, 3, 0, "?"), ["a"], "missing=impute"),
    "imputed booleans": (csv(b=[None, *cycle(True, False)][:N]), ["a", "b"], "missing=impute"),
    "no values": (
        csv(b=cycle(None)),
        "column 'b' has no values; leave it out with dataset.drop",
        "missing=impute",
    ),
    "a missing target": (with_cell(GOOD, 3, 1, ""), "row 3: there is no target 'y'; leave such rows out"),
    "infinite": (with_cell(GOOD, 3, 0, "-inf"), "row 3, column 'a': '-inf' is no finite number"),
    "too large": (with_cell(with_cell(GOOD, 1, 0, "1e308"), 2, 0, "-1e308"), "as large as"),
    "a word among numbers": (with_cell(GOOD, 3, 0, "abc"), "row 3, column 'a': 'abc' stands among numbers"),
    "latin-1": (csv(b=cycle("é", "o")).encode("latin1"), "is not in UTF-8 (byte 0xe9); save it as UTF-8"),
    "UTF-16": (GOOD.encode("utf16"), "is not in UTF-8"),
    "another separator": (GOOD.replace(",", "^"), "dataset.target=y: no such column (a^y)"),
    "decimal commas": (csv(b=[f"{i},5" for i in range(N)]), "holds numbers such as '0,5'; write them as 1234.5"),
    "thousands": (csv(b=cycle("1,500", "900")), "holds numbers such as '1,500'; write them as 1234.5"),
    "dates": (
        csv(b=cycle("2020-01-31", "2020-02-01 10:30")),
        "column 'b' holds dates, such as '2020-01-31'; leave it",
    ),
    "names": (
        csv(b=[f"id {i}" for i in range(N)]),
        "column 'b' holds another text in every row; leave it out with",
    ),
    "5,000 categories": (
        "b,y\n" + "".join(f"c{i % 5000},{i % 2}\n" for i in range(6000)),
        "gives 5,000 inputs, more than 1,000: column 'b' alone has 5,000 categories",
    ),
    "a longer row": (GOOD + "1,2,3\n", "row 41 has 3 fields, but there are 2 columns"),
    "longer rows": ("a,y\n" + "1,2,3\n" * N, "has rows with more fields than there are columns"),
    "a shorter row": (GOOD + "1\n", "row 41: there is no target 'y'"),
    "an open quote": (GOOD.replace("0,", '"0,', 1), "cannot be read: EOF inside string starting at row 0"),
    "too many test rows": (GOOD, "dataset.n_test=40: leaves no rows for training: there are 40", "n_test=40"),
    "too few test rows": (GOOD, "dataset.n_test=1: the classes cannot be split in these shares", "n_test=1"),
    "too many training rows": (
        GOOD,
        "n_train=25: is more than the 24 rows that the other parts leave",
        "n_train=25",
    ),
    "a fraction above 1": (GOOD, "n_val=1.5: must be a whole number of rows, or a fraction below 1", "n_val=1.5"),
    "text as a number": (
        GOOD,
        "row 1, column 'y': 'yes' is no finite number, and so no target",
        "task=regression",
    ),
    "a constant number": (
        csv(b=cycle(3)),
        "dataset.target=b: has the same value in every row",
        "target=b",
        "task=regression",
    ),
    "several classes": (
        csv(b=cycle(1, 2)),
        "several targets are for regression, not for multiclass",
        "target=[y,b]",
        "task=multiclass",
    ),
    "no such task": (GOOD, "dataset.task=regresion: no such option; did you mean regression?", "task=regresion"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_gives_its_inputs_or_one_line_and_no_folder(name, lipexp, make):
    content, expected, *settings = FILES[name]
    Path("t.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    overrides = [f"dataset.{setting}" for setting in (f"path={Path('t.csv').absolute()}", "target=y", *settings)]
    if isinstance(expected, list):
        assert make("dataset", "dataset=table", *overrides).features == expected
        return
    done = lipexp("train", "dataset=table", *overrides)
    assert (done.code, done.out, len(done.err.splitlines())) == (2, "", 1), done.err
    assert done.err.startswith("lipexp: dataset.")
    assert expected in done.err
    assert not Path("outputs").exists()


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("none.csv", "dataset.path=none.csv: does not exist"),
        (".", "dataset.path=.: is no file"),
        (
            "t.xlsx",
            "dataset.path=t.xlsx: must end in .csv, .tsv, .txt, .parquet, .pq, or .gz behind one of the first",
        ),
        ("t.csv.gz", "dataset.path=t.csv.gz: cannot be read: Not a gzipped file"),
        ("t.parquet", "dataset.path=t.parquet: cannot be read: ArrowInvalid"),
        ("3", "dataset.path=3: must be the name of a file"),
        ("???", "dataset.path: must be set"),
    ],
)
def test_what_is_no_such_file_is_refused(path, said, lipexp):
    for name in ("t.xlsx", "t.csv.gz", "t.parquet"):
        Path(name).write_text(GOOD)
    done = lipexp("train", "dataset=table", f"dataset.path={path}", "dataset.target=y")
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    assert done.err.startswith(f"lipexp: {said}")


def test_a_file_that_would_not_fit_into_memory_is_refused_before_it_is_read(lipexp):
    Path("t.csv").write_text(GOOD)
    with Path("t.csv").open("r+b") as file:
        file.truncate(2**31 + 1)  # takes no room on the disk
    done = lipexp("train", "dataset=table", "dataset.path=t.csv", "dataset.target=y")
    assert done == (2, "", "lipexp: dataset.path=t.csv: is larger than 2 GiB; take a sample of its rows\n")


# Points ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def patients():
    """A table with columns of every kind, and missing values in all but the targets."""
    rng = np.random.default_rng(0)
    n = 300
    frame = pd.DataFrame(
        {
            "age": rng.integers(20, 80, n).astype(float),
            "city": rng.choice(["Oslo", "Bergen", "Bodø"], n).astype(object),
            "smoker": rng.choice([True, False], n).astype(object),
            "dose": rng.lognormal(3, 2, n),
        }
    )
    for column in frame:
        frame.loc[rng.choice(n, 30, replace=False), column] = None
    frame["cost"] = 1e4 * rng.normal(size=n) + frame["age"].fillna(50) * 1e3
    frame["days"] = rng.integers(1, 30, n)
    frame["ill"] = rng.choice(["no", "yes"], n, p=[0.8, 0.2])
    frame["stage"] = rng.choice(["I", "II", "III"], n, p=[0.6, 0.3, 0.1])
    return frame


INPUTS = ["age", "city", "smoker", "dose"]


def table(frame, target, **settings):
    """The dataset of a frame in a file here, from the columns INPUTS."""
    frame.to_csv("patients.csv", index=False)
    return Table("patients.csv", target, **{"columns": INPUTS, "missing": "impute"} | settings)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_points_are_those_of_scikit_learn_fitted_on_the_training_rows(patients):
    dataset = table(patients, "ill")
    numbers, flags = patients[["age", "dose"]], patients[["smoker"]].astype(float)
    frame = pd.concat([numbers, flags, patients[["city"]]], axis=1)
    cities = [["Bergen", "Bodø", "Oslo"]]  # of the whole file, since a rare one may be in no training row
    expected = make_column_transformer(
        (make_pipeline(SimpleImputer(strategy="median"), StandardScaler()), ["age"]),
        (make_pipeline(SimpleImputer(strategy="most_frequent"), OneHotEncoder(categories=cities)), ["city"]),
        (SimpleImputer(strategy="most_frequent"), ["smoker"]),
        (make_pipeline(SimpleImputer(strategy="median"), StandardScaler()), ["dose"]),
        sparse_threshold=0,
    ).fit(frame.iloc[dataset.train])
    assert list(dataset.features) == ["age", "city=Bergen", "city=Bodø", "city=Oslo", "smoker", "dose"]
    data = dataset.draw(STREAM)
    for split, rows in (("train", dataset.train), ("val", dataset.val), ("test", dataset.test)):
        x, y = data.part(split)
        np.testing.assert_allclose(x, expected.transform(frame.iloc[rows]), rtol=1e-6, atol=1e-6)
        assert [dataset.classes[int(place)] for place in y] == patients["ill"].iloc[rows].tolist()
    new = patients.sample(100, random_state=1)  # rows in another order, with other columns in between
    np.testing.assert_allclose(
        dataset.preprocessing.apply(new), expected.transform(frame.loc[new.index]), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("target", ["ill", "stage"])
def test_the_split_has_every_row_once_and_the_same_shares_of_classes_for_every_stream(patients, target):
    dataset = table(patients, target, n_val=0.25, n_test=60)
    assert (dataset.n_train, dataset.n_val, dataset.n_test) == (165, 75, 60)
    assert sorted(np.concatenate([dataset.train, dataset.val, dataset.test])) == list(range(300))
    share = patients[target].value_counts(normalize=True)
    for rows in (dataset.train, dataset.val, dataset.test):
        counts = patients[target].iloc[rows].value_counts()
        assert (counts - share * len(rows)).abs().max() <= 1
    assert dataset.draw(STREAM) is dataset.draw(np.random.SeedSequence(1))
    other, fewer = table(patients, target, split_seed=1), table(patients, target, n_val=75, n_test=60, n_train=20)
    assert set(other.test) != set(dataset.test)
    assert np.array_equal(fewer.test, dataset.test)
    assert np.array_equal(fewer.train, dataset.train[:20])


@pytest.mark.parametrize("target", ["cost", ["cost", "days"]])
def test_targets_of_a_regression_have_mean_0_and_deviation_1_over_the_training_rows(patients, target):
    dataset = table(patients, target)
    assert (dataset.task, dataset.n_outputs, list(dataset.classes)) == ("regression", np.size(target), [])
    y = dataset.draw(STREAM).train_y.astype(np.float64).reshape(dataset.n_train, -1)
    np.testing.assert_allclose(y.mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(y.std(axis=0), 1, atol=1e-6)
    scale, mean = np.array([(each.scale, each.mean) for each in dataset.preprocessing.targets]).T
    test = dataset.draw(STREAM).test_y.reshape(dataset.n_test, -1)
    np.testing.assert_allclose(
        test * scale + mean, patients[np.atleast_1d(target)].iloc[dataset.test], rtol=1e-5, atol=1e-2
    )


@pytest.mark.parametrize(
    ("values", "settings", "task", "classes", "n_outputs"),
    [
        (cycle(1, 0), {}, "classification", ["0", "1"], 1),
        (cycle(True, False), {}, "classification", ["False", "True"], 1),
        (cycle(2.0, 10.0), {}, "classification", ["2", "10"], 1),
        (cycle("10", "9", "x"), {}, "multiclass", ["10", "9", "x"], 3),
        (cycle(10, 9, 8), {"task": "multiclass"}, "multiclass", ["8", "9", "10"], 3),
        (cycle("b", "a"), {"task": "multiclass"}, "multiclass", ["a", "b"], 2),
        (cycle(10, 9, 8), {}, "regression", [], 1),
        (cycle(1, 0), {"task": "regression"}, "regression", [], 1),
    ],
)
def test_the_task_follows_from_the_target(values, settings, task, classes, n_outputs):
    Path("t.csv").write_text(csv(target=values))
    dataset = Table("t.csv", "target", columns="a", **settings)
    assert (dataset.task, list(dataset.classes), dataset.n_outputs) == (task, classes, n_outputs)
    if classes:
        column = pd.read_csv("t.csv")["target"].iloc[dataset.val]
        assert [classes[int(place)] for place in dataset.draw(STREAM).val_y] == column.astype(
            str
        ).str.removesuffix(".0").tolist()


def test_text_compressed_text_and_parquet_give_the_same_points(patients):
    expected = table(patients, "ill")
    Path("p.csv.gz").write_bytes(gzip.compress(Path("patients.csv").read_bytes()))
    patients.to_csv("p.tsv", sep="\t", index=False)
    patients.to_parquet("p.parquet")
    named = patients.astype({"city": "category"})[[*INPUTS, "ill"]]
    named.set_axis(named.index.astype(str)).to_parquet("c.pq")  # the index is a column of the file, but no input
    for path in ("p.csv.gz", "p.tsv", "p.parquet", "c.pq"):
        found = Table(path, "ill", columns=None if path == "c.pq" else INPUTS, missing="impute")
        assert dataclasses.replace(found.preprocessing, sha256="") == dataclasses.replace(
            expected.preprocessing, sha256=""
        )
        for one, other in zip(found.draw(STREAM), expected.draw(STREAM), strict=True):
            assert np.array_equal(one, other)


# Preprocessing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        (
            "city",
            "Paris",
            "table: row 3, column 'city': 'Paris' is none of the categories that are known (Bergen, Bodø, Oslo)",
        ),
        ("age", "old", "table: row 3, column 'age': 'old' is no finite number"),
        ("age", np.inf, "table: row 3, column 'age': 'inf' is no finite number"),
        ("age", True, "table: row 3, column 'age': 'True' is no finite number"),
        ("age", 1e300, "table: row 3, column 'age': '1e+300' is too large"),
        ("smoker", "maybe", "table: row 3, column 'smoker': 'maybe' is neither true nor false"),
        ("dose", None, "table: row 3, column 'dose': there is no value"),
        ("dose", "absent", "table: has no column 'dose' (there are age, city, smoker"),
    ],
)
def test_a_row_that_is_no_point_is_named_with_its_column(patients, column, value, said):
    patients = patients.dropna(ignore_index=True)
    preprocessing = table(patients, "ill", missing="refuse").preprocessing
    new = patients.astype({column: object})
    new.loc[[2, 5], column] = value
    with pytest.raises(ConfigError) as refused:
        preprocessing.apply(new.drop(columns=column) if value == "absent" else new)
    assert str(refused.value).startswith(said)


@pytest.mark.parametrize(
    ("target", "loss", "said"),
    [
        ("ill", "hinge", "6 inputs; yes where f > 0, else no; 120 missing values filled in"),
        ("stage", "multi_margin", "6 inputs; 120 missing values filled in"),
        ("cost", "mse", "6 inputs; targets and losses in standard deviations; 120 missing values filled in"),
    ],
)
def test_training_says_what_it_made_of_the_file(patients, lipexp, target, loss, said):
    patients.to_csv("patients.csv", index=False)
    command = ("dataset=table", "dataset.path=patients.csv", f"dataset.target={target}", "dataset.missing=impute")
    done = lipexp("train", *command, f"dataset.columns=[{','.join(INPUTS)}]", f"loss={loss}", "steps=2")
    assert done.code == 0
    assert f"patients.csv: 180 + 60 + 60 rows (train, val, test), {said}" in " ".join(done.out.split())


def test_preprocessing_is_read_back_from_the_run_as_it_was(patients, lipexp):
    dataset = table(patients, ["cost"])
    command = ("dataset=table", "dataset.path=patients.csv", "dataset.target=cost", "dataset.missing=impute")
    chosen = f"dataset.columns=[{','.join(INPUTS)}]"
    sizes = ("dataset.n_train=100", "dataset.n_val=60", "dataset.n_test=60")
    assert lipexp("train", *DEBUG, *command, chosen, *sizes, "loss=mse", "hydra.run.dir=run").code == 0
    sizes = {"n_train": 100, "n_val": 60, "n_test": 60}
    dataset = Table("patients.csv", "cost", columns=INPUTS, missing="impute", **sizes)
    found = Preprocessing.of(Path("run"))
    assert found == dataset.preprocessing
    assert np.array_equal(found.apply(patients)[dataset.test], dataset.draw(STREAM).test_x)
    # The points of the run are those of its rows.
    written = pd.read_csv("run/gradients.csv").query("split == 'train'")[[f"x{i}" for i in range(6)]]
    np.testing.assert_array_equal(written.to_numpy(dtype=np.float32), found.apply(patients)[dataset.train])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"columns": [{"name": "a", "kind": "number", "scale": 0.0}]}, "needs a scale above 0"),
        ({"columns": [{"name": "a", "kind": "category"}]}, "and categories if it has that kind"),
        ({"columns": [{"name": "a", "kind": "word"}]}, "Column.kind must be one of number, boolean, category"),
        ({"task": "transport"}, "Preprocessing.task must be one of"),
        ({"classes": [1]}, "must be a text"),
    ],
)
def test_damaged_preprocessing_is_refused(patients, change, said):
    content = dataclasses.asdict(table(patients, "ill").preprocessing) | change
    Path(FILE).write_text(json.dumps(content))
    with pytest.raises(Unreadable, match=said):
        Preprocessing.of(Path())
