"""The gate: what a command line asks for is carried out or refused, and no folder is taken twice."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shlex
import signal
import sys
from pathlib import Path

import pytest
from commands import BASIC, INLINE, TINY, WAITING, content, ended, metrics, start, statuses, table, wait_for

from lipexp.runs import RunFolder


@pytest.fixture
def mine(tmp_path):
    """mine("name", "code") makes a module beside the user, which is forgotten afterwards."""
    names = []

    def module(name: str, code: str) -> None:
        (tmp_path / f"{name}.py").write_text(code)
        names.append(name)

    yield module
    for name in names:
        sys.modules.pop(name, None)


# Nothing is overwritten ------------------------------------------------------------------------------------------


def test_a_folder_named_by_a_setting_of_hydra_is_refused_when_it_is_full(lipexp):
    """Whatever the name of the folder is made of."""
    folder = "hydra.run.dir=out/${hydra:runtime.choices.act}"
    assert lipexp("train", *TINY, folder).code == 0
    before = content(Path("out"))
    again = lipexp("train", *TINY, folder, "seed=1")
    assert (again.code, again.err.count("\n")) == (2, 1)
    assert "is not empty; results are never overwritten" in again.err
    assert content(Path("out")) == before


@pytest.mark.parametrize("away", ["~hydra.callbacks", "hydra.callbacks=null"])
def test_the_gate_cannot_be_taken_away(lipexp, away):
    assert lipexp("train", *TINY, "hydra.run.dir=out").code == 0
    before = content(Path("out"))
    assert lipexp("train", *TINY, "hydra.run.dir=out", "seed=1", away).code == 2
    assert content(Path("out")) == before


@pytest.mark.parametrize(("mode", "folder"), [((), "hydra.run.dir=out"), (("-m", *BASIC), "hydra.sweep.dir=out")])
def test_two_commands_that_start_together_do_not_share_a_folder(tmp_path, mode, folder):
    (tmp_path / "waiting.py").write_text(WAITING)
    os.mkfifo(tmp_path / "gate")
    first = start(tmp_path, "train", *mode, *TINY, folder, "dataset._target_=waiting.Waiting")
    wait_for((tmp_path / "waits").exists)
    code, _, err = ended(start(tmp_path, "train", *mode, *TINY, folder, "seed=1"))
    (tmp_path / "gate").unlink()
    first.terminate()
    assert (code, err.count("\n")) == (2, 1)
    assert "results are never overwritten" in err
    assert ended(first)[0] == 143
    assert not list((tmp_path / "out").rglob("metrics.json"))


def test_hydras_launcher_does_not_put_two_jobs_into_one_folder(lipexp):
    done = lipexp("train", "-m", *BASIC, *TINY, "seed=0,1", "hydra.sweep.dir=s", "hydra.sweep.subdir=same")
    assert (done.code, done.err) == (1, "lipexp: hydra.sweep.subdir: gives two jobs the same folder, s/same\n")
    assert metrics(Path("s/same"))["seed"] == 0


def test_a_file_system_without_locks_is_no_folder_in_use(lipexp, monkeypatch):
    def flock(*arguments):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    assert lipexp("train", "-m", INLINE, *TINY, "hydra.sweep.dir=s").code == 0


def test_sigterm_leaves_a_folder_that_says_so(tmp_path):
    (tmp_path / "waiting.py").write_text(WAITING)
    os.mkfifo(tmp_path / "gate")
    process = start(tmp_path, "train", *TINY, "hydra.run.dir=out", "dataset._target_=waiting.Waiting")
    wait_for((tmp_path / "waits").exists)
    process.send_signal(signal.SIGTERM)
    code, _, err = ended(process)
    assert (code, err) == (143, "lipexp: terminated\n")
    assert RunFolder(tmp_path / "out").read_json("failed.json")["reason"] == "terminated"


# Experiments and sweeps ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", ["hydra/launcher", "hydra/sweeper"])
@pytest.mark.parametrize("swept", ["experiment=mine", "experiment=mine,debug"])
def test_an_experiment_that_chooses_a_launcher_in_vain_is_refused(lipexp, group, swept):
    Path("my_conf/experiment").mkdir(parents=True)
    text = f"# @package _global_\ndefaults:\n  - override /{group}: basic\n"
    Path("my_conf/experiment/mine.yaml").write_text(text)
    done = lipexp("train", "-m", "-cd", "my_conf", swept, "device=cpu", "steps=1")
    assert (done.code, done.out) == (2, "")
    assert done.err == f"lipexp: experiment=mine: cannot choose {group}=basic; the command line can\n"
    assert not Path("outputs").exists()


def test_a_setting_that_only_the_swept_options_have_is_no_error(lipexp):
    """The default activation has no slope, and the loss of experiment=debug no temperature."""
    done = lipexp("train", "-m", INLINE, *TINY, "act=leaky_relu,leaky_relu", "act.slope=0.5", "hydra.sweep.dir=s")
    assert done.code == 0, done.err
    assert [RunFolder(Path("s", job)).config()["act"]["slope"] for job in "01"] == [0.5, 0.5]
    assert [row["act.slope"] for row in table(Path("s"))] == ["0.5", "0.5"]


def test_a_sweep_of_nothing_but_bad_input_leaves_nothing(lipexp):
    done = lipexp("train", "-m", INLINE, *TINY, "act.n_groups=3", "seed=0,1", "hydra.sweep.dir=s/t")
    assert (done.code, done.out) == (2, "")
    assert done.err == "lipexp: model.width=16: must be a multiple of act.n_groups=3\n"
    assert not Path("s").exists()


# What goes wrong later -------------------------------------------------------------------------------------------


def test_data_that_contradict_their_dataset_are_bad_input(lipexp, mine):
    mine("signs", "from lipexp.datasets import *\n"
        "class Signs(TwoMoons):\n"
        "    def draw(self, stream):\n"
        "        data = super().draw(stream)\n"
        "        return data._replace(train_y=2 * data.train_y - 1)\n")  # fmt: skip
    done = lipexp("train", *TINY, "dataset._target_=signs.Signs")
    assert done.code == 2
    assert done.err == ("lipexp: dataset=two_moons: draws targets that are not 0 and 1, as classification needs\n")
    assert not list(Path("outputs").rglob("*.json"))


FULL = """
import errno, os
from lipexp.datasets import TwoMoons

class Full(TwoMoons):
    def draw(self, stream):
        if os.path.exists("full") and stream.entropy == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().draw(stream)
"""


@pytest.mark.parametrize("executor", ["inline", "process"])
def test_what_failed_for_want_of_room_is_trained_by_resume(lipexp, mine, executor):
    mine("full", FULL)
    sweep = ("-m", f"hydra.launcher.executor={executor}", *TINY, "dataset._target_=full.Full", "seed=0,1,2")
    Path("full").touch()
    done = lipexp("train", *sweep, "hydra.sweep.dir='a=b'")
    assert done.code == 1
    assert "No space left on device" in done.out
    assert "1 job is missing" in done.err
    assert statuses(Path("a=b")) == ["ok", "missing", "ok"]
    Path("full").unlink()
    hint = next(word for word in shlex.split(done.err) if word.startswith("hydra.sweep.dir="))
    assert lipexp("train", *sweep, hint, "resume=true").code == 0
    assert statuses(Path("a=b")) == ["ok"] * 3


@pytest.mark.parametrize("logged", [True, False])
def test_a_failure_that_cannot_be_written_down_is_one_line_more(lipexp, mine, monkeypatch, logged):
    def write(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(RunFolder, "write_failure", write)
    opened = Path.open
    if not logged:
        monkeypatch.setattr(
            Path, "open", lambda path, *a, **k: (write if path.suffix == ".log" else opened)(path, *a, **k)
        )
    mine("bad", "import torch\nclass Bad(torch.nn.Module):\n    norms = (2,)\n    def forward(self, x): 1 / 0\n")
    done = lipexp("train", *TINY, "act=relu", "act._target_=bad.Bad", "hydra.job.name=mine")
    assert done.code == 1
    lines = done.err.splitlines()
    assert "failed.json cannot be written: No space left on device" in lines[0]
    where = r"traceback in outputs/\S+/mine\.log" if logged else r"outputs/\S+"
    assert re.fullmatch(rf"lipexp: ZeroDivisionError: division by zero \({where}\)", lines[1])
    assert [path.name for path in Path("outputs").rglob("*.log")] == ["mine.log"] * logged


def test_a_class_that_changes_the_folder_does_not_move_the_results(lipexp, mine, monkeypatch):
    mine("mover", "import os\nfrom lipexp.datasets import TwoMoons\n"
        "class Mover(TwoMoons):\n"
        "    def draw(self, stream):\n"
        "        os.makedirs('elsewhere', exist_ok=True)\n"
        "        os.chdir('elsewhere')\n"
        "        return super().draw(stream)\n")  # fmt: skip
    here = Path.cwd()
    for name, mode in (("one", ("hydra.run.dir=one",)), ("s/0", ("-m", INLINE, "hydra.sweep.dir=s"))):
        assert lipexp("train", *mode, *TINY, "dataset._target_=mover.Mover").code == 0
        monkeypatch.chdir(here)
        assert metrics(Path(name))["lipschitz"]["verdict"] == "PASS"
