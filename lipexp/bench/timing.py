"""How the cases of a table are timed, and the table.

Times on a shared machine are noise, so none is reported alone. The cases of a table take turns in one process with
one thread: a round times each of them once. What is reported is the median over rounds of the ratio to the first
case of the same round, in CPU time.
"""

from __future__ import annotations

import gc
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rich.markup import escape
from rich.table import Table

WARM_UP = 5  # calls of a case before any is timed


@dataclass
class Case:
    """One thing to time; the others of its table are compared with the first."""

    name: str
    work: Callable[[], object]
    target: float | None = None  # the largest ratio aimed at
    runs: int = 1  # the number of runs that one call trains: times are those of one run
    cpu: list[float] = field(default_factory=list)  # seconds a call, one number a round
    wall: list[float] = field(default_factory=list)


def take_turns(cases: Sequence[Case], rounds: int, calls: int, warm_up: int = WARM_UP) -> None:
    """Time `calls` calls of each case in every round. Each round starts with the next case."""
    for case in cases:
        for _ in range(warm_up):
            case.work()
    collected = gc.isenabled()
    gc.disable()
    try:
        for turn in range(rounds):
            first = turn % len(cases)
            for case in (*cases[first:], *cases[:first]):
                cpu, wall = cpu_seconds(), time.perf_counter()
                for _ in range(calls):
                    case.work()
                case.cpu.append((cpu_seconds() - cpu) / calls / case.runs)
                case.wall.append((time.perf_counter() - wall) / calls / case.runs)
            gc.collect()
    finally:
        if collected:
            gc.enable()


def cpu_seconds() -> float:
    """What this process and its finished children have used, user and system."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The lower quartile, the median and the upper quartile."""
    if len(values) == 1:
        return (values[0],) * 3
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def table(title: str, cases: Sequence[Case], clock: str = "cpu") -> Table:
    """One row a case: its ratio to the first one by `clock` (cpu or wall), the target, and the times."""
    first, rounds = cases[0], len(cases[0].cpu)
    out = Table(title=escape(title), title_justify="left", box=None, pad_edge=False, header_style="bold")
    out.add_column(f"{rounds} {'rounds' if rounds > 1 else 'round'}", overflow="fold")
    for heading in ("ratio", "quartiles", "target", "", "CPU", "wall"):
        out.add_column(heading, justify="right" if heading in ("ratio", "CPU", "wall") else "left", no_wrap=True)
    for case in cases:
        ratios = [a / b for a, b in zip(getattr(case, clock), getattr(first, clock), strict=True)]
        low, ratio, high = quartiles(ratios)
        missed = case.target is not None and ratio > case.target
        out.add_row(
            escape(case.name),
            "1" if case is first else f"{ratio:.2f}",
            "" if case is first else f"{low:.2f} to {high:.2f}",
            "" if case.target is None else f"≤ {case.target:.3g}",
            "" if case.target is None else "[bold]missed[/bold]" if missed else "met",
            *(duration(statistics.median(seconds)) for seconds in (case.cpu, case.wall)),
        )
    return out


def duration(seconds: float) -> str:
    return f"{seconds * 1e6:,.0f} µs" if seconds < 0.01 else f"{seconds * 1e3:,.0f} ms"
