"""A network as stages, each of which takes the difference of some features to that of the next ones.

With x the difference of a stage's input for two inputs of the network, and d those of the scalars inside,

    z = R x,   x_next = F x + G d,   where d_i has slopes in [alpha, beta] in z_i:

R = A W, F = B W and G = C for an affine layer W with an activation behind it, whose A, B and C `splits` tells;
R = A W^T, F = I - W diag(t) B W^T and G = -W diag(t) C for a residual layer. The outputs are W_n x + A x_0, with a
linear term A beside the layers, if there is one. All is homogeneous: units are changed by powers of two, exactly.

Shapes: weights (out, in).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lipexp.blocks import is_activated
from lipexp.inequality import Array, Inequality, Rows, Scalars
from lipexp.networks import BakedNetwork
from lipexp.norms import UNIT_ROUNDOFF
from lipexp.proven.semidefinite.splits import Split, split


class Rounded(NamedTuple):
    """A matrix (n, m) as float64 holds it, and bounds (m,) on the 2-norms of the errors of its columns."""

    values: Array
    off: Array

    @classmethod
    def exact(cls, values: Array) -> Rounded:
        return cls(values, np.zeros(values.shape[1]))

    def __matmul__(self, other: Rounded) -> Rounded:
        """A B: off by E_A B + (A + E_A) E_B, and gamma_k |A| |B| of rounding.

        The 2-norm of column j of |A| |B| is at most ||A||_F ||b_j||_2.
        """
        k, slack = self.values.shape[1], 1 + 2.0**-20  # for the rounding of the bounds themselves
        gamma = 2 * (k + 4) * UNIT_ROUNDOFF
        columns, unsure = np.linalg.norm(other.values, axis=0), float(np.linalg.norm(self.off))
        off = (gamma * np.linalg.norm(self.values) + unsure) * columns
        if other.off.any():
            off = off + (norm_above(self.values) + unsure) * other.off
        underflow = k * 2.0**-1000 * columns.any()
        return Rounded(self.values @ other.values, slack * off + underflow)

    def plus(self, other: Rounded) -> Rounded:
        values = self.values + other.values
        lost = 2 * UNIT_ROUNDOFF * np.linalg.norm(values, axis=0)
        return Rounded(values, (self.off + other.off + lost) * (1 + 2.0**-20))


def norm_above(matrix: Array) -> float:
    """A cheap bound on the 2-norm: (||(A A^T)^2||_F)^(1/4), and what rounding may take of it."""
    small = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    unit = float(np.abs(matrix).max(initial=0.0)) or 1.0
    gram = (small / unit) @ (small / unit).T
    n, frobenius = max(matrix.shape) + 4, float(np.linalg.norm(small / unit)) ** 2
    lost = 4 * n * UNIT_ROUNDOFF * frobenius
    square = float(np.linalg.norm(gram @ gram)) + 4 * n * UNIT_ROUNDOFF * frobenius**2
    return unit * (square**0.5 + lost) ** 0.5 * (1 + 2.0**-20)


class Stage(NamedTuple):
    """One layer and its activation."""

    weight: Array  # W; W^T of a residual layer
    split: Split | None = None  # None: no activation behind it
    back: Array | None = None  # W diag(t) of a residual layer

    @property
    def n_in(self) -> int:
        return self.weight.shape[1]

    @property
    def n_out(self) -> int:
        return len(self.weight) if self.back is None else len(self.back)

    @property
    def n_scalars(self) -> int:
        return 0 if self.split is None else len(self.split.factor)

    def before(self) -> Rounded:
        """R."""
        split = self.split
        if split is None:
            return Rounded.exact(self.weight[:0])
        if split.features is not None:
            return Rounded.exact(self.weight[split.features])
        if split.off == 0:  # differences of pairs, which lose one rounding
            values = split.a @ self.weight
            return Rounded(values, 2 * UNIT_ROUNDOFF * np.linalg.norm(values, axis=0))
        return self._of("a") @ Rounded.exact(self.weight)

    def kept(self) -> Rounded | None:
        """F; None: 0, or I of a residual layer."""
        split = self.split
        if split is None:
            return Rounded.exact(self.weight)
        if split.features is None:
            inner = self._of("b") @ Rounded.exact(self.weight)
        elif split.linear:
            values = split.linear * self.weight
            inner = Rounded(values, 2 * UNIT_ROUNDOFF * np.linalg.norm(values, axis=0))
        else:
            return None
        if self.back is None:
            return inner
        return Rounded.exact(np.eye(len(self.back))).plus(Rounded.exact(-self.back) @ inner)

    def changed(self) -> Rounded | None:
        """G; None: I."""
        split = self.split
        if split is None:
            return Rounded.exact(np.zeros((len(self.weight), 0)))
        if split.features is None:
            return self._of("c") if self.back is None else Rounded.exact(-self.back) @ self._of("c")
        if self.back is not None:
            return Rounded.exact(-self.back[:, split.features])
        return None if self.n_scalars == self.n_out else Rounded.exact(np.eye(self.n_out)[:, split.features])

    def _of(self, name: str) -> Rounded:
        assert self.split is not None
        values: Array = getattr(self.split, name)
        # Of a reflection, an entry that rounds to 0 may be none: two in a column are off.
        return Rounded(values, self.split.off * np.sqrt(np.maximum((values != 0).sum(axis=0), 2)))

    def scaled(self, exponent: int) -> Stage:
        """In a unit of its features, or of those inside a residual layer, that is 2^exponent times as large."""
        back = None if self.back is None else np.ldexp(self.back, exponent)
        return self._replace(weight=np.ldexp(self.weight, -exponent), back=back)


class Stages(NamedTuple):
    """A whole network."""

    hidden: Sequence[Stage]
    last: Array  # W_n
    linear: Array | None  # A, in the unit of the outputs
    exponent: int = 0  # the outputs are in a unit of 2^exponent

    @classmethod
    def of(cls, network: BakedNetwork) -> Stages:
        """Those of a network, K = 1, without features that its activations see alone and that matter nothing.

        That is exact: the differences of features that are constant or unused are 0, or multiplied by 0.
        """
        weights = [layer.weight[0].numpy().astype(np.float64) for layer in network.layers]
        alone = [
            is_activated(network.layers, i) and act.slopes is not None and not network.layers[i + 1].is_residual
            for i, act in enumerate(network.acts)
        ]
        before = None
        while before != (shapes := [weight.shape for weight in weights]):
            before = shapes
            for i in (i for i, is_alone in enumerate(alone) if is_alone):
                alive = weights[i].any(axis=1) & weights[i + 1].any(axis=0)
                weights[i], weights[i + 1] = weights[i][alive], weights[i + 1][:, alive]
        hidden = []
        for i, (layer, act) in enumerate(zip(network.layers[:-1], network.acts, strict=False)):
            weight = weights[i]
            if layer.is_residual:
                t = layer.t[0, 0].numpy().astype(np.float64)  # type: ignore[union-attr]
                hidden.append(Stage(weight.T, split(act, weight.T), weight * t))
            else:
                inside = split(act, weight) if is_activated(network.layers, i) else None
                hidden.append(Stage(weight, inside))
        linear = None if network.linear is None else network.linear[0].numpy().astype(np.float64)
        return cls(hidden, weights[-1], linear)

    @property
    def n_inputs(self) -> int:
        return (self.hidden[0].weight if self.hidden else self.last).shape[1]

    @property
    def n_beside(self) -> int:
        """The inputs that a linear term needs beside the features of every stage."""
        return 0 if self.linear is None else self.n_inputs

    def compressed(self) -> Stages:
        """With no more inputs than the first layer and the linear term see, and the same multipliers' best bound.

        For a search only: W W^T, on which that bound depends alone, is the same up to rounding.
        """
        first = self.hidden[0].weight
        of_inputs = first if self.linear is None else np.concatenate([first, self.linear])
        if len(of_inputs) >= of_inputs.shape[1]:
            return self
        square = np.asarray(np.linalg.qr(of_inputs.T, mode="r")).T
        first, linear = square[: len(first)], None if self.linear is None else square[len(first) :]
        return self._replace(hidden=[self.hidden[0]._replace(weight=first), *self.hidden[1:]], linear=linear)

    @property
    def size(self) -> int:
        """The rows of the matrix that is proven semidefinite."""
        return self.n_inputs + sum(stage.n_scalars for stage in self.hidden) + len(self.last)

    def parts(self, largest: int) -> list[Stages]:
        """Consecutive parts of at most this size, if their stages are; each but the last ends with features."""
        cut, found = list[Stage](), list[Stages]()
        for stage in self.hidden:
            if cut and cut[0].n_in + sum(each.n_scalars for each in (*cut, stage)) + stage.n_out > largest:
                found.append(Stages(cut, np.eye(cut[-1].n_out), None))
                cut = []
            cut.append(stage)
        return [*found, Stages(cut, self.last, self.linear)]

    def inequality(self) -> Inequality:
        """The matrix inequality of the stages, in the free variables x_0 and d."""
        n_inputs, scalars, n_multipliers = self.n_inputs, list[Scalars](), 0
        at = [slice(0, n_inputs)]  # where the variables of x_0 and of each stage's d lie
        state: dict[int, Rounded | None] = {0: None}  # x = sum of these times variables; None: I
        for k, stage in enumerate(self.hidden, start=1):
            at.append(slice(at[-1].stop, at[-1].stop + stage.n_scalars))
            if stage.split is not None:
                index = stage.split.multiplier + n_multipliers
                rows = _joined(stage.before(), state, at)
                scalars.append(Scalars(rows, at[k], stage.split.slopes, index, stage.split.factor))
                n_multipliers = max([n_multipliers, *(index + 1)])
            kept = stage.kept()
            if kept is not None:
                state = {j: _times(kept, part) for j, part in state.items()}
            elif stage.back is not None:
                state = {j: _made(part, stage.n_out) for j, part in state.items()}
            else:
                state = {}
            if stage.n_scalars:
                state[k] = stage.changed()
        last = Rounded.exact(self.last)
        if self.linear is None:
            return Inequality(n_inputs, scalars, _joined(last, state, at))
        parts: dict[int, Rounded | None] = {j: _times(last, part) for j, part in state.items()}
        linear = Rounded.exact(self.linear)
        beside = parts.get(0)
        parts[0] = linear if beside is None else beside.plus(linear)
        return Inequality(n_inputs, scalars, _joined(None, parts, at))


def _made(part: Rounded | None, size: int) -> Rounded:
    return Rounded.exact(np.eye(size)) if part is None else part


def _times(left: Rounded | None, part: Rounded | None) -> Rounded:
    if part is None:
        assert left is not None
        return left
    return part if left is None else left @ part


def _joined(left: Rounded | None, parts: dict[int, Rounded | None], at: Sequence[slice]) -> Rows:
    """left times the parts, on all variables from the first to the last that they concern."""
    present = [j for j in parts if at[j].stop > at[j].start]
    products = {j: _times(left, parts[j]) for j in present}
    if not products:
        some = left if left is not None else next(iter(parts.values()))
        assert some is not None
        return Rows(np.zeros((len(some.values), 0)), np.zeros(0), slice(0, 0))
    on = slice(at[min(present)].start, at[max(present)].stop)
    n = len(next(iter(products.values())).values)
    values, off = np.zeros((n, on.stop - on.start)), np.zeros(on.stop - on.start)
    for j, product in products.items():
        own = slice(at[j].start - on.start, at[j].stop - on.start)
        values[:, own], off[own] = product.values, product.off
    return Rows(values, off, on)
