"""What concerns the whole process: its start, its output, what Ctrl-C does, and how many CPU threads it takes."""

from __future__ import annotations

import codecs
import gc
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

INTERRUPTED = 130  # the exit status
LEGIBLE = "lipexp.legible"  # how an output treats a character that it cannot encode
SPELLED = {
    **{"‖": "|", "∇": "grad ", "∂": "d", "δ": "delta", "≤": "<=", "≥": ">=", "±": "+-", "−": "-", "√": "sqrt"},
    **{"₁": "_1", "₂": "_2", "∞": "_inf", "…": "...", "′": "'", "×": "x"},
}


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
def starting() -> Iterator[None]:
    """The body is the start of a command until `begin_work` is called: imports, and composing configurations.

    Ctrl-C then ends the process, with one line and status 130, as nothing is written yet: a KeyboardInterrupt that
    is raised in an import or in Hydra can be swallowed, or leave half-imported modules behind. And the garbage
    collector rests, since imports make very many objects, which all stay.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # else Ctrl-C is ignored, or belongs to somebody else
        signal.signal(signal.SIGINT, _end)
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        signal.signal(signal.SIGINT, before)


def begin_work() -> None:
    """From here on results are written: Ctrl-C raises KeyboardInterrupt, so that they are left in order."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if not gc.isenabled():
        gc.freeze()  # what is imported is never looked through again
        gc.enable()


@contextmanager
def holding_interrupts() -> Iterator[None]:
    """Ctrl-C waits until the body is done, such as an import.

    By a handler and not by blocking the signal, which any thread that does not block it would still receive. In
    another thread than the main one, which Ctrl-C never reaches, there is nothing to do.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: held.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        for number in held[:1]:
            signal.raise_signal(number)


def legible_output() -> None:
    """From now on, what standard output and standard error cannot encode is spelled out: ‖∇f‖₂ as |grad f|_2."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # None, where the command is started without one
            stream.reconfigure(errors=LEGIBLE)


def silence(stream: Any) -> None:
    """Whatever is written to `stream`, and still to be written, vanishes from now on."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _legible(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    part = error.object[error.start : error.end]
    return "".join(SPELLED.get(c) or c.encode("ascii", "backslashreplace").decode() for c in part), error.end


codecs.register_error(LEGIBLE, _legible)


def _end(*received: Any) -> None:
    os.write(2, b"lipexp: interrupted\n")
    os._exit(INTERRUPTED)
