"""The screen of a run and of a sweep: live lines, and the table of its jobs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from test_screen import screen, shown

from lipexp.display import Display, StackDisplay, SweepDisplay, composing, next_command

BAR = "[ ━╸╺]+"
NUMBER = re.compile(r"[\d.:]*\d")


@pytest.mark.parametrize("width", [63, 80, 120])
def test_the_lines_of_a_sweep_are_whole_at_any_width(width):
    console = screen(width)
    display = SweepDisplay(console)
    display.header(12800, 0, [128] * 100, run_bytes=1_200_000, processes=4)
    with display.progress():
        for number in (7, 98, 99):
            stack = StackDisplay(display.update, number)
            with stack.training(100_000):
                stack.checkpoint(0, [{"val_accuracy": value} for value in (0.8613, 0.8642, 0.7001)])
                stack.tick(54_321)
        stack.stage("proving: run 127 of 128")
    lines = shown(console)[2:]  # below the header
    assert max(map(len, lines)) <= width - 3  # ^C may follow
    allowed = {"8", "99", "100", "0", "54321", "100000", "0.8642", "0.8613", "127", "128"}
    assert {number for line in lines for number in NUMBER.findall(line) if ":" not in number} <= allowed
    live = "val accuracy best 0.8642" + ", median 0.8613" * (width > 63)
    for text in (f"stack  99 of 100{BAR}54321/100000  {live}", f"{BAR}54321/100000  proving: run 127 of 128"):
        assert any(re.search(text, line) for line in lines)


def test_the_line_of_a_stack_that_has_ended_is_taken_away():
    console = screen(120)
    display = SweepDisplay(console)
    display.header(5, 0, [3, 2], run_bytes=1_200_000, processes=4)
    with display.progress():
        for number in (0, 1):
            display.update(number, 0, 100, None)
        display.update(0, 100, None, None, True)
        display.died(1)
    assert "5 jobs, 2 stacks (1 × 3 runs, 1 × 2 runs), about 1.2 MB a run, 2 processes" in shown(console)[0]
    assert not any("100/100" in line for line in shown(console))
    assert any("stack 2 of 2, 2 runs: its worker process died" in line for line in shown(console))


def test_what_follows_the_last_step_of_a_run_is_said():
    for stage, said in (
        ("", "loss 0.5  val mse 0.25  max ‖∇f‖ 0.9999"),
        ("proving: exact, 120,000 regions",) * 2,
    ):
        console = screen()
        display = Display(screen=console)
        with display.training(100):
            display.checkpoint(100, [{"train_loss": 0.5, "val_mse": 0.25, "grad_max": 0.99999}])
            if stage:
                display.stage(stage)
        assert any(f"100/100  {said}" in line for line in shown(console))


def test_composing_is_counted_on_a_terminal():
    for terminal in (True, False):
        console = screen(terminal=terminal)
        with composing(3, console) as composed:
            for _ in range(3):
                composed()
        assert any("composing the jobs" in line and "3/3" in line for line in shown(console)) is terminal


def test_the_table_has_the_best_first_and_the_failed_last():
    results = {"lipschitz.measured": 0.50009, "lipschitz.certified": 0.50001, "lipschitz.target": 1.0}
    found = {"status": "ok", "reason": "", "lipschitz.verdict": "PASS", **results}
    rows = [
        {"job": 0, "status": "failed", "reason": "no luck", "seed": "0", "act": "relu"},
        {"job": 1, "seed": "1", "act": "relu", **found, "val.accuracy": 0.7},
        {"job": 2, "status": "missing", "reason": "", "seed": "2", "act": "relu"},
        *({"job": i, "seed": "3", "act": "relu", **found, "val.accuracy": 1 - i / 100} for i in range(3, 60)),
    ]
    console = screen(terminal=False)
    SweepDisplay(console).result(rows, ["seed", "act"], Path("my runs/sweep.csv"), table=True)
    lines = [" ".join(line.split()) for line in console.file.getvalue().splitlines()]
    assert lines[:4] == [
        "measured=0.5 certified=0.5001 verdict=PASS",
        "val",
        "job seed accuracy status",
        "3 3 0.9700 ok",
    ]
    assert lines[43:45] == ["0 0 failed: no luck", "2 2 missing"]
    assert lines[45:] == [
        "42 of 60 jobs",
        "58 ok, 1 failed, 1 missing",
        "my runs/sweep.csv",
        "next: lipexp report 'my runs' --by dataset",
    ]


def test_the_next_command_folds_what_was_swept_over_its_seeds():
    command = next_command(Path("my runs/1"), ["experiment", "act", "seed", "optim.lr"])
    assert shlex.split(command) == ["lipexp", "report", "my runs/1", "--by", "act,optim.lr"]
