"""lipexp.load: a finished run as a torch module, with its configuration and metrics."""

from __future__ import annotations

import pickle
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import choice_of

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
    with pytest.raises(ConfigError, match=r"its schema is 1, this lipexp reads 5: train it again$"):
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


# In a notebook ---------------------------------------------------------------------------------------------------

README = Path(__file__).resolve().parent.parent / "README.md"


def test_the_snippets_of_the_readme_run(run, tmp_path, monkeypatch):
    snippets = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(snippets) == 4
    run(name="outputs/2026-01-31/12-00-00-000000")
    run(*choice_of("dataset", "table"), name="outputs/tumours")
    monkeypatch.chdir(tmp_path)
    x = np.random.default_rng(0).normal(size=(50, 2))
    names = {"frame": pd.read_csv(Path(__file__).with_name("table.csv")), "X": x, "y": x[:, 0] > 0}
    for snippet in snippets:
        exec(snippet, names)
    code = "import sys, lipexp; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("overrides", [(), FREE, ("act=fullsort",)], ids=str)
def test_a_network_takes_tensors_arrays_and_tables(trained_run, overrides):
    run = lipexp.load(trained_run(*overrides))
    table = run.table("gradients")[["x0", "x1"]].iloc[::-3]
    tensor = torch.tensor(table.to_numpy(), dtype=torch.float32)
    f = run.network(tensor)
    assert (type(f), f.dtype, f.shape) == (torch.Tensor, torch.float32, (len(table), 1))
    for array in (table.to_numpy(), table.to_numpy(dtype=np.float32), table.to_numpy().tolist()):
        found = run.network(array)
        assert (type(found), found.dtype) == (np.ndarray, np.float32)
        np.testing.assert_array_equal(found, f.numpy())
    pd.testing.assert_frame_equal(run.network(table), pd.DataFrame(f.numpy(), index=table.index, columns=["f"]))
    for named in (run.table("gradients").loc[table.index], table[["x1", "x0"]]):  # by their names
        np.testing.assert_array_equal(run.network(named), f.numpy())
    np.testing.assert_array_equal(run.network(table.set_axis(["a", "b"], axis=1)), f.numpy())  # in their order
    with pytest.raises(ValueError, match=r"^the network takes the columns x0, x1, not x0$"):
        run.network(table[["x0"]])
    with pytest.raises(ConfigError, match=r"^run=nowhere: does not exist$"):
        lipexp.load("nowhere")
    for points in (np.zeros(2), np.zeros((3, 4)), table.iloc[:, :1].set_axis(["a"], axis=1)):
        with pytest.raises(ValueError, match=r"^the network takes points \(B, 2\), not \("):
            run.network(points)
    assert run.network.double()(table.to_numpy()).dtype == np.float64


@pytest.mark.parametrize("overrides", [(), FREE, ("act=fullsort",)], ids=str)
def test_a_network_is_traced_and_exported(trained_run, tmp_path, overrides):
    network, x = lipexp.load(trained_run(*overrides)).network, torch.randn(7, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit itself
        warnings.simplefilter("ignore", FutureWarning)
        torch.jit.trace(network, torch.zeros(2, 2)).save(tmp_path / "traced.pt")
        assert torch.equal(torch.jit.load(tmp_path / "traced.pt")(x), network(x))
        size = {0: torch.export.Dim("points")}
        torch.export.save(
            torch.export.export(network, (torch.zeros(2, 2),), dynamic_shapes=(size,)), tmp_path / "a.pt2"
        )
        assert torch.equal(torch.export.load(tmp_path / "a.pt2").module()(x), network(x))


def test_what_is_shown_in_a_notebook_fits_on_a_line(trained_run):
    run = lipexp.load(trained_run())
    assert repr(run.network) == "Network(2 -> 16 -> 16 -> 1, GroupSort, float32)"
    assert "float64" in repr(run.network.double())
    assert repr(run.baked) == "BakedNetwork(1 of 2 -> 16 -> 16 -> 1, GroupSort)"
    assert repr(run).startswith(f"<run {run.folder}: ‖∇f‖₂  measured ")
    for shown in (run, run.metrics, lipexp.load(run.folder.parent)):
        assert "\n" not in repr(shown)
        assert len(repr(shown)) < 200 + len(str(run.folder))


def test_a_table_that_is_not_there_is_one_error_that_lists_those_that_are(trained_run):
    run = lipexp.load(trained_run("dataset=absolute_value"))
    for name in ("radii", "gradient", "../gradients"):
        with pytest.raises(ConfigError) as refused:
            run.table(name)
        assert str(refused.value).startswith(f"table={name}: no such table")
        assert str(refused.value).endswith("(gradients, history, layers)")


def test_a_folder_of_runs_is_loaded_as_a_table_and_a_list(trained_run, tmp_path):
    for name, overrides in (("a", ()), ("b/0", FREE)):
        shutil.copytree(trained_run(*overrides), tmp_path / name)
    (tmp_path / "c").mkdir()
    RunFolder(tmp_path / "c").write_failure("no luck", 3)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "metrics.json").touch()
    runs = lipexp.load(tmp_path)
    assert list(runs.table["run"]) == [str(tmp_path / "a"), str(tmp_path / "b/0")]
    assert list(runs.table["act"]) == ["groupsort", "relu"]
    assert [run.folder for run in runs] == [tmp_path / "a", tmp_path / "b/0"] == [run.folder for run in runs[:]]
    assert runs[-1].metrics.test["accuracy"] == runs.table["test.accuracy"].iloc[-1]
    assert runs.left_out[tmp_path / "c"] == "no luck"
    assert runs.left_out[tmp_path / "d"].startswith("metrics.json cannot be read: ")
    assert (len(runs), len(runs.left_out)) == (2, 2)
    with pytest.raises(ConfigError, match=r"is no finished run: no luck$"):
        lipexp.load(tmp_path / "c")
