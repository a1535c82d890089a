"""Worker processes: the server they come from, their deaths, and what classes of the user's do to them."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from processes import SCRIPT, ctrl_c, ended, start, wait_for

from lipexp import cli, hydra_app, workers
from lipexp.executors import in_worker
from lipexp.workers import WorkerDied

TINY = ("experiment=debug", "device=cpu", "steps=2", "dataset.n_train=64", "dataset.n_test=32", "batch_size=32")
INTERRUPTED = (130, "", "lipexp: interrupted\n")


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


class Unsendable(Exception):
    def __init__(self, one, two):
        super().__init__("both")


def raising(error):
    raise Unsendable(1, 2) if error == "unsendable" else error


def test_what_a_task_raises_is_raised_here():
    with pytest.raises(OSError, match="full") as raised:
        in_worker(raising, OSError(28, "full"))
    assert raised.value.errno == 28
    with pytest.raises(RuntimeError, match=r"Unsendable\('both'\)"):
        in_worker(raising, "unsendable")


def test_the_death_of_a_worker_is_told():
    with pytest.raises(WorkerDied):
        in_worker(os._exit, 3)


def test_the_process_of_a_sweep_needs_no_torch(tmp_path):
    code = "import sys; from lipexp import cli; print(cli.main(), 'torch' in sys.modules)"
    command = [sys.executable, "-c", code, "train", "-m", "seed=0,1", cli.PROCESSES, *TINY]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 False"
    assert len(list(tmp_path.glob("outputs/*/*/*/metrics.json"))) == 2


def run(tmp_path: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """A sweep in processes, with the classes and the options that lie in `tmp_path`."""
    command = [SCRIPT, "train", "-m", "-cd", ".", cli.PROCESSES, *TINY, "hydra.sweep.dir=s", *overrides]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)


def activation(tmp_path: Path, name: str, code: str) -> None:
    """The option act=NAME of a class of the user's."""
    (tmp_path / f"{name}.py").write_text(code)
    (tmp_path / "act").mkdir()
    (tmp_path / "act" / f"{name}.yaml").write_text(f"_target_: {name}.{name.title()}\n")


def statuses(tmp_path: Path) -> list[str]:
    return pd.read_csv(tmp_path / "s" / "sweep.csv")["status"].tolist()


@pytest.mark.parametrize("workers", [1, 2])
def test_the_death_of_a_worker_leaves_the_other_stacks_alone(workers, tmp_path):
    code = "import os, torch\nclass Dying(torch.nn.Module):\n    def forward(self, x):\n        os._exit(3)\n"
    activation(tmp_path, "dying", code)
    acts = "act=dying,relu,abs"
    done = run(tmp_path, acts, "constraint=none", "seed=0,1", f"hydra.launcher.workers={workers}")
    assert done.returncode == 1
    assert "stack 1 of 3, 2 runs: its worker process died" in done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("lipexp: 2 jobs are missing: a worker process died")
    assert statuses(tmp_path) == ["missing"] * 2 + ["ok"] * 4


@pytest.mark.parametrize("executor", ["inline", "process"])
def test_sys_exit_while_a_job_trains_fails_that_job(executor, tmp_path):
    code = "import sys, torch\nclass Leaving(torch.nn.Module):\n    def forward(self, x):\n        sys.exit(0)\n"
    activation(tmp_path, "leaving", code)
    done = run(tmp_path, "act=leaving,relu", "constraint=none", "seed=0", f"hydra.launcher.executor={executor}")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("lipexp: SystemExit: 0 (traceback in ")
    assert statuses(tmp_path) == ["failed", "ok"]


@pytest.mark.parametrize("executor", ["inline", "process"])
def test_output_that_nobody_reads_fails_no_job(executor, tmp_path):
    command = [SCRIPT, "train", "-m", *TINY, "act=relu,abs,maxmin", f"hydra.launcher.executor={executor}"]
    reader, writer = os.pipe()
    with subprocess.Popen(
        [*command, "hydra.launcher.workers=1", "hydra.sweep.dir=s"],
        cwd=tmp_path,
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
    ) as sweep:
        os.close(writer)
        os.read(reader, 1)
        os.close(reader)
        _, err = sweep.communicate(timeout=60)
    assert (sweep.returncode, err) == (1, "")
    assert "failed" not in statuses(tmp_path)


def test_what_a_class_of_the_users_leaves_behind_does_not_hold_up_the_end(tmp_path):
    """A thread that goes on, and a process that has inherited all connections."""
    code = "import os, pathlib, threading, time, torch\nclass Leaving(torch.nn.ReLU):\n    def __init__(self):\n"
    code += "        super().__init__()\n        threading.Thread(target=time.sleep, args=(1000,)).start()\n"
    code += "        if os.fork() == 0:\n            pathlib.Path(f'{os.getpid()}.left').touch()\n"
    code += "            time.sleep(1000)\n            os._exit(0)\n"
    activation(tmp_path, "leaving", code)
    try:
        with (tmp_path / "out").open("w") as out:
            command = [SCRIPT, "train", "-m", "-cd", ".", cli.PROCESSES, *TINY, "hydra.sweep.dir=s", "act=leaving"]
            command += ["constraint=none", "seed=0,1"]
            done = subprocess.run(command, cwd=tmp_path, stdout=out, stderr=out, timeout=200, check=False)
    finally:
        for left in tmp_path.glob("*.left"):
            os.kill(int(left.stem), signal.SIGKILL)
    assert done.returncode == 0
    assert statuses(tmp_path) == ["ok", "ok"]


def test_a_job_whose_constructor_ends_the_process_fails_alone(tmp_path):
    code = "import os, torch\nclass Exiting(torch.nn.ReLU):\n    def __init__(self, at):\n"
    code += "        super().__init__()\n        if at == 3:\n            os._exit(3)\n"
    activation(tmp_path, "exiting", code)
    done = run(tmp_path, "act=exiting", "constraint=none", "+act.at=range(6)", "hydra.launcher.workers=2")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "its worker process died while its classes were made" in line
    assert line.endswith("s/3)")
    assert statuses(tmp_path) == ["ok"] * 3 + ["failed"] + ["ok"] * 2


def test_ctrl_c_while_jobs_are_checked_ends_at_once(tmp_path):
    """A class of the user's that takes for ever to be made; it lies where the command is called."""
    code = "import pathlib, time\nclass Slow:\n    def __init__(self):\n        pathlib.Path('begun').touch()\n"
    activation(tmp_path, "slow", code + "        time.sleep(1000)\n")
    sweep = start(tmp_path, "train", "-m", "-cd", ".", "act=slow", "seed=0,1", cli.PROCESSES, "hydra.sweep.dir=s")
    wait_for((tmp_path / "begun").exists)
    sweep.send_signal(signal.SIGINT)  # to it alone
    assert ended(sweep) == INTERRUPTED
    assert not list(tmp_path.glob("s/sweep.json"))


def test_the_death_of_the_server_is_made_good():
    from multiprocessing import forkserver

    workers.prepare_workers()
    os.kill(forkserver._forkserver._forkserver_pid, signal.SIGKILL)
    assert in_worker(imported, "torch") == [True]


@pytest.mark.parametrize("pause", [0.0, 0.05, 0.2])
def test_ctrl_c_twice_is_no_traceback(pause, tmp_path):
    sweep = start(tmp_path, "train", "-m", "seed=0,1", cli.PROCESSES, *TINY, "steps=1000000", "hydra.sweep.dir=s")
    wait_for(lambda: list(tmp_path.glob("s/*/.hydra")))
    for _ in range(2):
        ctrl_c(sweep)
        time.sleep(pause)
    status, _, err = ended(sweep)
    assert status in (130, -signal.SIGINT)
    assert err in ("lipexp: interrupted\n", "")


def test_ctrl_c_ends_what_a_class_of_the_users_has_started(tmp_path):
    """Who blocks or ignores it hands that down to what it starts."""
    code = "import os, pathlib, subprocess, time\nclass Parent:\n    def __init__(self):\n"
    code += "        subprocess.Popen(['sleep', '1000'])\n"
    code += "        if os.fork() == 0:\n            pathlib.Path('begun').touch()\n"
    activation(tmp_path, "parent", code + "        time.sleep(1000)\n")
    sweep = start(tmp_path, "train", "-m", "-cd", ".", "act=parent", "seed=0,1", cli.PROCESSES)
    wait_for((tmp_path / "begun").exists)
    ctrl_c(sweep)
    assert ended(sweep) == INTERRUPTED


@pytest.mark.parametrize("seconds", [0.3, 0.9, 1.3])
def test_ctrl_c_on_a_terminal_while_workers_import_is_one_line(seconds, tmp_path):
    """The server, which is about to import torch, must not answer."""
    sweep = start(tmp_path, "train", "-m", "seed=0,1", cli.PROCESSES, *TINY, "steps=1000000")
    wait_for(lambda: "forkserver" in commands_of_children(sweep.pid))
    time.sleep(seconds)
    ctrl_c(sweep)
    assert ended(sweep) == INTERRUPTED


def commands_of_children(pid: int) -> str:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return " ".join(Path(f"/proc/{child}/cmdline").read_text() for child in children)


def test_a_machine_that_starts_no_workers_is_one_line(tmp_path):
    """A socket's name holds some hundred characters, that of the folder included."""
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    command = [SCRIPT, "train", "-m", "seed=0,1", cli.PROCESSES, *TINY]
    environment = {**os.environ, "TMPDIR": str(folder)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert done.stderr.startswith("lipexp: hydra.launcher.executor=process: cannot start a process here: ")
