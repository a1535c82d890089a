"""The screen of a sweep: bars, and the table of its jobs."""

from __future__ import annotations

import io

from rich.console import Console

from lipexp.display import SweepDisplay, sweep_table


def screen(**options: object) -> Console:
    return Console(record=True, file=io.StringIO(), width=120, **options)


def test_a_terminal_shows_a_bar_for_each_stack_that_trains():
    console = screen(force_terminal=True)
    display = SweepDisplay(console)
    display.header(5, 0, [3, 2], run_bytes=1_200_000, processes=4)

    with display.progress():
        for number in (0, 1):
            display.update(number, 0, 100, None)
        display.update(0, 50, None, "test accuracy best 0.9, median 0.8")
        display.update(0, 100, None, None, True)
        display.died(1)
    shown, text = console.file.getvalue(), console.export_text()
    assert "stack 1 of 2, 3 runs" in shown
    assert "100/100" not in shown  # the bar of a stack that has ended is taken away
    assert "5 jobs, 2 stacks (1 of 3 runs, 1 of 2 runs), about 1.2 MB a run, 2 processes" in text
    assert "stack 2 of 2, 2 runs: its worker process died" in text


def test_the_table_has_the_best_first_and_the_failed_last():
    results = {"lipschitz.measured": 0.5, "lipschitz.certified": None, "lipschitz.verdict": "OPEN"}
    found = {"status": "ok", "reason": "", **results}
    rows = [
        {"job": 0, "status": "failed", "reason": "no luck", "seed": "0"},
        {"job": 1, "seed": "1", **found, "test.accuracy": 0.7},
        {"job": 2, "status": "missing", "reason": "", "seed": "2"},
        *({"job": job, "seed": "3", **found, "test.accuracy": 0.9} for job in range(3, 60)),
    ]
    console = screen()
    console.print(sweep_table(rows, ["seed", "act"]))  # act is the same in all: no column
    lines = [" ".join(line.split()) for line in console.export_text().splitlines()]
    assert lines[:2] == ["job seed test accuracy measured certified", "3 3 0.9 0.5 OPEN"]
    assert lines[41:44] == ["0 0 no luck", "2 2 missing", "42 of 60 jobs"]
