"""The laws of losses, datasets, models and optimisers."""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch
from torch import Tensor

from lipexp.laws.subject import Broken, Law, Subject, shown
from lipexp.loop import Streams, generator
from lipexp.losses import Loss
from lipexp.members import stack
from lipexp.models import unflatten
from lipexp.tasks import TASKS

# Losses ----------------------------------------------------------------------------------------------------------


def loss_and_batch(subject: Subject, runs: int = 3) -> tuple[Loss, Tensor, Tensor]:
    """The loss of a stack, with outputs and targets (K, B) in float64."""
    task = TASKS[subject.member.parts["dataset"].task]
    loss: Loss = stack(subject.variants(runs)).loss
    f = subject.normal(runs, 40)
    y = (subject.normal(runs, 40) > 0).double() if task.has_classes else subject.normal(runs, 40)
    return loss, f, y


def one_number_per_sample(subject: Subject) -> str | None:
    """It returns one finite number per sample, (K, B)."""
    loss, f, y = loss_and_batch(subject)
    found = loss(f, y)
    if found.shape != f.shape or not torch.isfinite(found).all():
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
    """Its derivatives are finite and agree with finite differences."""
    loss, f, y = loss_and_batch(subject)
    for outputs in (1e4 * f, 0 * f, f):
        (gradient,) = torch.autograd.grad(loss(outputs.requires_grad_(), y).sum(), outputs)
        if not torch.isfinite(gradient).all():
            raise Broken(f"outputs {shown(outputs[0])} give the derivatives {shown(gradient[0])}")
    step = 1e-6
    for sample in range(5):  # a few, one after the other, since a sample may act on the others
        change = torch.zeros_like(f)
        change[:, sample] = step
        difference = (loss(f + change, y) - loss(f - change, y)).sum(dim=1) / (2 * step)
        off = (difference - gradient[:, sample]).abs()
        if not (off <= 1e-4 * (1 + difference.abs())).all():
            found = shown(gradient[:, sample]), shown(difference.detach())
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
    stack(subject.variants(2))  # which checks exactly that, and says so in one line
    return None


def draws_the_same_from_the_same_stream(subject: Subject) -> str | None:
    """The same seed draws the same data, another seed other data."""
    dataset = subject.member.parts["dataset"]
    stream = Streams.of(3).data
    first, again, other = dataset.draw(stream), dataset.draw(stream), dataset.draw(Streams.of(4).data)
    for name in first._fields:
        if not np.array_equal(getattr(first, name), getattr(again, name)):
            raise Broken(f"{name} differs between two draws from one stream")
    if np.array_equal(first.train_x, other.train_x):
        raise Broken("two seeds draw the same training points")
    return None


def keeps_training_and_test_apart(subject: Subject) -> str | None:
    """At most a quarter of the test points are training points, but for point masses."""
    data = subject.member.parts["dataset"].draw(Streams.of(3).data)
    times = Counter(tuple(point) for point in data.train_x.tolist())
    shared = [point for point in data.test_x.tolist() if times[tuple(point)] == 1]  # in a point mass many coincide
    if len(shared) > len(data.test_x) / 4:
        where = shown(np.array(shared[0]))
        raise Broken(f"{len(shared)} of {len(data.test_x)} test points are training points, such as {where}")
    return None


DATASET_LAWS: tuple[Law, ...] = (
    draws_what_it_declares,
    draws_the_same_from_the_same_stream,
    keeps_training_and_test_apart,
)

# Models ----------------------------------------------------------------------------------------------------------


def starts_the_same_from_the_same_stream(subject: Subject) -> str | None:
    """The same seed gives the same parameters, as many as its shapes need."""
    member = subject.member
    model, shapes = member.parts["model"], member.shapes
    first, again, other = (model.initial(shapes, generator(Streams.of(seed).weights)) for seed in (3, 3, 4))
    needed = sum(n_out * (n_in + 1) for n_out, n_in in shapes)
    if first.shape != (needed,):
        raise Broken(f"it makes {tuple(first.shape)} parameters for the shapes {shapes}, which need {needed}")
    if not torch.isfinite(first).all() or not torch.equal(first, again) or torch.equal(first, other):
        raise Broken("parameters are not finite, not repeated by the same seed, or repeated by another one")
    return None


def leads_from_inputs_to_outputs(subject: Subject) -> str | None:
    """Its layers lead from any number of inputs to any number of outputs."""
    model = subject.member.parts["model"]
    for n_inputs, n_outputs in ((1, 1), (2, 1), (64, 3)):
        shapes = model.shapes(n_inputs, n_outputs)
        sizes = [n_inputs, *(n_out for n_out, _ in shapes)]
        if [n_in for _, n_in in shapes] != sizes[:-1] or sizes[-1] != n_outputs:
            raise Broken(f"{n_inputs} inputs and {n_outputs} outputs give the shapes {shapes}")
        layers = unflatten(model.initial(shapes, torch.Generator().manual_seed(0)).unsqueeze(0), shapes)
        if any(not layer.weight.any() for layer in layers):
            raise Broken(f"a weight matrix starts at zero, for the shapes {shapes}")
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
