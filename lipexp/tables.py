"""A table as text that can be pasted into a paper: Markdown, LaTeX or CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

FORMATS = ("markdown", "latex", "csv")
LATEX = {
    "\\": r"\textbackslash{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "≤": r"$\le$",
    "∞": r"$\infty$",
    "‖": r"$\|$",
    "∇": r"$\nabla$",
}


def formatted(
    form: str, headings: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[bool], above: str = ""
) -> str:
    """A table in one of `FORMATS`, without a newline at its end.

    Args:
        numbers: whether each column holds numbers, which stand on the right.
        above: what is said before the table, where the format has a place for that.
    """
    if form == "csv":
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows([headings, *rows])
        return out.getvalue().rstrip("\n")
    if form == "markdown":
        ends = ["---:" if is_number else "---" for is_number in numbers]
        lines = [[cell.replace("|", r"\|") for cell in row] for row in (headings, *rows)]
        text = [f"| {' | '.join(row)} |" for row in (lines[0], ends, *lines[1:])]
        return "\n".join([above, "", *text] if above else text)
    lines = [
        ["".join(LATEX.get(character, character) for character in cell) for cell in row]
        for row in (headings, *rows)
    ]
    head, *body = (" & ".join(row) + r" \\" for row in lines)
    columns = "".join("r" if is_number else "l" for is_number in numbers)
    text = [
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        head,
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "\n".join([f"% {above}", *text] if above else text)


def pasted(form: str, table: Table, above: str = "") -> str:
    """A table of the screen as text in one of `FORMATS`."""
    columns = [[str(cell) for cell in column.cells] for column in table.columns]
    headings = [str(column.header).replace("-\n", "").replace("\n", " ") for column in table.columns]
    numbers = [column.justify == "right" for column in table.columns]
    return formatted(form, headings, list(zip(*columns, strict=True)), numbers, above)
