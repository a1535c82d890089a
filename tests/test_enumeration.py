"""Exact constants: against rational arithmetic, samples, closed forms, and networks that are awkward."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from acts import ACTS, PIECEWISE, Tripled, Unlisted
from networks import (
    EACH_LIPSCHITZ,
    NORMS,
    TRAINED,
    between,
    by_hand,
    degenerate,
    jacobian,
    network,
    norm_at,
    pairs,
    power,
    residual,
    root,
    scaled,
    uniform,
    with_act,
)
from polygons import region_gradients

from lipexp.activations import as_activation
from lipexp.measured.gradients import norms, operator_norms, scan
from lipexp.proven.regions import TooLarge, TooManyRegions, constants, why_not_enumerable
from lipexp.proven.regions import enumeration as module
from lipexp.proven.regions.enumeration import Enumeration
from lipexp.proven.regions.polygons import Plane

BOX = (np.array([-4.0, -3.0]), np.array([4.0, 5.0]))


def check_all_patterns(net):
    """The gradients and the constants are those of all patterns in rational arithmetic."""
    enumeration = Enumeration(net, BOX, 10**6)
    for where, box, chosen in (("box", BOX, enumeration.inside), ("everywhere", None, enumeration.inside >= 0)):
        gradients = region_gradients(net, box)
        found = enumeration._gradients(np.flatnonzero(chosen)).value[:, :2, 0]
        distance = np.abs(found[:, None] - np.array(list(gradients), dtype=np.float64)).max(axis=2)
        assert max(distance.min(axis=0).max(), distance.min(axis=1).max()) < 1e-12 * (1 + np.abs(found).max())
        for q in NORMS:
            expected = root(max(power(one, q) for one in gradients), q)
            assert expected <= getattr(enumeration.constants(q), where).value <= expected * (1 + 1e-12)


def corners(enumeration, region):
    """The corners of a region, all finite."""
    cells = enumeration.cells
    found = enumeration.plane.corners["value"][cells.corner[slice(*cells.start[region : region + 2])]]
    return found[:, :2] / found[:, 2:]


@pytest.mark.parametrize("kind", ["generic", "grained", "without biases", "degenerate"])
@pytest.mark.parametrize("name", PIECEWISE)
def test_all_patterns_in_rational_arithmetic_give_the_same_constants(name, kind):
    """Of networks whose breakpoints meet in one point, too, or have features that are equal, parallel or dead."""
    how = {"grained": {"grain": 0.5}, "without biases": {"bias": 0.0}}.get(kind, {})
    net = network(2, 6, 6, 1, act=PIECEWISE[name], seed=len(kind), **how)
    check_all_patterns(degenerate(net) if kind == "degenerate" else net)


@pytest.mark.parametrize("name", PIECEWISE)
def test_residual_layers_have_the_constants_of_all_their_regions(name):
    """Against samples, and against the gradient that rational arithmetic finds at their own points."""
    for shape in ((2, 6, 6, 1), (1, 5, 1)):  # 6 features inside a residual layer
        net = residual(*shape, act=PIECEWISE[name])
        assert why_not_enumerable(net) is None
        check_constants(net, BOX[0][: shape[0]], BOX[1][: shape[0]])


SHAPES = [(1, 12, 12, 1), (2, 12, 12, 12, 1), (2, 12, 12, 1)]


def check_constants(net, low, high, norm_orders=NORMS):
    """At least what samples show, in the box and far beyond it, and taken at their own points."""
    x = torch.lerp(torch.from_numpy(low), torch.from_numpy(high), uniform(1, 20_000, net.n_inputs).abs())
    near, far = scan(net, x).gradient, scan(net, 100 * x).gradient
    enumeration = Enumeration(net, (low, high), 10**6)
    for q in norm_orders:
        found = enumeration.constants(q)
        assert found.box.value >= float(norms(near, q).max()) * (1 - 1e-12)
        assert found.everywhere.value >= max(float(norms(far, q).max()) * (1 - 1e-12), found.box.value)
        for place in (found.box, found.everywhere):
            exactly = norm_at(net, place.point, q)
            assert exactly <= place.value <= exactly * (1 + 1e-9)
        assert (low <= found.box.point).all()
        assert (np.array(found.box.point) <= high).all()


@pytest.mark.parametrize(("name", "shape"), pairs(ACTS, SHAPES))
def test_constants_are_at_least_what_samples_show_and_are_taken_at_their_points(name, shape):
    check_constants(network(*shape, act=ACTS[name], seed=3), BOX[0][: shape[0]], BOX[1][: shape[0]])


def check_several(net, low, high, h):
    """The constants of a map, and of all differences of outputs, are at least what samples show, and are taken."""
    x = torch.lerp(torch.from_numpy(low), torch.from_numpy(high), uniform(1, 20_000, net.n_inputs).abs())
    near, far = (scan(net, scale * x).gradient[0] for scale in (1, 100))
    for q in (2,) if h == 2 else NORMS:
        found = constants(net, (low, high), q, 10**6, h=h)
        for place, gradients in ((found.box, near), (found.everywhere, far)):
            assert place.value >= float(operator_norms(gradients, q, h).max()) * (1 - 1e-12)
            exactly = np.array([[float(v) for v in row] for row in jacobian(net, place.point)])
            taken = np.linalg.norm(exactly, 2) if h == 2 else np.linalg.norm(exactly, q, axis=1).max()
            assert taken == pytest.approx(place.value, rel=1e-9)
        for i, j in itertools.combinations(range(net.n_outputs), 2):
            assert found.pairs[i, j] == found.pairs[j, i]
            difference = torch.cat([near, far])[:, i] - torch.cat([near, far])[:, j]
            seen = float(norms(difference, q).max())
            assert seen * (1 - 1e-12) <= found.pairs[i, j]
            alone = constants(between(net, i, j), (low, high), q, 10**6).everywhere.value
            assert found.pairs[i, j] == pytest.approx(alone, rel=1e-12)


@pytest.mark.parametrize("h", [2.0, np.inf])
@pytest.mark.parametrize(("name", "shape"), pairs(ACTS, [(2, 12, 6, 3), (1, 12, 12, 4), (2, 6, 2)]))
def test_constants_of_several_outputs_are_at_least_what_samples_show_and_are_taken(name, shape, h):
    net = network(*shape, act=ACTS[name], seed=3, grain=2.0**-10)
    check_several(net, BOX[0][: shape[0]], BOX[1][: shape[0]], h)


@pytest.mark.parametrize("overrides", TRAINED, ids=" ".join)
def test_the_constants_hold_after_training(overrides, trained):
    """Of networks whose breakpoints have moved to where the data want them."""
    result = trained(*overrides, runs=EACH_LIPSCHITZ)
    x = result.stack.data[2].train_x.astype(np.float64)
    check_constants(result.checkpoint.network.run(2), x.min(axis=0), x.max(axis=0), [result.stack.constraint.q])


@pytest.mark.parametrize(("name", "shape"), pairs(ACTS, SHAPES[1:]))
def test_the_regions_tile_the_box_and_have_the_gradients_of_backpropagation(name, shape):
    net = network(*shape, act=ACTS[name], seed=3)
    enumeration = Enumeration(net, BOX, 10**6)
    inside = np.flatnonzero(enumeration.inside)
    sides = (corners(enumeration, region).T for region in inside)
    areas = np.array([0.5 * float(x @ np.roll(y, -1) - y @ np.roll(x, -1)) for x, y in sides])
    assert (areas > -1e-12).all()  # anticlockwise, all of them
    assert areas.sum() == pytest.approx(64, rel=1e-9)
    # At the centroids of all regions that are not too thin for float64 to tell their sides apart.
    wide = inside[areas > 1e-9]
    centroids = np.array([corners(enumeration, region).mean(axis=0) for region in wide])
    expected = scan(net, torch.from_numpy(centroids).unsqueeze(0)).gradient[0, :, 0].numpy()
    found = enumeration._gradients(wide).value[:, :2, 0]
    assert np.abs(found - expected).max() <= 1e-12 * np.abs(expected).max()


@pytest.mark.parametrize(("name", "grain"), pairs(PIECEWISE, [0.0, 0.0, 0.25]))
def test_the_maps_are_off_by_no_more_than_they_say(name, grain):
    net = network(2, 6, 6, 6, 6, 1, act=PIECEWISE[name], grain=grain)
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


def test_a_deep_network_of_spectral_norm_one_hardly_needs_integers(monkeypatch):
    """Its rows are long: errors that are followed by row sums alone leave one side in a hundred open."""
    counted, exactly = [], Enumeration._untied
    monkeypatch.setattr(Enumeration, "_untied", lambda self, *rest: counted.append(1) or exactly(self, *rest))
    net = network(2, *[12] * 14, 1)
    for weight, _ in net.layers:
        left, _, right = torch.linalg.svd(weight, full_matrices=False)
        weight.copy_(left @ right)
    regions = constants(net, BOX, 2.0, 10**6).regions
    assert regions > 1000
    assert len(counted) <= regions / 1000


def test_breakpoints_that_meet_at_ten_million_hide_a_steeper_region_beyond():
    """Three features that are zero until x = 1e7, where their breakpoints meet at the point (1e7, 0)."""
    net = by_hand(([[1.0, 0.0], [1.0, 1e-7], [1.0, -1e-7]], [-1e7] * 3), ([[1.0, 1.0, 1.0]], [0.0]))
    found = constants(net, BOX, 2.0, 1000)
    assert found.box.value == 0
    assert found.everywhere.value == pytest.approx(3, rel=1e-12)
    assert np.linalg.norm(found.everywhere.point) > 1e6
    assert norm_at(net, found.everywhere.point, 2) == pytest.approx(3, rel=1e-9)


def test_regions_thinner_than_float64_resolves_are_not_lost():
    """The gradient is 5 between two lines 2^-70 apart, and 0 beside them."""
    first, last = ([[1.0, 2.0**-70], [1.0, 0.0]], [2.0**-70, 0.0]), ([[5.0, -5.0]], [0.0])
    check_all_patterns(by_hand(first, ([[1.0, 0.0], [0.0, 1.0]], [-1.0, -1.0]), last))


def test_breakpoints_along_the_sides_and_through_the_corners_of_the_box():
    first = ([[1.0, 0.0], [0.0, 1.0], [5.0, 4.0], [1.0, 0.0]], [4.0, -5.0, 32.0, -4.0])
    check_all_patterns(by_hand(first, ([[1.0, 2.0, 4.0, 8.0]], [1.0])))


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1e6, 1e9])
def test_the_constant_scales_with_the_weights(scale):
    net = network(2, 16, 16, 1)
    one, other = (constants(part, BOX, 2.0, 10**5) for part in (net, scaled(net, *[scale] * 3, bias=True)))
    assert other.everywhere.value == pytest.approx(one.everywhere.value * scale**3, rel=1e-5)
    assert other.regions == pytest.approx(one.regions, rel=0.01)  # float32 rounds the scaled weights


def test_a_linear_network_has_one_gradient_and_a_function_that_is_zero_the_constant_zero():
    found = constants(by_hand(([[3.0, -4.0]], [1.0])), BOX, 1.0, 100)
    assert found.everywhere.value == found.box.value == pytest.approx(7, rel=1e-14)
    assert found.regions == 9
    assert found.in_box() == {"value": found.box.value, "point": found.box.point, "domain": [[-4, 4], [-3, 5]]}
    # x - relu(x) + relu(-x), for which autograd says 1 at 0.
    zero = by_hand(([[1.0], [-1.0], [1.0], [-1.0]], [0.0] * 4), ([[1.0, -1.0, -1.0, 1.0]], [0.0]))
    assert constants(zero, (np.array([-4.0]), np.array([4.0])), 2.0, 100).everywhere.value < 1e-13


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
    expected = root(max(power(one, 2) for one in region_gradients(net)), 2)
    assert 0 < expected <= constants(net, BOX, 2.0, 1000).everywhere.value <= expected * (1 + 1e-12)
    with pytest.raises(TooLarge):
        constants(scaled(network(2, *[4] * 10, 1), *[1e37] * 11), BOX, 2.0, 10**6)


def tied():
    """Of 40 features that are sorted together 38 are zero: each of the others meets all of them along one line."""
    net = network(2, 40, 1, act=ACTS["fullsort"])
    net.layers[0].weight[:, 2:], net.layers[0].bias[..., 2:] = 0, 0
    return net


COPIES = by_hand(([[1.0, 0.5], [3.0, 1.5]], [0.25, 0.75]), ([[1.0, 1.0]], [0.0]))  # of one line


@pytest.mark.parametrize("net", [network(2, 12, 12, 1), tied(), COPIES], ids=["generic", "tied", "copies"])
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


@pytest.mark.parametrize(
    ("limit", "value", "reason"),
    [
        ("seconds", 1e-9, r"not done after 1e-09 s \(--max-seconds\)"),
        ("max_regions", 7, r"more than 7 linear regions \(max_regions\)"),
        ("memory", 9 * 3 * 8, r"more than 9 linear regions \(of 8 features, a gigabyte\)"),
    ],
)
def test_an_enumeration_that_would_take_too_long_is_given_up_with_a_reason(monkeypatch, limit, value, reason):
    if limit == "memory":
        monkeypatch.setattr(module, "MOST_NUMBERS", value)
    limits = {"max_regions": 10**5} | ({limit: value} if limit != "memory" else {})
    with pytest.raises(TooManyRegions, match=f"^{reason}$"):
        constants(network(2, 8, 64, 1), BOX, 2.0, **limits)


def test_what_cannot_be_enumerated_is_refused_with_a_reason():
    net = network(2, 6, 6, 1)
    assert why_not_enumerable(net) is None
    assert why_not_enumerable(network(3, 6, 1)) == "is for one or two inputs"
    for act in (as_activation(torch.tanh), Tripled()):
        assert why_not_enumerable(with_act(net, act)) == f"{act.label} does not declare its active linear map"
    assert why_not_enumerable(with_act(net, Unlisted())) == "Unlisted does not declare its breakpoints"
