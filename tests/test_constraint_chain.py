"""The chain of norms of each constraint, its settings, and the activations that suit it."""

from __future__ import annotations

import math
import re

import pytest
import torch

from lipexp.config import ConfigError
from lipexp.constraints import Constraint, LInf, Spectral, Unconstrained


class Householder(torch.nn.Module):
    """A class that, as a Householder activation, is 1-Lipschitz in the 2-norm only."""

    norms = frozenset({2.0})


def build(make, case, *overrides: str) -> Constraint:
    return make("constraint", *case, *overrides)


# The chain ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("constraint", "p", "q", "hidden_p", "names"),
    [
        (Unconstrained(), 2, 2, 2, ["spectral norm"] * 3),
        (Spectral(), 2, 2, 2, ["spectral norm"] * 3),
        (LInf(), 2, 2, math.inf, ["row 2-norm", "row 1-norm", "row 1-norm"]),
        (LInf(p="inf"), math.inf, 1, math.inf, ["row 1-norm", "row 1-norm", "row 1-norm"]),
        (LInf(p=1), 1, math.inf, math.inf, ["largest entry", "row 1-norm", "row 1-norm"]),
    ],
    ids=["none", "spectral", "linf,p=2", "linf,p=inf", "linf,p=1"],
)
def test_the_chain_of_norms_is_that_of_the_table(constraint, p, q, hidden_p, names):
    assert (constraint.p, constraint.q, constraint.hidden_p) == (p, q, hidden_p)
    assert [norm.name for norm in constraint.norms(3)] == names


@pytest.mark.parametrize("p", [2, 2.0, "2", 1, "1", 1.0, "inf", math.inf])
def test_p_is_a_number_or_its_spelling(p):
    assert LInf(p=p).p == float(p)


@pytest.mark.parametrize("spelling", ["2", "2.0", "inf", "1"])
def test_p_arrives_from_the_command_line(spelling, make):
    assert make("constraint", "constraint=linf", f"constraint.p={spelling}").p == float(spelling)


@pytest.mark.parametrize("p", [3, "x", None, math.nan, -1, [2]])
def test_another_p_is_refused(p):
    with pytest.raises(ConfigError, match="must be 1, 2 or inf") as caught:
        LInf(p=p)
    assert caught.value.option == "p"


@pytest.mark.parametrize("kind", [Spectral, LInf])
@pytest.mark.parametrize("lipschitz", [0, -1.0, math.inf, math.nan, 1e-31, 1e31])
def test_a_bad_lipschitz_constant_is_named(kind, lipschitz):
    with pytest.raises(ConfigError, match=f"^lipschitz={re.escape(str(lipschitz))}: must be "):
        kind(lipschitz=lipschitz)


# Which activation suits -----------------------------------------------------------------------------------------


def test_a_constraint_takes_every_activation_of_conf(constraint_case, act_option, make):
    build(make, constraint_case).check(make("act", f"act={act_option}"), act_option)


def test_an_activation_for_the_2_norm_suits_a_hidden_space_of_the_2_norm_only(constraint_case, make):
    constraint = build(make, constraint_case)
    if constraint.hidden_p == 2:
        constraint.check(Householder(), "householder")
    else:
        with pytest.raises(ConfigError, match=r"^act=householder: .* in the inf-norm .* declares norms: 2 "):
            constraint.check(Householder(), "householder")


def test_an_activation_that_declares_nothing_is_refused_under_a_bound(bounded_case, make):
    with pytest.raises(ConfigError, match=r"^act=tanh: must be 1-Lipschitz .* declares norms: none "):
        build(make, bounded_case).check(torch.nn.Tanh(), "tanh")


def test_any_activation_is_taken_without_a_bound():
    Unconstrained().check(torch.nn.Tanh(), "tanh")
    Unconstrained().check(Householder(), "householder")
