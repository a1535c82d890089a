"""The command line as a user meets it: verbs, run folders, exit codes, help and completion."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from lipexp import cli

ACTS = ("abs", "fullsort", "groupsort", "leaky_relu", "maxmin", "relu")
DEBUG = ("experiment=debug", "device=cpu")
SCRIPT = str(Path(sys.executable).with_name("lipexp"))


def test_train_leaves_a_complete_run_folder(lipexp, run_folders):
    done = lipexp("train", "loss=hinge", "act=groupsort", *DEBUG)
    assert done.code == 0, done.err
    (folder,) = run_folders()
    tables = {"history.csv", "gradients.csv", "layers.csv", "radii.csv"}
    expected = {".hydra", "metrics.json", "model.pt", "figure.png"} | tables
    assert {path.name for path in folder.iterdir()} == expected
    assert {path.name for path in (folder / ".hydra").iterdir()} == {"config.yaml", "hydra.yaml", "overrides.yaml"}
    assert str(folder) in done.out
    interval = next(line for line in done.out.splitlines() if line.startswith("‖∇f‖₂  measured"))
    assert "≤ exact" in interval
    assert "≤ product" in interval
    assert interval.endswith("≤ L = 1   PASS")


def test_metrics_say_what_the_tables_say(lipexp, run_folders):
    assert lipexp("train", *DEBUG).code == 0
    (folder,) = run_folders()
    metrics = json.loads((folder / "metrics.json").read_text())
    gradients, history = pd.read_csv(folder / "gradients.csv"), pd.read_csv(folder / "history.csv")
    assert list(gradients.columns) == ["split", "x0", "x1", "y", "f", "grad_1", "grad_2", "grad_inf"]
    assert gradients["split"].value_counts().to_dict() == {"train": 200, "test": 200}
    for split in ("train", "test"):
        part = gradients[gradients["split"] == split]
        assert metrics[split]["accuracy"] == pytest.approx(((part["f"] > 0) == (part["y"] == 1)).mean(), abs=1e-12)
        hinge = (0.5 - (2 * part["y"] - 1) * part["f"]).clip(lower=0).mean()
        assert metrics[split]["loss"] == pytest.approx(hinge, rel=1e-9)
    assert metrics["gradient_norm"]["median"] == pytest.approx(gradients["grad_2"].median(), rel=1e-9)
    assert metrics["gradient_norm"]["by"]["data"] == pytest.approx(gradients["grad_2"].max(), rel=1e-9)
    assert metrics["gradient_norm"]["max"] == max(metrics["gradient_norm"]["by"].values())
    assert metrics["lipschitz"]["measured"] == metrics["gradient_norm"]["max"]
    assert list(history["step"]) == [0, 10, 20]
    assert history["certified"].iloc[-1] == metrics["lipschitz"]["product"]
    assert (history["grad_max"] <= history["certified"]).all()
    assert history["test_accuracy"].iloc[-1] == metrics["test"]["accuracy"]


def test_layers_csv_holds_norms_within_their_bound(lipexp, run_folders):
    assert lipexp("train", "constraint=linf", "lipschitz=8", *DEBUG).code == 0
    (folder,) = run_folders()
    layers = pd.read_csv(folder / "layers.csv")
    state = torch.load(folder / "model.pt", weights_only=True)
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


def test_the_same_command_twice_gives_the_same_bits(lipexp, run_folders):
    for _ in range(2):
        assert lipexp("train", *DEBUG).code == 0
    first, second = run_folders()
    assert (first / "model.pt").read_bytes() == (second / "model.pt").read_bytes()
    for name in ("history.csv", "gradients.csv", "layers.csv"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in (first, second)]
    for m in metrics:
        assert m.pop("timing")
    assert metrics[0] == metrics[1]


def test_model_pt_is_a_plain_state_dict_whose_hash_is_recorded(lipexp, run_folders):
    assert lipexp("train", *DEBUG).code == 0
    (folder,) = run_folders()
    state = torch.load(folder / "model.pt", weights_only=True)
    assert list(state) == [f"layers.{i}.{part}" for i in range(3) for part in ("weight", "bias")]
    assert [tuple(t.shape) for t in state.values()] == [(16, 2), (16,), (16, 16), (16,), (1, 16), (1,)]
    assert all(t.dtype == torch.float32 for t in state.values())
    recorded = json.loads((folder / "metrics.json").read_text())["model_sha256"]
    assert recorded == hashlib.sha256((folder / "model.pt").read_bytes()).hexdigest()


def test_absolute_value_brings_its_loss_and_its_length(lipexp, run_folders):
    shown = lipexp("train", "dataset=absolute_value", "--cfg", "job")
    assert shown.code == 0
    assert "lipexp.losses.MSE" in shown.out
    assert "steps: 3000" in shown.out
    chosen = lipexp("train", "dataset=absolute_value", "steps=7", "--cfg", "job")
    assert "steps: 7\n" in chosen.out
    done = lipexp("train", "dataset=absolute_value", *DEBUG)
    assert done.code == 0, done.err
    (folder,) = run_folders()
    assert "test_mse" in pd.read_csv(folder / "history.csv")
    assert (folder / "figure.png").stat().st_size > 10_000


def test_flags_may_stand_anywhere(lipexp):
    done = lipexp("train", "loss=hinge", "-m", "act=relu,groupsort", *DEBUG)
    assert done.code == 0, done.err
    jobs = sorted(Path("outputs").glob("*/*/*/metrics.json"))
    assert [path.parent.name for path in jobs] == ["0", "1"]
    assert not Path("multirun").exists()


def test_a_sweep_names_every_failed_job_and_keeps_the_others(lipexp):
    done = lipexp("train", "-m", "act.n_groups=5,8,3", *DEBUG)
    assert done.code == 1
    lines = done.err.splitlines()
    assert len(lines) == 2
    assert all("model.width=16: must be a multiple of act.n_groups=" in line for line in lines)
    sweep = next(Path("outputs").glob("*/*"))
    assert (sweep / "1" / "metrics.json").is_file()
    for job in ("0", "2"):
        assert "n_groups" in json.loads((sweep / job / "failed.json").read_text())["reason"]


def test_report_lists_the_runs(lipexp):
    assert lipexp("train", "-m", "act=relu,groupsort", *DEBUG).code == 0
    done = lipexp("report", "--csv", "-")
    assert done.code == 0
    assert "relu" in done.out
    assert "groupsort" in done.out


def test_a_loss_that_turns_nan_fails_the_run_and_says_when(lipexp, run_folders):
    done = lipexp("train", "constraint=none", "loss=bce", "optim.lr=1e30", *DEBUG)
    assert done.code == 1
    assert done.err.startswith("lipexp: the loss is no longer finite at step 2 (outputs/")
    assert len(done.err.splitlines()) == 1
    (failed,) = Path("outputs").glob("*/*/failed.json")
    assert json.loads(failed.read_text()) == {"reason": "the loss is no longer finite", "step": 2}
    assert not run_folders()


def test_ctrl_c_is_one_line_and_130(tmp_path):
    process = subprocess.Popen(
        [SCRIPT, "train", "steps=1000000", "eval_every=20"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:  # training has begun once the first checkpoints are printed
        if line.startswith("step    40"):
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "lipexp: interrupted\n")
    (failed,) = tmp_path.glob("outputs/*/*/failed.json")
    assert json.loads(failed.read_text())["reason"] == "interrupted"
    assert not list(tmp_path.glob("outputs/*/*/metrics.json"))


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


def test_train_help_lists_groups_and_settings(lipexp):
    done = lipexp("train", "--help")
    assert done.code == 0
    assert "lipexp train: trains a network" in done.out
    assert f"act: {', '.join(ACTS)}" in done.out
    assert "lipschitz: 1.0" in done.out
    assert 'eval "$(lipexp train -sc install=bash)"' in done.out
    assert "Powered by Hydra" not in done.out


def test_hydras_own_flags_pass_through(lipexp):
    assert "batch_size: 256" in lipexp("train", "--cfg", "job").out
    assert "margin: 0.5" in lipexp("train", "--cfg", "job", "-p", "loss").out
    assert "| main     |" in lipexp("train", "--info", "searchpath").out
    Path("mine").mkdir()
    Path("mine/small.yaml").write_text("defaults: [config, _self_]\nsteps: 3\n")
    assert "steps: 3\n" in lipexp("train", "-cd", "mine", "-cn", "small", "--cfg", "job").out


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("lipexp ", set(cli.VERBS)),
        ("lipexp tr", set(cli.VERBS)),  # the shell filters by what is typed
        ("lipexp train loss=h", {"loss=hinge"}),
        ("lipexp train act=", {f"act={name}" for name in ACTS}),
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
    done = subprocess.run(
        [bash, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert "hinge" in done.stdout, done.stderr


def test_the_installed_script_runs_from_any_folder(tmp_path):
    done = subprocess.run(
        [SCRIPT, "train", *DEBUG], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert len(list(tmp_path.glob("outputs/*/*/metrics.json"))) == 1
    assert "\x1b" not in done.stdout  # plain lines when the output is not a terminal


def test_the_other_verbs_run_as_installed(lipexp):
    assert lipexp("train", "act=relu", *DEBUG).code == 0
    for verb, expected in (
        (("report",), "relu"),
        (("bench", "activation", "--rounds", "1"), "lipexp MaxMin"),
        (("--version",), "lipexp 0."),
    ):
        done = subprocess.run([SCRIPT, *verb], capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout


def test_unknown_verbs_are_refused(lipexp):
    done = lipexp("tarin")
    assert done.code == 2
    verbs = ", ".join(cli.VERBS)
    assert done.err == f"lipexp: tarin: no such command; did you mean train? ({verbs})\n"


def test_two_runs_at_once_get_their_own_folders(tmp_path):
    started = [
        subprocess.Popen([SCRIPT, "train", *DEBUG], cwd=tmp_path, stdout=subprocess.DEVNULL) for _ in range(2)
    ]
    assert [process.wait(timeout=120) for process in started] == [0, 0]
    assert len(list(tmp_path.glob("outputs/*/*/metrics.json"))) == 2


def test_a_run_replays_from_its_folder(lipexp, run_folders):
    assert lipexp("train", "act=relu", "lipschitz=2", *DEBUG).code == 0
    (folder,) = run_folders()
    again = lipexp(
        "train", "-cp", str((folder / ".hydra").resolve()), "-cn", "config", "hydra.run.dir=outputs/again/run"
    )
    assert again.code == 0, again.err
    replayed = Path("outputs/again/run")
    assert (replayed / "model.pt").read_bytes() == (folder / "model.pt").read_bytes()
