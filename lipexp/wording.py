"""How numbers, norms and intervals read on a screen, in a figure and in a message."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lipexp.record import GradientNorm, Interval, LocalInterval, Monotone, Robustness

SUBSCRIPT = {1: "₁", 2: "₂", "inf": "∞"}
Link = tuple[str, float, str, str]  # of a chain: what stands before the number, the number, its text, and after it


def shown_path(path: Path) -> str:
    """A path relative to the current folder, or absolute if it lies outside."""
    shown = os.path.relpath(path)
    return str(path.absolute()) if shown.startswith("..") else shown


def dataset_name(option: str, path: str | None) -> str:
    """What a dataset is called: the option, or the name of the file that it reads."""
    return Path(path).name if path else option


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
        f"over the data: median ‖∇f‖{SUBSCRIPT[gradient.q]} {below(gradient.median)}, "
        f"5 % to 95 %: {below(gradient.p05)} to {below(gradient.p95)}\n"
        f"largest there: {largest}"
    )


def robustness_line(robustness: Robustness) -> str:
    """`certified accuracy within ‖δ‖₂ ≤ 0.1: 0.998  0.25: 0.9965   median radius 0.5122`, or why there is none.

    It is about the test points. For several outputs it ends with `(pairs of outputs: 0.31 to 1.02, radii 14 %
    larger)`: the range of the constants that margins are divided by, and the median of what radii gain by them
    over the bound of the whole network. A second line says the same of radii by local constants, if they differ:
    `by local constants  0.1: 1  0.25: 0.9985   median radius 0.7468`; and where the exact distances are known
    `(0.974 of the exact distance, without them 0.905)`, the medians of such radii over them.
    """
    found = robustness.test
    if found.certified_accuracy is None:
        return f"no certified radii: {robustness.reason}"
    start, pairs = f"certified accuracy within ‖δ‖{SUBSCRIPT[robustness.p]} ≤ ", robustness.pairs
    line = _certified(start, found.certified_accuracy, found.median_radius)
    if pairs is not None:
        gain = pairs.median_gain
        larger = "" if gain is None or gain < 1.001 else f", radii {below(100 * (gain - 1), digits=2)} % larger"
        line += f" (pairs of outputs: {above(pairs.smallest, None)} to {above(pairs.largest, None)}{larger})"
    line = line if robustness.reason is None else f"{line} (none in float32: {robustness.reason})"
    local, exact = found.local_accuracy, robustness.exact
    differ = (local, found.median_local_radius) != (found.certified_accuracy, found.median_radius)
    if local is None or not (differ or exact):
        return line
    near = _certified("by local constants  ", local, found.median_local_radius)
    if exact is not None:
        ratios = below(exact.local, digits=3), below(exact.radius, digits=3)
        near += f" ({ratios[0]} of the exact distance, without them {ratios[1]})"
    return f"{line}\n{near}"


def _certified(start: str, accuracy: Mapping[str, float], median: float | None) -> str:
    fractions = "  ".join(f"{radius}: {fraction:.4g}" for radius, fraction in accuracy.items())
    within = f"{start}{fractions}   " if fractions else ""
    return f"{within}median radius {'infinite' if median is None else below(median)}"


def columns_line(columns: Mapping[str, Mapping[str, float]], most: int = 6) -> str:
    """What bounds mean for the columns of a table: `one column alone may change by this …: age 4.1  weight 12.2`.

    For a regression `cost changes by at most: 0.31 per age  1.2 per weight`, a line for each target.
    """
    names = dict.fromkeys(name for row in columns.values() for name in row)
    rest = f"  and {len(columns) - most} more" if len(columns) > most else ""
    lines = []
    for name in names:
        shown = [(column, row[name]) for column, row in columns.items() if name in row][:most]
        if name == "reach":
            text = "  ".join(f"{column} {below(value)}" for column, value in shown)
            lines.append(f"one column alone may change by this before the prediction can (median): {text}{rest}")
        else:
            text = "  ".join(f"{above(value, None)} per {column}" for column, value in shown)
            lines.append(f"{name} changes by at most: {text}{rest}")
    return "\n".join(lines)


def monotone_line(monotone: Monotone) -> str:
    """`monotone: f rises with age: proven; the flattest slope seen is 0.002`, and what an attack found."""
    words = {1: "rises", -1: "falls"}
    features = ", ".join(f"{words[sign]} with {name}" for name, sign in monotone.features.items())
    line = f"monotone: f {features}: {'proven' if monotone.proven else 'NOT proven'}"
    line += f"; the flattest slope seen is {below(monotone.smallest)}"
    return line if monotone.violations is None else f"{line}; {count(monotone.violations, 'violation')} found"


def interval_line(lipschitz: Interval) -> str:
    """`‖∇f‖₂  measured 0.9942 ≤ exact 0.9943 ≤ product 0.9999972 ≤ L = 1   PASS`, each rounded to its safe side.

    Without an exact constant the certified bound is shown, with its method if that is not the product. `measured`
    is a maximum over the box of the data. Of two exact constants the first is that of the box, the second holds
    everywhere. Where a number is larger than the next one, as after a FAIL, all are shown with all their digits.
    Without L the line says that its bound is one of this network alone.
    """
    exact, certified, target = lipschitz.exact, lipschitz.certified, lipschitz.target
    measured = lipschitz.measured
    links: list[Link] = [("measured ", measured, below(measured), "")]

    def add(name: str, value: float, after: str = "") -> None:
        links.append((name, value, above(value, target), after))

    if exact is not None:
        box = lipschitz.exact_box
        if box is not None and above(box["value"], None) != above(exact, None):
            add("exact ", box["value"], " (box of the data)")
        add("exact ", exact)
        if lipschitz.whole is not None:
            add("multipliers ", lipschitz.whole)
        elif lipschitz.product is not None:
            add("product ", lipschitz.product)
    elif certified is not None:
        add("certified ", certified, "" if lipschitz.method == "product" else f" ({lipschitz.method})")
    if target is not None:
        links.append(("L = ", target, _exactly(target), ""))
    line = f"‖∇f‖{SUBSCRIPT[lipschitz.q]}  {_chain(links)}   {lipschitz.verdict}"
    if certified is None:
        line += f" ({lipschitz.reason})"
    elif target is None:
        line += " (no L was set in this norm: this one is proven of this network alone)"
    return line if lipschitz.open is None else f"{line} (not exact: {lipschitz.open})"


def local_line(local: LocalInterval) -> str:
    """`‖x - (0.1, 0.2)‖₂ ≤ 0.5: ‖∇f‖₂  measured 0.81 ≤ certified 0.83 (bnb, in this ball only)`."""
    centre = ", ".join(f"{value:g}" for value in local.around)
    links: list[Link] = [
        ("measured ", local.measured, below(local.measured), ""),
        ("certified ", local.certified, above(local.certified, None), ""),
    ]
    ball = f"‖x - ({centre})‖{SUBSCRIPT[local.p]} ≤ {local.within:g}"
    return f"{ball}: ‖∇f‖{SUBSCRIPT[local.q]}  {_chain(links)} (bnb, in this ball only)"


def _chain(links: Sequence[Link]) -> str:
    """Links joined by ≤, or by > where that is what holds."""
    signs = [" ≤ " if left[1] <= right[1] else " > " for left, right in pairwise(links)]
    broken = " > " in signs
    texts = [before + (_exactly(value) if broken else shown) + after for before, value, shown, after in links]
    return texts[0] + "".join(sign + text for sign, text in zip(signs, texts[1:], strict=True))


def broken_bound(lipschitz: Interval) -> str:
    """What a verdict FAIL means."""
    if lipschitz.measured_by != "float64 estimate":
        return f"{interval_line(lipschitz)}: a bound is broken, a bug in lipexp; please report it with this folder"
    return f"{interval_line(lipschitz)}: the activation is not 1-Lipschitz in the norm that it declares"


def below(value: float, digits: int = 4) -> str:
    """`value` rounded down to `digits` significant digits."""
    return _decimal(Decimal(value), digits, ROUND_FLOOR)


def above(value: float, limit: float | None, digits: int = 4) -> str:
    """`value` rounded up to at least `digits` significant digits, and to more until it shows itself <= `limit`."""
    if value == limit:
        return _exactly(value)
    if limit is not None and value < limit:
        while digits < 17 and Decimal(_decimal(Decimal(value), digits, ROUND_CEILING)) >= Decimal(limit):
            digits += 1
    return _decimal(Decimal(value), digits, ROUND_CEILING)


def _decimal(value: Decimal, digits: int, rounding: str) -> str:
    shown = Context(prec=digits, rounding=rounding).create_decimal(value).normalize()
    plain = value == 0 or Decimal("1e-4") <= abs(value) < Decimal("1e6")
    return f"{shown:f}" if plain else f"{shown:E}".lower()


def _exactly(value: float) -> str:
    """The shortest decimal number that stands for this float64."""
    return _decimal(Decimal(repr(value)), 17, ROUND_CEILING)
