"""Networks whose constants are known by hand, through every method: the right number, or a reason for none."""

import math
import re
from dataclasses import replace

import pytest
import torch
from networks import by_hand, generator

from lipexp.activations import ELU, GELU, Abs, GroupSort, ReLU, Sigmoid, SiLU, Softplus, Tanh
from lipexp.constraints import LInf
from lipexp.measured import overall, sources, steepest
from lipexp.measured.gradients import scan
from lipexp.norms import dual
from lipexp.proven import METHODS, Chain, Problem, prove
from lipexp.proven.methods import OVERFLOW

RELU, MAXMIN, TANH = ReLU(), GroupSort(), Tanh()
TINY, HUGE = 2.0**-140, 2.0**127  # of float32: denormal, and 1.7e38
# Of u = x1 / 2 + x2 / 2, whose gradient has these norms.
OF_U = {1.0: 1.0, 2.0: math.sqrt(0.5), math.inf: 0.5}


def along(*weights):
    """The rows of a layer whose features are these multiples of u."""
    return [[weight / 2, weight / 2] for weight in weights]


# f as a function of u, its constant on the whole line, and between -1 and 1.
HAND_MADE = {
    "4 u": (by_hand((along(2.0, -2.0), [0.0, 0.0]), ([[2.0, -2.0]], [1.0])), 4, 4),
    "4 |u|": (by_hand((along(2.0), [0.0]), ([[2.0]], [1.0]), act=Abs()), 4, 4),
    "8 |u| by sorting": (by_hand((along(2.0, -2.0), [0.1, 0.0]), ([[2.0, -2.0]], [1.0]), act=MAXMIN), 8, 8),
    "5 behind a kink": (by_hand((along(1.0, 1.0), [0.0, -0.5]), ([[2.0, 3.0]], [0.0])), 5, 5),
    "5 sorted": (by_hand((along(4.0, 1.0), [0.0, 0.0]), ([[1.0, 1.0]], [0.0]), act=MAXMIN), 5, 5),
    "0 by its last layer": (by_hand((along(1.0, 2.0), [0.3, 0.1]), ([[0.0, 0.0]], [5.0])), 0, 0),
    "0 by its first layer": (by_hand((along(0.0, 0.0), [1.0, 1.0]), ([[3.0, 4.0]], [5.0])), 0, 0),
    "0 and curved": (by_hand((along(0.0, 0.0), [1.0, 1.0]), ([[3.0, 4.0]], [5.0]), act=TANH), 0, 0),
    "dead": (by_hand((along(1.0, 1.0), [-9.0, -9.0]), ([[3.0, 3.0]], [5.0])), 6, 0),
    "equal": (by_hand((along(1.0, 1.0, 1.0, 1.0), [0.2] * 4), ([[1.0] * 4], [0.0])), 4, 4),
    "equal and sorted": (by_hand((along(1.0, 1.0), [0.2] * 2), ([[1.0, 1.0]], [0.0]), act=MAXMIN), 2, 2),
    "all kinks at 0": (
        by_hand((along(1.0, -1.0, 3.0, -3.0), [0.0] * 4), ([[1.0, -1.0, 1.0, -1.0]], [0.0])),
        4,
        4,
    ),
    "denormal": (by_hand((along(TINY, TINY), [0.0] * 2), ([[TINY, TINY]], [0.0])), 2 * TINY**2, 2 * TINY**2),
    "huge": (by_hand((along(HUGE), [0.0]), ([[HUGE]], [0.0])), HUGE**2, HUGE**2),
    "2 tanh(2 u)": (by_hand((along(2.0, 2.0), [0.0, 0.0]), ([[1.0, 1.0]], [0.0]), act=TANH), 4, 4),
    "sigmoid": (by_hand((along(1.0), [0.0]), ([[1.0]], [0.0]), act=Sigmoid(scaled=False)), 0.25, 0.25),
    "softplus": (by_hand((along(1.0), [0.0]), ([[1.0]], [0.0]), act=Softplus(beta=1)), 1, 1 / (1 + math.exp(-1))),
    "elu": (by_hand((along(1.0), [0.0]), ([[-1.0]], [0.0]), act=ELU(alpha=3, scaled=False)), 3, 3),
    "gelu": (by_hand((along(4.0), [0.0]), ([[1.0]], [0.0]), act=GELU(scaled=False)), *[4 * 1.128904145185155] * 2),
    "silu": (
        by_hand((along(-4.0), [0.0]), ([[1.0]], [0.0]), act=SiLU(scaled=False)),
        *[4 * 1.099839320128867] * 2,
    ),
}
# Branch and bound takes the sides of features that are multiples of each other for independent.
NOT_SEEN_TO_CANCEL = {"4 u", "all kinks at 0"}


def proofs_of(net, p, methods=METHODS, seconds=3.0):
    """What is measured on the box from -1 to 1, the proof of each method asked alone, and of all together."""
    constraint = LInf(p, lipschitz=1.0)
    proven = constraint.prove(net)
    axis = torch.linspace(-1, 1, 31).double()
    x = torch.cartesian_prod(axis, axis).unsqueeze(0)
    measured = overall(steepest(net, sources(net, x, scan(net, x), dual(p), [generator()]), 0, dual(p)))
    chain, box = replace(Chain.of(constraint, net.layers), target=None), (x[0].amin(dim=0), x[0].amax(dim=0))
    problem = Problem(proven, chain, box, measured, 1000, gap=1e-4, seconds=seconds)
    return measured, {name: METHODS[name](problem) for name in methods}, prove(problem)


@pytest.mark.parametrize("p", OF_U)
@pytest.mark.parametrize("name", HAND_MADE)
def test_every_method_proves_at_least_the_constant_and_the_tight_ones_prove_it(name, p):
    net, *constants = HAND_MADE[name]
    everywhere, in_box = (constant * OF_U[dual(p)] for constant in constants)
    measured, proofs, certificate = proofs_of(net, p, seconds=0.5 if name in NOT_SEEN_TO_CANCEL else 3.0)
    assert in_box * (1 - 1e-3) <= measured.value <= in_box
    for method, proof in proofs.items():
        assert proof.value is None or proof.value >= (everywhere if proof.everywhere else in_box), method
        assert proof.value is None or proof.value >= measured.value, method
    if proofs["exact"].value is not None:
        assert proofs["exact"].value == pytest.approx(everywhere, rel=1e-9)
        assert proofs["exact"].constants.box.value == pytest.approx(in_box, rel=1e-9)
    if name not in NOT_SEEN_TO_CANCEL:
        assert proofs["bnb"].value <= in_box * (1 + 1e-3) + 1e-100
    assert certificate.value is not None
    assert certificate.interval(measured).verdict == "PASS"


@pytest.mark.parametrize("act", [RELU, MAXMIN, TANH], ids=lambda act: act.label)
@pytest.mark.parametrize("p", OF_U)
def test_numbers_beyond_float64_are_open_with_the_reason(act, p):
    layers = [([[HUGE, HUGE], [HUGE, -HUGE]], [0.0, 1.0])] * 9
    net = by_hand(*layers, ([[HUGE, HUGE]], [0.0]), act=act)
    measured, _, certificate = proofs_of(net, p, methods=())
    assert measured.value < math.inf
    assert certificate.interval(measured).verdict == "OPEN"
    assert certificate.reason == OVERFLOW


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_refused_in_one_line(lipexp, run, number):
    folder = run("max_regions=0")
    path = folder / "model.pt"
    state = torch.load(path)
    state["layers.1.weight"][0, 0] = number
    torch.save(state, path)
    done = lipexp("certify", str(folder), "--method", "bnb")
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert "not finite" in done.err


@pytest.mark.parametrize("act", ["relu", "tanh"])
def test_a_network_that_is_constant_takes_no_time(lipexp, run, act):
    """Its last layer is zero, so that no halving of boxes would gain anything."""
    folder = run(f"act={act}", "max_regions=0", "model.width=8")
    path = folder / "model.pt"
    state = torch.load(path)
    state["layers.2.weight"].zero_()
    torch.save(state, path)
    done = lipexp("certify", str(folder), "--method", "bnb", "--max-seconds", "1000")
    assert (done.code, done.err) == (0, "")
    assert re.search(r" bnb (0|\S+e-\d{2,}) \(over the box of the data\)", done.out)
