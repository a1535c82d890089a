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
from typing import TYPE_CHECKING, Any

from lipexp.config import ConfigError, one_line

if TYPE_CHECKING:
    import pandas as pd

TEXT, PARQUET = (".csv", ".tsv", ".txt"), (".parquet", ".pq")
SEPARATORS = ",;\t"


class Source:
    """A table whose column names are known before its rows are read: a file, or standard input as `-`.

    Text is UTF-8 with the names in its first line. Its separator is the one of comma, semicolon and tab that this
    line has most of. Numbers have a decimal point. Empty cells, ? and pandas' own names, such as NA, are missing
    values.

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
        self._text: io.TextIOWrapper | None = None
        with self._reading():
            if suffix in PARQUET:
                import pyarrow.parquet

                self._file = pyarrow.parquet.ParquetFile(path)
                self.names = [str(name) for name in self._file.schema_arrow.names]
            else:
                self._open()
        twice = [name for name, times in Counter(self.names).items() if times > 1]
        if twice:
            raise ConfigError(option, path, f"has the column {twice[0]!r} twice")

    def _open(self) -> None:
        if self.path == "-":
            stream: Any = sys.stdin.buffer
        else:
            stream = (gzip.open if self.path.endswith(".gz") else open)(self.path, "rb")
        self._text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
        first = self._text.readline()
        if not first.strip():
            raise ConfigError(self.option, self.path, "is empty, or has an empty first line")
        self.separator = max(SEPARATORS, key=first.count)
        self.names = [name.strip() for name in next(csv.reader([first], delimiter=self.separator))]

    def frames(
        self, columns: Sequence[str], text: Sequence[str] = (), size: int | None = None
    ) -> Iterator[pd.DataFrame]:
        """The rows, in their order, all at once or `size` at a time; can be called once.

        Args:
            columns: those to read.
            text: those of them that are not to be taken for numbers: 01 is not 1.
        """
        import pandas as pd

        with self._reading():
            if self._text is None:
                if size is None:
                    yield self._file.read(list(columns)).to_pandas().reset_index(drop=True)
                    return
                for batch in self._file.iter_batches(size, columns=list(columns)):
                    yield batch.to_pandas().reset_index(drop=True)
                return
            options: dict[str, Any] = {
                "sep": self.separator,
                "header": None,
                "names": self.names,
                "usecols": list(columns),
                "index_col": False,  # else the first of too many fields would silently become an index
                "dtype": dict.fromkeys(text, "str"),
                "na_values": ["?"],
                "skipinitialspace": True,
                "low_memory": False,  # else the type of a column may change on its way down
            }
            with warnings.catch_warnings(), self._text:
                warnings.simplefilter("error", pd.errors.ParserWarning)
                try:
                    found: Any = pd.read_csv(self._text, chunksize=size, **options)
                except pd.errors.EmptyDataError:  # there are no rows
                    found = pd.DataFrame(columns=list(columns))
                yield from [found] if size is None else found

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
        except (ValueError, EOFError, zlib.error, csv.Error, Warning) as error:
            # The first line has been read before, so what pandas calls a line is a row here.
            reason = re.sub(r".*Expected (\d+) fields in line (\d+), saw (\d+)", _fields, one_line(error))
            raise ConfigError(self.option, self.path, f"cannot be read: {reason}") from None


def _fields(found: re.Match[str]) -> str:
    expected, row, seen = found.groups()
    return f"row {row} has {seen} fields, but there are {expected} columns"


def sha256(path: str) -> str:
    """Of a file, in hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
