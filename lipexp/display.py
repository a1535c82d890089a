"""What a training run shows on the screen: a header, the progress, a result table with the interval, the path.

On a terminal a live bar; otherwise plain lines, one for each checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

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
        metric = next(key for key in row if key in ("test_accuracy", "test_mse"))
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
        self._print(interval_line(metrics["lipschitz"]))
        self._print(f"{folder}{'' if self.brief else '/'}")

    def _print(self, what: Any) -> None:
        self.console.print(what, soft_wrap=True)


class SweepDisplay:
    """The screen of a sweep: a bar for each stack that trains, then one table.

    On a terminal the bars are live; otherwise a line is printed when a stack ends.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self._bars: Progress | None = None
        self._tasks: dict[int, TaskID] = {}
        self._runs: list[int] = []
        self._totals: dict[int, int] = {}

    def header(self, jobs: int, missing: int, stacks: Sequence[int]) -> None:
        """How many jobs there are, how many are still to be trained, and in what stacks."""
        self._runs = list(stacks)
        left = "" if missing == jobs else f", {jobs - missing} done before"
        split = ", ".join(f"{stacks.count(runs)} of {runs}" for runs in sorted(set(stacks), reverse=True))
        what = f" as {len(stacks)} stacked models ({split} runs)" if stacks else ""
        self._print(f"[bold]lipexp train -m[/bold]  {jobs} jobs{left}{what}")

    @contextmanager
    def progress(self) -> Iterator[None]:
        """Shows the progress of all stacks while the body runs."""
        if not self.console.is_terminal:
            yield
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[live]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, transient=True) as self._bars:
            yield
        self._bars = None

    def stack(self, number: int, runs: int) -> StackDisplay:
        """The part of the screen that belongs to one stack."""
        return StackDisplay(self, number)

    def update(self, number: int, step: int, total: int | None, live: str | None) -> None:
        """Stack `number` has finished `step` steps."""
        if total is not None:
            self._totals[number] = total
        if self._bars is not None:
            if number not in self._tasks:
                name = f"stack {number + 1} of {len(self._runs)}, {self._runs[number]} runs"
                self._tasks[number] = self._bars.add_task(name, total=total, live="")
            self._bars.update(self._tasks[number], completed=step)
            if live is not None:
                self._bars.update(self._tasks[number], live=live)
        elif live is not None and step == self._totals.get(number):
            self._print(
                f"stack {number + 1} of {len(self._runs)}: {self._runs[number]} runs, {step} steps  {live}"
            )

    def result(self, rows: Sequence[Mapping[str, Any]], csv_file: Path) -> None:
        """The table of the jobs, best first, and where all of it lies."""
        metric = next((key for row in rows for key in ("test.accuracy", "test.mse") if key in row), None)
        if metric is not None:
            self._print(sweep_table(rows, metric))
        counts = {status: sum(row["status"] == status for row in rows) for status in ("ok", "failed", "missing")}
        self._print(", ".join(f"{count} {status}" for status, count in counts.items() if count))
        self._print(str(csv_file))

    def _print(self, what: Any) -> None:
        self.console.print(what, soft_wrap=True)


@dataclass
class StackDisplay:
    """What the training of one stack reports to the screen of its sweep."""

    sweep: SweepDisplay
    number: int

    @contextmanager
    def training(self, total: int) -> Iterator[None]:
        self.sweep.update(self.number, 0, total, "")
        yield

    def tick(self, step: int) -> None:
        self.sweep.update(self.number, step, None, None)

    def checkpoint(self, step: int, rows: Sequence[Mapping[str, float | None]]) -> None:
        self.sweep.update(self.number, step, None, live_summary(rows))


def live_summary(rows: Sequence[Mapping[str, float | None]]) -> str:
    """The best and the median metric of the runs of a stack."""
    sound = [row for row in rows if row]
    if not sound:
        return "all runs failed"
    metric = next(key for key in sound[0] if key in ("test_accuracy", "test_mse"))
    values = sorted(float(row[metric] or 0) for row in sound)
    best = values[-1] if metric == "test_accuracy" else values[0]
    return f"{metric.replace('_', ' ')} best {best:.4g}, median {median(values):.4g}"


SHOWN_ROWS = 40  # of a sweep's table; sweep.csv has them all


def sweep_table(rows: Sequence[Mapping[str, Any]], metric: str) -> Table:
    """What differs between the jobs of a sweep, their metric and their interval, best first, failed last."""
    fixed = {"job", "status", "reason"}
    keys = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in fixed]
    overrides = keys[: next((i for i, key in enumerate(keys) if key in ("schema",)), 0)]
    varied = [key for key in overrides if len({row.get(key) for row in rows}) > 1]
    sign = -1 if metric == "test.accuracy" else 1
    ranked = sorted(rows, key=lambda row: (metric not in row, sign * float(row.get(metric) or 0)))
    table = Table(show_edge=False, box=None, pad_edge=False, header_style="bold")
    for name in ("job", *varied, metric.replace(".", " "), "measured", "certified", ""):
        table.add_column(name, justify="right" if name in ("measured", "certified", metric) else "left")
    for row in ranked[:SHOWN_ROWS]:
        cells = [str(row["job"]), *(str(row.get(key, "")) for key in varied)]
        if metric in row:
            certified = row["lipschitz.certified"]
            shown = "" if certified is None else above(certified, row["lipschitz.target"])
            cells += [f"{row[metric]:.4g}", below(row["lipschitz.measured"]), shown, row["lipschitz.verdict"]]
        else:
            cells += ["", "", "", row["reason"] or row["status"]]
        table.add_row(*cells)
    if len(ranked) > SHOWN_ROWS:
        table.caption = f"the best {SHOWN_ROWS} of {len(ranked)}"
    return table


def result_table(metrics: Mapping[str, Any]) -> Table:
    """Loss and metric on the train and the test points."""
    table = Table(show_edge=False, box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for split in ("train", "test"):
        table.add_column(split, justify="right")
    for key in ("loss", "accuracy" if "accuracy" in metrics["test"] else "mse"):
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


def interval_line(lipschitz: Mapping[str, Any]) -> str:
    """`‖∇f‖₂  measured 0.9942 ≤ certified 0.9999972 ≤ L = 1   PASS`, each number rounded to its safe side."""
    parts = [f"measured {below(lipschitz['measured'])}"]
    if lipschitz["exact"] is not None:
        parts.append(f"exact {lipschitz['exact']:.4g}")
    if lipschitz["certified"] is not None:
        parts.append(f"certified {above(lipschitz['certified'], lipschitz['target'])}")
    if lipschitz["target"] is not None:
        parts.append(f"L = {lipschitz['target']:g}")
    line = f"‖∇f‖{SUBSCRIPT[lipschitz['q']]}  {' ≤ '.join(parts)}   {lipschitz['verdict']}"
    if lipschitz["certified"] is None:
        line += f" ({lipschitz['method']})"
    return line


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
