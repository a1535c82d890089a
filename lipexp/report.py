"""The verb `report`: one table of the runs in folders, plain or folded over seeds, on the screen and as CSV.

A run is a row: its settings (what was chosen) and its results (what came out), both with dotted keys. Folding
makes one row of the runs that differ only in their seed, and from there on it is a row like any other.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import os
import sys
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lipexp.arguments import Parser
from lipexp.config import ConfigError, no_such
from lipexp.runs import METRICS as KINDS
from lipexp.runs import RunFolder, find, flat
from lipexp.wording import above, below

MEASURED, CERTIFIED = "lipschitz.measured", "lipschitz.certified"
TARGET, Q, VERDICT = "lipschitz.target", "lipschitz.q", "lipschitz.verdict"
METRICS = {f"test.{metric}": larger for metric, larger in KINDS.items()}  # -> larger is better
CHOICES = ("dataset", "act", "constraint", "loss")  # the groups that are columns of every table
PLAIN = (*METRICS, MEASURED, CERTIFIED, Q, VERDICT, "status")
FOLDED = (*METRICS, "n", "worst", MEASURED, CERTIFIED, Q, VERDICT, "failed")
HEADINGS = {"lipschitz": "L", MEASURED: "measured"}
HEADINGS |= {metric: metric.replace(".", " ") for metric in METRICS}
HEADINGS |= {CERTIFIED: "certified", Q: "q", VERDICT: "verdict"}
FOLDED_AS = {**dict.fromkeys(METRICS, "mean"), MEASURED: "max", CERTIFIED: "max"}

HELP = """\
KEYS are groups or settings, such as act,optim.lr; whatever else tells two rows apart follows them.
KEY is a column or any key of metrics.json, such as gradient_norm.median (of folded rows its mean): accuracies
from the largest, all else from the smallest, failed runs last. What is the same in every row is named once, above
the table. q: the norm of the gradients; measured and certified: a lower and an upper bound on its largest value.

example: lipexp report outputs/2026-01-31 --by act,constraint,loss --sort measured --csv seeds.csv"""


@dataclass
class Row:
    """One run, or several that differ only in their seed."""

    settings: dict[str, str]  # in full, so that different ones never look alike
    results: dict[str, Any]

    def get(self, key: str) -> Any:
        return self.settings.get(key, self.results.get(key))

    @property
    def failed(self) -> bool:
        return bool(self.results["status"] != "ok")


def main(arguments: list[str]) -> int:
    """Run `lipexp report`; returns the exit status: 0, or 2 for bad input."""
    parser = Parser("lipexp report")
    parser.description = "One table of the runs at or under folders, finished and failed, best first."
    parser.epilog = HELP
    parser.add_argument("folders", metavar="FOLDER", nargs="*", help="where to look (default: outputs)")
    parser.add_argument("--by", metavar="KEYS", help="fold runs that differ only in seed: mean ± sample deviation")
    parser.add_argument("--sort", metavar="KEY", help="sort by this instead of the metric")
    parser.add_argument("--csv", metavar="FILE", help="also write all columns, unrounded; -: print only these")
    try:
        report(parser.parse_intermixed_args(arguments))
    except SystemExit as stop:  # argparse has said what it had to say
        return stop.code if isinstance(stop.code, int) else 0
    except ConfigError as error:
        print(f"lipexp: {error}", file=sys.stderr)
        return 2
    return 0


def report(options: argparse.Namespace) -> None:
    """Read, fold, sort, write and show; ConfigError for a folder, key or file that cannot be used."""
    runs, warnings = read(options.folders or ["outputs"])
    rows, by, key = runs, [], None
    if options.by is not None:
        valid, shown = {key for run in runs for key in run.settings}, own_settings(runs)
        by = [key_named("--by", name.strip(), valid, shown) for name in options.by.split(",")]
        rows, repeats = fold(runs, keep_seed="seed" in by)
        warnings += [f"runs left out, as a later one has the same settings and seed: {repeats}"] * (repeats > 0)
    columns = columns_of(rows, by)
    if options.sort is not None:
        valid = {*columns, *(key for row in rows for key in (*row.settings, *row.results))}
        shown = [HEADINGS.get(key, key) for key in columns] + get_close_matches(options.sort, sorted(valid))
        key = key_named("--sort", options.sort, valid, list(dict.fromkeys(shown)))
        columns += [key] * (key not in columns)
    rows = sort(rows, key)
    if options.csv is not None:
        extra = ["sd"] if by else (key for row in rows for key in row.results)
        write(options.csv, rows, list(dict.fromkeys([*columns, *extra, *own_settings(rows)])), folded=bool(by))
    for warning in warnings:
        print(f"lipexp: {warning}", file=sys.stderr)
    if options.csv != "-":
        show(runs, rows, columns, by)


def read(folders: Sequence[str]) -> tuple[list[Row], list[str]]:
    """The runs at or under `folders`, in the order of their paths, and a warning for each that is unreadable."""
    for folder in folders:
        if not os.path.isdir(folder):
            raise ConfigError("FOLDER", folder, "is no folder" if os.path.exists(folder) else "does not exist")
    rows, unreadable = [], []
    for run in find([Path(folder).resolve() for folder in folders]):  # resolved: a run given twice counts once
        try:
            rows.append(read_run(run))
        except (OSError, ValueError) as error:
            file = "metrics.json" if run.complete else "failed.json"
            unreadable.append(f"{run.path / file} cannot be read ({error})")
    if not rows:
        reasons = unreadable or ["no run found there (a run has metrics.json or failed.json)"]
        raise ConfigError("FOLDER", ", ".join(folders), reasons[0])
    return rows, [f"{line}, left out" for line in unreadable]


def read_run(run: RunFolder) -> Row:
    """One run as a row; OSError or ValueError for a metrics.json or failed.json that is not whole."""
    content: object = run.metrics() if run.complete else run.failure()
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    settings = {key: as_text(value) for key, value in run.settings().items()}
    if not settings:  # then nobody can say that it differs from another run only in its seed
        settings["run"] = str(run.path)
    return Row(settings, flat(content) | {"run": str(run.path), "status": "ok" if run.complete else "failed"})


def as_text(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)


def number(value: Any) -> float | None:
    """`value`, or the number that a setting spells, if it is finite."""
    with suppress(TypeError, ValueError, OverflowError):
        return float(value) if math.isfinite(float(value)) and not isinstance(value, bool) else None
    return None


def fold(runs: Sequence[Row], keep_seed: bool) -> tuple[list[Row], int]:
    """One row for the runs that share all settings but the seed, and how many repeat another's seed."""
    groups: dict[tuple[tuple[str, str], ...], list[Row]] = {}
    for run in runs:
        shared = tuple(sorted(item for item in run.settings.items() if item[0] != "seed" or keep_seed))
        groups.setdefault(shared, []).append(run)
    rows, repeats = [], 0
    for shared, members in groups.items():
        finished = [run for run in members if not run.failed]
        # The same seed trains the same network: counted twice, it would make the spread too small.
        distinct = list({run.settings.get("seed", id(run)): run for run in finished}.values())
        repeats += len(finished) - len(distinct)
        rows.append(Row(dict(shared), {**summary(distinct), "failed": len(members) - len(finished)}))
    return rows, repeats


def summary(runs: Sequence[Row]) -> dict[str, Any]:
    """The results of finished runs as one: the largest bounds, the mean of every other number, and its spread."""
    keys = dict.fromkeys(key for run in runs for key in run.results)
    numbers = {key: [n for run in runs if (n := number(run.results.get(key))) is not None] for key in keys}
    results: dict[str, Any] = {key: fmean(values) for key, values in numbers.items() if values}
    results |= {key: max(numbers.get(key, []), default=None) for key in (MEASURED, CERTIFIED, TARGET)}
    results |= {key: ", ".join(sorted({str(run.results.get(key, "")) for run in runs})) for key in (Q, VERDICT)}
    metric = next((metric for metric in METRICS if numbers.get(metric)), None)
    scores = numbers[metric] if metric else []
    worst = (min if metric and METRICS[metric] else max)(scores, default=None)
    spread = {"n": len(scores), "sd": stdev(scores) if len(scores) > 1 else None, "worst": worst}
    return results | spread | {"status": "ok" if runs else "failed"}


def own_settings(rows: Sequence[Row]) -> list[str]:
    """The settings with values of their own: not the class behind an option, nor a "${lipschitz}"."""
    keys = dict.fromkeys(key for row in rows for key, value in row.settings.items() if "${" not in value)
    return [key for key in keys if not key.endswith("_target_")]


def columns_of(rows: Sequence[Row], by: Sequence[str]) -> list[str]:
    """The columns, before those are dropped that are the same in every row."""
    keys = dict.fromkeys(key for row in rows for key in row.settings)
    varying = [key for key in keys if distinguishes(key, rows)]
    if by:
        return list(dict.fromkeys([*by, *CHOICES, "lipschitz", *varying, *FOLDED]))
    return list(dict.fromkeys(["run", *CHOICES, "seed", "lipschitz", *varying, *PLAIN]))


def distinguishes(key: str, rows: Sequence[Row]) -> bool:
    """Whether the setting says more than its group's option, which alone decides that there is an act.n_groups."""
    group, dot, _ = key.partition(".")
    seen: dict[str, set[str]] = {}  # option -> the values met with it
    for row in rows:
        seen.setdefault(row.settings.get(group, "") if dot else "", set()).add(row.settings.get(key, ""))
    known = set().union(*seen.values()) - {""}
    return any(len(values) > 1 for values in seen.values()) or (len(known) > 1 and not key.endswith("_target_"))


def key_named(option: str, name: str, valid: Collection[str], shown: Sequence[str]) -> str:
    """The key that the user calls `name`: itself, or by its heading; a ConfigError lists `shown`."""
    for key in (name, *(key for key, heading in HEADINGS.items() if heading == name)):
        if key in valid:
            return key
    raise ConfigError(option, name, no_such("key", name, shown))


def sort(rows: Sequence[Row], key: str | None) -> list[Row]:
    """Failed rows last; the others by `key`, or best first by their metric, classification before regression."""

    def place(row: Row, key: str) -> tuple[int, float, str]:  # numbers, then words, then blanks
        value = number(row.get(key))
        if value is None:
            return (2, 0, "") if row.get(key) is None else (1, 0, str(row.get(key)))
        metric = next((metric for metric in METRICS if metric in row.results), "") if key == "worst" else key
        best_is_high = METRICS.get(metric, metric.endswith("accuracy"))
        return 0, -value if best_is_high else value, ""

    return sorted(rows, key=lambda row: (row.failed, *(place(row, each) for each in ([key] if key else METRICS))))


def show(runs: Sequence[Row], rows: Sequence[Row], columns: Sequence[str], by: Sequence[str]) -> None:
    """Print the table, with what is the same in every row above it."""
    root = os.path.commonpath([os.path.dirname(run.results["run"]) for run in runs])
    print(f"{len(runs)} run{'s'[: len(runs) > 1]} under {root}, {sum(run.failed for run in runs)} failed")
    table = Table(show_edge=False, box=None, pad_edge=False)
    cells, same = {}, []
    for key in columns:
        heading = f"{FOLDED_AS[key] if by and key in FOLDED_AS else ''} {HEADINGS.get(key, key)}".strip()
        texts = [cell(row, key, root) for row in rows]
        mute = key in PLAIN[:-1]  # failed runs have no say about results
        said = [text for row, text in zip(rows, texts, strict=True) if not (mute and row.failed)]
        if key not in ("run", *by) and len(set(said)) == 1 and (len(said) > 1 or key in rows[0].settings):
            same += [f"{heading}={said[0]}"] * bool(said[0])
        elif any(texts):
            cells[key] = texts
            words = any(row.get(key) is not None and number(row.get(key)) is None for row in rows)
            table.add_column(Text("\n".join(heading.split())), justify="left" if words else "right")
    print("  ".join(same))
    for row in zip(*cells.values(), strict=True):
        table.add_row(*map(Text, row))
    # As wide as it needs: a terminal that is too narrow breaks the lines, where rich would crop the numbers.
    console = Console(width=100_000, color_system=None)
    with console.capture() as captured:
        console.print(table)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))


def cell(row: Row, key: str, root: str) -> str:
    """What stands in the table: settings in full, numbers rounded, bounds to their safe side."""
    value = row.get(key)
    if key == "run" and value is not None:
        return os.path.relpath(value, root)
    if key == "status" and row.failed and row.get("reason"):
        return f"failed: {' '.join(str(row.get('reason')).split())}"
    if not isinstance(value, float):
        return "" if value is None else str(value)
    if key == MEASURED:
        return below(value)
    if key == CERTIFIED:
        return above(value, number(row.get(TARGET)))
    spread = row.results.get("sd") if key in METRICS else None
    rounded = f"{value:#.4g}" if key in (*METRICS, "worst") else f"{value:.4g}"
    return rounded if spread is None else f"{rounded} ± {spread:.2g}"


def write(file: str, rows: Sequence[Row], columns: Sequence[str], folded: bool) -> None:
    """Write the rows as CSV to `file`, all or nothing; `-` is standard output."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow([f"{key}.{FOLDED_AS[key]}" if folded and key in FOLDED_AS else key for key in columns])
    table.writerows([row.get(key) for key in columns] for row in rows)
    if file == "-":
        print(text.getvalue(), end="")
        return
    path = Path(file).resolve()
    if path.exists() and not path.is_file():  # a rename would put a file in the place of /dev/null
        raise ConfigError("--csv", file, "must be a file, or - for standard output")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text.getvalue(), encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ConfigError("--csv", file, f"cannot be written: {error.strerror}") from None
    print(f"CSV written to {path}")
