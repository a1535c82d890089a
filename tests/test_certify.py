"""lipexp certify: believes only what it proves, says what was changed, and writes nothing but its own section."""

from __future__ import annotations

import math
import os
from fractions import Fraction
from pathlib import Path

import pandas as pd
import pytest
import torch
from commands import content, edit, metrics

from lipexp import certify
from lipexp.proven.methods import METHODS, Proof
from lipexp.runs import RunFolder

CHANGED = "model.pt was changed: its SHA-256 is not the one that the run recorded"
FREE = ("act=relu", "constraint=none", "loss=bce")
ROWS = ("constraint=linf", "constraint.p=inf", "model.depth=3")

# A run as it was trained -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [(), FREE, ("dataset=absolute_value",), ("dataset=cones", "dataset.n_inputs=3", "constraint=linf")],
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
    assert {name for name in after if after[name] != before.get(name)} == own
    assert set(before) <= set(after)
    assert (section["model_sha256"], section["changed"]) == (trained["model_sha256"], False)
    known, again = trained["lipschitz"], section["lipschitz"]
    assert again["certified"] == known["certified"]
    assert again["verdict"] == known["verdict"] == "PASS"
    # The same points, and in many dimensions a longer search; rounding can pick another of two equal ones.
    assert known["measured"] * (1 - 1e-9) <= again["measured"] <= again["certified"]
    assert CHANGED not in done.out
    assert "measured" in done.out
    if trained["robustness"] is None:
        assert section["robustness"] is None
        return
    for key in ("p", "certified_accuracy", "reason"):
        assert section["robustness"][key] == trained["robustness"][key]
    assert section["robustness"]["median_radius"] == pytest.approx(trained["robustness"]["median_radius"])
    radii, again = (pd.read_csv(folder / f"{name}.csv") for name in ("radii", "certify_radii"))
    pd.testing.assert_frame_equal(radii, again, rtol=1e-9)


def test_an_attack_is_reported_and_stays_until_the_model_changes(lipexp, run):
    folder = run("max_regions=0")
    for path in folder.iterdir():  # all else that is needed is recomputed
        if path.name not in ("model.pt", "metrics.json", ".hydra"):
            path.unlink()
    done = lipexp("certify", str(folder), "--attack", "--radii", "0.05,1")
    assert (done.code, done.err) == (0, "")
    assert "attack on 200 points: 0 flipped within their radius; " in done.out
    assert "certified accuracy within ‖δ‖₂ ≤ 0.05: " in done.out
    section = metrics(folder)["certify"]
    found = section["attack"]
    assert (found["points"], found["flips_inside"], found["counterexamples"]) == (200, 0, [])
    assert set(found["flipped"]) == {"1.05", "1.5", "2"}
    assert found["flipped"]["2"] >= found["flipped"]["1.05"]
    assert found["secant"]["slope"] <= found["lipschitz"] == section["lipschitz"]["certified"]
    assert list(section["robustness"]["certified_accuracy"]) == ["0.05", "1"]
    assert lipexp("certify", str(folder)).code == 0
    section = metrics(folder)["certify"]
    assert section["attack"] == found
    assert list(section["robustness"]["certified_accuracy"]) == ["0.1", "0.25", "0.4", "0.5"]
    edit(folder, lambda state: state["layers.0.weight"].mul_(0.5))
    assert lipexp("certify", str(folder)).code == 0
    assert metrics(folder)["certify"]["attack"] is None


def test_a_folder_of_runs_is_certified_run_by_run(lipexp, run, tmp_path):
    folders = [run("dataset=absolute_value", name="sweep/0"), run(*FREE, name="sweep/1")]
    RunFolder(tmp_path / "sweep").write_failure("the loss is no longer finite", 3)
    done = lipexp("certify", str(tmp_path / "sweep"), "--attack", "--max-regions", "0")
    assert (done.code, done.err) == (0, f"lipexp: {tmp_path / 'sweep'}: failed, left out\n")
    assert [line.split()[0] for line in done.out.splitlines() if "seed" in line] == [str(f) for f in folders]
    assert done.out.count("no attack: a regression has no radii") == 1
    assert all(metrics(folder)["certify"] for folder in folders)


# Weights edited by hand ------------------------------------------------------------------------------------------


def largest_rows(state: dict[str, torch.Tensor]) -> list[Fraction]:
    """The largest row 1-norm of each layer, exactly."""
    weights = [state[f"layers.{i}.weight"].tolist() for i in range(len(state) // 2)]
    return [max(sum((abs(Fraction(v)) for v in row), Fraction()) for row in weight) for weight in weights]


def one_ulp_up(state: dict[str, torch.Tensor]) -> None:
    """The largest entry of the longest row of layer 1 moves away from 0."""
    weight = state["layers.1.weight"]
    row = weight[int(weight.double().abs().sum(dim=1).argmax())]
    entry = int(row.abs().argmax())
    row[entry] = torch.nextafter(row[entry], row[entry].sign() * math.inf)


def swap(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    names = {"layers.1": "layers.2", "layers.2": "layers.1"}
    return {f"{names.get(key[:8], key[:8])}{key[8:]}": value for key, value in state.items()}


EDITS = {"x 1.5": lambda state: state["layers.1.weight"].mul_(1.5), "+ 1 ulp": one_ulp_up, "swapped": swap}


@pytest.mark.parametrize("name", EDITS)
def test_edited_weights_are_reported_and_fail_or_are_proven(lipexp, run, name):
    """Against the exact row sums, which are the whole certificate of this chain."""
    folder = run(*ROWS)
    trained, state = metrics(folder)["lipschitz"], edit(folder, EDITS[name])
    done = lipexp("certify", str(folder))
    section = metrics(folder)["certify"]
    assert CHANGED in done.out
    assert section["changed"] is True
    rows = largest_rows(state)
    product, certified = (section["lipschitz"][name] for name in ("product", "certified"))
    assert Fraction(product) >= math.prod(rows)
    assert product == pytest.approx(float(math.prod(rows)), rel=1e-12)
    assert section["lipschitz"]["measured"] <= certified <= product
    within = certified <= 1
    assert (done.code, section["lipschitz"]["verdict"]) == ((0, "PASS") if within else (1, "FAIL"))
    if name == "x 1.5":
        assert product > 1
        assert "layer 1: row 1-norm 1.4999" in done.out
        assert len(section["broken_layers"]) == 1
        assert within or "layer 1: row 1-norm" in done.err
    if name == "swapped":
        assert (within, done.err) == (True, "")
    assert metrics(folder)["lipschitz"] == trained  # what training said is left alone


def test_an_ulp_too_much_on_a_row_that_is_tight_fails(lipexp, run):
    folder = run(*ROWS)

    def tight(state):
        """Every row of every layer gets a norm of 1, the bound itself; then one moves by an ulp."""
        for i in range(4):
            state[f"layers.{i}.weight"].zero_()[:, 0] = 1
        one_ulp_up(state)

    edit(folder, tight)
    done = lipexp("certify", str(folder))
    assert done.code == 1
    assert "layer 1: row 1-norm 1.00000012 > its bound 1" in done.out
    edit(folder, lambda state: state["layers.1.weight"].clamp_(max=1))
    assert lipexp("certify", str(folder)).code == 0


def test_a_spectral_norm_that_was_scaled_up_fails_with_its_layer(lipexp, run):
    folder = run("max_regions=0")
    edit(folder, lambda state: state["layers.2.weight"].mul_(1.5))
    done = lipexp("certify", str(folder), "--attack")
    assert done.code == 1
    assert "layer 2: spectral norm 1.49999" in done.out
    assert done.err.startswith(f"lipexp: {folder}: certified is above L: layer 2: spectral norm")
    section = metrics(folder)["certify"]
    assert section["lipschitz"]["verdict"] == "FAIL"
    # The radii come from what is proven of the network as it is, not from L.
    assert section["robustness"]["lipschitz"] == section["lipschitz"]["certified"] > 1
    assert section["attack"]["flips_inside"] == 0


# Methods ---------------------------------------------------------------------------------------------------------


def test_the_best_method_that_holds_everywhere_gives_the_radii(lipexp, run, monkeypatch):
    folder = run("constraint=linf", "max_regions=0")
    measured, certified, product = (metrics(folder)["lipschitz"][k] for k in ("measured", "certified", "product"))
    between = (measured + certified) / 2
    assert measured < between < certified
    seen = []

    def tight(problem):
        seen.append((problem.gap, problem.seconds, problem.measured.value))
        return Proof(between)

    monkeypatch.setitem(METHODS, "tight", tight)
    monkeypatch.setitem(METHODS, "box", lambda problem: Proof(measured, everywhere=False))
    monkeypatch.setitem(METHODS, "none", lambda problem: Proof(None, "is for other networks"))
    done = lipexp("certify", str(folder), "--gap", "0.5", "--max-seconds", "7")
    assert (done.code, done.err) == (0, "")
    section = metrics(folder)["certify"]
    assert section["lipschitz"]["certified"] == section["robustness"]["lipschitz"] == between
    assert section["lipschitz"]["method"] == "tight"
    assert {name: bound["value"] for name, bound in section["bounds"].items()} == {
        **{"product": product, "rows": certified, "exact": None, "eclipse": None, "lipsdp": None},
        **{"tight": between, "box": measured, "none": None},
    }
    assert seen == [(0.5, 7.0, section["lipschitz"]["measured"])]
    # A method alone: the product and it; the bounds that other calls proved stay.
    assert lipexp("certify", str(folder), "--method", "product").code == 0
    section = metrics(folder)["certify"]
    assert section["lipschitz"]["certified"] == product
    assert section["bounds"]["tight"]["value"] == between
    done = lipexp("certify", str(folder), "--method", "none")
    assert done.code == 2
    assert "--method=none: has no bound for this network: is for other networks" in done.err


def test_a_bound_that_is_too_small_is_refuted_by_measure_and_attack(lipexp, run, monkeypatch):
    """The verb does not believe its own methods either."""
    folder = run(*FREE, "max_regions=0")
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


# Writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError(28, "No space left on device")], ids=str)
def test_an_interrupted_write_leaves_the_folder_as_it_was(lipexp, run, monkeypatch, failure):
    folder = run("max_regions=0")
    before = content(folder)

    def fail(*arguments):
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        done = lipexp("certify", str(folder))
    assert done.code == (130 if failure is KeyboardInterrupt else 2)
    assert len(done.err.splitlines()) == 1
    assert content(folder) == before
