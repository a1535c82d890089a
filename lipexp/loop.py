"""The training loop: K stacked runs at once, of which a single run is the case K = 1.

Shapes: K runs, B points in a batch, N points, D inputs, P parameters of a run.

Nothing depends on K or on the device: each run draws its random numbers from its own streams, on the CPU, and no
operation mixes runs. A run whose loss stops being finite is marked as failed and left alone; its numbers cannot
reach the others.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lipexp.activations import Activation
from lipexp.blocks import inputs_and_output
from lipexp.constraints import Constraint
from lipexp.datasets import Data
from lipexp.losses import Loss
from lipexp.models import Free, Layout, Model, flattened, unflatten
from lipexp.networks import BakedNetwork
from lipexp.optim import Optimiser
from lipexp.tasks import Task, squeezed

TICK = 20  # steps between two calls of `tick`


class Streams(NamedTuple):
    """The independent random streams of one run."""

    data: np.random.SeedSequence
    weights: np.random.SeedSequence
    batches: np.random.SeedSequence
    search: np.random.SeedSequence

    @classmethod
    def of(cls, seed: int) -> Streams:
        return cls(*np.random.SeedSequence(seed).spawn(4))


def generator(stream: np.random.SeedSequence) -> torch.Generator:
    """A CPU generator of torch at the start of `stream`; torch takes 32 bits of it as its seed."""
    return torch.Generator().manual_seed(int(stream.generate_state(1, np.uint64)[0]))


@dataclass
class Stack:
    """K runs of one signature: one object per room, and what each run has of its own."""

    model: Model
    layout: Layout  # of the parameters of a run
    act: Activation
    constraint: Constraint
    loss: Loss
    optim: Optimiser
    task: Task
    data: Sequence[Data]  # one per run
    streams: Sequence[Streams]  # one per run
    steps: int
    batch_size: int
    eval_every: int  # 0: only before the first and after the last step
    keep: str = "last"  # the network of a run that is kept: the last one, or the best one on validation
    patience: int = 0  # a run stops after so many checkpoints that are no better on validation; 0: never
    max_regions: int = 0  # to be enumerated at the end


class Failure(NamedTuple):
    """Why and when a run failed."""

    reason: str
    step: int


@dataclass
class Checkpoint:
    """The baked networks after `step` steps, which `fit` hands to its argument `evaluate`."""

    step: int
    network: BakedNetwork
    failures: dict[int, Failure] = field(default_factory=dict)  # run -> failure; its parameters are zero
    stopped: frozenset[int] = frozenset()  # the runs that stopped before; they have the parameters of then
    kept: Sequence[int] = ()  # in the end: the step that the network of each run is from, unless it is `step`


Value = tuple[float, ...]  # how good a network is on validation, larger is better: see `Task.value`


class Selection:
    """What `keep` and `patience` choose on validation: the parameters of each run to be kept, and who has stopped.

    A run that has stopped is frozen: it keeps its parameters, and the others go on as if it were not there.
    """

    def __init__(self, stack: Stack, parameters: Tensor) -> None:
        self.best_only, self.patience = stack.keep == "best", stack.patience
        self.parameters = parameters  # (K, P), those in training
        self.kept = parameters.clone() if self.best_only else parameters  # (K, P)
        self.steps = [0] * len(parameters)  # that they are from
        self.best: dict[int, Value] = {}
        self.waited = [0] * len(parameters)  # checkpoints since the best one
        self.stopped: set[int] = set()
        self._at_rest: Tensor | None = None  # (S, P) the parameters of the runs that have stopped

    def look(self, step: int, values: Sequence[Value | None] | None) -> None:
        """Take note of the value of each run at `step`; None for one that has failed."""
        for run, value in enumerate(values or ()):
            if value is None or run in self.stopped:
                continue
            better = run not in self.best or value > self.best[run]
            if better:
                self.best[run] = value
            self.waited[run] = 0 if better else self.waited[run] + 1
            if better or not self.best_only:
                self.kept[run], self.steps[run] = self.parameters[run], step
            if self.patience and self.waited[run] >= self.patience:
                self.stopped.add(run)
        if self.stopped:
            self._at_rest = self.parameters[sorted(self.stopped)].clone()

    def freeze(self) -> None:
        """Undo the last step of the runs that have stopped."""
        if self._at_rest is not None:
            self.parameters[sorted(self.stopped)] = self._at_rest


class Trainer:
    """K runs in training: their parameters, their data, and the step.

    `fit` takes the steps and makes the checkpoints; `lipexp bench` times the steps alone.
    """

    def __init__(
        self, stack: Stack, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        self.stack = stack
        self.steps_done = 0
        # Copies: evaluation works with the originals, on the CPU and in float64.
        self.act = copy.deepcopy(stack.act).to(device, dtype)
        self.loss = copy.deepcopy(stack.loss).to(device, dtype)
        self.x = torch.stack([torch.from_numpy(data.train_x) for data in stack.data]).to(
            device, dtype
        )  # (K, N, D)
        self.y = torch.stack([torch.from_numpy(data.train_y) for data in stack.data]).to(device, dtype)  # (K, N)
        batch_generators = [generator(s.batches) for s in stack.streams]
        self._batches = batch_indices(self.x.shape[1], stack.batch_size, batch_generators)
        # The index of each run's first point in the list of all runs' points: one index_select from that list is
        # several times as fast as a gather from each run.
        self._starts = self.x.shape[1] * torch.arange(len(stack.data)).view(-1, 1)  # (K, 1)

        starts = [stack.layout.start(stack.model, stack.act, generator(s.weights)) for s in stack.streams]
        parameters = torch.stack(starts)
        self.parameters = parameters.to(device, dtype)  # (K, P)
        # The layers are views of them that are leaves of the autograd graph.
        self.layers = [
            Free(*(part.detach().requires_grad_() for part in layer))
            for layer in unflatten(self.parameters, stack.layout)
        ]
        stack.constraint.start(self.layers)
        linear = stack.constraint.linear()
        self.linear = None if linear is None else linear.expand(len(starts), -1, -1).to(device, dtype)
        stack.optim.start(self.parameters)
        _keep_freed_memory()

    def step(self) -> Tensor:
        """One optimiser step of every run; returns the losses (K,) before it."""
        stack = self.stack
        index = (next(self._batches) + self._starts).to(self.x.device, non_blocking=True)  # (K, B)
        x, y = (part.flatten(0, 1).index_select(0, index.flatten()) for part in (self.x, self.y))
        blocks, acts = stack.constraint.apply(self.layers), stack.constraint.acts(self.layers, self.act)
        x = x.unflatten(0, index.shape).requires_grad_(stack.constraint.needs_gradients)
        f = inputs_and_output(blocks, acts, x, self.linear)[1]
        loss = self.loss(squeezed(f), y.unflatten(0, index.shape)).mean(dim=1)  # (K,)
        penalty = stack.constraint.penalty(blocks, acts, x, f)
        if penalty is not None:
            loss = loss + penalty
        leaves = [*flattened(self.layers)]
        # Parameters that a user's class cuts off from the loss get a zero gradient, instead of an error.
        gradients = torch.autograd.grad(loss.sum(), leaves, materialize_grads=True)
        gradient = torch.cat([part.flatten(1) for part in gradients], dim=1)  # (K, P)
        with torch.no_grad():
            stack.optim.step(self.parameters, gradient, progress=self.steps_done / stack.steps)
        self.steps_done += 1
        return loss.detach()


def fit(
    stack: Stack,
    evaluate: Callable[[Checkpoint], Sequence[Value | None] | None],
    tick: Callable[[int], None] = lambda step: None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Checkpoint:
    """Train a stack of runs and return the networks that are kept, as a checkpoint.

    Args:
        evaluate: called with the baked networks before the first step, every `eval_every` steps and at the end;
            returns how good each run is on validation, None for one that has failed. Only `keep` and `patience`
            need that.
        tick: called with the number of finished steps every few steps, for a progress display.
    """
    trainer = Trainer(stack, device, dtype)
    parameters = trainer.parameters
    selection = Selection(stack, parameters)
    failures: dict[int, Failure] = {}

    def checkpoint(step: int, parameters: Tensor = parameters) -> Checkpoint:
        finite = torch.isfinite(parameters).all(dim=1)  # (K,)
        for run in (~finite).nonzero().flatten().tolist():
            failures.setdefault(run, Failure("the parameters are no longer finite", step))
        lost = torch.zeros(len(parameters), 1, dtype=torch.bool, device=parameters.device)
        lost[list(failures)] = True
        network = stack.constraint.bake(unflatten(parameters.masked_fill(lost, 0), stack.layout), stack.act)
        for run in range(len(parameters)):
            if not network.is_finite(run):
                failures.setdefault(run, Failure("the network does not fit into float32", step))
        kept = selection.steps if selection.best_only or selection.patience else ()
        return Checkpoint(step, network, dict(failures), frozenset(selection.stopped), kept)

    current = checkpoint(0)
    selection.look(0, evaluate(current))
    losses: list[Tensor] = []  # (K,) each, of the steps since the last checkpoint
    for step in range(1, stack.steps + 1):
        losses.append(trainer.step())
        selection.freeze()
        if step == stack.steps or (stack.eval_every and step % stack.eval_every == 0):
            _note_failures(losses, step, failures)
            losses.clear()
            current = checkpoint(step)
            selection.look(step, evaluate(current))
            if len(failures.keys() | selection.stopped) == len(stack.streams):
                break
        if step % TICK == 0:
            tick(step)
    if selection.best_only:
        return checkpoint(current.step, selection.kept)
    return current


def batch_indices(n: int, batch_size: int, generators: Sequence[torch.Generator]) -> Iterator[Tensor]:
    """Endless (K, B) indices into N points: each run goes through its own permutations, in whole batches."""
    while True:
        shuffled = torch.stack([torch.randperm(n, generator=g) for g in generators])
        for start in range(0, n - batch_size + 1, batch_size):
            yield shuffled[:, start : start + batch_size]


def _keep_freed_memory() -> None:
    """Have the C library keep freed memory for the next step.

    glibc returns blocks as large as a stack's features to the system, and requesting them again costs a fifth of
    the time of a step. It keeps them once it has seen a block of nearly 32 MiB freed (mallopt(3),
    M_MMAP_THRESHOLD).
    """
    torch.empty(31 * 2**20, dtype=torch.uint8)


def _note_failures(losses: Sequence[Tensor], step: int, failures: dict[int, Failure]) -> None:
    """Add the runs whose loss was not finite in one of the steps that end with `step`."""
    finite = torch.isfinite(torch.stack(list(losses))).cpu()  # (steps, K)
    for run in (~finite.all(dim=0)).nonzero().flatten().tolist():
        first = int((~finite[:, run]).nonzero()[0])
        failures.setdefault(run, Failure("the loss is no longer finite", step - len(losses) + 1 + first))
