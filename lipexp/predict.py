"""The verb `predict`: what a finished run says of the rows of a table, read and written piece by piece."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import pandas as pd

from lipexp.arguments import Parser, check_output
from lipexp.config import ConfigError, no_such, whole
from lipexp.datasets.files import Source
from lipexp.datasets.preprocessing import CATEGORY, listed
from lipexp.loading import load_run
from lipexp.prediction import Predictor
from lipexp.process import cpu_threads
from lipexp.runs import write_file
from lipexp.screen import Screen
from lipexp.wording import above

ROWS = 2**16  # that are read, predicted and written at a time ...
NUMBERS = 2**23  # ... fewer where a layer is wide, since rows x features numbers are held, several times over

HELP = """\
RUN is the folder of a finished run. FILE is a table with the columns that it was trained on, as .csv, .tsv or
.txt (also .gz) or .parquet, or - for standard input; for a run on other data the columns are x0, x1, … as in
gradients.csv. A target is not needed. Rows keep their order, and an index in a first column without a name is
copied. Messages count rows from 1, without the line of names.

What is written of a classifier: prediction, the class; runner_up, of more than two classes the one that comes
second; score, of two classes f, which is positive for the second one in sorted order, and of more the margin
between the first two; radius: the prediction holds for every point within it, in the norm of the constraint, after
preprocessing; with --reach, reach:age and so on. Of a regression: prediction, in the unit of the target; --reach
says on the screen how much each column can change it.

exit status: 0; 2 for bad input, which leaves no output file

example: lipexp predict outputs/2026-01-31/12-00-00-000000 new.csv -o predictions.csv --keep id --reach"""


def main(arguments: Sequence[str]) -> int:
    """Run `lipexp predict`; returns the exit status."""
    parser = Parser("lipexp predict")
    parser.description = "Predict the rows of a table with a finished run."
    parser.epilog = HELP
    parser.add_argument("run", metavar="RUN", help="a run's folder")
    parser.add_argument("file", metavar="FILE", help="a table, or - for standard input")
    parser.add_argument("-o", "--output", metavar="FILE", default="-", help="CSV (default: standard output)")
    parser.add_argument("--keep", metavar="COL,…", default="", help="columns to copy, such as that of an index")
    parser.add_argument(
        "--reach",
        action="store_true",
        help="also how far each column of numbers may change alone, in its own unit",
    )
    parser.add_argument(
        "--on-error",
        choices=["refuse", "mark"],
        default="refuse",
        help="mark: a row that cannot be predicted has the reason in a column `error` (default: refuse)",
    )
    parser.add_argument("--force", action="store_true", help="replace an output file that exists")
    parser.add_trust()
    return parser.answer(arguments, predict)


def predict(options: argparse.Namespace) -> int:
    """Write what the run says of the rows; returns the exit status, 0.

    Raises:
        ConfigError: bad input; then there is no new file.
    """
    output = Path(options.output)
    if output.suffix.lower() not in ("", ".csv", ".txt"):
        raise ConfigError("-o", output, "must end in .csv, which is what is written")
    if options.output != "-":
        check_output("-o", options.output, options.force, read=[options.file])
    run = load_run(options.run, trust=options.trust)
    predictor, source = run.predictor, Source("FILE", options.file)
    pieces = predictions(predictor, source, options)
    screen = Screen(stderr=True)
    regression = predictor.preprocessing.task == "regression"
    if predictor.reason is not None and (options.reach or not regression):
        screen.show(f"no {'constant is proven' if regression else 'radii'}: {predictor.reason}")
    if options.reach and regression:
        for target, slopes in predictor.slopes().items():
            for column, slope in slopes.items():
                screen.show(f"{target} changes by at most {above(slope, None)} per unit of {column}")
    on_terminal = options.output == "-" and sys.stdout.isatty()  # where a bar would stand among the rows
    quiet = Screen(file=io.StringIO()) if on_terminal else screen
    with (
        cpu_threads(whole("threads", run.config.get("threads", 1), least=1)),
        quiet.progress(output_is_result=True) as progress,
    ):
        task = progress.add_task("rows", total=None)

        def write(stream: IO[str]) -> None:
            done = 0
            for piece in pieces:
                piece.to_csv(stream, index=False, header=done == 0, lineterminator="\n")
                done += len(piece)
                part = source.position()
                # How many there are is only known from the part of the file that they have taken so far.
                progress.update(
                    task, completed=done, total=done / part if part else None, live="" if part else done
                )

        if options.output == "-":
            write(sys.stdout)
            return 0
        try:
            write_file(output, lambda path: _write_text(path, write))
        except OSError as error:
            raise ConfigError("-o", output, f"cannot be written: {error.strerror or error}") from None
    return 0


def _write_text(path: Path, write: Any) -> None:
    with path.open("w", encoding="utf-8", newline="") as stream:
        write(stream)


def predictions(predictor: Predictor, source: Source, options: argparse.Namespace) -> Iterator[pd.DataFrame]:
    """The rows of the output, piece by piece; what is wrong with the columns is said before the first.

    Raises:
        ConfigError: a column is missing, or a row cannot be predicted.
    """
    columns = predictor.preprocessing.columns
    keep = [name for name in options.keep.split(",") if name]
    for option, names in (("FILE", [column.name for column in columns]), ("--keep", keep)):
        for name in names:
            if name not in source.names:
                guess = no_such("column", name, source.names).partition(" (")[0].removeprefix("no such column")
                known = f"{guess} (there are {listed(source.names)})"
                if option == "--keep":
                    raise ConfigError(option, name, f"is no column of {source.path}{known}")
                raise ConfigError(option, source.path, f"has no column {name!r}{known}")
    if source.names[0] == "":  # an index, as pandas writes it
        keep.insert(0, "")
    text = [*keep, *(column.name for column in columns if column.kind == CATEGORY)]
    widest = max(predictor.network.n_inputs, *predictor.network.hidden_widths)
    needed = list(dict.fromkeys([*keep, *(column.name for column in columns)]))
    return _pieces(predictor, source.frames(needed, text, max(1, min(ROWS, NUMBERS // widest))), keep, options)


def _pieces(
    predictor: Predictor, frames: Iterator[pd.DataFrame], keep: Sequence[str], options: argparse.Namespace
) -> Iterator[pd.DataFrame]:
    before = 0
    for frame in frames:
        points, wrong = predictor.preprocessing.encoded(frame)
        for row in sorted(wrong)[: options.on_error == "refuse"]:
            raise ConfigError("FILE", options.file, f"row {before + row + 1}, {wrong[row]}")
        before += len(frame)
        if wrong:
            right = np.setdiff1d(np.arange(len(frame)), list(wrong))
            found = predictor.of_points(points[right], options.reach).set_axis(right).reindex(range(len(frame)))
        else:
            found = predictor.of_points(points, options.reach)
        if options.on_error == "mark":
            found["error"] = pd.Series(wrong, dtype=object)
        yield pd.concat([frame[list(keep)].reset_index(drop=True), found], axis=1)
