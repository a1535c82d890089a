"""Where the stacks of a sweep train: in this process, in worker processes, or in SLURM."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import threading
from collections import deque
from collections.abc import Sequence
from multiprocessing import connection, forkserver, resource_tracker
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from lipexp.config import ConfigError, one_line
from lipexp.display import StackDisplay, SweepDisplay
from lipexp.process import holding_interrupts
from lipexp.sweep.compose import Job
from lipexp.sweep.progress import REPORT_SECONDS, Progress, Reporter

CONTEXT = multiprocessing.get_context("forkserver")


def inline(stacks: Sequence[Sequence[Job]], display: SweepDisplay, made: dict[str, Any]) -> None:
    """Train the stacks here, one after the other."""
    with holding_interrupts():
        from lipexp.sweep.work import train_stack

    for number, jobs in enumerate(stacks):
        part = StackDisplay(display.update, number)
        try:
            train_stack(jobs, part, made)
            part.done()
        except OSError as error:
            display.died(number, one_line(error))


def start_server() -> None:
    """Start importing what worker processes need, while this process does something else.

    Ctrl-C stays blocked in the server and the workers: they end with this process.

    Raises:
        ConfigError: no process can be started here.
    """
    CONTEXT.set_forkserver_preload([__name__, "lipexp.sweep.work"])
    resource_tracker.ensure_running()  # the server would start it otherwise, and unblock Ctrl-C with that
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    except OSError as error:  # such as a temporary folder whose name is too long for a socket
        raise ConfigError("hydra.launcher.executor", "process", f"cannot start a process here: {error}") from None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def in_processes(stacks: Sequence[Sequence[Job]], processes: int, display: SweepDisplay) -> None:
    """Train each stack in a worker process of its own, several at a time.

    A worker that dies leaves jobs without a result and without a failure; the other stacks go on.
    """
    start_server()
    # The largest first, so that all processes end at about the same time.
    waiting = deque(sorted(range(len(stacks)), key=lambda number: -len(stacks[number])))
    running: dict[int, ForkServerProcess] = {}
    with tempfile.TemporaryDirectory(prefix="lipexp-") as folder:
        try:
            while waiting or running:
                while waiting and len(running) < processes:
                    number = waiting.popleft()
                    arguments = (stacks[number], Path(folder, str(number)))
                    worker = CONTEXT.Process(target=train_and_report, args=arguments)
                    with holding_interrupts():  # so that none is started and then forgotten
                        worker.start()
                        running[number] = worker
                connection.wait([worker.sentinel for worker in running.values()], timeout=REPORT_SECONDS)
                for number, worker in list(running.items()):
                    code = worker.exitcode
                    progress = Progress.read(Path(folder, str(number))) or Progress()
                    done = code == 0 and progress.given_up is None
                    display.update(number, progress.step, progress.total, progress.live, done)
                    if code is not None:
                        del running[number]
                    if progress.given_up or code not in (None, 0):
                        display.died(number, progress.given_up)
        finally:
            for worker in running.values():
                worker.kill()
                worker.join()


def train_and_report(jobs: Sequence[Job], file: Path) -> None:
    """Train one stack, in a worker process, which the server forks with all imports done."""
    from lipexp.sweep.work import train_stack

    threading.Thread(target=_end_with_parent, daemon=True).start()
    reporter = Reporter(file)
    display = StackDisplay(reporter.update, 0)
    try:
        train_stack(jobs, display)
        display.done()
    except OSError as error:  # nothing can be written
        reporter.give_up(one_line(error))


def _end_with_parent() -> None:
    """End this process when the command that started it does, however it ended."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
