"""Worker processes: the server they come from, and what it spares the process of the command."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lipexp import cli, hydra_app, workers
from lipexp.executors import in_worker
from lipexp.runs import SweepFailed

TINY = ("experiment=debug", "device=cpu", "steps=2", "dataset.n_train=64", "dataset.n_test=32", "batch_size=32")


@pytest.mark.parametrize(
    ("arguments", "asked_for"),
    [
        (["-m", "seed=0,1", cli.PROCESSES], True),
        ([cli.PROCESSES, "--multirun"], True),
        (["seed=0", cli.PROCESSES], False),
        (["-m", "seed=0,1"], False),
        (["-m", "hydra.launcher.executor=inline"], False),
    ],
)
def test_the_server_starts_early_if_the_arguments_ask_for_it(arguments, asked_for, monkeypatch):
    order = []
    monkeypatch.setattr(workers, "begin_workers", lambda: order.append("server"))
    monkeypatch.setattr(hydra_app, "main", lambda arguments: order.append("hydra") or 0)
    monkeypatch.setattr(sys, "argv", ["lipexp", "train", *arguments])
    assert cli.main() == 0
    assert order == (["server"] * asked_for) + ["hydra"]


def imported(*names: str) -> list[bool]:
    return [name in sys.modules for name in names]


def test_a_worker_has_its_imports_from_the_server():
    assert in_worker(imported, "torch", "sklearn.datasets", "lipexp.train") == [True] * 3


def test_a_worker_leaves_alone_what_the_server_has_made():
    assert in_worker(gc.get_freeze_count) > 100_000


def test_a_worker_has_the_environment_of_now(monkeypatch):
    """Not that of the server, which may have started before a callback changed something."""
    workers.prepare_workers()
    monkeypatch.setenv("SET_LATER", "yes")
    assert in_worker(os.getenv, "SET_LATER") == "yes"


def test_a_worker_that_dies_is_one_line():
    with pytest.raises(SweepFailed) as failed:
        in_worker(os._exit, 3)
    (line,) = failed.value.failures
    assert line.startswith("a worker process died before any job trained, ")


def test_the_process_of_a_sweep_needs_no_torch(tmp_path):
    code = "import sys; from lipexp import cli; print(cli.main(), 'torch' in sys.modules)"
    command = [sys.executable, "-c", code, "train", "-m", "seed=0,1", cli.PROCESSES, *TINY]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 False"
    assert len(list(tmp_path.glob("outputs/*/*/*/metrics.json"))) == 2


def test_ctrl_c_while_jobs_are_checked_ends_at_once(tmp_path):
    """A class of the user's that takes for ever to be made; it lies where the command is called."""
    (tmp_path / "slow.py").write_text(
        "import pathlib, time\nclass Slow:\n    def __init__(self):\n"
        "        pathlib.Path('begun').touch()\n        time.sleep(1000)\n"
    )
    (tmp_path / "act").mkdir()
    (tmp_path / "act" / "slow.yaml").write_text("_target_: slow.Slow\n")
    lipexp = str(Path(sys.executable).with_name("lipexp"))
    command = [lipexp, "train", "-m", "-cd", ".", "act=slow", "seed=0,1", cli.PROCESSES, "hydra.sweep.dir=s"]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as sweep:
        end = time.monotonic() + 60
        while not (tmp_path / "begun").exists():
            assert time.monotonic() < end
            time.sleep(0.02)
        sweep.send_signal(signal.SIGINT)
        out, err = sweep.communicate(timeout=60)
    assert (sweep.returncode, out, err) == (130, "", "lipexp: interrupted\n")
    assert not list(tmp_path.glob("s/sweep.json"))


@pytest.mark.parametrize("seconds", [0.3, 0.9, 1.3])
def test_ctrl_c_on_a_terminal_while_workers_import_is_one_line(seconds, tmp_path):
    """It goes to all processes: the server, which is about to import torch, must not answer."""
    lipexp = str(Path(sys.executable).with_name("lipexp"))
    command = [lipexp, "train", "-m", "seed=0,1", cli.PROCESSES, *TINY, "steps=1000000"]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    ) as sweep:
        end = time.monotonic() + 60
        while "forkserver" not in (running := commands_of_children(sweep.pid)):
            assert time.monotonic() < end, running
            time.sleep(0.01)
        time.sleep(seconds)
        os.killpg(sweep.pid, signal.SIGINT)
        out, err = sweep.communicate(timeout=60)  # the end of its output: the server has ended as well
    assert (sweep.returncode, out, err) == (130, "", "lipexp: interrupted\n")


def commands_of_children(pid: int) -> str:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return " ".join(Path(f"/proc/{child}/cmdline").read_text() for child in children)


def test_a_machine_that_starts_no_workers_is_one_line(tmp_path):
    """A socket's name holds some hundred characters, that of the folder included."""
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    lipexp = str(Path(sys.executable).with_name("lipexp"))
    command = [lipexp, "train", "-m", "seed=0,1", cli.PROCESSES, *TINY]
    environment = {**os.environ, "TMPDIR": str(folder)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert done.stderr.startswith("lipexp: hydra.launcher.executor=process: cannot start a process here: ")
