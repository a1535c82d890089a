"""`lipexp.certify` in Python: bounds and radii of networks from elsewhere, of lipexp and of other libraries."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from modules import (
    D,
    linear,
    module,
    points,
)
from networks import network
from torch import nn

import lipexp
from lipexp.activations import LipschitzSpline
from lipexp.config import ConfigError


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    """Searches and attacks of little effort, of which there are tests of their own."""
    monkeypatch.setattr("lipexp.finding.EFFORT", 1)
    monkeypatch.setattr("lipexp.measured.attack.BEYOND", (2.0,))
    monkeypatch.setattr("lipexp.measured.attack.STEPS", 20)


@pytest.mark.parametrize(
    ("name", "p"),
    [
        *(("relu", 1), ("relu", 2), ("relu", "inf"), ("sorts", 2), ("sorts", "inf"), ("term", 1), ("term", 2)),
        *(("piecewise", "inf"), ("piecewise", 2), ("smooth", 2), ("sigmoids", 1)),
    ],
)
def test_no_difference_quotient_is_above_what_is_certified(name, p):
    """Of what torch computes in float64, over steps of all lengths."""
    net, x = module(name), points(20)
    found = lipexp.certify(net, x, p=p, attack=True, radii=[0.01], max_regions=0, max_seconds=0.5)
    net, x, of_inputs = net.double(), x.double(), float(p)
    steps = torch.randn(40, *x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    steps *= torch.logspace(-4, 1, 40, dtype=torch.float64)[:, None, None]
    with torch.no_grad():
        change = net((x + steps).flatten(0, 1)).reshape(40, len(x), -1) - net(x).flatten(1)
    lengths = torch.linalg.vector_norm(steps, ord=of_inputs, dim=2)
    # Each output alone moves no more than all of them do in any norm.
    seen = float((change.abs().amax(dim=2) / lengths).max())
    assert seen <= found.lipschitz.certified
    assert seen <= found.lipschitz.measured * 1.2  # so the search for steep points does look
    assert found.attack["flips_inside"] == 0
    assert found.attack["points"] >= 10  # others lie where outputs are equal


def test_the_radii_are_those_of_the_points_and_of_the_predicted_classes():
    net = nn.Sequential(nn.Linear(2, 1))
    net[0].weight.data, net[0].bias.data = torch.tensor([[3.0, 4.0]]), torch.tensor([1.0])
    x = np.array([[1.0, 1.0], [-1.0, -1.0], [0.0, 0.0]])
    found = lipexp.certify(net, x, [1, 1, 0], radii=[0.5])
    assert found.lipschitz.certified == pytest.approx(5)
    np.testing.assert_allclose(found.radii["radius"], [8 / 5, 6 / 5, 1 / 5], rtol=1e-12)
    assert found.radii["correct"].tolist() == [1, 0, 0]
    assert found.robustness.test.certified_accuracy == {"0.5": pytest.approx(1 / 3)}
    assert found.robustness.val.certified_accuracy is None
    alone = lipexp.certify(net, x, radii=[0.5])
    assert alone.robustness.test.certified_accuracy == {"0.5": pytest.approx(2 / 3)}
    assert "correct" not in alone.radii
    assert str(found).startswith("<certified: ‖∇f‖₂  measured ")
    assert lipexp.certify(net, x, p=1).lipschitz.certified == pytest.approx(4)
    assert lipexp.certify(net, x, p="inf").lipschitz.certified == pytest.approx(7)
    assert lipexp.certify(net, x, task="regression").robustness is None


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"y": [0, 1]}, r"y: has the shape \(2,\); it must be \(50,\)"),
        ({"y": np.arange(50)}, "y: has 50 different values, the network 3 classes"),
        ({"y": np.full(50, math.nan)}, "y: has no class in row 1, but nan"),
        ({"p": 3}, "p=3: must be 1, 2 or inf"),
        ({"method": "magic"}, "method=magic: no such option"),
        ({"task": "sorting"}, "task=sorting: no such option"),
        ({"gap": 0}, "gap=0: must be a finite number above 0"),
        ({"max_seconds": -1}, "max_seconds=-1"),
        ({"max_regions": -1}, "max_regions=-1"),
        ({"radii": ["a"]}, "radii=.*must be numbers"),
        ({"radii": [0]}, "radii=0.0: must be a finite number above 0"),
        ({"method": "multipliers"}, "^method=multipliers: has no bound for this network"),
        ({"task": "regression", "attack": True}, "^attack: is for radii, which a regression has not"),
        ({"task": "regression", "radii": [1]}, "^radii=1: is for radii, which a regression has not"),
    ],
)
def test_what_is_asked_must_make_sense(asked, message):
    net = nn.Sequential(linear(), nn.ReLU(), linear(8, 3))
    with pytest.raises(ConfigError, match=message):
        lipexp.certify(net, points(), **asked)


def test_python_names_an_argument_that_there_is_not():
    with pytest.raises(TypeError, match=r"^certify\(\) got an unexpected keyword argument 'methods'"):
        lipexp.certify(linear(), points(), methods=["rows"])


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros((0, D)), "must be \\(N, D\\)"),
        (np.zeros(D), "must be \\(N, D\\)"),
        (np.full((2, D), np.inf), "row 1, column 1 is inf"),
        (np.full((2, D), "a"), "must be numbers"),
    ],
)
def test_points_must_be_finite_numbers(x, message):
    with pytest.raises(ConfigError, match=message):
        lipexp.certify(nn.Sequential(linear(), nn.ReLU(), linear(8, 3)), x)


def test_networks_of_lipexp_are_certified_as_they_are(tmp_path):
    from lipexp.modules import Network

    own = network(2, 8, 8, 1, act=LipschitzSpline())
    module = Network(own)
    assert all(torch.equal(part, own.state_dict()[name]) for name, part in module.baked.state_dict().items())
    x = points(20, 2)
    first, second = (lipexp.certify(net, x, max_regions=0) for net in (own, module))
    assert first.lipschitz == second.lipschitz
    assert first.model_sha256 == second.model_sha256
    with pytest.raises(ConfigError, match="no longer float32"):
        lipexp.certify(module.double(), x)


def test_a_fitted_estimator_is_certified_as_it_says():
    x, y = points(60).double().numpy(), np.arange(60) % 3
    model = lipexp.LipschitzClassifier(steps=20, random_state=0).fit(x, y)
    found = lipexp.certify(model, x, y, method="product", max_regions=0)
    assert found.lipschitz.certified <= model.lipschitz_ * (1 + 1e-9)
    assert (model.classes_[found.radii["prediction"]] == model.predict(x)).all()
    assert (found.radii["radius"] >= 0.99 * model.certified_radius(x)).all()


# The network -----------------------------------------------------------------------------------------------------


def without_parametrisations(net: nn.Module) -> nn.Module:
    from torch.nn.utils import parametrize

    for part in list(net.modules()):
        if parametrize.is_parametrized(part):
            for name in list(part.parametrizations):
                parametrize.remove_parametrizations(part, name)
    return net.eval()


def is_certified(net: nn.Module, layers: int) -> None:
    x = points(60, 2)
    found = lipexp.certify(net, x, attack=True, max_regions=2000)
    with torch.no_grad():
        torch.testing.assert_close(found.network(x[None])[0], net(x), rtol=1e-5, atol=1e-5)
    assert found.rounding == 0
    assert len(found.network.layers) == layers
    assert 0 < found.lipschitz.measured <= found.lipschitz.certified < 1.5
    assert found.attack["flips_inside"] == 0


def test_networks_of_torchlip_are_certified():
    torchlip = pytest.importorskip("deel.torchlip")
    torch.manual_seed(0)
    layers = [torchlip.SpectralLinear(2, 16), torchlip.GroupSort2(), torchlip.SpectralLinear(16, 16)]
    more = [
        torchlip.FullSort(),
        torchlip.SpectralLinear(16, 8),
        torchlip.GroupSort(4),
        torchlip.FrobeniusLinear(8, 1),
    ]
    net = torchlip.Sequential(*layers, *more)
    net(points(4, 2))
    is_certified(net.vanilla_export(), 4)


def test_monotonic_networks_are_certified():
    library = pytest.importorskip("monotonicnetworks")
    torch.manual_seed(0)
    kinds = (("one-inf", 2, 16), ("inf", 16, 16), ("inf", 16, 1))
    first, second, last = (library.direct_norm(nn.Linear(n, m), kind=kind) for kind, n, m in kinds)
    body = nn.Sequential(first, library.GroupSort(8), second, library.GroupSort(4), last)
    net = library.MonotonicWrapper(body, lipschitz_const=1.0, monotonic_constraints=[1, 0])
    is_certified(without_parametrisations(net), 3)


def test_networks_of_orthogonium_are_certified():
    linear = pytest.importorskip("orthogonium.layers.linear")
    from orthogonium.layers.custom_activations import Abs, MaxMin

    torch.manual_seed(0)
    layers = [linear.OrthoLinear(2, 16), MaxMin(), linear.OrthoLinear(16, 16), Abs(), linear.UnitNormLinear(16, 3)]
    net = nn.Sequential(*layers)
    net(points(4, 2))
    is_certified(without_parametrisations(net), 3)
