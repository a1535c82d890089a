"""The numbers on the screen never say more than was proven."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lipexp.record import Interval
from lipexp.wording import above, below, broken_bound, interval_line

POSITIVE = st.floats(1e-30, 1e30, allow_nan=False)


@given(POSITIVE, st.floats(1e-15, 0.5))
def test_lower_bounds_are_shown_rounded_down_and_upper_bounds_up_but_below_their_limit(value, gap):
    assert Decimal(below(value)) <= Decimal(value) <= Decimal(above(value, None))
    assert Decimal(below(value)) == pytest.approx(Decimal(value), rel=Decimal("2e-3"))
    assert Decimal(above(value, None)) == pytest.approx(Decimal(value), rel=Decimal("2e-3"))
    assert Decimal(value * (1 - gap)) <= Decimal(above(value * (1 - gap), value)) <= Decimal(value)


def test_how_numbers_look():
    shown = {1.0: ("1", "1"), 0.99999: ("0.9999", "1"), 3e-7: ("2.999e-7", "3e-7"), 0.0: ("0", "0")}
    assert {value: (below(value), above(value, None)) for value in shown} == shown


BOUNDS = Interval(
    **{"p": 2, "q": 2, "target": 1.0, "measured": 0.99427, "measured_by": "exact arithmetic", "regions": None},
    **{"certified": 0.99999714, "product": 0.99999714, "method": "product", "reason": None, "verdict": "PASS"},
    **dict.fromkeys(("exact", "exact_box", "open")),
)
FREE = replace(BOUNDS, target=None, certified=178.41, measured=49.8)


def test_the_interval_line():
    assert interval_line(BOUNDS) == "‖∇f‖₂  measured 0.9942 ≤ certified 0.999998 ≤ L = 1   PASS"
    known = replace(BOUNDS, exact=0.9943, certified=0.9943, method="exact", q="inf")
    line = "‖∇f‖∞  measured 0.9942 ≤ {}exact 0.9943 ≤ product 0.999998 ≤ L = 1   PASS"
    smaller = "exact 0.9942 (box of the data) ≤ "
    for value, shown in ((0.9943, ""), (0.99428, ""), (0.9942, smaller)):
        assert interval_line(replace(known, exact_box={"value": value})) == line.format(shown)


def test_the_interval_line_without_a_constraint():
    unproven = {"certified": None, "verdict": "OPEN", "reason": "no bound is declared"}
    for values, expected in (
        ({}, " ≤ certified 178.5   PASS"),
        ({"certified": 86.25, "method": "lipsdp"}, " ≤ certified 86.25 (lipsdp)   PASS"),
        ({"open": "more than 9 regions"}, " ≤ certified 178.5   PASS (not exact: more than 9 regions)"),
        (unproven, "   OPEN (no bound is declared)"),
    ):
        assert interval_line(replace(FREE, **values)) == f"‖∇f‖₂  measured 49.79{expected}"


def test_a_broken_bound_is_a_bug_only_where_it_was_measured_exactly():
    assert "a bug in lipexp" in broken_bound(BOUNDS)
    estimate = replace(BOUNDS, measured_by="float64 estimate")
    assert broken_bound(estimate).endswith("the activation is not 1-Lipschitz in the norm that it declares")
