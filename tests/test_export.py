"""lipexp export: files that compute what the run does, where there is no lipexp, or no file at all."""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pandas as pd
import pytest
import torch
from acts import ACTS
from commands import content, edit, elsewhere, metrics
from networks import groups_of, network, normal, residual, slopes_of, with_act

from lipexp.activations import Householder, LipschitzSpline, NActivation, ReLU, Tanh
from lipexp.datasets.preprocessing import Column, Preprocessing, Target
from lipexp.export import FORMATS, format_of, graph, programs
from lipexp.export.model import Model
from lipexp.networks import BakedNetwork
from lipexp.tasks import TASKS

FREE = ("act=relu", "constraint=none", "loss=bce", "max_regions=0")
BOUNDED = [("constraint=linf", "act=fullsort", "lipschitz=3"), ("constraint=sll", "act=relu")]
BOUNDED += [("constraint=sandwich", "act=relu", "lipschitz=3")]
OTHERS = {"n": NActivation(), "spline": LipschitzSpline(3), "householder": Householder(), "tanh": Tanh()}
RESIDUAL = {"leaky_relu", "tuned", "groups of 3", "n", "householder"}

# Elsewhere -------------------------------------------------------------------------------------------------------


def expected(network: BakedNetwork, x):
    """f (N, C) at points (N, D), in numpy and float64."""
    points, beside, acts = x, False, network.double.acts
    for i, (weight, bias, *t) in enumerate(network.layers):
        matrix = weight[0].double().numpy()
        if t:
            x = x - (t[0][0].numpy() * activated(acts[i], x @ matrix + bias[0].numpy())) @ matrix.T
        else:
            x = (activated(acts[i - 1], x) if beside else x) @ matrix.T + bias[0].numpy()
        beside = not t
    return x if network.linear is None else x + points @ network.linear[0].numpy().T


def activated(act, x):
    if type(act) in map(type, OTHERS.values()):  # which torch computes
        return act(torch.from_numpy(x[None]))[0].numpy()
    groups = groups_of(act, x.shape[1])
    if groups is None:
        below, above = map(float, slopes_of(act))
        return np.where(x > 0, above * x, below * x)
    x = x.copy()
    for group in groups:
        x[:, group] = np.sort(x[:, group], axis=1)
    return x


# torch.export takes seconds; the default suite has one file of it that is read elsewhere.
SLOW_TORCH = [pytest.param(to, marks=[pytest.mark.slow] * (to == "torch")) for to in FORMATS]
KINDS = [("classification", 1), ("multiclass", 10), ("regression", 1), ("regression", 2), ("transport", 1)]


@pytest.mark.parametrize("to", FORMATS)
def test_a_file_computes_the_same_where_there_is_no_lipexp(tmp_path, to):
    """Every activation and kind of output, near, far and at one point; with a linear term, and residual layers."""
    written, files, networks = format_of(to), [], []
    far = 10.0 ** torch.arange(-1, 4)[:, None] * normal(5, 4)
    acts = ACTS if to == "onnx" else ["leaky_relu", "abs", "maxmin", "groups of 3", "fullsort"]
    for name, (task, n_outputs) in zip([*acts, *OTHERS], itertools.cycle(KINDS), strict=False):
        make = residual if name in RESIDUAL else network
        one = make(4, 12, 6, n_outputs, act=(ACTS | OTHERS)[name], seed=len(files))
        if (task, n_outputs) == ("regression", 1):
            one = replace(one, linear=normal(1, 1, 4).float())
        path = tmp_path / f"{name}{written.suffix}"
        path.write_bytes(written.write(Model(one, TASKS[task]), {}))
        files.append((path, [{"x": x.float().numpy()} for x in (far, normal(1, 4))]))
        networks.append((task, one))
    for found, (_, inputs), (task, one) in zip(elsewhere(files), files, networks, strict=True):
        for outputs, points in zip(found, inputs, strict=True):
            f = expected(one, points["x"].astype(np.float64))
            assert outputs["f"].dtype == np.float32
            np.testing.assert_allclose(outputs["f"], f, rtol=0, atol=1e-5 * np.abs(f).max(), err_msg=repr(one))
            classes = {"classification": f[:, 0] > 0, "multiclass": f.argmax(axis=1)}.get(task)
            assert outputs.keys() == {"f"} | ({"prediction"} if classes is not None else set())
            if classes is not None:
                assert outputs["prediction"].dtype == np.int64
                np.testing.assert_array_equal(outputs["prediction"], classes)


# The verb --------------------------------------------------------------------------------------------------------


def onnx_outputs(path, inputs):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(["f"], inputs)[0]


def test_every_activation_of_conf_is_exported_as_it_was_trained(lipexp, trained_run, act_option):
    """The reported outputs of a run come out of its file, for all points that it reported."""
    folder = trained_run(f"act={act_option}", "model.depth=2")
    done = lipexp("export", str(folder), "--to", "onnx", "-o", "exported.onnx")
    assert (done.code, done.err) == (0, "")
    points = pd.read_csv(folder / "gradients.csv")
    f = onnx_outputs("exported.onnx", {"x": points[["x0", "x1"]].to_numpy(np.float32)})
    np.testing.assert_allclose(f[:, 0], points["f"], rtol=0, atol=1e-5 * points["f"].abs().max())


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("overrides", [FREE, *BOUNDED], ids=" ".join)
def test_what_is_written_is_said_with_the_bound_of_its_weights(lipexp, run, overrides, to):
    folder = run(*overrides)
    before, lipschitz = content(folder), metrics(folder)["lipschitz"]
    done = lipexp("export", str(folder), "--to", to)
    assert (done.code, done.err) == (0, "")
    suffix = format_of(to).suffix
    assert {name for name, kept in content(folder).items() if before.get(name) != kept} == {f"model{suffix}"}
    said = done.out.splitlines()
    assert said[0].startswith(f"{folder.name}/model{suffix}  ")
    assert said[1] == "input x (N, 2) of x0, x1; output f (N, 1) and prediction (N,)"
    assert said[2].startswith("equal to the run at 40 test points and 1,000 random ones in ")
    assert float(said[2].split()[-5]) < 1e-5
    name = "product" if lipschitz["whole"] is None else "multipliers"
    bound = float(said[3].removeprefix(f"proven again from the weights in the file, as for the run: {name} "))
    proven = lipschitz["product" if name == "product" else "whole"]
    assert bound >= proven
    assert bound == pytest.approx(proven, rel=1e-3)
    assert said[4].startswith("‖∇f‖₂  measured ")
    kept = description(folder / f"model{suffix}")
    assert kept["lipschitz"] == lipschitz
    assert (kept["task"], kept["model_sha256"]) == ("classification", metrics(folder)["model_sha256"])


def description(path: Path):
    """What is kept beside the program."""
    if path.suffix == ".onnx":
        return json.loads(onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map["lipexp"])
    extra = {programs.DESCRIPTION: ""}
    if path.suffix == ".pt2":
        torch.export.load(path, extra_files=extra)
    else:
        with pytest.warns(DeprecationWarning, match=r"torch\.jit\.load"):
            torch.jit.load(path, _extra_files=extra)
    return json.loads(extra[programs.DESCRIPTION])


REFUSED = {
    "nowhere --to onnx": "RUN=nowhere: does not exist",
    ". --to onnx": "RUN=.: holds 2 runs; export takes one",
    "empty --to onnx": "RUN=empty: no finished run found there",
    "a --to tflite": "--to: invalid choice: 'tflite'",
    "a": "the following arguments are required: --to",
    "a --to onnx -o a": "-o=a: is a folder",
    "a --to onnx -o no/where.onnx": "-o=no/where.onnx: is in no folder that exists",
    "a --to onnx -o a.onnx": "-o=a.onnx: exists; --force replaces files in .onnx",
    "a --to torch -o a/model.pt --force": "-o=a/model.pt: exists; --force replaces files in .pt2",
    "a --to onnx -o a.onnx/b": "-o=a.onnx/b: is in no folder that exists",
    "b --to torch": "b: model.pt=b/model.pt: was changed since the run recorded it",
}


def test_bad_input_is_one_line_and_leaves_nothing(lipexp, run, tmp_path):
    run(name="a")
    edit(run(name="b"), lambda state: state["layers.0.weight"].mul_(0.5))
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.onnx").write_text("an older file")
    before = content(tmp_path)
    for command, message in REFUSED.items():
        done = lipexp("export", *command.split())
        assert (done.code, done.out, len(done.err.splitlines())) == (2, "", 1), done.err
        assert message in done.err
    assert content(tmp_path) == before


def test_packages_that_are_missing_are_named_with_their_extra(lipexp, run, monkeypatch):
    folder = run()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    done = lipexp("export", str(folder), "--to", "onnx")
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    assert "--to=onnx: needs onnx and onnxruntime: pip install 'lipexp[onnx]'" in done.err
    assert lipexp("export", str(folder), "--to", "torchscript").code == 0


@pytest.mark.parametrize("factor", [0.5, 1.5])
def test_a_changed_model_is_exported_once_it_is_certified_within_its_bound(lipexp, run, factor):
    folder = run("max_regions=0")
    edit(folder, lambda state: state["layers.0.weight"].mul_(factor))
    certified = lipexp("certify", str(folder)).code
    done = lipexp("export", str(folder), "--to", "onnx")
    if factor > 1:
        assert (certified, done.code, done.out) == (1, 2, "")
        assert "does not keep its bound: ‖∇f‖₂  measured" in done.err
        return
    assert (certified, done.code, done.err) == (0, 0, "")
    assert description(folder / "model.onnx")["lipschitz"] == metrics(folder)["certify"]["lipschitz"]


USER_CODE = """
import torch
from torch import nn

class Rotation(nn.Module):
    norms = (2,)

    def forward(self, x):
        a, b = x.chunk(2, dim=-1)
        return torch.cat([0.6 * a - 0.8 * b, 0.8 * a + 0.6 * b], -1).abs()

class Branching(nn.Module):
    norms = (2,)

    def forward(self, x):
        return x.abs() if x.sum() > 0 else -x.abs()
"""


def test_a_users_activation_needs_declarations_for_onnx_and_none_for_torch(lipexp, monkeypatch, run_folders):
    Path("acts_to_export.py").write_text(USER_CODE)
    monkeypatch.delitem(sys.modules, "acts_to_export", raising=False)
    results = {}
    for name in ("Rotation", "Branching"):
        folder = f"run_{name}"
        own = f"act._target_=acts_to_export.{name}"
        trained = lipexp(
            "train", "experiment=debug", "device=cpu", "act=relu", own, "max_regions=0", f"hydra.run.dir={folder}"
        )
        assert trained.code == 0, trained.err
        for to in FORMATS:
            done = lipexp("export", folder, "--to", to, "--trust")
            results[name, to] = done.code
            assert len(done.err.splitlines()) == (done.code != 0), done.err
            assert Path(folder, f"model{format_of(to).suffix}").exists() == (done.code == 0)
            if to == "onnx":
                assert f"act={name}: declares neither two slopes nor the groups that it sorts" in done.err
    untrusted = lipexp("export", folder, "--to", "torch")
    assert untrusted.code == 2
    assert "pass trust (--trust)" in untrusted.err
    # What depends on values cannot be followed: torch.export says so, and a trace computes something else.
    assert results == {
        **{("Rotation", to): {"onnx": 2}.get(to, 0) for to in FORMATS},
        **{("Branching", "torch"): 2, ("Branching", "torchscript"): 1, ("Branching", "onnx"): 2},
    }


# A file that is not equal to the run -----------------------------------------------------------------------------


def with_an_ulp_more(one: BakedNetwork) -> BakedNetwork:
    (weight, bias), *rest = one.layers
    moved = torch.where(torch.arange(weight.shape[1])[:, None] == 0, weight.nextafter(weight + 1), weight)
    return replace(one, layers=[type(one.layers[0])(moved, bias), *rest])


WRONG = {
    "another activation": (lambda one: with_act(one, ReLU()), "its outputs differ from the run's by "),
    "a weight of one ulp more": (with_an_ulp_more, "its weights are not those of model.pt"),
}


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("name", WRONG)
def test_a_file_that_is_not_equal_to_the_run_is_not_kept(lipexp, run, monkeypatch, to, name):
    change, message = WRONG[name]
    written = format_of(to)
    module = graph if to == "onnx" else programs
    monkeypatch.setattr(
        module,
        written.write.__name__,
        lambda model, description: written.write(replace(model, network=change(model.network)), description),
    )
    folder = run("act=abs", "max_regions=0")
    (folder / f"model{written.suffix}").write_text("an older file")
    before = content(folder)
    done = lipexp("export", str(folder), "--to", to, "--force")
    assert (done.code, done.out, len(done.err.splitlines())) == (1, "", 1)
    assert message in done.err
    assert content(folder) == before


def test_a_bound_that_is_not_that_of_the_run_is_refused(lipexp, run):
    folder = run("max_regions=0")
    recorded = metrics(folder)
    recorded["lipschitz"]["product"] *= 1 - 1e-6
    (folder / "metrics.json").write_text(json.dumps(recorded))
    done = lipexp("export", str(folder), "--to", "onnx")
    assert done.code == 1
    assert "its proven bound is 0.99999" in done.err
    assert not (folder / "model.onnx").exists()


def test_a_prediction_that_its_outputs_contradict_is_refused(lipexp, run, monkeypatch):
    monkeypatch.setattr(programs, "decision", lambda f: (f[:, 0] < 0).long())
    folder = run("max_regions=0")
    done = lipexp("export", str(folder), "--to", "torchscript")
    assert done.code == 1
    assert "its predictions are not those of its outputs" in done.err
    assert not (folder / "model.ts").exists()


# Tables ----------------------------------------------------------------------------------------------------------

CITIES = ["Ulm", "São Paulo", "New York, NY"]
CLASSES = {"classification": ["no", "yes"], "multiclass": ["low", "mid", "high"], "regression": []}
UNIT = np.array([[1e4, -3.0], [700.0, 0.5]])  # mean and scale of two targets
TABLES = [("classification", False, True), ("multiclass", True, True), ("regression", True, False)]


def table_model(task: str, fill: bool, text: bool) -> Model:
    """A network behind columns of all kinds, in which missing values are filled in, or text is left out."""
    columns = [
        Column("age", "number", 54.3, 9.1, fill=50.0 if fill else None),
        Column("city", "category", categories=CITIES, fill=2.0 if fill else None),
        Column("member since", "number", 2004.7, 0.03),
        Column("smoker", "boolean", fill=1.0 if fill else None),
    ]
    columns = [each for each in columns if text or not each.categories]
    targets = [Target(f"target {i}", *unit) for i, unit in enumerate(UNIT.T)]
    own = Preprocessing(columns, targets, task, CLASSES[task], "")
    one = network(len(own.features), 12, {"classification": 1, "multiclass": 3, "regression": 2}[task])
    return Model(one, TASKS[task], (), own)


def table_rows(fill: bool):
    """Rows of the four columns, a category by its place; and whether each can be used."""
    rng = np.random.default_rng(0)
    x = np.stack([rng.normal(54, 9, 40), rng.integers(3, size=40), rng.normal(2004.7, 0.05, 40)], axis=1)
    x = np.concatenate([x, rng.integers(2, size=(40, 1))], axis=1).astype(np.float32)
    usable = np.full(40, True)
    for row, column in enumerate([0, 1, 3]):
        x[row, column] = np.nan
        usable[row] = fill
    x[3, 2], x[4, 2], usable[3:5] = np.nan, np.inf, False
    return x, usable


def table_outputs(model: Model, x, fill: bool, text: bool):
    """f of rows, from the definition of each column, in float64."""
    age, city, since, smoker = np.where(np.isnan(x) & fill, [50.0, 2.0, np.nan, 1.0], x.astype(np.float64)).T
    one_hot = [city == place for place in range(3)] if text else []
    points = np.stack([(age - 54.3) / 9.1, *one_hot, (since - 2004.7) / 0.03, smoker], axis=1)
    f = expected(model.network, points)
    return UNIT[0] + UNIT[1] * f if model.classes == [] else f


@pytest.mark.parametrize("to", SLOW_TORCH)
def test_a_file_takes_the_columns_of_a_table_as_they_are(tmp_path, to):
    """Rows that cannot be used are marked, and do not change the others."""
    written, files, cases = format_of(to), [], []
    for task, fill, text in TABLES:
        model = table_model(task, fill, text)
        path = tmp_path / f"{len(files)}{written.suffix}"
        path.write_bytes(written.write(model, {}))
        x, usable = table_rows(fill)
        inputs = {"x": x if text else x[:, [0, 2, 3]]}
        if text:
            x[5, 1], usable[5] = (-1 if fill else 3), False  # a category that is not known
            if to == "onnx":
                names = [CITIES[int(place)] if place in (0, 1, 2) else "" for place in x[:, 1]]
                names[5] = "Nowhere"
                columns = {"age": 0, "member since": 2, "smoker": 3}
                inputs = {name: x[:, [place]] for name, place in columns.items()}
                inputs["city"] = np.array(names, dtype=object)[:, None]
        files.append((path, [inputs]))
        cases.append((model, table_outputs(model, x[usable], fill, text), usable))
    for (outputs,), (model, f, usable) in zip(elsewhere(files), cases, strict=True):
        scale = np.abs(f).max(axis=0)
        np.testing.assert_allclose(outputs["f"][usable] / scale, f / scale, rtol=0, atol=1e-5)
        assert np.isnan(outputs["f"][~usable]).all()
        if model.classes:
            classes = np.full(len(usable), -1)
            classes[usable] = f[:, 0] > 0 if f.shape[1] == 1 else f.argmax(axis=1)
            names = np.array([*model.classes, ""], dtype=object)[classes]
            np.testing.assert_array_equal(outputs["prediction"], names if to == "onnx" else classes)


def test_a_run_on_a_table_is_exported_with_its_preprocessing(lipexp, tmp_path):
    """Every row of the user's file, as pandas reads it, gets the output that the run reported."""
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"age": rng.normal(54, 9, 200).round(), "city": rng.choice(CITIES, 200)})
    frame["cost"] = 1e4 + 50 * frame["age"] + 700 * (frame["city"] == "Ulm")
    frame.to_csv("insured.csv", index=False)
    options = ("dataset.path=insured.csv", "dataset.target=cost", "dataset.n_val=40", "dataset.n_test=40")
    command = ("experiment=debug", "device=cpu", "dataset=table", "loss=mse", "dataset.n_train=null", *options)
    assert lipexp("train", *command, "hydra.run.dir=run").code == 0
    done = lipexp("export", "run", "--to", "onnx")
    assert (done.code, done.err) == (0, "")
    assert "inputs age, city, each (N, 1); output f (N, 1)" in done.out
    columns = {"age": frame[["age"]].to_numpy(np.float32), "city": frame[["city"]].to_numpy(object)}
    f = np.sort(onnx_outputs("run/model.onnx", columns)[:, 0])
    reported = pd.read_csv("run/gradients.csv")["f"].to_numpy()
    kept = description(Path("run/model.onnx"))["preprocessing"]["targets"][0]
    np.testing.assert_allclose(f, np.sort(kept["mean"] + kept["scale"] * reported), rtol=1e-5)
    frame["age"] += 1
    frame.to_csv("insured.csv", index=False)
    refused = lipexp("export", "run", "--to", "torch")
    assert refused.code == 2
    assert "reads another table than the one that the run was trained on" in refused.err
