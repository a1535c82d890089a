"""When Ctrl-C arrives: not while Python imports a module, or Hydra composes.

An interruption in the midst of that leaves halves of modules and of configurations behind, from which other errors
arise later, or is lost on its way. So it waits until they are done, at most a second or two; a second Ctrl-C does
not. All of this holds while the command `lipexp` runs; elsewhere Ctrl-C is Python's own.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 130  # the exit status

_holding = 0  # how many `hold_interrupts` there are around this place
_waiting = False  # one has come meanwhile
_raised = False  # one has been raised
_ignoring = 0  # how many `ignore_interrupts` there are around this place


class ScreenClosed(BaseException):
    """The reader of our output has gone, as in `lipexp train | head`. No error of a run, and so no Exception."""


@contextmanager
def orderly_interrupts() -> Iterator[None]:
    """Ctrl-C heeds the other functions of this module while the body runs."""
    global _holding, _waiting, _raised, _ignoring
    _holding, _waiting, _raised, _ignoring = 0, False, False, 0
    mine = threading.current_thread() is threading.main_thread()
    if not (mine and signal.getsignal(signal.SIGINT) is signal.default_int_handler):  # it is ignored, say
        yield
        return
    signal.signal(signal.SIGINT, _interrupted)
    try:
        yield
    finally:
        # After one, another ends what is still alive, without a word.
        signal.signal(signal.SIGINT, signal.SIG_DFL if _raised else signal.default_int_handler)


@contextmanager
def hold_interrupts() -> Iterator[None]:
    """Ctrl-C waits until the body has ended; it may admit it."""
    global _holding
    _holding += 1
    try:
        yield
    finally:
        _holding -= 1
        if not _holding:
            _raise_waiting()


@contextmanager
def admit_interrupts() -> Iterator[None]:
    """Ctrl-C does not wait in the body, nor does one that has come before."""
    global _holding
    before, _holding = _holding, 0
    try:
        _raise_waiting()
        yield
    finally:
        _holding = before


@contextmanager
def ignore_interrupts() -> Iterator[None]:
    """Ctrl-C does nothing in the body: for the work of a moment that must not be done by halves."""
    global _ignoring
    _ignoring += 1
    try:
        yield
    finally:
        _ignoring -= 1


@contextmanager
def find_lost_interrupts() -> Iterator[None]:
    """An interrupt that became another error on its way through the body, or was swallowed there, is one again."""
    try:
        yield
    except (Exception, SystemExit):
        if _raised:
            raise KeyboardInterrupt from None
        raise
    if _raised:
        raise KeyboardInterrupt


def _interrupted(number: int, frame: FrameType | None) -> None:
    global _waiting, _raised
    if _ignoring:
        return
    if _holding and not _waiting:
        _waiting = True
        return
    _waiting, _raised = False, True
    raise KeyboardInterrupt


def _raise_waiting() -> None:
    if _waiting:
        _interrupted(signal.SIGINT, None)
