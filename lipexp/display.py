"""What a run and a sweep show on the screen: a header, the progress, tables of results, the path.

On a terminal a live bar; otherwise plain lines, one for each checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from lipexp.tasks import METRICS
from lipexp.wording import above, below, count, gradient_line, interval_line, robustness_line, rounded, shown_path

if TYPE_CHECKING:
    from lipexp.members import Member
    from lipexp.record import Metrics


class Display:
    """The screen of one training run.

    Args:
        brief: one line per run, for sweeps.
    """

    def __init__(self, brief: bool = False, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self.brief = brief
        self.step = 0
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def header(self, member: Member) -> None:
        """What is trained, on what, under which bound."""
        config, names = member.config, member.names
        lipschitz = member.parts["constraint"].lipschitz
        bound = "no bound" if lipschitz is None else f"L = {lipschitz:g}"
        line = f"{names['dataset']}  {names['act']}  {names['constraint']} ({bound})  {names['loss']}"
        line += f"  seed {config.seed}"
        if self.brief:
            self._print(line)
            return
        self._print(f"[bold]lipexp train[/bold]  {line}")
        shape = ", ".join(f"{key} {value}" for key, value in config.model.items() if key != "_target_")
        self._print(f"{names['model']} ({shape}), {config.steps} steps of {config.batch_size} points")

    @contextmanager
    def training(self, total: int) -> Iterator[None]:
        """Shows the progress of `total` steps while the body runs."""
        if not self.console.is_terminal:
            yield
            return
        columns = (
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[live]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, transient=True) as self._bar:
            self._task = self._bar.add_task("train", total=total, live="")
            yield
        self._bar = None

    def tick(self, step: int) -> None:
        """`step` steps are done."""
        self.step = step
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def checkpoint(self, step: int, rows: Sequence[Mapping[str, float | None]]) -> None:
        """New lines of history.csv, one per run."""
        self.tick(step)
        row = rows[0]
        if not row:
            return
        metric = next(f"test_{key}" for key in METRICS if f"test_{key}" in row)
        live = (
            f"loss {row['train_loss']:.4g}  {metric.replace('_', ' ')} {row[metric]:.4g}  "
            f"max ‖∇f‖ {rounded(row['grad_max'])}"
        )
        if self._bar is not None:
            self._bar.update(self._task, live=live)
        elif not self.brief:
            self._print(f"step {step:>5}  {live}")

    def result(self, metrics: Metrics, folder: Path) -> None:
        """The result of one run."""
        if not self.brief:
            self._print(result_table(metrics))
            self._print(gradient_line(metrics.gradient_norm))
            if metrics.robustness is not None:
                self._print(robustness_line(metrics.robustness))
        self._print(interval_line(metrics.lipschitz))
        self._print(f"{folder}{'' if self.brief else '/'}")

    def _print(self, what: Any) -> None:
        self.console.print(what, soft_wrap=True)


@contextmanager
def composing(jobs: int, console: Console | None = None) -> Iterator[Callable[[], None]]:
    """Shows on a terminal how many jobs of a sweep are composed; yields what is to be called after each."""
    console = console or Console()
    columns = (TextColumn("composing the jobs"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=jobs)
        yield lambda: bar.advance(task)


class SweepDisplay:
    """The screen of a sweep: a bar for each stack that trains, then one table.

    On a terminal the bars are live; otherwise a line is printed when a stack has ended.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self._bars: Progress | None = None
        self._tasks: dict[int, TaskID] = {}
        self._runs: Sequence[int] = []
        self._steps: dict[int, int] = {}
        self._live: dict[int, str] = {}

    def header(
        self, jobs: int, done: int, stacks: Sequence[int], run_bytes: int = 0, processes: int | None = None
    ) -> None:
        """The number of jobs, of those that were trained before, and the stacks that the others train in.

        Args:
            stacks: the number of runs of each stack.
            run_bytes: the memory that one run takes.
            processes: how many stacks train at the same time; None is one, in this process.
        """
        self._runs = stacks
        sizes = sorted(set(stacks), reverse=True)
        split = ", ".join(f"{stacks.count(runs)} of {count(runs, 'run')}" for runs in sizes)
        parts = [count(jobs, "job")]
        parts += [f"{done} done before"] if done else []
        parts += [f"{count(len(stacks), 'stack')} ({split})"] if stacks else []
        parts += [f"about {run_bytes / 1e6:.2g} MB a run"] if stacks and run_bytes else []
        parts += [f"{count(min(processes, len(stacks)), 'process', 'es')}"] if stacks and processes else []
        self._print(f"[bold]lipexp train -m[/bold]  {', '.join(parts)}")

    @contextmanager
    def progress(self) -> Iterator[None]:
        """Shows the progress of all stacks while the body runs."""
        if not self.console.is_terminal:
            yield
            return
        columns = (  # of 80 characters, the text at the end gives way
            TextColumn("{task.description}", table_column=Column(min_width=20)),
            BarColumn(bar_width=8),
            MofNCompleteColumn(table_column=Column(min_width=9)),
            TimeRemainingColumn(compact=True, table_column=Column(min_width=5)),
            TextColumn("{task.fields[live]}"),
        )
        with Progress(*columns, console=self.console, transient=True) as self._bars:
            yield
        self._bars = None

    def update(self, number: int, step: int, total: int | None, live: str | None, done: bool = False) -> None:
        """Stack `number` has finished `step` steps, and with `done` has written all its results."""
        self._steps[number] = step
        if live is not None:
            self._live[number] = live
        name = self._name(number)
        bars = self._bars
        if bars is None:
            if done:
                self._print(f"{name}: {count(step, 'step')}  {self._live.get(number, 'all failed')}")
            return
        if done:
            if number in self._tasks:
                bars.remove_task(self._tasks.pop(number))
            return
        if number not in self._tasks:
            self._tasks[number] = bars.add_task(name, total=total, live="")
        bars.update(self._tasks[number], completed=step, total=total, live=self._live.get(number, ""))

    def died(self, number: int, reason: str | None = None) -> None:
        """The process that trained stack `number` has died."""
        if self._bars is not None and number in self._tasks:
            self._bars.remove_task(self._tasks.pop(number))
        self.say(reason or "its worker process died, of too little memory perhaps", number)

    def _name(self, number: int) -> str:
        return f"stack {number + 1} of {len(self._runs)}, {count(self._runs[number], 'run')}"

    def say(self, text: str, number: int | None = None) -> None:
        """Print a line about stack `number`, or about all of them."""
        self._print(escape(text if number is None else f"{self._name(number)}: {text}"))

    def result(self, rows: Sequence[Mapping[str, Any]], overrides: Sequence[str], file: Path, table: bool) -> None:
        """The table of the jobs, best first and failed last, and where all of it lies.

        Args:
            rows: those of sweep.csv.
            overrides: the keys that the jobs override.
            file: sweep.csv.
            table: print the table.
        """
        if table and any(row["status"] != "queued" for row in rows):
            self._print(sweep_table(rows, overrides))
        statuses = ("ok", "failed", "missing", "queued")
        counts = {status: sum(row["status"] == status for row in rows) for status in statuses}
        self._print(", ".join(f"{count} {status}" for status, count in counts.items() if count))
        self._print(shown_path(file))

    def _print(self, what: Any) -> None:
        self.console.print(what, soft_wrap=True)


class StackDisplay:
    """What the training of one stack reports to the screen of its sweep, perhaps in another process."""

    def __init__(self, update: Callable[..., None], number: int) -> None:
        self._update, self._number = update, number
        self.step = 0

    @contextmanager
    def training(self, total: int) -> Iterator[None]:
        """`total` steps begin."""
        self.step = 0
        self._update(self._number, 0, total, None)
        yield

    def tick(self, step: int) -> None:
        """`step` steps are done."""
        self.step = step
        self._update(self._number, step, None, None)

    def checkpoint(self, step: int, rows: Sequence[Mapping[str, float | None]]) -> None:
        """New lines of history.csv, one per run."""
        self.step = step
        self._update(self._number, step, None, live_summary(rows))

    def done(self) -> None:
        """All results are written."""
        self._update(self._number, self.step, None, None, True)


def live_summary(rows: Sequence[Mapping[str, float | None]]) -> str:
    """The best and the median metric of the runs of a stack; a failed run has an empty row."""
    sound = [row for row in rows if row]
    if not sound:
        return "all failed"
    metric = next(key for key in METRICS if f"test_{key}" in sound[0])
    values = sorted((float(row[f"test_{metric}"] or 0) for row in sound), reverse=METRICS[metric])
    best = values[0]
    failed = f", {len(rows) - len(sound)} failed" if len(sound) < len(rows) else ""
    return f"test {metric} best {best:.4g}, median {median(values):.4g}{failed}"


SHOWN_ROWS = 40  # of a sweep's table, and as many failed ones; sweep.csv has them all


def sweep_table(rows: Sequence[Mapping[str, Any]], overrides: Sequence[str]) -> Table:
    """What differs between the jobs of a sweep, their metric and their interval, best first, failed last."""
    metrics = [f"test.{key}" for key in METRICS if any(f"test.{key}" in row for row in rows)]
    varied = [key for key in overrides if len({row.get(key) for row in rows}) > 1]
    table = Table(show_edge=False, box=None, pad_edge=False, header_style="bold")
    for name in ("job", *varied):
        table.add_column(name)
    for name in [*(metric.replace(".", " ") for metric in metrics), *(["measured", "certified"] * bool(metrics))]:
        table.add_column(name, justify="right")
    table.add_column("")
    ranked = [row for metric in metrics for row in _ranked(rows, metric)]
    failed = [row for row in rows if row["status"] not in ("ok", "queued")]
    for row in [*ranked[:SHOWN_ROWS], *failed[:SHOWN_ROWS]]:
        cells = [str(row["job"]), *(str(row.get(key, "")) for key in varied)]
        table.add_row(
            *cells, *_result_cells(row, metrics), row["reason"] or row.get("lipschitz.verdict", "missing")
        )
    shown = min(len(ranked), SHOWN_ROWS) + min(len(failed), SHOWN_ROWS)
    if shown < len(rows):
        table.caption = f"{shown} of {len(rows)} jobs"
    return table


def _ranked(rows: Sequence[Mapping[str, Any]], metric: str) -> list[Mapping[str, Any]]:
    """The jobs without a fault that have `metric`, best first."""
    sign = -1 if METRICS[metric.removeprefix("test.")] else 1
    sound = [row for row in rows if metric in row and row["status"] == "ok"]
    return sorted(sound, key=lambda row: sign * float(row[metric]))


def _result_cells(row: Mapping[str, Any], metrics: Sequence[str]) -> list[str]:
    """The metric of a job in its own column, and its measured and certified constant."""
    if "lipschitz.measured" not in row:
        return [""] * (len(metrics) + 2 * bool(metrics))
    certified = row["lipschitz.certified"]
    bound = "" if certified is None else above(certified, row["lipschitz.target"])
    values = [f"{row[metric]:.4g}" if metric in row else "" for metric in metrics]
    return [*values, below(row["lipschitz.measured"]), bound]


def result_table(metrics: Metrics) -> Table:
    """Loss and metric on the train and the test points."""
    table = Table(show_edge=False, box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for split in ("train", "test"):
        table.add_column(split, justify="right")
    for key in metrics.test:
        table.add_row(key, *(f"{scores[key]:.6g}" for scores in (metrics.train, metrics.test)))
    return table
