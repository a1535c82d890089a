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
    initial = runs.model.initial(runs.shapes, generator(Streams.of(0).weights))
    assert torch.equal(torch.cat([part.flatten() for layer in stored for part in layer]), initial)
