"""No point is steeper than any bound: every method, activation and norm, on networks without a constraint."""

from __future__ import annotations

import functools
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from conftest import choices_in, part
from networks import NORMS, generator, network, normal, residual

from lipexp.config import ConfigError
from lipexp.measured import overall, sources, steepest
from lipexp.measured.gradients import operator_norms, scan
from lipexp.norms import dual
from lipexp.proven import Chain, Problem, prove

SHAPES = ((1, 6, 6, 1), (2, 6, 1), (2, 4, 6, 3), (4, 6, 4, 6, 1), (3, 4, 2))
ACTS = [",".join(choice) for choice in choices_in("act")]


@functools.cache
def act_called(name):
    return part(tuple(name.split(",")))


def networks(act, seed):
    """Of several shapes and sizes of weights, plain and with residual layers."""
    for i, sizes in enumerate(SHAPES):
        net = network(*sizes, act=act, seed=10 * seed + i, bias=1.0)
        yield replace(net, layers=[layer._replace(weight=2.0 ** (i - 1) * layer.weight) for layer in net.layers])
    if act.has_unit_slopes:
        yield residual(2, 4, 1, act=act, seed=seed)
        yield residual(3, 4, 2, act=act, seed=seed)


def points_for(net, n, seed):
    """Random points near and far, (1, N, D)."""
    return torch.cat([scale * normal(1, n, net.n_inputs, seed=seed) for scale in (0.3, 1.0, 10.0)], dim=1)


def check_every_bound(net, p, n, seed, seconds):
    """Compare all bounds with autograd, and with what the search finds and confirms."""
    net, chain = Chain.without_bound(net, p)
    x = points_for(net, n, seed)
    low, high = x[0].amin(dim=0), x[0].amax(dim=0)
    scanned = scan(net, x)
    of_points = operator_norms(scanned.gradient[0], dual(p), chain.output_p)
    found = sources(net, x[:, ::50], scan(net, x[:, ::50]), chain.q, [generator(seed)], 1, chain.output_p)
    measured = overall(steepest(net, found, 0, chain.q, chain.output_p))
    problem = Problem(net, chain, (low, high), measured, max_regions=3000, seconds=seconds)
    proofs = {}
    for method in (None, "eclipse", "lipsdp", "bnb"):  # None: all that need not be asked for
        with suppress(ConfigError):  # the method has no bound for this network
            certificate = prove(problem, method)
            assert certificate.verdict(measured) != "FAIL", method
            proofs |= certificate.proofs
    bounds = {name: proof.value for name, proof in proofs.items() if proof.value is not None}
    # Next to a kink autograd may take one side's slopes, but at a random point it is right up to rounding.
    for name, bound in bounds.items():
        assert float(of_points.nan_to_num(nan=0).max()) <= bound * (1 + 1e-9), name
        assert measured.value <= bound, name
    return bounds


@pytest.mark.parametrize("name", ACTS)
def test_no_point_is_steeper_than_a_bound(name):
    act, p = act_called(name), NORMS[len(name) % 3]
    methods = {method for net in networks(act, 0) for method in check_every_bound(net, p, 100, 1, 0.1)}
    follows_rows = act.slopes is not None or act.groups(4) is not None
    assert methods >= {"product"} | ({"rows"} if follows_rows else set())


@pytest.mark.slow
@pytest.mark.parametrize("name", ACTS)
def test_no_point_of_two_hundred_thousand_is_steeper_than_a_bound(name):
    for net in networks(act_called(name), 1):
        for p in NORMS:
            check_every_bound(net, p, 200_000 // len(NORMS) // 3 // len(SHAPES), 2, 1.0)
