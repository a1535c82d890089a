"""The scikit-learn estimators: scikit-learn's own checks, and what is proven, by other routes."""

from __future__ import annotations

import doctest
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone
from sklearn.datasets import load_iris, make_moons
from sklearn.linear_model import LinearRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from lipexp import LipschitzClassifier, LipschitzRegressor, estimators
from lipexp.config import ConfigError
from lipexp.fitting import split

FAST = {"steps": 60, "width": 16, "random_state": 0}
SCALES = np.array([0.01, 30.0])
MOONS = make_moons(300, noise=0.1, random_state=0)
MOONS_FAR = (MOONS[0] * SCALES + [5.0, -1e4], MOONS[1])  # the same in other units
IRIS = load_iris(return_X_y=True)
RNG = np.random.default_rng(0)
PLANE = RNG.uniform(-1, 1, (300, 2)) * SCALES
TARGETS = np.stack([3 * np.abs(PLANE[:, 0]), PLANE @ [100.0, 1.0], PLANE[:, 1] + 7], axis=1)
LINF = [{"constraint": {"option": "linf", "p": p}} for p in (1, 2, "inf")]
RELU = [{"constraint": name, "act": "relu"} for name in ("none", "sll", "sandwich")]
CHAINS = [{}, {"act": "relu"}, *RELU, {"constraint": "orthogonal"}, {"constraint": "one"}, *LINF]


def points_near(x, p, length):
    """Points at the distance `length` (N,) from x in the norm p, in random directions and towards other rows."""
    for _ in range(20):
        step = RNG.standard_normal(x.shape)
        step[2::3] = (RNG.permutation(x) - x)[2::3] + 1e-9
        step[::3] = np.eye(x.shape[1])[RNG.integers(x.shape[1], size=len(step[::3]))] * RNG.choice([-1, 1])
        if p == np.inf:
            step[1::3] = np.sign(step[1::3])
        yield x + step * (length / np.linalg.norm(step, ord=p, axis=1))[:, None]


# scikit-learn's checks -------------------------------------------------------------------------------------------

CHECKS = """
import json, sys, warnings
from sklearn.utils.estimator_checks import check_estimator
import lipexp
model = getattr(lipexp, sys.argv[1])(**json.loads(sys.argv[2]))
found = check_estimator(model, on_skip=None, on_fail=None)
print(json.dumps([(one["check_name"], one["status"], str(one["exception"])) for one in found]))
"""


def checks_that_do_not_pass(name, parameters):
    """In its own process: scipy reads SCIPY_ARRAY_API, without which a check is skipped, when it is imported."""
    environment = os.environ | {"SCIPY_ARRAY_API": "1"}
    command = [sys.executable, "-c", CHECKS, name, json.dumps(parameters)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert len(found) > 50
    return [one for one in found if one[1] != "passed"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["LipschitzClassifier", "LipschitzRegressor"])
def test_all_of_scikit_learns_checks_pass(name):
    assert checks_that_do_not_pass(name, {"steps": 40}) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["LipschitzClassifier", "LipschitzRegressor"])
def test_all_of_scikit_learns_checks_pass_with_default_parameters(name):
    assert checks_that_do_not_pass(name, {}) == []


def test_the_examples_in_the_docstrings_hold():
    found = doctest.testmod(estimators)
    assert found.attempted > 8
    assert not found.failed


# What is proven --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chain", CHAINS, ids=str)
@pytest.mark.parametrize(("x", "y"), [MOONS_FAR, IRIS, (PLANE, TARGETS)], ids=["two", "several", "regression"])
def test_outputs_move_by_no_more_than_the_constant_times_what_the_row_moves(x, y, chain):
    """And by a good part of it somewhere, so that the constant is in the right units."""
    kind = LipschitzRegressor if y.ndim == 2 else LipschitzClassifier
    model = kind(**FAST, **chain).fit(x, y)
    outputs = model.predict if y.ndim == 2 else model.decision_function
    h = np.inf if "linf" in str(chain) else 1 if chain.get("constraint") == "one" else 2
    steepest = 0.0
    f = outputs(x).reshape(len(x), -1)
    for length in (1e-4, 1e-2, 10.0):
        for moved in points_near(x, model.p_, np.full(len(x), length)):
            change = np.linalg.norm(outputs(moved).reshape(f.shape) - f, ord=h, axis=1)
            distance = np.linalg.norm(moved - x, ord=model.p_, axis=1)
            steepest = max(steepest, (change / distance).max())
    assert 0.05 * model.lipschitz_ < steepest <= model.lipschitz_ * (1 + 1e-6)  # the rounding of far-off points


@pytest.mark.parametrize("chain", [{}, *RELU[1:], *LINF], ids=str)
@pytest.mark.parametrize("lipschitz", [0.1, 1.0, 20.0])
def test_the_constant_in_given_units_is_at_most_l_over_the_smallest_scale(chain, lipschitz):
    """Times the largest scale of the targets."""
    settings = FAST | chain | {"lipschitz": lipschitz, "validation_fraction": 0}
    by_hand = lipschitz / MOONS_FAR[0].std(axis=0).min()
    model = LipschitzClassifier(**settings).fit(*MOONS_FAR)
    assert 0.2 * by_hand < model.lipschitz_ <= by_hand * (1 + 1e-6)
    model = LipschitzRegressor(**settings).fit(PLANE, TARGETS)
    assert model.lipschitz_ <= lipschitz * TARGETS.std(axis=0).max() / PLANE.std(axis=0).min() * (1 + 1e-6)


@pytest.mark.parametrize(("x", "y"), [MOONS, IRIS], ids=["two", "several"])
def test_the_constant_is_the_product_of_the_singular_values_of_the_stored_weights(x, y):
    model = LipschitzClassifier(**FAST).fit(x, y)
    weights = [layer.weight[0].numpy().astype(float) for layer in model.network_.layers]
    others = np.prod([np.linalg.norm(weight, 2) for weight in weights[:-1]])
    assert model.lipschitz_ == pytest.approx(others * np.linalg.norm(weights[-1], 2), rel=1e-9)
    if model.pair_lipschitz_ is not None:
        apart = np.linalg.norm(weights[-1][:, None] - weights[-1][None], axis=-1)
        np.testing.assert_allclose(model.pair_lipschitz_, others * apart, rtol=1e-9)


def test_the_best_of_all_methods_proves_less_than_the_product():
    relu = {"act": "relu", "constraint": "none"}
    product, best = (LipschitzClassifier(**FAST, **relu, method=m).fit(*MOONS) for m in ("product", "best"))
    assert best.lipschitz_ < product.lipschitz_ / 1.5
    np.testing.assert_array_equal(best.decision_function(MOONS[0]), product.decision_function(MOONS[0]))
    assert (best.certified_radius(MOONS[0]) > product.certified_radius(MOONS[0])).mean() > 0.99


@pytest.mark.parametrize("chain", CHAINS, ids=str)
@pytest.mark.parametrize(("x", "y"), [MOONS_FAR, IRIS], ids=["two", "several"])
def test_no_prediction_changes_within_the_certified_radius(x, y, chain):
    """And some do a little further on."""
    model = LipschitzClassifier(**FAST, **chain).fit(x, y)
    radius, predicted = model.certified_radius(x), model.predict(x)
    assert radius.shape == (len(x),)
    assert (radius > 0).mean() > 0.9
    changes = [0, 0]
    for moved in points_near(x, model.p_, radius * (1 - 1e-6)):
        changes[0] += (model.predict(moved) != predicted).sum()
    for moved in points_near(x, model.p_, radius * 20):
        changes[1] += (model.predict(moved) != predicted).sum()
    assert changes[0] == 0
    assert changes[1] > 0


def test_the_radius_in_given_units_is_at_least_the_standardised_one_times_the_smallest_scale():
    """Standardising inside is standardising before, of which the radius is in standard deviations."""
    settings = FAST | {"validation_fraction": 0}
    x, y = MOONS_FAR
    inside = LipschitzClassifier(**settings).fit(x, y)
    before = make_pipeline(StandardScaler(), LipschitzClassifier(**settings, standardize=False)).fit(x, y)
    np.testing.assert_allclose(inside.decision_function(x), before.decision_function(x), atol=1e-5)
    scaler, model = before[0], before[1]
    assert model.lipschitz_ <= 1
    by_hand = np.abs(model.decision_function(scaler.transform(x))) / model.lipschitz_ * scaler.scale_.min()
    assert (inside.certified_radius(x) >= by_hand - 1e-5 * scaler.scale_.min()).all()


def test_the_radius_is_zero_where_nothing_is_proven():
    model = LipschitzClassifier(**FAST, act={"_target_": "torch.nn.SiLU"}, constraint="none").fit(*MOONS)
    assert model.lipschitz_ == np.inf
    assert not model.certified_radius(MOONS[0]).any()
    assert model.score(*MOONS) > 0.8


# Learning --------------------------------------------------------------------------------------------------------


def test_a_regression_of_several_targets_finds_each_of_them():
    x = RNG.uniform(-1, 1, (400, 2)) * SCALES
    y = np.stack([x @ [100.0, 0.01], x @ [-50.0, 0.03] + 1e3], axis=1)
    model = LipschitzRegressor(random_state=0, lipschitz=1.5).fit(x, y)
    expected = LinearRegression().fit(x, y).predict(x)
    assert (np.abs(model.predict(x) - expected).mean(axis=0) < 0.05 * y.std(axis=0)).all()
    assert model.predict(x).shape == y.shape
    for one_column in (y[:, :1], y[:, 0]):
        assert LipschitzRegressor(**FAST).fit(x, one_column).predict(x).shape == one_column.shape


def test_probabilities_are_those_of_the_temperature_that_fits_best():
    x, y = make_moons(2000, noise=0.3, random_state=1)
    model = LipschitzClassifier(**FAST, validation_fraction=0).fit(x, y)
    f = model.decision_function(x)
    np.testing.assert_allclose(model.predict_proba(x)[:, 1], 1 / (1 + np.exp(-model.temperature_ * f)))
    by_temperature = [log_loss(y, 1 / (1 + np.exp(-t * f))) for t in model.temperature_ * np.geomspace(0.3, 3, 61)]
    assert np.argmin(by_temperature) in (29, 30, 31)
    model = LipschitzClassifier(**FAST, validation_fraction=0).fit(*IRIS)
    f = model.decision_function(IRIS[0])
    exponentials = np.exp(model.temperature_ * f)
    np.testing.assert_allclose(
        model.predict_proba(IRIS[0]), exponentials / exponentials.sum(axis=1, keepdims=True)
    )


def rows_of(y, fraction):
    """The rows for training and for validation of a regression with random_state=0."""
    return split(y, "regression", fraction, seed=int(np.random.RandomState(0).randint(2**31)))


def test_validation_rows_choose_the_network_and_are_not_trained_on():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((200, 3)), rng.standard_normal(200)
    other = y.copy()
    other[rows_of(y, 0.25)[1]] = 5.0
    for keep, same in (("last", True), ("best", False)):
        settings = FAST | {"validation_fraction": 0.25, "keep": keep, "eval_every": 5}
        models = [LipschitzRegressor(**settings).fit(x, targets) for targets in (y, other)]
        assert np.array_equal(*(model.predict(x) for model in models)) == same


def test_classes_have_the_same_share_of_both_parts():
    y = np.repeat([0, 1, 2], [100, 60, 40])
    train, val = split(y, "classification", 0.25, seed=3)
    assert sorted([*train, *val]) == list(range(200))
    assert np.bincount(y[val]).tolist() == [25, 15, 10]


@pytest.mark.parametrize(
    ("y", "fraction", "n_val"),
    [([0, 0, 0, 1, 1, 1, 2], 0.4, 2), ([0, 1, 0, 1], 0.1, 0), ([0, 1], 0.5, 0), ([0] * 9 + [1], 0.2, 2)],
    ids=str,
)
def test_every_class_is_trained_on_however_few_rows_it_has(y, fraction, n_val):
    train, val = split(np.array(y), "classification", fraction, seed=0)
    assert len(val) == n_val
    assert set(np.array(y)[train]) == set(y)
    model = LipschitzClassifier(**FAST, validation_fraction=fraction, keep="last").fit(np.eye(len(y)), y)
    assert (model.predict(np.eye(len(y))) == y).sum() >= len(train)  # nothing is known of the others


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_a_regression_takes_as_few_rows_as_there_are(n):
    x, y = np.arange(2.0 * n).reshape(n, 2), np.arange(float(n))
    np.testing.assert_allclose(LipschitzRegressor(random_state=0).fit(x, y).predict(x), y, atol=0.1)


def test_best_keeps_what_validation_chose_and_patience_ends_training():
    """Of noisy targets with a large bound, so that a long training overfits: the last network is not the best."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((100, 3))
    y = x[:, 0] + rng.standard_normal(100)
    settings = FAST | {"steps": 300, "eval_every": 10, "validation_fraction": 0.3, "lipschitz": 20.0}
    last, best = (LipschitzRegressor(**settings, keep=keep).fit(x, y) for keep in ("last", "best"))
    _, val = rows_of(y, 0.3)
    assert best.score(x[val], y[val]) > last.score(x[val], y[val]) + 0.1
    LipschitzRegressor(**settings | {"steps": 10**7, "patience": 2}).fit(x, y)  # or it would take hours


# In the company of scikit-learn ----------------------------------------------------------------------------------


@pytest.mark.parametrize("copy", [lambda m: pickle.loads(pickle.dumps(m)), None], ids=["pickle", "joblib"])
def test_a_copy_predicts_and_certifies_the_same(copy, tmp_path):
    model = LipschitzClassifier(**FAST).fit(*IRIS)
    radius = model.certified_radius(IRIS[0])
    if copy is None:
        joblib.dump(model, tmp_path / "model")
    again = joblib.load(tmp_path / "model") if copy is None else copy(model)
    np.testing.assert_array_equal(again.predict_proba(IRIS[0]), model.predict_proba(IRIS[0]))
    np.testing.assert_array_equal(again.certified_radius(IRIS[0]), radius)


def test_classes_are_named_and_features_known_by_their_names():
    names = np.array(["setosa", "versicolor", "virginica"])
    table = pd.DataFrame(IRIS[0], columns=["a", "b", "c", "d"])
    model = LipschitzClassifier(**FAST).fit(table, names[IRIS[1]])
    assert list(model.feature_names_in_) == ["a", "b", "c", "d"]
    assert list(model.classes_) == list(names)
    assert (model.predict(table) == names[IRIS[1]]).mean() > 0.8
    with pytest.raises(ValueError, match="feature names"):
        model.predict(table[["b", "a", "c", "d"]])


def test_parameters_are_searched_within_a_pipeline():
    pipeline = make_pipeline(StandardScaler(), LipschitzClassifier(**FAST))
    grid = {
        "lipschitzclassifier__lipschitz": np.logspace(-1, 1, 2),
        "lipschitzclassifier__constraint": ["spectral", {"option": "linf", "p": "inf"}],
        "lipschitzclassifier__width": np.array([8]),
    }
    search = GridSearchCV(pipeline, grid, cv=2, error_score="raise").fit(*IRIS)
    assert search.best_score_ > 0.8
    assert len({*search.cv_results_["mean_test_score"]}) > 1


@pytest.mark.parametrize("widths", [[12, 6], (12, 6)], ids=str)
def test_hidden_layers_may_differ_in_width(widths):
    model = LipschitzClassifier(**FAST, widths=widths).fit(*MOONS)
    assert model.network_.hidden_widths == [12, 6]


def test_one_seed_gives_one_network_and_another_one_another():
    first, same, other = (LipschitzClassifier(**FAST | {"random_state": seed}).fit(*IRIS) for seed in (0, 0, 1))
    f = first.decision_function(IRIS[0])
    np.testing.assert_array_equal(clone(first).fit(*IRIS).decision_function(IRIS[0]), f)
    np.testing.assert_array_equal(same.decision_function(IRIS[0]), f)
    assert np.abs(other.decision_function(IRIS[0]) - f).max() > 1e-3


def test_fitting_leaves_no_files_and_the_global_random_numbers(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    LipschitzClassifier(**FAST).fit(*MOONS)
    assert not list(Path().iterdir())
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"act": "grupsort"}, "act=grupsort: no such option; did you mean groupsort?"),
        ({"act": 3}, "act=3: must be the name of an option"),
        ({"act": "relu", "constraint": {"option": "linf", "q": 1}}, "does not take these arguments"),
        (
            {"loss": "mse"},
            "loss=mse: is for numbers to fit, but dataset=X has two classes: take loss=bce or loss=",
        ),
        ({"width": 7}, "model.width=7: must be a multiple of act's group size, 2"),
        ({"widths": [12, 7]}, "model.width=7: must be a multiple of act's group size, 2"),
        ({"widths": "12"}, "model.widths=12: must be null, or a list of whole numbers such as [64, 32]"),
        ({"steps": -1}, "steps=-1: must be a whole number, at least 0"),
        ({"batch_size": 0}, "batch_size=0: must be a whole number, at least 1"),
        ({"lipschitz": 0}, "lipschitz=0: must be a finite number above 0"),
        (
            {"validation_fraction": 1.5},
            "validation_fraction=1.5: must be a finite number, at least 0, at most 0.9",
        ),
        ({"keep": "first"}, "keep=first: no such option"),
        ({"method": "svd"}, "method=svd: no such option"),
        ({"device": "tpu"}, "device=tpu: no such option"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_parameter_that_is_not_allowed_is_one_line(parameters, message):
    with pytest.raises(ConfigError) as refused:
        LipschitzClassifier(**FAST | parameters).fit(*MOONS)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("y", "parameters", "message"),
    [
        (np.zeros(300), {}, "y has one class only, 0.0; a classifier needs at least two"),
        (MOONS[1], {"constraint": "none", "lr": 1e38}, "training failed: "),
    ],
    ids=["one class", "diverges"],
)
def test_what_cannot_be_learnt_is_an_error(y, parameters, message):
    with pytest.raises(ValueError, match=r"^" + message.replace("(", r"\(").replace(")", r"\)")):
        LipschitzClassifier(**FAST | parameters).fit(MOONS[0], y)
