"""Smooth activations: their functions and slopes against mpmath in 50 digits, and what is proven by them."""

import math
from fractions import Fraction

import mpmath
import numpy as np
import pytest
import torch
from mpmath import mp
from networks import NORMS, curve, network, normal, residual, uniform, with_parameters

from lipexp.activations import (
    ALL_NORMS,
    ELU,
    GELU,
    Abs,
    Identity,
    LeakyReLU,
    LipschitzSpline,
    NActivation,
    ReLU,
    Sigmoid,
    SiLU,
    Softplus,
    Tanh,
    elementary,
)
from lipexp.config import ConfigError
from lipexp.measured.gradients import INTERVAL, largest, operator_norms, scan

DIGITS = 50


def sigmoid(x):
    return 1 / (1 + mp.exp(-x))


def gelu_tanh(x):
    return x * (1 + mp.tanh(mp.sqrt(2 / mp.pi) * (x + mp.mpf(0.044715) * x**3))) / 2


SQUARE_CURVE = mp.mpf(3) * mp.mpf(0.044715)
# Each with g, its derivative, and torch's own.
SMOOTH = {
    "tanh": (Tanh(), mp.tanh, lambda x: mp.sech(x) ** 2, torch.nn.Tanh()),
    "sigmoid": (Sigmoid(), sigmoid, lambda x: sigmoid(x) * sigmoid(-x), torch.nn.Sigmoid()),
    "plain sigmoid": (Sigmoid(scaled=False), sigmoid, lambda x: sigmoid(x) * sigmoid(-x), torch.nn.Sigmoid()),
    "softplus": (Softplus(), lambda x: mp.log1p(mp.exp(x)), sigmoid, torch.nn.Softplus(threshold=40)),
    "softplus of 3": (
        Softplus(beta=3),
        lambda x: mp.log1p(mp.exp(3 * x)) / 3,
        lambda x: sigmoid(3 * x),
        torch.nn.Softplus(3, threshold=40),
    ),
    "elu": (ELU(), lambda x: x if x > 0 else mp.expm1(x), lambda x: 1 if x > 0 else mp.exp(x), torch.nn.ELU()),
    "elu of 2": (
        ELU(alpha=2),
        lambda x: x if x > 0 else 2 * mp.expm1(x),
        lambda x: 1 if x > 0 else 2 * mp.exp(x),
        torch.nn.ELU(2),
    ),
    "elu of 0.3": (
        ELU(alpha=0.3),
        lambda x: x if x > 0 else mp.mpf(0.3) * mp.expm1(x),
        lambda x: 1 if x > 0 else mp.mpf(0.3) * mp.exp(x),
        torch.nn.ELU(0.3),
    ),
    "silu": (
        SiLU(),
        lambda x: x * sigmoid(x),
        lambda x: sigmoid(x) + x * sigmoid(x) * sigmoid(-x),
        torch.nn.SiLU(),
    ),
    "gelu": (
        GELU(),
        lambda x: x * mp.ncdf(x),
        lambda x: mp.ncdf(x) + x * mp.npdf(x),
        torch.nn.GELU(),
    ),
    "plain gelu by tanh": (
        GELU("tanh", scaled=False),
        gelu_tanh,
        lambda x: (
            gelu_tanh(x) / x
            + x
            * mp.sqrt(2 / mp.pi)
            * (1 + SQUARE_CURVE * x**2)
            * mp.sech(mp.sqrt(2 / mp.pi) * (x + SQUARE_CURVE / 3 * x**3)) ** 2
            / 2
            if x
            else mp.mpf(0.5)
        ),
        torch.nn.GELU("tanh"),
    ),
}
# Everywhere, where they turn, next to that, and where little is left of exp.
PLACES = torch.cat(
    [
        torch.linspace(-45, 45, 91).double(),
        5 * normal(100),
        1e-9 * normal(10),
        torch.tensor(
            [0, 1.4142135623730951, -2.3993572805154675, 1.4185040087908283, 8, -8.5, 700, -745, 1e5, -1e5]
        ),
    ]
).double()


@pytest.fixture(autouse=True)
def digits():
    with mpmath.workdps(DIGITS):
        yield


@pytest.mark.parametrize("name", SMOOTH)
def test_they_are_torchs_functions_times_a_factor_that_makes_the_largest_slope_1(name):
    act, _, _, module = SMOOTH[name]
    for dtype in (torch.float32, torch.float64):
        z = PLACES[:200].to(dtype).view(1, 20, 10)
        torch.testing.assert_close(
            act(z), act.factor * module(z), rtol=1e-15 if dtype == torch.float64 else 1e-6, atol=0
        )
    largest_slope = max(map(abs, act.slopes))
    scaled = not name.startswith("plain")
    assert not scaled or 1 - 1e-6 < largest_slope <= 1
    assert set(act.norms) == (ALL_NORMS if largest_slope <= 1 else set())
    assert float(np.float32(act.factor)) == act.factor


@pytest.mark.parametrize("name", SMOOTH)
def test_their_values_and_slopes_are_enclosed(name):
    act, g, slope, _ = SMOOTH[name]
    value, error = (part.tolist() for part in act.enclosed(PLACES))
    least, most = (part.tolist() for part in act.slopes_between(PLACES, PLACES))
    for i, x in enumerate(PLACES.tolist()):
        exactly = act.factor * g(mp.mpf(x))
        assert abs(mp.mpf(value[i]) - exactly) <= mp.mpf(error[i]) / 4, x  # of which there is plenty left
        assert error[i] <= 1e-11 * max(1, abs(x))
        assert least[i] <= act.factor * slope(mp.mpf(x)) <= most[i]
        jump = name == "elu of 2" or name == "elu of 0.3"
        assert most[i] - least[i] <= (1e-11 if x or not jump else 0.8)


@pytest.mark.parametrize("name", SMOOTH)
def test_the_range_of_slopes_is_rounded_outwards_and_attained(name):
    """The turns are zeros of the second derivative, which mpmath finds by itself, by at least one float64."""
    act, _, slope, _ = SMOOTH[name]
    starts = {"silu": [-2.4, 2.4], "gelu": [-1.41, 1.41], "plain gelu by tanh": [-1.42, 1.42]}.get(name, [])
    turns = [mp.findroot(lambda x: mp.diff(slope, x), start) for start in starts]
    # Otherwise the range is from 0, far out, to the slope at 0 or far out on the other side.
    seen = [act.factor * slope(x) for x in (turns or [mp.mpf(-900), mp.mpf(0), mp.mpf(900), mp.mpf("1e-30")])]
    for found, exactly, outwards in ((act.slopes[0], min(seen), -1), (act.slopes[1], max(seen), 1)):
        assert outwards * (mp.mpf(found) - exactly) >= -(mp.mpf(10) ** -40)
        assert abs(mp.mpf(found) - exactly) <= 4 * 2.0**-53


@pytest.mark.parametrize("name", SMOOTH)
def test_slopes_between_two_inputs_are_the_hull_of_those_on_a_grid(name):
    act, _, _, module = SMOOTH[name]
    centre, half = 3 * normal(400), torch.tensor([1e-3, 0.1, 1.0, 5.0]).double().repeat(100)
    low, high = centre - half, centre + half
    x = (low + torch.linspace(0, 1, 2001).double().unsqueeze(1) * (high - low)).requires_grad_()
    (slopes,) = torch.autograd.grad(act.factor * module(x).sum(), x)
    least, most = act.slopes_between(low, high)
    assert (least <= slopes.amin(dim=0) + 1e-12).all()
    assert (most >= slopes.amax(dim=0) - 1e-12).all()
    inside = (low > 0) | (high < 0) | (torch.tensor("elu of" not in name))  # a jump lies between two of the grid
    slack = 1e-3 * half.square() + 1e-11
    assert (least >= slopes.amin(dim=0) - slack)[inside].all()
    assert (most <= slopes.amax(dim=0) + slack)[inside].all()


@pytest.mark.parametrize("name", SMOOTH)
def test_ends_that_are_infinite_or_unknown_have_any_slope(name):
    act = SMOOTH[name][0]
    ends = torch.tensor([math.inf, math.nan]).double()
    for low, high in ((-ends, ends), (torch.zeros(2).double(), ends), (-ends, torch.zeros(2).double())):
        least, most = act.slopes_between(low, high)
        inside = act.slopes_between(
            torch.where(low.isnan(), 0, low.clamp_min(-50)), high.nan_to_num(0).clamp_max(50)
        )
        assert (least <= inside[0] + 1e-11).all()
        assert (most >= inside[1] - 1e-11).all()
        assert (least >= act.slopes[0]).all()
        assert (most <= act.slopes[1]).all()


PIECES = {
    "relu": ReLU(),
    "leaky_relu": LeakyReLU(0.1),
    "abs": Abs(),
    "n": NActivation(),
    "spline": LipschitzSpline(5),
}


@pytest.mark.parametrize("name", PIECES)
def test_slopes_of_linear_pieces_between_two_inputs_are_exact(name):
    """Against the pieces that the rational side knows."""
    act = with_parameters(network(2, 6, 1, act=PIECES[name])).double.acts[0]
    low = 2 * normal(60, 6)
    high = low + torch.tensor([0.0, 0.1, 3.0]).double().repeat_interleave(20).unsqueeze(1) * uniform(60, 6).abs()
    least, most = act.slopes_between(low, high)
    for j in range(6):
        knots, lines = curve(act, j, 6)
        ends = [-math.inf, *knots, math.inf]
        for i in range(60):
            a, b = Fraction(float(low[i, j])), Fraction(float(high[i, j]))
            seen = [line[0] for k, line in enumerate(lines) if a <= ends[k + 1] and b >= ends[k]]
            assert (Fraction(float(least[i, j])), Fraction(float(most[i, j]))) == (min(seen), max(seen))
    assert [part.tolist() for part in ReLU().slopes_between(*torch.tensor([[[0.0, -1]], [[1.0, 0]]]))] == [
        [[1.0, 0]]
    ] * 2
    assert [part.tolist() for part in ReLU().slopes_between(*torch.zeros(2, 1, 1))] == [[[0.0]], [[1.0]]]
    assert [part.tolist() for part in Identity().slopes_between(*torch.zeros(2, 1, 1))] == [[[1.0]]] * 2


@pytest.mark.parametrize(
    ("function", "exactly", "x"),
    [
        (
            elementary.exp,
            mp.exp,
            -torch.cat([700 * uniform(300).abs(), torch.tensor([0.0, 700, 1e-300, 0.34657])]),
        ),
        (elementary.log_of_one_plus, mp.log1p, torch.cat([uniform(300).abs(), torch.tensor([0, 1.0, 1e-200])])),
        (elementary.logistic, sigmoid, 30 * normal(300)),
    ],
)
def test_elementary_functions_are_right_but_for_their_last_five_bits(function, exactly, x):
    for found, at in zip(function(x.double()).tolist(), x.double().tolist(), strict=True):
        assert abs(mp.mpf(found) - exactly(mp.mpf(at))) <= mp.mpf(2) ** -48 * exactly(mp.mpf(at))


def test_the_normal_distribution_is_right_to_44_bits():
    x = torch.cat([3 * normal(300), torch.tensor([0, 8, -8, 20, -20, 7.99, 1e-200])]).double()
    for at in (x, x[:1], x.clamp(-0.1, 0.1)):  # as many terms as the largest needs
        for found, density, place in zip(
            *(part.tolist() for part in elementary.normal(at)), at.tolist(), strict=True
        ):
            assert abs(mp.mpf(found) - mp.ncdf(place)) <= 2.0**-44
            assert abs(mp.mpf(density) - mp.npdf(place)) <= 2.0**-44
    assert elementary.normal(torch.tensor([math.nan, 1.0]).double())[0].isnan().tolist() == [True, False]


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (ELU, {"alpha": 17}, "alpha=17: must be a number from 0 to 16"),
        (Softplus, {"beta": 0}, "beta=0: must be a number from 0.001 to 1000"),
        (GELU, {"approximate": "erf"}, "approximate=erf: must be none or tanh"),
        (SiLU, {"scaled": "yes"}, "scaled=yes: must be true or false"),
    ],
)
def test_a_bad_argument_is_named(kind, arguments, message):
    with pytest.raises(ConfigError, match=f"^{message}$"):
        kind(**arguments)


# Measurement -----------------------------------------------------------------------------------------------------


def jacobian_of(net, point, name):
    """The Jacobian at a point in 50 digits, as a matrix of mpmath."""
    act, g, slope, _ = SMOOTH[name]

    def exact(part):
        return mp.matrix(part.double().tolist())

    def activated(z, jacobian):
        slopes = mp.diag([act.factor * slope(v) for v in z])
        return mp.matrix([act.factor * g(v) for v in z]), slopes * jacobian

    x, jacobian = mp.matrix(list(point)), mp.eye(len(point))
    before = False
    for layer in net.layers:
        weight, bias = exact(layer.weight[0]), exact(layer.bias[0].T)
        if layer.is_residual:
            z, inside = activated(weight.T * x + bias, weight.T * jacobian)
            back = weight * mp.diag(layer.t[0, 0].double().tolist())
            x, jacobian, before = x - back * z, jacobian - back * inside, False
            continue
        if before:
            x, jacobian = activated(x, jacobian)
        x, jacobian, before = weight * x + bias, weight * jacobian, True
    return jacobian


def norm_of(jacobian, q, h):
    if h == q == 2 and jacobian.rows > 1:
        return max(mp.svd_r(jacobian, compute_uv=False))
    if h == 1:
        return max(sum(abs(v) for v in jacobian.T[i, :]) for i in range(jacobian.cols))
    return max(mp.norm(jacobian[i, :], mp.inf if math.isinf(q) else q) for i in range(jacobian.rows))


@pytest.mark.parametrize("name", SMOOTH)
def test_what_is_measured_is_at_most_the_norm_in_50_digits_and_hardly_less(name):
    act = SMOOTH[name][0]
    nets = [network(2, 8, 8, 1, act=act), network(3, 6, 3, act=act, bias=2.0)]
    nets += [residual(2, 6, 2, act=act)] if act.has_unit_slopes else []
    for net in nets:
        x = 2 * uniform(50, net.n_inputs)
        gradients = scan(net, x.unsqueeze(0)).gradient[0]
        for q, h in [(q, math.inf) for q in NORMS] + [(2.0, 2.0), (math.inf, 1.0)]:
            found = largest(net, x, gradients, q, h)
            exactly = norm_of(jacobian_of(net, found.point, name), q, h)
            assert found.by == INTERVAL
            assert found.value <= exactly <= found.value * (1 + 1e-9)
            assert found.value == pytest.approx(float(operator_norms(gradients, q, h).max()), rel=1e-9)


def test_a_jump_of_the_slope_at_the_point_counts_as_the_flatter_side():
    """Of 2 (exp(x) - 1) below 0 and x above, and of what rounding errors may hide: only what is surely there."""
    net = network(1, 1, 1, act=ELU(alpha=2, scaled=False), bias=0)
    point = torch.zeros(1, 1).double()
    found = largest(net, point, scan(net, point[None]).gradient[0], 2.0)
    weights = [abs(float(layer.weight)) for layer in net.layers]
    assert found.value == pytest.approx(math.prod(weights), rel=1e-9)
