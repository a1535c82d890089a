"""The screen: what is printed stays whole at 80 columns, and never ends a run."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import sys
from pathlib import Path

import pytest
from commands import INLINE, TINY
from rich.table import Table

from lipexp.process import LEGIBLE
from lipexp.screen import Screen

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def screen(width: int = 80, terminal: bool = True) -> Screen:
    return Screen(file=io.StringIO(), width=width, force_terminal=terminal)


def shown(screen: Screen) -> list[str]:
    """Every line that was on the screen at some time."""
    return [line for line in re.split(r"[\r\n]+", ESCAPE.sub("", screen.file.getvalue())) if line.strip()]


BOUNDS = "bounds: product 265.3  rows 492.1  exact - (is for one or two inputs)  eclipse 211.6  lipsdp 158.9"
CHAIN = "‖∇f‖₂  measured 0.8212 ≤ exact 0.8213 (box of the data) ≤ exact 0.8224 ≤ product 0.999998 ≤ L = 1   PASS"
PATH = f"{'a long/path with-hyphens/' * 5}end"


@pytest.mark.parametrize(
    "line", [BOUNDS, CHAIN, "x" * 200, "many plain words of a reason " * 9, PATH, "", "a\n\nb"]
)
def test_a_terminal_breaks_lines_between_words_and_other_outputs_not_at_all(line):
    for width, terminal in itertools.product((20, 80), (True, False)):
        console = screen(width, terminal)
        console.show(line)
        printed = console.file.getvalue()
        assert printed.split() == line.split()
        if terminal:
            assert all(len(part) <= width or " " not in part.strip() for part in printed.splitlines())
        else:
            assert printed == f"{line}\n"


def test_a_line_is_broken_between_its_parts_if_they_fit():
    console = screen()
    console.show(CHAIN)
    assert console.file.getvalue().splitlines()[1] == "  ≤ product 0.999998 ≤ L = 1   PASS"


@pytest.fixture
def table() -> Table:
    table = Table(show_edge=False, box=None, pad_edge=False)
    table.add_column("run")
    for name in "abcdefgh":
        table.add_column(f"{name}\nheading", justify="right", no_wrap=True)
    table.add_column("status")
    for run in range(3):
        table.add_row(
            f"r{run}", *(f"0.{run}{i}34567 ± 0.1{i}" for i in range(8)), "failed: one of many reasons " * 4
        )
    return table


def test_a_terminal_breaks_tables_between_columns_and_other_outputs_not_at_all(table):
    numbers = {f"0.{run}{i}34567 ± 0.1{i}" for run in range(3) for i in range(8)}
    for width in (30, 80):
        console = screen(width)
        console.show(table)
        printed = "\n".join(shown(console))
        assert all(printed.count(number) == 1 for number in numbers)
        assert max(map(len, shown(console))) <= width
        assert printed.count("failed:") == printed.count("reasons") == 12
    console = screen(terminal=False)
    console.show(table)
    *_, last = console.file.getvalue().splitlines()
    assert last.split() == [str(cell) for column in table.columns for cell in list(column.cells)[-1].split()]


def test_brackets_are_no_markup_and_control_characters_are_shown(table):
    table.add_row("[/b] [red]", *["[link=x]"] * 8, ":smile:")
    for terminal in (True, False):
        console = screen(200, terminal)
        console.show("[/b] [red] :smile: \x1b[2J\x07", table)
        assert "[/b] [red] :smile: \\x1b[2J\\x07" in console.file.getvalue()
        assert console.file.getvalue().count("[link=x]") == 8


def test_what_is_waited_for_is_seen_on_a_terminal_and_gone_at_the_end():
    console = screen()
    with console.waiting("run 1 of 2") as report:
        report("run 2 of 2: proving")
    assert any("run 2 of 2: proving 0:00:00" in line for line in shown(console))
    assert console.file.getvalue().endswith("\x1b[2K")  # the line is erased
    console = screen(terminal=False)
    with console.waiting("run 1 of 2") as report:
        report("run 2 of 2")
    assert console.file.getvalue() == ""


def test_no_command_prints_more_than_80_columns_on_a_terminal(lipexp, monkeypatch):
    for key, value in {"TTY_COMPATIBLE": "1", "COLUMNS": "80", "TERM": "xterm"}.items():
        monkeypatch.setenv(key, value)
    swept = ("act=relu,groupsort", "optim.lr=0.012345678901,0.1", "seed=0,1")
    for command in (
        ("train", "-m", *TINY, INLINE, "hydra.sweep.dir=s", *swept),
        ("train", *TINY, "hydra.run.dir=one", "max_regions=9999"),
        ("certify", "s/0", "one", "--attack"),
        ("report", "s", "one"),
        ("figures", "groupsort"),
    ):
        done = lipexp(*command)
        assert (done.code, done.err) == (0, "")
        lines = re.split(r"[\r\n]+", ESCAPE.sub("", done.out))
        assert max(map(len, lines)) <= 80, max(lines, key=len)
        assert len(lines) > 5


# Outputs that cannot be written ----------------------------------------------------------------------------------


def test_what_an_output_cannot_encode_is_spelled_out():
    assert (
        "‖∇f‖₂ ≤ 1, ‖∇f‖∞, 2 ± 1 語".encode("ascii", LEGIBLE) == rb"|grad f|_2 <= 1, |grad f|_inf, 2 +- 1 \u8a9e"
    )
    assert "± ∇".encode("latin-1", LEGIBLE) == b"\xb1 grad "


def test_a_run_is_shown_in_ascii(lipexp, monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    assert lipexp("train", *TINY, 'hydra.run.dir="out[/b]"').code == 0
    text = out.buffer.getvalue().decode()
    assert "|grad f|_2  measured" in text
    assert text.endswith("\nout[/b]/\n")


def closed_pipe() -> io.TextIOWrapper:
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


def full_disk() -> io.TextIOWrapper:
    return Path("/dev/full").open("w")


BROKEN = {
    "a closed pipe": (closed_pipe, ""),
    "a full disk": (full_disk, "No space left on device"),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_an_output_that_cannot_be_written_silences_training_and_ends_a_report(lipexp, monkeypatch, broken):
    output, complaint = BROKEN[broken]

    def call(*arguments: str) -> tuple[int, str]:
        with monkeypatch.context() as patch, output() as stream:
            patch.setattr(sys, "stdout", stream)
            done = lipexp(*arguments)
        return done.code, done.err

    assert call("train", *TINY, "hydra.run.dir=run") == (0, "")
    assert call("train", "-m", *TINY, INLINE, "seed=0,1", "hydra.sweep.dir=sweep") == (0, "")
    assert call("certify", "run") == (0, "")
    found = [json.loads(Path(run, "metrics.json").read_text()) for run in ("run", "sweep/0", "sweep/1")]
    assert [run["certify"] is None for run in found] == [False, True, True]
    assert Path("run/figure.png").is_file()
    code, err = call("report", ".")
    assert (code, complaint in err, err.count("\n")) == (1, True, bool(complaint))
