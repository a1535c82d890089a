"""The report: what is in the table, what stands in the CSV, and what is refused."""

from __future__ import annotations

import csv
import json
import subprocess
import sys

import pytest
from recorded import fail, order, outputs, refused, report, run, table

from lipexp.report import main

# what is in the table


def test_the_best_run_comes_first_and_failed_runs_last(run, fail, report):
    fail("a")
    run("b", 0.8, seed=1)
    run("c", 0.95, seed=2)
    run("d", 0.9, seed=3)
    assert order(report()) == ["c", "d", "b", "a"]


def test_a_small_error_is_a_good_one_and_the_tasks_stand_apart(run, report):
    run("a", 0.5, seed=1, result={"metric": "mse"})
    run("b", 0.6, seed=2)
    run("c", 0.01, seed=3, result={"metric": "mse"})
    run("d", 0.7, seed=4)
    printed = report()
    assert order(printed) == ["d", "b", "c", "a"]
    assert "0.7000" in printed
    assert "0.01000" in printed


def test_any_column_or_key_sorts(run, fail, report):
    run("a", 0.9, seed=10, result={"measured": 0.5, "median": 0.3}, act="relu")
    run("b", 0.8, seed=9, result={"measured": 0.4, "median": 0.1}, act="groupsort")
    run("c", 0.7, seed=2, result={"measured": 0.6, "median": 0.2}, act="relu")
    fail("d", seed=1)
    assert order(report("--sort", "measured")) == ["b", "a", "c", "d"]
    assert order(report("--sort", "lipschitz.measured")) == ["b", "a", "c", "d"]
    assert order(report("--sort", "test accuracy")) == ["a", "b", "c", "d"]
    assert order(report("--sort", "seed")) == ["c", "b", "a", "d"]  # as numbers, not as words
    assert order(report("--sort", "act")) == ["b", "a", "c", "d"]
    by_median = report("--sort", "gradient_norm.median")
    assert order(by_median) == ["b", "c", "a", "d"]
    assert "gradient_norm.median" in by_median  # the table shows what it is sorted by


def test_what_is_the_same_everywhere_is_named_once_above_the_table(run, report):
    run("a", 0.8, seed=1)
    run("b", 0.9, seed=2)
    first, same, *rest = report().splitlines()
    assert first.startswith("2 runs under ")
    assert first.endswith("outputs, 0 failed")
    for pair in ("dataset=two_moons", "act=relu", "constraint=spectral", "loss=hinge", "L=1", "verdict=PASS"):
        assert pair in same
    assert "status=ok" in same
    assert "two_moons" not in "".join(rest)
    assert rest[-1].split() == ["a", "1", "0.8000"]


def test_one_run_is_shown_with_its_results(run, report):
    run("a", 0.91)
    lines = report("outputs/a").splitlines()
    assert lines[0].startswith("1 run under")
    assert "seed=0" in lines[1]
    assert lines[-1].split() == ["a", "0.9100", "0.75", "0.999998", "2", "PASS", "ok"]


def test_only_settings_that_differ_are_columns(run, report):
    run("a", seed=1, optim__lr=0.1, act="relu")
    run("b", seed=2, optim__lr=0.01, act="groupsort")
    printed = report()
    assert "optim.lr" in printed
    assert "0.1" in printed.split("a  ")[1]
    for absent in ("width", "betas", "_target_", "act.n_groups", "${"):  # n_groups: groupsort says it all
        assert absent not in printed


def test_settings_are_told_apart_across_options_and_null_is_a_value(run, report):
    run("a", 0.9, seed=1, optim__lr=0.1, act="groupsort", act__n_groups=4)
    run("b", 0.8, seed=2, optim__lr=0.2, act="groupsort", choices={"optim": "sgd"})
    *_, headings, first, second = report().splitlines()
    assert headings.split()[:5] == ["run", "seed", "optim", "act.n_groups", "optim.lr"]
    assert first.split()[:5] == ["a", "1", "adam", "4", "0.1"]
    assert second.split()[:5] == ["b", "2", "sgd", "null", "0.2"]


def test_interpolations_are_no_columns_unless_one_run_sets_the_value_itself(run, report):
    run("a", seed=1, lipschitz=2.0)
    run("b", seed=2, lipschitz=3.0)
    assert "constraint.lipschitz" not in report()
    run("c", seed=3, constraint__lipschitz=0.5)
    assert "constraint.lipschitz" in report()


def test_the_class_names_an_option_that_hydra_did_not_record(run, report):
    folder = run("a", act="groupsort")
    (folder / ".hydra" / "hydra.yaml").unlink()
    assert "act=GroupSort" in report("outputs/a")


def test_bounds_are_rounded_to_their_safe_side(run, report):
    run("a", 0.8, result={"measured": 0.99999, "certified": 0.99999999})
    run("b", 0.9, seed=1, result={"measured": 0.12349, "certified": 0.5})
    printed = report()
    assert "0.9999 " in printed
    assert "0.1234 " in printed
    assert "0.99999999" in printed  # 1 would be the target itself, 0.9999 less than what is proven


def test_a_failed_run_says_why(run, fail, report):
    run("a")
    fail("b", reason="[/nonsense] of a\nsecond line", seed=1)
    run("c", 0.8, seed=2)
    printed = report()
    assert "verdict=PASS" in printed.splitlines()[1]  # of those that have one
    assert printed.splitlines()[-1].endswith("failed: [/nonsense] of a second line")
    assert "1 failed" in printed.splitlines()[0]
    assert printed.splitlines()[-2].endswith("ok")


def test_lines_are_whole_whatever_the_width(run, fail, report, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    run("a", seed=1, optim__lr=0.123456789)
    fail("b", reason="a reason of many words " * 5, seed=2)
    lines = report().splitlines()
    assert lines[-1].endswith(" ".join(["a reason of many words"] * 5))
    assert "0.123456789" in lines[-2]
    assert all(line == line.rstrip() for line in lines)


def test_a_run_that_is_named_twice_counts_once(run, report, outputs):
    run("a", 0.8, seed=1)
    run("b", 0.9, seed=2)
    assert order(report("outputs", "outputs/a", str(outputs))) == ["b", "a"]


# CSV


def test_the_csv_has_every_column_and_every_digit(run, fail, report, tmp_path):
    score = 0.1 + 0.2
    folder = run("a", score, seed=0)
    fail("b", seed=1)
    assert report("--csv", "table.csv").splitlines()[0] == f"CSV written to {tmp_path / 'table.csv'}"
    finished, failed = table((tmp_path / "table.csv").read_text())
    assert finished["run"] == str(folder)
    assert float(finished["test.accuracy"]) == score
    assert float(finished["lipschitz.certified"]) == 0.9999971
    assert finished["dataset"] == "two_moons"  # the same in every run
    assert finished["model.width"] == "16"
    assert finished["lipschitz.exact"] == ""
    assert finished["gradient_norm.argmax"] == "[0.5, -0.25]"
    assert (finished["status"], finished["reason"]) == ("ok", "")
    assert (failed["status"], failed["reason"]) == ("failed", "the loss is no longer finite")
    assert (failed["test.accuracy"], failed["seed"]) == ("", "1")
    assert not [key for key in finished if "_target_" in key or key in ("constraint.lipschitz", "loss.lipschitz")]


def test_csv_to_standard_output_is_nothing_but_csv(run, report):
    run("a", 0.8, seed=1)
    run("b", 0.9, seed=2)
    lines = report("--csv", "-").splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("run,dataset,act,constraint,loss,seed,lipschitz,")
    assert len({len(row) for row in csv.reader(lines)}) == 1


def test_a_csv_that_cannot_be_written_leaves_nothing(run, refused, monkeypatch, tmp_path):
    run("a")
    (tmp_path / "old.csv").write_text("old")
    before = sorted(tmp_path.iterdir())
    assert refused("--csv", "nowhere/a.csv").startswith("--csv=nowhere/a.csv: cannot be written: No such file")
    assert refused("--csv", "outputs").startswith("--csv=outputs: must be a file")

    def no_rename(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", no_rename)
    assert "No space left" in refused("--csv", "old.csv")
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "old.csv").read_text() == "old"


# bad input, foreign and broken runs


def test_bad_input_is_one_line(run, refused, outputs, tmp_path):
    run("a")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    assert refused("nowhere") == "FOLDER=nowhere: does not exist"
    assert refused("file") == "FOLDER=file: is no folder"
    assert refused("empty").startswith("FOLDER=empty: no run found there")
    assert refused("--sort", "mesured").startswith("--sort=mesured: no such key; did you mean measured? (run, ")
    assert "did you mean gradient_norm.median?" in refused("--sort", "gradient_norm.mediam")
    by = refused("--by", "act,optim.rl")
    assert by.startswith("--by=optim.rl: no such key; did you mean optim.lr? (dataset, act, ")
    assert "_target_" not in by
    assert refused("--by", "").startswith("--by=: no such key")
    assert "--sotr" in refused("--sotr", "seed")
    assert "expected one argument" in refused("--csv")


def test_outputs_is_where_runs_are(run, refused, report, tmp_path, monkeypatch):
    run("a")
    assert "1 run under" in report()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert refused() == "FOLDER=outputs: does not exist"


def test_options_may_stand_between_folders(run, report):
    run("a", 0.8, seed=1)
    run("b", 0.9, seed=2)
    assert order(report("outputs/a", "--sort", "seed", "outputs/b")) == ["a", "b"]


def test_help(capsys):
    assert main(["--help"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("usage: lipexp report")
    for word in ("FOLDER", "--by KEYS", "--sort KEY", "--csv FILE"):
        assert word in printed.out


def test_a_half_written_result_is_left_out_and_named(run, capsys):
    run("a", 0.8, seed=1)
    run("b", 0.9, seed=2)
    broken = run("c", seed=3) / "metrics.json"
    broken.write_text(broken.read_text()[:40])
    assert main([]) == 0
    printed = capsys.readouterr()
    assert order(printed.out) == ["b", "a"]
    (line,) = printed.err.splitlines()
    assert line.startswith(f"lipexp: {broken} cannot be read (")


@pytest.mark.parametrize("content", ["", '{"seed": ', "[1, 2]", "\x00"])
def test_nothing_but_half_written_results_is_an_error(run, refused, content):
    file = run("a") / "metrics.json"
    file.write_text(content)
    assert str(file) in refused()


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"schema": 1, "seed": 0},
        {"test": None, "lipschitz": None, "seed": None},
        {"test": {"accuracy": None}, "lipschitz": {"measured": "?", "verdict": 3}},
        {"test": 0.9, "lipschitz": {"target": "one", "certified": 0.5}, "n": 3, "status": "?"},
        {"test": {"accuracy": float("nan")}, "lipschitz": {"measured": float("inf"), "certified": float("inf")}},
        {"act": "other", "seed": [], "run": 1, "lipschitz": 3},
        {"test": {"accuracy": True, "mse": []}, "lipschitz": {"q": [], "measured": {}, "certified": 10**400}},
    ],
    ids=str,
)
@pytest.mark.parametrize("arguments", [[], ["--by", "act"], ["--sort", "measured"], ["--csv", "-"]], ids=str)
def test_missing_and_odd_keys_are_blanks(run, report, content, arguments):
    run("a", 0.8, seed=1)
    (run("b", seed=2) / "metrics.json").write_text(json.dumps(content))
    printed = report(*arguments)
    assert "0.8" in printed
    assert "other" not in printed  # the configuration says what was chosen
    if arguments == []:
        assert order(printed) == ["a", "b"]


@pytest.mark.parametrize("damage", ["nothing there", "{", "[1]", "null", "hydra: null"])
def test_runs_without_hydras_record_are_shown_and_never_folded(run, report, damage):
    for name, seed in (("a", 0), ("b", 1)):
        folder = run(name, 0.8, seed=seed)
        for file in (folder / ".hydra").iterdir():
            file.unlink() if damage == "nothing there" else file.write_text(damage)
        if damage == "hydra: null":
            (folder / ".hydra" / "config.yaml").unlink()
    run("c", 0.9)
    assert order(report()) == ["c", "a", "b"]
    assert [row["seed"] for row in table(report("--csv", "-"))] == ["0", "0", "1"]
    rows = table(report("--by", "act", "--csv", "-"))
    assert [row["n"] for row in rows] == ["1", "1", "1"]
    c, a, b = (line.split() for line in report("--by", "act").splitlines()[-3:])
    assert (c[0], a[0], b[0]) == ("relu", "a", "b")  # by their folders, or they would look alike


def test_the_command_needs_neither_torch_nor_hydra(run, tmp_path):
    run("a")
    code = (
        "import sys; sys.argv = ['lipexp', 'report']; from lipexp.cli import main; assert main() == 0; "
        "print({'torch', 'hydra', 'matplotlib', 'pandas'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
