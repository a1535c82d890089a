"""Constants of pairs of outputs: those of the network f_i - f_j, and at least every slope that is seen."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from acts import ACTS
from networks import EACH_LIPSCHITZ, NORMS, SEVERAL, between, by_hand, network, normal, pairs, power

from lipexp.activations import ALL_NORMS, Abs, as_activation
from lipexp.blocks import Affine, Residual
from lipexp.constraints import LInf, Unconstrained
from lipexp.measured.gradients import Maximum, norms, scan
from lipexp.networks import BakedNetwork
from lipexp.norms import dual
from lipexp.proven import Certificate, Chain, Problem, Proof, prove, semidefinite
from lipexp.proven.pairs import feature_constants, pair_constants
from lipexp.proven.radii import assess
from lipexp.proven.semidefinite import lipsdp
from lipexp.wording import robustness_line

TANH = as_activation(torch.nn.Tanh())
TANH.norms = ALL_NORMS
CHAINS = {"2 -> 2": Unconstrained(), **{f"{p:g} -> inf": LInf(p, 1.0) for p in NORMS}}


def certified(net, constraint, method=None, measured=0.0):
    """The network with its proven norms, and its certificate."""
    net, ones = constraint.prove(net), torch.ones(net.n_inputs).double()
    chain = Chain.of(constraint, net.layers)
    return net, prove(Problem(net, chain, (-ones, ones), Maximum(measured, ()), 10**5), method)


def all_pairs(net):
    return list(itertools.combinations(range(net.n_outputs), 2))


@pytest.mark.parametrize("kind", CHAINS)
@pytest.mark.parametrize(("method", "name"), [("product", "maxmin"), ("rows", "abs"), ("exact", "relu")])
def test_a_pair_has_the_bound_of_its_network_of_one_output(kind, method, name):
    net, found = certified(network(2, 8, 8, 3, act=ACTS[name], grain=2.0**-10), CHAINS[kind], method)
    pairs = pair_constants(net, found)
    assert np.array_equal(pairs.constants, pairs.constants.T)
    assert not pairs.constants.diagonal().any()
    for i, j in all_pairs(net):
        alone = certified(between(net, i, j), CHAINS[kind], method)[1].value
        assert pairs.constants[i, j] == pytest.approx(min(alone, pairs.joint), rel=1e-11)
        assert pairs.methods[i, j] == pairs.methods[j, i]


@pytest.mark.parametrize("constraint", [Unconstrained(), LInf(2, 1.0)], ids=["2 -> 2", "2 -> inf"])
@pytest.mark.parametrize("name", ["relu", "leaky_relu", "bent", "maxmin", "abs"])
def test_matrix_inequalities_bound_all_pairs_at_once(name, constraint):
    """As well as alone, but for the multipliers that LipSDP finds for the whole network if it is not named."""
    net = network(6, 10, 10, 3, act=ACTS[name], grain=2.0**-10)
    slopes = scan(net, 2 * normal(1, 5000, 6)).gradient[0]
    net, together = certified(net, constraint)
    assert together.method == "lipsdp"
    closed, best = (pair_constants(net, certified(net, constraint, by)[1]) for by in ("eclipse", "lipsdp"))
    for i, j in all_pairs(net):
        alone = certified(between(net, i, j), constraint, "eclipse")[1].value
        assert closed.constants[i, j] == pytest.approx(min(alone, closed.joint), rel=1e-8)
        least = lipsdp(between(net, i, j))[0]
        assert float(norms(slopes[:, i] - slopes[:, j], 2).max()) <= least * (1 + 1e-12)
        assert best.constants[i, j] == pytest.approx(least, rel=2e-3)
        assert best.constants[i, j] * (1 - 2e-3) <= pair_constants(net, together).constants[i, j] <= alone * 1.001


@pytest.mark.parametrize("overrides", SEVERAL, ids=" ".join)
def test_no_pair_of_a_trained_network_is_steeper_than_its_constant(overrides, trained):
    """By gradients everywhere, and by what random points differ in."""
    result = trained(*overrides, runs=EACH_LIPSCHITZ)
    constraint = result.stack.constraint
    for run in (1, 2):
        net, found = certified(result.checkpoint.network.run(run), constraint)
        pairs, x = pair_constants(net, found), torch.from_numpy(result.stack.data[run].train_x).double()
        points = torch.cat([x, 10 * normal(500, net.n_inputs), x + 1e-3 * normal(*x.shape)])
        scanned = scan(net, points.unsqueeze(0))
        distances = torch.cdist(points, points, p=constraint.p)
        for i, j in all_pairs(net):
            slope = norms(scanned.gradient[0, :, i] - scanned.gradient[0, :, j], constraint.q).max()
            f = scanned.f[0, :, i] - scanned.f[0, :, j]
            quotients = (f.unsqueeze(1) - f).abs() / distances.masked_fill(distances == 0, math.inf)
            assert max(float(slope), float(quotients.max()) * (1 - 1e-9)) <= pairs.constants[i, j] * (1 + 1e-12)
            assert pairs.constants[i, j] <= pairs.joint


@pytest.mark.parametrize("p", NORMS)
def test_no_bit_of_a_difference_of_rows_is_lost(p):
    """1 + 2^-100 - 2^-149, of which float64 keeps 1, decided in rational arithmetic."""
    rows = [[1.0, 2.0**-100, 3.0], [-(2.0**-100), 1.0, 3.0], [2.0**-149, 0.0, 1e30]]
    net, found = certified(by_hand((rows, [0.0] * 3)), LInf(p, 1.0))
    constants = pair_constants(net, found).constants
    for i, j in all_pairs(net):
        stored = (map(Fraction, net.layers[0].weight[0, row].tolist()) for row in (i, j))
        size = power([a - b for a, b in zip(*stored, strict=True)], dual(p))
        bound = Fraction(float(constants[i, j])) ** (2 if p == 2 else 1)
        assert size <= bound <= size * (1 + Fraction(1, 10**11))


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("name", ["relu", "maxmin"])
def test_matrix_inequalities_bound_pairs_in_any_norm_of_the_inputs(name, p):
    net, found = certified(network(4, 8, 8, 3, act=ACTS[name]), LInf(p, 1.0), "lipsdp")
    pairs = semidefinite.bounds_of_pairs(net, found.proofs["lipsdp"].multipliers, 5.0)
    constants, factor = pair_constants(net, found).constants, 2 if p == math.inf else 1
    gradients = scan(net, 2 * normal(1, 5000, 4)).gradient[0]
    for k, (i, j) in enumerate(all_pairs(net)):
        assert float(norms(gradients[:, i] - gradients[:, j], dual(p)).max()) <= constants[i, j] * (1 + 1e-12)
        assert constants[i, j] <= factor * pairs[k] * (1 + 1e-6)


@pytest.mark.parametrize(
    ("method", "h", "square"), [("lipsdp", 2, 2), ("lipsdp", math.inf, 2), ("x", math.inf, 4)]
)
def test_a_pair_without_a_bound_of_its_own_has_that_of_the_whole_network(method, h, square, monkeypatch):
    """sqrt(2) L for what bounds the outputs in the 2-norm, 2 L for rows, rounded up."""
    monkeypatch.setattr(semidefinite, "bounds_of_pairs", lambda *arguments: np.full(3, math.inf))
    proofs = {"product": Proof(None, "no"), method: Proof(3.0)}
    found = Certificate(Chain(2.0, 2.0, h, h, None, None, ()), ([], []), 3.0, None, method, proofs)
    pairs = pair_constants(network(2, 4, 3), found)
    assert pairs.joint**2 == pytest.approx(9 * square, rel=1e-15)
    assert Fraction(pairs.joint) ** 2 >= 9 * square
    off = ~np.eye(3, dtype=bool)
    assert (pairs.constants[off] == pairs.joint).all()
    assert (pairs.methods[off] == "joint").all()


def test_rows_that_are_equal_make_a_constant_difference():
    first, last = ([[1.0, 2.0], [3.0, -1.0]], [0.0, 1.0]), ([[1.0, 2.0], [1.0, 2.0], [2.0, 2.0]], [0.0, 5.0, 0.0])
    for name, method in (("relu", None), ("relu", "lipsdp"), ("maxmin", None), ("abs", None)):
        net, found = certified(by_hand(first, last, act=ACTS[name]), Unconstrained(), method)
        constants = pair_constants(net, found).constants
        assert constants[0, 1] <= 1e-14
        assert constants[0, 2] > 0


def test_what_pairs_gain_over_the_bound_of_the_whole_network_is_told():
    """The rows (1, 0), (1, 1) and (1, -1) have the norm sqrt(3), and differ by 1, 1 and 2."""
    net = by_hand(([[1.0, 0.0], [1.0, 1.0], [1.0, -1.0]], [0.5, 0.0, 0.0]))
    net, whole = certified(net, Unconstrained(), "product")
    x = torch.tensor([[0.0, 0.0], [0.0, 9.0], [0.0, -9.0], [0.0, 0.5]]).double()  # the last one is undecided
    points = {split: (x, torch.tensor([0, 1, 2, 0])) for split in ("val", "test")}
    found = assess(net, points, whole)
    assert found.pairs.smallest == pytest.approx(1, rel=1e-12)
    assert found.pairs.largest == pytest.approx(2, rel=1e-12)
    assert found.pairs.median_gain == pytest.approx(math.sqrt(6), rel=1e-9)
    own = found.of("test")
    names = "split index x0 x1 y prediction runner_up correct f radius radius_float32 radius_local"
    assert " ".join(own) == names
    np.testing.assert_allclose(own["radius"], [0.5, 8.5, 8.5, 0], rtol=1e-9, atol=1e-15)
    assert (own["correct"] == [1, 1, 1, own["prediction"][3] == 0]).all()
    line = robustness_line(found.summary([0.1]))
    assert line.startswith("certified accuracy within ‖δ‖₂ ≤ 0.1: 0.75   median radius ")
    assert line.endswith(" (pairs of outputs: 1 to 2, radii 140 % larger)")


# Single features -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "name"), pairs(CHAINS, ["relu", "maxmin", "abs", "bent", "tanh"]))
def test_one_coordinate_moves_no_output_and_no_margin_faster_than_is_proven(kind, name):
    net, found = certified(network(4, 12, 12, 3, act=(ACTS | {"tanh": TANH})[name]), CHAINS[kind])
    gradients = scan(net, 2 * normal(1, 5000, 4)).gradient[0]
    alone, pairs = feature_constants(net, found), pair_constants(net, found)
    assert alone.shape == (3, 4)
    assert (gradients.abs().amax(dim=0).numpy() <= alone).all()
    assert (alone <= found.value).all()
    of_pairs = feature_constants(net, found, pairs)
    assert of_pairs.shape == (3, 3, 4)
    assert np.array_equal(of_pairs, of_pairs.swapaxes(0, 1))
    assert (of_pairs <= pairs.constants[..., None]).all()
    for i, j in all_pairs(net):
        assert ((gradients[:, i] - gradients[:, j]).abs().amax(dim=0).numpy() <= of_pairs[i, j]).all()


@pytest.mark.parametrize("p", NORMS)
def test_a_coordinate_is_followed_by_the_norms_of_the_layers_or_feature_by_feature(p):
    """The smaller of the two, in dense arithmetic; a coordinate that nothing depends on moves nothing."""
    weight = network(4, 8, 1, act=ACTS["relu"]).layers[0].weight[0].clone()
    weight[:, 1] = 0
    last = network(8, 1, seed=2).layers[0].weight[0]
    net = by_hand((weight.tolist(), [0.0] * 8), (last.tolist(), [0.0]))
    net, found = certified(net, LInf(p, 1.0), "product")
    columns, row = weight.double().abs(), last.double().abs()[0]
    expected = torch.minimum(columns.amax(dim=0) * row.sum(), (row.unsqueeze(1) * columns).sum(dim=0))
    np.testing.assert_allclose(feature_constants(net, found), expected.clamp_max(found.value), rtol=1e-13)
    assert feature_constants(net, found)[1] == 0


def test_a_coordinate_is_not_followed_by_norms_of_residual_layers_that_do_not_hold():
    """With the absolute value inside, they are no contractions."""
    one = torch.ones(1, 1, 1)
    inside = Residual(one, 0 * one, 1.875 * one)
    layers = [Affine(one, 0 * one), inside, inside, Affine(one, 0 * one)]
    net, chain = Chain.without_bound(BakedNetwork(layers, [Abs()] * 4), 2.0)
    problem = Problem(net, chain, (-torch.ones(1).double(), torch.ones(1).double()), Maximum(0.0, ()), 100)
    found = prove(problem)
    slope = 2.875**2  # x - 1.875 |x| for x < 0, twice
    assert found.value == pytest.approx(slope)
    assert feature_constants(net, found)[0] >= slope
