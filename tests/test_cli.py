"""The command line as a user meets it: verbs, exit codes, one clear line for bad input, nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pytest
import torch

from lipexp import cli

DEBUG = ("experiment=debug", "device=cpu")
SCRIPT = str(Path(sys.executable).with_name("lipexp"))


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def lipexp(tmp_path, monkeypatch, capfd):
    """Calls the command in this process, in an empty folder: lipexp("train", "loss=bce") -> Result."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def call(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["lipexp", *arguments])
        capfd.readouterr()
        try:
            code = cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return Result(code, *capfd.readouterr())

    return call


def run_folders(root: Path = Path("outputs")) -> list[Path]:
    return sorted(path.parent for path in root.glob("*/*/metrics.json"))


def test_train_leaves_a_complete_run_folder(lipexp):
    done = lipexp("train", "loss=hinge", "act=groupsort", *DEBUG)
    assert done.code == 0, done.err
    (folder,) = run_folders()
    expected = {".hydra", "metrics.json", "history.csv", "gradients.csv", "layers.csv", "model.pt", "figure.png"}
    assert {path.name for path in folder.iterdir()} == expected
    assert {path.name for path in (folder / ".hydra").iterdir()} == {"config.yaml", "hydra.yaml", "overrides.yaml"}
    assert str(folder) in done.out
    interval = next(line for line in done.out.splitlines() if line.startswith("‖∇f‖₂  measured"))
    assert "≤ certified" in interval
    assert interval.endswith("≤ L = 1   PASS")


def test_metrics_say_what_the_tables_say(lipexp):
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
    assert history["certified"].iloc[-1] == metrics["lipschitz"]["certified"]
    assert (history["grad_max"] <= history["certified"]).all()
    assert history["test_accuracy"].iloc[-1] == metrics["test"]["accuracy"]


def test_layers_csv_holds_norms_within_their_bound(lipexp):
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


def test_the_same_command_twice_gives_the_same_bits(lipexp):
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


def test_model_pt_is_a_plain_state_dict_whose_hash_is_recorded(lipexp):
    import hashlib

    assert lipexp("train", *DEBUG).code == 0
    (folder,) = run_folders()
    state = torch.load(folder / "model.pt", weights_only=True)
    assert list(state) == [f"layers.{i}.{part}" for i in range(3) for part in ("weight", "bias")]
    assert [tuple(t.shape) for t in state.values()] == [(16, 2), (16,), (16, 16), (16,), (1, 16), (1,)]
    assert all(t.dtype == torch.float32 for t in state.values())
    recorded = json.loads((folder / "metrics.json").read_text())["model_sha256"]
    assert recorded == hashlib.sha256((folder / "model.pt").read_bytes()).hexdigest()


def test_absolute_value_brings_its_loss_and_its_length(lipexp):
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


BAD_INPUT = {
    "loss=hing": "loss=hing: no such option; did you mean loss=hinge? (bce, hinge, mse)",
    "los=hinge": "los: no such setting; did you mean loss?",
    "loss.margn=1": "loss.margn: no such setting; did you mean loss.margin?",
    "loss=null": "loss=null: needs one option",
    "loss=bce,hinge": "loss=bce,hinge: several values are a sweep, which needs -m",
    "steps=foo": "steps=foo: must be a whole number",
    "steps=1.5": "steps=1.5: must be a whole number",
    "steps=-1": "steps=-1: must be a whole number, at least 0",
    "seed=-1": "seed=-1: must be a whole number, at least 0",
    "eval_every=-1": "eval_every=-1: must be a whole number, at least 0",
    "threads=0": "threads=0: must be a whole number, at least 1",
    "lipschitz=0": "lipschitz=0.0: must be a finite number above 0",
    "lipschitz=-1": "lipschitz=-1.0: must be a finite number above 0",
    "lipschitz=nan": "lipschitz=nan: must be a finite number above 0",
    "lipschitz=inf": "lipschitz=inf: must be a finite number above 0",
    "lipschitz=1e100": "lipschitz=1e+100: must be between 1e-30 and 1e+30",
    "batch_size=2001": "batch_size=2001: must be at most dataset.n_train=2000",
    "batch_size=0": "batch_size=0: must be a whole number, at least 1",
    "model.width=63": "model.width=63: must be a multiple of act's group size, MaxMin's 2",
    "act.n_groups=5": "model.width=64: must be a multiple of act.n_groups=5",
    "act.group_size=5": "model.width=64: must be a multiple of act.group_size 5",
    "act.n_groups=2 act.group_size=32": "act.n_groups=2: give it or group_size (now 32), not both",
    "constraint=linf constraint.p=3": "constraint.p=3: must be 1, 2 or inf",
    "constraint=linf constraint.p=x": "constraint.p=x: must be 1, 2 or inf",
    "loss=mse": "loss=mse: is for regression, but dataset=two_moons is classification (bce, hinge)",
    "dataset=absolute_value loss=bce": "loss=bce: is for classification, but dataset=absolute_value is regression",
    "loss.margin=-1": "loss.margin=-1: must be a finite number, at least 0",
    "loss.margin=wide": "loss.margin=wide: must be a finite number, at least 0",
    "loss=bce loss.temperature=0": "loss.temperature=0: must be a finite number above 0",
    "dataset.noise=-1": "dataset.noise=-1: must be a finite number, at least 0",
    "optim.lr=0": "optim.lr=0: must be a finite number above 0",
    "optim.schedule=cosin": "optim.schedule=cosin: no such option; did you mean cosine?",
    "optim.betas=[0.9,1]": "optim.betas=[0.9, 1]: must be two numbers in [0, 1)",
    "device=tpu": "device=tpu: no such option; did you mean cpu?",
    "act._target_=nowhere.Act": "act._target_=nowhere.Act: cannot be used: No module named 'nowhere'",
    "act._target_=lipexp.activations.Nope": "cannot be used: lipexp.activations has no Nope",
    "+loss.extra=1": "does not take these arguments",
    "experiment=none_such": "experiment=none_such: no such option",
    "a=b=c": "a=b=c: cannot be read as option=value",
    "--multirum": "--multirum: no such flag; did you mean --multirun?",
    "-m --cfg job": "--multirun: shows nothing together with --cfg or --info",
    "-m loss=hing,bce": "loss=hing: no such option; did you mean loss=hinge?",
    "-m steps=5,foo": "steps=foo: must be a whole number",
    "-cd nowhere": "nowhere' not found",
    "-cn nowhere": "nowhere",
}


@pytest.mark.parametrize("command", BAD_INPUT)
def test_bad_input_is_one_line_and_leaves_nothing(lipexp, command):
    done = lipexp("train", *command.split())
    assert done.code == 2
    assert done.out == ""
    assert len(done.err.splitlines()) == 1, done.err
    assert done.err.startswith("lipexp: ")
    assert BAD_INPUT[command] in done.err
    assert not list(Path("outputs").rglob("*")) or {p.name for p in Path("outputs").rglob("*")} == set()


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens on a machine without CUDA")
def test_cuda_without_a_device_is_refused(lipexp):
    done = lipexp("train", "device=cuda")
    assert (done.code, done.err) == (2, "lipexp: device=cuda: no CUDA device is available here (auto, cpu)\n")


@pytest.mark.parametrize("mode", [(), ("-m",)])
def test_outputs_that_cannot_be_written_are_refused(lipexp, mode):
    Path("outputs").write_text("a file")
    done = lipexp("train", *mode, *DEBUG)
    assert done.code == 2
    assert "cannot be written: Not a directory" in done.err
    assert len(done.err.splitlines()) == 1


@pytest.mark.parametrize("mode", ["run", "sweep"])
def test_a_finished_result_is_never_overwritten(lipexp, mode):
    flags = ["-m"] if mode == "sweep" else []
    command = ("train", *flags, f"hydra.{mode}.dir=kept", *DEBUG)
    assert lipexp(*command).code == 0
    before = {path: path.read_bytes() for path in Path("kept").rglob("*") if path.is_file()}
    again = lipexp(*command, "seed=1")
    assert again.code == 2
    assert "is not empty; results are never overwritten" in again.err
    assert {path: path.read_bytes() for path in Path("kept").rglob("*") if path.is_file()} == before


def test_a_loss_that_turns_nan_fails_the_run_and_says_when(lipexp):
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


USER_CODE = """
    import torch
    from torch import nn

    class Householder(nn.Module):
        norms = (2,)

        def __init__(self, angle=1.0):
            super().__init__()
            self.angle = angle

        def forward(self, x):
            assert x.ndim == 3  # (K, B, H)
            a, b = x.chunk(2, dim=-1)
            c, s = torch.cos(torch.tensor(self.angle)).to(x), torch.sin(torch.tensor(self.angle)).to(x)
            reflect = torch.sin(torch.tensor(self.angle / 2)).to(x) * a > torch.cos(
                torch.tensor(self.angle / 2)
            ).to(x) * b
            return torch.cat([torch.where(reflect, c * a + s * b, a), torch.where(reflect, s * a - c * b, b)], -1)

    class Square(nn.Module):
        def forward(self, f, y):
            return (f - (2 * y - 1)).square()

    class Breaks(nn.Module):
        norms = (2,)

        def forward(self, x):
            raise RuntimeError("no such luck")
"""


@pytest.fixture
def user_code(lipexp):
    """A user's own classes beside them in my_package.py, and their options in my_conf/act/."""
    Path("my_package.py").write_text(textwrap.dedent(USER_CODE))
    folder = Path("my_conf/act")
    folder.mkdir(parents=True)
    (folder / "householder.yaml").write_text("_target_: my_package.Householder\nangle: 1.0\n")
    Path("my_conf/loss").mkdir()
    Path("my_conf/loss/square.yaml").write_text("_target_: my_package.Square\n")
    (folder / "tanh.yaml").write_text("_target_: torch.nn.Tanh\n")
    (folder / "breaks.yaml").write_text("_target_: my_package.Breaks\n")
    yield lipexp
    sys.modules.pop("my_package", None)


def test_a_users_activation_trains_under_the_norm_it_declares(user_code):
    done = user_code("train", "-cd", "my_conf", "act=householder", "constraint=spectral", *DEBUG)
    assert done.code == 0, done.err
    (folder,) = run_folders()
    lipschitz = json.loads((folder / "metrics.json").read_text())["lipschitz"]
    assert lipschitz["verdict"] == "PASS"
    assert 0 < lipschitz["measured"] <= lipschitz["certified"] <= 1


@pytest.mark.parametrize("p", ["1", "2", "inf"])
def test_a_users_activation_is_refused_in_a_norm_it_does_not_declare(user_code, p):
    done = user_code("train", "-cd", "my_conf", "act=householder", "constraint=linf", f"constraint.p={p}", *DEBUG)
    assert done.code == 2
    assert "act=householder: must be 1-Lipschitz in the inf-norm of the hidden space" in done.err
    assert not run_folders()


def test_an_activation_that_declares_nothing_trains_without_a_constraint_only(user_code):
    refused = user_code("train", "-cd", "my_conf", "act=tanh", *DEBUG)
    assert refused.code == 2
    assert "it declares norms: none (constraint=none takes any activation)" in refused.err
    done = user_code("train", "-cd", "my_conf", "act=tanh", "constraint=none", *DEBUG)
    assert done.code == 0, done.err
    (folder,) = run_folders()
    lipschitz = json.loads((folder / "metrics.json").read_text())["lipschitz"]
    assert lipschitz["certified"] is None
    assert lipschitz["measured"] > 0
    assert "declares no bound" in lipschitz["method"]


def test_a_users_loss_needs_no_more_than_its_formula(user_code):
    done = user_code("train", "-cd", "my_conf", "loss=square", *DEBUG)
    assert done.code == 0, done.err
    (folder,) = run_folders()
    table = pd.read_csv(folder / "gradients.csv").query("split == 'test'")
    loss = json.loads((folder / "metrics.json").read_text())["test"]["loss"]
    assert loss == pytest.approx(((table["f"] - (2 * table["y"] - 1)) ** 2).mean(), rel=1e-9)


def test_a_class_that_does_not_fit_its_group_is_refused(user_code):
    Path("my_conf/dataset").mkdir()
    Path("my_conf/dataset/wrong.yaml").write_text("_target_: my_package.Square\n")
    done = user_code("train", "-cd", "my_conf", "dataset=wrong")
    lacking = "dataset=wrong: cannot be used as dataset: it has no task, n_inputs, n_train, draw"
    assert (done.code, done.err) == (2, f"lipexp: {lacking}\n")


def test_an_error_in_a_users_class_fails_the_run_and_names_its_traceback(user_code):
    done = user_code("train", "-cd", "my_conf", "act=breaks", *DEBUG)
    assert done.code == 1
    assert done.err.startswith("lipexp: RuntimeError: no such luck (traceback in outputs/")
    assert len(done.err.splitlines()) == 1
    (log,) = Path("outputs").glob("*/*/train.log")
    assert "Traceback" in log.read_text()
    assert (log.parent / "failed.json").is_file()


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
    assert "act: fullsort, groupsort, maxmin, relu" in done.out
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
        ("lipexp ", {"train", "report", "bench"}),
        ("lipexp tr", {"train", "report", "bench"}),  # the shell filters by what is typed
        ("lipexp train loss=h", {"loss=hinge"}),
        ("lipexp train act=", {"act=relu", "act=groupsort", "act=maxmin", "act=fullsort"}),
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


def test_unknown_verbs_are_refused(lipexp):
    done = lipexp("tarin")
    assert done.code == 2
    assert done.err == "lipexp: tarin: no such command; did you mean train? (train, report, bench)\n"


def test_two_runs_at_once_get_their_own_folders(tmp_path):
    started = [
        subprocess.Popen([SCRIPT, "train", *DEBUG], cwd=tmp_path, stdout=subprocess.DEVNULL) for _ in range(2)
    ]
    assert [process.wait(timeout=120) for process in started] == [0, 0]
    assert len(list(tmp_path.glob("outputs/*/*/metrics.json"))) == 2


def test_a_run_replays_from_its_folder(lipexp):
    assert lipexp("train", "act=relu", "lipschitz=2", *DEBUG).code == 0
    (folder,) = run_folders()
    again = lipexp(
        "train", "-cp", str((folder / ".hydra").resolve()), "-cn", "config", "hydra.run.dir=outputs/again/run"
    )
    assert again.code == 0, again.err
    replayed = Path("outputs/again/run")
    assert (replayed / "model.pt").read_bytes() == (folder / "model.pt").read_bytes()
