"""Bad input is refused in one line, and only trusted targets are instantiated."""

from __future__ import annotations

import math
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from lipexp.activations import GroupSort
from lipexp.config import ConfigError, instantiate, lipschitz_constant, number, one_of, whole

GROUPSORT, RELU = "lipexp.activations.GroupSort", "lipexp.activations.ReLU"


def refusal(call, *args, **kwargs) -> str:
    """The text of the ConfigError that a call ends with."""
    with pytest.raises(ConfigError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_error_is_one_line_of_option_value_and_what_is_allowed():
    error = ConfigError("noise", -1, "must be at least 0")
    assert str(error) == "noise=-1: must be at least 0"
    assert str(error.under("dataset")) == "dataset.noise=-1: must be at least 0"
    assert str(ConfigError("run", None, "must be named")) == "run: must be named"


@given(st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(10**300), 10**300), st.floats(-10, 10))
def test_a_number_is_a_float_of_its_value_above_exclusive_and_least_inclusive_limits(value, limit):
    assert type(number("x", value)) is float
    assert number("x", value) == float(value)
    for limits, allowed in (({"above": limit}, value > limit), ({"least": limit}, value >= limit)):
        if allowed:
            assert number("x", value, **limits) == float(value)
        else:
            assert refusal(number, "x", value, **limits).startswith(f"x={value}: must be a finite number")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "1", None, True, [1], 1j, 10**400])
def test_what_is_not_a_finite_number_is_refused(value):
    shown = "x" if value is None else f"x={value}"
    assert refusal(number, "x", value, above=0) == f"{shown}: must be a finite number above 0"


def test_a_lipschitz_constant_is_one_that_float32_can_realise():
    assert [lipschitz_constant("lipschitz", value) for value in (1e-30, 1, 1e30)] == [1e-30, 1, 1e30]
    for value in (9e-31, 2e30):
        expected = f"lipschitz={value}: must be between 1e-30 and 1e+30, for float32"
        assert refusal(lipschitz_constant, "lipschitz", value) == expected


def test_whole_numbers_and_options_are_what_is_allowed():
    assert whole("n", 3, least=3) == 3
    for value in (2, 3.0, "3", math.nan, True):
        assert refusal(whole, "n", value, least=3) == f"n={value}: must be a whole number, at least 3"
    names = ["cosine", "linear"]
    assert one_of("schedule", "linear", names) == "linear"
    expected = "schedule=cosin: no such option; did you mean cosine? (cosine, linear)"
    assert refusal(one_of, "schedule", "cosin", names) == expected
    assert refusal(one_of, "schedule", "zzz", names) == "schedule=zzz: no such option (cosine, linear)"


# Instantiation -------------------------------------------------------------------------------------------------


def test_instantiate_makes_the_object_with_its_arguments_resolved():
    config = OmegaConf.create({"groups": 4, "act": {"_target_": GROUPSORT, "n_groups": "${groups}"}})
    made = instantiate(config.act, "act", trust=False)
    assert (type(made), made.n_groups) == (GroupSort, 4)


def test_missing_targets_and_refused_arguments_are_named_as_on_the_command_line():
    for node in (None, {}, {"n_groups": 2}, OmegaConf.create({"_target_": None})):
        assert refusal(instantiate, node, "act").endswith("needs an option with a _target_")
    expected = "act.n_groups=0: must be a whole number, at least 1"
    assert refusal(instantiate, {"_target_": GROUPSORT, "n_groups": 0}, "act") == expected
    text = refusal(instantiate, {"_target_": RELU, "slope": 1}, "act")
    assert text.startswith(f"act._target_={RELU}: does not take these arguments:")
    assert "'slope'" in text


@pytest.mark.parametrize(
    ("target", "source", "why"),
    [
        ("lipexp.activations.Nope", "", "Nope"),
        ("nomodule.ReLU", "", "No module named 'nomodule'"),
        *((target, "", "not a dotted path") for target in ("ReLU", "", ".ReLU", "lipexp..ReLU", "lipexp.losses.")),
        ("users_a.Mine", "def broken(:", "invalid syntax"),
        ("users_b.Mine", "Mine = undefined_name", "undefined_name"),
        ("users_c.Mine", "class Mine:\n    def __init__(self): self.missing", "missing"),
        ("users_d.Mine", "class Mine:\n    def __init__(self): import no_such_module", "no_such_module"),
    ],
)
def test_a_class_that_cannot_be_found_or_made_is_refused_with_the_reason(
    target, source, why, tmp_path, monkeypatch
):
    (tmp_path / f"{target.partition('.')[0]}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path) if source else None
    text = refusal(instantiate, {"_target_": target}, "act")
    assert text.startswith(f"act._target_={target}: cannot be used: ")
    assert why in text


@pytest.mark.parametrize(
    "target",
    [
        *("torch.nn.Tanh", "lipexpert.Evil", "lipexp", "os.system"),
        # What a module of lipexp imports is not lipexp's, and a function such as hydra_app.main can run anything.
        *("lipexp.cli.sys.exit", "lipexp.activations.nn.Tanh", "lipexp.activations.Tensor", "lipexp.runs.find"),
        # Another room's classes, and those of its own that are no members, are not what the group is for.
        *("lipexp.modules.Network", "lipexp.losses.MSE", "lipexp.activations.ActiveMap", "lipexp.loop.Stack"),
    ],
)
def test_without_trust_only_members_of_the_groups_own_room_are_instantiated(target):
    text = refusal(instantiate, {"_target_": target}, "act", trust=False)
    allowed = "is no class of lipexp.activations and may run code; pass trust (--trust) to allow it"
    assert text == f"act._target_={target}: {allowed}"


NESTED = {"_target_": "strangers.groups"}


@pytest.mark.parametrize("argument", [NESTED, [{"inside": NESTED}], "${oc.create:{_target_: strangers.groups}}"])
def test_without_trust_an_argument_cannot_bring_a_target_of_its_own(argument, tmp_path, monkeypatch):
    """Hydra resolves and instantiates nested nodes too: the rule must hold for all of them, before code is run."""
    (tmp_path / "strangers.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef groups(): return 2\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "strangers", raising=False)
    refusal(instantiate, {"_target_": GROUPSORT, "n_groups": argument}, "act", trust=False)
    assert not (tmp_path / "ran").exists()
