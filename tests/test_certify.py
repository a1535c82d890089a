"""lipexp certify: believes only what it proves, says what was changed, and writes nothing but its own section."""

from __future__ import annotations

import math
import os
import sys
from fractions import Fraction
from pathlib import Path

import pandas as pd
import pytest
import torch
from commands import content, edit, metrics
from networks import of_classes

import lipexp as package
from lipexp.proven.methods import METHODS, Proof
from lipexp.runs import RunFolder

CHANGED = "model.pt was changed: its SHA-256 is not the one that the run recorded"
FREE = ("act=relu", "constraint=none", "loss=bce", "max_regions=0")

# A run as it was trained -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [(), ("dataset=absolute_value",), ("dataset=cones", "dataset.n_inputs=3", "constraint=linf")],
    ids=" ".join,
)
def test_an_unchanged_run_is_certified_as_it_was(lipexp, run, overrides):
    folder = run(*overrides)
    trained, before = metrics(folder), content(folder)
    done = lipexp("certify", str(folder))
    assert (done.code, done.err) == (0, "")
    after, section = content(folder), metrics(folder)["certify"]
    assert metrics(folder) | {"certify": None} == trained
    own = {"metrics.json"} | ({"certify_radii.csv"} if trained["robustness"] else set())
    assert {name for name in before | after if after[name] != before.get(name)} == own
    assert (section["model_sha256"], section["changed"]) == (trained["model_sha256"], False)
    known, again = trained["lipschitz"], section["lipschitz"]
    assert again["certified"] == pytest.approx(known["certified"], rel=1e-9)
    assert again["verdict"] == known["verdict"] == "PASS"
    # The same points, and in many dimensions a longer search; rounding can pick another of two equal ones.
    assert known["measured"] * (1 - 1e-9) <= again["measured"] <= again["certified"]
    assert CHANGED not in done.out
    assert "measured" in done.out
    if trained["robustness"]:
        assert section["robustness"] == trained["robustness"] | {"lipschitz": again["certified"]}
        radii, again = (pd.read_csv(folder / f"{name}.csv") for name in ("radii", "certify_radii"))
        pd.testing.assert_frame_equal(radii, again, rtol=1e-9)


@pytest.mark.parametrize(
    ("p", "overrides"),
    [
        (2, ""),
        (1, ""),
        ("inf", ""),
        (2, "constraint=linf constraint.p=inf"),
        (2, "dataset=wine constraint=one"),
        ("inf", "constraint=sandwich act=relu"),
    ],
)
def test_a_run_is_certified_in_any_norm_beside_its_own(lipexp, run, p, overrides):
    folder = run(*overrides.split())
    known = metrics(folder)["lipschitz"]
    done = lipexp("certify", str(folder), "--p", str(p), "--attack")
    assert (done.code, done.err) == (0, "")
    after = metrics(folder)
    if known["p"] == p:
        assert after["certify_in"] == {}
        assert after["certify"]["lipschitz"]["target"] == known["target"]
        return
    assert after["certify"] is None
    section = after["certify_in"][str(p)]
    found, radii = section["lipschitz"], pd.read_csv(folder / f"certify_radii_{p}.csv")
    assert (found["p"], found["q"], found["target"], found["verdict"]) == (
        p,
        {1: "inf", 2: 2, "inf": 1}[p],
        None,
        "PASS",
    )
    assert section["attack"]["flips_inside"] == 0
    # By another route: gradients of autograd in float64 at the points themselves.
    network = package.load(folder).baked.double
    x = torch.tensor(radii.filter(regex=r"^x\d+$").to_numpy()).unsqueeze(0).requires_grad_()
    outputs = network(x)
    q = {1: math.inf, 2: 2.0, "inf": 1.0}[p]
    for c in range(outputs.shape[2]):
        (gradient,) = torch.autograd.grad(outputs[..., c].sum(), x, retain_graph=True)
        assert float(torch.linalg.vector_norm(gradient, ord=q, dim=2).max()) <= found["certified"] * (1 + 1e-9)
    assert found["measured"] <= found["certified"] <= found["product"]


def test_an_attack_is_reported_and_stays_until_the_model_changes(lipexp, run):
    folder = run("max_regions=0")
    for path in folder.iterdir():  # all else that is needed is recomputed
        if path.name not in ("model.pt", "metrics.json", ".hydra"):
            path.unlink()
    done = lipexp("certify", str(folder), "--attack", "--radii", "0.05,1")
    assert (done.code, done.err) == (0, "")
    assert "attack on 40 points: 0 flipped within their radius; " in done.out
    assert "certified accuracy within ‖δ‖₂ ≤ 0.05: " in done.out
    section = metrics(folder)["certify"]
    found = section["attack"]
    assert (found["points"], found["flips_inside"], found["counterexamples"]) == (40, 0, [])
    assert set(found["flipped"]) == {"1.05", "1.5", "2"}
    assert found["flipped"]["2"] >= found["flipped"]["1.05"]
    assert list(section["robustness"]["test"]["certified_accuracy"]) == ["0.05", "1"]
    assert lipexp("certify", str(folder)).code == 0
    assert metrics(folder)["certify"]["attack"] == found
    edit(folder, lambda state: state["layers.0.weight"].mul_(0.5))
    assert lipexp("certify", str(folder)).code == 0
    assert metrics(folder)["certify"]["attack"] is None


@pytest.mark.parametrize(("p", "dims"), [("2", 2), ("inf", 2), ("1", 3)])
def test_a_run_of_ten_classes_is_certified_and_attacked(lipexp, run, p, dims, monkeypatch):
    monkeypatch.setattr("lipexp.finding.EFFORT", 1)
    monkeypatch.setattr("lipexp.measured.attack.BEYOND", (2.0,))
    own = (f"constraint.p={p}", "dataset.n_test=40", "max_regions=0", *of_classes(10, dims))
    folder = run("constraint=linf", *own)
    trained = metrics(folder)
    done = lipexp("certify", str(folder), "--attack", "--trust")
    assert (done.code, done.err) == (0, "")
    assert "0 flipped within their radius" in done.out
    section = metrics(folder)["certify"]
    assert section["lipschitz"]["verdict"] == "PASS"
    assert section["attack"]["points"] > 0
    assert section["robustness"]["pairs"] == pytest.approx(trained["robustness"]["pairs"], rel=1e-6)
    radii, again = (pd.read_csv(folder / f"{name}.csv") for name in ("radii", "certify_radii"))
    pd.testing.assert_frame_equal(radii, again, rtol=1e-6)
    assert (radii["runner_up"] != radii["prediction"]).all()
    gradients = pd.read_csv(folder / "gradients.csv")
    assert {"f0", "f9", "grad_1", "grad_2", "grad_inf"} <= {*gradients}


def test_a_folder_of_runs_is_certified_run_by_run(lipexp, run, tmp_path):
    folders = [run("dataset=absolute_value", name="sweep/0"), run(*FREE, name="sweep/1")]
    RunFolder(tmp_path / "sweep").write_failure("the loss is no longer finite", 3)
    failed = f"lipexp: {tmp_path / 'sweep'}: failed, left out\n"
    done = lipexp("certify", str(tmp_path / "sweep"), "--attack", "--max-regions", "0")
    assert (done.code, done.err) == (0, failed)
    assert [line.split()[0] for line in done.out.splitlines() if "seed" in line] == [str(f) for f in folders]
    assert done.out.count("no attack: a regression has no radii") == 1
    assert all(metrics(folder)["certify"] for folder in folders)
    (folders[0] / "model.pt").write_bytes(b"")
    done = lipexp("certify", str(tmp_path / "sweep"), "--max-regions", "0")
    assert (done.code, done.out.count("seed"), done.err.count("\n")) == (2, 1, 2)  # the others are certified


# Weights edited by hand ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("constraint", "method", "name", "said"),
    [
        ("sll", "product", "layers.1.t", "layer 1: residual layer infinity > its bound 1"),
        (
            "sandwich",
            "multipliers",
            "multipliers",
            "the multipliers of the network prove nothing of its stored weights",
        ),
    ],
)
def test_numbers_that_prove_nothing_are_named(lipexp, run, constraint, method, name, said):
    """At L < 1, which the norm of a residual layer exceeds."""
    folder = run(f"constraint={constraint}", "act=relu", "lipschitz=0.1", "max_regions=0")
    done = lipexp("certify", str(folder))
    assert (done.code, done.err, "its bound" in done.out) == (0, "", False)
    assert 0.0999 < metrics(folder)["certify"]["bounds"][method]["value"] <= 0.1
    edit(folder, lambda state: state[name].mul_(3))
    done = lipexp("certify", str(folder))
    assert said in done.out.splitlines()
    assert metrics(folder)["certify"]["bounds"][method]["value"] is None


@pytest.mark.parametrize(("factor", "broken"), [(1.5, True), (0.5, False)])
def test_scaled_weights_are_reported_and_fail_with_their_layer_or_are_proven(lipexp, run, factor, broken):
    folder = run("max_regions=0")
    trained = metrics(folder)["lipschitz"]
    edit(folder, lambda state: state["layers.2.weight"].mul_(factor))
    done = lipexp("certify", str(folder), "--attack")
    section = metrics(folder)["certify"]
    assert CHANGED in done.out
    assert section["changed"] is True
    assert ("layer 2: spectral norm 1.49999" in done.out) == broken
    refused = f"lipexp: {folder}: certified is above L: layer 2: spectral norm"
    assert done.err.startswith(refused) if broken else not done.err
    assert (done.code, section["lipschitz"]["verdict"]) == ((1, "FAIL") if broken else (0, "PASS"))
    # The radii come from what is proven of the network as it is, not from L.
    assert section["robustness"]["lipschitz"] == section["lipschitz"]["certified"]
    assert (section["lipschitz"]["certified"] > 1) == broken
    assert section["attack"]["flips_inside"] == 0
    assert metrics(folder)["lipschitz"] == trained  # what training said is left alone


def test_an_ulp_too_much_on_a_row_that_is_tight_fails(lipexp, run):
    """Against the exact row sums, which are the whole certificate of this chain."""
    folder = run("constraint=linf", "constraint.p=inf", "model.depth=3")

    def tight(state):
        """Every row of every layer gets a norm of 1, the bound itself; then one moves by an ulp."""
        for i in range(4):
            state[f"layers.{i}.weight"].zero_()[:, 0] = 1
        state["layers.1.weight"][3, 0] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))

    state = edit(folder, tight)
    done = lipexp("certify", str(folder))
    assert done.code == 1
    assert "layer 1: row 1-norm 1.00000012 > its bound 1" in done.out
    rows = [
        max(sum(abs(Fraction(v)) for v in row) for row in state[f"layers.{i}.weight"].tolist()) for i in range(4)
    ]
    assert Fraction(metrics(folder)["certify"]["lipschitz"]["product"]) >= math.prod(rows) > 1
    edit(folder, lambda state: state["layers.1.weight"].clamp_(max=1))
    assert lipexp("certify", str(folder)).code == 0


# Methods ---------------------------------------------------------------------------------------------------------


def test_the_best_method_that_holds_everywhere_gives_the_radii(lipexp, run, monkeypatch):
    folder = run("constraint=linf", "max_regions=0")
    measured, certified, product = (metrics(folder)["lipschitz"][k] for k in ("measured", "certified", "product"))
    between = (measured + certified) / 2
    assert measured < between < certified
    seen = []
    methods = {
        "tight": lambda problem: seen.append((problem.gap, problem.seconds)) or Proof(between),
        "box": lambda problem: Proof(measured, everywhere=False),
        "none": lambda problem: Proof(None, "is for other networks"),
    }
    for name, method in methods.items():
        monkeypatch.setitem(METHODS, name, method)
    done = lipexp("certify", str(folder), "--gap", "0.5", "--max-seconds", "7")
    assert (done.code, done.err, seen) == (0, "", [(0.5, 7.0)])
    section = metrics(folder)["certify"]
    assert section["lipschitz"]["certified"] == section["robustness"]["lipschitz"] == between
    assert section["lipschitz"]["method"] == "tight"
    known = {name: bound["value"] for name, bound in section["bounds"].items() if bound["value"] is not None}
    expected = {"product": product, "tight": between, "box": measured}
    assert {name: known.pop(name) for name in expected} == pytest.approx(expected, rel=1e-9)
    assert min(known.values()) >= certified * (1 - 1e-9)
    # A method alone: the product and it. What another call has proven better stays, with its radii.
    radii = (folder / "certify_radii.csv").read_bytes()
    done = lipexp("certify", str(folder), "--method", "product")
    assert done.code == 0
    assert "≤ certified" in done.out
    assert metrics(folder)["certify"] == section
    assert (folder / "certify_radii.csv").read_bytes() == radii
    done = lipexp("certify", str(folder), "--method", "none")
    assert done.code == 2
    assert "--method=none: has no bound for this network: is for other networks" in done.err


DEEP = {f"layers.{i}.weight": torch.full((1 if i == 8 else 2, 2), 3e38) for i in range(9)}
BIASES = {f"layers.{i}.bias": torch.zeros(1 if i == 8 else 2) for i in range(9)}


@pytest.mark.parametrize("act", ["relu", "groupsort"])
def test_weights_whose_bounds_are_infinite_leave_the_interval_open(lipexp, run, act):
    """Nothing that is not finite reaches metrics.json, whose writer would refuse it."""
    folder = run("constraint=none", "loss=bce", f"act={act}")
    edit(folder, lambda state: DEEP | BIASES)
    done = lipexp("certify", str(folder), "--attack")
    assert (done.code, done.err) == (0, "")
    assert "bounds: product - (its numbers overflow float64)  rows - (its numbers overflow float64)" in done.out
    assert "OPEN (its numbers overflow float64)" in done.out
    interval = metrics(folder)["certify"]["lipschitz"]
    assert (interval["certified"], interval["product"], interval["verdict"]) == (None, None, "OPEN")
    done = lipexp("certify", str(folder), "--method", "bnb", "--max-seconds", "1e9")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "--method=bnb: has no bound for this network: its numbers overflow float64" in done.err


def test_a_model_of_one_layer_is_certified_whatever_its_activation(lipexp, run):
    folder = run("constraint=none", "loss=bce", "act=groupsort")
    edit(folder, lambda state: {"layers.0.weight": torch.tensor([[3.0, 4.0]]), "layers.0.bias": torch.ones(1)})
    for method in ((), ("--method", "bnb")):
        done = lipexp("certify", str(folder), "--attack", *method)
        assert (done.code, done.err) == (0, "")
        section = metrics(folder)["certify"]["lipschitz"]
        assert section["measured"] == section["certified"] == 5


def test_a_bound_that_is_too_small_is_refuted_by_measure_and_attack(lipexp, run, monkeypatch):
    """The verb does not believe its own methods either."""
    folder = run(*FREE)
    measured = metrics(folder)["lipschitz"]["measured"]
    monkeypatch.setitem(METHODS, "wrong", lambda problem: Proof(measured / 2))
    done = lipexp("certify", str(folder), "--attack")
    assert done.code == 1
    assert "a bound is broken, a bug in lipexp" in done.err
    section = metrics(folder)["certify"]
    assert section["lipschitz"]["verdict"] == "FAIL"
    found = section["attack"]["counterexamples"]
    assert section["attack"]["flips_inside"] >= len(found) > 0
    assert f"counterexample: test point {found[0]['index']}, {found[0]['point']}, has f = " in done.out
    assert str(found[0]["moved"]) in done.out
    model = torch.load(folder / "model.pt", weights_only=True)

    def f(point: list[float]) -> float:
        h = torch.tensor(point).double()
        for i in range(3):
            h = model[f"layers.{i}.weight"].double() @ (h.relu() if i else h) + model[f"layers.{i}.bias"]
        return float(h)

    for flip in found:
        assert math.dist(flip["point"], flip["moved"]) <= flip["radius"]
        assert f(flip["point"]) * f(flip["moved"]) < 0


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError(28, "No space left on device")], ids=str)
def test_an_interrupted_write_leaves_the_folder_as_it_was(lipexp, run, monkeypatch, failure):
    folder = run("max_regions=0")
    before = content(folder)

    def fail(*arguments):
        raise failure

    monkeypatch.setattr(os, "replace", fail)
    done = lipexp("certify", str(folder))
    assert (done.code, len(done.err.splitlines())) == (130 if failure is KeyboardInterrupt else 2, 1)
    assert content(folder) == before


# From elsewhere: nothing in it is run, and what cannot be used is one line ---------------------------------------

FOREIGN = """
open("imported", "w").close()
from lipexp.activations import ReLU
from lipexp.constraints import Unconstrained
from lipexp.datasets import TwoMoons
"""


def replaced(old: str, new: str):
    """Edits a run's configuration."""

    def replace(folder: Path) -> None:
        path = folder / ".hydra" / "config.yaml"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new, 1))

    return replace


@pytest.mark.parametrize("target", ["activations.ReLU", "constraints.Unconstrained", "datasets.TwoMoons"])
def test_a_class_from_elsewhere_needs_trust(lipexp, run, target, monkeypatch, tmp_path):
    folder, own = run(*FREE), f"elsewhere.{target.rpartition('.')[2]}"
    (tmp_path / "elsewhere.py").write_text(FOREIGN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "elsewhere", raising=False)
    replaced(f"lipexp.{target}", own)(folder)
    before = content(folder)
    done = lipexp("certify", str(folder))
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    assert f"._target_={own}: is no class of lipexp." in done.err
    assert " and may run code; pass trust (--trust)" in done.err
    assert not Path("imported").exists()
    assert content(folder) == before
    done = lipexp("certify", str(folder), "--trust")
    assert (done.code, done.err) == (0, "")
    assert Path("imported").exists()


def saved(change):
    return lambda folder: edit(folder, change)


def recorded(text: str):
    return lambda folder: (folder / "metrics.json").write_text(text)


TWO = {"layers.2.weight": torch.ones(2, 16), "layers.2.bias": torch.ones(2)}
TWO_MOONS, MSE = "lipexp.datasets.TwoMoons", "lipexp.losses.MSE"
BROKEN = {
    "not finite": (saved(lambda s: s["layers.1.weight"].fill_(math.nan)), "holds numbers that are not finite"),
    "two outputs": (saved(lambda s: s | TWO), "has 2 inputs and 2 outputs, its dataset 2 and 1"),
    "other inputs": (
        saved(lambda s: s | {"layers.0.weight": torch.ones(16, 5)}),
        "has 5 inputs and 1 outputs, its dataset 2 and 1",
    ),
    "no act": (replaced("act:", "ract:"), "act: needs an option with a _target_"),
    "an interpolation": (replaced("noise: 0.05", "noise: ${oc.env:HOME}"), "is not resolved"),
    "regions below none": (
        replaced("max_regions: 0", "max_regions: -5"),
        "max_regions=-5: must be a whole number",
    ),
    "no seed": (replaced("seed: 0", "seeed: 0"), "seed: must be a whole number"),
    "another class": (replaced(TWO_MOONS, MSE), f"dataset._target_={MSE}: is no class of lipexp.datasets"),
    "an older schema": (recorded('{"schema": 1}'), "its schema is 1, this lipexp reads 5: train it again"),
    "metrics that are cut": (recorded("{"), "metrics.json cannot be read"),
    "metrics that are a list": (recorded("[]"), "metrics.json cannot be read: it is no JSON object"),
    "an empty model": (lambda folder: (folder / "model.pt").write_bytes(b""), "is not a plain state dict"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_run_that_cannot_be_used_is_one_line_and_left_alone(lipexp, run, name):
    damage, message = BROKEN[name]
    folder = run("max_regions=0")
    damage(folder)
    before = content(folder)
    done = lipexp("certify", str(folder), "--attack")
    assert (done.code, len(done.err.splitlines())) == (2, 1), done.err
    assert done.err.startswith(f"lipexp: {folder}: ")
    assert message in done.err
    assert content(folder) == before


def test_names_from_elsewhere_do_not_reach_the_terminal_as_they_are(lipexp, run):
    folder = run("max_regions=0", name="a\x1b[2J\nb")
    (folder / ".hydra" / "hydra.yaml").unlink()
    replaced("GroupSort", '"A\\e[31mB"')(folder)
    for done in (lipexp("certify", str(folder)), lipexp("report", str(folder.parent))):
        assert r"a\x1b[2J\nb" in done.out + done.err
        assert (done.out + done.err).replace("\n", "").isprintable()


BAD_INPUT = {
    "nowhere": "RUN=nowhere: does not exist",
    "": "the following arguments are required: RUN",
    ". --gap 0": "--gap=0.0: must be a finite number above 0",
    ". --gap wide": "argument --gap: invalid float value: 'wide'",
    ". --max-seconds -1": "--max-seconds=-1.0: must be a finite number above 0",
    ". --radii 0.1,far": "--radii=0.1,far: must be numbers, such as 0.1,0.25",
    ". --radii 0.1,-1": "--radii=-1.0: must be a finite number above 0",
    ". --method magic": "argument --method: invalid choice: 'magic'",
    ".": "RUN=.: no finished run found there",
}


@pytest.mark.parametrize("command", BAD_INPUT)
def test_bad_input_is_one_line(lipexp, command):
    done = lipexp("certify", *command.split())
    assert (done.code, done.out, len(done.err.splitlines())) == (2, "", 1)
    assert done.err.startswith(f"lipexp: {BAD_INPUT[command]}")
