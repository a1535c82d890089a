"""Tables in files: text with a separator, compressed or not, and Parquet. pandas reads them."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import re
import sys
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from lipexp.config import ConfigError, one_line

if TYPE_CHECKING:
    import pandas as pd

TEXT, PARQUET = (".csv", ".tsv", ".txt"), (".parquet", ".pq")
SEPARATORS = ",;\t|"
TEXT_OPTIONS: Any = {"encoding": "utf-8-sig", "newline": ""}


class Source:
    """A table whose column names are known before its rows are read: a file, or standard input as `-`.

    Text is UTF-8 with the names in its first line. Its separator is the one of comma, semicolon, tab and | that
    this line has most of. Numbers have a decimal point. Empty cells, ? and what pandas takes for one, such as NA,
    are missing values.

    Args:
        option: names the table in error messages, as `dataset.path` or as an argument of a command.

    Raises:
        ConfigError: it cannot be read, or has no column names, or one of them twice.
    """

    def __init__(self, option: str, path: str) -> None:
        self.option, self.path = option, path
        suffix = Path(path.removesuffix(".gz")).suffix.lower()
        if path != "-" and not Path(path).is_file():
            raise ConfigError(option, path, "is no file" if Path(path).exists() else "does not exist")
        if path != "-" and suffix not in (*TEXT, *PARQUET):
            known = ", ".join((*TEXT, *PARQUET))
            raise ConfigError(option, path, f"must end in {known}, or .gz behind one of the first three")
        self._parquet: Any = None
        self._file: IO[bytes] | None = None
        with self._reading():
            if suffix in PARQUET:
                import pyarrow.parquet

                self._parquet = pyarrow.parquet
                schema = self._parquet.read_schema(path)
                index = (schema.pandas_metadata or {}).get("index_columns", [])
                self.names = [str(name) for name in schema.names if name not in index]
            else:
                self._stdin = io.TextIOWrapper(sys.stdin.buffer, **TEXT_OPTIONS) if path == "-" else None
                with self._opened() as text:
                    first = text.readline()
                self.separator = max(SEPARATORS, key=first.count)
                self.names = [name.strip() for name in next(csv.reader([first], delimiter=self.separator), [])]
        if not self.names:
            raise ConfigError(option, path, "is empty, or has an empty first line")
        twice = [name for name, times in Counter(self.names).items() if times > 1]
        if twice:
            raise ConfigError(option, path, f"has the column {twice[0]!r} twice")

    def frames(
        self, columns: Sequence[str], text: Sequence[str] = (), size: int | None = None
    ) -> Iterator[pd.DataFrame]:
        """The rows, in their order, all at once or `size` at a time; standard input has them once.

        Args:
            columns: those that are asked for.
            text: those of them that are not to be taken for numbers: 01 is not 1.
        """
        with self._reading():
            if self._parquet is None:
                yield from (frame[list(columns)] for frame in self._lines(text, size))
                return
            with self._parquet.ParquetFile(self.path) as file:
                batches = (
                    [file.read(list(columns))] if size is None else file.iter_batches(size, columns=list(columns))
                )
                yield from (batch.to_pandas().reset_index(drop=True) for batch in batches)

    def _lines(self, text: Sequence[str], size: int | None) -> Iterator[pd.DataFrame]:
        """All columns of a text, so that a row with too many fields is found."""
        import pandas as pd

        options: dict[str, Any] = {
            "sep": self.separator,
            "header": None,
            "names": self.names,
            "index_col": False,  # else the first of too many fields would silently become an index
            "dtype": dict.fromkeys(text, "str"),
            "na_values": ["?"],
            "skipinitialspace": True,
            "low_memory": False,  # else the type of a column may change on its way down
        }
        with self._opened() as stream, warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)
            if self._stdin is None:
                stream.readline()  # the names
            try:
                found: Any = pd.read_csv(stream, chunksize=size, **options)
            except pd.errors.EmptyDataError:  # there are no rows
                found, size = pd.DataFrame(columns=self.names), None
            yield from [found] if size is None else found

    @contextmanager
    def _opened(self) -> Iterator[IO[str]]:
        """The text; standard input goes on where it was left, and stays open."""
        if self._stdin is not None:
            yield self._stdin
            return
        with open(self.path, "rb") as self._file:
            file: Any = gzip.GzipFile(fileobj=self._file) if self.path.endswith(".gz") else self._file
            with io.TextIOWrapper(file, **TEXT_OPTIONS) as text:
                yield text

    def position(self) -> float | None:
        """The part of the file that has been read, while `frames` goes through it, or None."""
        if self._file is None or self._file.closed:
            return None
        return self._file.tell() / Path(self.path).stat().st_size

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Turns what reading raises into a ConfigError."""
        try:
            yield
        except ConfigError:
            raise
        except UnicodeDecodeError as error:
            byte = f"byte 0x{error.object[error.start]:02x}"
            raise ConfigError(self.option, self.path, f"is not in UTF-8 ({byte}); save it as UTF-8") from None
        except ImportError:
            raise ConfigError(self.option, self.path, "needs pyarrow: pip install 'lipexp[parquet]'") from None
        except OSError as error:
            raise ConfigError(self.option, self.path, f"cannot be read: {error.strerror or error}") from None
        except Warning:  # pandas' own, which says nothing of rows
            raise ConfigError(self.option, self.path, "has rows with more fields than there are columns") from None
        except (ValueError, EOFError, zlib.error, csv.Error) as error:
            # The first line has been read before, so what pandas calls a line is a row here.
            reason = re.sub(r".*Expected (\d+) fields in line (\d+), saw (\d+)", _fields, one_line(error))
            reason = reason.removeprefix("ParserError: Error tokenizing data. C error: ")
            raise ConfigError(self.option, self.path, f"cannot be read: {reason}") from None


def _fields(found: re.Match[str]) -> str:
    expected, row, seen = found.groups()
    return f"row {row} has {seen} fields, but there are {expected} columns"


def sha256(path: str) -> str:
    """Of a file, in hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
