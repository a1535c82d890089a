"""Tables as text for a paper."""

from __future__ import annotations

import csv

import pytest

from lipexp.tables import formatted

HEADINGS, NUMBERS = ["name_of", "share %"], [False, True]
ROWS = [["a|b & c", "0.5 ± 0.1"], ["~^\\{}#$", "1"]]


def test_csv_keeps_every_character():
    assert list(csv.reader(formatted("csv", HEADINGS, ROWS, NUMBERS, "left out").splitlines())) == [
        HEADINGS,
        *ROWS,
    ]


def test_markdown_has_its_bars_escaped_and_numbers_on_the_right():
    lines = formatted("markdown", HEADINGS, ROWS, NUMBERS, "all: 1").splitlines()
    assert lines == [
        "all: 1",
        "",
        "| name_of | share % |",
        "| --- | ---: |",
        r"| a\|b & c | 0.5 ± 0.1 |",
        "| ~^\\{}#$ | 1 |",
    ]


@pytest.mark.parametrize("above", ["", "all: 1"])
def test_latex_has_its_special_characters_escaped(above):
    lines = formatted("latex", HEADINGS, ROWS, NUMBERS, above).splitlines()
    assert lines[: bool(above)] == ["% all: 1"][: bool(above)]
    assert lines[bool(above) :] == [
        r"\begin{tabular}{lr}",
        r"\toprule",
        r"name\_of & share \% \\",
        r"\midrule",
        r"a|b \& c & 0.5 $\pm$ 0.1 \\",
        r"\textasciitilde{}\textasciicircum{}\textbackslash{}\{\}\#\$ & 1 \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]
