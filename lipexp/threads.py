"""How many CPU threads the numerical libraries use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from threadpoolctl import threadpool_limits


@contextmanager
def cpu_threads(threads: int) -> Iterator[None]:
    """The body runs with so many threads in torch and in numpy's linear algebra.

    By itself numpy takes a thread a core. With as many worker processes as cores, those wait for one another.
    A library that is loaded later keeps its own number.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with threadpool_limits(threads, user_api="blas"):
            yield
    finally:
        torch.set_num_threads(before)
