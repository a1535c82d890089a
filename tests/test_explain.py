"""Errors of Hydra and OmegaConf in one line; what a user types is tested by the real command in test_cli.py."""

from __future__ import annotations

import pytest
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lipexp.config import Settings
from lipexp.explain import explain


def test_a_missing_option_lists_the_options_in_order():
    error = MissingConfigException("Could not find 'loss/hing'", "loss/hing", ["mse", "hinge", "bce"])
    assert explain(error) == "loss=hing: no such option; did you mean loss=hinge? (bce, hinge, mse)"


def test_without_a_near_match_nothing_is_guessed():
    error = MissingConfigException("Could not find 'loss/xyzzy'", "loss/xyzzy", ["mse", "bce"])
    assert explain(error) == "loss=xyzzy: no such option (bce, mse)"


def test_a_wrong_type_is_said_in_plain_words():
    settings = OmegaConf.structured(Settings)
    for key, value, expected in (
        ("steps", "foo", "steps=foo: must be a whole number"),
        ("lipschitz", "big", "lipschitz=big: must be a number"),
    ):
        with pytest.raises(OmegaConfBaseException) as caught:
            settings[key] = value
        assert explain(caught.value) == expected


def test_any_other_error_is_its_first_line():
    assert explain(HydraException("\n first thing \nsecond thing")) == "first thing"
    assert explain(ConfigCompositionException("In 'config': something")) == "In 'config': something"
