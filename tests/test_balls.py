"""The local constant over a ball: what lies outside does not count, and what lies inside is never above it."""

import json
import math

import numpy as np
import pytest
import torch
from acts import ACTS
from networks import by_hand, network, normal, uniform

from lipexp.activations import Tanh
from lipexp.measured.gradients import Maximum, norms, scan
from lipexp.norms import dual
from lipexp.proven.branching import Ball, Domain, branch_and_bound

NOTHING = Maximum(0.0, ())
# The largest slope 4 lies to the right of x = 1; it is 2 between 0 and 1, and 1 to the left of 0.
STAIRS = by_hand(([[1.0], [1.0], [1.0], [-1.0]], [0.0, 0.0, -1.0, 0.0]), ([[1.0, 1.0, 2.0, -1.0]], [0.0]))


def on_ball(net, centre, radius, p=2.0, gap=1e-3, **options):
    ball = Ball(torch.tensor(centre).double(), radius, p)
    return branch_and_bound(net, Domain(ball.box, dual(p), ball=ball), None, NOTHING, gap, math.inf, **options)


@pytest.mark.parametrize(
    ("centre", "radius", "constant"), [(-2.0, 1.5, 1), (0.5, 0.4, 2), (0.5, 0.6, 4), (-1, 9, 4)]
)
def test_a_ball_has_the_constant_of_what_it_reaches(centre, radius, constant):
    found = on_ball(STAIRS, [centre], radius)
    assert constant <= found.upper <= constant * (1 + 1e-9)
    assert found.best.value == constant
    assert abs(found.best.point[0] - centre) <= radius


@pytest.mark.parametrize("p", [1.0, 2.0, math.inf])
def test_corners_of_the_box_do_not_count_for_a_round_ball(p):
    """10 relu(x + y - 1.5) + x: the kink is in the box of the unit ball, but only for p = inf in the ball."""
    net = by_hand(([[1.0, 1.0], [1.0, 0.0]], [-1.5, 9.0]), ([[10.0, 1.0]], [-9.0]))
    ball = on_ball(net, [0.0, 0.0], 1.0, p)
    steep, flat = float(np.linalg.norm([11, 10], dual(p))), 1.0
    farther = on_ball(net, [0.0, 0.0], {1.0: 1.501, 2.0: 1.07, math.inf: 0.751}[p], p)
    nearer = on_ball(net, [0.0, 0.0], {1.0: 1.499, 2.0: 1.05, math.inf: 0.749}[p], p)
    assert ball.upper == pytest.approx(steep if math.isinf(p) else flat, rel=1e-9)
    assert farther.upper == pytest.approx(steep, rel=1e-9)
    assert nearer.upper == pytest.approx(flat, rel=1e-9)


@pytest.mark.parametrize("p", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("name", ["relu", "maxmin", "tanh"])
def test_the_constant_of_a_ball_is_above_all_that_is_seen_in_it(name, p):
    net = network(3, 8, 8, 1, act=(ACTS | {"tanh": Tanh()})[name])
    for centre in normal(3, 3).tolist():
        found = on_ball(net, centre, 0.2, p, gap=0.05)
        away = uniform(20_000, 3)
        x = torch.tensor(centre) + 0.2 * away[torch.linalg.vector_norm(away, ord=p, dim=1) <= 1]
        assert float(norms(scan(net, x.unsqueeze(0)).gradient, dual(p)).max()) <= found.upper
        assert found.upper <= found.best.value * 1.05
        assert np.linalg.norm(np.array(found.best.point) - centre, p) <= 0.2


def test_certify_bounds_the_constant_in_a_ball(lipexp, run):
    folder = run("act=tanh", "constraint=linf", "model.width=8")
    before = lipexp("certify", str(folder)).out
    options = ("--method", "bnb", "--around=-0.5,0.25", "--within", "0.1", "--gap", "0.01")
    done = lipexp("certify", str(folder), *options)
    assert (done.code, done.err) == (0, "")
    line = next(line for line in done.out.splitlines() if "in this ball only" in line)
    assert line.startswith("‖x - (-0.5, 0.25)‖₂ ≤ 0.1: ‖∇f‖₂  measured ")
    assert before.splitlines()[1:] == [row for row in done.out.splitlines()[1:] if row != line]
    local = json.loads((folder / "metrics.json").read_text())["certify"]["local"]
    assert local["measured"] <= local["certified"] <= local["measured"] * 1.01
    assert (local["around"], local["within"], local["measured_by"]) == ([-0.5, 0.25], 0.1, "interval arithmetic")
    assert math.dist(local["point"], local["around"]) <= 0.1
    lipexp("certify", str(folder))  # which asks for none, and leaves what is known
    assert json.loads((folder / "metrics.json").read_text())["certify"]["local"] == local


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--around=1,2", "--within", "1"), "--around=1,2: is for --method bnb"),
        (("--method", "rows", "--around=1,2", "--within", "1"), "--around=1,2: is for --method bnb"),
        (("--method", "bnb", "--around=1,2"), "--around=1,2: needs --within as well"),
        (("--method", "bnb", "--within=1"), "--within=1.0: needs --around as well"),
        (("--method", "bnb", "--around=1,x", "--within=1"), "--around=1,x: must be numbers, such as 0.1,0.25"),
        (("--method", "bnb", "--around=1,inf", "--within=1"), "--around=inf: must be a finite number"),
        (("--method", "bnb", "--around=1,2", "--within=0"), "--within=0.0: must be a finite number above 0"),
        (
            ("--method", "bnb", "--around=1,2,3", "--within=1"),
            "--around=1,2,3: must be 2 numbers, the coordinates",
        ),
    ],
)
def test_a_ball_that_is_none_is_refused(lipexp, run, options, said):
    done = lipexp("certify", str(run("max_regions=0")), *options)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert said in done.err
