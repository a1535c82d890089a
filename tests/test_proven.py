"""The table of upper bounds: the smallest one that holds everywhere is taken."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from acts import ACTS, RELU
from networks import EACH_LIPSCHITZ, NORMS, SEVERAL, by_hand, generator, network, normal, scaled, with_act

from lipexp import proven
from lipexp.activations import GroupSort, as_activation
from lipexp.config import ConfigError
from lipexp.constraints import LInf, Spectral, Unconstrained
from lipexp.evaluate import Evaluator
from lipexp.measured import overall, sources, steepest
from lipexp.measured.gradients import Maximum, norms, scan
from lipexp.norms import norm_name
from lipexp.proven import Certificate, Chain, Problem, Proof, prove, prove_quickly
from lipexp.proven.methods import METHODS, OVERFLOW, UNASKED
from lipexp.proven.regions import Constants, Steepest
from lipexp.proven.semidefinite import eclipse, lipsdp

TANH = as_activation(torch.nn.Tanh())
CHAIN = Chain(2.0, 2.0, 2.0, 2.0, 4.5, None, ("spectral norm",) * 2)
PROOFS = {
    "loose": Proof(5.0),
    "tight": Proof(3.0),
    "box": Proof(1.0, everywhere=False),
    "none": Proof(None, "is for other networks"),
}


def problem_of(net, chain, measured=0.0, max_regions=0, seconds=60.0):
    box = torch.zeros(net.n_inputs).double(), torch.ones(net.n_inputs).double()
    return Problem(net, chain, box, Maximum(measured, ()), max_regions, seconds=seconds)


def of_network(net, constraint, **limits):
    return problem_of(constraint.prove(net), Chain.of(constraint, net.layers), **limits)


@pytest.fixture
def problem(monkeypatch):
    """A product of norms of 4, or none for tanh, and methods that prove what they are told to."""
    own = {name: lambda problem, proof=proof: proof for name, proof in PROOFS.items()}
    monkeypatch.setattr(proven, "METHODS", {"product": METHODS["product"], **own})
    return lambda act=RELU: problem_of(replace(network(2, 4, 1, act=act), norms=[[4.0], [1.0]]), CHAIN)


def test_the_smallest_bound_that_holds_everywhere_is_taken(problem):
    certificate = prove(problem())
    assert (certificate.value, certificate.method, certificate.chain) == (3.0, "tight", CHAIN)
    assert certificate.proofs == {"product": Proof(4.0)} | PROOFS


def test_whoever_waits_is_told_the_method_and_how_many_regions_there_are():
    said = []
    found = prove(of_network(network(2, 8, 8, 1), Spectral(), max_regions=10_000)._replace(report=said.append))
    regions = found.proofs["exact"].constants.regions
    assert said == [f"proving: {name}" for name in ("product", "rows", "exact")] + said[3:]
    assert [int(text.split()[2]) for text in said[3:]] == sorted({int(text.split()[2]) for text in said[3:]})
    assert said[-1] == f"proving: exact, {regions} regions"


def test_a_method_that_is_named_is_taken_beside_the_product(problem):
    for named, value, method in (("loose", 4.0, "product"), ("box", 4.0, "product"), ("tight", 3.0, "tight")):
        found = prove(problem(), named)
        assert (found.value, found.method, [*found.proofs]) == (value, method, ["product", named])
    with pytest.raises(ConfigError, match=r"^--method=none: has no bound for this network: is for other networks"):
        prove(problem(), "none")


def test_without_a_product_another_method_gives_the_bound(problem):
    found, quick = prove(problem(TANH)), prove_quickly(problem(TANH))
    assert (found.value, found.reason, found.method) == (3.0, None, "tight")
    assert quick == Certificate(
        CHAIN, ([0.0] * 2, [1.0] * 2), None, quick.proofs["product"].reason, "none", quick.proofs
    )
    assert (quick.reason, quick.verdict(Maximum(1.0, ()))) == (
        "the activation declares no bound in the 2-norm",
        "OPEN",
    )


def test_a_verdict_compares_what_is_measured_proven_and_targeted():
    def certificate(value, proofs):
        return Certificate(CHAIN, ([0.0], [1.0]), value, None, "product", proofs)

    def verdict(measured, value, point=0.5, **proofs):
        return certificate(value, proofs).verdict(Maximum(measured, (point,)))

    assert verdict(4.0, 4.0) == verdict(4.5, 4.5) == "PASS"
    assert verdict(math.nextafter(4.0, 5), 4.0) == verdict(1.0, math.nextafter(4.5, 5)) == "FAIL"
    # A bound over the box of the data counts as well, at points inside.
    constants = Constants(Steepest(4.0, ()), Steepest(2.0, ()), [[0.0, 1.0]], 7)
    for proofs in ({"bnb": Proof(2.0, everywhere=False)}, {"exact": Proof(4.0, constants=constants)}):
        assert (verdict(2.0, 4.0, **proofs), verdict(2.1, 4.0, **proofs)) == ("PASS", "FAIL")
        assert (verdict(2.1, 4.0, math.nextafter(1, 2), **proofs), verdict(2.1, 4.0, 1.0, **proofs)) == (
            "PASS",
            "FAIL",
        )
    interval = certificate(4.0, proofs).interval(Maximum(1.0, (0.5,), by="float64 estimate"))
    assert (interval.verdict, interval.measured_by) == ("PASS", "float64 estimate")
    assert (interval.exact, interval.exact_box["value"], interval.regions) == (4.0, 2.0, 7)


@pytest.mark.parametrize("overrides", SEVERAL, ids=" ".join)
def test_what_is_measured_of_several_outputs_is_below_every_bound_after_training(overrides, trained):
    """Of a stack, in its own chain; the search finds no less than the data show."""
    result = trained(*overrides, runs=EACH_LIPSCHITZ)
    for found in Evaluator(result.stack).final(result.checkpoint):
        h, interval = found.certificate.chain.output_p, found.certificate.interval(found.measured)
        assert interval.verdict == "PASS"
        assert 0 < found.gradient_norm.by["data"] <= found.gradient_norm.by["search"] * (1 + 1e-9)
        x = torch.from_numpy(np.stack([found.gradients[f"x{i}"] for i in range(found.network.n_inputs)], axis=1))
        jacobians = scan(found.network, torch.cat([x, 10 * normal(500, x.shape[1])])[None]).gradient[0]
        if h == 2:
            seen = {2: torch.linalg.svdvals(jacobians)[:, 0]}
        elif h == 1:  # the largest 1-norm of a column
            seen = {math.inf: jacobians.abs().sum(dim=1).amax(dim=1)}
        else:
            seen = {q: norms(jacobians, q).amax(dim=1) for q in NORMS}
        for name, proof in found.certificate.proofs.items():
            bound = proof.value
            assert bound is None or float(seen[found.certificate.chain.q].max()) <= bound * (1 + 1e-12), name
        columns = [name for name in found.gradients if name.startswith("grad_")]
        assert columns == [f"grad_{norm_name(q)}" for q in seen]
        for name, values in zip(columns, seen.values(), strict=True):
            np.testing.assert_allclose(found.gradients[name], values[: len(x)], rtol=1e-9)


def test_a_tighter_bound_does_not_hide_that_baking_failed(trained):
    """The product of a baked network is within L, or the run fails, whatever else is proven."""
    result = trained("constraint=spectral")
    evaluator, net, measured = Evaluator(result.stack), result.checkpoint.network.run(0), Maximum(0.1, ())
    assert evaluator._certificate(net, 0, measured).verdict(measured) == "PASS"
    above = replace(net, norms=[[1.0000001], *[[1.0]] * (len(net.layers) - 1)])
    assert evaluator._certificate(above, 0, measured).verdict(measured) == "FAIL"


@pytest.mark.parametrize("constraint", [Unconstrained(), Spectral(1.0), LInf(2, 1.0), LInf("inf", 1.0)])
def test_the_best_bound_is_taken_where_it_holds(constraint):
    found = prove(of_network(network(3, 16, 16, 1), constraint, measured=0.01))
    assert "bnb" not in found.proofs  # it holds over the box only, and takes long
    assert found.method == "lipsdp"
    assert found.value == found.proofs["lipsdp"].value < found.proofs["eclipse"].value


def test_lipsdp_takes_some_seconds_for_a_gap_above_a_tenth_unless_it_is_asked_for(monkeypatch):
    net, none, limits = network(3, 16, 16, 1), Unconstrained(), []
    closed = eclipse(net)
    near = prove(of_network(net, none, measured=closed / 1.09))
    assert (near.method, near.proofs["lipsdp"].reason) == ("eclipse", "the gap is below 10 %")
    monkeypatch.setattr(
        "lipexp.proven.semidefinite.lipsdp", lambda *given: limits.append(given[-1]) or lipsdp(*given)
    )
    for method, seconds in ((None, 60.0), (None, 3.0), ("lipsdp", 60.0)):
        asked = prove(of_network(net, none, measured=0.01, seconds=seconds), method)
        assert asked.method == "lipsdp"
        assert asked.value < closed
    assert limits == [UNASKED, 3.0, 60.0]


def test_the_exact_constant_ends_the_table_and_too_many_regions_leave_it_open():
    net, none = network(2, 6, 6, 1), Unconstrained()
    found = prove(of_network(net, none, max_regions=1000))
    assert (found.method, [*found.proofs]) == ("exact", ["product", "rows", "exact"])
    assert found.value < min(found.proofs["product"].value, found.proofs["rows"].value)
    capped = prove(of_network(net, none, max_regions=5))
    assert capped.interval(Maximum(0.0, ())).open == "more than 5 linear regions (max_regions)"
    assert prove(of_network(net, none)).proofs["exact"] == Proof(None, "max_regions=0")


@pytest.mark.parametrize("dims", [2, 3])
def test_a_bound_that_is_not_finite_is_no_bound(dims):
    """No method counts infinity as proven, and the search does not wait for less."""
    net = scaled(network(dims, *[4] * 10, 1), *[1e37] * 11)
    found = prove(of_network(net, Unconstrained(), max_regions=1000))
    exact = OVERFLOW if dims == 2 else "is for one or two inputs"
    assert {name: proof.value for name, proof in found.proofs.items()} == dict.fromkeys(found.proofs)
    assert {name: proof.reason for name, proof in found.proofs.items()} == {
        **dict.fromkeys(("product", "rows", "eclipse", "lipsdp"), OVERFLOW),
        "exact": exact,
    }
    interval = found.interval(Maximum(0.0, (0.5,) * dims))
    assert (interval.certified, interval.product, interval.exact) == (None, None, None)
    assert (interval.verdict, interval.reason) == ("OPEN", OVERFLOW)
    with pytest.raises(ConfigError, match=f"^--method=bnb: has no bound for this network: {OVERFLOW}"):
        prove(of_network(net, Unconstrained(), seconds=math.inf), "bnb")


@pytest.mark.parametrize("kind", [ZeroDivisionError, np.linalg.LinAlgError, torch.linalg.LinAlgError])
def test_a_method_whose_arithmetic_fails_proves_nothing_and_the_others_count(problem, monkeypatch, kind):
    def fails(problem):
        raise kind("in the middle")

    monkeypatch.setitem(proven.METHODS, "tight", fails)
    found = prove(problem())
    assert found.proofs["tight"] == Proof(None, "fails numerically: in the middle")
    assert (found.value, found.method) == (4.0, "product")


@pytest.mark.parametrize("name", [*ACTS, "groups of one"])
def test_a_network_of_one_layer_is_bounded_by_its_norm_whatever_the_activation(name):
    act, layers = (ACTS | {"groups of one": GroupSort(group_size=1)})[name], ([[3.0, 4.0]], [0.5])
    net = by_hand(layers, act=act)
    x = torch.linspace(-1, 1, 40).double().view(1, 20, 2)
    measured = overall(steepest(net, sources(net, x, scan(net, x), 2, [generator()]), 0, 2))
    problem = of_network(net, Unconstrained(), max_regions=10)
    values = {method: METHODS[method](problem._replace(measured=measured)).value for method in METHODS}
    assert measured.value == 5
    assert values.pop("multipliers") is None  # which no network has of itself
    assert {method for method in values if values[method] is None} in (set(), {"eclipse", "lipsdp"})
    assert all(value == pytest.approx(5, rel=1e-9) for value in values.values() if value is not None)


def test_rounding_does_not_put_the_exact_constant_above_another_bound():
    """The product is 5 exactly, and 0 for a constant function; the constants are rounded up."""
    for factor in (1.0, 0.0):
        net = scaled(by_hand(([[3.0, 4.0], [3.0, 4.0]], [1.0, 1.0]), ([[1.0, 0.0]], [0.0])), 1.0, factor)
        for method in (None, "exact"):
            found = prove(of_network(net, LInf(2, 10.0), max_regions=20), method)
            interval = found.interval(Maximum(0.0, (0.5, 0.5)))
            assert interval.exact == interval.product == interval.certified == 5 * factor
            assert interval.exact_box["value"] <= interval.exact
            assert found.method == "exact"


class Softer(torch.nn.ReLU):
    """One that declares its slopes; its patterns have 0.5 where those of ReLU have 1."""

    slopes = (0, 0.5)

    def forward(self, z):
        return 0.5 * super().forward(z)


def test_a_class_that_declares_its_slopes_gains_from_them():
    net = network(3, 8, 8, 1)
    found = prove(of_network(with_act(net, as_activation(Softer())), Unconstrained(), measured=0.01))
    assert found.method == "lipsdp"
    assert found.value == pytest.approx(lipsdp(net)[0] / 4, rel=1e-3)  # of two layers
