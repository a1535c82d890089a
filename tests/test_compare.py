"""`lipexp figures compare`: what is chosen on validation, what is shown, and what is said."""

from __future__ import annotations

import pandas as pd
import pytest

from lipexp.figures import compare, experiments, main
from lipexp.figures.compare import KINDS, PROBLEMS, draw, folded, judge, kind, ranked, summary
from lipexp.tables import pasted

PAIRS = [(constraint, act) for constraint in ("spectral", "aol", "none") for act in ("relu", "groupsort")]
TIMES = dict(zip(PAIRS, [1.0, 1.5, 2.0, 2.5, 0.5, 0.7], strict=True))


@pytest.fixture
def runs(monkeypatch):
    """Two seeds of each pair: groupsort wins on validation, relu on test points; none is better than aol, and aol
    than spectral."""
    monkeypatch.setattr(compare, "step_times", lambda pairs: pd.Series({pair: TIMES[pair] for pair in pairs}))
    found = {}
    for problem in PROBLEMS:
        rows = []
        for constraint, act in PAIRS:
            for seed in range(2):
                sign = 1 if problem.larger_is_better else -1
                base = 0.5 + 0.1 * sign * ["spectral", "aol", "none"].index(constraint) + 0.02 * seed
                better = 0.05 * sign * (act == "groupsort")
                measures = {
                    problem.measure.replace("SPLIT", "val"): base + better,
                    problem.measure.replace("SPLIT", "test"): base - better,
                }
                bounds = {"lipschitz.measured": 1.5, "lipschitz.certified": 2.0, "gradient_norm.median": 1.0}
                if problem.measure.endswith("score"):  # which is compared with the constant
                    measures = {key: 2 * value for key, value in measures.items()}
                bounds["lipschitz.target"] = None if constraint == "none" else 2.0
                rows.append({"constraint": constraint, "act": act, "seed": seed, **measures, **bounds})
        found[problem.experiment] = pd.DataFrame(rows)
    return found


def test_of_each_constraint_the_activation_is_chosen_on_validation_and_its_test_value_is_shown(runs):
    rows = folded(runs)
    assert ranked(rows) == ["aol", "spectral", "none"]  # the last one keeps no bound
    short = summary(runs).short
    columns = [[str(cell) for cell in column.cells] for column in short.columns]
    assert columns[0] == ["aol", "spectral", "none"]
    assert columns[1] == ["0.560", "0.460", "0.660"]  # of groupsort, whose test values are the lower ones
    assert columns[3] == ["0.46", "0.56", "0.36"]  # an error
    assert columns[-3:] == [["0.75"] * 3, ["0.50"] * 3, ["2.25", "1.25", "0.60"]]


def test_the_table_to_be_pasted_has_every_pair_with_its_standard_error(runs):
    lines = pasted("csv", summary(runs).full).splitlines()
    assert [tuple(line.split(",")[:2]) for line in lines[1:]] == sorted(PAIRS)
    assert lines[1].split(",")[2] == "0.560 ± 0.01"  # of 0.55 and 0.57


def test_only_the_table_goes_to_standard_output(runs, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(experiments, "train", lambda *how: print("trained") or 0)
    monkeypatch.setattr(experiments, "read", lambda folder: runs[folder.name])
    monkeypatch.setattr(compare, "chosen_of_both", lambda rows: ["groupsort", "relu"])
    assert main(["compare", "--format", "csv"]) == 1  # one half is too few for the claim
    printed = capsys.readouterr()
    assert printed.out == pasted("csv", summary(runs).full) + "\n"
    assert printed.err.count("trained\n") == len(PROBLEMS)
    assert "1 claims do not hold" in printed.err


def test_the_sentences_count_and_name(runs, monkeypatch):
    monkeypatch.setattr(compare, "chosen_of_both", lambda rows: ["groupsort", "relu", "abs", "abs"])
    first, second, third = summary(runs).sentences
    assert first.endswith(" can keep the gradient norm in 3 of 4 cells (a constraint on a problem).")
    assert second.startswith("By the mean rank over the problems aol, spectral come first; aol is within ")
    assert "on 5 of 5, spectral on 0." in second
    assert third.startswith("A train step costs 0.60 (none) to 2.25 (aol) times one of a plain network; ")
    assert [one.measured for one in judge(runs)] == [0.75]


def test_only_constraints_that_take_every_kind_of_activation_count(runs):
    assert compare.chosen_of_both(folded(runs)) == []
    more = {}
    for name, rows in runs.items():
        others = [rows[rows["constraint"] == "aol"].assign(act=act) for act in ("tanh", "identity", "elu")]
        more[name] = pd.concat([rows, *others])
    chosen = compare.chosen_of_both(folded(more))
    assert len(chosen) == len(PROBLEMS)  # of aol alone


def test_every_pair_is_a_dot_in_the_colour_of_its_kind(runs):
    figure = draw(runs)
    assert len(figure.axes) == len(PROBLEMS) + 1
    for ax, problem in zip(figure.axes, PROBLEMS, strict=False):
        lines = [line for line in ax.get_lines() if len(line.get_xdata()) == 1]
        dots = {(line.get_xdata()[0], line.get_ydata()[0]): line.get_color() for line in lines}
        rows = folded(runs)[problem.test]
        expected = {(rows[c, a], ["none", "spectral", "aol"].index(c)): KINDS[kind(a)] for c, a in PAIRS}
        assert dots == expected
        assert ax.xaxis_inverted() != problem.larger_is_better


def test_step_times_are_ratios_to_a_plain_network(monkeypatch):
    monkeypatch.setattr(compare, "ROUNDS", 1)
    monkeypatch.setattr(compare, "CALLS", 1)
    times = compare.step_times((("spectral", "groupsort"), ("sll", "relu")))
    assert set(times.index) == {("spectral", "groupsort"), ("sll", "relu")}
    assert (times > 0).all()
