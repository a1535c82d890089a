"""Errors of Hydra and OmegaConf in one line; the real command is in test_bad_input.py."""

from __future__ import annotations

from hydra.errors import HydraException, MissingConfigException

from lipexp.explain import explain


def test_a_missing_option_lists_the_options_in_order_and_guesses_only_what_is_near():
    error = MissingConfigException("Could not find 'loss/hing'", "loss/hing", ["mse", "hinge", "bce"])
    assert explain(error) == "loss=hing: no such option; did you mean loss=hinge? (bce, hinge, mse)"
    error = MissingConfigException("Could not find 'loss/xyzzy'", "loss/xyzzy", ["mse", "bce"])
    assert explain(error) == "loss=xyzzy: no such option (bce, mse)"


def test_any_other_error_is_its_first_line():
    assert explain(HydraException("\n first thing \nsecond thing")) == "first thing"
