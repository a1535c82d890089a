"""The verb `figures`: the pictures of the README and of a paper, each with the claims that it illustrates.

A figure is a `Story`: experiments that `lipexp train -m experiment=…` trains, a drawing that reads their run
folders, and claims that are judged on the same runs. style.py is the look of all, claims.py holds all thresholds.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

from lipexp.arguments import Parser
from lipexp.config import ConfigError, no_such
from lipexp.tables import FORMATS, pasted

if TYPE_CHECKING:
    from lipexp.figures.story import Story
    from lipexp.screen import Screen

OUTPUT = Path("outputs/figures")

# name -> the module that draws it
FIGURES = {
    "absolute-value": "absolute_value",
    "two-moons-bce": "two_moons",
    "two-moons-hinge": "two_moons",
    "two-moons": "two_moons",
    "any-lipschitz": "any_lipschitz",
    "attenuation": "attenuation",
    "margins": "margins",
    "groupsort": "groupsort",
    "optimum": "optimum",
    "compare": "compare",
}
LONG = ("compare",)  # which are drawn only when they are named

HELP = f"""\
NAME is one of {", ".join(FIGURES)}; none means all but compare, which compares all
constraints with all activations and takes half an hour.

Pictures (PNG and SVG) and claims.json go to {OUTPUT}, the runs they are drawn from to {OUTPUT / "runs"}. Runs that
are there already are used again. The exit status is 1 if a claim does not hold."""


def main(arguments: Sequence[str]) -> int:
    """Run `lipexp figures`; returns the exit status: 0, 1 for a broken claim or a failed run, 2."""
    parser = Parser("lipexp figures")
    parser.description = "Draw figures from runs, training what is missing, and check the claims that they make."
    parser.epilog = HELP
    parser.add_argument("names", metavar="NAME", nargs="*", help="what to draw (default: all)")
    parser.add_argument(
        "--format", choices=FORMATS, help=f"print the table of compare alone: {', '.join(FORMATS)}"
    )
    parser.add_argument(
        "--fresh", action="store_true", help="train anew; earlier runs are kept beside the new ones"
    )
    try:
        options = parser.parse_args(arguments)
        for name in options.names:
            if name not in FIGURES:
                raise ConfigError("NAME", name, no_such("figure", name, list(FIGURES)))
        if options.format and options.names != ["compare"]:
            raise ConfigError("--format", options.format, "is for the figure compare alone")
        names = [name for name in FIGURES if name not in LONG]
        return draw_all(list(dict.fromkeys(options.names)) or names, options.fresh, options.format)
    except SystemExit as stop:  # argparse has said what it had to say
        return stop.code if isinstance(stop.code, int) else 0
    except ConfigError as error:
        print(f"lipexp: {error}", file=sys.stderr)
        return 2


def draw_all(names: Sequence[str], fresh: bool, form: str | None = None) -> int:
    """Train, draw and judge the figures `names`; returns the exit status.

    Args:
        form: print the table alone, in this one of tables.FORMATS.
    """
    from lipexp.screen import Screen

    screen = Screen()
    trained: set[str] = set()
    broken = 0
    for name in names:
        started = time.perf_counter()
        story = _story(name)
        for experiment in story.experiments:
            if experiment not in trained:
                from lipexp.figures.experiments import train

                with redirect_stdout(sys.stderr if form else sys.stdout):  # the table shall stand alone
                    status = train(experiment, OUTPUT / "runs" / experiment, fresh)
                if status:
                    print(f"lipexp: {name}: not drawn, experiment={experiment} has not finished", file=sys.stderr)
                    return status
                trained.add(experiment)
        broken += _draw(name, story, screen, form)
        if form is None:
            screen.show(f"{time.perf_counter() - started:.1f} seconds\n")
    if broken:
        print(f"lipexp: {broken} claims do not hold (see {OUTPUT / 'claims.json'})", file=sys.stderr)
    return 1 if broken else 0


def _story(name: str) -> Story:
    stories: dict[str, Story] = importlib.import_module(f"lipexp.figures.{FIGURES[name]}").STORIES
    return stories[name]


def _draw(name: str, story: Story, screen: Screen, form: str | None) -> int:
    """Draw one figure from finished runs, print and write its verdicts; returns how many claims do not hold."""
    from dataclasses import replace

    from lipexp.figures import claims, style
    from lipexp.figures.experiments import read

    with screen.waiting(f"drawing {name}"), style.look():
        runs = {experiment: read(OUTPUT / "runs" / experiment) for experiment in story.experiments}
        files = style.save(story.draw(runs), OUTPUT / name)
        verdicts = [claims.bound_verdict(list(runs.values()))] if runs else []
        verdicts = [replace(verdict, figure=name) for verdict in verdicts + story.judge(runs)]
        summary = None if story.summary is None else story.summary(runs)
    claims.write(OUTPUT / "claims.json", verdicts)
    if summary is not None and form is not None:
        print(pasted(form, summary.full))
    else:
        screen.show(f"  {'  '.join(str(file) for file in files)}", bold=name)
        if summary is not None:
            screen.show(summary.short, *summary.sentences)
        screen.show(claims.table(verdicts))
    return sum(not verdict.holds for verdict in verdicts)
