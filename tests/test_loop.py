"""The loop: what a run draws depends on its seed alone, and a run that fails is left alone."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from lipexp.evaluate import Evaluator
from lipexp.loop import Streams, Trainer, batch_indices, fit, generator
from lipexp.members import build, stack

SMALL = ("experiment=debug", "device=cpu", "constraint=none", "loss=bce", "model.width=8", "batch_size=32")


@pytest.fixture
def member(compose):
    """member("act=relu", "seed=1") -> a checked configuration with its objects."""
    return lambda *overrides: build(compose(*SMALL, *overrides))


def trained(*members):
    """The last checkpoint of a stack, and all its history lines: one list a run."""
    runs = stack(members)
    evaluator, history = Evaluator(runs), []
    last = fit(runs, lambda checkpoint: history.append(evaluator.history(checkpoint)))
    return last, list(zip(*history, strict=True))


def test_data_initial_weights_and_batches_do_not_depend_on_the_stack(member):
    def drawn(*seeds):
        trainer = Trainer(stack([member(f"seed={seed}") for seed in seeds]))
        batches = batch_indices(200, 32, [generator(Streams.of(seed).batches) for seed in seeds])
        return trainer.x, trainer.y, trainer.parameters, torch.stack(list(islice(batches, 7)), dim=1)

    for together, alone in zip(drawn(4, 5, 6), drawn(5), strict=True):
        assert torch.equal(together[1], alone[0])


def test_batches_are_drawn_without_replacement():
    batches = list(islice(batch_indices(10, 3, [generator(Streams.of(s).batches) for s in (0, 1)]), 6))
    for epoch in (batches[:3], batches[3:]):
        for run in range(2):
            seen = torch.cat([batch[run] for batch in epoch]).tolist()
            assert len(set(seen) & set(range(10))) == len(seen) == 9
    assert not torch.equal(batches[0][0], batches[0][1])
    assert not torch.equal(batches[0], batches[3])


@pytest.mark.parametrize("constraint", ["none", "spectral"])
def test_a_failed_run_does_not_disturb_the_others(member, constraint):
    common = ("steps=30", "eval_every=10", f"constraint={constraint}")
    first, third = (member(*common, f"seed={seed}") for seed in (0, 2))
    broken = member(*common, "seed=1", "optim.lr=1e30")
    last, history = trained(first, broken, third)
    # The same stack with a run that does not fail in the middle: its neighbours must not differ in a single bit.
    quiet, quiet_history = trained(first, member(*common, "seed=1"), third)
    assert {run: failure.step for run, failure in last.failures.items()} == {1: 2}
    assert "finite" in last.failures[1].reason
    for run in (0, 2):
        assert history[run] == quiet_history[run]
        for ours, theirs in zip(last.network.layers, quiet.network.layers, strict=True):
            assert torch.equal(ours.weight[run], theirs.weight[run])
    assert history[1][-1] == {}
    assert Evaluator(stack([first, broken, third])).final(last)[1] is None
    assert trained(broken)[0].step == 10  # where nothing is left to train


def test_checkpoints_come_first_last_and_every_so_often_and_stay_as_they_are(member):
    for every, steps in ((10, [0, 10, 20, 25]), (0, [0, 25])):
        seen, ticks = [], []
        fit(stack([member("steps=25", f"eval_every={every}")]), seen.append, ticks.append)
        assert ([checkpoint.step for checkpoint in seen], ticks) == (steps, [20])
        assert not torch.equal(*(one.network.layers[0].weight for one in (seen[0], seen[-1])))


def test_no_steps_leaves_the_initial_network_and_no_global_generator_is_touched(member):
    before = torch.get_rng_state()
    runs = stack([member("steps=0")])
    stored = fit(runs, lambda checkpoint: None).network.layers
    assert torch.equal(before, torch.get_rng_state())
    initial = runs.layout.start(runs.model, runs.act, generator(Streams.of(0).weights))
    assert torch.equal(torch.cat([part.flatten() for layer in stored for part in layer]), initial)


VALUES = {  # of three runs, at the steps 0, 10, 20, 30 and 40; larger is better
    "falls": [5, 4, 3, 2, 1],
    "rises": [1, 2, 3, 4, 5],
    "peaks": [1, 6, 2, 3, 7],
}


@pytest.mark.parametrize(
    ("keep", "patience", "kept", "seen"),
    [
        ("last", 0, [40, 40, 40], [5, 5, 5]),
        ("best", 0, [0, 40, 40], [5, 5, 5]),
        ("last", 2, [20, 40, 30], [3, 5, 4]),
        ("best", 2, [0, 40, 10], [3, 5, 4]),
    ],
)
def test_a_run_keeps_what_validation_chooses_and_stops_without_disturbing_the_others(
    member, keep, patience, kept, seen
):
    def weights(network, run):
        return torch.cat([part[run].flatten() for layer in network.layers for part in layer])

    runs = stack([member("steps=40", "eval_every=10", "constraint=spectral", f"seed={s}") for s in range(3)])
    alike = []  # the networks of all steps, of runs that nothing stops
    fit(runs, lambda checkpoint: alike.append(checkpoint.network))
    runs.keep, runs.patience, looked = keep, patience, [0, 0, 0]

    def evaluate(checkpoint):
        step = checkpoint.step // 10
        for run in range(3):
            looked[run] += run not in checkpoint.stopped
            frozen = checkpoint.stopped and run in checkpoint.stopped
            expected = alike[seen[run] - 1 if frozen else step]
            assert torch.equal(weights(checkpoint.network, run), weights(expected, run))
        return [(values[step],) for values in VALUES.values()]

    last = fit(runs, evaluate)
    assert looked == seen
    assert (list(last.kept) or [last.step] * 3) == kept
    for run, step in enumerate(kept):
        assert torch.equal(weights(last.network, run), weights(alike[step // 10], run))


def test_a_stack_ends_when_all_of_its_runs_have_stopped(member):
    runs = stack([member("steps=40", "eval_every=10", "patience=1", f"seed={s}") for s in range(2)])
    seen = []
    last = fit(runs, lambda checkpoint: seen.append(checkpoint.step) or [(0.0,), (-checkpoint.step,)])
    assert (seen, last.step) == ([0, 10], 10)


def test_the_best_on_validation_has_the_best_metric_and_among_equals_the_smallest_loss(member):
    evaluator = Evaluator(stack([member("steps=1")]))
    rows = [
        {"val_accuracy": accuracy, "val_loss": loss} for accuracy, loss in ((0.9, 0.1), (0.9, 0.2), (0.8, 0.0))
    ]
    values = [evaluator.value(row) for row in rows]
    assert values == sorted(values, reverse=True)
    assert evaluator.value({}) is None
