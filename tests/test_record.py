"""metrics.json is read back as it was written, and what is not it is refused; a run as a row."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest

from lipexp.record import Bound, Certification, Metrics, Monotone, Outcome, certify, numeric_keys, settings
from lipexp.runs import RunFolder


@pytest.fixture
def folder(trained_run, tmp_path):
    """A folder with the metrics of a finished run, and nothing else."""
    shutil.copy(trained_run() / "metrics.json", tmp_path)
    return RunFolder(tmp_path)


def change(folder: RunFolder, **values: object) -> None:
    folder.write_json("metrics.json", folder.read_json("metrics.json") | values)


def test_metrics_are_read_as_they_were_written(folder, trained_run, tmp_path):
    for run in (folder, RunFolder(trained_run("dataset=absolute_value"))):
        written = run.read_json("metrics.json")
        assert written["schema"] == 5
        Metrics.read(run).write(folder)
        assert folder.read_json("metrics.json") == written


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"schema": 1}, "its schema is 1, this lipexp reads 5: train it again"),
        ({"lipschitz": {}}, "Interval lacks 'p'"),
        ({"lipschitz": [1]}, r"Interval must be an object, not \[1\]"),
        ({"more": 1}, "Metrics does not know 'more'"),
        ({"seed": "0"}, "Metrics.seed must be a whole number, not '0'"),
        ({"test": {"loss": True}}, "Metrics.test must be a finite number, not True"),
        ({"test": {"loss": 1e999}}, "Metrics.test must be a finite number, not inf"),
        ({"train": [1]}, r"Metrics.train must be a list or an object, not \[1\]"),
    ],
)
def test_what_is_no_such_record_is_refused_in_one_line(folder, values, reason):
    (folder.path / "metrics.json").write_text(json.dumps(folder.read_json("metrics.json") | values))
    with pytest.raises(ValueError, match=f"^metrics.json cannot be read: {reason}$"):
        Metrics.read(folder)
    assert Outcome.of(folder).status == "failed"
    assert Outcome.of(folder).reason.startswith("metrics.json cannot be read: ")


@pytest.mark.parametrize(
    ("key", "value"), [("q", 3), ("q", True), ("verdict", "FINE"), ("exact_box", {"value": 1})]
)
def test_what_an_interval_is_printed_from_is_checked(folder, key, value):
    change(folder, lipschitz=folder.read_json("metrics.json")["lipschitz"] | {key: value})
    assert "metrics.json cannot be read: " in Outcome.of(folder).reason


def test_a_certificate_keeps_what_an_earlier_one_found_about_the_same_model(folder):
    def found(digest: str, bound: str, attack: dict[str, int] | None) -> Certification:
        interval = Metrics.read(folder).lipschitz
        return Certification(digest, False, interval, {bound: Bound(1.0, None, True)}, [], {}, None, None, attack)

    certify(folder, found("a", "one", {"points": 3}))
    certify(folder, found("a", "two", None))
    both = Metrics.read(folder).certify
    assert (list(both.bounds), both.attack) == (["one", "two"], {"points": 3})
    certify(folder, found("b", "two", None))
    assert Metrics.read(folder).certify == found("b", "two", None)


def test_what_an_attack_on_a_monotone_network_found_stays_until_the_model_changes(folder):
    def found(digest: str, violations: int | None) -> Certification:
        directions = Monotone({"x0": 1}, 0.5, 0.5, 0.1, True, violations)
        return Certification(digest, False, Metrics.read(folder).lipschitz, {}, [], {}, None, directions)

    certify(folder, found("a", 0))
    certify(folder, found("a", None))
    assert Metrics.read(folder).certify.monotone.violations == 0
    certify(folder, found("b", None))
    assert Metrics.read(folder).certify.monotone.violations is None


def test_an_outcome_is_what_the_files_tell(folder, tmp_path):
    metrics = Metrics.read(folder)
    assert Outcome.of(folder) == Outcome("ok", metrics=metrics)
    row = Outcome.of(folder).results()
    assert (row["status"], row["reason"]) == ("ok", "")
    assert row["lipschitz.certified"] == metrics.lipschitz.certified
    assert row["robustness.test.certified_accuracy.0.25"] == metrics.robustness.test.certified_accuracy["0.25"]
    broken = dataclasses.asdict(dataclasses.replace(metrics.lipschitz, verdict="FAIL"))
    change(folder, lipschitz=broken)
    assert Outcome.of(folder).status == "failed"
    assert "a bound is broken" in Outcome.of(folder).reason
    (tmp_path / "metrics.json").unlink()
    assert Outcome.of(folder) == Outcome("missing")
    folder.write_failure("no\n\x1b[31mluck", 3)
    assert Outcome.of(folder) == Outcome("failed", "no \\x1b[31mluck", 3)
    (tmp_path / "metrics.json").write_text("{")  # torn: not a result, but the failure is known
    assert Outcome.of(folder) == Outcome("failed", "no \\x1b[31mluck", 3)
    (tmp_path / "failed.json").write_text("")
    torn = Outcome.of(folder)
    assert (torn.status, torn.reason.partition(":")[0]) == ("missing", "metrics.json cannot be read")


def test_settings_name_options_by_the_choice_or_by_the_class_or_are_empty(run):
    folder = RunFolder(run("constraint=linf", "lipschitz=8"))
    expected = {"act": "groupsort", "loss": "hinge", "lipschitz": 8.0, "optim.lr": 0.01}
    assert settings(folder).items() >= expected.items()
    (folder.path / ".hydra" / "hydra.yaml").unlink()
    assert settings(folder).items() >= (expected | {"act": "GroupSort", "loss": "Hinge"}).items()
    (folder.path / ".hydra" / "config.yaml").unlink()
    assert settings(folder) == {}


@pytest.mark.parametrize("overrides", [(), ("dataset=absolute_value",)], ids=str)
def test_the_numbers_of_a_task_are_those_that_its_runs_record(trained_run, overrides):
    row = Outcome.of(RunFolder(trained_run(*overrides))).results()
    keys = numeric_keys("regression" if overrides else "classification", [0.1, 0.25, 0.4, 0.5])
    assert {"train.loss", "test.loss", "gradient_norm.median", "lipschitz.certified"} <= set(keys)
    assert len(keys) == len(set(keys))
    assert all(isinstance(row[key], float | int) or row[key] is None for key in keys)
