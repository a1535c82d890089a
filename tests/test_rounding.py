"""Bounds on rounding errors, against exact rational arithmetic and many digits."""

import math
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest
import torch
from acts import ACTS, PIECEWISE, WITH_OFFSETS, Larger
from networks import (
    NORMS,
    by_hand,
    dot,
    network,
    normal,
    residual,
    scaled,
    stored,
    value,
    values,
    with_norms,
)

from lipexp.activations import LeakyReLU, ReLU, as_activation
from lipexp.activations.elsewhere import PReLU
from lipexp.blocks import Affine, Residual
from lipexp.constraints import SLL
from lipexp.measured.gradients import Maximum
from lipexp.modules import Network
from lipexp.networks import BakedNetwork
from lipexp.proven import Chain, Problem, prove_quickly
from lipexp.proven.radii import certified_radii
from lipexp.proven.rounding import evaluate, float32_error, followed, why_no_float32, why_no_radii


def check_float64(net, x, wrong=0.0):
    """The error is bounded, and one of them is above `wrong`."""
    f, error = evaluate(net, x)
    exactly = [v for point in x for v in values(net, point)]
    off = [abs(Fraction(float(v)) - e) for v, e in zip(f.flat, exactly, strict=True)]
    assert all(one <= Fraction(float(bound)) for one, bound in zip(off, error.flat, strict=True))
    assert max(off) >= wrong
    return error


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e9])
@pytest.mark.parametrize("name", ["relu", "maxmin", "fullsort", "bent", *WITH_OFFSETS])
def test_the_float64_error_of_random_networks_is_bounded(name, scale):
    for sizes in ((1, 4, 1), (3, 16, 16, 4), (40, 8, 8, 8, 1), (2, 3)):
        net, x = network(*sizes, act=PIECEWISE[name], bias=1.0), stored(5, sizes[0])
        net = scaled(net, *[scale] * len(net.layers))
        size = math.prod(1 + float(weight.abs().sum(dim=2).amax()) for weight, _ in net.layers)
        assert check_float64(net, x).max() <= 1e-11 * size * (1 + float(x.abs().max()))  # it says something


class Smooth(torch.nn.Module):
    """Maps of a user, in torch and in 60 digits."""

    def __init__(self, map, digits, norms=(), slopes=None):
        super().__init__()
        self.map, self.digits, self.norms, self.slopes = map, digits, norms, slopes

    def forward(self, z):
        return self.map(z)


SMOOTH = {
    "tanh": Smooth(torch.tanh, lambda z: [1 - 2 / ((2 * v).exp() + 1) for v in z], norms=NORMS),
    "naive elu": Smooth(
        lambda z: torch.where(z > 0, z, z.exp() - 1), lambda z: [v if v > 0 else v.exp() - 1 for v in z], (1,)
    ),
    "steep softplus": Smooth(
        lambda z: 3 * torch.logaddexp(z, 0 * z), lambda z: [3 * (v.exp() + 1).ln() for v in z], slopes=(0, 3)
    ),
    "ball": Smooth(
        lambda z: z / z.norm(dim=-1, keepdim=True).clamp_min(1),
        lambda z: [v / max(Decimal(1), dot(z, z).sqrt()) for v in z],
        norms=(2,),
    ),
}


def in_digits(net, point, act):
    """f at a point in 60 digits."""
    with localcontext(prec=60):
        z = [Decimal(float(v)) for v in point]
        for i, (weight, bias, *t) in enumerate(net.layers):
            if t:
                a = act.digits([dot(map(Decimal, w), z) + Decimal(b) for w, b in columns(weight.mT, bias)])
                a = [Decimal(factor) * v for factor, v in zip(t[0][0, 0].tolist(), a, strict=True)]
                z = [v - dot(map(Decimal, row), a) for v, row in zip(z, weight[0].tolist(), strict=True)]
            else:
                x = act.digits(z) if i and not net.layers[i - 1].is_residual else z
                z = [dot(map(Decimal, w), x) + Decimal(b) for w, b in columns(weight, bias)]
        return z[0]


def columns(weight, bias):
    return zip(weight[0].tolist(), bias[0, 0].tolist(), strict=True)


@pytest.mark.parametrize("scale", [1e-9, 1.0, 10.0])
@pytest.mark.parametrize("name", SMOOTH)
def test_an_activation_that_declares_no_linear_maps_has_radii_in_real_arithmetic(name, scale):
    """Where its rounding errors in float64 are followed in a norm in which it does not enlarge them much."""
    act = SMOOTH[name]
    for sizes in ((1, 8, 1), (3, 16, 16, 1), (20, 8, 8, 8, 1)):
        net, x = scaled(network(*sizes, act=as_activation(act)), *[scale] * (len(sizes) - 1)), stored(8, sizes[0])
        assert why_no_radii(net) is None
        f, error = (part[:, 0] for part in evaluate(net, x))
        exactly = [in_digits(net, point, act) for point in x]
        assert all(abs(Decimal(v) - e) <= Decimal(bound) for v, e, bound in zip(f, exactly, error, strict=True))
        size = math.prod(1 + 3 * float(weight.square().sum().sqrt()) for weight, _ in net.layers)
        assert error.max() <= 1e-12 * math.sqrt(max(sizes)) * size
        radii = certified_radii(net, x, 3.0)
        assert all(Decimal(r) * 3 <= abs(e) for r, e in zip(radii.radius, exactly, strict=True))
        assert radii.radius_float32 is None
    assert (radii.radius > 0).all()
    assert why_no_float32(net) == "nothing is known about the rounding errors of Smooth in float32"


# Residual layers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [1e-9, 1.0, 1e6])
@pytest.mark.parametrize("name", ["relu", "leaky_relu", "bent"])
def test_the_errors_of_residual_layers_are_bounded(name, bias):
    """In float64 and, for points anywhere in a ball, in float32; both bounds say something."""
    for sizes, inside in (((1, 4, 1), 4), ((3, 16, 4), 5), ((5, 6, 4, 2), 9)):
        net, x = residual(*sizes, inside=inside, act=ACTS[name], bias=bias), stored(5, sizes[0])
        size = bias + 10
        assert check_float64(net, x).max() <= 1e-12 * size
        radius = np.full(len(x), 2.0)
        bound, plain = float32_error(net, followed(net, x), radius), Network(net)
        assert bound.max() <= 1e-3 * size
        for seed in range(3):
            near = (x + 1.99 * torch.nn.functional.normalize(normal(*x.shape, seed=seed + 7), dim=1)).float()
            for point, f, limits in zip(near, plain(near).tolist(), bound, strict=True):
                for found, exactly, limit in zip(f, values(net, point), limits, strict=True):
                    assert abs(Fraction(found) - exactly) <= Fraction(float(limit))


def summed(terms, order):
    """Of float32 numbers, one after another in this order."""
    total = np.float32(0)
    for j in order:
        total = np.float32(total + terms[j])
    return total


@pytest.mark.parametrize("name", ["relu", "leaky_relu"])
def test_the_errors_of_residual_layers_are_bounded_in_any_order_of_summation(name):
    """Random orders for each sum, in float32, at points where much cancels."""
    net, rng = residual(3, 6, 2, act=ACTS[name], bias=100.0), np.random.default_rng(0)
    x = stored(3, 3)
    bound, worst = float32_error(net, followed(net, x), np.zeros(3)), 0.0
    for point, limits in zip(x, bound, strict=True):
        exactly = values(net, point)
        for _ in range(20):
            h = point.float().numpy()
            for layer in net.layers:
                weight, offset = layer.weight[0].numpy(), layer.bias[0, 0].numpy()
                rows = weight.T if layer.is_residual else weight
                terms = [np.append(row * h, b) for row, b in zip(rows, offset, strict=True)]
                z = np.array([summed(one, rng.permutation(len(one))) for one in terms])
                if layer.is_residual:
                    a = layer.t[0, 0].numpy() * net.acts[0](torch.from_numpy(z)).numpy()
                    terms = [np.append(-row * a, v) for row, v in zip(weight, h, strict=True)]
                    z = np.array([summed(one, rng.permutation(len(one))) for one in terms])
                h = z
            off = [abs(Fraction(float(v)) - e) for v, e in zip(h, exactly, strict=True)]
            assert all(one <= Fraction(float(limit)) for one, limit in zip(off, limits, strict=True))
            worst = max(worst, *(float(one) / limit for one, limit in zip(off, limits, strict=True)))
    assert worst > 1e-3  # the bound is not out of reach


def opposed(offset, weight=1.0, t=0.5, more=()):
    """Of one feature: x - t w (relu(w x + offset) - relu(-w x + offset)), then `more` residual layers."""
    one = torch.ones(1, 1, 1)
    pair = Residual(torch.tensor([[[weight, -weight]]]), torch.full((1, 1, 2), offset), torch.full((1, 1, 2), t))
    layers = [Affine(one, 0 * one), pair, *more, Affine(one, 0 * one)]
    return BakedNetwork(layers, [ReLU()] * len(layers))


def test_what_a_residual_layer_loses_is_counted_and_kept_through_the_next():
    """Its features are large and cancel, so that float64, or float32, keeps little of x - 2 t x."""
    next_one = Residual(torch.full((1, 1, 1), 2.0**-10), torch.zeros(1, 1, 1), torch.ones(1, 1, 1))
    x = stored(6, 1)
    for more in ((), (next_one,)):
        check_float64(SLL().prove(opposed(2.0**54, more=more)), x, wrong=0.1)
        net = SLL().prove(opposed(2.0**22, more=more))
        bound, off = float32_error(net, followed(net, x), np.zeros(6))[:, 0], []
        for point, f, limit in zip(x, Network(net)(x.float())[:, 0].tolist(), bound, strict=True):
            off.append(abs(Fraction(f) - value(net, point)))
            assert off[-1] <= Fraction(float(limit)) < 10
        assert max(off) > 0.1


def test_a_residual_layer_loses_what_underflows_and_has_no_bound_where_it_overflows():
    """t act(z) = 2^-152 becomes 0, and W would have made 2^-132 of it; 2^130 is beyond float32, and cancels."""
    alone = Residual(*(torch.full((1, 1, 1), number) for number in (2.0**20, 0.0, 2.0**-40)))
    one = torch.ones(1, 1, 1)
    net = SLL().prove(BakedNetwork([Affine(one, 0 * one), alone, Affine(one, 0 * one)], [ReLU()] * 3))
    x = torch.tensor([[2.0**-132]]).double()
    bound, (f,) = float32_error(net, followed(net, x), np.zeros(1)).item(), Network(net)(x.float())[0].tolist()
    assert 2.0**-132 <= abs(Fraction(f) - value(net, x[0])) <= bound < 2.0**-125
    net = with_norms(opposed(2.0**100, weight=2.0**-16, t=2.0**30), 1.0, 1.0, 1.0)
    assert Network(net)(x.float()).isnan()
    assert float32_error(net, followed(net, x), np.zeros(1)).item() == math.inf


def test_a_smooth_activation_in_a_residual_layer_has_radii_in_real_arithmetic():
    act = Smooth(
        lambda z: torch.logaddexp(z, 0 * z), lambda z: [(v.exp() + 1).ln() for v in z], NORMS, slopes=(0, 1)
    )
    net, x = residual(3, 8, 1, act=as_activation(act)), stored(8, 3)
    f, error = (part[:, 0] for part in evaluate(net, x))
    exactly = [in_digits(net, point, act) for point in x]
    assert all(abs(Decimal(v) - e) <= Decimal(bound) for v, e, bound in zip(f, exactly, error, strict=True))
    assert 0 < error.max() <= 1e-9
    assert why_no_float32(net) == "nothing is known about the rounding errors of Smooth in float32"


def test_an_activation_with_offsets_has_wider_bounds_and_none_in_float32():
    class Shifted(ReLU):
        def thresholds(self, width):
            return np.zeros(width)

    for make in (network, residual):
        narrow, wide = (evaluate(make(3, 6, 1, act=act), stored(8, 3))[1] for act in (ReLU(), Shifted()))
        assert (wide > 10 * narrow).all()
        reason = "nothing is known about the rounding errors of Shifted in float32"
        assert [why_no_float32(make(3, 6, 1, act=act)) for act in (ReLU(), Shifted())] == [None, reason]


@pytest.mark.parametrize(
    ("name", "reason"),
    [("abs", "needs slopes in [0, 1]; Abs has [-1, 1]"), ("maxmin", "GroupSort declares no slopes")],
)
def test_residual_layers_need_slopes_in_0_to_1(name, reason):
    """Neither norms nor radii are proven without them, whatever model.pt and the configuration say."""
    net = residual(2, 6, 1, act=ACTS[name])
    assert why_no_radii(net) == reason
    chain = Chain.of(SLL(), net.layers)
    nowhere = torch.zeros(2).double()
    found = prove_quickly(Problem(net, chain, (nowhere, nowhere), Maximum(0.0, ()), 1000))
    assert (found.value, found.reason) == (None, reason)


def test_a_residual_layer_whose_norm_is_not_proven_has_no_radii():
    net = residual(2, 6, 1)
    net.layers[2].t.mul_(3)
    assert why_no_radii(SLL().prove(net)) == "not proven to be 1-Lipschitz: residual layer 2"


# Where rounding is at its worst ----------------------------------------------------------------------------------


def test_the_float64_error_is_bounded_where_everything_cancels_or_underflows():
    """f is a difference of two large numbers: what is left of it in float64 is mostly error."""
    huge = 2.0**60
    net = by_hand(([[1.0], [1.0], [1 / 3]], [huge, -huge, 0.1]), ([[1.0, 1.0, 1 / 7]], [-huge]))
    x = torch.tensor([[0.1], [3.3], [-5.0], [100.7]]).double()
    check_float64(net, x, wrong=1)
    assert (certified_radii(with_norms(net, 1.0, 1.0), x, 1.0).radius == 0).all()
    small = torch.tensor([[1e-300, 3e-280], [1e-281, 1e-290], [5e-324, 5e-324]], dtype=torch.float64)
    check_float64(by_hand(([[1e-42, -1e-44]], [1e-45]), ([[1e-40]], [0.0])), small)


def test_the_float32_error_grows_with_the_ball():
    """f = x/3 + 0.1 - x/3 hardly moves, but its features do."""
    net = by_hand(([[1 / 3], [-1 / 3]], [0.1, 0.0]), ([[1.0, 1.0]], [0.0]), act=LeakyReLU(1))
    centre, points = torch.zeros(2, 1).double(), torch.linspace(-1e3, 1e3, 1001).unsqueeze(1)
    net, radius = with_norms(net, 1.0, 2.0), np.array([1e-3, 1e3])
    small, large = float32_error(net, followed(net, centre), radius)[:, 0].tolist()
    found = zip(points, Network(net)(points)[:, 0].tolist(), strict=True)
    assert small < max(abs(Fraction(f) - value(net, point)) for point, f in found) <= large


def test_the_float32_error_covers_an_activation_that_is_1_lipschitz_in_the_inf_norm_alone():
    """Both features become the larger one, and a rotation makes sqrt(2) times it of both: 2^8 after 16 layers."""
    act, root = Larger(), math.sqrt(0.5)
    act.norms = {math.inf}
    turns = [([[root, root], [-root, root]], [0.1, 0.1])] * 16
    net = with_norms(by_hand(([[1.0], [0.0]], [0.0, 0.0]), *turns, ([[1.0, 0.0]], [0.0]), act=act), *[1.0] * 18)
    points = torch.linspace(-1e3, 1e3, 101).unsqueeze(1)
    features, radius = followed(net, torch.zeros(1, 1).double()), np.array([1e3])
    bound = float32_error(net, features, radius).item()
    found = zip(points, Network(net)(points)[:, 0].tolist(), strict=True)
    assert 1e-4 < max(abs(Fraction(f) - value(net, point)) for point, f in found) <= bound
    act.norms = NORMS  # with which the features would move no further than the inputs
    assert bound > 2 * float32_error(net, features, radius).item()


def test_an_activation_beside_residual_layers_enlarges_errors_by_its_slopes():
    """Thirty slopes of up to 4 enlarge what each layer loses, and what moves, whatever follows them."""
    steep, one = PReLU(np.array([-4.0])), torch.ones(1, 1, 1)
    layers = [Affine(one, 0 * one), *[Affine(0.501 * one, -1.003 * one)] * 30]
    acts = [*[steep] * 30, ReLU(), ReLU(), ReLU()]
    layers += [Residual(one, 0 * one, one), Affine(one, 0.34 * one)]
    net, _ = Chain.without_bound(BakedNetwork(layers, acts), 2.0)
    assert (
        why_no_float32(net) == "PReLU declares no bound of 1 in the 2-norm, in which rounding errors are followed"
    )
    x = (-1.003 / 3.004 * (1 + 1e-9 * torch.arange(-50, 51).double())).unsqueeze(1)
    f, error = evaluate(net, x)
    off = []
    for point, found, limit in zip(x[:, 0].tolist(), f[:, 0].tolist(), error[:, 0].tolist(), strict=True):
        h = Fraction(point)
        for layer, act in zip(net.layers[:-2], acts, strict=False):
            h = Fraction(float(layer.weight)) * h + Fraction(float(layer.bias))
            h = h if h > 0 or act is not steep else -4 * h
        exactly = min(h, Fraction(0)) + Fraction(float(layers[-1].bias))  # x - relu(x)
        off.append(abs(Fraction(found) - exactly))
        assert off[-1] <= Fraction(limit)
    assert max(off) > 1e-13  # far more than thirty roundings
