"""conf/ mirrors the package: options are classes of their group's module, with the defaults of the code."""

from __future__ import annotations

import dataclasses

import pytest
from conftest import CONF, choice_of, defaults_of, leaf, options, part
from omegaconf import MISSING, OmegaConf

from lipexp.check import composed
from lipexp.config import GROUPS, ROOMS, Settings, plain
from lipexp.members import build


@pytest.mark.parametrize("group", GROUPS)
def test_options_are_classes_of_one_module_and_one_option_of_each_spells_out_the_defaults_of_the_code(group):
    spelled = {}
    for option in options(group):
        arguments = plain(leaf(group, option))
        kind = type(part(choice_of(group, option)))
        assert arguments.pop("_target_") == f"{ROOMS[group][0]}.{kind.__name__}"
        assert f"{kind.__module__}.".startswith(f"{ROOMS[group][0]}.")
        found = {name: tuple(value) if isinstance(value, list) else value for name, value in arguments.items()}
        found = {name: value for name, value in found.items() if value != MISSING}
        spelled.setdefault(kind, []).append(found)
    for kind, found in spelled.items():
        assert defaults_of(kind) in found


def test_an_experiment_is_accepted_and_begins_with_its_command(experiment_option, compose):
    build(compose(f"experiment={experiment_option}"))
    lines = (CONF / "experiment" / f"{experiment_option}.yaml").read_text().splitlines()
    command = next(line for line in lines if line.startswith("# lipexp train "))
    assert f"experiment={experiment_option}" in command.split()


def test_the_defaults_are_those_of_the_blog():
    expected = {"dataset": "two_moons", "act": "groupsort", "constraint": "spectral", "loss": "hinge"}
    expected |= {"model": "mlp", "optim": "adam", "experiment": None}
    assert expected.items() <= composed([])[1].items()


def test_every_setting_of_the_schema_has_a_value(compose):
    assert set(compose()) == {field.name for field in dataclasses.fields(Settings)}
    assert not OmegaConf.missing_keys(compose())


@pytest.mark.parametrize(
    ("overrides", "loss", "steps", "width"),
    [
        ([], "hinge", 1000, 64),
        (["dataset=absolute_value"], "mse", 3000, 64),
        (["steps=7", "loss=hinge", "dataset=absolute_value"], "hinge", 7, 64),
        (["dataset=absolute_value", "experiment=debug"], "mse", 20, 16),
        (["experiment=debug", "steps=5", "model.width=4"], "hinge", 5, 4),
    ],
)
def test_a_dataset_brings_its_loss_and_length_experiments_win_over_it_and_the_command_line_over_all(
    overrides, loss, steps, width
):
    content, choices = composed(overrides)
    assert (choices["loss"], content["steps"], content["model"]["width"]) == (loss, steps, width)


def test_the_lipschitz_constant_reaches_constraint_and_loss(compose):
    config = compose("lipschitz=3")
    assert config.constraint.lipschitz == config.loss.lipschitz == 3.0
