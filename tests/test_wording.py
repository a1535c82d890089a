"""The numbers on the screen never say more than was proven."""

from __future__ import annotations

import re
from dataclasses import replace
from decimal import Decimal
from itertools import accumulate, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lipexp.record import Certified, Interval, Pairs, Robustness, Tightness
from lipexp.wording import above, below, broken_bound, interval_line, robustness_line

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
    **dict.fromkeys(("exact", "exact_box", "open", "whole")),
)
FREE = replace(BOUNDS, target=None, certified=178.41, measured=49.8)


def test_the_interval_line_of_a_network_that_is_proven_as_a_whole():
    whole = replace(BOUNDS, certified=1.0, product=5.8, whole=1.0, method="multipliers")
    assert interval_line(whole) == "‖∇f‖₂  measured 0.9942 ≤ certified 1 (multipliers) ≤ L = 1   PASS"
    whole = replace(whole, certified=0.9951, exact=0.9951, method="exact")
    assert interval_line(whole) == "‖∇f‖₂  measured 0.9942 ≤ exact 0.9951 ≤ multipliers 1 ≤ L = 1   PASS"


def test_the_interval_line():
    assert interval_line(BOUNDS) == "‖∇f‖₂  measured 0.9942 ≤ certified 0.999998 ≤ L = 1   PASS"
    known = replace(BOUNDS, exact=0.9953, certified=0.9953, method="exact", q="inf")
    line = "‖∇f‖∞  measured 0.9942 ≤ {}exact 0.9953 ≤ product 0.999998 ≤ L = 1   PASS"
    smaller = "exact 0.9943 (box of the data) ≤ "
    for value, shown in ((0.9953, ""), (0.99528, ""), (0.99428, smaller)):
        assert interval_line(replace(known, exact_box={"value": value})) == line.format(shown)


@pytest.mark.parametrize(
    ("pairs", "shown"),
    [
        (None, ""),
        (
            Pairs(1.22868, 1.34317, 1.13799),
            " (pairs of outputs: 1.229 to 1.344, radii 13 % larger)",
        ),
        (Pairs(1.22868, 1.34317, None), " (pairs of outputs: 1.229 to 1.344)"),
    ],
)
def test_the_line_of_radii_says_what_pairs_of_outputs_gain(pairs, shown):
    found = Certified({"0.1": 0.98, "0.25": 0.951234}, 0.51239)
    line = "certified accuracy within ‖δ‖₂ ≤ 0.1: 0.98  0.25: 0.9512   median radius 0.5123"
    assert robustness_line(Robustness(2, 1.0, found, found, None, pairs)) == line + shown


def test_a_second_line_says_what_local_constants_prove_and_how_close_that_comes():
    plain, near = (
        Certified({"0.1": 0.98}, 0.5, {"0.1": 0.98}, 0.5),
        Certified({"0.1": 0.98}, 0.5, {"0.1": 0.99}, 0.625),
    )
    first = "certified accuracy within ‖δ‖₂ ≤ 0.1: 0.98   median radius 0.5"
    exact = Tightness(0.61239, 0.90567, 0.97399)
    assert robustness_line(Robustness(2, 1.0, plain, plain, None)) == first
    second = "by local constants  0.1: 0.99   median radius 0.625"
    assert robustness_line(Robustness(2, 1.0, near, near, None)) == f"{first}\n{second}"
    close = " (0.973 of the exact distance, without them 0.905)"
    assert robustness_line(Robustness(2, 1.0, near, near, None, exact=exact)) == f"{first}\n{second}{close}"
    assert robustness_line(Robustness(2, 1.0, near, plain, None, exact=exact)).endswith(close)


def numbers(line):
    """The signs of a chain, and the numbers around them as they are shown."""
    chain = line.removeprefix("‖∇f‖₂  ").partition("   ")[0]
    words = re.split(" [≤>] ", chain.replace(" (box of the data)", "").replace("L = ", "L "))
    return re.findall("[≤>]", chain), [Decimal(word.split()[1]) for word in words]


@given(st.lists(POSITIVE, min_size=5, max_size=5), st.lists(st.sampled_from([0, 1e-16, 1e-9, 1e-5]), min_size=4))
def test_a_chain_is_true_as_it_is_shown(values, gaps):
    """Whatever the numbers, in order or not, far apart or next to each other."""
    near = [*accumulate([values[0], *gaps[:4]], lambda value, gap: value * (1 + gap))]
    for measured, box, exact, product, target in (values, sorted(values), near, near[::-1]):
        known = replace(BOUNDS, measured=measured, exact=exact, certified=exact, product=product, target=target)
        without = numbers(interval_line(known))
        assert without[0] == ["≤" if a <= b else ">" for a, b in pairwise((measured, exact, product, target))]
        for signs, shown in (without, numbers(interval_line(replace(known, exact_box={"value": box})))):
            for sign, (left, right) in zip(signs, pairwise(shown), strict=True):
                assert left <= right if sign == "≤" else left > right


def test_a_number_that_equals_its_limit_is_shown_as_the_limit_is():
    for limit in (0.123456, 1.23456789, 1e-7, 0.1):
        line = interval_line(replace(BOUNDS, measured=limit / 2, certified=limit, target=limit))
        assert f" ≤ certified {limit!r} ≤ L = {limit!r} ".replace("e-07", "e-7") in line
    broken = replace(BOUNDS, measured=1.00000001, certified=1.0, verdict="FAIL")
    assert interval_line(broken) == "‖∇f‖₂  measured 1.00000001 > certified 1 ≤ L = 1   FAIL"


def test_the_interval_line_of_a_network_that_is_proven_as_a_whole_shows_that_and_no_product():
    found = replace(BOUNDS, certified=1.0, product=4.7, whole=1.0, method="multipliers")
    assert interval_line(found) == "‖∇f‖₂  measured 0.9942 ≤ certified 1 (multipliers) ≤ L = 1   PASS"
    line = "‖∇f‖₂  measured 0.9942 ≤ exact 0.9953 ≤ multipliers 1 ≤ L = 1   PASS"
    assert interval_line(replace(found, exact=0.9952718, certified=0.9952718, method="exact")) == line


def test_the_interval_line_without_a_constraint():
    unproven = {"certified": None, "verdict": "OPEN", "reason": "no bound is declared"}
    alone = " (no L was set in this norm: this one is proven of this network alone)"
    for values, expected in (
        ({}, f" ≤ certified 178.5   PASS{alone}"),
        ({"certified": 86.25, "method": "lipsdp"}, f" ≤ certified 86.25 (lipsdp)   PASS{alone}"),
        ({"open": "more than 9 regions"}, f" ≤ certified 178.5   PASS{alone} (not exact: more than 9 regions)"),
        (unproven, "   OPEN (no bound is declared)"),
    ):
        assert interval_line(replace(FREE, **values)) == f"‖∇f‖₂  measured 49.79{expected}"


def test_a_broken_bound_is_a_bug_only_where_it_was_measured_exactly():
    assert "a bug in lipexp" in broken_bound(BOUNDS)
    estimate = replace(BOUNDS, measured_by="float64 estimate")
    assert broken_bound(estimate).endswith("the activation is not 1-Lipschitz in the norm that it declares")
