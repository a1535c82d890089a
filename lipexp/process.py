"""What concerns the whole process: how many CPU threads the numerical libraries take, and what Ctrl-C does."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

INTERRUPTED = 130  # the exit status


@contextmanager
def cpu_threads(threads: int) -> Iterator[None]:
    """The body runs with this many threads in torch and in numpy's linear algebra.

    By itself numpy takes one per core, and the threads of several worker processes would compete for the cores. A
    library that is loaded later keeps its own number.
    """
    import torch
    from threadpoolctl import threadpool_limits

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with threadpool_limits(threads, user_api="blas"):
            yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def ending_on_interrupt() -> Iterator[None]:
    """Ctrl-C ends the process in the body, with one line and status 130, until `raise_on_interrupt` is called.

    For imports and the composition of configurations, while nothing is written yet: a KeyboardInterrupt raised in
    them can be swallowed by a library, or leave modules behind that are only half imported.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:  # Ctrl-C is ignored, or belongs to somebody else
        yield
        return
    signal.signal(signal.SIGINT, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def raise_on_interrupt() -> None:
    """From here on Ctrl-C raises KeyboardInterrupt: results are written, and have to be left in order."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(*received: Any) -> None:
    os.write(2, b"lipexp: interrupted\n")
    os._exit(INTERRUPTED)
