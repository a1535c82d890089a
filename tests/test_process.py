"""The number of CPU threads holds for torch and for numpy, in all of a run, and nowhere else."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from threadpoolctl import threadpool_info

from lipexp import train
from lipexp.runs import RunFolder
from lipexp.process import cpu_threads


def in_use() -> set[int]:
    """The threads of torch, and of every library that does linear algebra for numpy."""
    blas = {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}
    assert blas  # numpy's own at least
    return {torch.get_num_threads(), *blas}


def test_all_libraries_use_the_threads_asked_for_and_go_back():
    inside = []

    def fail() -> None:
        with cpu_threads(1):
            inside.append(in_use())
            raise KeyError

    with cpu_threads(2):
        assert in_use() == {2}
        with pytest.raises(KeyError):
            fail()
        assert inside == [{1}]
        assert in_use() == {2}


@pytest.mark.parametrize("threads", [1, 2])
def test_a_run_evaluates_with_its_threads(threads, compose, tmp_path):
    seen = []
    display = SimpleNamespace(
        training=lambda total: nullcontext(),
        tick=lambda step: None,
        checkpoint=lambda step, rows: seen.append(in_use()),
    )
    member = train.build(compose(f"threads={threads}", "steps=2", "eval_every=1", "max_regions=0"))
    with cpu_threads(3 - threads):
        train.train_many([member], [RunFolder(tmp_path)], display, figures=False)
        assert seen == [{threads}] * 3
        assert in_use() == {3 - threads}
