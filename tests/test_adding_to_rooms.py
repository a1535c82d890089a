"""lipexp/README.md, on adding members to the rooms: its classes, files and commands, as they stand there."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import lipexp as package

PAGE = (Path(package.__file__).parent / "README.md").read_text()
SMALL = ["experiment=debug", "device=cpu", "steps=40"]


def write_files(folder: Path) -> None:
    """The files that the page shows, each under the name in its heading."""
    for name, content in re.findall(r"^## (\S+\.(?:py|yaml))\n\n```\w+\n(.*?)```", PAGE, flags=re.S | re.M):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


def test_the_page_works_as_it_stands(lipexp, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "my_rooms", raising=False)
    write_files(tmp_path)
    lines = PAGE.rpartition("## The commands")[2].splitlines()
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("lipexp ")]
    assert [command[0] for command in commands] == [
        "check",
        "train",
        "train",
        "train",
        "certify",
        "export",
        "report",
    ]
    for command in commands:
        sweeping = ["hydra.launcher.executor=inline"] * ("-m" in command)
        result = lipexp(*command, *(SMALL + sweeping if command[0] == "train" else []))
        assert (result.code, result.err) == (0, ""), result
        if command[0] == "check":
            assert "BROKEN" not in result.out
            assert result.out.count("holds") > 20
    runs = sorted(tmp_path.glob("rings/*/metrics.json"))
    assert len(runs) == 4
    for run in runs:
        metrics = json.loads(run.read_text())
        assert metrics["lipschitz"]["verdict"] == metrics["certify"]["lipschitz"]["verdict"] == "PASS"
        assert metrics["lipschitz"]["method"] == "exact"  # so the declarations of the activation are used
        assert metrics["certify"]["attack"]["flips_inside"] == 0
    assert (tmp_path / "rings" / "sweep.csv").read_text().count("\n") == 5


def test_a_run_of_foreign_classes_is_not_certified_without_trust(lipexp, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "my_rooms", raising=False)
    write_files(tmp_path)
    assert lipexp("train", "-cd", "my_conf", "act=pairs", *SMALL, "hydra.run.dir=run").code == 0
    refused = lipexp("certify", "run")
    assert refused.code == 2
    assert "--trust" in refused.err
    assert refused.err.count("\n") == 1
