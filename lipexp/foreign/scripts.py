"""TorchScript files."""

from __future__ import annotations

from lipexp.foreign.features import Unread
from lipexp.foreign.outputs import Graph


def read(content: bytes, n_inputs: int) -> Graph:
    raise Unread("is TorchScript")
