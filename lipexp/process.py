"""What concerns the whole process: its start and its output, what ends it, and how many CPU threads it takes."""

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

# The signals that end a command, and what Python does by itself.
SIGNALS: dict[int, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
ENDED: dict[int, str] = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
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


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command as Ctrl-C does."""


@contextmanager
def starting() -> Iterator[None]:
    """The body is the start of a command until `begin_work` is called: imports, and composing configurations.

    Ctrl-C and SIGTERM then end the process, with one line and status 130 or 143, as nothing is written yet: a
    KeyboardInterrupt that is raised in an import or in Hydra can be swallowed, or leave half-imported modules
    behind. And the garbage collector rests, since imports make very many objects, which all stay.
    """
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, usual in SIGNALS.items():
        if before[number] is usual:  # else it is ignored, or belongs to somebody else
            signal.signal(number, _end)
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        for number, handler in before.items():
            signal.signal(number, handler)


def begin_work() -> None:
    """From here on results are written: Ctrl-C and SIGTERM raise KeyboardInterrupt, and all is left in order."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGTERM) is _end:
        signal.signal(signal.SIGTERM, _terminate)
    if not gc.isenabled():
        gc.freeze()  # what is imported is never looked through again
        gc.enable()


def has_begun() -> bool:
    """Whether results may have been written."""
    return gc.isenabled()


@contextmanager
def holding_interrupts() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait until the body is done, such as an import.

    By a handler and not by blocking the signals, which any thread that does not block them would still receive. In
    another thread than the main one, which they never reach, there is nothing to do.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    before = {number: signal.signal(number, lambda number, _: held.append(number)) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for received in held[:1]:
            signal.raise_signal(received)


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


def _terminate(*received: Any) -> None:
    raise Terminated


def _end(number: int, *received: Any) -> None:
    os.write(2, f"lipexp: {ENDED[number]}\n".encode())
    os._exit(128 + number)
