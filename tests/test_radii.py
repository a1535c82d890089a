"""Certified radii: every error bound against exact rational arithmetic, every promise against real evaluations."""

import json
import math
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
import torch
from networks import (
    EACH_LIPSCHITZ,
    NORMS,
    ONE_OF_EACH,
    SEVERAL_OF_EACH,
    by_hand,
    network,
    normal,
    stored,
    value,
    values,
    with_norms,
)
from test_rounding import SMOOTH, check_float64

from lipexp import record
from lipexp.activations import NActivation, ReLU, as_activation
from lipexp.measured.gradients import Maximum
from lipexp.modules import Network
from lipexp.norms import dual, product_bound
from lipexp.proven import Certificate, Chain, Problem, Proof, prove_quickly
from lipexp.proven.pairs import pair_constants
from lipexp.proven.radii import Robustness, assess, certified_radii
from lipexp.proven.rounding import float32_error, followed, why_no_radii
from lipexp.runs import RunFolder
from lipexp.wording import below, robustness_line


def float32_points(x, radius, p, seed):
    """float32 vectors within `radius` of x, mostly close to it; those that rounding moved out are x itself."""
    direction, radius = normal(*x.shape, seed=seed), torch.from_numpy(radius)
    direction = direction.sign() if math.isinf(p) else direction
    direction = direction / torch.linalg.vector_norm(direction, ord=p, dim=1, keepdim=True)
    near = (x + radius.unsqueeze(1) * (1 - 1e-6) * direction).float().double()
    inside = torch.linalg.vector_norm(near - x, ord=p, dim=1) < radius * (1 - 1e-12)
    return torch.where(inside.unsqueeze(1), near, x)


def test_numbers_too_large_for_float64_have_no_radius():
    net = with_norms(by_hand(*[([[1e38]], [0.0])] * 10), *[1e38] * 10)
    radii = certified_radii(net, torch.ones(1, 1).double(), 1.0)
    assert radii.radius == radii.radius_float32 == 0


@pytest.mark.parametrize("overrides", SEVERAL_OF_EACH, ids=" ".join)
def test_networks_of_several_classes_keep_their_promises(overrides, trained):
    """r L_cj is at most f_c - f_j for every class j, decided without rounding, and nearly so for the runner-up."""
    result = trained(*overrides, runs=EACH_LIPSCHITZ)
    for run in (1, 2):
        net = result.checkpoint.network.run(run)
        x = torch.from_numpy(result.stack.data[run].test_x).double()[:16]
        check_float64(net, x)
        chain = Chain.of(result.stack.constraint, net.layers, run)
        pairs = pair_constants(net, prove_quickly(Problem(net, chain, (x[0], x[0]), Maximum(0.0, ()), 0)))
        radii = certified_radii(net, x, pairs.constants)
        assert not (radii.runner_up == radii.prediction).any()
        for point, own, rival, radius in zip(x, radii.prediction, radii.runner_up, radii.radius, strict=True):
            f = values(net, point)
            assert f[own] == max(f)
            margins = [f[own] - v for v in f]
            bounds = [Fraction(float(radius)) * Fraction(float(constant)) for constant in pairs.constants[own]]
            assert all(bound <= margin for bound, margin in zip(bounds, margins, strict=True))
            assert float(bounds[rival]) >= float(margins[rival]) * (1 - 1e-9) - 1e-9
        # A network in float32 errs by no more than its bound within the ball, and keeps its class within its own.
        plain, bound = Network(net), float32_error(net, followed(net, x), radii.radius)
        points = float32_points(x, radii.radius, chain.p, seed=0)
        for point, f, limits in zip(points, plain(points.float()).tolist(), bound, strict=True):
            for found, exactly, limit in zip(f, values(net, point), limits, strict=True):
                assert abs(Fraction(found) - exactly) <= Fraction(float(limit))
        assert (radii.radius_float32 <= radii.radius).all()
        assert (radii.radius_float32 > 0).any()
        held = radii.radius_float32 > 0
        for seed in range(20):
            points = float32_points(x, radii.radius_float32, chain.p, seed)
            assert (plain(points.float()).argmax(dim=1).numpy() == radii.prediction)[held].all()


@pytest.mark.parametrize("overrides", ONE_OF_EACH, ids=" ".join)
def test_trained_networks_keep_their_promises(overrides, trained):
    """With every constraint and every activation, decided without rounding."""
    result = trained(*overrides, runs=EACH_LIPSCHITZ)
    p = result.stack.constraint.p
    for run in (1, 2):
        net = result.checkpoint.network.run(run)
        x = torch.from_numpy(result.stack.data[run].test_x).double()[:16]
        check_float64(net, x)
        assert why_no_radii(net) is None
        lipschitz = product_bound(norm for (norm,) in net.norms)
        radii = certified_radii(net, x, lipschitz)
        # |f(x)| >= r L, and no more is lost than 1e-9 of it.
        for point, radius in zip(x, radii.radius, strict=True):
            exactly = abs(value(net, point))
            assert Fraction(float(radius)) * Fraction(lipschitz) <= exactly
            assert float(radius) * lipschitz >= float(exactly) * (1 - 1e-9) - 1e-9
        # A network in float32, as users have it, errs by no more than its bound within the ball,
        plain, bound = Network(net), float32_error(net, followed(net, x), radii.radius)[:, 0]
        assert (bound < 1e-2 * (1 + np.abs(radii.f))).all()  # it says something
        points = float32_points(x, radii.radius, p, seed=0)
        assert (points != x).any()
        for point, f, limit in zip(points, plain(points.float())[:, 0].tolist(), bound, strict=True):
            assert abs(Fraction(f) - value(net, point)) <= Fraction(float(limit))
        # and keeps its sign within its own radius.
        assert (radii.radius_float32 <= radii.radius).all()
        held = radii.radius_float32 > 0
        for seed in range(20):
            points = float32_points(x, radii.radius_float32, p, seed)
            assert (np.sign(plain(points.float())[:, 0].numpy()) == np.sign(radii.f))[held].all()


@pytest.mark.parametrize("p", NORMS)
def test_the_radius_of_a_linear_function_is_the_distance_to_its_plane(p):
    net, x = network(5, 1), stored(50, 5)
    weight, bias = (part.double().flatten() for part in net.layers[0])
    slope = float(torch.linalg.vector_norm(weight, ord=dual(p)))
    radii = certified_radii(with_norms(net, slope), x, math.nextafter(slope, math.inf))
    np.testing.assert_allclose(radii.radius, (x @ weight + bias).abs() / slope, rtol=1e-12)
    assert (radii.radius_float32 < radii.radius).all()
    np.testing.assert_allclose(radii.radius_float32, radii.radius, rtol=0, atol=1e-5)


@pytest.mark.parametrize("p", NORMS)
def test_the_radius_of_a_linear_map_is_the_distance_to_the_nearest_plane_between_two_classes(p):
    net, x = network(5, 4), stored(200, 5)
    net = with_norms(net, 1.0)
    weight, bias = (part.double() for part in (net.layers[0].weight[0], net.layers[0].bias[0, 0]))
    f, slopes = x @ weight.T + bias, torch.linalg.vector_norm(weight.unsqueeze(1) - weight, ord=dual(p), dim=2)
    own = f.argmax(dim=1)
    distance = (f.gather(1, own.unsqueeze(1)) - f) / slopes[own].masked_fill(slopes[own] == 0, 1)
    nearest, rival = distance.scatter(1, own.unsqueeze(1), math.inf).min(dim=1)
    radii = certified_radii(net, x, np.nextafter(slopes.numpy(), math.inf))
    np.testing.assert_array_equal(radii.prediction, own)
    np.testing.assert_array_equal(radii.runner_up, rival)
    np.testing.assert_allclose(radii.f, f.max(dim=1).values - f.gather(1, rival.unsqueeze(1))[:, 0], rtol=1e-12)
    np.testing.assert_allclose(radii.radius, nearest, rtol=1e-9)
    np.testing.assert_allclose(radii.radius_float32, nearest, rtol=0, atol=1e-5)


def test_classes_that_tie_have_no_radius_and_constant_margins_an_infinite_one():
    for bias, radius, rival in (([1.0, 1.0, 0.0], 0.0, 1), ([0.0, 1.0, 0.5], math.inf, 2)):
        net = with_norms(by_hand(([[0.0, 0.0]] * 3, bias)), 0.0)
        radii = certified_radii(net, stored(3, 2), np.zeros((3, 3)))
        assert (radii.radius == radius).all()
        assert (radii.radius_float32 <= radius).all()
        assert (radii.runner_up == rival).all()


def test_a_constant_function_has_infinite_radii_unless_it_is_zero():
    for constant, radius in ((0.5, math.inf), (0.0, 0.0)):
        net = with_norms(by_hand(([[0.0, 0.0]], [0.0]), ([[0.0]], [constant])), 0.0, 0.0)
        radii = certified_radii(net, stored(3, 2), 0.0)
        assert (radii.radius == radius).all()
        assert (radii.radius_float32 <= radii.radius).all()


def test_a_float32_network_that_errs_within_the_real_radius_does_not_within_its_own():
    """f(x) = x + 1 through features of size 2^20: float32 loses what float64 keeps."""
    offset = 2.0**20
    net = by_hand(([[1.0], [1.0]], [offset, offset]), ([[2.0, -1.0]], [1.0 - offset]))
    net = with_norms(net, math.sqrt(2), math.sqrt(5))
    x = torch.linspace(-1.2, -0.8, 4001).reshape(-1, 1).float().double()
    radii = certified_radii(net, x, 3.0)
    wrong = (Network(net)(x.float())[:, 0].numpy() > 0) != (x[:, 0].numpy() > -1)
    assert (wrong & (radii.radius > 0)).any()  # the trap is set
    assert not (wrong & (radii.radius_float32 > 0)).any()
    assert (certified_radii(net, torch.tensor([[5.0], [-8.0]]).double(), 3.0).radius_float32 > 0.5).all()


def certificate(value, reason=None):
    chain = Chain(2.0, 2.0, 2.0, 2.0, None, None, ("spectral norm",) * 2)
    return Certificate(chain, ([0.0] * 2, [1.0] * 2), value, reason, "product", {"product": Proof(value)})


def parts(x):
    return {split: (x, torch.zeros(len(x))) for split in ("val", "test")}


class OnlyEuclidean(ReLU):
    norms, slopes = frozenset({2.0}), None


def test_without_a_known_rounding_or_a_bound_there_are_no_radii_and_the_reason_is_said():
    unknown = "tanh declares neither norms nor slopes, which would bound its rounding errors"
    for act, lipschitz, given, reason in (
        (as_activation(torch.tanh), 1.0, None, unknown),
        (ReLU(), None, "no bound", "no bound"),
    ):
        found = assess(network(2, 4, 1, act=act), parts(stored(5, 2)), certificate(lipschitz, given))
        assert found == Robustness(2.0, None, None, reason)
        assert found.summary([0.1]) == record.Robustness(2, None, *[record.Certified(None, None)] * 2, reason)


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        (
            OnlyEuclidean(),
            "OnlyEuclidean declares no bound of 1 in the inf-norm, in which rounding errors are followed",
        ),
        (as_activation(SMOOTH["tanh"]), "nothing is known about the rounding errors of Smooth in float32"),
        (NActivation(), "nothing is known about the rounding errors of NActivation in float32"),
    ],
    ids=["norm", "tanh", "offsets"],
)
def test_where_nothing_is_known_of_float32_its_column_is_empty_and_the_reason_is_said(act, reason, tmp_path):
    found = assess(network(2, 4, 1, act=act), parts(stored(5, 2)), certificate(1.0))
    summary = found.summary([1e-9])
    assert (summary.reason, summary.lipschitz) == (reason, 1.0)
    median = summary.test.median_radius
    assert median == summary.val.median_radius
    line, *_ = robustness_line(summary).split("\n")
    assert line.endswith(f"{below(median)} (none in float32: {reason})")
    RunFolder(tmp_path).write_columns("radii", found.columns)
    table = pd.read_csv(tmp_path / "radii.csv")
    assert table["radius_float32"].isna().all()
    assert (table["radius"] > 0).all()


def test_certified_accuracy_counts_points_that_are_right_and_stay_so():
    columns = {
        "split": np.array(["val", *["test"] * 4]),
        "correct": np.array([1, 1, 1, 0, 1]),
        "radius": np.array([0.4, 0.3, 0.1, 9.0, 0.0]),
        "radius_local": np.array([0.4, 0.3, 0.2, 9.0, 0.0]),
    }
    summary = Robustness(math.inf, 2.0, columns, None).summary([0.05, 0.1, 0.2, 1.0])
    assert (summary.p, summary.lipschitz, summary.reason) == ("inf", 2.0, None)
    near = {"0.05": 0.5, "0.1": 0.5, "0.2": 0.5, "1": 0.0}
    assert summary.test == record.Certified({"0.05": 0.5, "0.1": 0.5, "0.2": 0.25, "1": 0.0}, 0.05, near, 0.1)
    every = {"0.05": 1.0, "0.1": 1.0, "0.2": 1.0, "1": 0.0}
    assert summary.val == record.Certified(every, 0.4, every, 0.4)
    assert summary.exact is None
    # Of three points with a finite distance the radii are 3/4, 1/4 and 9/10 of it, the local 3/4, 1/2 and 9/10.
    columns["radius_exact"] = np.array([0.5, 0.4, 0.4, 10.0, 0.0])
    summary = Robustness(math.inf, 2.0, columns, None).summary([])
    assert summary.exact == record.Tightness(0.4, pytest.approx(0.75), pytest.approx(0.75))
    columns["radius"] = np.full(5, math.inf)
    assert Robustness(math.inf, 0.0, columns, None).summary([]).test.median_radius is None


def test_a_run_reports_radii_of_its_test_points_if_it_classifies(lipexp, run_folders):
    done = lipexp("train", "experiment=debug", "constraint=none", "radii=[0.001,2]", "hydra.run.dir=outputs/a/a")
    assert (done.code, done.err) == (0, "")
    assert lipexp("train", "experiment=debug", "dataset=absolute_value", "hydra.run.dir=outputs/a/b").code == 0
    folder, regression = run_folders()
    metrics, of_regression = (json.loads((one / "metrics.json").read_text()) for one in (folder, regression))
    radii, table = (pd.read_csv(folder / f"{name}.csv") for name in ("radii", "gradients"))
    test = table[table["split"] == "test"].reset_index(drop=True)
    names = "split index x0 x1 y prediction correct f radius radius_float32 radius_local radius_exact"
    assert " ".join(radii) == names
    assert (radii["radius"] <= radii["radius_local"]).all()
    assert (radii["radius_local"] <= radii["radius_exact"]).all()
    assert (radii["radius_local"] > 1.01 * radii["radius"]).any()
    assert (radii["split"].unique() == ["val", "test"]).all()
    val, radii = (radii[radii["split"] == split].reset_index(drop=True) for split in ("val", "test"))
    assert radii[["x0", "x1", "y"]].equals(test[["x0", "x1", "y"]])
    np.testing.assert_allclose(radii["f"], test["f"], rtol=1e-12)
    np.testing.assert_allclose(radii["radius"], radii["f"].abs() / metrics["lipschitz"]["certified"], rtol=1e-9)
    assert radii["correct"].mean() == metrics["test"]["accuracy"]
    right = (radii["radius"] >= 0.001) & (radii["correct"] == 1)
    assert metrics["robustness"]["test"]["certified_accuracy"] == {"0.001": right.mean(), "2": 0.0}
    held, near = (val[name].where(val["correct"] == 1, 0) for name in ("radius", "radius_local"))
    assert metrics["robustness"]["val"] == {
        "certified_accuracy": {"0.001": (held >= 0.001).mean(), "2": 0.0},
        "median_radius": held.median(),
        "local_accuracy": {"0.001": (near >= 0.001).mean(), "2": (near >= 2).mean()},
        "median_local_radius": near.median(),
    }
    exact = radii["radius_exact"]
    ratios = {
        name: (radii[column] / exact).median()
        for name, column in (("radius", "radius"), ("local", "radius_local"))
    }
    assert metrics["robustness"]["exact"] == pytest.approx({"distance": exact.median(), **ratios})
    assert "certified accuracy within ‖δ‖₂ ≤ 0.001: " in done.out
    assert of_regression["robustness"] is None
    assert not (regression / "radii.csv").exists()
