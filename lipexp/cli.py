"""The command `lipexp`: verbs -> modules. Each is imported only when it is called, so help is instant."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import signal
import sys
from itertools import pairwise

from lipexp.process import ENDED, Terminated, begin_work, legible_output, silence, starting

# verb -> (module, what it does); each module has main(arguments) -> exit status
VERBS = {
    "train": ("lipexp.hydra_app", "train a network, or sweep over configurations with -m"),
    "certify": ("lipexp.certification", "prove the bounds of finished runs again, and try to refute them"),
    "predict": ("lipexp.predict", "predict the rows of a table, each with its certified radius"),
    "export": ("lipexp.export", "write a run as one file for torch, TorchScript or ONNX, which needs no lipexp"),
    "report": ("lipexp.report", "one table of the runs under outputs/"),
    "figures": ("lipexp.figures", "draw the figures of the README, and check the claims they make"),
    "check": ("lipexp.check", "test the classes behind a configuration against the laws of their rooms"),
    "bench": ("lipexp.bench", "speed against other implementations, and accuracy on real data"),
}


def main() -> int:
    """Run one verb; returns the exit status: 0, 1 a run failed, 2 bad input, 130 interrupted, 143 terminated."""
    legible_output()
    try:
        status = _main(sys.argv[1:])
        sys.stdout.flush()
        return status
    except KeyboardInterrupt as error:
        number = signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT
        print(f"lipexp: {ENDED[number]}", file=sys.stderr)
        return 128 + number
    except OSError as error:
        silence(sys.stdout)  # it cannot be written; or its reader has gone, as in `lipexp report | head`
        if not isinstance(error, BrokenPipeError):
            print(f"lipexp: {error}", file=sys.stderr)
        return 1


def _main(arguments: list[str]) -> int:
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
    with starting():
        module = importlib.import_module(VERBS[verb][0])
        if verb not in ("train", "figures"):  # these two call it themselves, once everything is imported
            begin_work()
        return int(module.main(arguments))


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
  lipexp train dataset=table dataset.path=heart.csv dataset.target=disease
  lipexp predict outputs/2026-01-31/12-00-00-000000 new.csv -o predictions.csv

lipexp VERB --help says more."""


def _complete(arguments: list[str]) -> int:
    """Completion: Hydra's shell scripts call `lipexp -sc query=SHELL` with the line so far in COMP_LINE."""
    line = os.environ.get("COMP_LINE", "")
    words = line.split()
    if not any(argument.startswith("query=") for argument in arguments):
        return _run("train", arguments)
    typed = "" if line.endswith(" ") else words.pop()
    if len(words) < 2:
        print(" ".join(VERBS))
        return 0
    if words[1] != "train" or typed.startswith("-"):
        return 0
    # Hydra knows no verbs, and reads only overrides that are plain words and no flags between them.
    overrides = [word for word in words[2:] if "=" in word and word[0] not in "-'\""]
    sweep = ["-m"] if {"-m", "--multirun"} & set(words) else []
    os.environ["COMP_LINE"] = " ".join(["lipexp", *sweep, *overrides, typed])
    folders = [pair for pair in pairwise(words) if pair[0] in ("-cd", "--config-dir")]
    with contextlib.redirect_stderr(io.StringIO()):  # nothing but words may appear in the line that is typed
        _run("train", [*(folders[-1] if folders else ()), *arguments])
    return 0
