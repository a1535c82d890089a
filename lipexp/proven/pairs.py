"""The Lipschitz constants of the differences f_i - f_j of two outputs, which certified radii are divided by.

f_i - f_j is the network of one output whose last row is w_i - w_j. What proves a bound for the whole network
proves one for it, and the smallest is taken for each pair:

- product: ||w_i - w_j||_h* times the norms of the other layers, with h* the dual of h, the norm of hidden spaces;
- rows: as for any network of one output;
- eclipse, lipsdp: by one matrix inequality for all pairs, with the multipliers of the whole network unless lipsdp
  is the method that was asked for;
- exact: from the linear regions that were enumerated for the whole network;
- joint: ||e_i - e_j||_h* L with L a bound of the whole network: sqrt(2) L for h = 2, 2 L for h = inf, and L for
  h = 1. That is a fallback for pairs of which nothing better is known. A constraint's own multipliers are not
  asked for each pair: with R R^T = I for the last of `Sandwich` layers they prove sqrt(2) L of it, too.

Shapes: C outputs, D inputs, H features before the last layer, M rows of a last layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lipexp import record
from lipexp.exact import Exact, integers, norm_above
from lipexp.networks import BakedNetwork
from lipexp.norms import conversion, dual, product_bound
from lipexp.proven import Certificate, Chain, semidefinite
from lipexp.proven import rows as following

Floats = npt.NDArray[np.float64]

SECONDS = 60.0  # for the best multipliers of all pairs


@dataclass
class Pairs:
    """What is proven of the differences of outputs."""

    constants: Floats  # (C, C) L_ij of f_i - f_j for the norm p, symmetric, 0 on the diagonal
    methods: npt.NDArray[np.str_]  # (C, C) what proved each of them; "" on the diagonal
    joint: float  # the smallest ||e_i - e_j||_h* L, the same for all pairs

    def summary(self, radius: Floats, joint: Floats) -> record.Pairs:
        """What metrics.json says of them, with certified radii (N,) by these constants and by `joint` alone."""
        constants = self.constants[np.triu_indices(len(self.constants), 1)]
        chosen = (joint > 0) & np.isfinite(radius)
        gain = float(np.median(radius[chosen] / joint[chosen])) if chosen.any() else None
        return record.Pairs(float(constants.min()), float(constants.max()), gain)


def pair_constants(network: BakedNetwork, certificate: Certificate) -> Pairs:
    """The constants of all pairs of outputs, by the methods that proved something of the whole network.

    Args:
        network: K = 1, several outputs, with the proven norms of its layers.
        certificate: of the whole network, with a value.
    """
    assert certificate.value is not None
    chain, proofs, n = certificate.chain, certificate.proofs, network.n_outputs
    proven = {name: proof.value for name, proof in proofs.items() if proof.value is not None and proof.everywhere}
    first, second = np.triu_indices(n, 1)
    difference, rounded = _differences(network)
    joint = min(product_bound([value, _apart(name, chain)]) for name, value in proven.items())
    found = {"joint": np.full(len(first), joint)}
    if "product" in proven:
        found["product"] = _products(network, difference, chain)
    if "rows" in proven:
        found["rows"] = following.through(rounded, following.before_last(network, chain.q), chain.q)
    regions = proofs["exact"].constants if "exact" in proven else None
    if regions is not None and regions.pairs is not None:
        found["exact"] = regions.pairs[first, second]
    # Beside the product alone, LipSDP was named, and may take its time for each pair.
    seconds = SECONDS if proofs.keys() == {"product", "lipsdp"} else 0.0
    factor = conversion(chain.p, 2.0, network.n_inputs, n)
    for name in proven.keys() & {"eclipse", "lipsdp"}:
        bounds = semidefinite.bounds_of_pairs(network, proofs[name].multipliers, seconds)
        found[name] = bounds if factor == 1 else np.nextafter(factor * bounds, math.inf)
    # What overflows proves nothing.
    names, bounds = np.array([*found]), np.nan_to_num(np.stack([*found.values()]), nan=math.inf, posinf=math.inf)
    pairs = Pairs(np.zeros((n, n)), np.full((n, n), "", names.dtype), joint)
    for i, j in ((first, second), (second, first)):
        pairs.constants[i, j], pairs.methods[i, j] = bounds.min(axis=0), names[bounds.argmin(axis=0)]
    return pairs


def feature_constants(network: BakedNetwork, certificate: Certificate, pairs: Pairs | None = None) -> Floats:
    """Bounds on how fast outputs change when one coordinate x_k of the input moves alone, in units of that one.

    For one output |df/dx_k|, (D,); for several |df_c/dx_k|, (C, D); with `pairs` |d(f_i - f_j)/dx_k|, (C, C, D).
    Each is the smallest of three bounds: ||W_1 e_k||_h times the norms of later layers, with ||w||_h* for the
    last row; the one that follows the derivatives of all features, see `rows`; and the constant of the whole
    network, or of the pair, which holds for a movement of any kind.

    Args:
        network: K = 1, with the proven norms of its layers.
        certificate: with a value.
    """
    assert certificate.value is not None
    chain, layers = certificate.chain, network.layers
    exact, rounded = _differences(network) if pairs is not None else _last(network)
    bounds = [np.full((len(rounded), network.n_inputs), certificate.value)]
    if pairs is not None:
        bounds[0][:] = pairs.constants[np.triu_indices(network.n_outputs, 1)][:, None]
    if network.is_plain and following.why_not_applicable(network) is None:
        bounds.append(following.through(rounded, following.before_last(network, None), None))
    norms_hold = semidefinite.why_no_residual_norms(network) is None
    if norms_hold and network.act_constants(chain.hidden_p) is not None and len(layers) > 1:
        weight, exponent = integers(layers[0].weight[0].numpy())
        columns = np.array([norm_above(column, exponent, chain.hidden_p) for column in weight.T])
        lengths = _products(network, exact, chain, skipped=1)
        with np.errstate(over="ignore", invalid="ignore"):
            bounds.append(np.nextafter(np.outer(lengths, columns), math.inf) * np.outer(lengths > 0, columns > 0))
    found = np.fmin.reduce(bounds)
    if network.linear is not None:
        found = np.fmin(bounds[0], np.nextafter(found + np.abs(network.linear[0].double().numpy()), math.inf))
    if pairs is None:
        return found[0] if network.n_outputs == 1 else found
    of_pairs = np.zeros((network.n_outputs, network.n_outputs, network.n_inputs))
    first, second = np.triu_indices(network.n_outputs, 1)
    of_pairs[first, second] = of_pairs[second, first] = found
    return of_pairs


def _last(network: BakedNetwork) -> tuple[Exact, Floats]:
    """The rows of the last layer (C, H), in integers and in float64."""
    weight = network.layers[-1].weight[0].numpy()
    return integers(weight), weight.astype(np.float64)


def _differences(network: BakedNetwork) -> tuple[Exact, Floats]:
    """w_i - w_j for all i < j (M, H), exactly and in float64."""
    (weight, exponent), rounded = _last(network)
    first, second = np.triu_indices(network.n_outputs, 1)
    return (weight[first] - weight[second], exponent), rounded[first] - rounded[second]


def _apart(method: str, chain: Chain) -> float:
    """||e_i - e_j||_h* for the norm h in which a method bounds the outputs, which is 2 for matrix inequalities."""
    h = 2.0 if method in ("eclipse", "lipsdp") else chain.output_p
    return norm_above(np.array([1, -1]), 0, dual(h))


def _products(network: BakedNetwork, rows: Exact, chain: Chain, skipped: int = 0) -> Floats:
    """(M,) ||row||_h* times the norms of all layers but the last, and but the first `skipped`.

    h is the norm in which what the last layer is given moves. The activations must have constants in it.
    """
    h = chain.p if len(network.layers) == 1 else chain.hidden_p
    constants = network.act_constants(h)
    assert constants is not None
    hidden = product_bound([*(norm for (norm,) in network.norms[skipped:-1]), *constants])
    lengths = (norm_above(row, rows[1], dual(h)) for row in rows[0])
    return np.array([product_bound([hidden, length]) for length in lengths])
