"""The table of upper bounds: the smallest one that holds everywhere is taken."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from rational import network

from lipexp.proven import methods as bounds
from lipexp.activations import ReLU
from lipexp.proven.methods import Certificate, Problem, Proof, product_certificate, prove
from lipexp.config import ConfigError
from lipexp.constraints import LInf, Spectral, Unconstrained
from lipexp.evaluate import Evaluator
from lipexp.measured.gradients import Maximum
from lipexp.models import Layer
from lipexp.proven.semidefinite import eclipse, lipsdp

METHODS = {
    "loose": lambda problem: Proof(5.0),
    "tight": lambda problem: Proof(3.0),
    "box": lambda problem: Proof(1.0, everywhere=False),
    "none": lambda problem: Proof(None, "is for other networks"),
}


@pytest.fixture
def problem(monkeypatch):
    """problem(4.0) -> one with this product of norms, and with methods that prove what they are told to."""

    def problem(product, reason=None):
        certificate = Certificate(2.0, 4.5, [2.0, 2.0], 2.0, product, reason)
        return Problem([], None, None, certificate, None, None, 0)

    monkeypatch.setattr(bounds, "METHODS", {"product": bounds.METHODS["product"], **METHODS})
    return problem


def test_the_smallest_bound_that_holds_everywhere_is_taken(problem):
    certificate = prove(problem(4.0))
    assert (certificate.value, certificate.method) == (3.0, "tight")
    assert {name: proof.value for name, proof in certificate.proofs.items()} == {
        "product": 4.0,
        "loose": 5.0,
        "tight": 3.0,
        "box": 1.0,
        "none": None,
    }
    assert (certificate.p, certificate.target, certificate.layer_norms) == (2.0, 4.5, [2.0, 2.0])


@pytest.mark.parametrize(
    ("named", "value", "method"), [("loose", 4.0, "product"), ("box", 4.0, "product"), ("tight", 3.0, "tight")]
)
def test_a_method_that_is_named_is_taken_beside_the_product(problem, named, value, method):
    certificate = prove(problem(4.0), named)
    assert (certificate.value, certificate.method) == (value, method)
    assert list(certificate.proofs) == ["product", named]


def test_a_method_that_is_named_and_has_no_bound_is_refused(problem):
    with pytest.raises(ConfigError, match=r"^--method=none: has no bound for this network: is for other networks"):
        prove(problem(4.0), "none")


def test_numbers_that_overflow_leave_the_bounds_open():
    draws = torch.Generator().manual_seed(0)
    sizes = [2, *[4] * 10, 1]
    layers = [
        Layer(1e37 * torch.randn(1, n_out, n_in, generator=draws), torch.zeros(1, 1, n_out))
        for n_in, n_out in itertools.pairwise(sizes)
    ]
    product = product_certificate(Unconstrained(), ReLU(), layers, 0)
    ends = torch.zeros(2).double(), torch.ones(2).double()
    problem = Problem(layers, ReLU(), Unconstrained(), product, ends, Maximum(0.0, ()), 1000, seconds=1.0)
    proofs = {name: bounds.METHODS[name](problem) for name in ("rows", "exact", "bnb")}
    assert {(proof.value, proof.reason) for proof in proofs.values()} == {(None, bounds.OVERFLOW)}


def test_a_tighter_bound_does_not_hide_that_baking_failed(trained, monkeypatch):
    """The product of a baked network is within L, or the run fails, whatever else is proven."""
    result = trained("constraint=spectral")
    evaluator = Evaluator(result.stack)
    measured = Maximum(0.1, ())
    assert evaluator._prove(result.checkpoint, 0, measured).verdict(0.1) == "PASS"
    above = replace(evaluator.certify(result.checkpoint, 0), value=1.0000001)
    monkeypatch.setattr("lipexp.evaluate.product_certificate", lambda *arguments: above)
    assert evaluator._prove(result.checkpoint, 0, measured).verdict(0.1) == "FAIL"


def test_without_a_product_another_method_gives_the_bound(problem):
    certificate = prove(problem(None, "no bound"))
    assert (certificate.value, certificate.reason, certificate.method) == (3.0, None, "tight")
    certificate = prove(problem(None, "no bound"), "product")
    assert (certificate.value, certificate.reason, certificate.method) == (None, "no bound", "product")


# The methods themselves ------------------------------------------------------------------------------------------


CONSTRAINTS = {
    "none": Unconstrained(),
    "spectral": Spectral(1.0),
    "linf": LInf(lipschitz=1.0, p=2),
    "linf,p=inf": LInf(lipschitz=1.0, p=math.inf),
}


def of_network(layers, act, constraint, measured: float) -> Problem:
    certificate = product_certificate(constraint, act, layers, 0)
    box = torch.zeros(3).double(), torch.ones(3).double()
    return Problem(layers, act, constraint, certificate, box, Maximum(measured, ()), 0)


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_the_best_bound_is_taken_where_it_holds(name):
    layers, constraint = network(3, 16, 16, 1), CONSTRAINTS[name]
    found = prove(of_network(layers, ReLU(), constraint, measured=0.01))
    if constraint.q == 2:
        assert found.method == "lipsdp"
        assert found.value == found.proofs["lipsdp"].value < found.proofs["eclipse"].value
    else:
        assert found.proofs["lipsdp"].value is found.proofs["eclipse"].value is None
        assert found.method in ("product", "rows")


def test_the_descent_is_for_a_gap_above_a_tenth():
    layers = network(3, 16, 16, 1)
    closed = eclipse(layers)
    near = prove(of_network(layers, ReLU(), Unconstrained(), measured=closed / 1.09))
    assert (near.method, near.proofs["lipsdp"].reason) == ("eclipse", "the gap is below 10 %")
    asked = prove(of_network(layers, ReLU(), Unconstrained(), measured=0.0), "lipsdp")
    assert asked.method == "lipsdp"
    assert asked.value < closed


def test_a_large_network_is_left_to_those_who_ask(monkeypatch):
    monkeypatch.setattr("lipexp.proven.methods.LARGEST", 34)
    layers = network(3, 16, 16, 1)
    found = prove(of_network(layers, ReLU(), Unconstrained(), measured=0.01))
    assert (found.method, found.proofs["lipsdp"].reason[:23]) == ("eclipse", "35 inputs and features,")
    assert prove(of_network(layers, ReLU(), Unconstrained(), measured=0.01), "lipsdp").method == "lipsdp"


class Softer(torch.nn.Module):
    """One that declares its slopes."""

    slopes = (0, 0.5)

    def forward(self, x):
        return 0.5 * torch.relu(x)


def test_a_class_that_declares_its_slopes_gains_from_them():
    layers = network(3, 8, 8, 1)
    found = prove(of_network(layers, Softer(), Unconstrained(), measured=0.01))
    assert found.method == "lipsdp"
    # Its patterns have 0.5 where those of ReLU have 1, in two layers.
    assert found.value == pytest.approx(lipsdp(layers, (0.0, 1.0)) / 4, rel=1e-3)
