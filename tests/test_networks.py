"""Baked networks: K stacked ones equal K of torch's, and their linear regions are those of rational arithmetic."""

import io
import math
from dataclasses import replace
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import pytest
import torch
from acts import PIECEWISE, Unlisted
from networks import by_hand, degenerate, dot, generator, local_map, network, normal

from lipexp.activations import GroupSort, ReLU, as_activation
from lipexp.blocks import Affine, inputs_and_output
from lipexp.measured import overall, sources, steepest
from lipexp.measured.gradients import scan
from lipexp.networks import BakedNetwork, Network
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
        parts += [linear, network.act]
    return torch.nn.Sequential(*parts[:-1])


@pytest.mark.parametrize(("n_outputs", "runs", "act"), [(1, RUNS, ReLU()), (3, 1, TANH), (12, RUNS, GroupSort())])
def test_stacked_networks_and_their_gradients_equal_torchs_one_by_one(n_outputs, runs, act):
    baked, x = network(2, 8, 8, n_outputs, act=act, runs=runs).double, normal(runs, BATCH, 2)
    layers = [Affine(*(part.clone().requires_grad_() for part in layer)) for layer in baked.layers]
    points = x.clone().requires_grad_()
    out = inputs_and_output(layers, [act] * 3, points)[1]
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
        rest = replace(baked, layers=baked.layers[i:])
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
    maxmin = replace(baked, act=GroupSort())
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
        tied = replace(baked, act=act)
        assert (tied.linear_region(np.array([0.5, 0.5])) is not None) == is_inside
        assert tied.linear_region(np.array([0.5, 0.25])) is not None


def test_ties_are_borders_where_breakpoints_are_not_known():
    assert replace(degenerate(network(2, 6, 6, 1)), act=Unlisted()).linear_region(np.array([0.5, 0.25])) is None


def test_numbers_that_are_not_finite_have_no_region():
    with pytest.raises(ArithmeticError, match="not finite"):
        by_hand(([[math.inf, 1.0]], [0.0]), ([[1.0]], [0.0])).linear_region(np.ones(2))


class Residual(NamedTuple):
    """x -> x - W diag(t) act(W^T x + b), 1-Lipschitz for slopes in [0, 1] if 2 diag(1/t) >= W^T W."""

    weight: torch.Tensor  # (K, H, H)
    scale: torch.Tensor  # (K, 1, H)
    bias: torch.Tensor  # (K, 1, H)

    is_residual = True

    def __call__(self, x, act):
        return x - (self.scale * act(x @ self.weight + self.bias)) @ self.weight.mT


def test_a_residual_layer_is_measured_and_evaluated_as_it_is():
    """Nothing but its own class knows of it; what needs affine layers says so in words."""
    first, last = network(2, 4, 1, act=ReLU(), runs=2).layers
    weight = normal(2, 4, 4).float()
    scale = (2 / weight.mT.abs().matmul(weight.abs()).sum(dim=-1)).unsqueeze(1)
    layers = [first, Residual(weight, scale, normal(2, 1, 4).float()), last]
    both = BakedNetwork(layers, ReLU(), norms=[[10.0, 10.0], [1.0, 1.0], [10.0, 10.0]])
    x = normal(1, 50, 2).expand(2, -1, -1)
    hidden = first(x.float(), both.act)
    by_hand = hidden - (scale * torch.relu(hidden @ weight + layers[1].bias)) @ weight.mT
    assert torch.equal(both(x.float()), last(by_hand, both.act))  # with no activation beside the residual layer
    found, step = scan(both, x), 1e-6
    for axis, unit in enumerate(torch.eye(2, dtype=torch.float64)):
        slope = (scan(both, x + step * unit).f - scan(both, x - step * unit).f) / (2 * step)
        assert torch.quantile((slope - found.gradient[..., axis]).abs(), 0.95) < 1e-6
    points = sources(both, x, found, 2.0, [generator(), generator()])
    for run in range(2):
        one = both.run(run)
        assert torch.equal(one(x[:1].float()), both(x.float())[run : run + 1])
        measured = overall(steepest(one, points, run, 2.0))
        assert (measured.exact, measured.value > 0) == (False, True)
        box = x[run].amin(dim=0), x[run].amax(dim=0)
        chain = Chain(2.0, 2.0, 2.0, None, None, ("spectral norm",) * 3)
        certificate = prove(Problem(one, chain, box, measured, 1000))
        assert (certificate.value, certificate.method) == (100.0, "product")
        assert {proof.reason for proof in certificate.proofs.values()} == {None, "is for affine layers"}
        radii = assess(one, {"test": (x[run], torch.zeros(50))}, certificate)
        assert radii.reason == "rounding errors are followed through affine layers only"
