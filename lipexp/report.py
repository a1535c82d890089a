"""The verb `report`: one table of the runs in folders, plain or folded over seeds, on the screen and as CSV.

A run is a row of a DataFrame whose columns are dotted keys: its settings, as text in full, so that different ones
never look alike, and its results. Folding makes one row of the runs that differ only in their seed.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import sys
from collections.abc import Collection, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from rich.table import Table
from rich.text import Text

from lipexp.arguments import Parser
from lipexp.config import ConfigError, conf_dir, no_such
from lipexp.record import Outcome, settings
from lipexp.runs import RunFolder, find, write_file
from lipexp.screen import CONTROL, Screen, Wide
from lipexp.tables import FORMATS, pasted
from lipexp.tasks import METRICS
from lipexp.wording import above, below, count, dataset_name

MEASURED, CERTIFIED, TARGET = "lipschitz.measured", "lipschitz.certified", "lipschitz.target"
Q, VERDICT = "lipschitz.q", "lipschitz.verdict"
CHOSEN = {f"val.{metric}": larger for metric, larger in METRICS.items()}  # by which rows are ordered
TESTED = {f"test.{metric}": larger for metric, larger in METRICS.items()}  # -> larger is better
BEST_HIGH = (
    *(metric for metric, larger in METRICS.items() if larger),
    "r2",
    "radius",
)  # parts of keys end in them
# What the keys of upper bounds, and of lower bounds, end in.
PAIRS = ("robustness.pairs.smallest", "robustness.pairs.largest")
UPPER = (".certified", ".product", ".exact", ".exact_box.value", "robustness.lipschitz", *PAIRS)
LOWER = (".measured", "gradient_norm.max", ".median_radius", ".median_local_radius")
CHOICES = ["dataset", "act", "constraint", "loss"]  # the groups that are columns of every table
UNFINISHED = ["missing", "running"]  # statuses of runs that have neither a result nor a failure
PLAIN = [*CHOSEN, *TESTED, MEASURED, CERTIFIED, Q, VERDICT, "status"]
FOLDED = [*CHOSEN, *TESTED, "n", "worst", MEASURED, CERTIFIED, Q, VERDICT, "failed", *UNFINISHED]
HEADINGS = {"lipschitz": "L"} | {key: key.removeprefix("lipschitz.").replace(".", " ") for key in PLAIN}
SPREAD = "± "  # and the key of a mean: its sample deviation
FOLDED_AS = {**dict.fromkeys([*CHOSEN, *TESTED], "mean"), MEASURED: "max", CERTIFIED: "max"}

HELP = """\
KEYS are groups or settings, such as act,optim.lr; whatever else tells two rows apart follows them.
The best on validation comes first: what is chosen by test scores makes them look better than they are.
KEY is a column or any key of metrics.json, such as gradient_norm.median (of folded rows its mean): accuracies,
scores and radii from the largest, all else from the smallest, failed runs last. What is the same in every row is
named once, above the table; what only the dataset decides, such as the loss that it brings, is left out.
q: the norm of the gradients; measured and certified: a lower and an upper bound on its largest value.
running: a process trains the run; missing: it began, and has neither a result nor a failure.

examples: lipexp report outputs/2026-01-31 --by act,constraint,loss --sort measured --csv seeds.csv
          lipexp report outputs/2026-01-31 --by act,constraint --format latex"""


def main(arguments: list[str]) -> int:
    """Run `lipexp report`; returns the exit status: 0, or 2 for bad input."""
    parser = Parser("lipexp report")
    parser.description = "One table of the runs at or under folders, finished and failed, best first."
    parser.epilog = HELP
    parser.add_argument("folders", metavar="FOLDER", nargs="*", help="where to look (default: outputs)")
    parser.add_argument("--by", metavar="KEYS", help="fold runs that differ only in seed: mean ± sample deviation")
    parser.add_argument("--sort", metavar="KEY", help="sort by this instead of the metric")
    parser.add_argument("--csv", metavar="FILE", help="also write all columns, unrounded; -: print only these")
    parser.add_argument(
        "--format", choices=FORMATS, help="print the table alone, to be pasted: " + ", ".join(FORMATS)
    )
    return parser.answer(arguments, report)


def report(options: argparse.Namespace) -> int:
    """Read, fold, sort, write and show; ConfigError for a folder, key or file that cannot be used. Returns 0."""
    runs, chosen = read(options.folders or ["outputs"])
    # Neither the class behind an option nor what repeats a setting of the run is worth a column by itself.
    repeated = [key for key in chosen if repeats(key, runs)]
    own = [key for key in chosen if key not in repeated and "_target_" not in key]
    rows, by, key = runs, [], None
    if options.by is not None:
        by = [key_named("--by", name.strip(), chosen, own) for name in options.by.split(",")]
        rows = fold(runs, chosen, keep_seed="seed" in by)
    apart = [key for key in chosen if key in rows and key not in repeated and tells_apart(key, rows)]
    columns = unique(by or ["run"], CHOICES, [] if by else ["seed"], ["lipschitz"], apart, FOLDED if by else PLAIN)
    left_out = brought(rows) | {status for status in UNFINISHED if not (runs["status"] == status).any()}
    columns = [key for key in columns if key in by or key not in left_out]
    rows = rows.reindex(columns=unique(rows.columns, columns))
    if options.sort is not None:
        key = key_named("--sort", options.sort, rows.columns, [HEADINGS.get(key, key) for key in columns])
        columns = unique(columns, [key])
    rows = ordered(rows, key)
    if options.csv is not None:
        further = ["sd"] if by else [key for key in rows if key not in chosen]
        table = rows[unique(columns, further, (key for key in own if key in rows))]
        write(options.csv, table.rename(columns={key: f"{key}.{how}" for key, how in FOLDED_AS.items() if by}))
    root = os.path.commonpath([os.path.dirname(run) for run in runs["run"]])
    if options.format is not None and options.csv != "-":
        same, pastable = shown(rows, columns, by, root)
        print(pasted(options.format, pastable, same))
    elif options.csv != "-":
        counts = [f"{(runs['status'] == status).sum()} {status}" for status in ["failed", *UNFINISHED]]
        counts = [text for text in counts if text.endswith("failed") or not text.startswith("0 ")]
        # Printed as it is: a full disk or a reader that has gone ends this command, whose result is the table.
        head = ", ".join([f"{count(len(runs), 'run')} under {root}", *counts])
        for part in (head, *shown(rows, columns, by, root)):
            print("\n".join(map(str, Screen().lines(part))))
    return 0


def read(folders: Sequence[str]) -> tuple[pd.DataFrame, list[str]]:
    """The runs at or under `folders`, in the order of their paths, and which columns are settings."""
    for folder in folders:
        if not os.path.isdir(folder):
            raise ConfigError("FOLDER", folder, "is no folder" if os.path.exists(folder) else "does not exist")
    roots = [Path(folder).resolve() for folder in folders]  # resolved: a run given twice counts once
    begun = {record.parent for root in roots for record in root.rglob(".hydra")}
    found = sorted({run.path for run in find(roots)} | begun)
    rows, chosen, unreadable = [], [], []
    with Screen().waiting("reading the runs") as waiting_for:
        for number, run in enumerate(map(RunFolder, found)):
            waiting_for(f"reading the runs: {number} of {len(found)}")
            outcome = Outcome.of(run)
            if outcome.metrics is None and (run.complete or (outcome.reason and not run.failed)):
                unreadable.append(f"{run}: {outcome.reason}")
                continue
            if outcome.status == "missing" and in_use(run.path):
                outcome.status = "running"
            # Without a record of its settings, nobody can say that a run differs from another only in its seed.
            own = settings(run) or {"folder": str(run)}
            if "dataset" in own:
                own["dataset"] = dataset_name(own["dataset"], own.get("dataset.path"))
            texts = {
                k: v if isinstance(v, str) else json.dumps(v, default=str).removesuffix(".0")
                for k, v in own.items()
            }
            rows.append({"run": str(run)} | outcome.results() | texts)
            chosen.append(texts)
    if not rows:
        reasons = unreadable or ["no run found there (a run has metrics.json or failed.json)"]
        raise ConfigError("FOLDER", ", ".join(folders), reasons[0])
    for line in unreadable:
        print(f"lipexp: {line}; left out", file=sys.stderr)
    return pd.DataFrame(rows, columns=unique(*rows, PLAIN, [TARGET]), dtype=object), unique(*chosen)


def in_use(folder: Path) -> bool:
    """Whether a process trains this run: it holds the lock of its folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(handle)
    return False


def unique(*keys: Any) -> list[str]:
    return list(dict.fromkeys(key for part in keys for key in part))


def fold(runs: pd.DataFrame, chosen: list[str], keep_seed: bool) -> pd.DataFrame:
    """One row for the runs that agree in all settings but the seed: means, but of the bounds the largest."""
    shared = [key for key in chosen if key != "seed" or keep_seed]
    finished = runs["status"] == "ok"
    # The same seed trains the same network: counted twice, it would make the spread too small.
    repeated = finished & runs.duplicated([*chosen, "status"], keep="last")
    if repeated.any():
        text = "runs left out, as a later one has the same settings and seed"
        print(f"lipexp: {text}: {repeated.sum()}", file=sys.stderr)
    words = runs[[Q, VERDICT]].where(finished)
    numbers = runs.drop(columns=[*chosen, Q, VERDICT]).apply(pd.to_numeric, errors="coerce").where(finished)
    counted = ["failed", *UNFINISHED]
    numbers = numbers.assign(status=runs["status"], **{status: runs["status"] == status for status in counted})
    table = pd.concat([runs[shared], words, numbers], axis=1)[~repeated]
    groups = table.groupby(table.groupby(shared, dropna=False, sort=False).ngroup())
    how: dict[str, Any] = dict.fromkeys([*numbers], "mean") | dict.fromkeys([*shared, Q], "first")
    how |= dict.fromkeys([MEASURED, CERTIFIED, TARGET], "max") | dict.fromkeys(counted, "sum")
    how["status"] = lambda statuses: "ok" if (statuses == "ok").any() else statuses.iloc[0]
    how[VERDICT] = lambda verdicts: min(verdicts.dropna(), default=None)  # OPEN, where one is
    scores = groups[list(TESTED)]  # a row has one of them
    worst = scores.agg({metric: "min" if larger else "max" for metric, larger in TESTED.items()}).max(axis=1)
    spread = {"n": scores.count().max(axis=1), "sd": scores.std().max(axis=1), "worst": worst}
    deviations = groups[[key for key in numbers if how[key] == "mean"]].std().add_prefix(SPREAD)
    return pd.concat([groups.agg(how), pd.DataFrame(spread), deviations], axis=1)


def tells_apart(key: str, rows: pd.DataFrame) -> bool:
    """Whether a setting differs between rows; one of a group, between rows that have the same option there."""
    group = key.partition(".")[0]
    alike = rows.groupby(group if group in rows and group != key else lambda _: 0, dropna=False)
    return bool((alike[key].nunique(dropna=False) > 1).any())


def brought(rows: pd.DataFrame) -> set[str]:
    """The settings that differ only because options of `dataset` bring their own, such as the loss."""
    keys: set[str] = set()
    files = {file.stem: file for file in (conf_dir() / "dataset").glob("*.yaml")}
    for option in {*rows.get("dataset", ())} & set(files):
        content = yaml.safe_load(files[option].read_text())
        chosen = (entry for entry in content.get("defaults", []) if isinstance(entry, dict))
        keys |= {*content, *(key.rpartition("/")[2] for entry in chosen for key in entry)} - {"dataset"}
    differing = [key for key in keys & {*rows} if rows[key].nunique(dropna=False) > 1]
    return {key for key in differing if rows.groupby("dataset")[key].nunique(dropna=False).max() == 1}


def repeats(key: str, runs: pd.DataFrame) -> bool:
    """Whether a setting such as loss.lipschitz is everywhere that of the run, among those whose option has it."""
    setting = key.rpartition(".")[2]
    if setting == key or setting not in runs:
        return False
    equal = runs[key] == runs[setting]
    return bool((equal | runs[key].isna()).all()) and not tells_apart(key, runs.assign(**{key: equal}))


def key_named(option: str, name: str, valid: Collection[str], shown: Sequence[str]) -> str:
    """The key that the user calls `name`, itself or its heading; a ConfigError lists `shown` and what is near."""
    for key in (name, *(key for key, heading in HEADINGS.items() if heading == name)):
        if key in valid:
            return key
    raise ConfigError(option, name, no_such("key", name, unique(shown, get_close_matches(name, valid, n=1))))


def ordered(rows: pd.DataFrame, key: str | None = None) -> pd.DataFrame:
    """Failed rows last; the others by `key`, or best first by their metric on validation, which chooses.

    Numbers come before words, and blanks last.
    """
    places: list[Any] = [rows["status"] != "ok"]
    for each in [key] if key else CHOSEN:
        numbers, known = pd.to_numeric(rows[each], errors="coerce"), rows[each].notna()
        best_high: Any = any(part.endswith(BEST_HIGH) for part in each.split("."))
        if each == "worst":
            best_high = rows[[metric for metric, larger in TESTED.items() if larger]].notna().any(axis=1)
        places += [numbers * (1 - 2 * best_high), rows[each].astype(str).where(numbers.isna() & known)]
    table = pd.concat(places, axis=1, ignore_index=True)
    return rows.loc[table.sort_values([*table]).index]


def shown(rows: pd.DataFrame, columns: Sequence[str], by: Sequence[str], root: str = "") -> tuple[str, Table]:
    """What is the same in every row, and the table of all else; `by` are columns that it has in any case."""
    table = Wide(show_edge=False, box=None, pad_edge=False)
    records = rows.astype(object).where(rows.notna(), None).to_dict("records")
    cells, same = [], []
    for key in columns:
        folded = FOLDED_AS.get(key, "mean" if SPREAD + key in rows else "") if "n" in rows else ""
        heading = f"{folded} {HEADINGS.get(key, key)}".strip()
        texts = [cell(row, key, root).translate(CONTROL) for row in records]
        # A failed run that has no result has no say about it.
        said = [
            text for text, ok in zip(texts, rows["status"] == "ok", strict=True) if text or ok or key not in PLAIN
        ]
        if key not in ("run", *by) and len(set(said)) == 1 and (len(said) > 1 or key not in PLAIN):
            same += [f"{heading}={said[0]}"] * bool(said[0])
        elif any(texts):
            cells.append(map(Text, texts))
            words = pd.to_numeric(rows[key], errors="coerce").isna() & rows[key].notna()
            justify: Any = "left" if words.any() else "right"
            table.add_column(Text("\n".join(heading.split())), justify=justify, no_wrap=key != "status")
    for row in zip(*cells, strict=True):
        table.add_row(*row)
    table.repeated = len(by) or 1
    return "  ".join(same), table


def cell(row: dict[Any, Any], key: str, root: str) -> str:
    """What stands in the table: settings in full, numbers rounded, bounds to their safe side."""
    value = row[key]
    if value is None:
        return ""
    if key == "lipschitz" and row[MEASURED] is not None and row[TARGET] is None:
        return ""  # no bound was asked for
    if key == "run":
        return os.path.relpath(value, root)
    if key == "status" and row["reason"]:
        return f"{value}: {' '.join(row['reason'].split())}"
    if not isinstance(value, float):
        return str(value)
    if key.endswith(LOWER):
        text = below(value)
    elif key.endswith(UPPER) or key.startswith("certify.bounds."):
        text = above(value, row[TARGET])
    else:
        text = f"{value:#.4g}" if key in (*CHOSEN, *TESTED, "worst") else f"{value:.4g}"
    spread = row.get(SPREAD + key)
    return text if spread is None else f"{text} ± {spread:.2g}"


def write(file: str, table: pd.DataFrame) -> None:
    """Write the table as CSV to `file`, all or nothing; `-` is standard output."""
    text = table.to_csv(index=False)
    if file == "-":
        print(text, end="")
        return
    path = Path(file).resolve()
    if path.exists() and not path.is_file():  # a rename would put a file in the place of /dev/null
        raise ConfigError("--csv", file, "must be a file, or - for standard output")
    try:
        write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    except OSError as error:
        raise ConfigError("--csv", file, f"cannot be written: {error.strerror}") from None
    print(f"CSV written to {path}")
