"""The command line of the verbs that are no Hydra application."""

from __future__ import annotations

import argparse
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line, with exit status 2, and whose help keeps its line breaks.

    Args:
        prog: as the user types it, such as `lipexp report`.
    """

    def __init__(self, prog: str) -> None:
        super().__init__(prog, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """One line, without the usage."""
        self.exit(2, f"lipexp: {message} ({self.prog} --help says more)\n")
