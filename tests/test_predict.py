"""Predictions for tables: those of the network, in the units of the file, and certified as far as they say."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from commands import SCRIPT, edit
from conftest import choice_of
from networks import by_hand

import lipexp as package
from lipexp import predict
from lipexp.config import ConfigError
from lipexp.constraints import Spectral
from lipexp.datasets.preprocessing import NUMBER, Column, Preprocessing, Target
from lipexp.measured.gradients import Maximum
from lipexp.prediction import Predictor, in_units
from lipexp.proven import Chain, Problem, prove_quickly
from lipexp.wording import above

TABLE = choice_of("dataset", "table")
CITIES = (*TABLE[:-1], "dataset.target=city", "dataset.drop=ill", "loss=multi_margin", "lipschitz=2")
REGRESSION = (*TABLE[:-1], "dataset.target=pressure", "dataset.drop=ill", "loss=mse", "lipschitz=2")
FILE = Path(__file__).with_name("table.csv")
NEW = pd.read_csv(FILE).drop(columns="ill")


def outputs(folder, frame):
    """f (N, C) of the run's own network, and the points."""
    run = package.load(folder)
    points = Preprocessing.of(folder).apply(frame)
    return run.network(torch.from_numpy(points)).double().numpy(), points


def test_classes_scores_and_radii_are_those_of_the_network(trained_run):
    folder = trained_run(*TABLE, "steps=60")
    found = package.load(folder).predict(NEW.set_index(np.arange(600)[::-1]))
    f, _ = outputs(folder, NEW)
    np.testing.assert_allclose(found["score"], f[:, 0], rtol=1e-4, atol=1e-5)
    assert set(found["prediction"]) == {"no", "yes"}
    assert ((found["prediction"] == "yes") == (found["score"] > 0)).all()
    certified = package.load(folder).metrics.lipschitz.certified
    np.testing.assert_allclose(found["radius"], np.abs(found["score"]) / certified, rtol=1e-9, atol=1e-12)
    assert list(found.index) == list(range(599, -1, -1))


@pytest.mark.parametrize("task", [TABLE, CITIES], ids=["two classes", "three classes"])
def test_a_class_holds_while_a_column_stays_within_its_reach(task, trained_run):
    run = package.load(trained_run(*task, "steps=60"))
    found = run.predict(NEW, reach=True)
    assert list(found)[-2:] == ["reach:age", "reach:pressure"]
    scales = {column.name: column.scale for column in run.predictor.preprocessing.columns}
    reaches = {column: found[f"reach:{column}"] / scales[column] for column in ("age", "pressure")}
    lost = 2.0**-20 * found["radius"].max() + 5 * 2.0**-20  # for inputs that are float32, of at most 5
    assert all((reach >= found["radius"] - lost).all() for reach in reaches.values())
    if task is TABLE:  # more than what the radius says; of three classes LipSDP proves as much for any way
        assert (reaches["age"] > 1.01 * found["radius"]).any()
    for column in ("age", "pressure"):
        reach = found[f"reach:{column}"]
        assert (reach > 0).mean() > 0.9
        for part in (-1, -0.5, 0.5, 1):
            moved = NEW.astype({column: float})
            moved[column] += part * reach
            assert run.predict(moved)["prediction"].equals(found["prediction"])
        # It is worth something: some prediction changes at five times its reach.
        far = [run.predict(NEW.assign(**{column: NEW[column] + sign * 5 * reach})) for sign in (-1, 1)]
        assert any((one["prediction"] != found["prediction"]).any() for one in far)


def test_standard_output_gets_the_rows_though_a_bar_is_shown_on_the_terminal(trained_run, tmp_path):
    """As in `lipexp predict RUN FILE > new.csv`, where standard error is the terminal."""
    controller, terminal = pty.openpty()
    with (tmp_path / "new.csv").open("w") as file:
        command = [SCRIPT, "predict", str(trained_run(*TABLE, "steps=60")), str(FILE)]
        subprocess.run(command, stdout=file, stderr=terminal, stdin=terminal, check=True)
    os.close(terminal)
    os.close(controller)
    found = pd.read_csv(tmp_path / "new.csv")
    assert list(found) == ["prediction", "score", "radius"]
    assert len(found) == 600


@pytest.mark.parametrize("task", [TABLE, CITIES], ids=["two classes", "three classes"])
def test_the_radii_of_a_run_have_the_reach_of_each_row_and_its_metrics_the_medians(task, trained_run):
    """The table of a run says of its test rows what `predict` says of the same points."""
    run = package.load(trained_run(*task, "steps=60"))
    radii = run.table("radii").query("split == 'test'").reset_index(drop=True)
    points = radii[[f"x{i}" for i in range(run.baked.n_inputs)]].to_numpy(dtype=np.float32)
    found = run.predictor.of_points(points, reach=True)
    for column in ("age", "pressure"):
        np.testing.assert_allclose(radii[f"reach:{column}"], found[f"reach:{column}"], rtol=1e-12)
        assert run.metrics.columns[column]["reach"] == radii[f"reach:{column}"].median()


def test_a_regression_is_predicted_in_the_unit_of_the_file_and_changes_no_faster_than_is_said(trained_run):
    folder = trained_run(*REGRESSION, "steps=60")
    run = package.load(folder)
    f, _ = outputs(folder, NEW)
    found = run.predict(NEW)["prediction"]
    training = pd.read_csv(folder / "gradients.csv").query("split == 'train'")
    mean, scale = (getattr(run.predictor.preprocessing.targets[0], name) for name in ("mean", "scale"))
    # Standardised targets of training rows, turned back, are numbers of the file.
    known = np.sort(NEW["pressure"].to_numpy())
    back = np.sort(training["y"].to_numpy() * scale + mean)
    assert np.abs(known[np.searchsorted(known, back - 0.01)] - back).max() < 0.001
    assert training["y"].std(ddof=0) == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(found, mean + scale * f[:, 0], rtol=1e-4)
    slope = run.predictor.slopes().loc["age", "pressure"]
    step = 1e-3
    change = (run.predict(NEW.assign(age=NEW["age"] + step))["prediction"] - found).abs() / step
    assert 0.01 * slope < change.max() <= slope * (1 + 1e-3)  # the inputs are rounded to float32


@pytest.mark.parametrize("dataset", ["two_moons", "spirals", "absolute_value"])
def test_a_run_on_other_data_takes_the_columns_of_gradients_csv(dataset, trained_run):
    folder = trained_run(f"dataset={dataset}")
    run = package.load(folder)
    points = run.table("gradients")
    found = run.predict(points)
    score = found["prediction" if dataset == "absolute_value" else "score"]
    if dataset == "spirals":
        values = points[["f0", "f1", "f2"]].to_numpy()
        assert np.array_equal(found["prediction"].astype(int), values.argmax(axis=1))
    else:
        np.testing.assert_allclose(score, points["f"], rtol=1e-12)
    if dataset != "absolute_value":
        radii = run.table("radii")
        own = found[points["split"] != "train"].reset_index(drop=True)
        assert own["prediction"].astype(int).equals(radii["prediction"])
        np.testing.assert_array_equal(own["radius"], radii["radius"])


def test_of_several_classes_the_largest_output_decides_and_the_runner_up_is_the_nearest(trained_run):
    run = package.load(trained_run(*CITIES, "steps=60"))
    found = run.predict(NEW)
    f, _ = outputs(run.folder, NEW)
    classes = np.array(["Bergen", "Oslo", "Tromso"])
    places = {city: place for place, city in enumerate(classes)}
    first, second = (found[column].map(places).to_numpy() for column in ("prediction", "runner_up"))
    assert len(set(first)) == 3
    assert np.array_equal(f.argmax(axis=1), first)
    rows = np.arange(len(f))
    np.testing.assert_allclose(found["score"], f[rows, first] - f[rows, second], rtol=1e-4, atol=1e-5)
    others = run.predictor.pairs.constants + np.diag([np.nan] * 3)
    apart = (f[rows, first][:, None] - f) / others[first]
    np.testing.assert_allclose(found["radius"], np.nanmin(apart, axis=1), rtol=1e-4, atol=1e-5)
    assert (np.nanargmin(apart, axis=1) == second).mean() > 0.99  # but for ties


# The verb --------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(trained_run):
    return str(trained_run(*TABLE))


def test_the_file_has_what_python_gives_in_pieces_of_any_size(folder, lipexp, monkeypatch):
    pd.concat([NEW, NEW.iloc[::-1]]).to_csv("new.csv", index=False)
    expected = package.load(folder).predict(pd.read_csv("new.csv"), reach=True)
    for size in (7, 1200, 10**6):
        monkeypatch.setattr(predict, "ROWS", size)
        assert lipexp("predict", folder, "new.csv", "-o", f"{size}.csv", "--reach") == (0, "", "")
        # The order of a sum may depend on the number of rows.
        pd.testing.assert_frame_equal(pd.read_csv(f"{size}.csv"), expected, rtol=1e-12, check_dtype=False)


def test_an_index_and_chosen_columns_are_copied_as_they_are(folder, lipexp):
    frame = NEW.assign(id=[f"{i:05d}" for i in range(600)], note="a, b").set_index(np.arange(600)[::-1])
    frame.to_csv("new.csv")
    done = lipexp("predict", folder, "new.csv", "--keep", "note,id")
    assert (done.code, done.err) == (0, "")
    found = pd.read_csv(io.StringIO(done.out), index_col=0, dtype={"id": str})
    assert list(found) == ["note", "id", "prediction", "score", "radius"]
    assert found[["note", "id"]].equals(frame[["note", "id"]].astype(found.dtypes[["note", "id"]]))


@pytest.mark.parametrize("path", ["-", "new.csv.gz", "new.parquet", "new.tsv"])
def test_tables_come_from_standard_input_and_other_kinds_of_files(path, folder, lipexp, monkeypatch):
    expected = lipexp("predict", folder, str(FILE)).out
    assert expected.startswith("prediction,score,radius\n")
    NEW.to_csv("new.csv.gz", index=False)
    NEW.to_csv("new.tsv", index=False, sep="\t")
    NEW.to_parquet("new.parquet")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(FILE.read_bytes())))
    assert lipexp("predict", folder, path) == (0, expected, "")


BAD = {
    "category": (
        "city",
        "Paris",
        "row 6, column 'city': 'Paris' is none of the categories that are known (Bergen, Oslo, Tromso)",
    ),
    "number": ("age", "old", "row 6, column 'age': 'old' is no finite number"),
    "boolean": ("smoker", "perhaps", "row 6, column 'smoker': 'perhaps' is neither true nor false"),
    "missing": ("pressure", None, "row 6, column 'pressure': there is no value"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_row_that_cannot_be_predicted_is_refused_or_marked(name, folder, lipexp, monkeypatch):
    monkeypatch.setattr(predict, "ROWS", 4)
    column, value, said = BAD[name]
    frame = NEW.head(12).astype({column: object})
    frame.loc[[5, 6], column] = value
    frame.to_csv("new.csv", index=False)
    done = lipexp("predict", folder, "new.csv", "-o", "p.csv")
    assert done == (2, "", f"lipexp: FILE=new.csv: {said}\n")
    assert [path.name for path in Path().iterdir()] == ["new.csv"]
    assert lipexp("predict", folder, "new.csv", "-o", "p.csv", "--on-error=mark").code == 0
    found = pd.read_csv("p.csv")
    assert found["error"].dropna().to_dict() == dict.fromkeys([5, 6], said.removeprefix("row 6, "))
    assert found.loc[[5, 6]].drop(columns="error").isna().all(axis=None)
    expected = package.load(folder).predict(NEW.head(12).drop([5, 6]))
    pd.testing.assert_frame_equal(
        found.drop([5, 6]).drop(columns="error"), expected, rtol=1e-12, check_dtype=False
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("short.csv",), "FILE=short.csv: has no column 'age'; did you mean Age? (there are Age, smoker"),
        (("new.csv", "--keep", "name"), "--keep=name: is no column of new.csv (there are age, smoker"),
        (("none.csv",), "FILE=none.csv: does not exist"),
        (("new.csv", "-o", "there.csv"), "-o=there.csv: exists already; --force replaces it"),
        (("new.csv", "-o", "no/p.csv"), "-o=no/p.csv: lies in no folder that there is"),
        (
            ("long.csv", "-o", "p.csv"),
            "FILE=long.csv: cannot be read: row 601 has 6 fields, but there are 4 columns",
        ),
    ],
)
def test_bad_input_of_predict_is_one_line_and_leaves_no_file(arguments, said, folder, lipexp):
    NEW.to_csv("new.csv", index=False)
    NEW.rename(columns={"age": "Age"}).to_csv("short.csv", index=False)
    Path("long.csv").write_text(Path("new.csv").read_text() + "1,True,Oslo,100,5,6\n")
    Path("there.csv").write_text("kept")
    before = {path.name: path.read_bytes() for path in Path().iterdir()}
    done = lipexp("predict", folder, *arguments)
    assert (done.code, done.out, len(done.err.splitlines())) == (2, "", 1), done.err
    assert done.err.startswith(f"lipexp: {said}")
    assert {path.name: path.read_bytes() for path in Path().iterdir()} == before


def test_force_replaces_an_output_and_never_the_input(folder, lipexp):
    NEW.to_csv("new.csv", index=False)
    Path("old.csv").write_text("old")
    Path("link.csv").symlink_to("new.csv")
    assert lipexp("predict", folder, "new.csv", "-o", "old.csv", "--force").code == 0
    assert len(pd.read_csv("old.csv")["prediction"]) == 600
    before = Path("new.csv").read_text()
    for name in ("new.csv", "./new.csv", "link.csv"):
        done = lipexp("predict", folder, "new.csv", "-o", name, "--force")
        assert (done.code, done.err) == (2, f"lipexp: -o={name}: is the file that is read\n")
    assert Path("new.csv").read_text() == before


def test_a_changed_model_has_no_radii(run, lipexp):
    folder = run(*TABLE)
    edit(folder, lambda state: {name: 2 * value for name, value in state.items()})
    done = lipexp("predict", str(folder), str(FILE))
    assert done.code == 0
    assert done.out.startswith("prediction,score\n")
    assert (
        done.err == "no radii: model.pt was changed since it was certified; lipexp certify proves its constant\n"
    )
    assert lipexp("certify", str(folder)).code in (0, 1)


def test_preprocessing_of_another_network_is_refused(run):
    folder = run(*TABLE)
    content = (folder / "preprocessing.json").read_text()
    (folder / "preprocessing.json").write_text(content.replace('"Oslo",', ""))
    with pytest.raises(ConfigError, match=r"^preprocessing.json: has 5 inputs and 1 outputs, the network 6 and 1"):
        package.load(folder).predict(NEW)


def test_reach_of_a_regression_is_said_on_the_screen(trained_run, lipexp):
    folder = trained_run(*REGRESSION)
    done = lipexp("predict", str(folder), str(FILE), "--reach", "-o", "p.csv")
    slope = package.load(folder).predictor.slopes().loc["age", "pressure"]
    assert done == (0, "", f"pressure changes by at most {above(slope, None)} per unit of age\n")
    assert list(pd.read_csv("p.csv")) == ["prediction"]


def test_what_nothing_depends_on_may_change_without_end():
    """A quotient that only overflows is no proof of that."""
    weight = [[1.0, 0.0, 2.0**-140], [2.0, 0.0, 0.0]]
    network = Spectral(10.0).prove(by_hand((weight, [0.0, 0.0]), ([[2.0**100, 0.0]], [0.5])))
    box = torch.zeros(3).double(), torch.ones(3).double()
    chain = Chain.of(Spectral(10.0), network.layers)
    certificate = prove_quickly(Problem(network, chain, box, Maximum(0.0, ()), 0))
    columns = [Column(name, NUMBER, 5.0, 2.0) for name in ("a", "b", "c")]
    predictor = Predictor(
        network, certificate, Preprocessing(columns, [Target("y")], "classification", ["n", "y"], "")
    )
    found = predictor.of_points(np.ones((1, 3), dtype=np.float32), reach=True)
    assert found["reach:a"][0] < found["reach:c"][0] < found["reach:b"][0] == np.inf
    radii = {"split": np.array(["test"]), "radius": found["radius"], "prediction": np.ones(1, dtype=int)}
    radii |= {f"x{i}": np.ones(1) for i in range(3)}
    assert set(in_units(predictor, radii)[1]) == {"a", "c"}
