"""Baked networks: K stacked ones equal K of torch's, and their linear regions are those of rational arithmetic."""

import io
import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from acts import PIECEWISE, Unlisted
from networks import by_hand, degenerate, dot, generator, local_map, network, norm_at, normal, residual, with_act

from lipexp.activations import GroupSort, ReLU, as_activation
from lipexp.blocks import Affine, Residual, inputs_and_output
from lipexp.constraints import SLL
from lipexp.measured import overall, sources, steepest
from lipexp.measured.gradients import scan
from lipexp.modules import Network
from lipexp.networks import BakedNetwork
from lipexp.proven import Chain, Problem, prove
from lipexp.proven.radii import assess

RUNS, BATCH = 3, 5
TANH = as_activation(torch.nn.Tanh())


def sequential(network, run):
    """One of the stacked networks, made of torch's own parts."""
    parts = []
    for weight, bias in network.layers:
        linear = torch.nn.Linear(weight.shape[2], weight.shape[1], dtype=weight.dtype)
        linear.load_state_dict({"weight": weight[run], "bias": bias[run, 0]})
        parts += [linear, network.acts[0]]
    return torch.nn.Sequential(*parts[:-1])


@pytest.mark.parametrize(("n_outputs", "runs", "act"), [(1, RUNS, ReLU()), (3, 1, TANH), (12, RUNS, GroupSort())])
def test_stacked_networks_and_their_gradients_equal_torchs_one_by_one(n_outputs, runs, act):
    baked, x = network(2, 8, 8, n_outputs, act=act, runs=runs).double, normal(runs, BATCH, 2)
    layers = [Affine(*(part.clone().requires_grad_() for part in layer)) for layer in baked.layers]
    points = x.clone().requires_grad_()
    out = inputs_and_output(layers, [act] * len(layers), points)[1]
    assert out.shape == (runs, BATCH, n_outputs)
    found = torch.autograd.grad(out.square().sum(), [points, *(part for layer in layers for part in layer)])
    for run in range(runs):
        alone, own = sequential(baked, run), x[run].clone().requires_grad_()
        expected = alone(own)
        gradients = torch.autograd.grad(expected.square().sum(), [own, *alone.parameters()])
        # The same sums in another order, in float64.
        torch.testing.assert_close(baked(x)[run], expected, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(baked.run(run)(x[run : run + 1])[0], expected, rtol=1e-13, atol=1e-13)
        for together, separate in zip(found, gradients, strict=True):
            torch.testing.assert_close(together[run].reshape(separate.shape), separate, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n_outputs", [1, 3, 6])
def test_a_layer_can_be_differentiated_twice(n_outputs):
    """Curved activations and penalties on the gradient need it; a layer that loses it gives wrong numbers."""
    parts = [normal(*shape).requires_grad_() for shape in ((2, BATCH, 4), (2, n_outputs, 4), (2, 1, n_outputs))]
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda x, weight, bias: Affine(weight, bias)(x, TANH).tanh(), parts)


def test_a_network_knows_its_shape_its_norms_and_what_each_layer_receives():
    baked, x = network(2, 8, 6, 3, runs=RUNS).double, normal(RUNS, BATCH, 2)
    assert (baked.n_runs, baked.n_inputs, baked.n_outputs, baked.hidden_widths) == (RUNS, 2, 3, [8, 6])
    assert replace(baked, norms=[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]).run(1).norms == [[2.0], [5.0]]
    inputs, out = baked.inputs_and_output(x)
    assert inputs[0] is x
    for i, received in enumerate(inputs):
        rest = replace(baked, layers=baked.layers[i:], acts=baked.acts[i:])
        torch.testing.assert_close(rest(received), out, rtol=1e-13, atol=1e-13)
    baked.layers[2].bias[1, 0, 0] = math.nan
    assert [baked.is_finite(run) for run in range(RUNS)] == [True, False, True]


@pytest.mark.parametrize("act", [ReLU(), GroupSort(n_groups=1)], ids=["relu", "fullsort"])
def test_a_state_dict_is_plain_and_makes_the_same_network(act):
    baked, x = network(2, 8, 1, act=act, runs=RUNS), normal(RUNS, BATCH, 2).float()
    for run in range(RUNS):
        state, buffer = baked.state_dict(run), io.BytesIO()
        assert list(state) == ["layers.0.weight", "layers.0.bias", "layers.1.weight", "layers.1.bias"]
        assert [part.shape for part in state.values()] == [(8, 2), (8,), (1, 8), (1,)]
        assert {part.dtype for part in state.values()} == {torch.float32}
        torch.save(state, buffer)
        buffer.seek(0)
        plain = Network(BakedNetwork.from_state_dict(torch.load(buffer, weights_only=True), act))
        assert list(plain.state_dict()) == list(state)
        assert not any(part.requires_grad for part in plain.parameters())
        # The same sums in another order, in float32 and of size at most 10.
        torch.testing.assert_close(plain(x[run]), baked(x)[run], rtol=1e-5, atol=1e-5)
        for part in state.values():
            part.zero_()  # a copy of its own
    assert all(part.any() for layer in baked.layers for part in layer)


def test_an_activation_in_a_network_sees_runs_points_and_features():
    seen = []
    act = as_activation(lambda z: seen.append(z.shape) or z)
    Network(network(2, 4, 1, act=act))(normal(BATCH, 2).float())
    assert seen == [(1, BATCH, 4)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers.1.bias": None}, "layers.1.bias is missing"),
        ({"layers.0.weight": None}, "layers.0.weight is missing"),
        ({"layers.3.weight": torch.ones(1, 1)}, "unexpected entry layers.3.weight"),
        ({"layers.0.bias": [1.0]}, "layers.0.bias is list, not float32"),
        ({"layers.0.weight": torch.ones(4)}, r"layers.0.weight has shape \(4,\)"),
        ({"layers.0.bias": torch.ones(3)}, r"layers.0.bias has shape \(3,\), not \(4,\)"),
        ({"layers.1.t": torch.ones(4)}, r"layers.1.bias has shape \(1,\), not \(4,\)"),
        ({"multipliers": torch.ones(5)}, r"multipliers has shape \(5,\), not \(4,\)"),
        ({"linear": torch.ones(2, 1)}, r"linear has shape \(2, 1\), not \(1, 2\)"),
        ({"acts.0": torch.ones(4)}, "unexpected entry acts.0"),
        ({"layers.1.weight": torch.ones(1, 3)}, "layers.1 takes 3 features, layers.0 gives 4"),
    ],
)
def test_what_is_no_state_dict_of_a_network_is_named(changes, message):
    state = network(2, 4, 1).state_dict() | changes
    with pytest.raises(ValueError, match=f"^{message}$"):
        BakedNetwork.from_state_dict({key: part for key, part in state.items() if part is not None}, ReLU())


def found_map(network, point):
    """(gradient row, offset) of each output."""
    region = network.linear_region(np.asarray(point, dtype=np.float64))
    columns = np.column_stack([region.gradient, region.offset])
    return [[int(value) * Fraction(2) ** region.exponent for value in row] for row in columns]


@pytest.mark.parametrize("sizes", [(2, 6, 6, 1), (3, 6, 2), (1, 1)], ids=str)
@pytest.mark.parametrize("name", PIECEWISE)
def test_the_map_of_a_region_is_the_one_of_rational_arithmetic(name, sizes):
    baked, shared = network(*sizes, act=PIECEWISE[name]), 0
    for point in normal(6, sizes[0]):
        found, (forms, pieces) = found_map(baked, point), local_map(baked, point)
        assert found == forms
        for near in point + 0.05 * normal(8, sizes[0], seed=1):
            own, other = local_map(baked, near)
            x = [*map(Fraction, near.tolist()), 1]
            shared += other == pieces  # the point lies in the same region, and the map gives f there
            assert other != pieces or [dot(form, x) for form in found] == [dot(form, x) for form in own]
    assert shared > 10


def test_zeros_and_all_magnitudes_keep_their_digits():
    first = ([[1e-30, 0.0], [0.0, 1e30], [1e-45, -1e-45], [0.0, 0.0]], [0.0, -1e30, 1e-40, 1.0])
    baked = by_hand(first, ([[1e20, -1e-20, 0.0, 3.0]], [0.0]))
    for point in ([1e-300, 2.0], [1e200, 0.25]):
        assert found_map(baked, point) == local_map(baked, point)[0]
    assert baked.linear_region(np.array([0.0, -5.0])) is None


def test_a_point_on_a_border_is_in_no_region():
    baked = by_hand(([[1.0, 0.0], [0.0, 1.0]], [0.0, -0.5]), ([[1.0, 1.0]], [0.0]))
    maxmin = with_act(baked, GroupSort())
    for point in ([0.0, 3.0], [1.0, 0.5], [1.0, 3.0], [1.0, 1.5]):
        assert (baked.linear_region(np.array(point)) is None) == (point[0] == 0 or point[1] == 0.5)
        assert (maxmin.linear_region(np.array(point)) is None) == (point == [1.0, 1.5])


@pytest.mark.parametrize("name", PIECEWISE)
def test_features_that_are_equal_everywhere_or_zero_make_no_border(name):
    baked = degenerate(network(2, 6, 6, 1, act=PIECEWISE[name]))
    for point in normal(10, 2):
        assert found_map(baked, point) == local_map(baked, point)[0]


def test_features_that_cross_make_a_border_beside_those_that_are_equal():
    baked = degenerate(network(2, 6, 6, 1))
    baked.layers[0].weight[0, 5], baked.layers[0].bias[0, 0, 5] = torch.tensor([1.0, -1.0]), 0
    crossing = {ReLU(): False, GroupSort(n_groups=1): False, GroupSort(group_size=3): True}  # 0, or feature 2
    for act, is_inside in crossing.items():
        tied = with_act(baked, act)
        assert (tied.linear_region(np.array([0.5, 0.5])) is not None) == is_inside
        assert tied.linear_region(np.array([0.5, 0.25])) is not None


def test_ties_are_borders_where_breakpoints_are_not_known():
    assert with_act(degenerate(network(2, 6, 6, 1)), Unlisted()).linear_region(np.array([0.5, 0.25])) is None


def test_numbers_that_are_not_finite_have_no_region():
    with pytest.raises(ArithmeticError, match="not finite"):
        by_hand(([[math.inf, 1.0]], [0.0]), ([[1.0]], [0.0])).linear_region(np.ones(2))


# Residual layers -------------------------------------------------------------------------------------------------


def test_a_residual_layer_is_the_map_that_it_says_with_no_activation_beside_it():
    """Evaluated, stacked, saved, as a module of torch, and differentiated."""
    one, other = (residual(2, 8, 4, 3, act=ReLU(), inside=5, seed=seed) for seed in (0, 9))
    layers = [
        type(a)(*map(torch.cat, zip(a, b, strict=True))) for a, b in zip(one.layers, other.layers, strict=True)
    ]
    both, x = BakedNetwork(layers, [ReLU()] * len(layers)), normal(2, BATCH, 2).float()
    assert (both.hidden_widths, both.is_plain) == ([8, 8, 8, 4], False)
    h = x @ layers[0].weight.mT + layers[0].bias
    for layer in layers[1:3]:
        h = h - (layer.t * torch.relu(h @ layer.weight + layer.bias)) @ layer.weight.mT
    out = torch.relu(h @ layers[3].weight.mT + layers[3].bias) @ layers[4].weight.mT + layers[4].bias
    torch.testing.assert_close(both(x), out, rtol=1e-5, atol=1e-5)
    for run, alone in enumerate((one, other)):
        state = both.state_dict(run)
        assert "layers.1.t" in state
        assert state.keys() == Network(alone).state_dict().keys()
        again = BakedNetwork.from_state_dict(state, ReLU())
        assert torch.equal(again(x[run : run + 1]), alone(x[run : run + 1]))
        torch.testing.assert_close(Network(again)(x[run]), out[run], rtol=1e-5, atol=1e-5)
    parts = [part.double().requires_grad_() for part in layers[1]]
    points = normal(2, BATCH, 8).requires_grad_()
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda x, *parts: Residual(*parts)(x, TANH), [points, *parts])


@pytest.mark.parametrize("sizes", [(2, 6, 1), (3, 6, 6, 2)], ids=str)
@pytest.mark.parametrize("name", PIECEWISE)
def test_the_map_of_a_region_of_residual_layers_is_the_one_of_rational_arithmetic(name, sizes):
    """Also where features are zero, or equal, in a whole neighbourhood."""
    baked = residual(*sizes, act=PIECEWISE[name])
    tied = [
        Affine(*layer) if not layer.is_residual else Residual(*map(torch.clone, layer)) for layer in baked.layers
    ]
    tied[1].weight[..., 1:3], tied[1].bias[..., 1:3] = 0, 0
    for net in (baked, replace(baked, layers=tied)):
        for point in normal(6, sizes[0]):
            assert found_map(net, point) == local_map(net, point)[0]


def test_a_network_with_residual_layers_is_measured_exactly_and_proven_by_its_norms():
    """What needs affine layers says so in words."""
    net, x = residual(3, 8, 1, act=ReLU()), normal(1, 50, 3)
    found, step = scan(net, x), 1e-6
    for axis, unit in enumerate(torch.eye(3, dtype=torch.float64)):
        slope = (scan(net, x + step * unit).f - scan(net, x - step * unit).f) / (2 * step)
        assert torch.quantile((slope - found.gradient[..., axis]).abs(), 0.9) < 1e-6
    measured = overall(steepest(net, sources(net, x, found, 2.0, [generator()]), 0, 2.0))
    assert measured.by == "exact arithmetic"
    assert 0 < measured.value <= norm_at(net, measured.point, 2.0) <= measured.value * (1 + 1e-12)
    constraint, box = SLL(), (x[0].amin(dim=0), x[0].amax(dim=0))
    certificate = prove(Problem(net, Chain.of(constraint, net.layers), box, measured, 1000))
    ends = [np.linalg.norm(net.layers[i].weight[0].numpy(), 2) for i in (0, -1)]
    assert certificate.proofs["product"].value == pytest.approx(np.prod(ends), rel=1e-6)
    assert measured.value <= certificate.value < certificate.proofs["product"].value
    assert certificate.method == "lipsdp"
    reasons = {name: proof.reason for name, proof in certificate.proofs.items() if proof.value is None}
    assert reasons == {"rows": "is for affine layers", "exact": "is for one or two inputs"}
    radii = assess(net, {split: (x[0], torch.zeros(50)) for split in ("val", "test")}, certificate)
    assert radii.reason is None
    assert (radii.columns["radius_float32"] > 0).mean() > 0.9
