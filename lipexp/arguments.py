"""The command line of the verbs that are no Hydra application."""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from lipexp.config import ConfigError


class _Help(argparse.RawDescriptionHelpFormatter):
    """Paragraphs as wide as the terminal; a line that begins with a space stays as it is."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = (part if "\n " in part else textwrap.fill(part, width) for part in text.split("\n\n"))
        return "\n\n".join(paragraphs)


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line, with exit status 2, and whose help keeps its paragraphs.

    Args:
        prog: as the user types it, such as `lipexp report`.
    """

    def __init__(self, prog: str) -> None:
        super().__init__(prog, formatter_class=_Help, allow_abbrev=False)

    def add_trust(self) -> None:
        """The option --trust of verbs that read run folders."""
        self.add_argument(
            "--trust", action="store_true", help="allow classes from outside lipexp: runs their code"
        )

    def answer(self, arguments: Sequence[str], action: Callable[[argparse.Namespace], int]) -> int:
        """The exit status of `action` on what is parsed; 2 for bad input, which one line on stderr explains."""
        try:
            options = self.parse_intermixed_args(arguments)
            if getattr(options, "trust", False):
                sys.path.append(os.getcwd())  # a user's own class lies where they work, as with `python -m`
            return action(options)
        except SystemExit as stop:  # argparse has said what it had to say
            return stop.code if isinstance(stop.code, int) else 0
        except ConfigError as error:
            print(f"lipexp: {error}", file=sys.stderr)
            return 2

    def error(self, message: str) -> NoReturn:
        """One line, without the usage."""
        self.exit(2, f"lipexp: {message} ({self.prog} --help says more)\n")


def check_output(option: str, name: str, force: bool, read: Sequence[str] = ()) -> None:
    """Refuse an output file before any work is done for it.

    Args:
        force: it may replace a file, but none of those that are read.

    Raises:
        ConfigError: it is there already, is one of `read`, or its folder is not there.
    """
    path = Path(name)
    if path.exists():
        if any(Path(own).exists() and path.samefile(own) for own in read):
            raise ConfigError(option, name, "is the file that is read")
        if not path.is_file():
            raise ConfigError(option, name, "is no file")
        if not force:
            raise ConfigError(option, name, "exists already; --force replaces it")
    if not path.parent.is_dir():
        raise ConfigError(option, name, "lies in no folder that there is")
    if not os.access(path.parent, os.W_OK):
        raise ConfigError(option, name, "lies in a folder that cannot be written to")
