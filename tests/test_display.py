"""The numbers on the screen never say more than was proven."""

from __future__ import annotations

import io
import os
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from lipexp.display import SweepDisplay, above, below, composing, interval_line, sweep_table

POSITIVE = st.floats(1e-30, 1e30, allow_nan=False)


@given(POSITIVE)
def test_lower_bounds_are_shown_rounded_down_and_upper_bounds_up(value):
    assert Decimal(below(value)) <= Decimal(value) <= Decimal(above(value, None))
    assert Decimal(below(value)) == pytest.approx(Decimal(value), rel=Decimal("2e-3"))
    assert Decimal(above(value, None)) == pytest.approx(Decimal(value), rel=Decimal("2e-3"))


@given(POSITIVE, st.floats(1e-15, 0.5))
def test_an_upper_bound_below_its_limit_is_shown_below_it(limit, gap):
    value = limit * (1 - gap)
    assert Decimal(value) <= Decimal(above(value, limit)) <= Decimal(limit)


@pytest.mark.parametrize(
    ("value", "down", "up"),
    [
        (1.0, "1", "1"),
        (0.99999, "0.9999", "1"),
        (123.456, "123.4", "123.5"),
        (3e-7, "2.999e-7", "3e-7"),
        (0.0, "0", "0"),
    ],
)
def test_how_numbers_look(value, down, up):
    assert (below(value), above(value, None)) == (down, up)


BOUNDS = {
    "q": 2,
    "target": 1.0,
    "measured": 0.99427,
    "certified": 0.99999714,
    "product": 0.99999714,
    "method": "product",
    "exact": None,
    "exact_box": None,
    "open": None,
    "verdict": "PASS",
}


def test_the_interval_line():
    assert interval_line(BOUNDS) == "‖∇f‖₂  measured 0.9942 ≤ certified 0.999998 ≤ L = 1   PASS"
    known = {**BOUNDS, "exact": 0.9943, "certified": 0.9943, "method": "exact", "q": "inf"}
    line = "‖∇f‖∞  measured 0.9942 ≤ {}exact 0.9943 ≤ product 0.999998 ≤ L = 1   PASS"
    assert interval_line({**known, "exact_box": {"value": 0.9943}}) == line.format("")
    assert interval_line({**known, "exact_box": {"value": 0.99428}}) == line.format("")
    smaller = line.format("exact 0.9942 (box of the data) ≤ ")
    assert interval_line({**known, "exact_box": {"value": 0.9942}}) == smaller
    free = {**BOUNDS, "target": None, "certified": 178.41, "measured": 49.8}
    assert interval_line(free) == "‖∇f‖₂  measured 49.79 ≤ certified 178.5   PASS"
    better = {**free, "certified": 86.25, "method": "lipsdp"}
    assert interval_line(better) == "‖∇f‖₂  measured 49.79 ≤ certified 86.25 (lipsdp)   PASS"
    capped = {**free, "open": "more than 9 linear regions"}
    assert interval_line(capped).endswith("certified 178.5   PASS (not exact: more than 9 linear regions)")
    unproven = {**free, "certified": None, "verdict": "OPEN", "method": "the activation declares no bound"}
    assert interval_line(unproven) == "‖∇f‖₂  measured 49.79   OPEN (the activation declares no bound)"


# Sweeps ---------------------------------------------------------------------------------------------------------


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
    console.file.close()
    assert "5 jobs, 2 stacks (1 of 3 runs, 1 of 2 runs), about 1.2 MB a run" in console.export_text()


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
