"""Datasets: the blog's moons are scikit-learn's, |x| is exact, and the optimum of the cones is known."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.datasets import load_digits, make_moons

from lipexp.config import ConfigError
from lipexp.datasets import AbsoluteValue, Cones, DigitsParity, TwoMoons, on_sphere
from lipexp.members import build


def drawn(dataset, seed=0):
    """The data of a run."""
    return dataset.draw(np.random.SeedSequence(seed))


def test_the_test_set_does_not_depend_on_the_size_of_the_training_set(dataset_option, make):
    sizes = ([f"dataset={dataset_option}", f"dataset.n_train={n}", "dataset.n_test=20"] for n in (1, 60))
    one, many = (drawn(make("dataset", *overrides)) for overrides in sizes)
    assert len(one.train_x) == 1
    assert np.array_equal(one.test_x, many.test_x)


@pytest.mark.parametrize(("noise", "scale"), [(0.05, 2.0), (0.0, 2.0), (0.3, 0.5)])
def test_two_moons_are_those_of_scikit_learn_times_the_scale(noise, scale):
    stream = np.random.SeedSequence(7).spawn(3)[2]
    data = TwoMoons(noise, scale, n_train=100, n_test=41).draw(stream)
    train, test = stream.spawn(2)
    for x, y, child in ((data.train_x, data.train_y, train), (data.test_x, data.test_y, test)):
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
    assert np.abs(data.train_x).max() <= 1
    # 400 points are expected in each tenth of [-1, 1], with a standard deviation of 19: five of them.
    counts, _ = np.histogram(data.train_x, bins=10, range=(-1, 1))
    assert np.abs(counts - 400).max() < 95


def test_the_digits_are_those_of_scikit_learn_each_once():
    images, digits = load_digits(return_X_y=True)
    expected = {(16 * image).tobytes(): digit % 2 for image, digit in zip(images / 16, digits, strict=True)}
    data = drawn(DigitsParity())
    x, y = (np.concatenate(parts).astype(np.float64) for parts in (data[::2], data[1::2]))
    assert len(x) == 1797
    assert {(16 * image).tobytes(): label for image, label in zip(x, y, strict=True)} == expected
    assert 0 <= x.min() < x.max() == 1


def test_more_digits_than_there_are_is_refused():
    DigitsParity(n_train=1000, n_test=797)
    with pytest.raises(ConfigError, match=r"^n_train=1000: n_train \+ n_test must be at most 1797.*n_test=798"):
        DigitsParity(n_train=1000, n_test=798)


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        *((TwoMoons, "noise", -0.1), (TwoMoons, "noise", float("inf")), (TwoMoons, "scale", 0)),
        *((TwoMoons, "n_train", 0), (AbsoluteValue, "n_test", 1.5), (DigitsParity, "n_test", 0)),
        *((Cones, "n_inputs", 0), (Cones, "n_cones", 0), (Cones, "spacing", 1.9), (Cones, "p", 3)),
    ],
)
def test_a_bad_argument_is_named(kind, name, value):
    with pytest.raises(ConfigError, match=f"^{name}={value}: must be"):
        kind(**{name: value})


# Cones ----------------------------------------------------------------------------------------------------------

CASES = [(dims, cones, p) for dims, cones in ((1, 1), (2, 3), (5, 2)) for p in (1.0, 2.0, np.inf)]


@pytest.mark.parametrize(("dims", "cones", "p"), CASES)
def test_all_mass_has_to_move_by_one(dims, cones, p):
    """Every point of a sphere is 1 from its centre and no nearer to another; the classes have equal mass."""
    data = drawn(Cones(n_inputs=dims, n_cones=cones, p=p, n_train=48, n_test=24))
    for x, y in ((data.train_x, data.train_y), (data.test_x, data.test_y)):
        centres, spheres = x[y == 1], x[y == 0]
        assert len(centres) == len(spheres)
        assert len(np.unique(centres, axis=0)) == cones
        distances = np.linalg.norm(spheres[:, None] - np.unique(centres, axis=0), ord=p, axis=-1)
        np.testing.assert_allclose(distances.min(axis=1), 1, rtol=1e-6)
        around = spheres - centres  # a point and its opposite, so spheres and centres have the same middle
        np.testing.assert_allclose(around[::2], -around[1::2], atol=1e-6)


@pytest.mark.parametrize("p", [1.0, 2.0, np.inf])
def test_the_transport_distance_is_one(p):
    """By linear programming: the cheapest assignment of sphere points to point masses."""
    from scipy.optimize import linear_sum_assignment

    data = drawn(Cones(n_inputs=3, n_cones=3, p=p, n_train=120, n_test=4))
    centres, spheres = data.train_x[data.train_y == 1], data.train_x[data.train_y == 0]
    cost = np.linalg.norm(spheres[:, None] - centres[None], ord=p, axis=-1)
    assert cost[linear_sum_assignment(cost)].mean() == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("p", [1.0, 2.0, np.inf])
def test_spheres_are_covered_evenly(p):
    x = on_sphere(40_000, 3, p, np.random.default_rng(0))
    np.testing.assert_allclose(np.linalg.norm(x, ord=p, axis=1), 1, rtol=1e-12)
    assert np.abs(x.mean(axis=0)).max() < 0.02
    octants = np.unique((x > 0) @ [1, 2, 4], return_counts=True)[1]
    assert len(octants) == 8
    assert octants.min() > 0.9 * 5000


def test_a_norm_other_than_that_of_the_constraint_is_refused(compose):
    assert build(compose("dataset=cones", "constraint=linf", "dataset.p=2")).parts["dataset"].p == 2
    with pytest.raises(
        ConfigError, match=r"^dataset\.p=inf: must be the norm that constraint=Spectral is for, p=2"
    ):
        build(compose("dataset=cones", "dataset.p=inf"))


def test_the_spheres_follow_the_norm_of_the_constraint(make):
    assert make("dataset", "dataset=cones").p == 2
    assert make("dataset", "dataset=cones", "constraint=linf", "constraint.p=inf").p == np.inf
    assert make("dataset", "dataset=cones", "constraint=linf", "constraint.p=1").p == 1
