"""Networks from elsewhere in Python: torch modules and programs, weights alone, scikit-learn, other libraries."""

from __future__ import annotations

import io
import json
import math
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import network
from torch import nn

import lipexp
from lipexp.activations import Abs, GroupSort, LipschitzSpline
from lipexp.activations.elsewhere import Clip, PReLU
from lipexp.config import ConfigError
from lipexp.exact import integers
from lipexp.foreign import of, read
from lipexp.foreign.features import Unread
from lipexp.foreign.network import IDENTITY, Layer, folded, network_of
from lipexp.foreign.weights import of_sklearn, of_state

D = 4
CLOSE = 1e-6  # of torch's float32 from float64


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    """Searches and attacks of little effort, of which there are tests of their own."""
    monkeypatch.setattr("lipexp.finding.EFFORT", 1)
    monkeypatch.setattr("lipexp.measured.attack.BEYOND", (2.0,))
    monkeypatch.setattr("lipexp.measured.attack.STEPS", 20)


def points(n: int = 50, *shape: int) -> torch.Tensor:
    return 2 * torch.randn(n, *(shape or (D,)), generator=torch.Generator().manual_seed(1))


def outputs(foreign, x: torch.Tensor) -> torch.Tensor:
    return foreign.network.double(x.double().reshape(1, len(x), -1))[0]


class Preprocessed(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.randn(D))
        self.scale = torch.rand(D) + 0.5

    def forward(self, x):
        return (x - self.mean) / self.scale


class Sorts(nn.Module):
    """Sorts by chunks, by pairs side by side, and by groups."""

    def forward(self, z):
        a, b = z.split(z.shape[1] // 2, 1)
        z = torch.cat([torch.max(a, b), torch.min(a, b)], 1)
        pairs = z.view(z.shape[0], -1, 2)
        low, high = torch.min(pairs, 2, keepdim=True)[0], torch.max(pairs, 2, keepdim=True)[0]
        z = torch.cat([low, high], 2).view(z.shape)
        return z.reshape(z.shape[0], 2, -1).sort(-1)[0].flatten(1)[:, torch.tensor([7, 6, 5, 4, 3, 2, 1, 0])]


class WithTerm(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.term = nn.Sequential(nn.Linear(D, 8), nn.ReLU(), nn.Linear(8, 1)), nn.Linear(D, 1)

    def forward(self, x):
        return self.term(x) + self.body(x)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x):
        return x + torch.relu(self.inner(x))


class Mixture(nn.Module):
    """What programs write in several ways."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.register_buffer("turn", torch.randn(8, D))

    def forward(self, x):
        z = (self.turn @ x.T).T
        z = torch.rsub(torch.sub(z, 0.5, alpha=2), 1.0, alpha=0.5)
        z = torch.clamp(torch.maximum(z, -0.2 * z), max=0.3)
        z = torch.clamp(self.inner(z), min=-0.5)
        means = z.unflatten(1, (2, 4)).mean(dim=2)
        z = torch.cat([means, z.narrow(1, 2, 2), z[:, ::3], z[:, 3:4]], dim=1)
        return torch.stack([*z.topk(3, dim=1)[0].unbind(1)[:1], z.sort(dim=1)[0].select(1, -2)], dim=1)


class Reused(nn.Module):
    """Uses the features from before an activation that changes them in place."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(D, 8)

    def forward(self, x):
        z = self.inner(x)
        view = z.flatten()
        return torch.tanh_(z) + torch.relu(view).view(z.shape)


class Rounded(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, x):
        return self.change(x)


def linear(n_in: int = D, n_out: int = 8) -> nn.Linear:
    return nn.Linear(n_in, n_out)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: nn.Sequential(linear(), nn.ReLU(inplace=True), nn.Dropout(), linear(8, 3)),
    "preprocessed": lambda: nn.Sequential(Preprocessed(), linear(), nn.Tanh(), nn.Linear(8, 2, bias=False)),
    "sorts": lambda: nn.Sequential(linear(), Sorts(), linear(8, 8), Sorts(), linear(8, 2)),
    "lipexp's own": lambda: nn.Sequential(linear(), GroupSort(2), linear(8, 8), Abs(), linear(8, 2)),
    "term": WithTerm,
    "normalised": lambda: nn.Sequential(linear(), nn.BatchNorm1d(8), nn.PReLU(8), linear(8, 2)),
    "piecewise": lambda: nn.Sequential(linear(), nn.LeakyReLU(3.0), linear(8, 8), nn.Hardtanh(), nn.ReLU6()),
    "smooth": lambda: nn.Sequential(
        linear(), nn.ELU(0.5), nn.GELU(), nn.SiLU(), nn.SELU(), nn.CELU(2.0), nn.Softplus(2.0), linear(8, 2)
    ),
    "sigmoids": lambda: nn.Sequential(linear(), nn.Sigmoid(), nn.Hardsigmoid(), nn.LogSigmoid(), linear(8, 2)),
    "channels": lambda: nn.Sequential(linear(), nn.Unflatten(1, (2, 4)), nn.PReLU(2), nn.Flatten(), linear(8, 2)),
    "mixture": Mixture,
    "unflattened": lambda: nn.Sequential(
        linear(), nn.Unflatten(1, (2, 4)), nn.Linear(4, 3), nn.ReLU(), nn.Flatten()
    ),
}


def module(name: str) -> nn.Module:
    torch.manual_seed(0)
    made = MODULES[name]()
    for part in made.modules():
        if isinstance(part, nn.BatchNorm1d):
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
            part.weight.data.normal_()
    return made.eval()


def program(net: nn.Module, path: Path, dynamic: bool = True) -> Path:
    shapes = ({0: torch.export.Dim("N")},) if dynamic else None
    torch.export.save(torch.export.export(net, (torch.zeros(2, D),), dynamic_shapes=shapes), path)
    return path


def script(net: nn.Module, path: Path, traced: bool = True) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        made = torch.jit.trace(net, torch.zeros(2, D), check_trace=False) if traced else torch.jit.script(net)
        torch.jit.save(made, path)
    return path


# Modules and programs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODULES)
def test_a_module_and_its_programs_are_the_network_that_torch_computes(name, tmp_path):
    net, x = module(name), points()
    with torch.no_grad():
        known = net(x)
    found = [of(net, (D,), False), read(program(net, tmp_path / "net.pt2"), D, False)]
    if name not in ("lipexp's own", "normalised"):  # of which TorchScript holds classes, or changes the batch norm
        found.append(read(script(net, tmp_path / "net.ts"), D, False))
    for foreign in found:
        torch.testing.assert_close(outputs(foreign, x).float(), known.flatten(1), rtol=CLOSE, atol=CLOSE)
        assert foreign.rounding <= 2.0**-24


def test_a_script_with_branches_is_read(tmp_path):
    net = nn.Sequential(linear(), nn.LeakyReLU(0.2), nn.Dropout(), linear(8, 2)).eval()
    foreign = read(script(net, tmp_path / "net.pt", traced=False), D, False)
    torch.testing.assert_close(outputs(foreign, points()).float(), net(points()), rtol=CLOSE, atol=CLOSE)


def test_a_program_with_a_fixed_number_of_rows_is_read(tmp_path):
    net = module("sorts")
    foreign = read(program(net, tmp_path / "net.pt2", dynamic=False), D, False)
    torch.testing.assert_close(outputs(foreign, points()).float(), net(points()), rtol=CLOSE, atol=CLOSE)


def test_a_module_is_left_in_its_mode():
    net = nn.Sequential(linear(), nn.Dropout(), nn.ReLU(), linear(8, 2)).train()
    net[0].eval()
    of(net, (D,), True)
    assert [part.training for part in net] == [False, True, True, True]


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (nn.Sequential(linear(), nn.LayerNorm(8)), r"layer_norm at 'layer_norm of module 1 \(LayerNorm\)'"),
        (
            nn.Sequential(linear(), Residual(), Residual()),
            r"linear at 'linear_2 of module 2\.inner \(Linear\)': takes a sum",
        ),
        (nn.Sequential(linear(), nn.ReLU(), Residual()), r"add at 'add of module 2 \(Residual\)': joins features"),
        (Rounded(lambda x: torch.div(x, 2, rounding_mode="floor")), r"div at 'div of .*': rounds features"),
        (Rounded(lambda x: x.half()), r"to at 'to of .*': rounds features"),
        (Rounded(lambda x: x.sum(1, dtype=torch.float16)), r"sum at 'sum_1 of .*': rounds features"),
        (nn.CELU(-1.0), "celu at 'celu of .*': has alpha=-1"),
        (nn.Softplus(threshold=1.0), r"softplus at 'softplus of .*': is no softplus, for its threshold"),
        (Rounded(lambda x: x.mean(0, keepdim=True).expand(x.shape)), "mean at .*: mixes the rows of a batch"),
        (Rounded(lambda x: x.sum([])), "sum at .*: mixes the rows of a batch"),
        (Rounded(lambda x: x.flip(0)), "output at 'flip': mixes the rows of a batch"),
        (Reused(), r"relu at 'relu of module itself .*': uses a tensor that was changed in place before"),
        (nn.Sequential(linear(), nn.Softmax(0)), r"softmax at 'softmax of module 1 \(Softmax\)': decides along"),
        (nn.Sequential(linear(), nn.Mish()), r"mish at 'mish of module 1 \(Mish\)': is no operator"),
        (nn.utils.parametrizations.orthogonal(linear()), "has parametrised weights"),
        (nn.Bilinear(2, 2, 2), "torch.export cannot take it"),
        (object(), "must be a torch module"),
        (nn.Linear(3, 2), f"x: has {D} columns, the network 3 inputs"),
        (nn.Sequential(nn.Flatten(), linear(), nn.Linear(3, 2)), "torch.export cannot take it: RuntimeError"),
    ],
)
def test_a_module_that_is_not_read_is_named(net, message, caplog):
    with pytest.raises(ConfigError, match=message) as refused:
        lipexp.certify(net, points())
    assert "\n" not in str(refused.value)
    assert not [own for own in caplog.records if own.levelname == "ERROR"]  # with a traceback of torch


class Changed(nn.Module):
    """Changes a view of its outputs in place."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(D, 2)

    def forward(self, x):
        z = self.inner(x)
        z.view(-1).mul_(10.0)
        return z


class ChangedConstant(nn.Module):
    def forward(self, x):
        c = torch.ones(4)
        c.mul_(3.0)
        return x * c


class TimesRows(nn.Module):
    def forward(self, x):
        return x * x.size(0)


class Branches(nn.Module):
    """Asks for the sign of a feature."""

    def forward(self, x):
        if bool(x[:1, 0] > 0):
            return x
        return 10 * x


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (Changed(), "output at .*: is a tensor that was changed in place before"),
        (ChangedConstant(), "changes a constant in place"),
        (TimesRows(), "output at .*: depends on the number of rows"),
        (Branches(), "takes a number from a tensor"),
    ],
)
def test_what_is_no_network_of_its_features_is_refused_in_all_formats(net, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        read(script(net, tmp_path / "net.ts", traced=False), D, False)
    if not isinstance(net, Branches):  # which torch.export refuses
        for make in (lambda: of(net, (D,), False), lambda: read(program(net, tmp_path / "net.pt2"), D, False)):
            with pytest.raises(ConfigError, match=message):
                make()


class Touched:
    """A pickle that says when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("inner", ["net/data.pkl", "net/data/weights/weight_0"])
def test_nothing_of_a_file_is_run(inner, tmp_path):
    """Neither by a pickle among the weights, nor by the one that holds the modules."""
    file = tmp_path / "net.pt2"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(inner, pickle.dumps(Touched(tmp_path / "touched")))
        archive.writestr("net/code/__torch__.py", "")
    with pytest.raises(ConfigError):
        read(file, D, False)
    file.rename(tmp_path / "net.pt")
    with pytest.raises(ConfigError):
        read(tmp_path / "net.pt", D, False)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("while True:\n      pass", "has a While, which is not read"),
        ("x = [i for i in [1]]", "is not read"),
        ("return ops.mine.run(input, )", "ops.mine.run at line 13 is no operator"),
        ("return torch.save(input, )", "save at 'line 13': is no operator"),
        ("return torch.__class__.__init__(input, )", "is no operator"),
        ("return self.__class__", "cannot be read"),
        ("return __import__(input, )", "__import__ at line 13 is no operator"),
        ("return (self).forward(input, )", "makes too many calls|damaged"),
    ],
)
def test_a_script_is_never_run(line, message, tmp_path):
    file = script(nn.Sequential(linear(), nn.ReLU()), tmp_path / "net.pt")
    with zipfile.ZipFile(file) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    source = next(name for name, part in parts.items() if b"class Sequential(Module)" in part)
    before, end, after = parts[source].rpartition(b"    return")
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, before + f"    {line}\n".encode() + end + after if name == source else content)
    with pytest.raises(ConfigError, match=message):
        read(file, D, False)


# Weights alone ---------------------------------------------------------------------------------------------------


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


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("files")
    net = module("relu")
    torch.save(net.state_dict(), folder / "net.pt")
    made = [program(net, folder / "net.pt2"), script(net, folder / "net.ts"), folder / "net.pt"]
    try:
        import onnx  # noqa: F401

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(net, (torch.zeros(2, D),), folder / "net.onnx", dynamo=False)
        made.append(folder / "net.onnx")
    except ImportError:
        pass
    return {path.suffix: path.read_bytes() for path in made}


@pytest.mark.parametrize("suffix", [".pt2", ".ts", ".pt", ".onnx"])
def test_a_damaged_file_is_one_line_or_a_network(suffix, files, tmp_path):
    content = files.get(suffix) or pytest.skip("needs onnx")
    draws, file = np.random.default_rng(0), tmp_path / f"net{suffix}"
    damaged = [b"", content[: len(content) // 2], content[::-1], b"PK" + content, content + content]
    for _ in range(60):
        own = bytearray(content)
        for place in draws.integers(len(own), size=int(draws.integers(1, 9))):
            own[place] ^= 1 << int(draws.integers(8))
        damaged.append(bytes(own))
    lines = []
    for own in damaged:
        file.write_bytes(own)
        try:
            assert read(file, D, True, "relu").network.n_inputs >= 1
        except ConfigError as error:
            lines.append(str(error))
    assert len(lines) >= 10
    assert not any("\n" in line for line in lines)


def test_sizes_that_a_program_claims_are_not_believed(files, tmp_path):
    file = tmp_path / "net.pt2"
    with zipfile.ZipFile(io.BytesIO(files[".pt2"])) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    config = next(name for name in parts if name.endswith("model_weights_config.json"))
    for change in (
        {"sizes": [{"as_int": 2**40}, {"as_int": 4}]},
        {"strides": [{"as_int": 2**40}, {"as_int": 1}]},
        {"storage_offset": {"as_int": 2**40}},
        {"storage_offset": {"as_int": -1}},
        {"sizes": [{"as_int": 2**20}, {"as_int": 2**20}], "strides": [{"as_int": 0}, {"as_int": 0}]},
    ):
        content = json.loads(parts[config])
        content["config"]["0.weight"]["tensor_meta"] |= change
        with zipfile.ZipFile(file, "w") as archive:
            for name, part in parts.items():
                archive.writestr(name, json.dumps(content) if name == config else part)
        with pytest.raises(ConfigError, match=r"claims more numbers for 0\.weight"):
            read(file, D, True)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("net/models/model.json", " " * 10**6)
    with pytest.raises(ConfigError, match="is compressed"):
        read(file, D, True)


# Other libraries -------------------------------------------------------------------------------------------------


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
