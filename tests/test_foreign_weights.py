"""Weights from elsewhere: state dicts with a named activation, scikit-learn, and what rounding they lose."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from modules import (
    CLOSE,
    D,
    linear,
    outputs,
    points,
)
from torch import nn

import lipexp
from lipexp.activations import GroupSort
from lipexp.activations.elsewhere import Clip, PReLU
from lipexp.config import ConfigError
from lipexp.exact import integers
from lipexp.foreign import of, read
from lipexp.foreign.features import Unread
from lipexp.foreign.network import IDENTITY, Layer, folded, network_of
from lipexp.foreign.weights import of_sklearn, of_state


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    """Searches and attacks of little effort, of which there are tests of their own."""
    monkeypatch.setattr("lipexp.finding.EFFORT", 1)
    monkeypatch.setattr("lipexp.measured.attack.BEYOND", (2.0,))
    monkeypatch.setattr("lipexp.measured.attack.STEPS", 20)


@pytest.mark.parametrize(
    ("act", "own"),
    [
        ("relu", nn.ReLU()),
        ("tanh", nn.Tanh()),
        ("sigmoid", nn.Sigmoid()),
        ("leaky_relu,slope=0.2", nn.LeakyReLU(0.2)),
        ({"option": "leaky_relu", "slope": 0.2}, nn.LeakyReLU(0.2)),
        ("elu,alpha=2", nn.ELU(2.0)),
        ("hardtanh", nn.Hardtanh()),
        ("groupsort,group_size=4", GroupSort(group_size=4)),
        ("maxmin", GroupSort()),
    ],
)
def test_a_state_dict_is_the_network_with_the_named_activation(act, own, tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(linear(), own, linear(8, 8), own, nn.Linear(8, 2, bias=False))
    torch.save(net.state_dict(), tmp_path / "net.pt")
    foreign = read(tmp_path / "net.pt", D, True, act)
    torch.testing.assert_close(outputs(foreign, points()).float(), net(points()), rtol=CLOSE, atol=CLOSE)


@pytest.mark.parametrize(
    ("state", "act", "message"),
    [
        ({"a.weight": torch.ones(2, 2)}, None, "name the activation with --act"),
        ({"a.weight": torch.ones(2, 2)}, "rely", "did you mean relu"),
        ({"a.weight": torch.ones(2, 2)}, "relu,", "must be a name, or NAME,KEY=VALUE"),
        (
            {"a.weight": torch.ones(2, 2), "b.weight": torch.ones(2, 2)},
            "relu,alpha=1",
            "relu takes no arguments, not alpha",
        ),
        ({"a.weight": torch.ones(2)}, "relu", r"a.weight of shape \(2,\) is no weight or bias"),
        ({"a.running_mean": torch.ones(2)}, "relu", "a.running_mean of shape"),
        ({"a.weight_orig": torch.ones(2, 2)}, "relu", "a.weight_orig belongs to a parametrisation"),
        (
            {"a.weight": torch.ones(2, 2), "b.weight": torch.ones(2, 3)},
            "relu",
            "b.weight takes 3 features, a gives 2",
        ),
        ({"a.bias": torch.ones(2)}, "relu", "a.bias has no weight"),
        ({"a.weight": torch.ones(2, 2), "a.bias": torch.ones(3)}, "relu", "a.bias has 3 entries for 2 features"),
        ({"a.weight": torch.full((2, 2), math.nan)}, "relu", "holds a number that is not finite"),
        ({"a.weight": torch.full((2, 2), 1e300, dtype=torch.float64)}, "relu", "beyond the range of float32"),
        ({}, "relu", "holds no weights"),
        ({"state": 1}, "relu", "state is no weight or bias"),
    ],
)
def test_a_state_dict_that_is_no_such_network_is_refused(state, act, message, tmp_path):
    torch.save(state, tmp_path / "net.pt")
    with pytest.raises(ConfigError, match=message):
        read(tmp_path / "net.pt", D, True, act)


def test_the_model_of_a_run_is_read_as_it_is(tmp_path):
    shapes = {"layers.0.weight": (4, 2), "layers.0.bias": (4,), "layers.2.weight": (1, 4), "layers.2.bias": (1,)}
    shapes |= {"layers.1.weight": (4, 3), "layers.1.bias": (3,), "layers.1.t": (3,)}  # a residual layer
    state = {name: torch.rand(shape) for name, shape in shapes.items()}
    torch.save(state, tmp_path / "model.pt")
    foreign = read(tmp_path / "model.pt", 2, True, "relu")
    assert [layer.is_residual for layer in foreign.network.layers] == [False, True, False]
    assert all(torch.equal(part, state[name]) for name, part in foreign.network.state_dict().items())
    with pytest.raises(ConfigError, match="name the activation"):
        read(tmp_path / "model.pt", 2, True)
    torch.save(state | {"linear": torch.ones(3, 3)}, tmp_path / "model.pt")
    with pytest.raises(ConfigError, match="holds no such network: linear has shape"):
        read(tmp_path / "model.pt", 2, True, "relu")


@pytest.mark.parametrize("activation", ["identity", "logistic", "tanh", "relu"])
def test_scikit_learn_s_perceptrons_are_the_networks_that_they_predict_with(activation):
    from sklearn.neural_network import MLPClassifier, MLPRegressor
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import MinMaxScaler, RobustScaler, StandardScaler

    x = points(40).double().numpy()
    number = np.arange(40) % 3
    options = {"hidden_layer_sizes": (8, 6), "max_iter": 2, "random_state": 0, "activation": activation}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it has not converged
        several = MLPClassifier(**options).fit(x, np.array(["a", "b", "c"])[number])
        two = make_pipeline(StandardScaler(), MLPClassifier(**options)).fit(x, number > 0)
        regressions = [
            make_pipeline(scaler, MLPRegressor(**options)).fit(x, x[:, :2])
            for scaler in (MinMaxScaler(), RobustScaler())
        ]
    for model in (several, two):
        found = lipexp.certify(model, x, model.predict(x), max_regions=0, method="rows")
        assert (model.classes_[found.radii["prediction"]] == model.predict(x)).all()
        assert found.robustness.test.certified_accuracy["0.1"] <= 1
        assert 0 < found.rounding <= 2.0**-24  # of weights in float64
        assert found.radii["correct"].all()
    for model in regressions:
        foreign = of_sklearn(model)
        np.testing.assert_allclose(
            outputs(foreign, torch.from_numpy(x)).numpy(), model.predict(x), rtol=1e-5, atol=1e-5
        )
        assert lipexp.certify(model, x, max_regions=0, method="rows").robustness is None


def test_estimators_that_are_no_such_network_are_refused():
    from sklearn.linear_model import LogisticRegression
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import PolynomialFeatures

    x, y = points(20).numpy(), np.arange(20) % 2
    with pytest.raises(ConfigError, match="LogisticRegression has no coefs_"):
        lipexp.certify(LogisticRegression().fit(x, y), x)
    with pytest.raises(ConfigError, match="MLPClassifier has no coefs_: it is not fitted"):
        lipexp.certify(MLPClassifier(), x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        steps = make_pipeline(PolynomialFeatures(), MLPClassifier(max_iter=1)).fit(x, y)
        labels = MLPClassifier(max_iter=1).fit(x, np.stack([y, 1 - y], axis=1))
    with pytest.raises(ConfigError, match="step at 'PolynomialFeatures': is no map that lipexp reads"):
        lipexp.certify(steps, x)
    with pytest.raises(ConfigError, match="decides several labels at once"):
        lipexp.certify(labels, x)


# What is found ---------------------------------------------------------------------------------------------------


def random_layer(n_out: int, n_in: int, seed: int) -> Layer:
    draws = np.random.default_rng(seed)
    weight, bias = draws.normal(size=(n_out, n_in)), draws.normal(size=n_out)
    return Layer(weight.astype(np.float32).astype(float), bias.astype(np.float32).astype(float), IDENTITY)


def test_maps_are_multiplied_only_where_that_needs_no_rounding():
    draws = np.random.default_rng(0)
    chosen = Layer(np.eye(6)[draws.permutation(6)[:5]] * [[2.0], [-1], [0.5], [1], [4]], np.zeros(5), IDENTITY)
    for pair in ([random_layer(6, 4, 0), chosen], [chosen._replace(weight=chosen.weight.T, bias=np.zeros(6))]):
        before = [random_layer(5, 3, 1)._replace(bias=np.zeros(5))] if len(pair) == 1 else []
        (whole,) = folded([*before, *pair]) if len(pair) == 2 else folded([pair[0], random_layer(3, 6, 2)])
        parts = [*pair, random_layer(3, 6, 2)] if len(pair) == 1 else pair
        product = [[integers(part.weight) for part in parts]]
        (outer, e), (inner, f) = product[0][1], product[0][0]
        exact, exponent = integers(whole.weight)
        lowest = min(exponent, e + f)
        assert ((outer.dot(inner) << (e + f - lowest)) == (exact << (exponent - lowest))).all()
    kept = folded([random_layer(6, 4, 3), random_layer(2, 6, 4)])
    assert len(kept) == 2  # a product of dense matrices is rounded
    units = (
        Layer(np.ones((1, 2)), np.zeros(1), IDENTITY),
        Layer(np.array([[1.0], [2.0**-80]]), np.zeros(2), IDENTITY),
    )
    assert len(folded(units[::-1])) == 2  # 1 + 2^-80 is 1 in float64
    thirds = [Layer(np.array([[own]]), np.zeros(1), IDENTITY) for own in (3.0, 1 / 3)]
    assert len(folded(thirds)) == 2  # and so is 3 times a third
    shift = Layer(np.eye(4), random_layer(4, 4, 5).bias, IDENTITY)
    assert len(folded([shift, random_layer(2, 4, 6)])) == 2  # so is W (x - c)


def test_the_rounding_that_is_reported_is_the_largest():
    layer = random_layer(3, 2, 0)
    changed = layer._replace(weight=layer.weight * (1 + 2.0**-26))
    own, rounding = network_of([changed])
    assert own.layers[0].weight[0].double().numpy().tolist() == layer.weight.tolist()
    assert rounding == pytest.approx(2.0**-26, rel=1e-6)
    assert network_of([layer])[1] == 0


@pytest.mark.parametrize("act", [nn.LeakyReLU(0.1), nn.Hardtanh(-0.1, 0.1), nn.PReLU(8, 0.1), nn.LeakyReLU(1.1)])
def test_the_numbers_of_activations_are_rounded_as_weights_are(act):
    net = nn.Sequential(nn.Linear(D, 8), act, nn.Linear(8, 2)).double()
    for part in (net[0], net[2]):
        part.weight.data, part.bias.data = part.weight.data.float().double(), part.bias.data.float().double()
    if isinstance(act, nn.PReLU):
        act.weight.data.fill_(0.1)
    number = 1.1 if getattr(act, "negative_slope", 0) == 1.1 else 0.1
    expected = abs(float(np.float32(number)) - number) / number
    assert of(net, (D,), False).rounding == pytest.approx(expected, rel=1e-6)


def test_activations_of_elsewhere_keep_what_they_declare():
    z = torch.randn(1, 500, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    other = z + torch.randn(z.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    own = PReLU(np.array([-0.5, 0, 0.25, 1, 2, -3]))
    for act in (own, Clip(-0.5, 2)):
        quotient = (act(z) - act(other)) / (z - other)
        low, high = act.slopes
        assert low - 1e-12 <= float(quotient.min()) <= float(quotient.max()) <= high + 1e-12
        assert (2.0 in act.norms) == (max(abs(low), abs(high)) <= 1)
        if act.is_piecewise_linear:
            found = act.active_map(z[0].numpy())
            offset = 0 if found.offset is None else found.offset
            np.testing.assert_allclose(found.factor * z[0].numpy() + offset, act(z)[0].numpy(), atol=1e-15)
            at = np.zeros(6) if act is own else np.full(6, 2.0)
            assert act.active_map(at) is None
    with pytest.raises(ConfigError, match="has 6 slopes for 8 features"):
        own.check_width(8)
    with pytest.raises(ConfigError, match="needs two limits low < high"):
        Clip(1, 1)


def test_a_state_dict_without_anything_to_join_is_one_layer():
    foreign = of_state({"weight": torch.ones(1, 2)}, "relu")
    assert foreign.network.hidden_widths == []
    with pytest.raises(Unread):
        of_state({"weight": torch.ones(1, 2)}, None)


# Damage ----------------------------------------------------------------------------------------------------------
