"""The laws of constraints: what is stored is within the bound, and is what training worked with."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lipexp.blocks import Block
from lipexp.constraints import Constraint
from lipexp.laws.subject import Broken, Law, Subject
from lipexp.loop import generator
from lipexp.members import Member, stack
from lipexp.models import Free, unflatten
from lipexp.norms import norm_name

RUNS = 3


def parameters(subject: Subject, members: list[Member], dtype: torch.dtype = torch.float64) -> Tensor:
    """(K, P) free parameters some way off their start, so that constraints have something to do."""
    runs = stack(members)
    starts = [runs.layout.start(runs.model, runs.act, generator(s.weights)) for s in runs.streams]
    start = torch.stack(starts).to(dtype)
    return start + subject.normal(*start.shape, scale=0.3).to(dtype)


def leaves(flat: Tensor, member: Member) -> list[Free]:
    """The layers in `flat`, as leaves of the autograd graph."""
    layers = unflatten(flat, member.layout)
    return [Free(*(part.detach().clone().requires_grad_() for part in layer)) for layer in layers]


def converged(constraint: Constraint, layers: list[Free]) -> list[Block]:
    """The layers for fixed parameters once `apply`, which may carry a state from step to step, has settled."""
    constraint.start(layers)
    for _ in range(500):
        weights = constraint.apply(layers)
    return weights


def baked_networks_keep_the_bound(subject: Subject) -> str | None:
    """After training no gradient and no secant is steeper than L."""
    members = subject.variants(2)
    runs = stack(members)
    if runs.constraint.lipschitz is None:
        return "it sets no bound"
    network = subject.trained(members).network.double
    x = torch.cat([subject.points, subject.normal(200, subject.points.shape[1], scale=3)]).expand(2, -1, -1)
    y = x.roll(1, dims=1)
    p, q = runs.constraint.p, runs.constraint.q
    inputs, f = network.inputs_and_output(x.clone().requires_grad_())
    (gradient,) = torch.autograd.grad(f.sum(), inputs[0])
    for run in range(2):
        bound = runs.constraint.target(run) or 0.0
        rise = (f.detach() - network(y))[run, :, 0].abs()
        slopes = (rise / torch.linalg.vector_norm((x - y)[run], ord=p, dim=-1)).nan_to_num(nan=0)  # x = y
        steepest = torch.linalg.vector_norm(gradient[run], ord=q, dim=-1).max()
        for what, value in ((f"a secant in norm {norm_name(p)}", slopes.max()), ("a gradient", steepest)):
            if not value <= bound * (1 + 1e-9):
                raise Broken(f"{what} has slope {float(value):.9g}, L = {bound:g}")
    return None


def proven_norms_are_those_of_the_stored_numbers(subject: Subject) -> str | None:
    """Proven norms are those of the stored numbers, and multiply to at most L."""
    members = subject.variants(2)
    constraint: Constraint = stack(members).constraint
    network = subject.trained(members).network
    again = constraint.prove(network)
    if [list(layer) for layer in network.norms] != [list(layer) for layer in again.norms]:
        raise Broken(f"baking says {network.norms}, the stored numbers {again.norms}")
    if list(network.whole) != list(again.whole):
        raise Broken(f"baking says {network.whole} of the whole, the stored numbers {again.whole}")
    for run in range(2):
        bound, norms = constraint.target(run), [float(layer[run]) for layer in network.norms]
        proven = network.whole[run] if network.whole else math.prod(norms)
        if bound is not None and proven > bound * (1 + 1e-12):
            raise Broken(f"the norms {norms} prove {proven:.9g}, more than L = {bound:g}")
    return None


def training_works_with_what_is_baked(subject: Subject) -> str | None:
    """Training works with the weights that are baked, up to rounding."""
    members = subject.variants(RUNS)
    runs = stack(members)
    layers = leaves(parameters(subject, members), members[0])
    weights = converged(runs.constraint, layers)
    network = runs.constraint.bake(layers, runs.act).double
    for i, (trained, baked) in enumerate(zip(weights, network.layers, strict=True)):
        for name, one, other in zip(trained._fields, trained, baked, strict=True):
            off = float((one - other).detach().abs().max() / other.abs().max().clamp_min(1e-30))
            if off > 2e-5:
                raise Broken(f"{name} of layer {i} differs by {off:.3g} of its largest entry")
    acts = runs.constraint.acts(layers, runs.act)
    for i, act in enumerate(network.acts):
        if not torch.allclose(acts[i].theta, act.theta, rtol=2e-5, atol=0):
            raise Broken(f"the activation of layer {i} has other parameters")
    return None


def has_true_finite_gradients(subject: Subject) -> str | None:
    """Its derivatives are finite and agree with finite differences."""
    member = subject.member
    constraint = stack([member]).constraint
    layers = leaves(parameters(subject, [member]), member)
    converged(constraint, layers)
    direction = [Free(*(subject.normal(*part.shape) for part in layer)) for layer in layers]

    def value(step: float) -> Tensor:
        moved = [
            Free(*(part + step * change for part, change in zip(layer, by, strict=True)))
            for layer, by in zip(layers, direction, strict=True)
        ]
        return torch.stack([part.sin().sum() for layer in constraint.apply(moved) for part in layer]).sum()

    flat = [part for layer in layers for part in layer]
    gradient = torch.autograd.grad(value(0.0), flat, materialize_grads=True)
    along = sum(
        float((g * d).sum()) for g, d in zip(gradient, (d for layer in direction for d in layer), strict=True)
    )
    step = 1e-5
    for _ in range(100):  # a constraint with a state has to settle at each end
        ends = [float(value(end).detach()) for end in (step, -step)]
    difference = (ends[0] - ends[1]) / (2 * step)
    if not all(bool(torch.isfinite(g).all()) for g in gradient) or abs(along - difference) > 1e-3 * (
        1 + abs(along)
    ):
        raise Broken(
            f"along a random direction the derivative is {along:.6g}, finite differences give {difference:.6g}"
        )
    return None


CONSTRAINT_LAWS: tuple[Law, ...] = (
    baked_networks_keep_the_bound,
    proven_norms_are_those_of_the_stored_numbers,
    training_works_with_what_is_baked,
    has_true_finite_gradients,
)
