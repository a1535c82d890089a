"""The numbers on the screen never say more than was proven."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lipexp.wording import above, below, interval_line

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
