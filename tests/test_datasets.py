"""Datasets: the blog's moons are scikit-learn's, |x| is exact, and the optimum of the cones is known."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import choice_of, leaf, part
from scipy.optimize import linear_sum_assignment
from sklearn.datasets import load_digits, make_moons

from lipexp.config import ConfigError
from lipexp.datasets import AbsoluteValue, Cones, DigitsParity, TwoMoons, on_sphere
from lipexp.members import build


def drawn(dataset):
    """The data of a run."""
    return dataset.draw(np.random.SeedSequence(0))


def test_the_test_set_does_not_depend_on_the_size_of_the_training_set(dataset_option):
    choice = choice_of("dataset", dataset_option)
    sizes = ((*choice, f"dataset.n_train={n}", "dataset.n_test=20") for n in (1, 60))
    one, many = (drawn(part(choice)) for choice in sizes)
    assert len(one.train_x) == 1
    assert np.array_equal(one.test_y, many.test_y)
    # Of a table, columns are scaled by the training rows, which leaves their order.
    assert np.array_equal(*(data.test_x.argsort(axis=0, kind="stable") for data in (one, many)))


@pytest.mark.parametrize(("noise", "scale"), [(0.05, 2.0), (0.0, 2.0), (0.3, 0.5)])
def test_two_moons_are_those_of_scikit_learn_times_the_scale(noise, scale):
    stream = np.random.SeedSequence(7).spawn(3)[2]
    data = TwoMoons(noise, scale, n_train=100, n_test=41).draw(stream)
    for x, y, child in zip(data[::2], data[1::2], stream.spawn(2), strict=True):
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


def test_the_digits_are_those_of_scikit_learn_each_once():
    images, digits = load_digits(return_X_y=True)
    data = drawn(DigitsParity())
    found = [{**dict(zip(map(tuple, x), y, strict=True))} for x, y in zip(data[::2], data[1::2], strict=True)]
    assert list(map(len, found)) == [1397, 400]
    assert found[0] | found[1] == dict(zip(map(tuple, images / 16), digits % 2, strict=True))
    DigitsParity(n_train=1000, n_test=797)
    with pytest.raises(ConfigError, match=r"^n_train=1000: n_train \+ n_test must be at most 1797.*n_test=798"):
        DigitsParity(n_train=1000, n_test=798)


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
    assert not np.array_equal(one.train_x, other.train_x)
