"""Bounds on rounding errors: how far what float64 and float32 compute is from the network in real arithmetic.

Rounding errors are followed from layer to layer. Affine and residual layers, and activations that declare linear
maps without offsets, have proven bounds. Of another activation, such as torch's tanh, it is assumed that its
float64 results are right but for the last `LOST_BITS` of their 53 bits. Nothing is assumed of its float32 results,
so there are no radii for those.

Shapes: N points, D inputs, H features, M features inside a residual layer, C outputs, of one network, K = 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lipexp.activations import ALL_NORMS, LOST_BITS, Activation
from lipexp.blocks import Affine, Block, Residual, is_activated
from lipexp.networks import BakedNetwork
from lipexp.norms import UNIT_ROUNDOFF, dual, row_norm_bound
from lipexp.proven import semidefinite

FloatArray = npt.NDArray[np.float64]


class Arithmetic(NamedTuple):
    """An IEEE format with gradual underflow."""

    unit_roundoff: float  # u: an operation is off by a factor of at most 1 +- u ...
    smallest: float  # ... or, where its result underflows, by at most this
    largest: float  # what does not overflow


FLOAT64 = Arithmetic(UNIT_ROUNDOFF, 2.0**-1074, 2.0**1023)
FLOAT32 = Arithmetic(2.0**-24, 2.0**-149, 2.0**127)


def why_no_radii(network: BakedNetwork) -> str | None:
    """Why no radius can be proven for the network, whatever its Lipschitz constant; None if one can."""
    if _spread(network) is None:
        h = math.inf if network.is_plain else 2.0
        label = next(act.label for _, act in network.placed if act.lipschitz(h) is None)
        return f"{label} declares neither norms nor slopes, which would bound its rounding errors"
    return semidefinite.why_no_residual_norms(network)


def why_no_float32(network: BakedNetwork) -> str | None:
    """Why no radius can be proven for an evaluation in float32, where `why_no_radii` is None; None if one can."""
    for _, act in network.placed:
        if not _has_linear_maps(act):
            return f"nothing is known about the rounding errors of {act.label} in float32"
        h = math.inf if network.is_plain else 2.0
        constant = act.lipschitz(h)
        if constant is None or constant > 1:
            return f"{act.label} declares no bound of 1 in the {h:g}-norm, in which rounding errors are followed"
    return None


def _has_linear_maps(act: Activation) -> bool:
    """Whether it declares linear maps without offsets, so that it adds one rounding error to a feature at most."""
    return act.is_piecewise_linear and act.is_homogeneous


def _spread(network: BakedNetwork) -> tuple[float, float] | None:
    """(h, c): the norm h in which errors are followed, and by how much an activation may enlarge them in it.

    It is the 2-norm beside residual layers, which enlarge nothing in it, and need slopes in [0, 1] for that.
    """
    for h in (math.inf, 2.0, 1.0) if network.is_plain else (2.0,):
        constants = network.act_constants(h)
        if constants is not None:
            return h, max(constants, default=1.0)
    return None


def evaluate(network: BakedNetwork, x: Tensor) -> tuple[FloatArray, FloatArray]:
    """f at points x (N, D) as float64 computes it, and bounds on |float64's f(x) - the real f(x)|, both (N, C).

    The bound holds for every order of summation, with or without fused multiply-adds: see `_layer_errors`. For an
    activation that does not declare linear maps without offsets it rests on an assumption: in float64, each
    feature that `forward` returns is off by no more than 2^-43 times the largest of 1, all |z_i| and all
    |act(z)_i|.
    """
    return outputs(followed(network, x))


def outputs(features: Sequence[tuple[Tensor, Tensor]]) -> tuple[FloatArray, FloatArray]:
    """What `evaluate` returns, from what `followed` does."""
    f, error = features[-1]
    return f.numpy(), _bounded(error)


def _bounded(error: Tensor) -> FloatArray:
    return error.nan_to_num(nan=math.inf, posinf=math.inf).numpy()


def float32_error(
    network: BakedNetwork, features: Sequence[tuple[Tensor, Tensor]], radius: FloatArray
) -> FloatArray:
    """Bounds (N, C) on |float32's f(x') - the real f(x')| over all float32 vectors x' with ||x' - x||_p <= radius.

    A coordinate of x' differs by at most `radius` from that of x, whatever p is, and the features behind a layer
    by at most radius times the norms of the layers so far; in the inf-norm, times the first layer's norm and the
    row sums of later ones. The arithmetic is IEEE's float32, as on a CPU; TF32 and bfloat16 round more.

    Args:
        features: what `followed` returns for points x (N, D).
        radius: (N,).
    """
    proven = [norm for (norm,) in network.norms]
    norms = [set(act.norms) for _, act in network.placed]
    if network.is_plain and not all(own >= ALL_NORMS for own in norms):  # one may lack that of the hidden spaces
        proven = [proven[0], *(row_norm_bound(layer.weight[0].numpy(), 1) for layer in network.layers[1:])]
    farthest = moved = torch.from_numpy(radius)
    error = torch.zeros_like(moved)
    for i, ((h, unsure), norm) in enumerate(zip(features[:-1], proven, strict=True)):
        if network.linear is not None:  # whose term takes the points themselves
            moved = torch.maximum(moved, farthest)
        errors, error = _behind(FLOAT32, network, i, h, unsure + moved, error)
        moved = moved * norm * (1 + 4 * UNIT_ROUNDOFF)
    return _bounded(errors)


def followed(network: BakedNetwork, x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The input of each layer in float64 (N, in), each with a bound (N,) on its error; at last the outputs (N, C),
    with a bound on the error of each of them.

    Errors are bounded in a norm in which the activation is known to enlarge them no more than c times.
    """
    spread = _spread(network)
    assert spread is not None
    norm, factor = spread
    found, h, error = [], x, x.new_zeros(len(x))
    for i, (layer, act) in enumerate(zip(_layers(network), network.double.acts, strict=True)):
        if network.linear is not None and i == len(network.layers) - 1:
            h = torch.cat([h, x], dim=1)
        found.append((h, error))
        errors, error = _behind(FLOAT64, network, i, h, error, error)
        h = type(layer)(*(part.double() for part in layer))(h.unsqueeze(0), act)[0]
        if is_activated(network.layers, i):
            z, h = h, act(h.unsqueeze(0))[0]
            error = error * factor * (1 + 2 * UNIT_ROUNDOFF)
            if not _has_linear_maps(act):
                of_all = h.shape[1] ** (1 / norm)  # the norm of a vector of ones
                error = (error + of_all * _own_error(z, h)) * (1 + 8 * UNIT_ROUNDOFF)
    return [*found, (h, errors)]


def _own_error(z: Tensor, activated: Tensor) -> Tensor:
    """(N,) what is assumed of the rounding in float64 of an activation without declared linear maps."""
    largest = torch.cat([z, activated], dim=1).abs().amax(dim=1)
    return 2.0**LOST_BITS * UNIT_ROUNDOFF * largest.clamp_min(1)


def _layers(network: BakedNetwork) -> Sequence[Block]:
    """The layers; a linear term A beside them is added as W h + A x + b = [W A] [h x] + b.

    In whatever order that is computed, it is one sum of products.
    """
    if network.linear is None:
        return network.layers
    *hidden, last = network.layers
    return [*hidden, Affine(torch.cat([last.weight, network.linear], dim=2), last.bias)]


def _behind(
    arithmetic: Arithmetic, network: BakedNetwork, i: int, h: Tensor, away: Tensor, error: Tensor
) -> tuple[Tensor, Tensor]:
    """Bounds (N, out) on the errors behind layer i, and (N,) in the norm in which they are followed.

    Args:
        h: (N, in) its input in float64.
        away: (N,) how far the real input may be from h, in the norm.
        error: (N,) how far the computed input may be from the real one.
    """
    layer, spread = _layers(network)[i], _spread(network)
    assert spread is not None
    if isinstance(layer, Affine):
        errors = _layer_errors(arithmetic, layer, h.abs() + away.unsqueeze(1), error, spread[0])
        return errors, _longest(errors, spread[0])
    own = _residual_errors(arithmetic, layer, network.double.acts[i], h, away + error)
    kept, up = error * network.norms[i][0], 1 + 4 * UNIT_ROUNDOFF
    return (own + kept.unsqueeze(1)) * up, (_longest(own, 2) + kept) * up


def _layer_errors(
    arithmetic: Arithmetic, layer: Affine, size: Tensor, error: Tensor, norm: float = math.inf
) -> Tensor:
    """Bounds (N, out) on the errors behind a layer z = W h + b and an activation that follows it.

    With computed inputs h^, a sum of n products and a bias is computed as
    |z^ - z| <= gamma_{n+1} (|W| |h^| + |b|) + |W (h^ - h)|, with gamma_k = k u / (1 - k u), in whatever order;
    |w (h^ - h)| <= ||w||_dual ||h^ - h|| for each row w. An activation that declares linear maps without offsets
    has act(0) = 0 and adds one rounding of a product at most (sorting and ReLU add none), which is allowed for
    here.

    Args:
        size: (N, in), at least |h|.
        error: (N,) of h^ in the norm.
        norm: 1, 2 or inf.

    Reference: Higham 2002, "Accuracy and Stability of Numerical Algorithms", section 3.1.
    """
    unit, n = arithmetic.unit_roundoff, layer.weight.shape[2]
    gamma = (n + 1) * unit / (1 - (n + 1) * unit) if (n + 1) * unit < 1 else math.inf
    weight = layer.weight[0].double().abs()
    terms = torch.addmm(layer.bias[0, 0].double().abs(), size + error.unsqueeze(1), weight.T)  # |W| |h^| + |b|
    lengths = torch.linalg.vector_norm(weight, ord=dual(norm), dim=1)
    found = (gamma + 2 * unit) * terms + torch.outer(error, lengths) + (n + 2) * arithmetic.smallest
    found = found.masked_fill(~(terms <= arithmetic.largest), math.inf)
    # The bound itself is computed in float64, as a sum of n + 1 terms that are not negative and a few others.
    return found * (1 + 4 * (n + 8) * UNIT_ROUNDOFF)


def _residual_errors(arithmetic: Arithmetic, layer: Residual, act: Activation, h: Tensor, away: Tensor) -> Tensor:
    """Bounds (N, H) on the errors that a residual layer R(h) = h - W diag(t) act(W^T h + b) makes itself.

    The layer is computed as R^, at an input h^ that is computed, too, and off by h^ - h. In all R^ is off by

        |R^ - R(h)| <= |R^ - R(h^)| + |R(h^) - R(h)|,

    of which the second part is at most ||R|| ||h^ - h||_2, with the proven norm of R in the 2-norm. The first part
    is bounded here. Let a = act(W^T h^ + b) in real arithmetic.

    - a^ is off by some d: the rounding of an affine layer and of the activation, whose slopes are in [0, 1].
    - h^_i - sum_j W_ij (t_j a^_j) is a sum of M + 1 terms, each of which is rounded at most M + 2 times, in
      whatever order. So |R^ - R(h^)| <= gamma_{M+2} (|h^| + |W| diag(t) |a^|) + |W| diag(t) d, but for underflow.
    - |a^| <= |a| + d. Slopes are at most 1, so |a_j| is at most what it is for known numbers k instead of h^, plus
      ||w_j||_2 ||h^ - k||_2 with column j of W. That at k is computed in float64, and off by at most d as well.

    Args:
        h: (N, H) the known numbers k.
        away: (N,) at least ||h^ - k||_2.

    Reference: Higham 2002, as above.
    """
    unit, n = arithmetic.unit_roundoff, layer.weight.shape[2]
    gamma = (n + 2) * unit / (1 - (n + 2) * unit) if (n + 2) * unit < 1 else math.inf
    weight, t = layer.weight[0].double(), layer.t[0, 0].double()
    inner = Affine(layer.weight.mT, layer.bias)
    z = torch.addmm(layer.bias[0, 0].double(), h, weight)
    a = act(z.unsqueeze(0))[0]
    size = h.abs() + away.unsqueeze(1)
    d = _layer_errors(arithmetic, inner, size, torch.zeros_like(away))
    if not _has_linear_maps(act):
        d = d + _own_error(z, a).unsqueeze(1)
    most = a.abs() + 2 * d + torch.outer(away, torch.linalg.vector_norm(weight, dim=0))
    sizes, unsure = t * most, t * d
    terms, rows = torch.addmm(size, sizes, weight.abs().T), weight.abs().sum(dim=1)
    found = gamma * terms + unsure @ weight.abs().T + (n + 2 + 2 * rows) * arithmetic.smallest
    fits = (terms <= arithmetic.largest) & (sizes.amax(dim=1, keepdim=True) <= arithmetic.largest)
    # The bound itself is computed in float64, as sums of terms that are not negative.
    return found.masked_fill(~fits, math.inf) * (1 + 8 * (sum(weight.shape) + 16) * UNIT_ROUNDOFF)


def _longest(errors: Tensor, norm: float) -> Tensor:
    """(N,) the norms of errors (N, out), rounded up."""
    length = torch.linalg.vector_norm(errors, ord=norm, dim=1)
    if norm == 2:
        length = length + 2.0**-500  # for squares that underflow
    return length * (1 + 4 * (errors.shape[1] + 2) * UNIT_ROUNDOFF)
