"""How numbers, norms and intervals read on a screen, in a figure and in a message."""

from __future__ import annotations

import os
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lipexp.record import GradientNorm, Interval, Robustness

SUBSCRIPT = {1: "₁", 2: "₂", "inf": "∞"}


def shown_path(path: Path) -> str:
    """A path relative to the current folder, or absolute if it lies outside."""
    shown = os.path.relpath(path)
    return str(path.absolute()) if shown.startswith("..") else shown


def count(number: int, what: str, plural: str = "s") -> str:
    """`1 run`, `2 runs`."""
    return f"{number} {what}{'' if number == 1 else plural}"


def gradient_line(gradient: GradientNorm) -> str:
    """The distribution of the gradient norm over the data, in q, and its maximum in every norm."""
    largest = "  ".join(
        f"‖∇f‖{SUBSCRIPT[key if key == 'inf' else int(key)]} {below(value)}"
        for key, value in gradient.data_max.items()
    )
    return (
        f"over the data: median ‖∇f‖{SUBSCRIPT[gradient.q]} {gradient.median:.4g}, "
        f"5 % to 95 %: {gradient.p05:.4g} to {gradient.p95:.4g}\n"
        f"largest there: {largest}"
    )


def robustness_line(robustness: Robustness) -> str:
    """`certified accuracy within ‖δ‖₂ ≤ 0.1: 0.998  0.25: 0.9965   median radius 0.5122`, or why there is none."""
    if robustness.certified_accuracy is None:
        return f"no certified radii: {robustness.reason}"
    fractions = "  ".join(
        f"{radius}: {fraction:.4g}" for radius, fraction in robustness.certified_accuracy.items()
    )
    within = f"certified accuracy within ‖δ‖{SUBSCRIPT[robustness.p]} ≤ {fractions}   " if fractions else ""
    median = robustness.median_radius
    return f"{within}median radius {'infinite' if median is None else below(median)}"


def interval_line(lipschitz: Interval) -> str:
    """`‖∇f‖₂  measured 0.9942 ≤ exact 0.9943 ≤ product 0.9999972 ≤ L = 1   PASS`, each rounded to its safe side.

    Without an exact constant the certified bound is shown, with its method if that is not the product. `measured`
    is a maximum over the box of the data. Of two exact constants the first is that of the box, the second holds
    everywhere.
    """
    parts = [f"measured {below(lipschitz.measured)}"]
    exact, certified, product = lipschitz.exact, lipschitz.certified, lipschitz.product
    if exact is not None:
        box = lipschitz.exact_box
        if box is not None and above(box["value"], None) != above(exact, None):
            parts.append(f"exact {above(box['value'], None)} (box of the data)")
        parts.append(f"exact {above(exact, lipschitz.target)}")
        if product is not None:
            parts.append(f"product {above(product, lipschitz.target)}")
    elif certified is not None:
        by = "" if lipschitz.method == "product" else f" ({lipschitz.method})"
        parts.append(f"certified {above(certified, lipschitz.target)}{by}")
    if lipschitz.target is not None:
        parts.append(f"L = {lipschitz.target:g}")
    line = f"‖∇f‖{SUBSCRIPT[lipschitz.q]}  {' ≤ '.join(parts)}   {lipschitz.verdict}"
    if lipschitz.certified is None:
        line += f" ({lipschitz.reason})"
    return line if lipschitz.open is None else f"{line} (not exact: {lipschitz.open})"


def broken_bound(lipschitz: Interval) -> str:
    """What a verdict FAIL means."""
    if lipschitz.measured_by == "exact arithmetic":
        return f"{interval_line(lipschitz)}: a bound is broken, a bug in lipexp; please report it with this folder"
    return f"{interval_line(lipschitz)}: the activation is not 1-Lipschitz in the norm that it declares"


def below(value: float, digits: int = 4) -> str:
    """`value` rounded down to `digits` significant digits."""
    return _decimal(value, digits, ROUND_FLOOR)


def above(value: float, limit: float | None, digits: int = 4) -> str:
    """`value` rounded up to at least `digits` significant digits, and to more until it shows itself <= `limit`."""
    if limit is not None and value <= limit:
        while digits < 17 and Decimal(_decimal(value, digits, ROUND_CEILING)) >= Decimal(limit) > Decimal(value):
            digits += 1
    return _decimal(value, digits, ROUND_CEILING)


def _decimal(value: float, digits: int, rounding: str) -> str:
    shown = Context(prec=digits, rounding=rounding).create_decimal(Decimal(value)).normalize()
    plain = value == 0 or 1e-4 <= abs(value) < 1e6
    return f"{shown:f}" if plain else f"{shown:E}".lower()
