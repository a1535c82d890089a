"""The command line as a user meets it: verbs, run folders, exit statuses, help and completion."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from commands import BASIC, DEBUG, INLINE, SCRIPT, TINY, WAITING, ctrl_c, ended, metrics, start, wait_for

from lipexp import cli, load
from lipexp.config import conf_dir
from lipexp.figures import run as figures_run

# A run ---------------------------------------------------------------------------------------------------------


def test_train_leaves_a_complete_run_folder(lipexp, run_folders):
    done = lipexp("train", *DEBUG)
    assert (done.code, done.err) == (0, "")
    (folder,) = run_folders()
    files = {"model.pt", "figure.png", "gradients.csv", "history.csv", "layers.csv", "radii.csv"}
    assert {path.name for path in folder.iterdir()} == {".hydra", "metrics.json"} | files
    assert {path.name for path in (folder / ".hydra").iterdir()} == {"config.yaml", "hydra.yaml", "overrides.yaml"}
    assert str(folder) in done.out
    interval = next(line for line in done.out.splitlines() if line.startswith("‖∇f‖₂  measured"))
    assert "≤ exact" in interval
    assert "≤ product" in interval
    assert interval.endswith("≤ L = 1   PASS")


def test_metrics_say_what_the_tables_say(trained_run):
    found = metrics(trained_run())
    gradients, history = (pd.read_csv(trained_run() / f"{name}.csv") for name in ("gradients", "history"))
    assert list(gradients.columns) == ["split", "x0", "x1", "y", "f", "grad_1", "grad_2", "grad_inf"]
    assert gradients["split"].value_counts().to_dict() == {"train": 100, "val": 30, "test": 40}
    for split in ("train", "val", "test"):
        part = gradients[gradients["split"] == split]
        accuracy = ((part["f"] > 0) == (part["y"] == 1)).mean()
        hinge = (0.5 - (2 * part["y"] - 1) * part["f"]).clip(lower=0).mean()
        assert found[split] == pytest.approx({"loss": hinge, "accuracy": accuracy}, rel=1e-9)
    gradient, lipschitz = found["gradient_norm"], found["lipschitz"]
    assert gradient["median"] == pytest.approx(gradients["grad_2"].median(), rel=1e-9)
    assert gradient["by"]["data"] == pytest.approx(gradients["grad_2"].max(), rel=1e-9)
    assert lipschitz["measured"] == gradient["max"] == max(gradient["by"].values())
    assert list(history["step"]) == [0, 10, 20]
    assert history["certified"].iloc[-1] == lipschitz["product"]
    assert (history["grad_max"] <= history["certified"]).all()
    assert history["val_accuracy"].iloc[-1] == found["val"]["accuracy"]
    assert found["model_sha256"] == hashlib.sha256((trained_run() / "model.pt").read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (("keep=best",), "the best on validation"),
        (("patience=1",), "where training stopped early"),
    ],
    ids=["keep", "patience"],
)
def test_the_network_that_is_kept_is_that_of_its_line_of_the_history(lipexp, overrides, reason):
    # A learning rate at which later steps spoil what the first have learnt.
    done = lipexp("train", *DEBUG, "steps=60", "eval_every=2", "optim.lr=0.3", *overrides, "hydra.run.dir=run")
    assert (done.code, done.err) == (0, "")
    found, history = metrics(Path("run")), pd.read_csv("run/history.csv").set_index("step")
    step = found["step"]
    assert 0 < step < 60
    assert f"kept: the network after {step} steps, {reason}" in done.out
    assert found["val"]["accuracy"] == history["val_accuracy"][step]
    if "best" in reason:
        assert found["val"]["accuracy"] == history["val_accuracy"].max()
    else:
        assert history.index[-1] == step


def test_layers_csv_holds_the_norms_of_model_pt_within_their_bound(trained_run):
    folder = trained_run("constraint=linf", "lipschitz=8")
    layers, state = pd.read_csv(folder / "layers.csv"), torch.load(folder / "model.pt", weights_only=True)
    assert list(layers["norm"]) == ["row 2-norm", "row 1-norm", "row 1-norm"]
    assert (layers["bound"] == 2.0).all()
    assert (layers["operator_norm"] <= layers["bound"]).all()
    assert list(layers["gradient_q"]) == [2, 1, 1]
    for i, row in layers.iterrows():
        weight = state[f"layers.{i}.weight"].double()
        norm = torch.linalg.vector_norm(weight, ord=2 if i == 0 else 1, dim=1).max()
        numbers = row[["operator_norm", "singular_max", "singular_min"]].astype(float).to_numpy()
        singular = torch.linalg.svdvals(weight)
        assert numbers == pytest.approx([float(norm), float(singular[0]), float(singular[-1])], rel=1e-9)


def test_an_error_of_the_picture_is_one_line_and_costs_no_result(lipexp, run_folders, monkeypatch):
    def fail(*arguments: object) -> None:
        (folder,) = run_folders()  # its results are written before
        raise KeyError(str(folder))

    monkeypatch.setattr(figures_run, "run_figure", fail)
    done = lipexp("train", *TINY)
    (folder,) = run_folders()
    assert (done.code, done.err) == (0, f"lipexp: {folder}/figure.png: cannot be drawn: KeyError: '{folder}'\n")
    assert not (folder / "failed.json").exists()


LOOKING = """
from lipexp.datasets import TwoMoons
from lipexp.report import main

class Looking(TwoMoons):
    def draw(self, stream):
        main(["outputs"])
        return super().draw(stream)
"""


@pytest.mark.parametrize("sweep", [(), ("-m", INLINE, "seed=0,1")])
def test_a_run_that_is_trained_is_seen_by_report(lipexp, sweep):
    Path("looking.py").write_text(LOOKING)
    done = lipexp("train", *sweep, *TINY, "dataset._target_=looking.Looking")
    assert done.code == 0, done.err
    assert f"0 failed, {2 if sweep else 1} running" in done.out


def test_a_run_replays_from_its_folder(lipexp, trained_run):
    folder = trained_run("constraint=linf", "lipschitz=8")
    again = lipexp("train", "-cp", str(folder / ".hydra"), "-cn", "config", "hydra.run.dir=outputs/again/run")
    assert again.code == 0, again.err
    for name in ("history", "gradients", "layers"):
        one, other = (pd.read_csv(Path(path, f"{name}.csv")) for path in (folder, "outputs/again/run"))
        pd.testing.assert_frame_equal(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", [(), ("-m", *BASIC), ("-m", INLINE)], ids=["one run", "basic", "stack"])
def test_the_record_is_what_was_used_and_not_what_the_environment_says_today(lipexp, monkeypatch, mode):
    Path("mine").mkdir()
    Path("mine/bound.yaml").write_text("defaults: [config, _self_]\nlipschitz: ${oc.env:BOUND}\n")
    command = ("train", *mode, "-cd", "mine", "-cn", "bound", *TINY)
    where = ("hydra.run.dir=a/0", "hydra.sweep.dir=a")
    monkeypatch.setenv("BOUND", "3")
    assert lipexp(*command, *where).code == 0
    assert "${" not in Path("a/0/.hydra/config.yaml").read_text()
    for bound in ("7", None):
        monkeypatch.setenv("BOUND", bound) if bound else monkeypatch.delenv("BOUND")
        assert lipexp("certify", "a").code == 0
        assert metrics(Path("a/0"))["certify"]["lipschitz"]["target"] == 3.0
        assert "  L=3\n" in lipexp("report", "a").out
        assert load("a/0").config["constraint"]["lipschitz"] == 3.0
    if INLINE in mode:
        monkeypatch.setenv("BOUND", "7")
        assert "the configuration of a was another one" in lipexp(*command, *where, "resume=true").err
        monkeypatch.setenv("BOUND", "3")
        assert lipexp(*command, *where, "resume=true").code == 0


INFINITE = """
import torch
from lipexp.losses import Hinge

class Infinite(Hinge):
    def forward(self, f, y):
        return super().forward(f, y) / (f.dtype != torch.float64)  # only when it is evaluated
"""


@pytest.mark.parametrize("mode", [(), ("-m", INLINE)], ids=["one run", "stack"])
def test_a_result_that_is_not_finite_is_a_failed_run(lipexp, mode):
    Path("infinite.py").write_text(INFINITE)
    done = lipexp(
        "train", *mode, *TINY, "loss._target_=infinite.Infinite", "hydra.run.dir=a/0", "hydra.sweep.dir=a"
    )
    assert (done.code, done.err) == (1, "lipexp: train.loss is not finite at step 2 (a/0)\n")
    assert json.loads(Path("a/0/failed.json").read_text()) == {"reason": "train.loss is not finite", "step": 2}
    assert not Path("a/0/metrics.json").exists()


def test_a_loss_that_turns_nan_fails_the_run_and_says_when(lipexp):
    done = lipexp("train", "constraint=none", "loss=bce", "optim.lr=1e30", *DEBUG)
    assert done.code == 1
    assert done.err.startswith("lipexp: the loss is no longer finite at step 2 (outputs/")
    assert len(done.err.splitlines()) == 1
    (folder,) = Path("outputs").glob("*/*")
    assert (folder / "failed.json").is_file()
    assert not (folder / "metrics.json").exists()


def test_ctrl_c_is_one_line_and_130(tmp_path):
    (tmp_path / "waiting.py").write_text(WAITING)
    os.mkfifo(tmp_path / "gate")
    process = start(tmp_path, "train", *TINY, "dataset._target_=waiting.Waiting")
    wait_for((tmp_path / "waits").exists)
    ctrl_c(process)
    code, _, err = ended(process)
    assert (code, err) == (130, "lipexp: interrupted\n")
    (failed,) = tmp_path.glob("outputs/*/*/failed.json")
    assert "interrupted" in failed.read_text()
    assert not (failed.parent / "metrics.json").exists()


# Verbs, flags, help and completion -------------------------------------------------------------------------------


def test_a_reader_that_goes_ends_the_command_without_a_word(trained_run):
    for command in (["--help"], ["train", "--help"], ["report", trained_run()]):
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run([SCRIPT, *command], stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
        os.close(writer)
        assert (done.returncode, done.stderr) == (1, "")


def test_help_needs_neither_torch_nor_hydra():
    code = "import sys; from lipexp import cli; cli.main(); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "hydra", "omegaconf", "numpy", "rich", "pandas"} & set(done.stderr.split())
    assert all(verb in done.stdout for verb in cli.VERBS)


def test_unknown_verbs_are_refused_and_the_version_is_said(lipexp):
    refused = f"lipexp: tarin: no such command; did you mean train? ({', '.join(cli.VERBS)})\n"
    assert lipexp("tarin") == (2, "", refused)
    assert lipexp("--version").out.startswith("lipexp 0.")


ACTS = sorted(path.stem for path in (conf_dir() / "act").glob("*.yaml"))


def test_help_lists_groups_and_settings_and_hydras_own_flags_pass_through(lipexp):
    shown = lipexp("train", "--help").out
    assert "Powered by Hydra" not in shown
    for part in ("lipexp train: trains a network", f"act: {', '.join(ACTS)}", "lipschitz: 1.0"):
        assert part in shown
    assert "margin: 0.5" in lipexp("train", "--cfg", "job", "-p", "loss").out
    assert "| main     |" in lipexp("train", "--info", "searchpath").out
    logging.root.handlers.clear()  # --info has left one, for the output of that moment
    Path("mine").mkdir()
    Path("mine/small.yaml").write_text("defaults: [config, _self_]\nsteps: 3\n")
    assert "steps: 3\n" in lipexp("train", "-cd", "mine", "-cn", "small", "--cfg", "job").out


def test_completion(lipexp, monkeypatch):
    acts = {f"act={name}" for name in ACTS}
    # The shell filters the verbs by what is typed.
    lines = {
        "tr": set(cli.VERBS),
        "train act=": acts,
        "train ste": {"steps="},
        "train loss=hinge -m act=re": {"act=relu"},
        "train -cd mine act=mi": {"act=mine"},
        "train 'seed=range(4)' ste": {"steps="},
        "train loss=nope ste": set(),
        "train -": set(),
    }
    Path("mine/act").mkdir(parents=True)
    Path("mine/act/mine.yaml").touch()
    for line, expected in lines.items():
        monkeypatch.setenv("COMP_LINE", f"lipexp {line}")
        done = lipexp("-sc", "query=bash")
        assert (done.code, set(done.out.split()), done.err) == (0, expected, "")


def test_completion_in_a_real_shell():
    script = f"""
        PATH="{Path(SCRIPT).parent}:$PATH"; eval "$(lipexp train -sc install=bash)"
        COMP_LINE="lipexp train loss=h"; COMP_WORDS=(lipexp train loss = h); COMP_CWORD=4
        hydra_bash_completion; echo "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert "hinge" in done.stdout, done.stderr
