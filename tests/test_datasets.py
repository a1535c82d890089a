"""Datasets: the blog's moons are scikit-learn's, |x| is exact, and the optimum of the cones is known."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from conftest import choice_of, leaf, part
from scipy.optimize import linear_sum_assignment, lsq_linear
from scipy.spatial.distance import cdist
from scipy.stats import kstest
from sklearn.datasets import (
    load_breast_cancer,
    load_diabetes,
    load_digits,
    load_wine,
    make_circles,
    make_moons,
)

from lipexp.config import ConfigError
from lipexp.datasets import (
    AbsoluteValue,
    Annulus,
    BreastCancer,
    Checkerboard,
    Circles,
    Cones,
    Diabetes,
    Digits,
    DigitsParity,
    Finite,
    Flower,
    LogOutliers,
    NShape,
    Spirals,
    SquareWave,
    TwoMoons,
    Wine,
    on_sphere,
)
from lipexp.members import build


def drawn(dataset):
    """The data of a run."""
    return dataset.draw(np.random.SeedSequence(0))


def test_the_test_set_does_not_depend_on_the_size_of_the_training_set(dataset_option):
    choice = choice_of("dataset", dataset_option)
    sizes = ((*choice, f"dataset.n_train={n}", "dataset.n_test=20") for n in (1, 60))
    one, many = (drawn(part(choice)) for choice in sizes)
    assert len(one.train_x) == 1
    for part_of_test in ("test_x", "test_y"):  # what is scaled by the training rows keeps the order of each column
        assert np.array_equal(
            *(getattr(data, part_of_test).argsort(axis=0, kind="stable") for data in (one, many))
        )


@pytest.mark.parametrize(("noise", "scale"), [(0.05, 2.0), (0.0, 2.0), (0.3, 0.5)])
def test_two_moons_are_those_of_scikit_learn_times_the_scale(noise, scale):
    stream = np.random.SeedSequence(7).spawn(3)[2]
    data = TwoMoons(noise, scale, n_train=100, n_val=30, n_test=41).draw(stream)
    for split, child in zip(("train", "test", "val"), stream.spawn(3), strict=True):
        x, y = data.part(split)
        state = int(np.random.default_rng(child).integers(2**32))
        expected_x, expected_y = make_moons(len(x), noise=noise or None, random_state=state)
        assert np.array_equal(x, (scale * expected_x).astype(np.float32))
        assert np.array_equal(y, expected_y)


def test_noiseless_moons_at_the_default_scale_are_one_apart_at_their_tips():
    # An odd number of points a moon has one in the middle of the arc, which faces the other moon's tip.
    data = drawn(TwoMoons(noise=0, n_train=2002))
    zero, one = data.train_x[data.train_y == 0], data.train_x[data.train_y == 1]
    distances = np.linalg.norm(zero[:, None].astype(np.float64) - one[None], axis=2)
    assert distances.min() == pytest.approx(1, abs=1e-6)
    nearest = zero[np.unravel_index(distances.argmin(), distances.shape)[0]]
    assert any(np.allclose(nearest, place, atol=1e-6) for place in ([2, 0], [0, 2]))


def test_the_absolute_value_is_exact_and_covers_its_interval():
    data = drawn(AbsoluteValue(n_train=4000))
    assert np.array_equal(data.train_y, np.abs(data.train_x[:, 0]))
    # 400 points are expected in each tenth of [-1, 1], with a standard deviation of 19: five of them.
    counts, _ = np.histogram(data.train_x, bins=10, range=(-1, 1))
    assert counts.sum() == 4000
    assert np.abs(counts - 400).max() < 95


def test_the_n_goes_through_its_corners_is_1_lipschitz_and_covers_its_interval():
    data = drawn(NShape(n_train=6000))
    x, y = data.train_x[:, 0], data.train_y
    assert np.allclose(y, np.interp(x, [-3, -0.5, 0.5, 3], [-2, 0.5, -0.5, 2]), atol=1e-6)
    order = x.argsort()
    assert (np.abs(np.diff(y[order])) <= np.diff(x[order]) + 1e-6).all()
    counts, _ = np.histogram(x, bins=6, range=(-3, 3))
    assert counts.sum() == 6000
    assert np.abs(counts - 1000).max() < 5 * np.sqrt(1000 * 5 / 6)


def test_the_square_wave_jumps_at_minus_one_zero_and_one():
    x, y = drawn(SquareWave(n_train=4000)).part("train")
    assert np.array_equal(y, 1 - np.searchsorted([-1, 0, 1], x[:, 0]) % 2)
    counts, _ = np.histogram(x, bins=4, range=(-2, 2))
    assert counts.sum() == 4000
    assert np.abs(counts - 1000).max() < 5 * np.sqrt(1000 * 3 / 4)
    assert SquareWave(n_train=1).value(np.array([-1.5, -1, 0, 1, 1.5])).tolist() == [1, 1, 0, 1, 0]


@pytest.mark.parametrize("lipschitz", [1, 4])
def test_no_lipschitz_function_fits_the_square_wave_better_than_ramps_through_its_jumps(lipschitz):
    """Values at 400 evenly spaced x by least squares: a first one, and steps of at most L times those of x."""
    x = -2 + (np.arange(400) + 0.5) / 100
    limits = np.r_[np.inf, np.full(399, lipschitz / 100)]
    best = lsq_linear(np.tril(np.ones((400, 400))), SquareWave().value(x), (-limits, limits))
    assert 2 * best.cost / 400 == pytest.approx(1 / (16 * lipschitz), rel=1e-2)


@pytest.mark.parametrize(("petals", "depth"), [(20, 0.1), (3, 0.5)])
def test_flowers_are_three_curves_with_even_training_angles_and_random_others(petals, depth):
    one, other = (Flower(petals, depth).draw(np.random.SeedSequence(seed)) for seed in (0, 1))
    assert np.array_equal(one.train_x, other.train_x)
    for split in ("train", "val", "test"):
        x, y = one.part(split)
        points = x @ [1, 1j]
        assert np.allclose(abs(points), (1 + y) * (1 - depth * np.cos(petals * np.angle(points))), atol=1e-5)
        assert split == "train" or not np.array_equal(x, other.part(split)[0])
        for target in (0, 0.5, 1):
            angles = np.sort(np.angle(points[y == target]) % (2 * np.pi))
            assert len(angles) == pytest.approx(len(x) / 3, abs=1)
            assert np.allclose(np.diff(angles), 2 * np.pi / 400, atol=1e-5) == (split == "train")
            assert kstest(angles / (2 * np.pi), "uniform").pvalue > 1e-3


def test_a_function_through_the_default_flowers_needs_the_slope_of_their_description():
    x, y = drawn(Flower(n_train=6000)).part("train")
    distances = cdist(x[y == 0.5], x[y == 1])
    assert distances.min() == pytest.approx(0.266, abs=5e-4)
    assert 0.5 / distances.min() == pytest.approx(1.88, abs=5e-3)
    slopes = [0.5 / cdist(x[y == 0], x[y == 0.5]).min(), 1 / cdist(x[y == 0], x[y == 1]).min()]
    assert max(slopes) < 1.7


@pytest.mark.parametrize(("n_cells", "cell", "gap"), [(4, 2.0, 1.0), (3, 0.5, 0.1), (2, 1.0, 0.0)])
def test_the_squares_of_a_board_have_their_colours_and_are_the_gap_apart(n_cells, cell, gap):
    x, y = drawn(Checkerboard(n_cells, cell, gap, n_train=4000)).part("train")
    places = x.astype(np.float64) / cell + n_cells / 2
    cells = np.floor(places).astype(int)
    assert np.array_equal(y, (cells[:, 0] + cells[:, 1]) % 2)
    inside = np.abs(places - cells - 0.5) * cell / ((cell - gap) / 2)  # from 0 in the middle of a square to 1
    assert 0.99 < inside.max() < 1 + 1e-5
    assert kstest(inside.ravel(), "uniform").pvalue > 1e-3
    times = np.bincount(cells @ [n_cells, 1])
    assert len(times) == n_cells**2
    assert np.abs(times - 4000 / n_cells**2).max() < 5 * np.sqrt(4000 / n_cells**2)
    for metric in ("cityblock", "euclidean", "chebyshev"):
        assert gap - 1e-6 <= cdist(x[y == 0], x[y == 1], metric).min() < gap + 0.1 * cell


@pytest.mark.parametrize("dims", [1, 2, 7, 2000])
def test_a_ball_and_a_shell_are_filled_uniformly_the_gap_apart(dims):
    data = drawn(Annulus(dims, radius=0.5, gap=0.75, width=2.0, n_train=3000))
    assert np.bincount(data.train_y.astype(int)).tolist() == [1500, 1500]
    radii = np.linalg.norm(data.train_x.astype(np.float64), axis=1)
    for label, low, high in ((1, 0, 0.5), (0, 1.25, 3.25)):
        found = radii[data.train_y == label]
        assert low - 1e-6 <= found.min() < found.max() <= high + 1e-6
        volumes = ((found / high) ** dims - (low / high) ** dims) / (1 - (low / high) ** dims)
        assert kstest(volumes, "uniform").pvalue > 1e-3
        means = data.train_x[data.train_y == label].mean(axis=0)
        assert np.abs(means).max() < 5.5 * high / np.sqrt(dims * 1500)


def test_outliers_are_that_many_training_targets_that_far_from_the_logarithm_and_no_others():
    data = drawn(LogOutliers(noise=0.0, outliers=0.07, offset=3.0, low=0.5, high=8.0, n_train=300))
    for split, outliers in (("train", 21), ("val", 0), ("test", 0)):
        x, y = data.part(split)
        assert 0.5 <= x.min() < x.max() <= 8
        off = y - np.log(x[:, 0])
        assert np.allclose(abs(off), 3 * (abs(off) > 1), atol=1e-6)
        assert (abs(off) > 1).sum() == outliers
    signs = np.sign(data.train_y - np.log(data.train_x[:, 0]))[abs(data.train_y - np.log(data.train_x[:, 0])) > 1]
    assert set(signs) == {-1, 1}


def test_the_noise_of_the_logarithm_has_its_standard_deviation():
    data = drawn(LogOutliers(noise=0.2, n_val=4000))
    noise = data.val_y - np.log(data.val_x[:, 0])
    assert abs(noise.mean()) < 5 * 0.2 / 4000**0.5
    assert noise.std() == pytest.approx(0.2, rel=5 / 8000**0.5)


@pytest.mark.parametrize(("noise", "factor", "scale"), [(0.05, 0.5, 2.0), (0.0, 0.2, 1.0)])
def test_circles_are_those_of_scikit_learn_times_the_scale(noise, factor, scale):
    stream = np.random.SeedSequence(7)
    data = Circles(noise, factor, scale, n_train=100).draw(stream)
    state = int(np.random.default_rng(stream.spawn(1)[0]).integers(2**32))
    x, y = make_circles(100, noise=noise or None, factor=factor, random_state=state)
    assert np.array_equal(data.train_x, (scale * x).astype(np.float32))
    assert np.array_equal(data.train_y, y)


@pytest.mark.parametrize(("n_classes", "turns", "scale"), [(2, 1.0, 2.0), (3, 1.0, 3.0), (5, 0.5, 1.0)])
def test_noiseless_spirals_are_arms_of_one_turn_rate_a_class_apart(n_classes, turns, scale):
    dataset = Spirals(n_classes, turns, 0.0, scale, n_train=3000)
    assert (dataset.task, dataset.n_outputs) == (
        ("classification", 1) if n_classes == 2 else ("multiclass", n_classes)
    )
    data = drawn(dataset)
    points = data.train_x @ [1, 1j]
    assert 0.19 * scale < abs(points).min() < 0.25 * scale < 0.99 * scale < abs(points).max() < 1.01 * scale
    arm = data.train_y / n_classes + turns * abs(points) / scale  # in turns
    assert np.allclose(points / abs(points), np.exp(2j * np.pi * arm), atol=1e-5)
    assert np.bincount(data.train_y.astype(int)).tolist() == [3000 // n_classes] * n_classes


# Data of scikit-learn --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Digits, DigitsParity])
def test_the_digits_are_those_of_scikit_learn_each_once(kind):
    images, digits = load_digits(return_X_y=True)
    data = drawn(kind())
    found = [{**dict(zip(map(tuple, x), y, strict=True))} for x, y in map(data.part, ("train", "val", "test"))]
    assert list(map(len, found)) == [1197, 200, 400]
    targets = digits % 2 if kind is DigitsParity else digits
    assert found[0] | found[1] | found[2] == dict(zip(map(tuple, images / 16), targets, strict=True))


@pytest.mark.parametrize(
    ("kind", "load"),
    [
        (Wine, load_wine),
        (BreastCancer, load_breast_cancer),
        (Diabetes, functools.partial(load_diabetes, scaled=False)),
    ],
)
def test_features_are_those_of_scikit_learn_standardised_by_the_training_rows_alone(kind, load):
    dataset, bunch = kind(), load()
    data = drawn(dataset)
    assert dataset.n_points == len(bunch.data) == len(data.x)
    assert list(dataset.features) == list(bunch.feature_names)
    columns = [(data.x[:, i], data.train_x[:, i], bunch.data[:, i]) for i in range(dataset.n_inputs)]
    if kind is Diabetes:
        columns.append((data.y, data.train_y, bunch.target))
    for every, train, raw in columns:
        assert float(train.mean()) == pytest.approx(0, abs=1e-5)
        assert float(train.std()) == pytest.approx(1, abs=1e-5)
        (slope, intercept), rest, *_ = np.polyfit(np.sort(every.astype(np.float64)), np.sort(raw), 1, full=True)
        assert slope > 0
        assert np.sqrt(rest / len(raw)) < 1e-5 * raw.std()
        assert abs(intercept - raw.mean()) > 1e-6 * raw.std()  # it is not the mean of all rows


@pytest.mark.parametrize(
    ("kind", "load"), [(Digits, load_digits), (Wine, load_wine), (BreastCancer, load_breast_cancer)]
)
def test_classes_have_the_names_and_in_every_part_the_shares_of_scikit_learn(kind, load):
    dataset, bunch = kind(), load()
    assert list(dataset.classes) == [str(name) for name in bunch.target_names]
    assert dataset.n_outputs == (1 if kind is BreastCancer else len(bunch.target_names))
    shares = np.bincount(bunch.target) / len(bunch.target)
    for seed in range(3):
        data = dataset.draw(np.random.SeedSequence(seed))
        for _, y in map(data.part, ("train", "val", "test")):
            assert np.abs(np.bincount(y.astype(int)) - len(y) * shares).max() <= 1.5


@pytest.mark.parametrize("n_classes", [1, 2, 7])
def test_a_row_is_as_likely_as_any_other_of_its_class_to_be_in_a_part(n_classes):
    """Over 2,000 seeds each of 28 rows is in a test set of 7 in 500 of them, within 4 standard deviations."""

    class Rows(Finite):
        task, n_inputs, n_points = "multiclass", 1, 28

        def load(self):
            return np.arange(28.0).reshape(-1, 1), np.arange(28) % n_classes

    times = np.zeros(28)
    for seed in range(2000):
        times[Rows(14, 7, 7).draw(np.random.SeedSequence(seed)).test_x[:, 0].astype(int)] += 1
    assert np.abs(times - 500).max() < 4 * np.sqrt(2000 * 0.25 * 0.75)


def test_no_more_rows_are_taken_than_there_are():
    DigitsParity(n_train=1000, n_test=597)
    with pytest.raises(
        ConfigError, match=r"^n_train=1000: n_train \+ n_val \+ n_test must be at most 1797.*n_test=598"
    ):
        DigitsParity(n_train=1000, n_test=598)


# Cones -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [1.0, 2.0, np.inf])
@pytest.mark.parametrize(("dims", "cones"), [(1, 1), (3, 3), (5, 2)])
def test_the_transport_distance_of_the_cones_is_one(p, dims, cones):
    """By linear programming: the cheapest assignment of sphere points to point masses."""
    data = drawn(Cones(n_inputs=dims, n_cones=cones, p=p, n_train=120, n_test=4))
    centres, spheres = data.train_x[data.train_y == 1], data.train_x[data.train_y == 0]
    assert (len(centres), len(np.unique(centres, axis=0))) == (60, cones)
    cost = np.linalg.norm(spheres[:, None] - centres[None], ord=p, axis=-1)
    assert cost[linear_sum_assignment(cost)].mean() == pytest.approx(1, rel=1e-6)
    around = spheres - centres  # a point and its opposite, so spheres and centres have the same middle
    np.testing.assert_allclose(around[::2], -around[1::2], atol=1e-6)


@pytest.mark.parametrize("p", [1.0, 2.0, np.inf])
def test_spheres_are_covered_evenly(p):
    x = on_sphere(40_000, 3, p, np.random.default_rng(0))
    np.testing.assert_allclose(np.linalg.norm(x, ord=p, axis=1), 1, rtol=1e-12)
    assert np.abs(x.mean(axis=0)).max() < 0.02
    assert np.bincount((x > 0) @ [1, 2, 4], minlength=8).min() > 0.9 * 5000  # points in each octant


def test_the_spheres_follow_the_norm_of_the_constraint_and_no_other_is_taken(compose):
    for p in (1, 2, np.inf):
        assert build(compose("dataset=cones", "constraint=linf", f"constraint.p={p}")).parts["dataset"].p == p
    with pytest.raises(ConfigError, match=r"^dataset\.p=inf: must be the norm that constraint=Spectral is for"):
        build(compose("dataset=cones", "dataset.p=inf"))


def test_another_seed_draws_other_points(dataset_option):
    choice, own = choice_of("dataset", dataset_option), "split_seed" in leaf("dataset", dataset_option)
    one, other = (
        part((*choice, f"dataset.split_seed={seed}") if own else choice).draw(
            np.random.SeedSequence(0 if own else seed)
        )
        for seed in (3, 4)
    )
    assert not np.array_equal(one.x, other.x)
