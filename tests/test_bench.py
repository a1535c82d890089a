"""The bench: what it compares and how it reports that. How fast anything is, no test asserts."""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec

import pytest
import torch
from rich.console import Console

from lipexp import loop
from lipexp.bench import bench
from lipexp.activations import GroupSort
from lipexp.bench.bench import Case, MinimumMaximum, SortedPairs, one_run, quartiles, table, take_turns


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def run(capsys) -> Callable[..., tuple[int, list[str], str]]:
    """run("step", "--rounds", "1") -> the exit status, the lines on stdout, and stderr."""

    def run(*arguments: str) -> tuple[int, list[str], str]:
        try:
            status = bench.main(list(arguments))
        except SystemExit as stop:
            status = stop.code
        out, err = capsys.readouterr()
        return status, [line.rstrip() for line in out.splitlines()], err

    return run


NUMBER = r"[\d,]+(\.\d+)?"
TIMES = rf"{NUMBER} (µs|ms)\s+{NUMBER} (µs|ms)"


PEERS = {
    "deel.torchlip": "torchlip Spectral + GroupSort2",
    "monotonicnetworks": "MonotonicNetworks inf + GroupSort",
}


def is_reference(line: str, name: str) -> bool:
    return re.fullmatch(rf"{re.escape(name)}\s+1\s+{TIMES}", line) is not None


def is_row(line: str, name: str, target: str | None = None) -> bool:
    goal = r"" if target is None else rf"≤ {re.escape(target)}\s+(met|missed)\s+"
    return re.fullmatch(rf"{re.escape(name)}\s+{NUMBER}\s+{NUMBER} to {NUMBER}\s+{goal}{TIMES}", line) is not None


# The sections ---------------------------------------------------------------------------------------------------


def test_a_train_step_is_compared_with_plain_torch(run):
    status, (title, heading, reference, *rows), err = run("step", "--rounds", "2")
    assert (status, err) == (0, "")
    assert title == "train step, 2-128-128-1, batch 256, hinge, Adam"
    assert heading.split() == ["2", "rounds", "ratio", "quartiles", "target", "CPU", "wall"]
    assert is_reference(reference, "torch MLP, ReLU")
    assert is_row(rows[0], "lipexp none + ReLU")
    assert is_row(rows[1], "lipexp linf + MaxMin", "1.3")
    assert is_row(rows[2], "lipexp spectral + MaxMin", "1.6")
    assert is_row(rows[3], "torch spectral_norm + MaxMin")
    for module, name in PEERS.items():
        if find_spec(module.partition(".")[0]) is not None:
            assert any(is_row(row, name) for row in rows[4:])


def test_libraries_that_are_not_installed_are_named(run, monkeypatch):
    for module in PEERS:
        monkeypatch.setitem(sys.modules, module, None)
    status, lines, err = run("step", "--rounds", "1")
    assert (status, err) == (0, "")
    packages = "deel-torchlip", "monotonicnetworks"
    assert lines[-1] == f"not installed: {', '.join(packages)} (pip install {' '.join(packages)})"
    assert len(lines) == 2 + 5 + 1


def test_maxmin_is_compared_with_relu(run):
    status, (title, _, reference, *rows), err = run("activation", "--rounds", "1")
    assert (status, err) == (0, "")
    assert title == "activation, forward and backward, 256 x 128"
    assert is_reference(reference, "torch ReLU")
    assert is_row(rows[0], "lipexp MaxMin", "3.3")
    assert is_row(rows[1], "torch.sort of pairs")
    assert is_row(rows[2], "torch.minimum, maximum")


def test_commands_are_compared_and_leave_nothing_behind(run, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(bench, "TRAIN", ("train", "--cfg", "job"))
    monkeypatch.setattr(bench, "IMPORTS", "import json")
    monkeypatch.setattr(bench, "COMMAND_WARM_UP", 0)
    status, lines, err = run("commands", "--rounds", "1")
    assert (status, err) == (0, "")
    assert is_reference(lines[2], "python -c pass")
    assert is_row(lines[3], "lipexp --help", "3")
    assert is_reference(lines[6], "python -c 'import json'")
    assert is_row(lines[7], "lipexp train --cfg job", "4")
    assert list(tmp_path.iterdir()) == []


def test_a_command_that_fails_is_reported(run, monkeypatch):
    monkeypatch.setattr(bench, "IMPORTS", "import json")
    monkeypatch.setattr(bench, "TRAIN", ("train", "act=rellu"))
    status, _, err = run("commands", "--rounds", "1")
    assert status == 1
    assert re.fullmatch(r"lipexp: \S+ train act=rellu: lipexp: .*did you mean act=relu\?.*\n", err)


# The command line -----------------------------------------------------------------------------------------------


@pytest.fixture
def called(monkeypatch) -> list[tuple[str, int, int]]:
    """The sections that would run: (name, rounds, torch's threads)."""
    calls: list[tuple[str, int, int]] = []

    def recorder(name: str) -> Callable[[Console, int], None]:
        return lambda console, rounds: calls.append((name, rounds, torch.get_num_threads()))

    monkeypatch.setattr(bench, "SECTIONS", {name: recorder(name) for name in bench.SECTIONS})
    return calls


def test_all_sections_run_by_default_with_one_thread(run, called):
    torch.set_num_threads(2)
    try:
        assert run()[0] == 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert called == [("step", 30, 1), ("activation", 30, 1), ("commands", 30, 1)]


def test_sections_run_once_each_in_the_order_given(run, called):
    assert run("commands", "--rounds", "7", "step", "commands")[0] == 0
    assert called == [("commands", 7, 1), ("step", 7, 1)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stpe"], "stpe: no such section; did you mean step? (step, activation, commands, sweep)"),
        (["--rounds", "0"], "--rounds=0: must be a whole number, at least 1"),
        (["--rounds", "some"], "argument --rounds: invalid int value: 'some' (lipexp bench --help says more)"),
        (["--rounds"], "argument --rounds: expected one argument (lipexp bench --help says more)"),
        (["--fast"], "unrecognized arguments: --fast (lipexp bench --help says more)"),
    ],
)
def test_bad_options_are_refused_in_one_line(arguments, message, run, called):
    assert run(*arguments) == (2, [], f"lipexp: {message}\n")
    assert called == []


def test_help_names_the_sections(run):
    status, lines, _ = run("--help")
    assert status == 0
    for section in bench.SECTIONS:
        assert any(line.startswith(f"{section} ") for line in lines)


# Measuring ------------------------------------------------------------------------------------------------------


def test_cases_take_turns():
    order: list[str] = []
    cases = [Case(name, lambda name=name: order.append(name)) for name in "abc"]
    take_turns(cases, rounds=2, inner=2, warm_up=1)
    assert "".join(order) == "abc" + "aabbcc" + "bbccaa"
    assert all(len(case.cpu) == len(case.wall) == 2 for case in cases)


def test_a_ratio_is_the_median_of_those_within_a_round():
    reference = Case("torch", lambda: None, cpu=[1.0, 2.0, 3.0], wall=[1.0, 2.0, 3.0])
    other = Case("lipexp [x]", lambda: None, 1.9, cpu=[2.0, 6.0, 3.0], wall=[1e-5, 2e-5, 3e-5])
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table("title", [reference, other], 3))
    last = capture.get().splitlines()[-1]
    assert " ".join(last.split()) == "lipexp [x] 2.00 1.50 to 2.50 ≤ 1.9 missed 3,000 ms 20 µs"


def test_one_round_is_its_own_quartiles():
    assert quartiles([3.0]) == (3.0, 3.0, 3.0)
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)


def test_the_step_that_is_timed_is_the_one_that_training_takes(monkeypatch):
    """bench times Trainer.step; fit must call it for every step and do nothing else between checkpoints."""
    runs = one_run("steps=3", "eval_every=0")
    steps = []
    step = loop.Trainer.step
    monkeypatch.setattr(loop.Trainer, "step", lambda trainer: (steps.append(trainer.steps_done), step(trainer))[1])
    loop.fit(runs, lambda checkpoint: None)
    assert steps == [0, 1, 2]


def test_the_network_that_is_timed_is_the_default_job_but_for_its_width():
    runs = one_run()
    assert runs.model.shapes(2) == [(128, 2), (128, 128), (1, 128)]
    assert (len(runs.data), runs.batch_size, type(runs.loss).__name__) == (1, 256, "Hinge")


def test_the_other_maxmins_are_the_same_map():
    x = torch.randn(2, 7, 10, generator=torch.Generator().manual_seed(0))
    assert torch.equal(MinimumMaximum()(x), GroupSort()(x))
    assert torch.equal(SortedPairs()(x), GroupSort().baked()(x))
