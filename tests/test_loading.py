"""lipexp.load: a finished run as a torch module, with its configuration and metrics."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

import lipexp
from lipexp.config import ConfigError
from lipexp.networks import BakedNetwork
from lipexp.record import Metrics
from lipexp.runs import RunFolder

FREE = ("act=relu", "constraint=none", "loss=bce", "max_regions=0")


@pytest.mark.parametrize("overrides", [(), FREE, ("act=fullsort",)], ids=str)
def test_the_loaded_network_computes_what_the_run_reported(trained_run, overrides):
    run = lipexp.load(trained_run(*overrides))
    points = run.table("gradients")
    x = torch.tensor(points[["x0", "x1"]].to_numpy(), dtype=torch.float64, requires_grad=True)
    f = run.network.double()(x)
    assert f.shape == (len(points), 1)
    expected_f, expected_norm = (torch.tensor(points[name].to_numpy()) for name in ("f", "grad_2"))
    torch.testing.assert_close(f[:, 0].detach(), expected_f, rtol=1e-12, atol=1e-13)
    (gradient,) = torch.autograd.grad(f.sum(), x)
    torch.testing.assert_close(gradient.norm(dim=1), expected_norm, rtol=1e-12, atol=1e-13)


def test_it_comes_with_its_configuration_and_metrics(trained_run):
    folder = trained_run("constraint=linf", "lipschitz=8")
    run = lipexp.load(str(folder))
    assert (run.folder, run.config["lipschitz"], run.metrics.lipschitz.target) == (folder, 8.0, 8.0)
    assert run.metrics == Metrics.read(RunFolder(folder))
    assert isinstance(run.baked, BakedNetwork)
    assert (run.baked.n_inputs, run.baked.n_outputs) == (2, 1)
    assert not any(parameter.requires_grad for parameter in run.network.parameters())
    assert run.network(torch.zeros(3, 2)).dtype == torch.float32


def test_what_is_no_finished_run_of_this_lipexp_is_refused(run, tmp_path):
    with pytest.raises(ConfigError, match=r"is no finished run: there is no metrics\.json"):
        lipexp.load(tmp_path)
    folder = run()
    (folder / ".hydra" / "config.yaml").unlink()
    with pytest.raises(ConfigError, match=r"is no finished run: there is no \.hydra/config\.yaml"):
        lipexp.load(folder)
    (folder / "metrics.json").write_text('{"schema": 1}')
    with pytest.raises(ConfigError, match=r"its schema is 1, this lipexp reads 2: train it again$"):
        lipexp.load(folder)


def test_a_class_from_elsewhere_is_loaded_only_when_trusted(run, trained_run):
    folder = run(*FREE)
    config = folder / ".hydra" / "config.yaml"
    config.write_text(config.read_text().replace("lipexp.activations.ReLU", "torch.nn.ReLU"))
    with pytest.raises(ConfigError, match=r"act._target_=torch.nn.ReLU: is no class of lipexp.activations"):
        lipexp.load(folder)
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    original = lipexp.load(trained_run(*FREE))
    torch.testing.assert_close(lipexp.load(folder, trust=True).network(x), original.network(x))


class Payload:
    """Unpickling an instance writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_model_that_is_no_plain_state_dict_is_refused_and_not_run(run, tmp_path):
    file, victim = run() / "model.pt", tmp_path / "executed"
    for save in (
        lambda: file.write_bytes(pickle.dumps(Payload(victim))),
        lambda: torch.save({"layers.0.weight": Payload(victim)}, file),
        lambda: torch.save([1, 2, 3], file),
        lambda: torch.save({"layers.0.weight": torch.zeros(1).expand(10**6, 10**6)}, file),
        lambda: torch.save({"layers.0.weight": torch.eye(2).to_sparse()}, file),
    ):
        save()
        with pytest.raises(ConfigError, match=r"model\.pt.* is not a plain state dict") as refused:
            lipexp.load(file.parent)
        assert "\n" not in str(refused.value)
    assert not victim.exists()
    file.unlink()
    with pytest.raises(ConfigError, match=r"there is no model\.pt"):
        lipexp.load(file.parent)


def test_a_model_that_does_not_fit_is_named(run):
    file = run() / "model.pt"
    double = {"layers.0.weight": torch.zeros(1, 2), "layers.0.bias": torch.zeros(1).double()}
    for state in ({}, {"weight": torch.zeros(2, 2)}, {"layers.0.weight": torch.zeros(1, 2).double()}, double):
        torch.save(state, file)
        with pytest.raises(ConfigError, match=r"model\.pt.*: holds no such network: ") as refused:
            lipexp.load(file.parent)
        assert "\n" not in str(refused.value)
