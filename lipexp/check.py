"""The verb `check`: the classes behind a configuration, tested against the laws of their rooms."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig

from lipexp.arguments import Parser
from lipexp.config import GROUPS, ConfigError, conf_dir, content, one_line
from lipexp.explain import explain
from lipexp.gate import checked_overrides
from lipexp.hydra_app import register_schemas
from lipexp.process import cpu_threads
from lipexp.screen import Screen

HELP = """\
OVERRIDE is what `lipexp train` takes, such as act=mine. Groups that are named are checked, and how the whole
configuration trains; without any, all groups.

exit status: 0; 1 if a law is broken; 2 for bad input

example: lipexp check -cd my_conf act=mine"""


def main(arguments: Sequence[str]) -> int:
    """Run `lipexp check`; returns the exit status."""
    parser = Parser("lipexp check")
    parser.description = "Test the classes behind a configuration against the laws of their rooms."
    parser.epilog = HELP
    parser.add_argument("overrides", metavar="OVERRIDE", nargs="*", help="as `lipexp train` takes them")
    parser.add_argument("-cd", "--config-dir", metavar="DIR", help="a folder with options of your own")
    sys.path.append(os.getcwd())  # a user's own class lies where they work
    try:
        options = parser.parse_intermixed_args(arguments)
        content, choices = composed(options.overrides, options.config_dir)
        with cpu_threads(1):
            return check(content, choices, named(options.overrides))
    except SystemExit as stop:  # argparse has said what it had to say
        return stop.code if isinstance(stop.code, int) else 0
    except ConfigError as error:
        print(f"lipexp: {error}", file=sys.stderr)
    except Exception as error:  # Hydra may raise anything at bad input
        print(f"lipexp: {explain(error)}", file=sys.stderr)
    return 2


def composed(overrides: Sequence[str], folder: str | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The configuration of `lipexp train` with these overrides, resolved, and the option chosen in each group."""
    register_schemas()
    own = []
    if folder is not None:
        if not Path(folder).is_dir():
            raise ConfigError("--config-dir", folder, "is no folder")
        quoted = str(Path(folder).resolve()).replace("\\", "\\\\").replace("'", "\\'")
        own = [f"hydra.searchpath=['file://{quoted}']"]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        overrides = checked_overrides(overrides, sweep=False)
        config = compose("config", overrides=[*own, *overrides], return_hydra_config=True)
    running: Any = HydraConfig.instance()
    running.cfg = config  # for the resolver `hydra:`
    return content(config), dict(config.hydra.runtime.choices)


def named(overrides: Sequence[str]) -> list[str]:
    """The groups that overrides choose or change; all of them if there is none."""
    keys = {override.lstrip("+").partition("=")[0].partition(".")[0] for override in overrides}
    return [group for group in GROUPS if group in keys] or list(GROUPS)


def check(content: dict[str, Any], choices: dict[str, Any], groups: Sequence[str]) -> int:
    """Call the laws of these groups and of whole runs; print one line each, and return 1 if one is broken."""
    from lipexp.laws import LAWS, Broken, Subject, statement

    try:
        subject = Subject(content, choices)
    except ConfigError:
        raise
    except Exception as error:  # a user's class may raise anything
        raise ConfigError(", ".join(groups), None, f"cannot be built: {one_line(error)}") from None
    broken, screen = 0, Screen()
    for group in (*groups, "run"):
        screen.show(f"{group}={choices[group]}" if group in choices else "the whole run")
        for law in LAWS[group]:
            try:
                reason = law(subject)
                verdict = "holds" if reason is None else "-"
                screen.show(f"  {verdict:<6}  {statement(law)}{f' ({reason})' if reason else ''}")
            except Exception as error:  # a user's class may raise anything
                broken += 1
                screen.show(f"  BROKEN  {statement(law)}")
                screen.show(f"          {error if isinstance(error, Broken) else one_line(error)}")
    if broken:
        print(f"lipexp: {broken} {'law is' if broken == 1 else 'laws are'} broken", file=sys.stderr)
    return int(broken > 0)
