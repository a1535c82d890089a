"""The screen that every verb prints on: lines and tables that never break inside a number, and what is waited for.

Nothing that is shown can end a run: a screen that cannot be written any more falls silent. (A character that the
output cannot encode is spelled out; see process.py.) What is printed is text, in which brackets have no meaning.
"""

from __future__ import annotations

import copy
import importlib.util
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any

from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.progress import Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from lipexp.process import LEGIBLE, silence

# What a screen shows: "everything"; "progress", which is what changes while something is done; or "nothing".
SHOWN: ContextVar[str] = ContextVar("SHOWN", default="everything")
PLAIN: Any = {"markup": False, "emoji": False, "highlight": False}
ANY_WIDTH = 100_000
GAP = 2  # characters between two columns
WORD, TEXT = 12, 36  # the least width of a column of text, and the one that it is given beside others
LEAST_BAR, LARGEST_BAR = 6, 30
PIECES = re.compile(r"(?<=, )|(?<=  )")  # between the parts of what is said beside a bar
INNER_SPACE = re.compile(r"(?<=[^\s,;]) (?=[^\s≤<(])")  # a space within a part of a line
# Characters that move the cursor or change the terminal; a line break stays one.
CONTROL = {code: f"\\x{code:02x}" for code in (*range(10), *range(11, 32), *range(127, 160))}


class Wide(Table):
    """A table whose first columns name its rows: where it is broken, each part has them."""

    repeated = 1


class Screen(Console):
    """Standard output, or standard error with `stderr`."""

    def __init__(self, **options: Any) -> None:
        stream = sys.stderr if options.get("stderr") else sys.stdout
        if stream is not None:
            options.setdefault("file", _Forgiving(stream))
        super().__init__(**PLAIN, **options)
        self.shown = SHOWN.get()

    @property
    def is_live(self) -> bool:
        """Whether it shows lines that change: on a terminal, and in a notebook that has rich's widgets."""
        notebook = self.is_jupyter and importlib.util.find_spec("ipywidgets") is not None
        return self.shown != "nothing" and (self.is_terminal or notebook)

    def show(self, *parts: str | Table, bold: str = "") -> None:
        """Print text and tables; `bold` precedes the first text."""
        if self.shown == "everything":
            self._print(*parts, bold=bold)

    def tell(self, line: str) -> None:
        """Print a line about the progress of something."""
        if self.shown != "nothing":
            self._print(line)

    def _print(self, *parts: str | Table, bold: str = "") -> None:
        for part in parts:
            for line in self.lines(part, bold):
                self.print(line, soft_wrap=True)

    def lines(self, part: str | Table, bold: str = "") -> list[Text]:
        """What `show` prints: on a terminal broken between words and between columns, elsewhere whole.

        A word that is longer than a line stays whole too, so that paths can be copied.
        """
        if isinstance(part, Table):
            blocks = [[*self._rendered(narrow), Text()] for narrow in self._parts(part)]
            return [line for block in blocks for line in block][:-1]
        lines = (bold + part).translate(CONTROL).split("\n")
        if self.is_terminal:
            lines = [short for line in lines for short in filled(self.spelled(line), self.width)]
        found = [Text(line) for line in lines]
        found[0].stylize("bold", 0, len(bold))
        return found

    def spelled(self, text: str) -> str:
        """`text` in the characters that the output can encode, so that its length is known."""
        return text.encode(self.encoding, LEGIBLE).decode(self.encoding)

    def _parts(self, table: Table) -> Iterator[Table]:
        """The table, or where a terminal is too narrow several, each with its first columns and some others."""
        repeated = getattr(table, "repeated", 1)
        first, rest = table.columns[:repeated], table.columns[repeated:]
        part = copy.copy(table)
        part.columns = first
        for column in rest:
            wide = _least([*part.columns, column], TEXT) > self.width
            if len(part.columns) > len(first) and self.is_terminal and wide:
                yield part
                part = copy.copy(table)
                part.columns = first
            part.columns = [*part.columns, column]
        yield part

    def _rendered(self, table: Table) -> Iterator[Text]:
        width = Measurement.get(self, self.options.update(max_width=ANY_WIDTH), table).maximum
        if self.is_terminal:
            width = min(width, max(self.width, _least(table.columns, WORD)))
        # rich would crop a table to the width of this console.
        wide = Console(width=width, color_system="standard", force_terminal=self.is_terminal, **PLAIN)
        with wide.capture() as captured:
            wide.print(table)
        for line in captured.get().splitlines():
            text = Text.from_ansi(line)
            text.rstrip()
            yield text

    @contextmanager
    def waiting(self, text: str) -> Iterator[Callable[[str], None]]:
        """Says on a terminal what is waited for and since when; yields what is called with a new text."""
        columns = (SpinnerColumn("line"), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
        with Progress(*columns, console=self, transient=True, disable=not self.is_live) as progress:
            task = progress.add_task(self.spelled(text))
            yield lambda news: progress.update(task, description=self.spelled(news))

    def progress(self, output_is_result: bool = False) -> Progress:
        """A line for each task on a terminal; its field `live` has what there is to say beside its steps.

        Args:
            output_is_result: standard output is not for this terminal: it is not to be shown above the line.
        """
        columns, shown = _Line(self), self.is_terminal
        return Progress(
            columns, console=self, transient=True, disable=not shown, redirect_stdout=not output_is_result
        )


def _least(columns: Sequence[Column], text: int) -> int:
    """The width of a table of these columns, if those that may be broken get at most `text` characters."""
    widths = [
        max(cell_len(line) for cell in (column.header, *column.cells) for line in str(cell).split("\n"))
        for column in columns
    ]
    least = [width if column.no_wrap else min(width, text) for column, width in zip(columns, widths, strict=True)]
    return sum(least) + GAP * (len(least) - 1)


def filled(line: str, width: int) -> list[str]:
    """`line` broken between its parts where they all fit, else between words; longer words stay whole."""
    parts = INNER_SPACE.sub("\0", line)
    glued = parts if max(map(len, parts.split()), default=0) < width else line
    fill: Any = {"break_long_words": False, "break_on_hyphens": False, "subsequent_indent": "  "}
    return [short.replace("\0", " ") for short in textwrap.wrap(glued, width, **fill)] or [""]


class _Line(ProgressColumn):
    """A task in one line. If the terminal is narrow, first the bar gives way, then what `live` says last."""

    def __init__(self, screen: Screen) -> None:
        super().__init__()
        self.screen = screen

    def render(self, task: Task) -> Table:
        parts = [Text(task.description)] if task.description else []
        if task.total:
            parts.append(Text(f"{task.completed:>{len(f'{task.total:.0f}')}.0f}/{task.total:.0f}"))
            left = None if task.finished else task.time_remaining
            parts += [] if left is None else [Text(str(timedelta(seconds=int(left))))]
        # Less than the whole width, since a terminal shows ^C behind the line, which must not wrap then.
        room = self.screen.width - 3 - sum(len(part) + GAP for part in parts)
        live = ""
        for piece in PIECES.split(self.screen.spelled(str(task.fields.get("live", "")))):
            if len(f"{live}{piece}".rstrip()) > room:
                break
            live += piece
        bar = min(LARGEST_BAR, room - len(live) - GAP)
        cells: list[RenderableType] = [*parts, Text(live.rstrip(" ,"))]
        if task.total and bar >= LEAST_BAR:
            cells.insert(bool(task.description), ProgressBar(task.total, task.completed, bar))
        line = Table.grid(padding=(0, GAP, 0, 0), pad_edge=False)
        line.add_row(*cells)
        return line


class _Forgiving:
    """A text stream that falls silent once it cannot be written: its reader has gone, or its disk is full."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> None:
        try:
            self._stream.write(text)
        except OSError:
            silence(self._stream)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            silence(self._stream)
