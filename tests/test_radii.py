"""Certified radii: every error bound against exact rational arithmetic, every promise against real evaluations."""

from __future__ import annotations

import itertools
import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from lipexp.activations import Activation, Elementwise, GroupSort, ReLU
from lipexp.proven.methods import product_certificate
from lipexp.norms import dual
from lipexp.constraints import in_usual_order
from lipexp.models import Layer, Network, run_layers, state_dict
from lipexp.proven.radii import Robustness, assess, certified_radii, evaluate, float32_error, refusal

MAXMIN = GroupSort(group_size=2, neighbours=True)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stored(*shape: int, seed: int = 0) -> torch.Tensor:
    """Points in float64 that float32 holds exactly, as data are."""
    return normal(*shape, seed=seed).float().double()


def network(*sizes: int, scale: float = 1.0, seed: int = 0) -> list[Layer]:
    """One random network in float32."""
    return [
        Layer(
            (scale * normal(1, n_out, n_in, seed=100 * seed + 2 * i) / math.sqrt(n_in)).float(),
            (scale * normal(1, 1, n_out, seed=100 * seed + 2 * i + 1)).float(),
        )
        for i, (n_in, n_out) in enumerate(itertools.pairwise(sizes))
    ]


def by_hand(*layers: tuple[list[list[float]], list[float]]) -> list[Layer]:
    return [Layer(torch.tensor([weight]), torch.tensor([[bias]])) for weight, bias in layers]


def exact_f(layers: list[Layer], act: torch.nn.Module, point) -> Fraction:
    """f at a point in rational arithmetic, with no code of lipexp's."""
    h = [Fraction(float(v)) for v in point]
    for i, layer in enumerate(layers):
        if i > 0 and isinstance(act, GroupSort):
            size = act.size(len(h))
            h = [v for start in range(0, len(h), size) for v in sorted(h[start : start + size])]
        elif i > 0:
            assert isinstance(act, Elementwise)
            h = [v if v > 0 else Fraction(act.slope) * v for v in h]
        h = [
            sum((Fraction(w) * v for w, v in zip(row, h, strict=True)), Fraction(b))
            for row, b in zip(layer.weight[0].tolist(), layer.bias[0, 0].tolist(), strict=True)
        ]
    return h[0]


def plain(layers: list[Layer], act: torch.nn.Module) -> Network:
    """The network that a user gets: torch's own layers in float32."""
    out = Network([tuple(layer.weight.shape[1:]) for layer in layers], act)
    out.load_state_dict(state_dict(layers, 0))
    return out.requires_grad_(False)


def within(x: torch.Tensor, radius: torch.Tensor, p: float, seed: int) -> torch.Tensor:
    """A point at distance at most `radius` from each of x (N, D), in the norm p, mostly close to it."""
    direction = normal(*x.shape, seed=seed)
    if math.isinf(p):
        direction = direction.sign()
    direction = direction / torch.linalg.vector_norm(direction, ord=p, dim=1, keepdim=True)
    return x + radius.unsqueeze(1) * (1 - 1e-6) * direction


@pytest.fixture
def nets(trained, act_option):
    """Trained networks of every activation, one for each constraint and norm: (layers, act, x, certificate)."""

    def nets(overrides):
        result = trained(*overrides, f"act={act_option}", "model.depth=2", "dataset.n_test=24")
        out = []
        for run in range(2):
            act = result.checkpoint.act
            layers = in_usual_order(run_layers(result.checkpoint.layers, run), act)
            x = torch.from_numpy(result.stack.data[run].test_x).double()
            one = product_certificate(result.stack.constraint, act, result.checkpoint.layers, run)
            out.append((layers, act.baked(), x, one))
        return out

    return nets


# Float64 ---------------------------------------------------------------------------------------------------------


def check_float64(layers, act, x, tightness=1e-11):
    f, error = evaluate(layers, act, x)
    for point, value, bound in zip(x, f, error, strict=True):
        assert abs(Fraction(float(value)) - exact_f(layers, act, point)) <= Fraction(float(bound))
    scale = math.prod(1 + float(layer.weight.abs().sum(dim=2).amax()) for layer in layers)
    assert error.max() <= tightness * scale * (1 + float(x.abs().max()))  # and it says something


def test_the_float64_error_of_trained_networks_is_bounded(nets, constraint_case):
    for layers, act, x, _ in nets(constraint_case):
        check_float64(layers, act, x)


@pytest.mark.parametrize("act", [ReLU(), MAXMIN, GroupSort(n_groups=1, neighbours=True)], ids=str)
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e9])
def test_the_float64_error_of_random_networks_is_bounded(act, scale):
    for seed, sizes in enumerate([(1, 4, 1), (3, 16, 16, 1), (40, 8, 8, 8, 1), (2, 1)]):
        if sizes[-2] % act.size(sizes[-2]) == 0 if isinstance(act, GroupSort) and len(sizes) > 2 else True:
            check_float64(network(*sizes, scale=scale, seed=seed), act, stored(10, sizes[0], seed=seed))


def test_the_float64_error_is_bounded_where_everything_cancels():
    """f is a difference of two large numbers: what is left of it in float64 is mostly error."""
    huge = 2.0**60
    layers = by_hand(([[1.0], [1.0], [1 / 3]], [huge, -huge, 0.1]), ([[1.0, 1.0, 1 / 7]], [-huge]))
    x = torch.tensor([[0.1], [3.3], [-5.0], [100.7]]).double()
    f, error = evaluate(layers, ReLU(), x)
    wrong = [abs(Fraction(float(v)) - exact_f(layers, ReLU(), point)) for v, point in zip(f, x, strict=True)]
    assert max(wrong) > 1  # the trap is set
    assert all(w <= Fraction(float(bound)) for w, bound in zip(wrong, error, strict=True))
    assert (certified_radii(layers, ReLU(), x, 1.0, [1.0, 1.0]).radius == 0).all()


def test_the_float64_error_is_bounded_where_it_underflows():
    layers = by_hand(([[1e-42, -1e-44]], [1e-45]), ([[1e-40]], [0.0]))
    x = torch.tensor([[1e-300, 3e-280], [1e-281, 1e-290], [5e-324, 5e-324]], dtype=torch.float64)
    f, error = evaluate(layers, ReLU(), x)
    for point, value, bound in zip(x, f, error, strict=True):
        assert abs(Fraction(float(value)) - exact_f(layers, ReLU(), point)) <= Fraction(float(bound))


def test_numbers_too_large_for_float64_have_no_radius():
    layers = by_hand(([[1e38]], [0.0]), *[([[1e38]], [0.0])] * 9)
    radii = certified_radii(layers, ReLU(), torch.ones(1, 1).double(), 1.0, [1e38] * 10)
    assert radii.radius == radii.radius_float32 == 0


# Radii -----------------------------------------------------------------------------------------------------------


def test_a_radius_times_the_bound_is_at_most_the_exact_value(nets, constraint_case):
    """|f(x)| >= r L, decided without rounding; and no more is lost than 1e-9 of it."""
    for layers, act, x, certificate in nets(constraint_case):
        radii = certified_radii(layers, act, x, certificate.value, certificate.layer_norms)
        for point, radius in zip(x, radii.radius, strict=True):
            value = abs(exact_f(layers, act, point))
            assert Fraction(float(radius)) * Fraction(certificate.value) <= value
            assert float(radius) * certificate.value >= float(value) * (1 - 1e-9) - 1e-9


@pytest.mark.parametrize("p", [1.0, 2.0, math.inf])
def test_the_radius_of_a_linear_function_is_the_distance_to_its_plane(p):
    layers = network(5, 1)
    weight, bias = layers[0].weight[0, 0].double(), float(layers[0].bias)
    slope = float(torch.linalg.vector_norm(weight, ord=dual(p)))
    x = stored(50, 5)
    radii = certified_radii(layers, ReLU(), x, math.nextafter(slope, math.inf), [slope])
    np.testing.assert_allclose(radii.radius, (x @ weight + bias).abs() / slope, rtol=1e-12)
    assert (radii.radius_float32 < radii.radius).all()
    np.testing.assert_allclose(radii.radius_float32, radii.radius, rtol=0, atol=1e-5)


def test_a_constant_function_has_infinite_radii_unless_it_is_zero():
    x = stored(3, 2)
    for value, radius in ((0.5, math.inf), (0.0, 0.0)):
        layers = by_hand(([[0.0, 0.0]], [0.0]), ([[0.0]], [value]))
        radii = certified_radii(layers, ReLU(), x, 0.0, [0.0, 0.0])
        assert (radii.radius == radius).all()
        assert (radii.radius_float32 <= radii.radius).all()


# Float32 ---------------------------------------------------------------------------------------------------------


def float32_points(x: torch.Tensor, radius: np.ndarray, p: float, seed: int) -> torch.Tensor:
    """float32 vectors within `radius` of x, as exact float64; those that rounding moved out are x itself."""
    near = within(x, torch.from_numpy(radius), p, seed).float().double()
    inside = torch.linalg.vector_norm(near - x, ord=p, dim=1) < torch.from_numpy(radius) * (1 - 1e-12)
    return torch.where(inside.unsqueeze(1), near, x)


def test_float32_networks_err_by_no_more_than_their_bound_within_the_ball(nets, constraint_case):
    for layers, act, x, certificate in nets(constraint_case):
        radius = certified_radii(layers, act, x, certificate.value, certificate.layer_norms).radius
        bound = float32_error(layers, act, x, radius, certificate.layer_norms)
        assert (bound < 1e-2 * (1 + np.abs(evaluate(layers, act, x)[0]))).all()  # it says something
        user = plain(layers, act)
        for seed in range(2):
            points = float32_points(x, radius, certificate.p, seed)
            assert (points != x).any()
            found = user(points.float())[:, 0].tolist()
            for point, value, limit in zip(points, found, bound, strict=True):
                assert abs(Fraction(value) - exact_f(layers, act, point)) <= Fraction(float(limit))


def test_float32_networks_keep_their_sign_within_their_radius(nets, constraint_case):
    for layers, act, x, certificate in nets(constraint_case):
        radii = certified_radii(layers, act, x, certificate.value, certificate.layer_norms)
        assert (radii.radius_float32 <= radii.radius).all()
        for seed in range(20):
            points = float32_points(x, radii.radius_float32, certificate.p, seed)
            held = radii.radius_float32 > 0
            assert (np.sign(plain(layers, act)(points.float())[:, 0].numpy()) == np.sign(radii.f))[held].all()


def test_a_float32_network_that_errs_within_the_real_radius_does_not_within_its_own():
    """f(x) = x + 1 through features of size 2^20: float32 loses what float64 keeps."""
    offset = 2.0**20
    layers = by_hand(([[1.0], [1.0]], [offset, offset]), ([[2.0, -1.0]], [1.0 - offset]))
    x = torch.linspace(-1.2, -0.8, 4001).reshape(-1, 1).float().double()
    radii = certified_radii(layers, ReLU(), x, 3.0, [math.sqrt(2), math.sqrt(5)])
    found = plain(layers, ReLU())(x.float())[:, 0].numpy()
    wrong = (found > 0) != (x[:, 0].numpy() > -1)
    assert (wrong & (radii.radius > 0)).any()  # the trap is set
    assert not (wrong & (radii.radius_float32 > 0)).any()
    x = torch.tensor([[5.0], [-8.0]]).double()
    assert (certified_radii(layers, ReLU(), x, 3.0, [math.sqrt(2), math.sqrt(5)]).radius_float32 > 0.5).all()


# What is reported ------------------------------------------------------------------------------------------------


class Curved(Activation):
    norms = frozenset({1.0, 2.0, math.inf})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x)


class OnlyEuclidean(ReLU):
    norms = frozenset({2.0})


def test_activations_whose_rounding_is_unknown_get_no_radii(make):
    assert refusal(Curved()) == "nothing is known about the rounding errors of Curved"
    assert "OnlyEuclidean declares no bound in the inf-norm" in refusal(OnlyEuclidean())
    certificate = product_certificate(make("constraint", "constraint=none"), Curved(), network(2, 4, 1), 0)
    found = assess(network(2, 4, 1), Curved(), stored(5, 2), torch.zeros(5), certificate)
    assert found.columns is None
    assert found.summary([0.1])["certified_accuracy"] is None
    assert found.summary([0.1])["reason"] == refusal(Curved())


def test_no_activation_of_conf_is_refused(act_option, make):
    assert refusal(make("act", f"act={act_option}")) is None
    assert refusal(make("act", f"act={act_option}").baked()) is None


def test_without_a_proven_bound_there_are_no_radii_and_the_reason_is_said(make):
    act = torch.nn.Tanh()
    certificate = product_certificate(make("constraint", "constraint=none"), act, network(2, 4, 1), 0)
    found = assess(network(2, 4, 1), act, stored(5, 2), torch.zeros(5), certificate)
    assert found == Robustness(2.0, None, None, "the activation declares no bound in the 2-norm")


def test_certified_accuracy_counts_points_that_are_right_and_stay_so():
    columns = {"correct": np.array([1, 1, 0, 1]), "radius": np.array([0.3, 0.1, 9.0, 0.0])}
    summary = Robustness(math.inf, 2.0, columns, None).summary([0.05, 0.1, 0.2, 1.0])
    assert summary == {
        "p": "inf",
        "lipschitz": 2.0,
        "certified_accuracy": {"0.05": 0.5, "0.1": 0.5, "0.2": 0.25, "1": 0.0},
        "median_radius": 0.05,
        "reason": None,
    }
    columns["radius"] = np.full(4, math.inf)
    assert Robustness(math.inf, 0.0, columns, None).summary([])["median_radius"] is None


@pytest.mark.parametrize("dataset", ["two_moons", "digits_parity"])
def test_a_run_reports_radii_of_its_test_points(lipexp, run_folders, dataset):
    command = ("train", "experiment=debug", f"dataset={dataset}", "constraint=none", "radii=[0.001,2]")
    done = lipexp(*command)
    assert done.code == 0, done.err
    (folder,) = run_folders()
    metrics, radii = json.loads((folder / "metrics.json").read_text()), pd.read_csv(folder / "radii.csv")
    table = pd.read_csv(folder / "gradients.csv")
    test = table[table["split"] == "test"].reset_index(drop=True)
    dims = {"two_moons": 2, "digits_parity": 64}[dataset]
    assert [*radii] == [
        "index",
        *(f"x{i}" for i in range(dims)),
        *("y", "prediction", "correct", "f", "radius", "radius_float32"),
    ]
    for name in ("y", *(f"x{i}" for i in range(dims))):
        assert (radii[name] == test[name]).all()
    np.testing.assert_allclose(radii["f"], test["f"], rtol=1e-12)
    certified = metrics["lipschitz"]["certified"]
    np.testing.assert_allclose(radii["radius"], radii["f"].abs() / certified, rtol=1e-9)
    assert radii["correct"].mean() == metrics["test"]["accuracy"]
    robustness = metrics["robustness"]
    assert robustness["lipschitz"] == certified
    right = (radii["radius"] >= 0.001) & (radii["correct"] == 1)
    assert robustness["certified_accuracy"] == {"0.001": right.mean(), "2": 0.0}
    assert "certified accuracy within ‖δ‖₂ ≤ 0.001: " in done.out


def test_a_regression_has_no_radii(lipexp, run_folders):
    assert lipexp("train", "experiment=debug", "dataset=absolute_value").code == 0
    (folder,) = run_folders()
    assert json.loads((folder / "metrics.json").read_text())["robustness"] is None
    assert not Path(folder / "radii.csv").exists()
