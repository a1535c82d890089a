"""Exact constants: against rational arithmetic, samples, closed forms, and networks that are awkward."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from cones import gradients_by_hand, largest

from lipexp.activations import Abs, GroupSort, LeakyReLU, PiecewiseLinear, ReLU
from lipexp.measured.exact import ExactNetwork
from lipexp.proven.regions.maps import TooLarge
from lipexp.measured.gradients import norms, scan
from lipexp.models import Layer
from lipexp.proven.regions.polygons import Plane
from lipexp.proven.regions.enumeration import Enumeration, TooManyRegions, constants, cut_together, refusal
from lipexp.proven.regions.sheet import Sheet

BOX = (np.array([-4.0, -3.0]), np.array([4.0, 5.0]))
ACTS = {
    "relu": ReLU(),
    "leaky_relu": LeakyReLU(0.1),
    "abs": Abs(),
    "maxmin": GroupSort(),
    "neighbours": GroupSort(neighbours=True),
    "groups of 3": GroupSort(group_size=3),
    "fullsort": GroupSort(n_groups=1),
}


def network(*sizes: int, seed: int = 0, bias: float = 0.5, grain: float = 0.0) -> list[Layer]:
    """Normal weights; with a grain they are multiples of it, which makes kinks meet in one point."""
    draws = torch.Generator().manual_seed(seed)
    layers = []
    for n_in, n_out in itertools.pairwise(sizes):
        weight = torch.randn(1, n_out, n_in, generator=draws) / math.sqrt(n_in)
        offset = bias * torch.randn(1, 1, n_out, generator=draws)
        if grain:
            weight, offset = (grain * (2 * part / grain).round() for part in (weight, offset))
        layers.append(Layer(weight, offset))
    return layers


def by_hand(*layers: tuple[list[list[float]], list[float]]) -> list[Layer]:
    return [Layer(torch.tensor([weight]), torch.tensor([[bias]])) for weight, bias in layers]


def box_of(dims: int) -> tuple[np.ndarray, np.ndarray]:
    return BOX[0][:dims], BOX[1][:dims]


def norm_at(layers: list[Layer], act: PiecewiseLinear, point: tuple[float, ...], q: float) -> float:
    found = ExactNetwork(layers, act, 0).gradient(np.array(point))
    assert found is not None
    return float(np.linalg.norm([float(Fraction(int(v)) * Fraction(2) ** found[1]) for v in found[0]], q))


def enumerated(layers: list[Layer], act: PiecewiseLinear) -> Enumeration:
    enumeration = Enumeration(layers, act, BOX, Sheet())
    cut_together([enumeration], 10**6)
    return enumeration


def corners(enumeration: Enumeration, region: int) -> np.ndarray:
    """The homogeneous corners of a region."""
    cells = enumeration.cells
    return enumeration.plane.corners["value"][cells.corner[slice(*cells.start[region : region + 2])]]


def area(points: np.ndarray) -> float:
    """Of the polygon with homogeneous corners, all finite."""
    x, y = (points[:, :2] / points[:, 2:]).T
    return 0.5 * float(x @ np.roll(y, -1) - y @ np.roll(x, -1))


# Small networks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grain", [0.0, 0.5], ids=["generic", "degenerate"])
@pytest.mark.parametrize("name", ACTS)
@pytest.mark.parametrize("seed", range(3))
def test_all_patterns_in_rational_arithmetic_give_the_same_constants(name, seed, grain):
    act, layers = ACTS[name], network(2, 6, 6, 1, seed=seed, grain=grain)
    for where, box in (("box", BOX), ("everywhere", None)):
        gradients = gradients_by_hand(layers, act, box)
        for q in (1.0, 2.0, math.inf):
            found = getattr(constants(layers, act, BOX, q, 10**6), where).value
            expected = largest(gradients, q)
            assert expected <= found <= expected * (1 + 1e-12)


@pytest.mark.parametrize("name", ["relu", "groups of 3"])
def test_the_regions_have_all_gradients_that_rational_arithmetic_finds(name):
    act, layers = ACTS[name], network(2, 6, 6, 1, seed=7)
    enumeration = enumerated(layers, act)
    found = enumeration._gradients(np.arange(len(enumeration.cells))).value[:, :2, 0]
    expected = np.array([[float(v) for v in g] for g in gradients_by_hand(layers, act, None)])
    distance = np.abs(found[:, None] - expected).max(axis=2)
    assert distance.min(axis=0).max() < 1e-12
    assert distance.min(axis=1).max() < 1e-12


# Larger networks -------------------------------------------------------------------------------------------------


def feasible(shape: tuple[int, ...], name: str) -> tuple[int, ...]:
    """The shape, or a narrower one, where all features are sorted: 48 of them make millions of regions."""
    return tuple(min(width, 12) for width in shape) if name == "fullsort" else shape


SHAPES = [(1, 12, 12, 1), (2, 12, 12, 1), (2, 12, 12, 12, 1), (2, 48, 48, 1)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ACTS)
def test_constants_are_at_least_what_samples_show_and_are_taken_at_their_points(name, shape):
    act = ACTS[name]
    shape = feasible(shape, name)
    layers, (low, high) = network(*shape), box_of(shape[0])
    draws = torch.Generator().manual_seed(1)
    x = torch.rand(1, 200_000, shape[0], generator=draws, dtype=torch.float64)
    x = torch.from_numpy(low) + x * torch.from_numpy(high - low)
    gradients = scan(layers, act, x).gradient
    far = scan(layers, act, 100 * x).gradient
    for q in (1.0, 2.0, math.inf):
        found = constants(layers, act, (low, high), q, 10**6)
        assert found.box.value >= float(norms(gradients, q).max()) * (1 - 1e-12)
        assert found.everywhere.value >= max(float(norms(far, q).max()) * (1 - 1e-12), found.box.value)
        for place in (found.box, found.everywhere):
            assert norm_at(layers, act, place.point, q) <= place.value
            assert norm_at(layers, act, place.point, q) == pytest.approx(place.value, rel=1e-9)
        assert (low <= found.box.point).all()
        assert (np.array(found.box.point) <= high).all()


@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
@pytest.mark.parametrize("name", ACTS)
def test_the_regions_tile_the_box_and_have_the_gradients_of_backpropagation(name, shape):
    act = ACTS[name]
    shape = feasible(shape, name)
    layers = network(*shape, seed=3)
    enumeration = enumerated(layers, act)
    inside = np.flatnonzero(enumeration.inside)
    areas = np.array([area(corners(enumeration, region)) for region in inside])
    assert (areas > -1e-12).all()  # anticlockwise, all of them
    assert areas.sum() == pytest.approx(64, rel=1e-9)
    # At the centroids of all regions that are not too thin for float64 to tell their sides apart.
    wide = inside[areas > 1e-9]
    centroids = np.array([(c[:, :2] / c[:, 2:]).mean(axis=0) for c in (corners(enumeration, i) for i in wide)])
    expected = scan(layers, act, torch.from_numpy(centroids).unsqueeze(0)).gradient[0].numpy()
    found = enumeration._gradients(wide).value[:, :2, 0]
    assert np.abs(found - expected).max() <= 1e-12 * np.abs(expected).max()


def test_the_constants_hold_after_training(trained, act_option):
    """Of networks whose kinks have moved to where the data want them."""
    result = trained(f"act={act_option}", "constraint=none", "loss=bce")
    act, layers = result.checkpoint.act, [Layer(w[:1], b[:1]) for w, b in result.checkpoint.layers]
    x = torch.from_numpy(result.stack.data[0].train_x).double()
    low, high = x.amin(dim=0), x.amax(dim=0)
    found = constants(layers, act, (low.numpy(), high.numpy()), 2.0, 10**6)
    draws = torch.Generator().manual_seed(1)
    points = torch.lerp(low, high, torch.rand(1, 50_000, 2, generator=draws, dtype=torch.float64))
    steepest = float(norms(scan(layers, act, points).gradient, 2).max())
    assert steepest * (1 - 1e-12) <= found.box.value <= found.everywhere.value
    assert norm_at(layers, act, found.box.point, 2) == pytest.approx(found.box.value, rel=1e-9)


@pytest.mark.parametrize("grain", [0.0, 0.25])
@pytest.mark.parametrize("name", ACTS)
def test_the_maps_are_off_by_no_more_than_they_say(name, grain):
    layers = network(2, 6, 6, 6, 6, 1, grain=grain)
    enumeration = enumerated(layers, ACTS[name])
    maps, last = enumeration.maps, len(layers) - 2
    for region in range(0, len(maps.value), 7):
        rows, exponent = enumeration._exact_map(last, region)
        for c in range(3):
            off = [
                abs(Fraction(found) - int(value) * Fraction(2) ** exponent)
                for found, value in zip(maps.value[region, c].tolist(), rows[:, c], strict=True)
            ]
            assert max(off) <= Fraction(float(maps.error[region, c]))
            assert sum(value * value for value in off) <= Fraction(float(maps.error_2[region, c])) ** 2
            size = [Fraction(value) ** 2 for value in maps.value[region, c].tolist()]
            assert sum(size) <= Fraction(float(maps.size_2[region, c])) ** 2


@pytest.mark.parametrize("name", ["relu", "maxmin"])
def test_a_deep_network_of_spectral_norm_one_hardly_needs_integers(name, monkeypatch):
    """Its rows are long: errors that are followed by row sums alone leave one side in a hundred open."""
    counted = []
    exactly = Enumeration._ranks
    monkeypatch.setattr(Enumeration, "_ranks", lambda self, *rest: counted.append(1) or exactly(self, *rest))
    draws = torch.Generator().manual_seed(0)
    layers = [
        Layer(torch.nn.init.orthogonal_(torch.empty(n_out, n_in), generator=draws)[None], bias)
        for (n_out, n_in), bias in zip(
            [(32, 2), *[(32, 32)] * 9, (1, 32)],
            [0.5 * torch.randn(1, 1, n, generator=draws) for n in [*[32] * 10, 1]],
            strict=True,
        )
    ]
    regions = constants(layers, ACTS[name], BOX, 2.0, 10**6).regions
    assert regions > 1000
    assert len(counted) <= regions / 1000


# Awkward networks ------------------------------------------------------------------------------------------------


def test_kinks_that_meet_at_ten_million_hide_a_steeper_region_beyond():
    """Three features that are zero until x = 1e7, where their kinks meet at the point (1e7, 0)."""
    far = 1e7
    layers = by_hand(
        ([[1.0, 0.0], [1.0, 1e-7], [1.0, -1e-7]], [-far, -far, -far]),
        ([[1.0, 1.0, 1.0]], [0.0]),
    )
    found = constants(layers, ReLU(), BOX, 2.0, 1000)
    assert found.box.value == 0
    assert found.everywhere.value == pytest.approx(3, rel=1e-12)
    assert np.linalg.norm(found.everywhere.point) > 1e6
    assert norm_at(layers, ReLU(), found.everywhere.point, 2) == pytest.approx(3, rel=1e-9)


def test_a_function_that_is_zero_has_constant_zero():
    """x - relu(x) + relu(-x), for which autograd says 1 at 0."""
    layers = by_hand(([[1.0], [-1.0], [1.0], [-1.0]], [0.0] * 4), ([[1.0, -1.0, -1.0, 1.0]], [0.0]))
    found = constants(layers, ReLU(), box_of(1), 2.0, 100)
    assert found.everywhere.value < 1e-13


@pytest.mark.parametrize("name", ACTS)
def test_without_biases_all_kinks_of_a_layer_go_through_one_point(name):
    act, layers = ACTS[name], network(2, 6, 6, 1, bias=0.0)
    for where, box in (("box", BOX), ("everywhere", None)):
        expected = largest(gradients_by_hand(layers, act, box), 2)
        assert getattr(constants(layers, act, BOX, 2.0, 10**6), where).value == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ACTS)
def test_equal_parallel_and_dead_features(name):
    act, layers = ACTS[name], network(2, 6, 6, 1)
    weight, bias = layers[0]
    weight[0, 1], bias[0, 0, 1] = weight[0, 0], bias[0, 0, 0]  # equal to another
    weight[0, 4], bias[0, 0, 4] = weight[0, 0], bias[0, 0, 0]
    weight[0, 2] = 2 * weight[0, 3]  # parallel
    weight[0, 5], bias[0, 0, 5] = 0, 0  # zero everywhere
    layers[1].weight[0, 3] = 0  # constant
    for where, box in (("box", BOX), ("everywhere", None)):
        expected = largest(gradients_by_hand(layers, act, box), 2)
        assert getattr(constants(layers, act, BOX, 2.0, 10**6), where).value == pytest.approx(expected, rel=1e-12)


def test_kinks_along_the_sides_and_through_the_corners_of_the_box():
    layers = by_hand(
        ([[1.0, 0.0], [0.0, 1.0], [5.0, 4.0], [1.0, 0.0]], [4.0, -5.0, 32.0, -4.0]),
        ([[1.0, 2.0, 4.0, 8.0]], [1.0]),
    )
    found = constants(layers, ReLU(), BOX, 2.0, 100)
    for where, box in ((found.everywhere, None), (found.box, BOX)):
        assert where.value == pytest.approx(largest(gradients_by_hand(layers, ReLU(), box), 2), rel=1e-12)


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e6, 1e9])
def test_the_constant_scales_with_the_weights(scale):
    layers = network(2, 16, 16, 1)
    scaled = [Layer(weight * scale, bias * scale ** (i + 1)) for i, (weight, bias) in enumerate(layers)]
    one, other = (constants(part, ReLU(), BOX, 2.0, 10**5) for part in (layers, scaled))
    assert other.everywhere.value == pytest.approx(one.everywhere.value * scale**3, rel=1e-5)
    assert other.regions == pytest.approx(one.regions, rel=0.01)  # float32 rounds the scaled weights


def test_a_linear_network_has_one_gradient():
    layers = by_hand(([[3.0, -4.0]], [1.0]))
    found = constants(layers, ReLU(), BOX, 1.0, 100)
    assert found.everywhere.value == found.box.value == pytest.approx(7, rel=1e-14)
    assert found.regions == 9


def test_a_box_without_interior_has_no_constant_of_its_own():
    layers = network(2, 6, 6, 1)
    flat = (np.array([1.0, 2.0]), np.array([3.0, 2.0]))
    found = constants(layers, ReLU(), flat, 2.0, 10**4)
    assert found.box is None
    assert found.in_box() is None
    assert found.everywhere.value == pytest.approx(constants(layers, ReLU(), BOX, 2.0, 10**4).everywhere.value)


def test_gradients_whose_squares_underflow_are_not_lost():
    """Slopes of 1e-38 in five layers: 1e-190 in all, along both axes."""
    tiny = 1e-38
    first = ([[tiny, tiny], [-tiny, tiny]], [0.0, 0.0])
    layers = by_hand(first, *[([[tiny, 0.0], [0.0, tiny]], [0.0, 0.0])] * 3, ([[tiny, tiny]], [0.0]))
    found = constants(layers, ReLU(), BOX, 2.0, 1000)
    gradients = gradients_by_hand(layers, ReLU(), None)
    square = max(x * x + y * y for x, y in gradients)
    assert square > 0
    assert square <= Fraction(found.everywhere.value) ** 2 <= square * (1 + Fraction(1, 10**12))


def test_numbers_that_overflow_are_refused():
    layers = [Layer(weight * 1e37, bias) for weight, bias in network(2, *[4] * 10, 1)]
    with pytest.raises(TooLarge):
        constants(layers, ReLU(), BOX, 2.0, 10**6)


# Limits ----------------------------------------------------------------------------------------------------------


def test_the_cap_counts_regions():
    layers = network(2, 12, 12, 1)
    n = constants(layers, ReLU(), BOX, 2.0, 10**5).regions
    assert constants(layers, ReLU(), BOX, 2.0, n).regions == n
    with pytest.raises(TooManyRegions):
        constants(layers, ReLU(), BOX, 2.0, n - 1)


def test_the_cap_does_not_count_lines_that_coincide():
    """Of 40 features sorted together 38 are zero: each of the other two meets all of them along one line."""
    layers = network(2, 40, 1)
    layers[0].weight[0, 2:], layers[0].bias[0, 0, 2:] = 0, 0
    n = constants(layers, ACTS["fullsort"], BOX, 2.0, 10**5).regions
    assert n < 38
    assert constants(layers, ACTS["fullsort"], BOX, 2.0, n).regions == n
    with pytest.raises(TooManyRegions):
        constants(layers, ACTS["fullsort"], BOX, 2.0, n - 1)


def test_many_regions_are_given_up_before_they_are_cut(monkeypatch):
    made = []
    cut = Plane.cut
    monkeypatch.setattr(Plane, "cut", lambda *arguments: (parts := cut(*arguments), made.append(len(parts)))[0])
    with pytest.raises(TooManyRegions):
        constants(network(2, 64, 1), ACTS["fullsort"], BOX, 2.0, 20_000)
    assert sum(made) < 20_000


class Twisted(PiecewiseLinear):
    """Names its pieces, but not where they end."""

    norms = frozenset({2.0})

    def forward(self, x):
        return x.flip(-1)

    def piece(self, z):
        raise NotImplementedError


class OwnForward(ReLU):
    def forward(self, x):
        return x


class Otherwise(ReLU):
    """Another map with pieces of its own: its kinks are not those of ReLU."""

    def forward(self, x):
        return 3 * torch.relu(x - 1)

    def piece(self, z):
        return None


def test_what_cannot_be_enumerated_is_refused_with_a_reason():
    layers = network(2, 6, 6, 1)
    assert refusal(layers, ReLU()) is None
    assert refusal(layers, Otherwise()) == "Otherwise does not name its kinks"
    assert refusal(network(3, 6, 1), ReLU()) == "is for one or two inputs"
    assert refusal(network(2, 6, 2), ReLU()) == "is for one output"
    assert refusal(layers, torch.nn.Tanh()) == "Tanh does not name its linear pieces"
    assert refusal(layers, OwnForward()) == "OwnForward does not name its linear pieces"
    assert refusal(layers, Twisted()) == "Twisted does not name its kinks"


def test_scaled_copies_of_a_line_count_once():
    """A limit that the regions just reach is no reason to give up, however often a kink is met."""
    layers = [
        Layer(torch.tensor([[[1, 0.5], [3, 1.5]]]), torch.tensor([[[0.25, 0.75]]])),
        Layer(torch.tensor([[[1.0, 1.0]]]), torch.zeros(1, 1, 1)),
    ]
    box = (np.array([-1.0, -1.0]), np.array([1.0, 1.0]))
    regions = constants(layers, ReLU(), box, 2.0, 1000).regions
    assert constants(layers, ReLU(), box, 2.0, regions).regions == regions
    with pytest.raises(TooManyRegions):
        constants(layers, ReLU(), box, 2.0, regions - 1)
