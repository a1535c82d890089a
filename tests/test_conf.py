"""conf/ mirrors the package: every option composes and instantiates, and YAML and code agree on the defaults."""

from __future__ import annotations

import dataclasses
import importlib
import inspect

import pytest
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf

from lipexp.config import GROUPS, ConfigError, Settings, conf_dir
from lipexp.train import build

MODULES = {
    "dataset": "lipexp.datasets",
    "act": "lipexp.activations",
    "constraint": "lipexp.constraints",
    "loss": "lipexp.losses",
    "model": "lipexp.models",
    "optim": "lipexp.optim",
}
LAYOUT_ARGUMENTS = {"neighbours"}  # what baking chooses, not a setting


def defaults_of(kind: type) -> dict[str, object]:
    """The arguments of a class that have a default in code."""
    parameters = inspect.signature(kind).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty and p.name not in LAYOUT_ARGUMENTS}


def arguments_of(node) -> dict[str, object]:
    """The arguments of a leaf, resolved; lists as tuples, as defaults in code are."""
    resolved = OmegaConf.to_container(node, resolve=True)
    return {k: tuple(v) if isinstance(v, list) else v for k, v in resolved.items() if k != "_target_"}


def test_every_group_has_a_folder_and_a_module():
    folders = {path.name for path in conf_dir().iterdir() if path.is_dir()}
    assert folders - {"hydra", "experiment"} == set(GROUPS) == set(MODULES)


def test_an_option_instantiates_a_class_of_its_module(leaf, compose, make):
    group, option = leaf
    target = compose(f"{group}={option}")[group]._target_
    made = make(group, f"{group}={option}")
    assert target.rpartition(".")[0] == MODULES[group]
    assert type(made) is getattr(importlib.import_module(MODULES[group]), target.rpartition(".")[2])


def test_an_option_composes_alone_into_a_run_that_is_accepted(leaf, compose):
    group, option = leaf
    # Some losses need the data of their own task.
    data = {"mse": "absolute_value", "kantorovich": "cones"}.get(option) if group == "loss" else None
    partner = [f"dataset={data}"] if data else []
    assert build(compose(f"{group}={option}", *partner)).parts[group] is not None


def test_an_experiment_composes_into_a_run_that_is_accepted(experiment_option, compose):
    build(compose(f"experiment={experiment_option}"))


def test_an_experiment_begins_with_its_command(experiment_option):
    lines = (conf_dir() / "experiment" / f"{experiment_option}.yaml").read_text().splitlines()
    commands = [line for line in lines if line.startswith("# lipexp train ")]
    assert commands
    assert f"experiment={experiment_option}" in commands[0].split()


def test_an_option_names_only_arguments_that_its_class_takes(leaf, compose):
    group, option = leaf
    node = compose(f"{group}={option}")[group]
    kind = getattr(importlib.import_module(MODULES[group]), node._target_.rpartition(".")[2])
    assert set(arguments_of(node)) <= set(inspect.signature(kind).parameters)


def test_one_option_of_each_class_spells_out_the_defaults_of_the_code(leaf, compose):
    group, option = leaf
    node = compose(f"{group}={option}")[group]
    kind = getattr(importlib.import_module(MODULES[group]), node._target_.rpartition(".")[2])
    siblings = [compose(f"{group}={path.stem}")[group] for path in (conf_dir() / group).glob("*.yaml")]
    spelled = [arguments_of(sibling) for sibling in siblings if sibling._target_ == node._target_]
    assert defaults_of(kind) in spelled


def test_the_defaults_are_those_of_the_blog(choices):
    chosen = choices()
    expected = {
        "dataset": "two_moons",
        "act": "groupsort",
        "constraint": "spectral",
        "loss": "hinge",
        "model": "mlp",
        "optim": "adam",
        "experiment": None,
    }
    assert {group: chosen[group] for group in expected} == expected


def test_every_setting_of_the_schema_has_a_value(compose):
    config = compose()
    assert set(config) == {field.name for field in dataclasses.fields(Settings)}
    assert not OmegaConf.missing_keys(config)


def test_the_absolute_value_brings_its_loss_and_its_length(compose, choices):
    assert choices("dataset=absolute_value")["loss"] == "mse"
    assert compose("dataset=absolute_value").steps == 3000
    assert compose().steps == 1000


def test_the_command_line_wins_over_what_a_dataset_brings(compose, choices):
    assert choices("loss=hinge", "dataset=absolute_value")["loss"] == "hinge"
    assert compose("steps=7", "dataset=absolute_value").steps == 7


def test_an_experiment_wins_over_what_a_dataset_brings(compose, choices):
    config = compose("dataset=absolute_value", "experiment=debug")
    assert config.steps == OmegaConf.load(conf_dir() / "experiment" / "debug.yaml").steps != 3000
    assert config.dataset.n_train == 200
    assert choices("dataset=absolute_value", "experiment=debug")["loss"] == "mse"


def test_the_command_line_wins_over_an_experiment(compose):
    assert compose("experiment=debug", "steps=5", "model.width=4").steps == 5
    assert compose("experiment=debug", "model.width=4").model.width == 4


def test_the_lipschitz_constant_reaches_constraint_and_loss(compose):
    config = compose("lipschitz=3")
    assert config.constraint.lipschitz == config.loss.lipschitz == 3.0


@pytest.mark.parametrize("override", ["steps=foo", "stepz=3", "model.widht=3", "seed=1.5", "lipschitz=tall"])
def test_a_misspelt_key_or_a_wrong_type_is_an_error(compose, override):
    with pytest.raises(ConfigCompositionException):
        compose(override)


def test_a_loss_for_another_task_is_refused(compose):
    with pytest.raises(
        ConfigError, match=r"^loss=Hinge: is for classification, but dataset=AbsoluteValue is regr"
    ):
        build(compose("dataset=absolute_value", "loss=hinge"))
