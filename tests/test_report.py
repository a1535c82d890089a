"""`lipexp report`: what is in the table, what stands in the CSV, and what is refused."""

from __future__ import annotations

import csv
import io
import re
import statistics

import pytest
from omegaconf import OmegaConf

from lipexp.report import main
from lipexp.runs import RunFolder


@pytest.fixture
def run(trained_run, tmp_path, monkeypatch, capsys):
    """run("name", score, "relu", seed=1) makes outputs/name from a trained run; without a score it has failed.

    `change` has dotted settings, `chosen` options of groups, and further arguments are results.
    """
    monkeypatch.chdir(tmp_path)

    def run(name, score=None, act="relu", seed=0, metric="accuracy", change=(), chosen=(), **results):
        trained, folder = RunFolder(trained_run(f"act={act}")), RunFolder(tmp_path / "outputs" / name)
        capsys.readouterr()
        config, choices = trained.recorded()
        settings = OmegaConf.create(config | {"seed": seed})
        for key, value in dict(change).items():
            OmegaConf.update(settings, key, value, merge=False, force_add=True)
        hydra = {"hydra": {"runtime": {"choices": choices | dict(chosen)}}}
        (folder.path / ".hydra").mkdir(parents=True)
        for file, content in (("config", settings), ("hydra", hydra)):
            OmegaConf.save(content, folder.path / ".hydra" / f"{file}.yaml")
        if score is None:
            folder.write_failure(results.get("reason", "not finite"), step=2)
            return folder.path
        scores = {"loss": 0.5, metric: score}
        content = trained.read_json("metrics.json") | {"val": scores, "test": scores}
        for key, value in {"measured": 0.75, "certified": 0.9999971, "within": 0.5, **results}.items():
            content["gradient_norm" if key == "median" else "lipschitz"][key] = value
        content["robustness"]["test"]["certified_accuracy"] = {"0.25": content["lipschitz"].pop("within")}
        folder.write_json("metrics.json", content)
        return folder.path

    return run


@pytest.fixture
def report(capsys):
    """report("--by", "act") -> what it prints; another exit status, or more on stderr, is an error."""

    def report(*arguments, warning=""):
        assert main(list(arguments)) == 0
        out, err = capsys.readouterr()
        assert err == warning
        return out

    return report


@pytest.fixture
def table(report):
    """The same as the rows of a CSV."""
    return lambda *arguments: list(csv.DictReader(io.StringIO(report(*arguments, "--csv", "-"))))


def order(printed):
    """The first cells of the rows of a table of runs, from top to bottom."""
    lines = printed.splitlines()
    return [line.split()[0] for line in lines[[line.startswith("run ") for line in lines].index(True) + 1 :]]


def test_the_best_run_comes_first_in_its_task_and_failed_runs_last_with_their_reason(run, report):
    run("a", reason="[/nonsense] of a\nsecond line")
    run("b", 0.8, seed=1)
    run("c", 0.95, seed=2)
    run("d", 0.5, seed=3, metric="mse")
    run("e", 0.01, seed=4, metric="mse")
    run("f", 0.99, seed=5, verdict="FAIL")
    printed = report()
    assert order(printed) == ["c", "b", "e", "d", "f", "a"]
    assert printed.splitlines()[0].endswith("outputs, 2 failed")
    assert printed.splitlines()[-1].endswith("failed: [/nonsense] of a second line")
    assert "a bound is broken" in printed.splitlines()[-2]


def test_a_run_without_a_bound_has_no_l(run, report):
    run("a", 0.9, measured=0.5)
    run("b", 0.8, seed=1, target=None, chosen={"constraint": "none"})
    lines = report().splitlines()
    (heading,) = (line for line in lines if line.startswith("run "))
    place = heading.index(" L ") + 1
    assert {line[:1]: line[place].strip() for line in lines if line[:2] in ("a ", "b ")} == {"a": "1", "b": ""}


def test_any_column_or_key_sorts(run, report):
    run("a", 0.9, seed=10, measured=0.5, median=0.3, within=0.7)
    run("b", 0.8, "groupsort", seed=9, measured=0.4, median=0.1, within=0.6)
    run("c", 0.7, seed=2, measured=0.6, median=0.2, within=0.8)
    run("d", seed=1)
    assert order(report("--sort", "measured")) == ["b", "a", "c", "d"]
    assert order(report("--sort", "test accuracy")) == ["a", "b", "c", "d"]
    assert order(report("--sort", "seed")) == ["c", "b", "a", "d"]  # as numbers, not as words
    assert order(report("outputs/a", "--sort", "act", "outputs/b")) == ["b", "a"]
    assert order(report("--sort", "robustness.test.certified_accuracy.0.25")) == ["c", "a", "b", "d"]
    by_median = report("--sort", "gradient_norm.median")
    assert order(by_median) == ["b", "c", "a", "d"]
    assert "gradient_norm.median" in by_median  # it is shown


def test_what_is_the_same_everywhere_is_named_once_above_the_table(run, report):
    run("a", 0.8, seed=1)
    run("b", 0.9, seed=2)
    first, same, *_, last = report("outputs", "outputs/a").splitlines()  # a run that is named twice counts once
    assert first.startswith("2 runs under ")
    shared = ["dataset=two_moons", "act=relu", "constraint=spectral", "loss=hinge", "L=1", "measured=0.75"]
    assert same.split("  ") == [*shared, "certified=0.999998", "q=2", "verdict=PASS", "status=ok"]
    assert last.split() == ["a", "1", "0.8000", "0.8000"]
    run("c", seed=3)
    assert "verdict=PASS" in report().splitlines()[1]  # of those that have one
    assert report("outputs/a").splitlines()[-1].split() == [
        "a",
        "0.8000",
        "0.8000",
        "0.75",
        "0.999998",
        "2",
        "PASS",
        "ok",
    ]


def test_settings_that_tell_rows_with_the_same_option_apart_are_columns(run, report):
    def headings():
        return next(line for line in report().splitlines() if line.startswith("run")).split()

    run("a", 0.9, seed=1, change={"lipschitz": 2.0})
    run("b", 0.8, "groupsort", seed=2, change={"dataset.n_train": 500}, chosen={"dataset": "small"})
    assert headings()[:6] == ["run", "dataset", "act", "seed", "L", "accuracy"]  # the options say the rest
    change = {"act.n_groups": 4, "constraint.lipschitz": 0.5}
    run("c", 0.7, "groupsort", seed=3, change=change, chosen={"optim": "sgd"})
    assert set(headings()[5:8]) == {"optim", "act.n_groups", "constraint.lipschitz"}
    assert set(report().splitlines()[-1].split()[5:8]) == {"sgd", "4", "0.5"}


def test_what_only_repeats_a_setting_of_the_run_is_no_column(run, report, table):
    for seed, bound in enumerate((1.0, 2.0)):
        run(
            f"r{seed}",
            0.8,
            seed=seed,
            change=dict.fromkeys(("lipschitz", "loss.lipschitz", "constraint.lipschitz"), bound),
        )
    run("m", 0.8, seed=2, metric="mse", change={"loss": {"_target_": "lipexp.losses.MSE"}}, chosen={"loss": "mse"})
    assert "lipschitz" not in report()
    assert not [key for key in table()[0] if key.endswith(".lipschitz") and key != "robustness.lipschitz"]
    run("s", 0.8, seed=3, change={"loss.lipschitz": 5.0})
    assert [row["loss.lipschitz"] for row in table()] == ["1", "2", "5", ""]


def test_bounds_are_rounded_to_their_safe_side_and_lines_are_whole(run, report, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    run("a", 0.8, measured=0.99999, certified=0.99999999, change={"optim.lr": 0.123456789})
    run("b", 0.9, seed=1, measured=0.12349, certified=0.5)
    run("c", reason="many words " * 20)
    *_, b, a, c = report().splitlines()
    assert b.split()[3:6] == ["0.9000", "0.9000", "0.1234"]
    assert a.split()[2:] == [
        "0.123456789",
        "0.8000",
        "0.8000",
        "0.9999",
        "0.99999999",
        "ok",
    ]  # 1 would be the target itself
    assert c.endswith(" ".join(["many words"] * 20))


def test_the_csv_has_every_column_and_every_digit(run, report, table, tmp_path):
    folder = run("a", 0.1 + 0.2, exact=None)
    run("b", seed=1)
    assert report("--csv", "table.csv").splitlines()[0] == f"CSV written to {tmp_path / 'table.csv'}"
    done, failed = table()
    assert list(csv.DictReader((tmp_path / "table.csv").read_text().splitlines())) == [done, failed]
    assert (done["run"], float(done["test.accuracy"])) == (str(folder), 0.1 + 0.2)
    assert (done["lipschitz.certified"], done["lipschitz.exact"], done["lipschitz.q"]) == ("0.9999971", "", "2")
    assert (done["dataset"], done["model.width"], done["status"]) == ("two_moons", "16", "ok")
    assert (failed["status"], failed["reason"], failed["test.accuracy"]) == ("failed", "not finite", "")
    assert not [key for key in done if "_target_" in key or key in ("constraint.lipschitz", "loss.lipschitz")]


def test_folding_gives_mean_spread_count_and_worst(run, report, table):
    scores = [0.8, 0.9, 0.97]
    for seed, score in enumerate(scores):
        run(f"r{seed}", score, seed=seed, measured=0.5 + seed / 8, certified=0.875 - seed / 8)
    run("g", 0.6, "groupsort", metric="mse", measured=0.5, verdict="OPEN")
    run("h", 0.7, "groupsort", metric="mse", measured=0.25, seed=1)
    run("f", seed=3)
    relu, groupsort = table("--by", "act")
    assert float(relu["test.accuracy.mean"]) == pytest.approx(0.89, rel=1e-15)
    assert float(relu["sd"]) == pytest.approx(statistics.stdev(scores), rel=1e-15)
    assert (relu["n"], relu["worst"], relu["failed"], relu["lipschitz.verdict"]) == ("3", "0.8", "1", "PASS")
    assert (relu["lipschitz.measured.max"], relu["lipschitz.certified.max"]) == ("0.75", "0.875")
    assert (groupsort["worst"], groupsort["failed"], groupsort["lipschitz.verdict"]) == ("0.7", "0", "OPEN")
    line = report("--by", "act").splitlines()[-2]
    assert line.split() == ["relu", *["0.8900", "±", "0.085"] * 2, "3", "0.8000", "0.75", "0.875", "PASS", "1"]
    by_worst = table("--by", "act,seed", "--sort", "worst")  # best first: the smallest mse, the largest accuracy
    assert [row["worst"] for row in by_worst] == ["0.97", "0.9", "0.8", "0.6", "0.7", ""]


DIFFERENCES = [
    *({"optim.lr": 0.010000000000000002}, {"lipschitz": 3.0}, {"constraint.lipschitz": 3.0}, {"loss.extra": None}),
    *(
        {"optim.betas": [0.9, 0.999]},
        {"act._target_": "mine.ReLU"},
        {"loss.lipschitz": None},
        {"model": {}},
    ),
]


def test_runs_that_differ_in_more_than_the_seed_are_never_folded_and_never_look_alike(run, report, table):
    run("a", 0.8, seed=0)
    run("b", 0.8, seed=1)
    for number, change in enumerate(DIFFERENCES):
        run(f"c{number}", 0.8, seed=1, change=change)
    run("d", 0.8, seed=1, chosen={"optim": "adamw"})
    assert sorted(row["n"] for row in table("--by", "loss")) == ["1"] * (len(DIFFERENCES) + 1) + ["2"]
    lines = report("--by", "loss", "--sort", "n").splitlines()[-len(DIFFERENCES) - 2 :]
    assert len({line.replace(" 2 ", " 1 ") for line in lines}) == len(lines)
    assert {row["n"] for row in table("--by", "loss,seed")} == {"1"}


def test_folded_rows_are_sorted_and_a_repeated_seed_counts_once(run, report):
    for seed in (0, 1):
        run(f"b{seed}", 0.8, seed=seed, change={"optim.lr": 0.1}, median=0.2 + 0.2 * seed)
        run(f"c{seed}", 0.9, seed=seed, change={"optim.lr": 0.2}, median=0.5)
    run("a", 0.1, seed=1, change={"optim.lr": 0.1}, median=9.0)
    run("d", change={"optim.lr": 0.3})
    warning = "lipexp: runs left out, as a later one has the same settings and seed: 1\n"
    printed = report("--by", "optim.lr", "--sort", "gradient_norm.median", warning=warning)
    assert [line.split()[0] for line in printed.splitlines()[-3:]] == ["0.1", "0.2", "0.3"]
    assert printed.splitlines()[-3].endswith("0.3 ± 0.14")  # every mean has its deviation


def test_runs_that_are_trained_or_were_killed_are_shown_as_such(run, report, table):
    run("a", 0.9)
    killed, trained = (run(name, seed=seed) for seed, name in enumerate(("killed", "trained"), start=1))
    for folder in (killed, trained):
        (folder / "failed.json").unlink()
    with RunFolder(trained).locked():
        lines = report().splitlines()
        (row,) = table("--by", "act")
    assert lines[0].endswith("outputs, 0 failed, 1 missing, 1 running")
    assert [line.split()[-1] for line in lines[-3:]] == ["ok", "missing", "running"]
    assert [row[key] for key in ("n", "failed", "missing", "running")] == ["1", "0", "1", "1"]
    assert "missing" in report().splitlines()[-1]
    (killed / ".hydra").rename(killed / "hydra")
    (trained / ".hydra").rename(trained / "hydra")
    assert "missing" not in report("--by", "act")


def test_what_only_the_dataset_brings_is_no_column(run, report):
    brings = {"change": {"steps": 3000}, "metric": "mse"}
    run("a", 0.9)
    run("b", 0.1, chosen={"dataset": "absolute_value", "loss": "mse"}, **brings)
    heading = report("--by", "dataset,act").splitlines()[-3]
    assert not {"loss", "steps"} & set(heading.split())
    assert "loss" in report("--by", "dataset,loss").splitlines()[-3]  # it is asked for
    run("c", 0.1, chosen={"dataset": "absolute_value", "loss": "hinge"}, **brings)
    heading = report("--by", "dataset,act").splitlines()[-4]
    assert "loss" in heading.split()
    assert "steps" not in heading.split()


def test_a_table_is_named_by_its_file_and_two_files_of_one_name_by_their_paths(run, report):
    for seed, path in enumerate(("old/heart.csv", "new/heart.csv", "lungs.csv")):
        run("abc"[seed], 0.9 - seed / 10, seed=seed, change={"dataset.path": path}, chosen={"dataset": "table"})
    cells = {line.split()[0]: line.split() for line in report().splitlines()}
    assert [set(cells[name]) & {"heart.csv", "lungs.csv"} for name in "abc"] == [
        {"heart.csv"},
        {"heart.csv"},
        {"lungs.csv"},
    ]
    assert "old/heart.csv" in cells["a"]
    assert "new/heart.csv" in cells["b"]
    alone = report("outputs/a", "outputs/c")
    assert "old/" not in alone


def test_runs_without_hydras_record_are_shown_and_never_folded(run, report, table):
    (run("a", 0.8) / ".hydra").rename("a.moved")
    (run("b", 0.8) / ".hydra").rename("b.moved")
    run("c", 0.9)
    assert order(report()) == ["c", "a", "b"]
    assert [row["n"] for row in table("--by", "act")] == ["1", "1", "1"]


def test_the_table_is_printed_alone_in_formats_that_can_be_pasted(run, capsys):
    run("a_1", 0.8, act="relu")
    run("b_2", 0.9, act="abs")

    def printed(form):
        assert main(["--by", "act", "--format", form]) == 0
        return capsys.readouterr().out.splitlines()

    rows = list(csv.DictReader(printed("csv")))
    assert [(row["act"], row["mean test accuracy"]) for row in rows] == [("abs", "0.9000"), ("relu", "0.8000")]
    same, _, head, ends, *body = printed("markdown")
    assert same.startswith("dataset=two_moons  ")
    assert head.startswith("| act | ")
    assert re.fullmatch(r"\| --- \|( -+:? \|)+", ends)
    assert [line.split(" | ")[0] for line in body] == ["| abs", "| relu"]
    same, begin, _, head, _, first, *_, end = printed("latex")
    assert same.startswith(r"% dataset=two_moons  ")
    assert re.fullmatch(r"\\begin\{tabular\}\{l+r+\}", begin)
    assert first.startswith("abs & ")
    assert first.endswith(r" \\")
    assert end == r"\end{tabular}"


@pytest.mark.parametrize("content", ["", "[1, 2]", "\x00", '{"schema": 1}', '{"schema": 3, "seed": 0}'])
def test_a_result_that_cannot_be_read_is_named_and_left_out(run, capsys, content):
    broken = run("a", 0.8)
    (broken / "metrics.json").write_text(content)
    assert main([]) == 2
    assert str(broken) in capsys.readouterr().err
    run("b", 0.9)
    assert main([]) == 0
    out, err = capsys.readouterr()
    assert order(out) == ["b"]
    assert err.startswith(f"lipexp: {broken}: metrics.json cannot be read: ")
    assert err.count("\n") == 1


def test_bad_input_is_one_line_and_leaves_nothing(run, capsys, tmp_path, monkeypatch):
    def refused(*arguments):
        before = {path: path.is_dir() or path.read_text() for path in tmp_path.iterdir()}
        assert main(list(arguments)) == 2
        assert {path: path.is_dir() or path.read_text() for path in tmp_path.iterdir()} == before
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        return err.removeprefix("lipexp: ").rstrip()

    assert refused() == "FOLDER=outputs: does not exist"
    run("a", 0.8)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.csv").write_text("old")
    assert refused("file.csv") == "FOLDER=file.csv: is no folder"
    assert refused("empty").startswith("FOLDER=empty: no run found there")
    assert refused("--sort", "mesured").startswith("--sort=mesured: no such key; did you mean measured? (run, ")
    assert "did you mean gradient_norm.median?" in refused("--sort", "gradient_norm.mediam")
    assert "--by=optim.rl: no such key; did you mean optim.lr? (dataset, act, " in refused("--by", "act,optim.rl")
    assert refused("--by", "").startswith("--by=: no such key")
    assert refused("--csv", "nowhere/a.csv").startswith("--csv=nowhere/a.csv: cannot be written: No such file")
    assert refused("--csv", "outputs").startswith("--csv=outputs: must be a file")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert "No space left" in refused("--csv", "file.csv")
