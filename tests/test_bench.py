"""The bench: what it compares and how it reports that. How fast anything is, no test asserts."""

from __future__ import annotations

import itertools
import re
import sys
import tempfile
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from commands import metrics
from rich.console import Console
from scipy.stats import sem
from sklearn.model_selection import GridSearchCV, PredefinedSplit

from lipexp import loop
from lipexp.activations import GroupSort
from lipexp.bench import accuracy, bounds, libraries, main, peers, steps, sweep, timing
from lipexp.bench.timing import Case
from lipexp.datasets import Data
from lipexp.loading import load_run

NUMBER = r"[\d,]+(\.\d+)?"
TIMES = rf"{NUMBER} (µs|ms) +{NUMBER} (µs|ms)"
ROW = rf"(?P<name>\S.*?)  +(1|{NUMBER} +{NUMBER} to {NUMBER} +(≤ {NUMBER} +(met|missed) +)?) *{TIMES}"


def compared(printed: str) -> list[list[str]]:
    """The names in the rows of each table; the first is what the others are compared with."""
    found: list[list[str]] = []
    for line in map(str.rstrip, printed.splitlines()):
        if re.fullmatch(r"\d rounds? +ratio +quartiles +target +CPU +wall", line):
            found.append([])
        elif row := re.fullmatch(ROW, line):
            assert (row[2] == "1") == (not found[-1])
            found[-1].append(row["name"])
    return found


def test_the_quick_sections_print_ratios_and_leave_nothing_behind(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(steps, "TRAIN", ("train", "--cfg", "job"))
    monkeypatch.setattr(steps, "IMPORTS", "import json")
    assert main(["step", "commands", "--rounds", "2", "activation", "step"]) == 0
    step, help_command, train, activation = compared(capsys.readouterr().out)
    own = ["lipexp none + ReLU", "lipexp linf + MaxMin", "lipexp spectral + MaxMin"]
    assert step[:5] == ["torch MLP, ReLU", *own, "torch spectral_norm + MaxMin"]
    assert help_command == ["python -c pass", "lipexp --help"]
    assert train == ["python -c 'import json'", "lipexp train --cfg job"]
    assert activation == ["torch ReLU", "lipexp MaxMin", "torch.sort of pairs", "torch.minimum, maximum"]
    assert list(tmp_path.glob("lipexp*")) == []
    monkeypatch.setattr(steps, "TRAIN", ("train", "act=rellu"))
    assert main(["commands", "--rounds", "1"]) == 1
    assert re.fullmatch(r"lipexp: \S+ train act=rellu: .*did you mean act=relu\?.*\n", capsys.readouterr().err)


def test_the_sections_of_a_sweep_compare_runs_of_a_stack(capsys):
    console = Console(width=200)
    sweep.steps(console, rounds=1, runs=2)
    assert compared(capsys.readouterr().out)[0] == [
        "torch MLP, ReLU",
        "linf + MaxMin, a run of 2",
        "spectral + MaxMin, a run of 2",
    ]


def test_bounds_stand_beside_those_of_eclipse_nn_where_it_is_installed(monkeypatch, capsys):
    class Estimator:
        def __init__(self, weights):
            self.weights = weights

        def estimate(self, method):
            print("falling back")
            return torch.tensor({"ECLipsE": 2.0, "ECLipsE_Fast": 3.0}[method]) * len(self.weights)

    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(
        bounds, "NETWORKS", {"small": (lambda: bounds.random((2, 8, 8, 1)), (bounds.FAST, bounds.SLOW))}
    )
    for library in (SimpleNamespace(LipConstEstimator=Estimator), None):
        monkeypatch.setitem(sys.modules, "eclipse_nn", library)
        assert main(["bounds", "--rounds", "1"]) == 0
        out = capsys.readouterr().out
        (rows,) = compared(out)
        values = {name.rsplit(maxsplit=1)[0]: float(name.split()[-1]) for name in rows}
        product = float(re.search(r"product ([0-9.]+)", out)[1])
        assert 0 < values["lipexp lipsdp"] < values["lipexp eclipse"] < product
        assert ("not installed: eclipse-nn" in out) == (library is None)
        if library is not None:
            assert (values["ECLipsE"], values["ECLipsE_Fast"]) == (6.0, 9.0)
            assert "falling back" not in out


def test_a_ratio_is_the_median_of_those_within_a_round(monkeypatch):
    calls: list[str] = []
    costs = {"a": [1, 1, 1, 1, 1, 1], "b": [2, 2, 6, 6, 4, 4]}  # seconds of each call
    monkeypatch.setattr(timing, "cpu_seconds", lambda: sum(sum(costs[c][: calls.count(c)]) for c in costs))
    cases = [Case("a", lambda: calls.append("a")), Case("b [x]", lambda: calls.append("b"), target=1.4, runs=2)]
    timing.take_turns(cases, rounds=3, calls=2, warm_up=0)
    assert calls == [*"aabb", *"bbaa", *"aabb"]  # each is first in its turn
    assert [case.cpu for case in cases] == [[1, 1, 1], [1, 3, 2]]  # of one run
    console = Console(width=200)
    with console.capture() as captured:
        console.print(timing.table("title", cases))
    assert re.search(r"b \[x\] +2\.00 +1\.50 to 2\.50 +≤ 1\.4 +missed", captured.get())


def test_what_is_timed_is_the_step_of_training(monkeypatch):
    runs, taken, step = steps.one_run("steps=3", "eval_every=0"), [], loop.Trainer.step
    monkeypatch.setattr(loop.Trainer, "step", lambda trainer: (taken.append(trainer.steps_done), step(trainer))[1])
    loop.fit(runs, lambda checkpoint: None)
    assert (taken, runs.layout.shapes) == ([0, 1, 2], [(128, 2), (128, 128), (1, 128)])
    x = torch.randn(2, 7, 10, generator=torch.Generator().manual_seed(0))
    assert torch.equal(steps.MinimumMaximum()(x), GroupSort()(x))


@pytest.mark.parametrize("arguments", [["stpe"], ["--rounds", "0"]])
def test_bad_input_is_one_line(arguments, capsys):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(("lipexp: stpe: no such section; did you mean step?", "lipexp: --rounds=0: must be"))


# Accuracy --------------------------------------------------------------------------------------------------------


OTHERS = {accuracy.FREE: [0.97, 0.95, 0.96], accuracy.LINEAR: [0.98, 0.96, 0.97], accuracy.TREES: [0.9, 0.99, 0.9]}


@pytest.mark.parametrize(
    ("metric", "own", "met"),
    [
        ("accuracy", [0.97, 0.95, 0.961], True),  # 0.97 on average is the best of the others
        ("accuracy", [0.97, 0.95, 0.959], False),
        ("r2", [0.96, 0.94, 0.951], True),
        ("r2", [0.96, 0.94, 0.949], False),
    ],
)
def test_lipexp_is_compared_with_the_best_mean_of_the_others_seed_by_seed(metric, own, met):
    found = accuracy.Compared("wine", metric, {accuracy.OWN: own, **OTHERS}, "91.2 at 0.5")
    assert found.best == accuracy.LINEAR
    difference = np.subtract(own, OTHERS[accuracy.LINEAR])
    assert found.differences == pytest.approx(difference)
    assert accuracy.standard_error(found.differences) == pytest.approx(sem(difference))
    assert found.met == met


def test_the_table_of_scores_fits_into_80_columns_and_says_what_is_missed():
    console = Console(width=80)
    columns = [
        accuracy.Compared(
            "breast_cancer", "accuracy", {accuracy.OWN: [0.9561, 0.9649, 0.9474], **OTHERS}, "88.2 at 0.5"
        ),
        accuracy.Compared("wine", "accuracy", {accuracy.OWN: [1.0, 1.0, 1.0], **OTHERS}, "100.0 at 0.5"),
        accuracy.Compared("digits", "accuracy", {accuracy.OWN: [0.97, 0.95, 0.957], **OTHERS}, "81.5 at 0.25"),
        accuracy.Compared("diabetes", "r2", {accuracy.OWN: [0.4, 0.5, -0.6], **OTHERS}, "1.70 a unit"),
    ]
    with console.capture() as captured:
        console.print(accuracy.table(columns))
    shown = [re.split("  +", line.strip()) for line in captured.get().splitlines()]
    assert shown == [
        ["breast_cancer", "wine", "digits", "diabetes"],
        ["3 seeds", "accuracy", "accuracy", "accuracy", "r2"],
        ["lipexp", "95.6 ± 0.5", "100.0 ± 0.0", "95.9 ± 0.6", "0.100 ± 0.351"],
        ["without a bound", *["96.0 ± 0.6"] * 3, "0.960 ± 0.006"],
        ["linear", *["97.0 ± 0.6"] * 3, "0.970 ± 0.006"],
        ["boosted trees", *["93.0 ± 3.0"] * 3, "0.930 ± 0.030"],
        ["difference", "−1.39 ± 0.94", "+3.00 ± 0.58", "−1.10 ± 0.10", "−0.870 ± 0.352"],
        ["aim", "≥ −1", "missed", "≥ −1", "met", "≥ −1", "missed", "≥ −0.02", "missed"],
        ["certified", "88.2 at 0.5", "100.0 at 0.5", "81.5 at 0.25", "1.70 a unit"],
    ]


@pytest.mark.parametrize("regression", [False, True])
def test_a_model_is_chosen_by_validation_alone_as_scikit_learn_chooses_it(regression):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 120, 8)).astype(np.float32)
    y = x[..., 0] + rng.normal(size=(3, 120))
    y = (y if regression else y > 0).astype(np.float32)
    data = [Data(x[k, :40], y[k, :40], x[k, 40:80], y[k, 40:80], x[k, 80:], y[k, 80:]) for k in range(3)]
    models = accuracy.peers(regression)[accuracy.LINEAR]
    name = "alpha" if regression else "C"
    grid = {name: [getattr(model, name) for model in models]}
    split = PredefinedSplit([-1] * 40 + [0] * 40)
    means = np.mean(
        [
            GridSearchCV(models[0], grid, cv=split, refit=False)
            .fit(x[k, :80], y[k, :80])
            .cv_results_["mean_test_score"]
            for k in range(3)
        ],
        axis=0,
    )
    best = models[int(means.argmax())]
    expected = [best.fit(x[k, :40], y[k, :40]).score(x[k, 80:], y[k, 80:]) for k in range(3)]
    assert accuracy.best_of(models, data) == pytest.approx(expected)


def test_a_learning_rate_is_chosen_by_validation_alone():
    runs = pd.DataFrame(
        {
            "seed": [0, 0, 1, 1],
            "optim.lr": [0.1, 0.3, 0.1, 0.3],
            "val.accuracy": [0.8, 0.9, 0.85, 0.8],
            "test.accuracy": [0.99, 0.7, 0.98, 0.6],
        }
    )
    assert accuracy.chosen_on_validation(runs, "accuracy") == [0.7, 0.6]


def test_the_others_learn_from_the_rows_of_the_run(trained_run):
    run = load_run(trained_run("dataset=wine", "loss=cross_entropy", "seed=3"))
    table, data = run.table("gradients"), accuracy.data_of(run.config)
    for split in ("train", "val", "test"):
        x, y = data.part(split)
        rows = table[table["split"] == split]
        assert np.allclose(rows.filter(regex=r"^x\d").to_numpy(), x, rtol=1e-6)
        assert rows["y"].tolist() == y.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("name", accuracy.RADII)
def test_an_experiment_on_real_data_is_as_good_as_the_best_of_the_others(name, tmp_path):
    found = accuracy.compared(tmp_path, name, accuracy.RADII[name])
    assert {len(scores) for scores in found.scores.values()} == {5}
    for seed, score in enumerate(found.scores[accuracy.OWN]):
        assert metrics(tmp_path / name / str(seed))["test"][found.metric] == score
    assert found.met


# Peers -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_peers(monkeypatch):
    """Networks of width 8, three steps and two seeds, and no library but torch."""
    for module in (libraries, peers):
        monkeypatch.setattr(module, "WIDTH", 8)
    for name, value in (("SEEDS", 2), ("STEPS", 3), ("LOOK_EVERY", 2)):
        monkeypatch.setattr(peers, name, value)
    monkeypatch.setattr(libraries, "LIBRARIES", {"absent": ("no_such_module", None)})


def test_the_peers_that_are_installed_have_a_row_each_and_the_others_are_named(small_peers, capsys):
    assert main(["peers", "--rounds", "1"]) == 0
    missing, *lines = capsys.readouterr().out.splitlines()
    assert missing == "not installed: absent (pip install absent)"
    rows = [re.split("  +", line.strip()) for line in lines]
    rows = [cells for cells in rows if len(cells) > 5 and "±" in cells[1]]
    own = ["spectral", "qr", "orthogonal", "cayley", "matrix_exp"]
    for name, *_, constant, alone, in_stack, aims in (cells for cells in rows if cells[0] in own):
        assert float(constant) <= 0, name
        assert min(float(alone), float(in_stack)) > 0
        assert re.fullmatch(r"met|missed: (accuracy|loss|share)(, (loss|share))*", aims)
    theirs = {name: cells for name, *cells in rows if name not in own}
    assert [name for name, *_ in rows if name in own] == ["spectral", "qr", *own[2:]]
    assert list(theirs) == [f"torch {map_} + MaxMin" for map_ in ("spectral_norm", "householder", *own[3:])]
    for name, (*_, constant, in_training, time) in theirs.items():
        assert abs(float(constant)) < (1 if "spectral" in name else 1e-5), name
        assert float(in_training) > -0.5
        assert re.fullmatch(rf"{NUMBER} (µs|ms)", time)


@pytest.mark.parametrize("problem", peers.PROBLEMS)
def test_other_networks_learn_by_the_same_batches_loss_and_schedule(problem, small_peers):
    runs = peers.stacked(problem, "none act=relu", 2)
    trainer = loop.Trainer(runs)
    networks = [steps.mlp(torch.nn.Linear, torch.nn.ReLU, 8) for _ in range(2)]
    for run, network in enumerate(networks):
        for part, layer in zip([part for part in network if hasattr(part, "weight")], trainer.layers, strict=True):
            part.weight.data.copy_(layer.weight[run])
            part.bias.data.copy_(layer.bias[run, 0])
    learners = [peers.torch_step(network, runs, run) for run, network in enumerate(networks)]
    for _ in range(peers.STEPS):
        trainer.step()
        for learn in learners:
            learn()
    for run, network in enumerate(networks):
        found = torch.cat([part.flatten() for part in network.parameters()])
        assert torch.allclose(found, trainer.parameters[run], rtol=0, atol=1e-5)  # a step has the size 1e-2


def test_the_constant_of_a_network_is_the_product_of_its_layers_norms():
    act = torch.nn.ReLU
    network = steps.mlp(torch.nn.Linear, act, 8)
    first, second, third = (part.weight.detach().double().numpy() for part in network[::2])
    norms = (libraries.longest_row, libraries.row_sum, libraries.column_sum)
    expected = max(map(np.linalg.norm, first)) * abs(second).sum(axis=1).max() * abs(third).sum(axis=0).max()
    rival = libraries.Rival("name", lambda: network, ["none"], norms)
    assert libraries.constant(rival, network) == pytest.approx(expected)
    spectral = libraries.Rival(
        "name", lambda: network, ["none"], (libraries.spectral, *(libraries.frobenius,) * 2)
    )
    expected = np.linalg.svd(first)[1][0] * np.sqrt((second**2).sum()) * np.sqrt((third**2).sum())
    assert libraries.constant(spectral, network) == pytest.approx(expected)


@pytest.mark.parametrize("size", [0.3, 1.0, 2.0])
def test_the_bound_of_a_residual_layer_is_the_largest_norm_of_its_jacobians(size):
    """Over the 2^M patterns of active features, of which each Jacobian has one."""
    draw = torch.Generator().manual_seed(0)
    weight, t = size * torch.randn(6, 4, generator=draw), torch.rand(6, generator=draw)
    layer = SimpleNamespace(weight=weight, compute_t=lambda: t)
    patterns = itertools.product([0.0, 1.0], repeat=6)
    jacobians = [
        torch.eye(4) - 2 * weight.T @ torch.diag(t * torch.tensor(active)) @ weight for active in patterns
    ]
    largest = float(torch.linalg.matrix_norm(torch.stack(jacobians), ord=2).max())
    assert float(libraries.residual(layer)) == pytest.approx(largest, rel=1e-5)


def test_outputs_are_scored_as_those_of_a_network_that_keeps_the_bound(small_peers):
    runs = peers.stacked(peers.MOONS, "spectral", 1)
    f = torch.randn(2000, generator=torch.Generator().manual_seed(0))
    above, scaled, below = (peers.Learnt() for _ in range(3))
    above.note(peers.MOONS, runs, 0, f, 4.0)
    scaled.note(peers.MOONS, runs, 0, f / 4, 1.0)
    below.note(peers.MOONS, runs, 0, f, 0.25)
    assert above.scores == scaled.scores != below.scores
    y = 2 * runs.data[0].test_y - 1
    assert below.scores[peers.LOSS] == [pytest.approx(np.maximum(0, steps.MARGIN - y * f.numpy()).mean())]
    assert below.scores[peers.ACCURACY] == [np.mean(y * f.numpy() > 0)]


def test_worse_is_what_lies_behind_by_more_than_the_standard_error_of_the_difference():
    def learnt(accuracy: list[float], loss: list[float], share: list[float]) -> peers.Learnt:
        return peers.Learnt(dict(zip(peers.MEASURES, (accuracy, loss, share), strict=True)))

    theirs = learnt([0.9, 1.0], [0.1, 0.2], [0.5, 0.7])
    assert peers.worse(theirs, theirs) == []
    assert peers.worse(learnt([0.89, 0.99], [0.11, 0.21], [0.49, 0.69]), theirs) == ["accuracy", "loss", "share"]
    assert peers.worse(learnt([0.88, 1.01], [0.09, 0.19], [0.51, 0.71]), theirs) == []  # -0.005 +- 0.015
