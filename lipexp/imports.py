"""Imports of torch and scikit-learn, which take most of the time of a short command."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from lipexp.interrupts import hold_interrupts


@contextmanager
def quick_imports(keep: bool = False) -> Iterator[None]:
    """The garbage collector rests while the body imports, and Ctrl-C waits.

    An import makes very many objects, all of which stay. Looking through them again and again takes a good part of
    the time, and so does looking through them once more at the end of a command.

    Args:
        keep: it never looks again at what is there after an import. For the process of a command.
    """
    working, known = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        with hold_interrupts():
            yield
        if keep and len(sys.modules) > known:
            gc.freeze()
    finally:
        if working:
            gc.enable()
