"""The command line of the verbs that are no Hydra application."""

from __future__ import annotations

import argparse
import textwrap
from typing import NoReturn


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

    def error(self, message: str) -> NoReturn:
        """One line, without the usage."""
        self.exit(2, f"lipexp: {message} ({self.prog} --help says more)\n")
