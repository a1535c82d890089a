"""The command as the tests use it: its usual settings, as a process of its own, and what a sweep leaves behind."""

from __future__ import annotations

import csv
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = str(Path(sys.executable).with_name("lipexp"))
DEBUG = ("experiment=debug", "device=cpu")
TINY = (
    *DEBUG,
    "steps=2",
    "max_regions=0",
    "dataset.n_train=64",
    "dataset.n_val=32",
    "dataset.n_test=32",
    "batch_size=32",
)
INLINE = "hydra.launcher.executor=inline"
NUMBER = re.compile(r"-?\d+\.?\d*(?:e[+-]?\d+)?")
BASIC = ("hydra/launcher=basic", "hydra/sweeper=basic")

PROCESS = "hydra.launcher.executor=process"

# waiting.py. The test says by files what happens when the data are drawn, so it need not guess how far a run is.
WAITING = """
import os, pathlib, signal
from lipexp.datasets import TwoMoons

class Waiting(TwoMoons):
    def draw(self, stream):
        if os.path.exists("gate"):  # a pipe into which nobody writes
            pathlib.Path("waits").touch()
            open("gate").read()
        if os.path.exists("interrupts"):
            signal.raise_signal(signal.SIGINT)
        if os.path.exists("kills"):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().draw(stream)
"""
TWO_STACKS = "dataset._target_=lipexp.datasets.TwoMoons,waiting.Waiting"


class TooLong(BaseException):
    """No answer came."""


@contextmanager
def time_limit(seconds: int = 30) -> Iterator[None]:
    """Ends what takes longer, on a busy machine, than it may."""

    def stop(*received: Any) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """`lipexp ARGUMENTS` in `folder`, in a session of its own, which Ctrl-C reaches as a whole."""
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([SCRIPT, *arguments], cwd=folder, start_new_session=True, **piped)


def wait_for(condition: Callable[[], object], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def ctrl_c(process: subprocess.Popen[str]) -> None:
    """On a terminal it goes to all processes of the command."""
    os.killpg(process.pid, signal.SIGINT)


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Its exit status and what it wrote; it and all that hold its output have ended."""
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def metrics(folder: Path) -> dict[str, Any]:
    """The content of metrics.json."""
    return json.loads((folder / "metrics.json").read_text())


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> dict[str, torch.Tensor]:
    """Let `change` edit the state dict of model.pt, in place or by returning another one."""
    state = torch.load(folder / "model.pt", weights_only=True)
    changed = change(state)
    state = changed if isinstance(changed, dict) else state
    torch.save(state, folder / "model.pt")
    return state


def content(folder: Path) -> dict[str, tuple[bytes, int]]:
    """file -> its bytes and when it was changed."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def table(folder: Path) -> list[dict[str, str]]:
    """The rows of sweep.csv."""
    with (folder / "sweep.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def statuses(folder: Path) -> list[str]:
    return [row["status"] for row in table(folder)]


def assert_same_sweep(one: Path, other: Path) -> None:
    """Equal rows of sweep.csv in equal order, numbers up to rounding in float32; timings are left out."""
    left, right = table(one), table(other)
    assert [list(row) for row in left] == [list(row) for row in right]
    for pair in zip(left, right, strict=True):
        for key in pair[0]:
            if not key.startswith(("timing.", "environment.", "model_sha256")):
                a, b = ([float(number) for number in NUMBER.findall(row[key])] for row in pair)
                assert a == pytest.approx(b, rel=1e-4, abs=1e-7), key
                assert len({NUMBER.sub("#", row[key]) for row in pair}) == 1, key


# Exported files --------------------------------------------------------------------------------------------------

# Runs where lipexp cannot be imported; writes what comes out of each file for several inputs by their names.
READER = """
import pickle, sys, warnings

sys.modules["lipexp"] = None
warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit itself

def opened(path):
    if path.endswith(".onnx"):
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        return lambda inputs: dict(zip(names, session.run(None, inputs), strict=True))
    import torch

    program = torch.jit.load(path) if path.endswith(".ts") else torch.export.load(path).module()

    def outputs(inputs):
        found = program(torch.from_numpy(inputs["x"]))
        found = found if isinstance(found, tuple) else (found,)
        return {name: part.numpy() for name, part in zip(("f", "prediction"), found)}

    return outputs

found = [list(map(opened(path), inputs)) for path, inputs in pickle.load(sys.stdin.buffer)]
pickle.dump(found, sys.stdout.buffer)
"""


def elsewhere(files):
    """What comes out of each file, for each of its inputs by their names, in a process without lipexp."""
    sent = pickle.dumps([(str(path), inputs) for path, inputs in files])
    script = [sys.executable, "-c", READER]
    return pickle.loads(subprocess.run(script, input=sent, capture_output=True, check=True).stdout)
