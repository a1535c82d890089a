"""The run folder: complete or not, never half-written."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time

import numpy as np
import pytest

from lipexp.runs import RunFolder, find


def test_metrics_make_a_run_complete(tmp_path):
    folder = RunFolder(tmp_path)
    assert not folder.complete
    folder.write_metrics({"seed": 3})
    assert folder.complete
    assert folder.metrics() == {"schema": 1, "seed": 3}


def test_a_failure_is_not_a_result(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_failure("the loss is no longer finite", 12)
    assert folder.failed
    assert not folder.complete
    assert folder.failure() == {"reason": "the loss is no longer finite", "step": 12}


def test_numbers_that_json_has_not_are_refused_and_leave_nothing(tmp_path):
    with pytest.raises(ValueError, match="Out of range float"):
        RunFolder(tmp_path).write_metrics({"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_the_old_file_and_no_temporary(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_metrics({"seed": 1})
    with pytest.raises(TypeError):
        folder.write_metrics({"seed": object()})

    class Figure:
        def savefig(self, path, **kwargs):
            path.write_bytes(b"half a pic")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        folder.write_figure(Figure())
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]
    assert folder.metrics()["seed"] == 1


def test_tables_keep_every_digit(tmp_path):
    value = 0.1 + 0.2
    RunFolder(tmp_path).write_columns("columns", {"x": np.array([value, 1e-300]), "name": np.array(["a", "b"])})
    RunFolder(tmp_path).write_rows("rows", [{"x": value, "y": None}, {"x": 1e-300, "y": 2}])
    for name in ("columns", "rows"):
        with (tmp_path / f"{name}.csv").open(newline="") as file:
            assert [float(row["x"]) for row in csv.DictReader(file)] == [value, 1e-300]
    assert (tmp_path / "columns.csv").read_text().splitlines()[2] == "1e-300,b"
    assert (tmp_path / "rows.csv").read_text().splitlines()[1] == "0.30000000000000004,"


def test_only_what_hydra_wrote_is_discarded(tmp_path):
    run = tmp_path / "date" / "time"
    (run / ".hydra").mkdir(parents=True)
    (run / "train.log").touch()
    RunFolder(run).discard_if_empty()
    assert not (tmp_path / "date").exists()
    (run / ".hydra").mkdir(parents=True)
    (run / "notes.txt").write_text("mine")
    RunFolder(run).discard_if_empty()
    assert (run / "notes.txt").read_text() == "mine"


def test_a_neighbour_keeps_the_date_folder(tmp_path):
    for name in ("first", "second"):
        (tmp_path / "date" / name / ".hydra").mkdir(parents=True)
    RunFolder(tmp_path / "date" / "first").discard_if_empty()
    assert [path.name for path in (tmp_path / "date").iterdir()] == ["second"]


def test_find_returns_finished_and_failed_runs_once_each(tmp_path):
    for name in ("b", "a", "c/0", "c/1"):
        (tmp_path / name).mkdir(parents=True)
    RunFolder(tmp_path / "b").write_metrics({})
    RunFolder(tmp_path / "a").write_failure("reason", 1)
    RunFolder(tmp_path / "c/0").write_metrics({})
    found = find([tmp_path, tmp_path / "c"])
    assert [folder.path.relative_to(tmp_path).as_posix() for folder in found] == ["a", "b", "c/0"]


def test_choices_are_read_from_hydras_record(tmp_path):
    (tmp_path / ".hydra").mkdir()
    record = {"hydra": {"runtime": {"choices": {"act": "relu", "loss": "bce"}}}}
    (tmp_path / ".hydra" / "hydra.yaml").write_text(json.dumps(record))  # JSON is YAML
    assert RunFolder(tmp_path).choices() == {"act": "relu", "loss": "bce"}


WRITER = """
import sys
from pathlib import Path
from lipexp.runs import RunFolder
folder = RunFolder(Path(sys.argv[1]))
print("ready", flush=True)
for turn in range(int(sys.argv[3])):
    for section in (sys.argv[2], "shared"):
        folder.update_metrics(section, lambda old: (old or 0) + 1)
"""


def writer(folder, section, turns):
    """A process that counts in two sections of metrics.json, one of which others count in, too."""
    command = [sys.executable, "-c", WRITER, str(folder), section, str(turns)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_processes_that_update_sections_at_the_same_time_lose_nothing(tmp_path):
    RunFolder(tmp_path).write_metrics({"seed": 3})
    writers = [writer(tmp_path, name, 40) for name in "abc"]
    for one in writers:
        assert one.communicate()[1] == b""
    assert RunFolder(tmp_path).metrics() == {"schema": 1, "seed": 3, **dict.fromkeys("abc", 40), "shared": 120}
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]


def test_a_process_that_is_killed_while_it_updates_leaves_whole_metrics(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_metrics({"seed": 3})
    for turn in range(3):
        one = writer(tmp_path, "a", 10**9)
        one.stdout.readline()
        time.sleep(0.05 + 0.01 * turn)
        one.kill()
        one.communicate()
        found = folder.metrics()
        assert (found["schema"], found["seed"]) == (1, 3)
        assert 0 <= found.get("a", 0) - found.get("shared", 0) <= turn + 1
    folder.update_metrics("b", lambda old: "no lock is left")
    assert folder.metrics()["b"] == "no lock is left"


def test_an_update_that_fails_half_way_leaves_the_folder_as_it_was(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_metrics({"seed": 3})
    before = (tmp_path / "metrics.json").read_bytes()
    with pytest.raises(TypeError):
        folder.update_metrics("certify", lambda old: object())
    assert (tmp_path / "metrics.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]
