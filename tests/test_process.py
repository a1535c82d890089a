"""CPU threads hold for torch and for numpy, in all of a run and nowhere else; Ctrl-C before and after results."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from threadpoolctl import threadpool_info

from lipexp.display import StackDisplay
from lipexp.members import build
from lipexp.process import cpu_threads
from lipexp.runs import RunFolder
from lipexp.training import train_many


def in_use() -> set[int]:
    """The threads of torch, and of every library that does linear algebra for numpy."""
    blas = {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}
    assert blas  # numpy's own at least
    return {torch.get_num_threads(), *blas}


@pytest.mark.parametrize("threads", [1, 2])
def test_a_run_has_its_threads_in_all_libraries_and_gives_them_back(threads, compose, tmp_path):
    seen = []
    display = StackDisplay(lambda *report: seen.append(in_use()), 0)
    member = build(compose(f"threads={threads}", "steps=2", "eval_every=1", "max_regions=0"))
    with cpu_threads(3 - threads):
        train_many([member], [RunFolder(tmp_path)], display, figures=False)
        assert len(seen) > 3
        assert set(map(frozenset, seen)) == {frozenset({threads})}
        assert in_use() == {3 - threads}
        with pytest.raises(KeyError), cpu_threads(threads):
            raise KeyError
        assert in_use() == {3 - threads}


INTERRUPTED = """
import signal, sys
from lipexp.process import starting, begin_work
signal.signal(signal.SIGINT, getattr(signal, sys.argv[1]))
try:
    with starting():
        if sys.argv[2] == "results":
            begin_work()
        signal.raise_signal(signal.SIGINT)
        print("goes on")
except KeyboardInterrupt:
    print("raised")
"""


@pytest.mark.parametrize(
    ("handler", "stake", "expected"),
    [
        ("default_int_handler", "nothing", (130, "", "lipexp: interrupted\n")),
        ("default_int_handler", "results", (0, "raised\n", "")),
        ("SIG_IGN", "nothing", (0, "goes on\n", "")),
    ],
)
def test_ctrl_c_ends_the_process_until_results_are_at_stake(handler, stake, expected):
    command = [sys.executable, "-c", INTERRUPTED, handler, stake]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == expected
