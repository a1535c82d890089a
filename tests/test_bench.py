"""The bench: what it compares and how it reports that. How fast anything is, no test asserts."""

from __future__ import annotations

import re
import tempfile

import pytest
import torch
from rich.console import Console

from lipexp import loop
from lipexp.activations import GroupSort
from lipexp.bench import main, steps, sweep, timing
from lipexp.bench.timing import Case

NUMBER = r"[\d,]+(\.\d+)?"
TIMES = rf"{NUMBER} (µs|ms) +{NUMBER} (µs|ms)"
ROW = rf"(?P<name>\S.*?)  +(1|{NUMBER} +{NUMBER} to {NUMBER} +(≤ {NUMBER} +(met|missed) +)?) *{TIMES}"


def compared(printed: str) -> list[list[str]]:
    """The names in the rows of each table; the first is what the others are compared with."""
    found: list[list[str]] = []
    for line in map(str.rstrip, printed.splitlines()):
        if re.fullmatch(r"\d rounds? +ratio +quartiles +target +CPU +wall", line):
            found.append([])
        elif row := re.fullmatch(ROW, line):
            assert (row[2] == "1") == (not found[-1])
            found[-1].append(row["name"])
    return found


def test_the_quick_sections_print_ratios_and_leave_nothing_behind(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(steps, "TRAIN", ("train", "--cfg", "job"))
    monkeypatch.setattr(steps, "IMPORTS", "import json")
    assert main(["step", "commands", "--rounds", "2", "activation", "step"]) == 0
    step, help_command, train, activation = compared(capsys.readouterr().out)
    own = ["lipexp none + ReLU", "lipexp linf + MaxMin", "lipexp spectral + MaxMin"]
    assert step[:5] == ["torch MLP, ReLU", *own, "torch spectral_norm + MaxMin"]
    assert help_command == ["python -c pass", "lipexp --help"]
    assert train == ["python -c 'import json'", "lipexp train --cfg job"]
    assert activation == ["torch ReLU", "lipexp MaxMin", "torch.sort of pairs", "torch.minimum, maximum"]
    assert list(tmp_path.glob("lipexp*")) == []
    monkeypatch.setattr(steps, "TRAIN", ("train", "act=rellu"))
    assert main(["commands", "--rounds", "1"]) == 1
    assert re.fullmatch(r"lipexp: \S+ train act=rellu: .*did you mean act=relu\?.*\n", capsys.readouterr().err)


def test_the_sections_of_a_sweep_compare_runs_of_a_stack(capsys):
    console = Console(width=200)
    sweep.steps(console, rounds=1, runs=2)
    assert compared(capsys.readouterr().out)[0] == [
        "torch MLP, ReLU",
        "linf + MaxMin, a run of 2",
        "spectral + MaxMin, a run of 2",
    ]


def test_a_ratio_is_the_median_of_those_within_a_round(monkeypatch):
    calls: list[str] = []
    costs = {"a": [1, 1, 1, 1, 1, 1], "b": [2, 2, 6, 6, 4, 4]}  # seconds of each call
    monkeypatch.setattr(timing, "cpu_seconds", lambda: sum(sum(costs[c][: calls.count(c)]) for c in costs))
    cases = [Case("a", lambda: calls.append("a")), Case("b [x]", lambda: calls.append("b"), target=1.4, runs=2)]
    timing.take_turns(cases, rounds=3, calls=2, warm_up=0)
    assert calls == [*"aabb", *"bbaa", *"aabb"]  # each is first in its turn
    assert [case.cpu for case in cases] == [[1, 1, 1], [1, 3, 2]]  # of one run
    console = Console(width=200)
    with console.capture() as captured:
        console.print(timing.table("title", cases))
    assert re.search(r"b \[x\] +2\.00 +1\.50 to 2\.50 +≤ 1\.4 +missed", captured.get())


def test_what_is_timed_is_the_step_of_training(monkeypatch):
    runs, taken, step = steps.one_run("steps=3", "eval_every=0"), [], loop.Trainer.step
    monkeypatch.setattr(loop.Trainer, "step", lambda trainer: (taken.append(trainer.steps_done), step(trainer))[1])
    loop.fit(runs, lambda checkpoint: None)
    assert (taken, runs.shapes) == ([0, 1, 2], [(128, 2), (128, 128), (1, 128)])
    x = torch.randn(2, 7, 10, generator=torch.Generator().manual_seed(0))
    assert torch.equal(steps.MinimumMaximum()(x), GroupSort()(x))


@pytest.mark.parametrize("arguments", [["stpe"], ["--rounds", "0"]])
def test_bad_input_is_one_line(arguments, capsys):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(("lipexp: stpe: no such section; did you mean step?", "lipexp: --rounds=0: must be"))
