"""Networks from elsewhere: torch modules, torch.export and TorchScript, read without running what a file holds."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from modules import (
    CLOSE,
    MODULES,
    D,
    Residual,
    Reused,
    Rounded,
    linear,
    module,
    outputs,
    points,
    program,
    script,
)
from torch import nn

import lipexp
from lipexp.config import ConfigError
from lipexp.foreign import of, read


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    """Searches and attacks of little effort, of which there are tests of their own."""
    monkeypatch.setattr("lipexp.finding.EFFORT", 1)
    monkeypatch.setattr("lipexp.measured.attack.BEYOND", (2.0,))
    monkeypatch.setattr("lipexp.measured.attack.STEPS", 20)


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
