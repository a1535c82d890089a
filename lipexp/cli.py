"""The command `lipexp`: verbs -> modules. Each is imported only when it is called, so help is instant."""

from __future__ import annotations

import importlib
import os
import sys
from contextlib import suppress

from lipexp.imports import quick_imports
from lipexp.interrupts import INTERRUPTED, ScreenClosed, orderly_interrupts

# verb -> (module, what it does); each module has main(arguments) -> exit status
VERBS = {
    "train": ("lipexp.hydra_app", "train a network, or sweep over configurations with -m"),
    "certify": ("lipexp.certify", "prove the bounds of finished runs again, and try to refute them"),
    "report": ("lipexp.report", "one table of the runs under outputs/"),
    "figures": ("lipexp.figures", "draw the figures of the README, and check the claims they make"),
    "bench": ("lipexp.bench", "speed against other implementations, as ratios measured in one run"),
}

PROCESSES = "hydra.launcher.executor=process"  # a file of conf/ may say so too; that is seen later


def main() -> int:
    """Run one verb; returns the exit status: 0, 1 a run failed, 2 bad input, 130 interrupted."""
    arguments = sys.argv[1:]
    verb = arguments[0] if arguments else "--help"
    if verb in ("-sc", "--shell-completion"):
        return _complete(arguments)
    if verb in ("-h", "--help", "help"):
        print(_usage())
        return 0
    if verb == "--version":
        from lipexp import __version__

        print(f"lipexp {__version__}")
        return 0
    if verb not in VERBS:
        from lipexp.config import no_such

        print(f"lipexp: {verb}: {no_such('command', verb, list(VERBS))}", file=sys.stderr)
        return 2
    return _run(verb, arguments[1:])


def _run(verb: str, arguments: list[str]) -> int:
    try:
        with orderly_interrupts():
            if verb == "train" and PROCESSES in arguments and {"-m", "--multirun"} & set(arguments):
                from lipexp.workers import begin_workers

                with suppress(OSError):  # said when they are certain to be wanted
                    begin_workers()  # their imports take longest
            with quick_imports(keep=True):
                module = importlib.import_module(VERBS[verb][0])
            return int(module.main(arguments))
    except KeyboardInterrupt:  # also while a verb is still being imported
        print("lipexp: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (BrokenPipeError, ScreenClosed):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    finally:
        if workers := sys.modules.get("lipexp.workers"):
            workers.stop_workers()


def _usage() -> str:
    verbs = "\n".join(f"  {verb:<8} {text}" for verb, (_, text) in VERBS.items())
    return f"""lipexp: experiments with Lipschitz neural networks

usage: lipexp VERB ...

{verbs}

  lipexp train                                  two moons, GroupSort, spectral norm 1, hinge loss
  lipexp train loss=bce act=relu lipschitz=3    any setting, as group=option or key=value
  lipexp train -m act=relu,groupsort 'seed=range(8)'
  lipexp train --help                           all groups and settings
  lipexp certify outputs/2026-01-31 --attack
  lipexp report --by act,constraint,loss

lipexp VERB --help says more."""


def _complete(arguments: list[str]) -> int:
    """Completion: Hydra's shell scripts call `lipexp -sc query=SHELL` with the line so far in COMP_LINE."""
    line = os.environ.get("COMP_LINE", "")
    words = line.split()
    if any(argument.startswith("query=") for argument in arguments):
        if len(words) < 2 or (len(words) == 2 and not line.endswith(" ")):
            print(" ".join(VERBS))
            return 0
        if words[1] != "train":
            return 0
        os.environ["COMP_LINE"] = line.replace(" train", "", 1)  # Hydra knows no verbs
    return _run("train", arguments)
