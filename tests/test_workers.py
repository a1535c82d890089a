"""Worker processes: the server they come from, and what it spares the process of the command."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from lipexp import workers
from lipexp.executors import in_worker
from lipexp.runs import SweepFailed

TINY = ("experiment=debug", "device=cpu", "steps=2", "dataset.n_train=64", "dataset.n_test=32", "batch_size=32")


@pytest.mark.parametrize(
    ("arguments", "asked_for"),
    [
        (["-m", "seed=0,1", workers.ASKED_FOR], True),
        ([workers.ASKED_FOR, "--multirun"], True),
        (["seed=0", workers.ASKED_FOR], False),
        (["-m", "seed=0,1"], False),
        (["-m", "hydra.launcher.executor=inline"], False),
    ],
)
def test_the_server_starts_early_if_the_arguments_ask_for_it(arguments, asked_for, monkeypatch):
    started = []
    monkeypatch.setattr(workers, "prepare_workers", lambda: started.append(1))
    workers.prepare_if_asked_for(arguments)
    assert bool(started) == asked_for


def imported(*names: str) -> list[bool]:
    return [name in sys.modules for name in names]


def test_a_worker_has_its_imports_from_the_server():
    assert in_worker(imported, "torch", "sklearn.datasets", "lipexp.train") == [True] * 3


def test_a_worker_that_dies_is_one_line():
    with pytest.raises(SweepFailed) as failed:
        in_worker(os._exit, 3)
    assert failed.value.failures == ["a worker process died, of too little memory perhaps"]


def test_the_process_of_a_sweep_needs_no_torch(tmp_path):
    code = "import sys; from lipexp import cli; print(cli.main(), 'torch' in sys.modules)"
    command = [sys.executable, "-c", code, "train", "-m", "seed=0,1", workers.ASKED_FOR, *TINY]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 False"
    assert len(list(tmp_path.glob("outputs/*/*/*/metrics.json"))) == 2
