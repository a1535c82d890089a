"""The loop's law: K stacked runs are the K single runs."""

from __future__ import annotations

from itertools import islice, product

import pytest
import torch

from lipexp.config import conf_dir
from lipexp.evaluate import Evaluator
from lipexp.loop import Streams, Trainer, batch_indices, fit, generator
from lipexp.measured.gradients import norms, scan
from lipexp.models import Layer, unflatten
from lipexp.train import build, signature, stack

SMALL = (
    "experiment=debug",
    "device=cpu",
    "model.width=8",
    "dataset.n_train=96",
    "dataset.n_test=32",
    "batch_size=32",
)


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))


@pytest.fixture
def member(compose):
    """member("act=relu", "seed=1") -> a checked configuration with its objects."""
    return lambda *overrides: build(compose(*SMALL, *overrides))


def trained(members, eval_every=None):
    """The last checkpoint of a stack, and all its history lines: one list a run."""
    runs = stack(members)
    if eval_every is not None:
        runs.eval_every = eval_every
    evaluator, history = Evaluator(runs), []
    last = fit(runs, lambda checkpoint: history.append(evaluator.history(checkpoint)))
    return last, list(zip(*history, strict=True))


LOSSES = {"bce": "two_moons", "hinge": "two_moons", "mse": "absolute_value", "kantorovich": "cones"}
COMBINATIONS = list(product(options("act"), options("constraint"), options("loss")))


def varied(member, act, constraint, loss):
    """Four runs that differ in everything that may differ within a stack."""
    fixed = (f"act={act}", f"constraint={constraint}", f"dataset={LOSSES[loss]}", f"loss={loss}", "steps=60")
    own = {
        "bce": "loss.temperature=3",
        "hinge": "loss.margin=0.3",
        "mse": "seed=7",
        "kantorovich": "seed=7",
    }[loss]
    noise = ["dataset.noise=0.1"] if LOSSES[loss] == "two_moons" else ["seed=5"]
    return [
        member(*fixed),
        member(*fixed, "seed=1", "optim.lr=0.003"),
        member(*fixed, "seed=2", "lipschitz=3", own),
        member(*fixed, "seed=3", "lipschitz=0.1", "optim.weight_decay=0.001", *noise),
    ]


@pytest.mark.parametrize(("act", "constraint", "loss"), COMBINATIONS)
def test_stacked_runs_equal_single_runs(member, act, constraint, loss):
    members = varied(member, act, constraint, loss)
    _, history = trained(members)
    for run, one in enumerate(members):
        _, (own_history,) = trained([one])
        for stacked_row, row in zip(history[run], own_history, strict=True):
            assert stacked_row.keys() == row.keys()
            # float32 over 60 steps: matrix products of another shape may add in another order.
            assert list(stacked_row.values()) == pytest.approx(list(row.values()), rel=1e-4, abs=1e-7)


@pytest.mark.parametrize(("act", "constraint", "loss"), COMBINATIONS)
def test_stacked_runs_equal_single_runs_in_float64(member, act, constraint, loss):
    members = varied(member, act, constraint, loss)
    losses, steepest = in_float64(members)
    for run, one in enumerate(members):
        own_losses, own_steepest = in_float64([one])
        torch.testing.assert_close(losses[:, run], own_losses[:, 0], rtol=1e-9, atol=1e-13)
        torch.testing.assert_close(steepest[run], own_steepest[0], rtol=1e-9, atol=1e-13)


def in_float64(members):
    """(steps, K) the loss before each step, and (K,) the largest gradient norm at the data after them.

    Of the networks as they train; a baked one is in float32, and a weight between two of its numbers may go to
    either.
    """
    runs = stack(members)
    trainer = Trainer(runs, dtype=torch.float64)
    losses = torch.stack([trainer.step() for _ in range(runs.steps)])
    layers = [Layer(*(part.detach() for part in layer)) for layer in runs.constraint.apply(trainer.layers)]
    return losses, norms(scan(layers, trainer.act, trainer.x).gradient, runs.constraint.q).amax(dim=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("act", "constraint", "loss"), [case for case in COMBINATIONS if LOSSES[case[2]] == "two_moons"]
)
def test_stacked_runs_are_as_accurate_as_single_runs_after_a_full_run(compose, act, constraint, loss):
    settings = (f"act={act}", f"constraint={constraint}", f"loss={loss}", "device=cpu", "eval_every=0")
    members = [build(compose(*settings, f"seed={seed}")) for seed in range(3)]
    _, history = trained(members)
    for run, one in enumerate(members):
        _, (own_history,) = trained([one])
        assert history[run][-1]["test_accuracy"] == pytest.approx(own_history[-1]["test_accuracy"], abs=0.001)


def test_data_initial_weights_and_batches_do_not_depend_on_the_stack(member):
    members = [member(f"seed={seed}") for seed in (4, 5, 6)]
    runs = stack(members)
    shapes = runs.model.shapes(2)
    streams = [Streams.of(seed) for seed in (4, 5, 6)]
    together = list(islice(batch_indices(96, 32, [generator(s.batches) for s in streams]), 7))
    for run, one in enumerate(members):
        (own_data,) = stack([one]).data
        for ours, theirs in zip(runs.data[run], own_data, strict=True):
            assert (ours == theirs).all()
        own = list(islice(batch_indices(96, 32, [generator(streams[run].batches)]), 7))
        assert all(torch.equal(a[run], b[0]) for a, b in zip(together, own, strict=True))
    first = [
        [runs.model.initial(shapes, generator(Streams.of(s).weights)) for s in group] for group in ((4, 5), (5,))
    ]
    assert torch.equal(first[0][1], first[1][0])


def test_batches_are_drawn_without_replacement():
    batches = list(islice(batch_indices(10, 3, [generator(Streams.of(s).batches) for s in (0, 1)]), 6))
    for run in range(2):
        for epoch in (batches[:3], batches[3:]):
            seen = torch.cat([batch[run] for batch in epoch]).tolist()
            assert len(set(seen)) == 9
            assert set(seen) <= set(range(10))
    assert not torch.equal(batches[0][0], batches[0][1])
    assert not torch.equal(batches[0], batches[3])


def test_the_streams_of_a_run_are_independent():
    first, second = Streams.of(0), Streams.of(1)
    states = {tuple(stream.generate_state(4)) for streams in (first, second) for stream in streams}
    assert len(states) == 8


def test_a_failed_run_does_not_disturb_the_others(member):
    common = ("constraint=none", "loss=bce", "steps=30", "eval_every=10")
    sound = [member(*common, f"seed={seed}") for seed in (0, 2)]
    broken = member(*common, "seed=1", "optim.lr=1e30")
    last, history = trained([sound[0], broken, sound[1]])
    # The same stack with a run that does not fail in the middle: its neighbours must not differ in a single bit.
    quiet, quiet_history = trained([sound[0], member(*common, "seed=1"), sound[1]])
    assert set(last.failures) == {1}
    assert last.failures[1].step == 2
    assert "finite" in last.failures[1].reason
    for run in (0, 2):
        assert history[run] == quiet_history[run]
        for ours, theirs in zip(last.layers, quiet.layers, strict=True):
            assert torch.equal(ours.weight[run], theirs.weight[run])
    assert history[1][-1] == {}
    assert Evaluator(stack([sound[0], broken, sound[1]])).final(last)[1] is None


def test_checkpoints_come_first_last_and_every_so_often(member):
    steps = []
    runs = stack([member("steps=25", "eval_every=10")])
    fit(runs, lambda checkpoint: steps.append(checkpoint.step))
    assert steps == [0, 10, 20, 25]
    steps.clear()
    runs.eval_every = 0
    fit(runs, lambda checkpoint: steps.append(checkpoint.step))
    assert steps == [0, 25]


def test_no_steps_leaves_the_initial_network(member):
    last, ((row,),) = trained([member("steps=0", "constraint=none", "act=relu")])
    assert row["step"] == 0
    initial = stack([member("act=relu")]).model.initial([(8, 2), (8, 8), (1, 8)], generator(Streams.of(0).weights))
    for ours, theirs in zip(last.layers, unflatten(initial[None], [(8, 2), (8, 8), (1, 8)]), strict=True):
        assert torch.equal(ours.weight, theirs.weight)


def test_training_does_not_touch_the_global_generators(member):
    before = torch.get_rng_state()
    trained([member()])
    assert torch.equal(before, torch.get_rng_state())


def test_what_may_differ_in_a_stack_is_not_in_the_signature(member):
    base = signature(member())
    same = [
        "seed=3",
        "lipschitz=2",
        "optim.lr=0.1",
        "optim.weight_decay=0.1",
        "loss.margin=0.1",
        "dataset.noise=0",
    ]
    different = ["act=relu", "constraint=linf", "loss=bce", "model.width=10", "model.depth=3", "steps=21"]
    different += ["batch_size=31", "eval_every=5", "dataset.scale=1", "optim.schedule=linear", "act=fullsort"]
    assert all(signature(member(override)) == base for override in same)
    assert all(signature(member(override)) != base for override in different)
    with pytest.raises(ValueError, match="signature"):
        stack([member(), member("act=relu")])
