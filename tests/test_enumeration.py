"""Exact constants: against rational arithmetic, samples, closed forms, and networks that are awkward."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from networks import (
    ACTS,
    NORMS,
    TRAINED,
    by_hand,
    degenerate,
    generator,
    gradient,
    network,
    pairs,
    power,
    region_gradients,
    root,
    scaled,
)

from lipexp.activations import Activation, ReLU, as_activation
from lipexp.measured.gradients import norms, scan
from lipexp.networks import Affine
from lipexp.proven.regions import TooLarge, TooManyRegions, constants, why_not_enumerable
from lipexp.proven.regions.enumeration import Enumeration
from lipexp.proven.regions.polygons import Plane

BOX = (np.array([-4.0, -3.0]), np.array([4.0, 5.0]))


def norm_at(net, point, q):
    return root(power(gradient(net, point), q), q)


def check_all_patterns(net):
    """The constants are those of all patterns in rational arithmetic."""
    for where, box in (("box", BOX), ("everywhere", None)):
        gradients = region_gradients(net, box)
        for q in NORMS:
            expected = root(max(power(one, q) for one in gradients), q)
            found = getattr(constants(net, BOX, q, 10**6), where).value
            assert expected <= found <= expected * (1 + 1e-12)


def corners(enumeration, region):
    """The homogeneous corners of a region."""
    cells = enumeration.cells
    return enumeration.plane.corners["value"][cells.corner[slice(*cells.start[region : region + 2])]]


def area(points):
    """Of the polygon with homogeneous corners, all finite."""
    x, y = (points[:, :2] / points[:, 2:]).T
    return 0.5 * float(x @ np.roll(y, -1) - y @ np.roll(x, -1))


# Small networks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["generic", "grained", "without biases", "degenerate"])
@pytest.mark.parametrize("name", ACTS)
def test_all_patterns_in_rational_arithmetic_give_the_same_constants(name, kind):
    """Of networks whose breakpoints meet in one point, too, or have features that are equal, parallel or dead."""
    how = {"grained": {"grain": 0.5}, "without biases": {"bias": 0.0}}.get(kind, {})
    net = network(2, 6, 6, 1, act=ACTS[name], seed=len(kind), **how)
    check_all_patterns(degenerate(net) if kind == "degenerate" else net)


@pytest.mark.parametrize("name", ["relu", "descending threes"])
def test_the_regions_have_all_gradients_that_rational_arithmetic_finds(name):
    net = network(2, 6, 6, 1, act=ACTS[name], seed=7)
    enumeration = Enumeration(net, BOX, 10**6)
    found = enumeration._gradients(np.arange(len(enumeration.cells))).value[:, :2, 0]
    expected = np.array([[float(v) for v in g] for g in region_gradients(net)])
    distance = np.abs(found[:, None] - expected).max(axis=2)
    assert max(distance.min(axis=0).max(), distance.min(axis=1).max()) < 1e-12


# Larger networks -------------------------------------------------------------------------------------------------

SHAPES = [(1, 12, 12, 1), (2, 12, 12, 12, 1), (2, 36, 36, 1), (2, 12, 12, 1)]


def shaped(name, shape):
    """Narrower where all features are sorted: 36 of them make millions of regions."""
    return network(*(min(width, 12) for width in shape) if name == "fullsort" else shape, act=ACTS[name], seed=3)


def check_constants(net, low, high, q, n=50_000):
    """At least what samples show, in the box and far beyond it, and taken at their own points."""
    x = torch.rand(1, n, net.n_inputs, generator=generator(), dtype=torch.float64)
    x = torch.lerp(torch.from_numpy(low), torch.from_numpy(high), x)
    found = constants(net, (low, high), q, 10**6)
    near, far = (float(norms(scan(net, points).gradient, q).max()) for points in (x, 100 * x))
    assert found.box.value >= near * (1 - 1e-12)
    assert found.everywhere.value >= max(far * (1 - 1e-12), found.box.value)
    for place in (found.box, found.everywhere):
        exactly = norm_at(net, place.point, q)
        assert exactly <= place.value <= exactly * (1 + 1e-9)
    assert (low <= found.box.point).all()
    assert (np.array(found.box.point) <= high).all()


@pytest.mark.parametrize(("name", "shape"), pairs([*ACTS, *ACTS], SHAPES))
def test_constants_are_at_least_what_samples_show_and_are_taken_at_their_points(name, shape):
    for q in NORMS:
        check_constants(shaped(name, shape), BOX[0][: shape[0]], BOX[1][: shape[0]], q)


@pytest.mark.parametrize("overrides", TRAINED, ids=" ".join)
def test_the_constants_hold_after_training(overrides, trained):
    """Of networks whose breakpoints have moved to where the data want them."""
    result = trained(*overrides)
    x = result.stack.data[0].train_x.astype(np.float64)
    check_constants(result.checkpoint.network.run(0), x.min(axis=0), x.max(axis=0), result.stack.constraint.q)


@pytest.mark.parametrize(("name", "shape"), pairs(ACTS, SHAPES[1:]))
def test_the_regions_tile_the_box_and_have_the_gradients_of_backpropagation(name, shape):
    net = shaped(name, shape)
    enumeration = Enumeration(net, BOX, 10**6)
    inside = np.flatnonzero(enumeration.inside)
    areas = np.array([area(corners(enumeration, region)) for region in inside])
    assert (areas > -1e-12).all()  # anticlockwise, all of them
    assert areas.sum() == pytest.approx(64, rel=1e-9)
    # At the centroids of all regions that are not too thin for float64 to tell their sides apart.
    wide = inside[areas > 1e-9]
    centroids = np.array([(c[:, :2] / c[:, 2:]).mean(axis=0) for c in (corners(enumeration, i) for i in wide)])
    expected = scan(net, torch.from_numpy(centroids).unsqueeze(0)).gradient[0].numpy()
    found = enumeration._gradients(wide).value[:, :2, 0]
    assert np.abs(found - expected).max() <= 1e-12 * np.abs(expected).max()


@pytest.mark.parametrize(("name", "grain"), pairs(ACTS, [0.0, 0.25]))
def test_the_maps_are_off_by_no_more_than_they_say(name, grain):
    net = network(2, 6, 6, 6, 6, 1, act=ACTS[name], grain=grain)
    enumeration = Enumeration(net, BOX, 10**6)
    maps = enumeration.maps
    for region in range(0, len(maps.value), 9):
        rows, exponent = enumeration._exact_map(len(net.layers) - 2, region)
        for c in range(3):
            values = [Fraction(value) for value in maps.value[region, c].tolist()]
            off = [a - int(b) * Fraction(2) ** exponent for a, b in zip(values, rows[:, c], strict=True)]
            assert max(map(abs, off)) <= Fraction(float(maps.error[region, c]))
            assert power(off, 2) <= Fraction(float(maps.error_2[region, c])) ** 2
            assert power(values, 2) <= Fraction(float(maps.size_2[region, c])) ** 2


@pytest.mark.parametrize("name", ["relu", "maxmin"])
def test_a_deep_network_of_spectral_norm_one_hardly_needs_integers(name, monkeypatch):
    """Its rows are long: errors that are followed by row sums alone leave one side in a hundred open."""
    counted, exactly = [], Enumeration._untied
    monkeypatch.setattr(Enumeration, "_untied", lambda self, *rest: counted.append(1) or exactly(self, *rest))
    net = network(2, *[24] * 8, 1, act=ACTS[name])
    orthogonal = [
        Affine(torch.nn.init.orthogonal_(weight[0], generator=generator())[None], b) for weight, b in net.layers
    ]
    regions = constants(replace(net, layers=orthogonal), BOX, 2.0, 10**6).regions
    assert regions > 500
    assert len(counted) <= regions / 1000


# Awkward networks ------------------------------------------------------------------------------------------------


def test_breakpoints_that_meet_at_ten_million_hide_a_steeper_region_beyond():
    """Three features that are zero until x = 1e7, where their breakpoints meet at the point (1e7, 0)."""
    net = by_hand(([[1.0, 0.0], [1.0, 1e-7], [1.0, -1e-7]], [-1e7] * 3), ([[1.0, 1.0, 1.0]], [0.0]))
    found = constants(net, BOX, 2.0, 1000)
    assert found.box.value == 0
    assert found.everywhere.value == pytest.approx(3, rel=1e-12)
    assert np.linalg.norm(found.everywhere.point) > 1e6
    assert norm_at(net, found.everywhere.point, 2) == pytest.approx(3, rel=1e-9)


def test_a_function_that_is_zero_has_constant_zero():
    """x - relu(x) + relu(-x), for which autograd says 1 at 0."""
    net = by_hand(([[1.0], [-1.0], [1.0], [-1.0]], [0.0] * 4), ([[1.0, -1.0, -1.0, 1.0]], [0.0]))
    assert constants(net, (np.array([-4.0]), np.array([4.0])), 2.0, 100).everywhere.value < 1e-13


def test_breakpoints_along_the_sides_and_through_the_corners_of_the_box():
    first = ([[1.0, 0.0], [0.0, 1.0], [5.0, 4.0], [1.0, 0.0]], [4.0, -5.0, 32.0, -4.0])
    check_all_patterns(by_hand(first, ([[1.0, 2.0, 4.0, 8.0]], [1.0])))


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e6, 1e9])
def test_the_constant_scales_with_the_weights(scale):
    net = network(2, 16, 16, 1)
    one, other = (constants(part, BOX, 2.0, 10**5) for part in (net, scaled(net, *[scale] * 3, bias=True)))
    assert other.everywhere.value == pytest.approx(one.everywhere.value * scale**3, rel=1e-5)
    assert other.regions == pytest.approx(one.regions, rel=0.01)  # float32 rounds the scaled weights


def test_a_linear_network_has_one_gradient():
    found = constants(by_hand(([[3.0, -4.0]], [1.0])), BOX, 1.0, 100)
    assert found.everywhere.value == found.box.value == pytest.approx(7, rel=1e-14)
    assert found.regions == 9
    assert found.in_box() == {"value": found.box.value, "point": found.box.point, "domain": [[-4, 4], [-3, 5]]}


def test_a_box_without_interior_has_no_constant_of_its_own():
    net = network(2, 6, 6, 1)
    found = constants(net, (np.array([1.0, 2.0]), np.array([3.0, 2.0])), 2.0, 10**4)
    assert found.box is found.in_box() is None
    assert found.everywhere.value == pytest.approx(constants(net, BOX, 2.0, 10**4).everywhere.value)


def test_numbers_that_underflow_are_not_lost_and_those_that_overflow_are_refused():
    """Slopes of 1e-38 in five layers: 1e-190 in all, along both axes."""
    tiny = 1e-38
    first, last = ([[tiny, tiny], [-tiny, tiny]], [0.0, 0.0]), ([[tiny, tiny]], [0.0])
    net = by_hand(first, *[([[tiny, 0.0], [0.0, tiny]], [0.0, 0.0])] * 3, last)
    square = max(power(one, 2) for one in region_gradients(net))
    found = Fraction(constants(net, BOX, 2.0, 1000).everywhere.value) ** 2
    assert 0 < square <= found <= square * (1 + Fraction(1, 10**12))
    with pytest.raises(TooLarge):
        constants(scaled(network(2, *[4] * 10, 1), *[1e37] * 11), BOX, 2.0, 10**6)


# Limits ----------------------------------------------------------------------------------------------------------


def cap_cases():
    """Networks, the second and third of which meet the same line more than once."""
    wide = network(2, 40, 1, act=ACTS["fullsort"])
    for part in wide.layers[0]:
        part[0, ..., 2:, :] = 0  # of 40 features sorted together 38 are zero, which the others meet along one line
    wide.layers[0].bias[..., 2:] = 0
    return [network(2, 12, 12, 1), wide, by_hand(([[1.0, 0.5], [3.0, 1.5]], [0.25, 0.75]), ([[1.0, 1.0]], [0.0]))]


@pytest.mark.parametrize("net", cap_cases(), ids=["generic", "tied to zero", "scaled copies"])
def test_the_cap_counts_regions_and_lines_that_coincide_once(net):
    n = constants(net, BOX, 2.0, 10**5).regions
    assert constants(net, BOX, 2.0, n).regions == n
    with pytest.raises(TooManyRegions):
        constants(net, BOX, 2.0, n - 1)


def test_many_regions_are_given_up_before_they_are_cut(monkeypatch):
    made, cut = [], Plane.cut
    monkeypatch.setattr(Plane, "cut", lambda *arguments: (parts := cut(*arguments), made.append(len(parts)))[0])
    with pytest.raises(TooManyRegions):
        constants(network(2, 64, 1, act=ACTS["fullsort"]), BOX, 2.0, 20_000)
    assert sum(made) < 20_000


class Unlisted(Activation):
    """Declares its active map, but not where it ends."""

    def forward(self, z):
        return z.flip(-1)

    def active_map(self, z):
        raise NotImplementedError


class Otherwise(ReLU):
    """Another map than ReLU's, whose declarations therefore say nothing of it."""

    def forward(self, z):
        return 3 * torch.relu(z - 1)


def test_what_cannot_be_enumerated_is_refused_with_a_reason():
    net = network(2, 6, 6, 1)
    assert why_not_enumerable(net) is None
    assert why_not_enumerable(network(3, 6, 1)) == "is for one or two inputs"
    assert why_not_enumerable(network(2, 6, 2)) == "is for one output"
    for act in (as_activation(torch.tanh), Otherwise()):
        reason = f"{act.label} does not declare its active linear map"
        assert why_not_enumerable(replace(net, act=act)) == reason
    assert why_not_enumerable(replace(net, act=Unlisted())) == "Unlisted does not declare its breakpoints"
