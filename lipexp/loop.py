"""The training loop: K stacked runs at once, of which a single run is the case K = 1.

Shapes: K runs, B points in a batch, N points, D inputs, P parameters of a run.

Nothing depends on K or on the device: each run draws its random numbers from its own streams, on the CPU, and no
operation mixes runs. A run whose loss stops being finite is marked as failed and left alone; its numbers cannot
reach the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lipexp.activations import Activation
from lipexp.constraints import Constraint
from lipexp.datasets import Data
from lipexp.losses import Loss
from lipexp.models import MLP, Layer, forward, unflatten
from lipexp.optim import Adam

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
    """A CPU generator of torch at the start of `stream`."""
    return torch.Generator().manual_seed(int(stream.generate_state(1, np.uint64)[0]))


@dataclass
class Stack:
    """K runs of one signature: one object per room, and what each run has of its own."""

    model: MLP
    act: nn.Module
    constraint: Constraint
    loss: Loss
    optim: Adam
    data: Sequence[Data]  # one a run
    streams: Sequence[Streams]  # one a run
    steps: int
    batch_size: int
    eval_every: int  # 0: only before the first and after the last step


class Failure(NamedTuple):
    """Why and when a run stopped being one."""

    reason: str
    step: int


@dataclass
class Checkpoint:
    """The baked networks after `step` steps, as handed to `evaluate`."""

    step: int
    layers: list[Layer]  # float32, on the CPU, features in baked order
    act: nn.Module  # for features in baked order
    failures: dict[int, Failure] = field(default_factory=dict)  # run -> failure; its layers are zero


def fit(
    stack: Stack,
    evaluate: Callable[[Checkpoint], None],
    tick: Callable[[int], None] = lambda step: None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Checkpoint:
    """Train a stack of runs and return its last checkpoint.

    Args:
        evaluate: called with the baked networks before the first step, every `eval_every` steps and at the end.
        tick: called with the number of finished steps now and then, for a progress display.
    """
    shapes = stack.model.shapes(stack.data[0].train_x.shape[1])
    parameters = torch.stack([stack.model.initial(shapes, generator(s.weights)) for s in stack.streams])
    parameters = parameters.to(device, dtype).requires_grad_()  # (K, P)
    x = torch.stack([torch.from_numpy(data.train_x) for data in stack.data]).to(device, dtype)  # (K, N, D)
    y = torch.stack([torch.from_numpy(data.train_y) for data in stack.data]).to(device, dtype)  # (K, N)
    batches = batch_indices(x.shape[1], stack.batch_size, [generator(s.batches) for s in stack.streams])
    act = stack.act.to(device, dtype)
    baked_act = act.baked() if isinstance(act, Activation) else act

    stack.constraint.start(unflatten(parameters, shapes))
    stack.optim.start(parameters.detach())
    failures: dict[int, Failure] = {}

    def checkpoint(step: int) -> Checkpoint:
        finite = torch.isfinite(parameters.detach()).all(dim=1)  # (K,)
        for run in (~finite).nonzero().flatten().tolist():
            failures.setdefault(run, Failure("the parameters are no longer finite", step))
        lost = torch.zeros(len(parameters), 1, dtype=torch.bool, device=parameters.device)
        lost[list(failures)] = True
        sound = parameters.detach().masked_fill(lost, 0)
        layers = stack.constraint.bake(unflatten(sound, shapes), act)
        return Checkpoint(step, layers, baked_act, dict(failures))

    current = checkpoint(0)
    evaluate(current)
    losses: list[Tensor] = []  # (K,) each, since the last checkpoint
    for step in range(1, stack.steps + 1):
        index = next(batches).to(device)  # (K, B)
        f = forward(stack.constraint.apply(unflatten(parameters, shapes)), act, _rows(x, index))
        loss = stack.loss(f.squeeze(-1), y.gather(1, index)).mean(dim=1)  # (K,)
        (gradient,) = torch.autograd.grad(loss.sum(), parameters)
        with torch.no_grad():
            stack.optim.step(parameters, gradient, progress=(step - 1) / stack.steps)
        losses.append(loss.detach())
        if step == stack.steps or (stack.eval_every and step % stack.eval_every == 0):
            _note_failures(losses, step, failures)
            losses.clear()
            current = checkpoint(step)
            evaluate(current)
            if len(failures) == len(stack.streams):
                break
        if step % TICK == 0:
            tick(step)
    return current


def batch_indices(n: int, batch_size: int, generators: Sequence[torch.Generator]) -> Iterator[Tensor]:
    """Endless (K, B) indices into N points: each run goes through its own permutations, in whole batches."""
    while True:
        shuffled = torch.stack([torch.randperm(n, generator=g) for g in generators])
        for start in range(0, n - batch_size + 1, batch_size):
            yield shuffled[:, start : start + batch_size]


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """(K, B, D) the rows of x (K, N, D) at index (K, B)."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def _note_failures(losses: Sequence[Tensor], step: int, failures: dict[int, Failure]) -> None:
    """Add the runs whose loss was not finite in one of the steps that end with `step`."""
    finite = torch.isfinite(torch.stack(list(losses))).cpu()  # (steps, K)
    for run in (~finite.all(dim=0)).nonzero().flatten().tolist():
        first = int((~finite[:, run]).nonzero()[0])
        failures.setdefault(run, Failure("the loss is no longer finite", step - len(losses) + 1 + first))
