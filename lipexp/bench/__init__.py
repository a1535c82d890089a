"""The verb `bench`: the speed of lipexp against other implementations, and its accuracy against other models."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

from rich.console import Console

from lipexp.arguments import Parser
from lipexp.bench import accuracy, bounds, peers, predict, steps, sweep
from lipexp.config import ConfigError, no_such, whole
from lipexp.process import cpu_threads

SECTIONS = {
    "step": steps.step,
    "activation": steps.activation,
    "commands": steps.commands,
    "sweep": sweep.sweep,
    "accuracy": accuracy.accuracy,
    "peers": peers.peers,
    "predict": predict.predict,
    "bounds": bounds.bounds,
}
DEFAULT = ("step", "activation", "commands")  # the others take minutes

EPILOG = """\
sections:
  step        a train step (batch, forward, loss, backward, optimiser) against a plain torch MLP with ReLU and Adam
  activation  MaxMin, forward and backward, against ReLU
  commands    lipexp --help against an empty Python, lipexp train against its imports
  sweep       runs of a stack against single ones
  accuracy    test scores on real data, against the same network without a bound and scikit-learn's models
  peers       other libraries' bounded networks, against the same ones here: scores, constants, step times
  predict     2 million rows of a table, against pandas alone reading and writing them
  bounds      bounds on the Lipschitz constant of ReLU networks, against those of eclipse-nn

The last five take minutes, so they run only when they are named. A time is CPU time, user and system, unless it
says wall. Targets are aims: missing one is no error."""


def main(arguments: Sequence[str]) -> int:
    """Run `lipexp bench`; returns the exit status: 0, 1 a command failed, 2 bad input."""
    parser = Parser("lipexp bench")
    parser.description = "Speed, as ratios to other implementations measured in the same run; and accuracy."
    parser.epilog = EPILOG
    sections = f"{', '.join(SECTIONS)} (default: {', '.join(DEFAULT)})"
    parser.add_argument("sections", metavar="SECTION", nargs="*", help=sections)
    parser.add_argument("--rounds", metavar="N", type=int, default=30, help="how often each case is timed (30)")
    options = parser.parse_intermixed_args(arguments)
    try:
        whole("--rounds", options.rounds, least=1)
        for section in options.sections:
            if section not in SECTIONS:
                raise ConfigError(section, None, no_such("section", section, list(SECTIONS)))
    except ConfigError as error:
        print(f"lipexp: {error}", file=sys.stderr)
        return 2
    console = Console(highlight=False)
    try:
        with cpu_threads(1):
            for section in dict.fromkeys(options.sections or DEFAULT):
                SECTIONS[section](console, options.rounds)
    except subprocess.CalledProcessError as error:
        said = (error.stderr or "").strip().splitlines()
        print(f"lipexp: {' '.join(error.cmd)}: {said[-1] if said else error}", file=sys.stderr)
        return 1
    return 0
