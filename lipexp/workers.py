"""The server that worker processes are forked from; it imports what they need, once for all of them.

It has run no torch operation, so it has no threads that a fork would lose; the process of the command may have.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
PRELOAD = ["lipexp.preload"]


def begin_workers() -> None:
    """Start the imports of worker processes, which take seconds, while this process does something else.

    Raises:
        OSError: this machine starts none.
    """
    CONTEXT.set_forkserver_preload(PRELOAD)
    resource_tracker.ensure_running()  # the server would start it, and let Ctrl-C in again
    with _no_interrupt():  # it and all workers keep this: Ctrl-C is left to their parent
        forkserver.ensure_running()


def prepare_workers() -> None:
    """`begin_workers`, once workers are certain to be wanted.

    Raises:
        ConfigError: this machine starts none.
    """
    try:
        begin_workers()
    except OSError as error:  # of a socket in a folder with a long name, for one
        from lipexp.config import ConfigError  # which takes longer to import than all of this module

        raise ConfigError("hydra.launcher.executor", "process", f"cannot start a process here: {error}") from None


def stop_workers() -> None:
    """End the server at once, whatever it imports: it holds our output, and perhaps a worker half begun."""
    server: Any = forkserver._forkserver
    if server._forkserver_pid is not None:
        os.kill(server._forkserver_pid, signal.SIGKILL)
        server._stop()


@contextmanager
def _no_interrupt() -> Iterator[None]:
    """Ctrl-C waits until the body is done; processes that the body starts never get one."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
