"""The report with `--by`: runs that differ in their seed alone are one row."""

from __future__ import annotations

import json
import statistics

import pytest
import yaml
from recorded import configuration, fail, outputs, refused, report, run, table

from lipexp.report import main


def test_folding_gives_mean_spread_count_and_worst(run, fail, report):
    scores = [0.8, 0.9, 0.97]
    for seed, score in enumerate(scores):
        run(f"r{seed}", score, seed=seed, result={"measured": 0.5 + seed / 8, "certified": 0.875 - seed / 8})
    run("g", 0.6, act="groupsort", result={"measured": 0.5})
    fail("f", seed=3)
    rows = table(report("--by", "act", "--csv", "-"))
    assert [row["act"] for row in rows] == ["relu", "groupsort"]
    relu, groupsort = rows
    assert float(relu["test.accuracy.mean"]) == pytest.approx(0.89, rel=1e-15)
    assert float(relu["sd"]) == pytest.approx(statistics.stdev(scores), rel=1e-15)
    assert (relu["n"], relu["worst"], relu["failed"]) == ("3", "0.8", "1")
    assert float(relu["lipschitz.measured.max"]) == 0.75
    assert float(relu["lipschitz.certified.max"]) == 0.875
    assert (groupsort["n"], groupsort["sd"], groupsort["failed"]) == ("1", "", "0")
    lines = report("--by", "act").splitlines()
    assert lines[-2].split() == ["relu", "0.8900", "±", "0.085", "3", "0.8000", "0.75", "0.875", "1"]
    assert lines[-1].split() == ["groupsort", "0.6000", "1", "0.6000", "0.5", "0.999998", "0"]


def test_the_worst_error_is_the_largest(run, report):
    for seed, score in enumerate([0.1, 0.3, 0.2]):
        run(f"r{seed}", score, seed=seed, result={"metric": "mse"})
    (row,) = table(report("--by", "act", "--csv", "-"))
    assert row["worst"] == "0.3"
    assert float(row["test.mse.mean"]) == pytest.approx(0.2)
    assert row["test.accuracy.mean"] == ""


@pytest.mark.parametrize(
    "change",
    [
        {"optim__lr": 0.1},
        {"model__width": 8},
        {"lipschitz": 2.0},
        {"constraint__lipschitz": 2.0},
        {"optim__betas": [0.9, 0.999]},
        {"act___target_": "mine.ReLU"},
        {"loss__extra": None},
        {"loss__lipschitz": "${optim.lr}"},
        {"act": "groupsort"},
        {"choices": {"optim": "adamw"}},
    ],
    ids=str,
)
def test_runs_that_differ_in_more_than_the_seed_are_never_folded_and_never_look_alike(run, report, change):
    run("a", 0.8, seed=0)
    run("b", 0.8, seed=1, **change)
    *_, first, second = report("--by", "loss").splitlines()
    assert first != second
    rows = table(report("--by", "loss", "--csv", "-"))
    assert [row["n"] for row in rows] == ["1", "1"]
    assert rows[0] != rows[1]


def test_a_run_without_a_group_is_not_folded_with_one_that_has_it(run, report):
    run("a", 0.8, seed=0)
    file = run("b", 0.8, seed=1) / ".hydra" / "config.yaml"
    file.write_text(yaml.safe_dump({key: value for key, value in configuration(seed=1).items() if key != "optim"}))
    hydra = file.with_name("hydra.yaml")
    hydra.write_text(hydra.read_text().replace("optim: adam", "other: thing"))
    *_, first, second = report("--by", "act").splitlines()
    assert first != second


def test_runs_that_differ_in_the_seed_alone_are_folded_whatever_the_keys(run, report):
    run("a", 0.8, seed=0, dataset__seed="${seed}")
    run("b", 0.9, seed=1, dataset__seed="${seed}")
    for by in ("act", "model.width", "optim", "lipschitz,optim.lr", "constraint.lipschitz"):
        assert [row["n"] for row in table(report("--by", by, "--csv", "-"))] == ["2"], by
    assert [row["n"] for row in table(report("--by", "act,seed", "--csv", "-"))] == ["1", "1"]


def test_the_columns_are_the_keys_and_what_else_tells_rows_apart(run, report):
    run("a", 0.8, model__width=8, optim__lr=0.1)
    run("b", 0.9, model__width=16, optim__lr=0.1)
    lines = report("--by", "optim.lr,act").splitlines()
    headings = next(line for line in lines if line.startswith("optim.lr")).split()
    assert headings[:3] == ["optim.lr", "act", "model.width"]
    assert lines[-2].split()[:3] == ["0.1", "relu", "16"]
    assert lines[-1].split()[:3] == ["0.1", "relu", "8"]


def test_a_seed_that_was_run_twice_counts_once(run, capsys):
    run("a", 0.5, seed=0)
    run("b", 0.8, seed=0)
    run("c", 0.9, seed=1)
    assert main(["--by", "act", "--csv", "-"]) == 0
    printed = capsys.readouterr()
    (row,) = table(printed.out)
    assert row["n"] == "2"
    assert float(row["test.accuracy.mean"]) == pytest.approx(0.85)
    assert printed.err == "lipexp: runs left out, as a later one has the same settings and seed: 1\n"


def test_folded_rows_are_sorted_by_their_mean_and_failed_ones_are_last(run, fail, report):
    fail("a", act="groupsort")
    for seed in (0, 1):
        run(f"b{seed}", 0.8, seed=seed, optim__lr=0.1, result={"median": 0.2 + 0.2 * seed})
        run(f"c{seed}", 0.9, seed=seed, optim__lr=0.2, result={"median": 0.5})
    run("d", 0.86, seed=0, optim__lr=0.3)
    run("e", 0.99, seed=1, optim__lr=0.3)
    rates = [row["optim.lr"] for row in table(report("--by", "optim.lr", "--csv", "-"))]
    assert rates == ["0.3", "0.2", "0.1", "0.01"]
    worst = [row["worst"] for row in table(report("--by", "optim.lr", "--sort", "worst", "--csv", "-"))]
    assert worst == ["0.9", "0.86", "0.8", ""]  # best first: of accuracies the largest
    by_median = table(report("--by", "optim.lr", "--sort", "gradient_norm.median", "--csv", "-"))
    assert [row["optim.lr"] for row in by_median] == ["0.1", "0.2", "0.3", "0.01"]
    assert [row["gradient_norm.median"] for row in by_median[1:]] == ["0.5", "0.5", ""]
    assert float(by_median[0]["gradient_norm.median"]) == pytest.approx(0.3)


def test_a_broken_bound_is_seen_in_a_folded_row(run, report):
    run("a", seed=0)
    folder = run("b", seed=1)
    content = json.loads((folder / "metrics.json").read_text())
    content["lipschitz"]["verdict"] = "FAIL"
    (folder / "metrics.json").write_text(json.dumps(content))
    assert "FAIL, PASS" in report("--by", "act")
