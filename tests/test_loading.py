"""lipexp.load: a finished run as a torch module, with its configuration and metrics."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch

import lipexp
from lipexp.config import ConfigError
from lipexp.networks import BakedNetwork
from lipexp.record import Metrics
from lipexp.runs import RunFolder


@pytest.mark.parametrize("act", ["relu", "maxmin", "groupsort", "fullsort"])
def test_the_loaded_network_computes_what_the_run_reported(trained_run, act):
    run = lipexp.load(trained_run(f"act={act}"))
    points = run.table("gradients")
    x = torch.tensor(points[["x0", "x1"]].to_numpy(), dtype=torch.float64, requires_grad=True)
    f = run.network.double()(x)
    assert f.shape == (len(points), 1)
    expected_f, expected_norm = (torch.tensor(points[name].to_numpy()) for name in ("f", "grad_2"))
    torch.testing.assert_close(f[:, 0].detach(), expected_f, rtol=1e-12, atol=1e-13)
    (gradient,) = torch.autograd.grad(f.sum(), x)
    torch.testing.assert_close(gradient.norm(dim=1), expected_norm, rtol=1e-12, atol=1e-13)


def test_it_comes_with_its_configuration_and_metrics(trained_run):
    folder = trained_run("act=relu", "lipschitz=2")
    run = lipexp.load(str(folder))
    assert run.config["lipschitz"] == 2.0
    assert run.metrics == Metrics.read(RunFolder(folder))
    assert run.metrics.lipschitz.target == 2.0
    assert run.folder == folder
    assert isinstance(run.baked, BakedNetwork)
    assert (run.baked.n_inputs, run.baked.n_outputs) == (2, 1)
    assert not any(parameter.requires_grad for parameter in run.network.parameters())
    assert run.network(torch.zeros(3, 2)).dtype == torch.float32


def test_what_is_no_finished_run_of_this_lipexp_is_refused(run, tmp_path):
    with pytest.raises(ConfigError, match=r"is not a finished run: it has no metrics\.json"):
        lipexp.load(tmp_path)
    folder = run()
    metrics = json.loads((folder / "metrics.json").read_text())
    (folder / "metrics.json").write_text(json.dumps(metrics | {"schema": 1}))
    with pytest.raises(ConfigError, match="its schema is 1, this lipexp reads 2: train it again$"):
        lipexp.load(folder)
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / ".hydra" / "config.yaml").unlink()
    with pytest.raises(ConfigError, match="has no configuration that can be read"):
        lipexp.load(folder)


def test_a_class_from_elsewhere_is_loaded_only_when_trusted(run, trained_run):
    folder = run("constraint=none", "act=relu")
    config = folder / ".hydra" / "config.yaml"
    config.write_text(config.read_text().replace("lipexp.activations.ReLU", "torch.nn.ReLU"))
    with pytest.raises(ConfigError, match=r"act._target_=torch.nn.ReLU: lies outside lipexp"):
        lipexp.load(folder)
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    original = lipexp.load(trained_run("constraint=none", "act=relu"))
    assert torch.equal(lipexp.load(folder, trust=True).network(x), original.network(x))


class Payload:
    """Unpickling an instance writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_model_that_is_no_plain_state_dict_is_refused_and_not_run(run, tmp_path):
    folder, victim = run(), tmp_path / "executed"
    file = folder / "model.pt"
    for save in (
        lambda: file.write_bytes(pickle.dumps(Payload(victim))),
        lambda: torch.save({"layers.0.weight": Payload(victim)}, file),
        lambda: torch.save([1, 2, 3], file),
        lambda: file.write_bytes(b""),
        file.unlink,
    ):
        save()
        with pytest.raises(ConfigError, match=r"model\.pt.* is not a plain state dict") as refused:
            lipexp.load(folder)
        assert "\n" not in str(refused.value)
    assert not victim.exists()


W, B = (f"layers.{{}}.{part}" for part in ("weight", "bias"))
UNFIT = {
    "float64": (
        lambda state: {k: v.double() for k, v in state.items()},
        "layers.0.weight is float64, not float32",
    ),
    "widths": (
        lambda state: {**state, W.format(1): torch.ones(16, 8)},
        "layers.1 takes 8 features, layers.0 gives 16",
    ),
    "odd groups": (
        lambda state: {
            W.format(0): torch.ones(5, 2),
            B.format(0): torch.ones(5),
            W.format(1): torch.ones(1, 5),
            B.format(1): torch.ones(1),
        },
        "must be a multiple of",
    ),
    "no layers": (lambda state: {}, ""),
    "other names": (lambda state: {"weight": torch.zeros(2, 2)}, ""),
}


@pytest.mark.parametrize("name", UNFIT)
def test_a_model_that_does_not_fit_is_named(run, name):
    change, message = UNFIT[name]
    file = run() / "model.pt"
    torch.save(change(torch.load(file, weights_only=True)), file)
    with pytest.raises(ConfigError, match=rf"model\.pt.*: holds no such network: .*{message}") as refused:
        lipexp.load(file.parent)
    assert "\n" not in str(refused.value)
