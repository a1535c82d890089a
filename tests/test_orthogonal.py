"""Matrices of spectral norm 1: closed forms, other libraries, and what training does with them."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from networks import free, network, normal

from lipexp.constraints import Orthogonal
from lipexp.constraints.norms import ProjectedRows
from lipexp.constraints.orthogonal import AlmostOrthogonal, CayleyTransform, Exponential, PolarFactor, QRFactor

SHAPES = [(6, 6), (9, 4), (4, 9), (1, 5), (5, 1)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
POLAR = [PolarFactor("newton_schulz", 12), PolarFactor("bjorck", 24)]


def one(norm, weight):
    """What the norm makes of one matrix, as a numpy array."""
    weight = weight.clone()
    norm.restore(weight)
    return norm.within_one(weight, norm.start(weight))[0].numpy()


@each_shape
@pytest.mark.parametrize(
    "norm", [*POLAR, CayleyTransform(), QRFactor(), Exponential()], ids=lambda n: type(n).__name__
)
def test_all_singular_values_are_one(norm, shape):
    found = one(norm, normal(1, *shape))
    np.testing.assert_allclose(np.linalg.svd(found, compute_uv=False), 1, rtol=1e-9)


@each_shape
@pytest.mark.parametrize("norm", POLAR, ids=["newton_schulz", "bjorck"])
def test_the_iterations_lead_to_the_polar_factor_and_write_it_back(norm, shape):
    weight = normal(1, *shape)
    expected = scipy.linalg.polar(weight[0].numpy(), side="right" if shape[0] >= shape[1] else "left")[0]
    norm.restore(weight)
    np.testing.assert_allclose(weight[0], expected, atol=1e-9)
    np.testing.assert_allclose(norm.scaled(normal(1, *shape), torch.ones(1))[0], expected, atol=2e-6)


@pytest.mark.parametrize("shape", [(1, 5), (5, 1)], ids=str)
def test_a_vector_becomes_the_unit_vector_in_one_iteration(shape):
    vector = 0.1 * normal(1, *shape)
    expected = vector / vector.square().sum().sqrt()
    for method in ("newton_schulz", "bjorck"):
        weight = vector.clone()
        PolarFactor(method, 1).restore(weight)
        torch.testing.assert_close(weight, expected)


@pytest.mark.parametrize("size", [1e-3, 0.3, 1.0, 7.0, 300.0])
@pytest.mark.parametrize("method", ["newton_schulz", "bjorck"])
def test_no_number_of_iterations_takes_a_singular_value_above_one_but_by_rounding(method, size):
    for iterations in range(1, 8):
        weight = size * normal(3, 20, 12).float()
        for _ in range(30):
            PolarFactor(method, iterations).restore(weight)
            # One iteration of a value above 1 takes it to a value below.
            assert torch.linalg.matrix_norm(weight, ord=2).max() < 1 + 1e-5
            weight += 0.02 * normal(3, 20, 12).float()


@each_shape
def test_the_cayley_transform_of_a_square_matrix_is_that_of_its_skew_symmetric_part(shape):
    weight = normal(1, *shape)
    found, w = one(CayleyTransform(), weight), weight[0].numpy()
    if shape[0] < shape[1]:
        found, w = found.T, w.T
    n = w.shape[1]
    skew, v = w[:n] - w[:n].T, w[n:]
    inverse = np.linalg.inv(np.eye(n) + skew + v.T @ v)
    np.testing.assert_allclose(found[:n], (np.eye(n) - skew - v.T @ v) @ inverse, atol=1e-12)
    np.testing.assert_allclose(found[n:], -2 * v @ inverse, atol=1e-12)


@each_shape
def test_the_qr_factor_and_the_exponential_are_those_of_numpy_and_scipy(shape):
    w = normal(1, *shape)[0].numpy()
    is_wide = shape[0] < shape[1]
    tall = w.T if is_wide else w
    q, r = np.linalg.qr(tall)
    np.testing.assert_allclose(
        one(QRFactor(), normal(1, *shape)).T if is_wide else one(QRFactor(), normal(1, *shape)),
        q * np.sign(np.diag(r)),
        atol=1e-12,
    )
    padded = np.pad(tall, ((0, 0), (0, tall.shape[0] - tall.shape[1])))
    expected = scipy.linalg.expm(padded - padded.T)[:, : tall.shape[1]]
    found = one(Exponential(), normal(1, *shape))
    np.testing.assert_allclose(found.T if is_wide else found, expected, atol=1e-12)


@each_shape
def test_almost_orthogonal_matrices_have_no_singular_value_above_one_and_orthogonal_ones_are_kept(shape):
    weight = normal(1, *shape)
    found, w = one(AlmostOrthogonal(), weight), weight[0].numpy()
    fewer = w if shape[0] < shape[1] else w.T
    lengths = [sum(abs(float(np.dot(a, b))) for b in fewer) ** 0.5 for a in fewer]
    by_hand = np.stack([a / length for a, length in zip(fewer, lengths, strict=True)])
    np.testing.assert_allclose(found, by_hand if shape[0] < shape[1] else by_hand.T, rtol=1e-12)
    assert np.linalg.svd(found, compute_uv=False)[0] <= 1 + 1e-12
    orthogonal = torch.from_numpy(one(QRFactor(), weight)[None])
    np.testing.assert_allclose(one(AlmostOrthogonal(), orthogonal), orthogonal[0], rtol=1e-9)


def test_training_starts_from_the_polar_factor_and_stays_near_it():
    """Steps of some size are made up for by the four iterations of the next step."""
    layers, constraint = free(network(3, 16, 16, 2).double), Orthogonal()
    constraint.start(layers)
    for step in range(50):
        for layer, block in zip(layers, constraint.apply(layers), strict=True):
            values = torch.linalg.svdvals(block.weight[0])
            assert values.max() < 1 + 1e-9
            assert step < 2 or values.min() > 0.99
            layer.weight.add_(0.02 * normal(*layer.weight.shape, seed=step).sign())


@pytest.mark.parametrize("n", [1, 2, 7])
def test_projected_rows_are_the_nearest_of_the_l1_ball(n):
    """P is the projection of w iff <w - P, y - P> <= 0 for every y of the ball, whose corners are +- e_i."""
    for row in 3 * normal(50, n):
        found = ProjectedRows(1).within_one(row.view(1, 1, -1), None)[0, 0].numpy()
        w = row.numpy()
        assert np.abs(found).sum() <= 1 + 1e-12
        for corner in (*np.eye(n), *-np.eye(n), *([w] if np.abs(w).sum() <= 1 else [])):
            assert (w - found) @ (corner - found) <= 1e-12
    clamped = ProjectedRows(torch.inf).within_one(3 * normal(1, 4, n), None)
    np.testing.assert_array_equal(clamped, np.clip(3 * normal(1, 4, n).numpy(), -1, 1))
