"""What a training run shows on the screen: a header, the progress, a result table with the interval, the path.

On a terminal a live bar; otherwise plain lines, one for each checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from pathlib import Path
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
        bound = "no bound" if names["constraint"] == "none" else f"L = {config['lipschitz']:g}"
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
        f"over the data: median ‖∇f‖{SUBSCRIPT[gradient['q']]} {gradient['median']:.4f}, "
        f"5 % to 95 %: {gradient['p05']:.4f} to {gradient['p95']:.4f}\n"
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
