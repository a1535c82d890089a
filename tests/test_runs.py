"""The run folder: complete or not, never half-written."""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest

from lipexp.runs import NotFinite, RunFolder, find


def test_metrics_make_a_run_complete_and_a_failure_is_not_a_result(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_failure("the loss is no longer finite", 12)
    assert folder.read_json("failed.json") == {"reason": "the loss is no longer finite", "step": 12}
    assert (folder.complete, folder.failed, folder.ended) == (False, True, True)
    folder.write_json("metrics.json", {})
    assert folder.complete


def test_a_write_that_fails_leaves_the_old_file_and_no_temporary(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_json("metrics.json", {"seed": 1})
    with pytest.raises(NotFinite, match=r"^a\.loss is not finite$"):
        folder.write_json("metrics.json", {"a": {"loss": [[1.0, float("nan")]]}})

    class Figure:
        def savefig(self, path, **kwargs):
            path.write_bytes(b"half a pic")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        folder.write_figure(Figure())
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]
    assert folder.read_json("metrics.json") == {"seed": 1}


def test_a_result_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda *given: (calls.append("fsync"), fsync(*given)))
    monkeypatch.setattr(os, "replace", lambda *given: (calls.append("replace"), replace(*given)))
    RunFolder(tmp_path).write_json("metrics.json", {})
    RunFolder(tmp_path).write_model({})
    assert calls == ["fsync", "replace"] * 2


def test_what_is_torn_is_no_end(tmp_path):
    folder = RunFolder(tmp_path)
    for name in ("metrics.json", "failed.json"):
        folder.write_json(name, {"reason": "no luck", "step": 1})
        assert folder.ended
        for torn in (b"", b'{"reason": "no', b"{" + bytes(100)):
            (tmp_path / name).write_bytes(torn)
            assert not folder.ended
        (tmp_path / name).unlink()


def test_tables_keep_every_digit(tmp_path):
    value = 0.1 + 0.2
    columns = {"x": np.array([value, 1e-300, np.inf]), "name": np.array(["a", "b", "c"])}
    RunFolder(tmp_path).write_columns("columns", columns)
    RunFolder(tmp_path).write_rows("rows", [{"x": value, "y": None}, {"x": 1e-300, "z": 2}])
    assert (tmp_path / "columns.csv").read_text() == "x,name\n0.30000000000000004,a\n1e-300,b\ninf,c\n"
    assert (tmp_path / "rows.csv").read_text() == "x,y,z\n0.30000000000000004,,\n1e-300,,2\n"


def test_only_what_hydra_wrote_is_discarded_and_neighbours_stay(tmp_path):
    run = tmp_path / "date" / "time"
    (run / ".hydra").mkdir(parents=True)
    (run / "train.log").touch()
    (tmp_path / "date" / "other").mkdir()
    RunFolder(run).discard_if_empty()
    assert [path.name for path in (tmp_path / "date").iterdir()] == ["other"]
    RunFolder(tmp_path / "date" / "other").discard_if_empty()
    assert not (tmp_path / "date").exists()
    (run / ".hydra").mkdir(parents=True)
    (run / "notes.txt").write_text("mine")
    RunFolder(run).discard_if_empty()
    assert (run / "notes.txt").read_text() == "mine"


def test_find_returns_finished_and_failed_runs_once_each(tmp_path):
    for name in ("b/metrics.json", "a/failed.json", "c/0/metrics.json", "c/1/model.pt"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    found = find([tmp_path, tmp_path / "c"])
    assert [folder.path.relative_to(tmp_path).as_posix() for folder in found] == ["a", "b", "c/0"]


def test_changes_under_the_lock_at_the_same_time_lose_nothing(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_json("metrics.json", {"count": 0})

    def count() -> None:
        for _ in range(50):
            with folder.locked():
                folder.write_json("metrics.json", {"count": folder.read_json("metrics.json")["count"] + 1})

    threads = [threading.Thread(target=count) for _ in range(3)]
    for act in (threading.Thread.start, threading.Thread.join):
        for thread in threads:
            act(thread)
    assert folder.read_json("metrics.json") == {"count": 150}
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]
