"""The laws of losses, datasets, models and optimisers."""

from __future__ import annotations

from collections import Counter
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lipexp.config import ConfigError
from lipexp.datasets import Dataset
from lipexp.laws.subject import Broken, Law, Subject, shown
from lipexp.loop import Streams, generator
from lipexp.losses import Loss
from lipexp.members import stack
from lipexp.tasks import TASKS

# Losses ----------------------------------------------------------------------------------------------------------


def loss_and_batch(subject: Subject, runs: int = 3) -> tuple[Loss, Tensor, Tensor]:
    """The loss of a stack, with outputs and targets (K, B), or (K, B, C) for several outputs, in float64."""
    dataset: Dataset = subject.member.parts["dataset"]
    loss: Loss = stack(subject.variants(runs)).loss
    of_outputs = () if dataset.n_outputs == 1 else (dataset.n_outputs,)
    f = subject.normal(runs, 40, *of_outputs)
    if not TASKS[dataset.task].has_classes:
        return loss, f, subject.normal(*f.shape)
    y = torch.randint(max(2, dataset.n_outputs), (runs, 40), generator=subject.generator)
    return loss, f, y.double()


def one_number_per_sample(subject: Subject) -> str | None:
    """It returns one finite number per sample, (K, B)."""
    loss, f, y = loss_and_batch(subject)
    found = loss(f, y)
    if found.shape != f.shape[:2] or not torch.isfinite(found).all():
        raise Broken(f"outputs of shape {tuple(f.shape)} give {tuple(found.shape)}: {shown(found[0])}")
    return None


def is_a_mean_over_samples(subject: Subject) -> str | None:
    """It is a mean over samples: their order and number do not matter."""
    loss, f, y = loss_and_batch(subject)
    order = torch.randperm(f.shape[1], generator=subject.generator)
    mean = loss(f, y).mean(dim=1)
    for what, other in (
        ("in another order", loss(f[:, order], y[:, order])),
        ("with every sample twice", loss(torch.cat([f, f], dim=1), torch.cat([y, y], dim=1))),
    ):
        if not torch.allclose(other.mean(dim=1), mean, rtol=1e-9, atol=1e-12):
            raise Broken(f"the mean is {shown(mean)}, {what} {shown(other.mean(dim=1))}")
    return None


def loss_has_true_finite_gradients(subject: Subject) -> str | None:
    """Its derivatives are finite, for outputs up to some 30, and agree with finite differences."""
    loss, f, y = loss_and_batch(subject)
    for outputs in ((10 * f).float(), 10 * f, 0 * f, f):
        (gradient,) = torch.autograd.grad(loss(outputs.requires_grad_(), y.to(outputs.dtype)).sum(), outputs)
        if not torch.isfinite(gradient).all():
            raise Broken(f"outputs {shown(outputs[0])} give the derivatives {shown(gradient[0])}")
    step = 1e-6
    # A few samples, one output after the other, since a sample may act on the others.
    for place in product(range(5), *map(range, f.shape[2:])):
        one: Any = (slice(None), *place)
        change = torch.zeros_like(f)
        change[one] = step
        difference = (loss(f + change, y) - loss(f - change, y)).sum(dim=1) / (2 * step)
        off = (difference - gradient[one]).abs()
        if not (off <= 1e-4 * (1 + difference.abs())).all():
            found = shown(gradient[one]), shown(difference.detach())
            raise Broken(f"derivatives {found[0]}, finite differences {found[1]}")
    return None


LOSS_LAWS: tuple[Law, ...] = (
    one_number_per_sample,
    is_a_mean_over_samples,
    loss_has_true_finite_gradients,
)

# Datasets --------------------------------------------------------------------------------------------------------


def draws_what_it_declares(subject: Subject) -> str | None:
    """It draws the points and targets that it declares, all finite."""
    try:
        stack(subject.variants(2))  # which checks exactly that
    except ConfigError as error:
        raise Broken(str(error)) from None
    return None


def draws_the_same_from_the_same_stream(subject: Subject) -> str | None:
    """It draws the same data from the same stream."""
    streams = Streams.of(3)
    first, again = (subject.member.drawn(streams) for _ in range(2))
    for name in first._fields:
        if not np.array_equal(getattr(first, name), getattr(again, name)):
            raise Broken(f"{name} differs between two draws from one stream")
    return None


def keeps_training_apart(subject: Subject) -> str | None:
    """Validation and test points are training points hardly more often than training points coincide."""
    data = subject.member.drawn(Streams.of(3))
    times = Counter(tuple(point) for point in data.train_x.tolist())
    coinciding = sum(count for count in times.values() if count > 1) / len(data.train_x)
    for split, points in (("validation", data.val_x.tolist()), ("test", data.test_x.tolist())):
        shared = [point for point in points if tuple(point) in times]
        if len(shared) / len(points) > coinciding + 0.25:
            where = shown(np.array(shared[0]))
            raise Broken(f"{len(shared)} of {len(points)} {split} points are training points, such as {where}")
    return None


DATASET_LAWS: tuple[Law, ...] = (
    draws_what_it_declares,
    draws_the_same_from_the_same_stream,
    keeps_training_apart,
)

# Models ----------------------------------------------------------------------------------------------------------


def starts_the_same_from_the_same_stream(subject: Subject) -> str | None:
    """The same seed gives the same finite parameters, as many as its shapes need."""
    member = subject.member
    model, shapes = member.parts["model"], member.shapes
    first, again = (model.initial(shapes, generator(Streams.of(3).weights)) for _ in range(2))
    needed = sum(n_out * (n_in + 1) for n_out, n_in in shapes)
    if first.shape != (needed,):
        raise Broken(f"it makes {tuple(first.shape)} parameters for the shapes {shapes}, which need {needed}")
    if not torch.isfinite(first).all() or not torch.equal(first, again):
        raise Broken("the parameters are not finite, or not repeated by the same seed")
    return None


def leads_from_inputs_to_outputs(subject: Subject) -> str | None:
    """Its layers lead from the inputs to the output, for any numbers of them that it does not refuse."""
    model, dataset = (subject.member.parts[group] for group in ("model", "dataset"))
    for n_inputs, n_outputs in ((dataset.n_inputs, dataset.n_outputs), (1, 1), (2, 1), (64, 3)):
        try:
            shapes = model.shapes(n_inputs, n_outputs)
        except ConfigError:
            continue
        sizes = [n_inputs, *(n_out for n_out, _ in shapes)]
        if [n_in for _, n_in in shapes] != sizes[:-1] or sizes[-1] != n_outputs:
            raise Broken(f"{n_inputs} inputs and {n_outputs} outputs give the shapes {shapes}")
    return None


MODEL_LAWS: tuple[Law, ...] = (starts_the_same_from_the_same_stream, leads_from_inputs_to_outputs)

# Optimisers ------------------------------------------------------------------------------------------------------


def descends(subject: Subject) -> str | None:
    """It brings a quadratic down, and stays at zero without a gradient."""
    optim = stack([subject.member]).optim
    parameters = torch.ones(1, 4, dtype=torch.float64)
    optim.start(parameters)
    for step in range(500):
        optim.step(parameters, 2 * parameters, step / 500)
    if not parameters.square().sum() < 4:
        raise Broken(f"from |x|^2 = 4 it comes to {float(parameters.square().sum()):.4g} in 500 steps")
    optim.start(parameters := torch.zeros(1, 4, dtype=torch.float64))
    optim.step(parameters, torch.zeros_like(parameters), 0.0)
    if not torch.equal(parameters, torch.zeros_like(parameters)):
        raise Broken(f"at zero, with a zero gradient, it moves to {shown(parameters)}")
    return None


OPTIMISER_LAWS: tuple[Law, ...] = (descends,)
