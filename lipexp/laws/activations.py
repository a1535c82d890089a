"""The laws of activations: what they declare is true of what they compute."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from lipexp.activations import Activation, ActiveMap
from lipexp.exact import integers
from lipexp.laws.subject import Broken, Law, Subject, shown
from lipexp.norms import norm_name

ROUNDING = 1 + 1e-12
ROUNDING_OF_FORWARD = 2.0**-42


def act_of(subject: Subject, runs: int = 1, dtype: torch.dtype = torch.float64) -> Activation:
    """It, with other parameters in each run, if it has any."""
    act: Activation = subject.member.parts["act"]
    theta = act.initial(subject.width) + subject.normal(runs, act.n_parameters(subject.width), scale=0.3)
    return act.to(dtype).at(act.within(theta.to(dtype), torch.ones(1, 1, dtype=dtype)))


def pairs(subject: Subject) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of points (1, B, H) at several distances: in any direction, and in that of one feature."""
    width = subject.width
    for scale in (1e-6, 1e-2, 1.0, 30.0):
        a = subject.normal(1, 200, width)
        yield a, a + subject.normal(1, 200, width, scale=scale)
        one = torch.nn.functional.one_hot(torch.arange(200) % width, width)
        yield a, a + one * subject.normal(1, 200, 1, scale=scale)


def keeps_shape_and_type(subject: Subject) -> str | None:
    """It returns features of the same shape and number type, and leaves its input as it is."""
    for dtype in (torch.float32, torch.float64):
        z = subject.normal(2, 5, subject.width).to(dtype)
        before = z.clone()
        out = act_of(subject, 2, dtype)(z)
        if not torch.equal(before, z):
            raise Broken(f"it writes into its input: {shown(before[0, 0])} becomes {shown(z[0, 0])}")
        if out.shape != z.shape or out.dtype != dtype:
            raise Broken(f"{tuple(z.shape)} {dtype} becomes {tuple(out.shape)} {out.dtype}")
    return None


def is_lipschitz_in_its_norms(subject: Subject) -> str | None:
    """|act(a) - act(b)| <= |a - b| in every norm that it declares."""
    act = act_of(subject)
    if not act.norms:
        return "it declares no norms"
    for a, b in pairs(subject):
        moved = act(a) - act(b)
        for p in act.norms:
            before, after = (torch.linalg.vector_norm(part, ord=p, dim=-1)[0] for part in (a - b, moved))
            worst = int((after - before * ROUNDING).argmax())
            if after[worst] > before[worst] * ROUNDING + 1e-12:
                where = f"a = {shown(a[0, worst])}, b = {shown(b[0, worst])}"
                raise Broken(f"in norm {norm_name(p)}: {after[worst]:.6g} > {before[worst]:.6g} at {where}")
    return None


def has_slopes_within_its_range(subject: Subject) -> str | None:
    """It acts feature by feature, with slopes in the range that it declares."""
    act = act_of(subject)
    if act.slopes is None:
        return "it declares no slopes"
    low, high = act.slopes
    for a, b in pairs(subject):
        alone = torch.where(torch.arange(subject.width) == 0, b, a)  # only the first feature moves
        if not torch.equal(act(alone)[..., 1:], act(a)[..., 1:]):
            raise Broken(f"the first feature moves the others, at a = {shown(a[0, 0])}")
        slope = ((act(a) - act(b)) / (a - b)).masked_fill((a - b).abs() < 1e-9, low)
        if slope.min() < low - 1e-6 or slope.max() > high + 1e-6:
            raise Broken(f"slopes from {slope.min():.6g} to {slope.max():.6g}, declared {low:g} to {high:g}")
    return None


def has_slopes_between_two_inputs_within_their_hull(subject: Subject) -> str | None:
    """Its slopes and difference quotients between two inputs are within the hull that it declares."""
    act = act_of(subject)
    if act.slopes is None:
        return "it declares no slopes"
    for a, b in pairs(subject):
        low, high = torch.minimum(a, b), torch.maximum(a, b)
        least, most = act.slopes_between(low, high) or (low, high)
        if least.shape != low.shape or most.shape != low.shape or least.dtype != torch.float64:
            raise Broken(f"bounds for {tuple(low.shape)} are {tuple(least.shape)} {least.dtype}")
        for _ in range(4):
            shares = torch.rand(2, *low.shape, generator=subject.generator, dtype=torch.float64)
            first, second = (low + shares * (high - low)).unbind()
            first.requires_grad_()
            (slope,) = torch.autograd.grad(act(first).sum(), first)
            quotient = (act(first) - act(second)) / (first - second)
            rounding = 1e-13 * act(first).abs().clamp_min(1) / (first - second).abs()
            for found, unsure in ((slope, 1e-12), (quotient.where(rounding < 1e-3, slope), rounding + 1e-12)):
                outside = torch.maximum(least - found, found - most) - unsure
                if not (outside <= 0).all():
                    worst = int(outside.argmax())
                    value, lowest, highest = (float(part.flatten()[worst]) for part in (found, least, most))
                    where = f"[{float(low.flatten()[worst]):.6g}, {float(high.flatten()[worst]):.6g}]"
                    raise Broken(f"a slope of {value:.9g} in {where}, declared {lowest:.9g} to {highest:.9g}")
    return None


def encloses_its_values(subject: Subject) -> str | None:
    """What it computes in float64 is within the errors of the values that it encloses."""
    act, z = act_of(subject), subject.normal(1, 500, subject.width, scale=3.0)
    value, error = act.enclosed(z)
    off = (act(z) - value).abs() - error - ROUNDING_OF_FORWARD * z.abs().amax(dim=-1, keepdim=True).clamp_min(1)
    if not (off <= 0).all():
        worst = int(off.argmax()) // subject.width
        raise Broken(f"at {shown(z[0, worst])} it is off by more than {shown(error[0, worst])}")
    return None


def sorts_its_groups(subject: Subject) -> str | None:
    """It sorts the features of each declared group, ascending."""
    act, groups = act_of(subject), act_of(subject).groups(subject.width)
    if groups is None:
        return "it declares no groups"
    if sorted(groups.ravel().tolist()) != list(range(subject.width)):
        raise Broken(f"the groups do not hold every feature once: {groups.tolist()}")
    z = subject.normal(1, 200, subject.width)
    members = torch.from_numpy(groups.copy())
    if not torch.equal(act(z)[..., members], z[..., members].sort(dim=-1).values):
        raise Broken(f"z = {shown(z[0, 0])} becomes {shown(act(z)[0, 0])}, with groups {groups.tolist()}")
    return None


def equals_its_active_map(subject: Subject) -> str | None:
    """Its value and Jacobian are those of its active map."""
    act = act_of(subject)
    if not act.is_piecewise_linear:
        return "it declares no active map"
    points = subject.normal(50, subject.width)
    together = act.active_map(points.numpy())  # of several points at once, as proofs ask for it
    for i, point in enumerate(points):
        active = act.active_map(point.numpy())
        if active is None:
            raise Broken(f"no active map at {shown(point)}")
        jacobian = torch.zeros(subject.width, subject.width, dtype=torch.float64)
        jacobian[torch.arange(subject.width), torch.tensor(active.index)] = torch.tensor(active.factor).double()
        value = jacobian @ point + (0 if active.offset is None else torch.tensor(active.offset))
        found = torch.autograd.functional.jacobian(lambda z: act(z.view(1, 1, -1))[0, 0], point)
        out = act(point.view(1, 1, -1))[0, 0]
        rounding = 0 if act.is_homogeneous else 1e-12  # offsets may cancel
        if not (
            torch.allclose(found, jacobian, rtol=1e-12, atol=0)
            and torch.allclose(out, value, rtol=1e-12, atol=1e-300 + rounding)
        ):
            raise Broken(f"the active map at {shown(point)} is not its Jacobian there")
        exact, what = np.array([*map(Fraction, point.tolist())], dtype=object), "the same numbers as fractions"
        if act.is_homogeneous:
            exact, what = integers(point.numpy())[0] << 100, "integers in its proportions"
        if not is_same(act.active_map(exact), active):
            raise Broken(f"the active map at {shown(point)} is another one for {what}")
        if together is None or not is_same(together.take(i), active):
            raise Broken(f"the active map at {shown(point)} is another one when several points are given")
    return None


def is_same(one: ActiveMap | None, other: ActiveMap) -> bool:
    if one is None or (one.index != other.index).any() or (one.factor != other.factor).any():
        return False
    return bool(np.all(one.offset == other.offset))  # None == None


def changes_at_its_breakpoints_only(subject: Subject) -> str | None:
    """Its active map changes at declared breakpoints only."""
    act = act_of(subject)
    breakpoints, thresholds = act.breakpoints(subject.width), act.thresholds(subject.width)
    if breakpoints is None:
        return "it declares no breakpoints"
    first, second = breakpoints.T
    distance = 0 if thresholds is None else thresholds
    for a, b in pairs(subject):
        for x, y in zip(a[0, :40].numpy(), b[0, :40].numpy(), strict=True):
            one, other = act.active_map(x), act.active_map(y)
            gaps = (np.append(z, 0.0)[first] - np.append(z, 0.0)[second] - distance for z in (x, y))
            if one is None or other is None or (np.sign(next(gaps)) != np.sign(next(gaps))).any():
                continue
            if not is_same(one, other):
                raise Broken(f"it changes between {shown(x)} and {shown(y)}, with no breakpoint between them")
    return None


def treats_every_run_and_point_alone(subject: Subject) -> str | None:
    """Its output at one point does not depend on other points and runs."""
    act, z = act_of(subject, 3), subject.normal(3, 4, subject.width)
    singles = [act] * 3 if not act.n_parameters(subject.width) else [act.at(theta) for theta in act.theta.split(1)]
    alone = torch.stack(
        [torch.stack([act(z[k : k + 1, b : b + 1])[0, 0] for b in range(4)]) for k, act in enumerate(singles)]
    )
    if not torch.allclose(act(z), alone, rtol=1e-12, atol=1e-12):
        raise Broken(f"together and alone differ by {float((act(z) - alone).abs().max()):.3g}")
    return None


def has_finite_gradients(subject: Subject) -> str | None:
    """Its gradients are finite, also at zero and where features are equal."""
    act = act_of(subject)
    theta = [act.theta.requires_grad_()] if act.n_parameters(subject.width) else []
    for z in (subject.normal(1, 50, subject.width), torch.zeros(1, 1, subject.width, dtype=torch.float64)):
        for gradient in torch.autograd.grad(act(z.requires_grad_()).sum(), [z, *theta]):
            if not torch.isfinite(gradient).all():
                raise Broken(f"a gradient at {shown(z[0, 0])} is {shown(gradient)}")
    return None


def keeps_parameters_that_are_within_its_range(subject: Subject) -> str | None:
    """It starts from parameters within its range, and takes any others into it once and for all."""
    act, one = subject.member.parts["act"], torch.ones(1, 1)
    n = act.n_parameters(subject.width)
    if not n:
        return "it has no parameters"
    start = act.initial(subject.width)
    if start.shape != (n,):
        raise Broken(f"{n} parameters start from {tuple(start.shape)} numbers")
    within = act.within(3 * subject.normal(2, n).float(), torch.tensor([[0.5], [3.0]]))
    for theta in (start.unsqueeze(0), within):
        again = act.within(theta, one)
        if again.shape != theta.shape or not torch.equal(again, theta):
            raise Broken(f"parameters {shown(theta)} become {shown(again)}")
    return None


ACTIVATION_LAWS: tuple[Law, ...] = (
    keeps_shape_and_type,
    is_lipschitz_in_its_norms,
    has_slopes_within_its_range,
    has_slopes_between_two_inputs_within_their_hull,
    encloses_its_values,
    sorts_its_groups,
    equals_its_active_map,
    changes_at_its_breakpoints_only,
    treats_every_run_and_point_alone,
    has_finite_gradients,
    keeps_parameters_that_are_within_its_range,
)
