"""What a training run shows on the screen: a header, the progress, a result table with the interval, the path.

On a terminal a live bar; otherwise plain lines, one for each checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from lipexp.runs import METRICS

SUBSCRIPT = {1: "₁", 2: "₂", "inf": "∞"}


class Display:
    """The screen of one training run.

    Args:
        brief: one line a run, for sweeps.
    """

    def __init__(self, brief: bool = False, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self.brief = brief
        self.step = 0
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def header(self, names: Mapping[str, str], config: Mapping[str, Any]) -> None:
        """What is trained, on what, under which bound."""
        lipschitz = config["constraint"].get("lipschitz")
        bound = "no bound" if lipschitz is None else f"L = {lipschitz:g}"
        line = (
            f"{names['dataset']}  {names['act']}  {names['constraint']} ({bound})  {names['loss']}  "
            f"seed {config['seed']}"
        )
        if self.brief:
            self._print(line)
            return
        self._print(f"[bold]lipexp train[/bold]  {line}")
        model = config["model"]
        shape = ", ".join(f"{key} {value}" for key, value in model.items() if key != "_target_")
        self._print(f"{names['model']} ({shape}), {config['steps']} steps of {config['batch_size']} points")

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
        """New lines of history.csv, one a run."""
        self.tick(step)
        row = rows[0]
        if not row:
            return
        metric = next(f"test_{key}" for key in METRICS if f"test_{key}" in row)
        live = (
            f"loss {row['train_loss']:.4g}  {metric.replace('_', ' ')} {row[metric]:.4g}  "
            f"max ‖∇f‖ {_optional(row['grad_max'])}"
        )
        if self._bar is not None:
            self._bar.update(self._task, live=live)
        elif not self.brief:
            self._print(f"step {step:>5}  {live}")

    def result(self, metrics: Mapping[str, Any], folder: Path) -> None:
        """The result of one run."""
        if not self.brief:
            self._print(result_table(metrics))
            self._print(gradient_line(metrics["gradient_norm"]))
            if metrics["robustness"] is not None:
                self._print(robustness_line(metrics["robustness"]))
        self._print(interval_line(metrics["lipschitz"]))
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
        """How many jobs there are, how many were trained before, and in what stacks the others train.

        Args:
            stacks: the number of runs of each.
            run_bytes: the memory that a run takes.
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
        """Stack `number` has finished `step` steps; `done`: and written all its results."""
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

    def _name(self, number: int) -> str:
        return f"stack {number + 1} of {len(self._runs)}, {count(self._runs[number], 'run')}"

    def say(self, text: str, number: int | None = None) -> None:
        """A line, on stack `number` or on all of them."""
        self._print(escape(text if number is None else f"{self._name(number)}: {text}"))

    def result(self, rows: Sequence[Mapping[str, Any]], csv_file: Path, table: bool = True) -> None:
        """The table of the jobs, best first and failed last, and where all of it lies."""
        if table and any(row["status"] != "queued" for row in rows):
            self._print(sweep_table(rows))
        statuses = ("ok", "failed", "missing", "queued")
        counts = {status: sum(row["status"] == status for row in rows) for status in statuses}
        self._print(", ".join(f"{count} {status}" for status, count in counts.items() if count))
        self._print(shown_path(csv_file))

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
        """New lines of history.csv, one a run."""
        self.step = step
        self._update(self._number, step, None, live_summary(rows))

    def done(self) -> None:
        """All results are written."""
        self._update(self._number, self.step, None, None, True)


def shown_path(path: Path) -> str:
    """From here, or from the root for what lies outside."""
    shown = os.path.relpath(path)
    return str(path.absolute()) if shown.startswith("..") else shown


def count(number: int, what: str, plural: str = "s") -> str:
    """`1 run`, `2 runs`."""
    return f"{number} {what}{'' if number == 1 else plural}"


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


def sweep_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """What differs between the jobs of a sweep, their metric and their interval, best first, failed last."""
    metrics = [f"test.{key}" for key in METRICS if any(f"test.{key}" in row for row in rows)]
    keys = list(dict.fromkeys(key for row in rows for key in row))[3:]  # without job, status, reason
    overrides = keys[: keys.index("schema") if "schema" in keys else None]
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
    """The metric of a job, in the column of its kind, and its measured and certified constant."""
    if "lipschitz.measured" not in row:
        return [""] * (len(metrics) + 2 * bool(metrics))
    certified = row["lipschitz.certified"]
    bound = "" if certified is None else above(certified, row["lipschitz.target"])
    values = [f"{row[metric]:.4g}" if metric in row else "" for metric in metrics]
    return [*values, below(row["lipschitz.measured"]), bound]


def result_table(metrics: Mapping[str, Any]) -> Table:
    """Loss and metric on the train and the test points."""
    table = Table(show_edge=False, box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for split in ("train", "test"):
        table.add_column(split, justify="right")
    for key in metrics["test"]:
        table.add_row(key, *(f"{metrics[split][key]:.6g}" for split in ("train", "test")))
    return table


def gradient_line(gradient: Mapping[str, Any]) -> str:
    """The distribution of the gradient norm over the data, in q, and its maximum in every norm."""
    largest = "  ".join(
        f"‖∇f‖{SUBSCRIPT[key if key == 'inf' else int(key)]} {below(value)}"
        for key, value in gradient["data_max"].items()
    )
    return (
        f"over the data: median ‖∇f‖{SUBSCRIPT[gradient['q']]} {gradient['median']:.4g}, "
        f"5 % to 95 %: {gradient['p05']:.4g} to {gradient['p95']:.4g}\n"
        f"largest there: {largest}"
    )


def robustness_line(robustness: Mapping[str, Any]) -> str:
    """`certified accuracy within ‖δ‖₂ ≤ 0.1: 0.998  0.25: 0.9965   median radius 0.5122`, or why there is none."""
    if robustness["certified_accuracy"] is None:
        return f"no certified radii: {robustness['reason']}"
    shares = "  ".join(f"{radius}: {share:.4g}" for radius, share in robustness["certified_accuracy"].items())
    within = f"certified accuracy within ‖δ‖{SUBSCRIPT[robustness['p']]} ≤ {shares}   " if shares else ""
    median = robustness["median_radius"]
    return f"{within}median radius {'infinite' if median is None else below(median)}"


def interval_line(lipschitz: Mapping[str, Any]) -> str:
    """`‖∇f‖₂  measured 0.9942 ≤ exact 0.9943 ≤ product 0.9999972 ≤ L = 1   PASS`, each rounded to its safe side.

    Without an exact constant it is the certified bound, with its method where that is not the product. Measured is
    over the box of the data, and so is a first exact constant; the second one holds everywhere.
    """
    parts = [f"measured {below(lipschitz['measured'])}"]
    exact, certified, product = (lipschitz[name] for name in ("exact", "certified", "product"))
    if exact is not None:
        box = lipschitz["exact_box"]
        if box is not None and above(box["value"], None) != above(exact, None):
            parts.append(f"exact {above(box['value'], None)} (box of the data)")
        parts.append(f"exact {above(exact, lipschitz['target'])}")
        if product is not None:
            parts.append(f"product {above(product, lipschitz['target'])}")
    elif certified is not None:
        by = "" if lipschitz["method"] == "product" else f" ({lipschitz['method']})"
        parts.append(f"certified {above(certified, lipschitz['target'])}{by}")
    if lipschitz["target"] is not None:
        parts.append(f"L = {lipschitz['target']:g}")
    line = f"‖∇f‖{SUBSCRIPT[lipschitz['q']]}  {' ≤ '.join(parts)}   {lipschitz['verdict']}"
    if lipschitz["certified"] is None:
        line += f" ({lipschitz['method']})"
    return line if lipschitz["open"] is None else f"{line} (not exact: {lipschitz['open']})"


def broken_bound(lipschitz: Mapping[str, Any]) -> str:
    """What a verdict FAIL means."""
    if lipschitz["measured_by"] == "exact arithmetic":
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
    rounded = Context(prec=digits, rounding=rounding).create_decimal(Decimal(value))
    plain = value == 0 or 1e-4 <= abs(value) < 1e6
    return f"{rounded.normalize():f}" if plain else f"{rounded.normalize():E}".lower()


def _optional(value: float | None) -> str:
    return "?" if value is None else f"{value:.4g}"
