"""What a run and a sweep show on the screen: a header, the progress, tables of results, the path.

On a terminal a live line; otherwise plain lines, one for each checkpoint.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.progress import Progress, TaskID
from rich.table import Table

from lipexp.process import holding_interrupts
from lipexp.screen import Screen
from lipexp.tasks import METRICS, SPLITS
from lipexp.wording import (
    below,
    columns_line,
    count,
    gradient_line,
    interval_line,
    monotone_line,
    robustness_line,
    shown_path,
)

if TYPE_CHECKING:
    from lipexp.members import Member
    from lipexp.record import Metrics


class Display:
    """The screen of one training run.

    Args:
        brief: one line per run, for sweeps.
    """

    def __init__(self, brief: bool = False, screen: Screen | None = None) -> None:
        self.screen = screen or Screen()
        self.brief = brief
        self.step = 0
        self._steps, self._keep = 0, "last"
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def header(self, member: Member) -> None:
        """What is trained, on what, under which bound."""
        config, names = member.config, member.names
        self._steps, self._keep = config.steps, config.keep
        lipschitz = member.parts["constraint"].lipschitz
        bound = "no bound" if lipschitz is None else f"L = {lipschitz:g}"
        line = f"{names['dataset']}  {names['act']}  {names['constraint']} ({bound})  {names['loss']}"
        line += f"  seed {config.seed}"
        if self.brief:
            self.screen.show(line)
            return
        self.screen.show(f"  {line}", bold="lipexp train")
        shape = ", ".join(f"{key} {value}" for key, value in config.model.items() if key != "_target_" and value)
        self.screen.show(f"{names['model']} ({shape}), {config.steps} steps of {member.batch_size} points")
        if about := member.parts["dataset"].about:
            self.screen.show(about)

    @contextmanager
    def training(self, total: int) -> Iterator[None]:
        """Shows the progress of `total` steps, and of what follows them, while the body runs."""
        if not self.screen.is_live:
            yield
            return
        with self.screen.progress() as self._bar:
            self._task = self._bar.add_task("", total=total, live="")
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
        metric = next(f"val_{key}" for key in METRICS if f"val_{key}" in row)
        steepest = "?" if row["grad_max"] is None else below(row["grad_max"])
        live = f"loss {row['train_loss']:.4g}  {metric.replace('_', ' ')} {row[metric]:.4g}  max ‖∇f‖ {steepest}"
        self.stage(live)
        if self._bar is None and not self.brief:
            self.screen.tell(f"step {step:>5}  {live}")

    def stage(self, text: str) -> None:
        """What is done now, beside the steps."""
        if self._bar is not None:
            self._bar.update(self._task, live=text)

    def result(self, metrics: Metrics, folder: Path) -> None:
        """The result of one run."""
        if not self.brief:
            if metrics.step < self._steps:
                reason = "the best on validation" if self._keep == "best" else "where training stopped early"
                self.screen.show(f"kept: the network after {metrics.step} steps, {reason}")
            self.screen.show(result_table(metrics))
            self.screen.show(gradient_line(metrics.gradient_norm))
            if metrics.robustness is not None:
                self.screen.show(robustness_line(metrics.robustness))
            if metrics.columns:
                self.screen.show(columns_line(metrics.columns))
            if metrics.monotone is not None:
                self.screen.show(monotone_line(metrics.monotone))
        self.screen.show(interval_line(metrics.lipschitz))
        self.screen.show(f"{folder}{'' if self.brief else '/'}")


@contextmanager
def composing(jobs: int, screen: Screen | None = None) -> Iterator[Callable[[], None]]:
    """Shows on a terminal how many jobs of a sweep are composed; yields what is to be called after each."""
    screen = screen or Screen()
    if not screen.is_live:
        yield lambda: None
        return
    with screen.progress() as bar:
        task = bar.add_task("composing the jobs", total=jobs)
        yield lambda: bar.advance(task)


class SweepDisplay:
    """The screen of a sweep: a line for each stack that trains, then one table.

    On a terminal the lines are live; otherwise a line is printed when a stack has ended.
    """

    def __init__(self, screen: Screen | None = None) -> None:
        self.screen = screen or Screen()
        self._bars: Progress | None = None
        self._tasks: dict[int, TaskID] = {}
        self._runs: Sequence[int] = []
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
        split = ", ".join(f"{stacks.count(runs)} × {count(runs, 'run')}" for runs in sizes)
        parts = [count(jobs, "job")]
        parts += [f"{done} done before"] if done else []
        parts += [f"{count(len(stacks), 'stack')} ({split})"] if stacks else []
        parts += [f"about {run_bytes / 1e6:.2g} MB a run"] if stacks and run_bytes else []
        parts += [f"{count(min(processes, len(stacks)), 'process', 'es')}"] if stacks and processes else []
        self.screen.show(f"  {', '.join(parts)}", bold="lipexp train -m")

    @contextmanager
    def progress(self) -> Iterator[None]:
        """Shows the progress of all stacks while the body runs."""
        if not self.screen.is_live:
            yield
            return
        with self.screen.progress() as self._bars:
            yield
        self._bars = None

    def update(self, number: int, step: int, total: int | None, live: str | None, done: bool = False) -> None:
        """Stack `number` has finished `step` steps, and with `done` has written all its results."""
        if live is not None:
            self._live[number] = live
        bars = self._bars
        if bars is None:
            if done:
                self.say(f"{count(step, 'step')}  {self._live.get(number, 'all failed')}", number)
            return
        if done:
            self._remove(number)
            return
        if number not in self._tasks:
            place = f"{number + 1:>{len(str(len(self._runs)))}}"
            self._tasks[number] = bars.add_task(f"stack {place} of {len(self._runs)}", total=total, live="")
        bars.update(self._tasks[number], completed=step, total=total, live=self._live.get(number, ""))

    def _remove(self, number: int) -> None:
        if self._bars is not None and number in self._tasks:
            self._bars.remove_task(self._tasks.pop(number))

    def died(self, number: int, reason: str | None = None) -> None:
        """The process that trained stack `number` has died."""
        self._remove(number)
        self.say(reason or "its worker process died, of too little memory perhaps", number)

    def say(self, text: str, number: int | None = None) -> None:
        """Print a line about stack `number`, or about all of them."""
        if number is not None:
            text = f"stack {number + 1} of {len(self._runs)}, {count(self._runs[number], 'run')}: {text}"
        self.screen.tell(text)

    def result(self, rows: Sequence[Mapping[str, Any]], overrides: Sequence[str], file: Path, table: bool) -> None:
        """The table of the jobs, best first and failed last, where all of it lies, and how to go on.

        Args:
            rows: those of sweep.csv.
            overrides: the keys that the jobs override.
            file: sweep.csv.
            table: print the table, and how to go on.
        """
        swept = [key for key in overrides if len({row.get(key) for row in rows}) > 1]
        if table and any(row["status"] != "queued" for row in rows):
            self.screen.show(*sweep_table(rows, swept))
        statuses = ("ok", "failed", "missing", "queued")
        counts = {status: sum(row["status"] == status for row in rows) for status in statuses}
        self.screen.show(", ".join(f"{count} {status}" for status, count in counts.items() if count))
        self.screen.show(shown_path(file))
        if table and counts["ok"]:
            self.screen.show(f"next: {next_command(file.parent, swept)}")


class StackDisplay:
    """What the training of one stack reports to the screen of its sweep, perhaps in another process."""

    def __init__(self, update: Callable[..., None], number: int) -> None:
        self._update, self._number = update, number
        self.step = 0
        self._summary: str | None = None

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
        self._summary = live_summary(rows)
        self._update(self._number, step, None, self._summary)

    def stage(self, text: str) -> None:
        """What is done now, beside the steps."""
        self._update(self._number, self.step, None, text)

    def done(self) -> None:
        """All results are written."""
        self._update(self._number, self.step, None, self._summary, True)


def live_summary(rows: Sequence[Mapping[str, float | None]]) -> str:
    """The best and the median metric of the runs of a stack; a failed run has an empty row."""
    sound = [row for row in rows if row]
    if not sound:
        return "all failed"
    metric = next(key for key in METRICS if f"val_{key}" in sound[0])
    values = sorted((float(row[f"val_{metric}"] or 0) for row in sound), reverse=METRICS[metric])
    best = values[0]
    failed = f", {len(rows) - len(sound)} failed" if len(sound) < len(rows) else ""
    return f"val {metric} best {best:.4g}, median {median(values):.4g}{failed}"


SHOWN_ROWS = 40  # of a sweep's table, and as many failed ones; sweep.csv has them all


def sweep_table(rows: Sequence[Mapping[str, Any]], swept: Sequence[str]) -> tuple[str, Table]:
    """What differs between the jobs of a sweep and what they found, as `lipexp report` shows it."""
    with holding_interrupts():
        import pandas as pd

        from lipexp import report

    ended = [row for row in rows if row["status"] != "queued"]
    columns = report.unique(*ended, report.PLAIN, [report.TARGET])
    table = report.ordered(pd.DataFrame(ended, columns=columns, dtype=object))
    sound = table["status"] == "ok"
    shown = pd.concat([table[sound].head(SHOWN_ROWS), table[~sound].head(SHOWN_ROWS)])
    same, lines = report.shown(shown, ["job", *swept, *report.PLAIN], by=["job"])
    lines.caption = f"{len(shown)} of {len(rows)} jobs" if len(shown) < len(rows) else None
    return same, lines


def next_command(folder: Path, swept: Sequence[str]) -> str:
    """What folds the runs of a sweep over their seeds."""
    keys = [key for key in swept if key.partition(".")[0] not in ("seed", "experiment", "hydra")]
    return f"lipexp report {shlex.quote(shown_path(folder))} --by {shlex.quote(','.join(keys) or 'dataset')}"


def result_table(metrics: Metrics) -> Table:
    """Loss and scores on the three parts of the data."""
    table = Table(show_edge=False, box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for split in SPLITS:
        table.add_column(split, justify="right")
    for key in metrics.test:
        table.add_row(key, *(f"{getattr(metrics, split)[key]:.6g}" for split in SPLITS))
    return table
