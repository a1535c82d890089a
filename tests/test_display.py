"""The screen of a sweep: bars, and the table of its jobs."""

from __future__ import annotations

import io
import os

import pytest
from rich.console import Console

from lipexp.display import SweepDisplay, composing, sweep_table


def test_a_terminal_shows_a_bar_for_each_stack_that_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    console = Console(force_terminal=True, width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    display = SweepDisplay(console)
    display.header(5, 0, [3, 2], run_bytes=1_200_000)
    with display.progress():
        for number in (0, 1):
            display.update(number, 0, 100, None)
        display.update(0, 50, None, "test accuracy best 0.9, median 0.8")
        assert display._bars is not None
        assert [task.description for task in display._bars.tasks] == [
            "stack 1 of 2, 3 runs",
            "stack 2 of 2, 2 runs",
        ]
        assert [task.completed for task in display._bars.tasks] == [50, 0]
        display.update(0, 100, None, None, True)
        assert [task.description for task in display._bars.tasks] == ["stack 2 of 2, 2 runs"]
        display.died(1)
        assert not display._bars.tasks
    console.file.close()
    text = console.export_text()
    assert "5 jobs, 2 stacks (1 of 3 runs, 1 of 2 runs), about 1.2 MB a run" in text
    assert "stack 2 of 2, 2 runs: its worker process died" in text


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_shows_how_many_jobs_are_composed(terminal):
    screen = io.StringIO()
    with composing(3, Console(force_terminal=terminal, width=80, file=screen)) as composed:
        composed()
        composed()
    assert ("composing the jobs" in screen.getvalue()) == terminal
    assert ("2/3" in screen.getvalue()) == terminal


def test_the_table_has_the_best_first_and_the_failed_last():
    metrics = {"schema": 1, "lipschitz.measured": 0.5, "lipschitz.certified": None, "lipschitz.verdict": "OPEN"}
    rows = [
        {"job": 0, "status": "failed", "reason": "no luck", "seed": "0"},
        {"job": 1, "status": "ok", "reason": "", "seed": "1", **metrics, "test.accuracy": 0.7},
        {"job": 2, "status": "missing", "reason": "", "seed": "2"},
        *(
            {"job": job, "status": "ok", "reason": "", "seed": "3", **metrics, "test.accuracy": 0.9}
            for job in range(3, 60)
        ),
    ]
    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(sweep_table(rows))
    console.file.close()
    lines = [line.split() for line in console.export_text().splitlines()]
    assert lines[0] == ["job", "seed", "test", "accuracy", "measured", "certified"]
    assert lines[1] == ["3", "3", "0.9", "0.5", "OPEN"]
    assert lines[41] == ["0", "0", "no", "luck"]
    assert lines[42] == ["2", "2", "missing"]
    assert "42 of 60 jobs" in " ".join(lines[43])
