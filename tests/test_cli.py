"""The command line as a user meets it: verbs, run folders, exit statuses, help and completion."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from commands import DEBUG, INLINE, SCRIPT, TINY, WAITING, ctrl_c, ended, start, wait_for

from lipexp import cli
from lipexp.config import conf_dir

# A run ---------------------------------------------------------------------------------------------------------


def test_train_leaves_a_complete_run_folder_and_the_same_command_the_same_bits(lipexp, run_folders, trained_run):
    done = lipexp("train", *DEBUG)
    assert (done.code, done.err) == (0, "")
    (folder,) = run_folders()
    tables = ["gradients.csv", "history.csv", "layers.csv", "radii.csv"]
    expected = {".hydra", "metrics.json", "model.pt", "figure.png", *tables}
    assert {path.name for path in folder.iterdir()} == expected
    assert {path.name for path in (folder / ".hydra").iterdir()} == {"config.yaml", "hydra.yaml", "overrides.yaml"}
    assert str(folder) in done.out
    interval = next(line for line in done.out.splitlines() if line.startswith("‖∇f‖₂  measured"))
    assert "≤ exact" in interval
    assert "≤ product" in interval
    assert interval.endswith("≤ L = 1   PASS")
    for name in ("model.pt", "figure.png", *tables):
        assert (folder / name).read_bytes() == (trained_run() / name).read_bytes()
    one, other = (json.loads((path / "metrics.json").read_text()) for path in (folder, trained_run()))
    assert one.pop("timing").keys() == other.pop("timing").keys()
    assert one == other


def test_metrics_say_what_the_tables_say(trained_run):
    metrics = json.loads((trained_run() / "metrics.json").read_text())
    gradients, history = (pd.read_csv(trained_run() / f"{name}.csv") for name in ("gradients", "history"))
    assert list(gradients.columns) == ["split", "x0", "x1", "y", "f", "grad_1", "grad_2", "grad_inf"]
    assert gradients["split"].value_counts().to_dict() == {"train": 200, "test": 200}
    for split in ("train", "test"):
        part = gradients[gradients["split"] == split]
        assert metrics[split]["accuracy"] == pytest.approx(((part["f"] > 0) == (part["y"] == 1)).mean(), abs=1e-12)
        hinge = (0.5 - (2 * part["y"] - 1) * part["f"]).clip(lower=0).mean()
        assert metrics[split]["loss"] == pytest.approx(hinge, rel=1e-9)
    gradient, lipschitz = metrics["gradient_norm"], metrics["lipschitz"]
    assert gradient["median"] == pytest.approx(gradients["grad_2"].median(), rel=1e-9)
    assert gradient["by"]["data"] == pytest.approx(gradients["grad_2"].max(), rel=1e-9)
    assert lipschitz["measured"] == gradient["max"] == max(gradient["by"].values())
    assert list(history["step"]) == [0, 10, 20]
    assert history["certified"].iloc[-1] == lipschitz["product"]
    assert (history["grad_max"] <= history["certified"]).all()
    assert history["test_accuracy"].iloc[-1] == metrics["test"]["accuracy"]


def test_layers_csv_holds_the_norms_of_model_pt_within_their_bound(trained_run):
    folder = trained_run("constraint=linf", "lipschitz=8")
    layers, state = pd.read_csv(folder / "layers.csv"), torch.load(folder / "model.pt", weights_only=True)
    assert list(layers["norm"]) == ["row 2-norm", "row 1-norm", "row 1-norm"]
    assert (layers["bound"] == 2.0).all()
    assert (layers["operator_norm"] <= layers["bound"]).all()
    assert list(layers["gradient_q"]) == [2, 1, 1]
    for i, row in layers.iterrows():
        weight = state[f"layers.{i}.weight"].double()
        singular = torch.linalg.svdvals(weight)
        assert row["singular_max"] == pytest.approx(float(singular.max()), rel=1e-12)
        assert row["singular_min"] == pytest.approx(float(singular.min()), rel=1e-9)
        norm = torch.linalg.vector_norm(weight, ord=2 if i == 0 else 1, dim=1).max()
        assert row["operator_norm"] == pytest.approx(float(norm), rel=1e-12)


def test_model_pt_is_a_plain_state_dict_whose_hash_is_recorded(trained_run):
    file = trained_run() / "model.pt"
    state = torch.load(file, weights_only=True)
    assert list(state) == [f"layers.{i}.{part}" for i in range(3) for part in ("weight", "bias")]
    assert [tuple(t.shape) for t in state.values()] == [(16, 2), (16,), (16, 16), (16,), (1, 16), (1,)]
    assert all(t.dtype == torch.float32 for t in state.values())
    recorded = json.loads((trained_run() / "metrics.json").read_text())["model_sha256"]
    assert recorded == hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_run_replays_from_its_folder(lipexp, trained_run):
    folder = trained_run("act=relu", "lipschitz=2")
    again = lipexp("train", "-cp", str(folder / ".hydra"), "-cn", "config", "hydra.run.dir=outputs/again/run")
    assert again.code == 0, again.err
    assert Path("outputs/again/run/model.pt").read_bytes() == (folder / "model.pt").read_bytes()


def test_a_dataset_brings_its_loss_and_its_length_and_the_command_line_wins(lipexp):
    shown = lipexp("train", "dataset=absolute_value", "--cfg", "job").out
    assert "lipexp.losses.MSE" in shown
    assert "steps: 3000\n" in shown
    assert "steps: 7\n" in lipexp("train", "dataset=absolute_value", "steps=7", "--cfg", "job").out


def test_flags_may_stand_anywhere(lipexp):
    done = lipexp("train", "loss=hinge", "-m", "act=relu,groupsort", *TINY, INLINE)
    assert done.code == 0, done.err
    assert sorted(path.parent.name for path in Path("outputs").glob("*/*/*/metrics.json")) == ["0", "1"]
    assert not Path("multirun").exists()


def test_a_loss_that_turns_nan_fails_the_run_and_says_when(lipexp, run_folders):
    done = lipexp("train", "constraint=none", "loss=bce", "optim.lr=1e30", *DEBUG)
    assert done.code == 1
    assert done.err.startswith("lipexp: the loss is no longer finite at step 2 (outputs/")
    assert len(done.err.splitlines()) == 1
    (failed,) = Path("outputs").glob("*/*/failed.json")
    assert json.loads(failed.read_text()) == {"reason": "the loss is no longer finite", "step": 2}
    assert not run_folders()


# As a process ----------------------------------------------------------------------------------------------------


def test_ctrl_c_is_one_line_and_130(tmp_path):
    (tmp_path / "waiting.py").write_text(WAITING)
    os.mkfifo(tmp_path / "gate")
    process = start(tmp_path, "train", *TINY, "dataset._target_=waiting.Waiting")
    wait_for((tmp_path / "waits").exists)
    ctrl_c(process)
    code, _, err = ended(process)
    assert (code, err) == (130, "lipexp: interrupted\n")
    (failed,) = tmp_path.glob("outputs/*/*/failed.json")
    assert json.loads(failed.read_text())["reason"] == "interrupted"
    assert not list(tmp_path.glob("outputs/*/*/metrics.json"))


def test_a_reader_that_goes_ends_the_command_without_a_word(trained_run):
    for command in (["--help"], ["report", trained_run()]):
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run([SCRIPT, *command], stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
        os.close(writer)
        assert (done.returncode, done.stderr) == (1, "")


# Help, flags and completion --------------------------------------------------------------------------------------


def test_help_needs_neither_torch_nor_hydra(tmp_path):
    code = (
        "import sys; sys.argv = ['lipexp', '--help']\n"
        "from lipexp import cli\n"
        "assert cli.main() == 0\n"
        "heavy = {'torch', 'hydra', 'omegaconf', 'numpy', 'rich', 'pandas'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(verb in done.stdout for verb in cli.VERBS)


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))


def test_train_help_lists_groups_and_settings(lipexp):
    done = lipexp("train", "--help")
    assert done.code == 0
    assert "lipexp train: trains a network" in done.out
    assert f"act: {', '.join(options('act'))}" in done.out
    assert "lipschitz: 1.0" in done.out
    assert 'eval "$(lipexp train -sc install=bash)"' in done.out
    assert "Powered by Hydra" not in done.out


def test_hydras_own_flags_pass_through(lipexp):
    assert "margin: 0.5" in lipexp("train", "--cfg", "job", "-p", "loss").out
    assert "| main     |" in lipexp("train", "--info", "searchpath").out
    Path("mine").mkdir()
    Path("mine/small.yaml").write_text("defaults: [config, _self_]\nsteps: 3\n")
    assert "steps: 3\n" in lipexp("train", "-cd", "mine", "-cn", "small", "--cfg", "job").out


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("lipexp tr", set(cli.VERBS)),  # the shell filters by what is typed
        ("lipexp train loss=h", {"loss=hinge"}),
        ("lipexp train act=", {f"act={name}" for name in options("act")}),
        ("lipexp train ste", {"steps="}),
    ],
)
def test_completion(lipexp, monkeypatch, line, expected):
    monkeypatch.setenv("COMP_LINE", line)
    done = lipexp("-sc", "query=bash")
    assert done.code == 0
    assert set(done.out.split()) == expected


def test_completion_in_a_real_shell(tmp_path):
    bash = shutil.which("bash")
    assert bash is not None
    script = (
        'eval "$(lipexp train -sc install=bash)"\n'
        'COMP_LINE="lipexp train loss=h"; COMP_WORDS=(lipexp train loss = h); COMP_CWORD=4\n'
        'hydra_bash_completion; echo "${COMPREPLY[@]}"\n'
    )
    environment = {**os.environ, "PATH": f"{Path(SCRIPT).parent}:{os.environ['PATH']}"}
    command = [bash, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert "hinge" in done.stdout, done.stderr


def test_unknown_verbs_are_refused_and_the_version_is_said(lipexp):
    refused = f"lipexp: tarin: no such command; did you mean train? ({', '.join(cli.VERBS)})\n"
    assert lipexp("tarin") == (2, "", refused)
    assert lipexp("--version").out.startswith("lipexp 0.")
