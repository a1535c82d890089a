"""lipexp.load: a finished run as a torch module, with its configuration and metrics."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch

import lipexp
from lipexp.config import ConfigError
from lipexp.display import Display
from lipexp.runs import RunFolder
from lipexp.train import build, train_many


@pytest.fixture(scope="module")
def finished(compose, tmp_path_factory):
    """finished("act=relu") -> the folder of a small finished run, as the command leaves it."""

    def train(*overrides):
        from omegaconf import OmegaConf

        config = compose("experiment=debug", "device=cpu", *overrides)
        folder = RunFolder(tmp_path_factory.mktemp("run"))
        (folder.path / ".hydra").mkdir()
        OmegaConf.save(config, folder.path / ".hydra" / "config.yaml")
        (outcome,) = train_many([build(config)], [folder], Display(brief=True), figures=False)
        assert outcome.failure is None
        return folder.path

    return train


@pytest.mark.parametrize("act", ["relu", "maxmin", "groupsort", "fullsort"])
def test_the_loaded_network_computes_what_the_run_reported(finished, act):
    folder = finished(f"act={act}")
    run = lipexp.load(folder)
    table = run.table("gradients")
    x = torch.tensor(table[["x0", "x1"]].to_numpy(), dtype=torch.float64, requires_grad=True)
    f = run.network.double()(x)
    assert f.shape == (len(table), 1)
    torch.testing.assert_close(f[:, 0].detach(), torch.tensor(table["f"].to_numpy()), rtol=1e-12, atol=1e-13)
    (gradient,) = torch.autograd.grad(f.sum(), x)
    torch.testing.assert_close(
        gradient.norm(dim=1), torch.tensor(table["grad_2"].to_numpy()), rtol=1e-12, atol=1e-13
    )


def test_it_comes_with_its_configuration_and_metrics(finished):
    folder = finished("lipschitz=2")
    run = lipexp.load(str(folder))
    assert run.config["lipschitz"] == 2.0
    assert run.metrics == json.loads((folder / "metrics.json").read_text())
    assert run.metrics["schema"] == 1
    assert run.folder == folder
    assert not any(parameter.requires_grad for parameter in run.network.parameters())
    assert run.network(torch.zeros(3, 2)).dtype == torch.float32


def test_a_folder_without_a_finished_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"is not a finished run: it has no metrics\.json"):
        lipexp.load(tmp_path)


def test_a_class_from_elsewhere_is_loaded_only_when_trusted(finished):
    folder = finished("constraint=none", "act=relu")
    config = folder / ".hydra" / "config.yaml"
    config.write_text(config.read_text().replace("lipexp.activations.ReLU", "torch.nn.ReLU"))
    with pytest.raises(ConfigError, match=r"act._target_=torch.nn.ReLU: lies outside lipexp"):
        lipexp.load(folder)
    assert isinstance(lipexp.load(folder, trust=True).network.act, torch.nn.ReLU)


class Payload:
    """Unpickling an instance writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("save", ["pickle", "torch"])
def test_a_pickled_payload_in_model_pt_is_not_run(finished, tmp_path, save):
    folder, victim = finished(), tmp_path / "executed"
    if save == "pickle":
        (folder / "model.pt").write_bytes(pickle.dumps(Payload(victim)))
    else:
        torch.save({"layers.0.weight": Payload(victim)}, folder / "model.pt")
    with pytest.raises(ConfigError, match=r"model\.pt.* is not a plain state dict"):
        lipexp.load(folder)
    assert not victim.exists()


def test_a_model_that_does_not_fit_is_named(finished):
    folder = finished()
    torch.save({"weight": torch.zeros(2, 2)}, folder / "model.pt")
    with pytest.raises(ConfigError, match=r"model\.pt"):
        lipexp.load(folder)
