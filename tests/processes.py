"""The command in a process of its own: begun, waited for, interrupted as on a terminal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

SCRIPT = str(Path(sys.executable).with_name("lipexp"))


def start(folder: Path, *arguments: str, environment: Mapping[str, str] = {}) -> subprocess.Popen[str]:
    """`lipexp ARGUMENTS` in `folder`, in a session of its own, which Ctrl-C reaches as a whole."""
    return subprocess.Popen(
        [SCRIPT, *arguments],
        cwd=folder,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(condition: Callable[[], object], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def ctrl_c(process: subprocess.Popen[str]) -> None:
    """On a terminal it goes to all processes of the command."""
    os.killpg(process.pid, signal.SIGINT)


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Its exit status and what it wrote; it and all who hold its output have ended."""
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err
