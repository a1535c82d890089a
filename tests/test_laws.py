"""The laws of the rooms hold for every file of conf/, each of them can fail, and `lipexp check` says so."""

from __future__ import annotations

import functools
import random
import re
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CONF, choices_in, defaults_of, part, suits
from omegaconf import DictConfig, OmegaConf

from lipexp.activations import ALL_NORMS, Activation, ActiveMap, NActivation, ReLU, Tanh
from lipexp.blocks import Affine
from lipexp.check import composed
from lipexp.config import GROUPS, ConfigError
from lipexp.constraints import Spectral
from lipexp.datasets import TwoMoons
from lipexp.laws import LAWS, Broken, Subject, statement
from lipexp.losses import Hinge, tasks_of
from lipexp.models import MLP
from lipexp.optim import Adam
from lipexp.tasks import TASKS

# What the laws are called for ------------------------------------------------------------------------------------

DEFAULTS = {
    f"{group}={option}"
    for entry in OmegaConf.load(CONF / "config.yaml").defaults
    if isinstance(entry, DictConfig)
    for group, option in entry.items()
}
CHOICES = [choice for group in GROUPS for choice in choices_in(group)]


def fits(row):
    """Whether the options of a row, one of each group, can train together."""
    _, act, constraint, *_ = row
    dataset, loss = part(row[0]), part(row[3])
    fitting = not part(constraint).needs_classes or TASKS[dataset.task].decides
    return suits(act, constraint) and fitting and dataset.task in (tasks_of(loss) or (dataset.task,))


def row_with(choice, ordered):
    """The first row with this option, the options of each group being tried as `ordered` puts them."""
    groups = [[choice] if group == choice[0].partition("=")[0] else ordered(choices_in(group)) for group in GROUPS]
    return next(row for row in product(*groups) if fits(row))


def nearest(choice):
    """The row with this option whose others are the defaults, as far as they fit."""
    return row_with(choice, lambda choices: sorted(choices, key=lambda one: one[0] not in DEFAULTS))


def drawn(choice):
    """A row with this option whose others are drawn at random, the same at every call.

    The optimiser stays Adam. Steps in proportion to the gradient are unstable where a loss is too steep for them,
    and rounding errors then grow from step to step.
    """
    rng = random.Random(spelled(choice))

    def ordered(choices):
        default = [one for one in choices if one == ("optim=adam",)]
        return default or rng.sample(choices, len(choices))

    return row_with(choice, ordered)


def spelled(overrides):
    return ",".join(overrides)


MIXED = [drawn(choice) for group in ("act", "constraint") for choice in choices_in(group)]


@functools.cache
def content(row):
    return composed([override for choice in row for override in choice])


@pytest.mark.parametrize("choice", CHOICES, ids=spelled)
def test_every_law_of_its_room_holds_for_an_option(choice):
    subject = Subject(*content(nearest(choice)))
    reasons = [law(subject) for law in LAWS[choice[0].partition("=")[0]]]
    assert None in reasons, reasons


@pytest.mark.parametrize(
    "row", dict.fromkeys([*map(nearest, CHOICES), *MIXED]), ids=lambda row: spelled(sum(row, ()))
)
def test_every_law_of_runs_holds_for_every_option_alone_and_among_others(row):
    subject = Subject(*content(row))
    assert [law(subject) for law in LAWS["run"]] == [None] * len(LAWS["run"])


# Every law can fail ----------------------------------------------------------------------------------------------


def act(forward, **declared):
    """A class of activations, said to be 1-Lipschitz, so that it trains under a constraint."""
    return type("Act", (Activation,), {"norms": ALL_NORMS, "forward": lambda self, z: forward(z), **declared})


def but(base, **methods):
    """A class that differs from its base in these methods."""
    return type(base.__name__, (base,), methods)


def identity_map(self, z):
    return ActiveMap(np.broadcast_to(np.arange(z.shape[-1]), z.shape), np.ones(z.shape, dtype=np.int64))


def rotated(z):
    """By 45 degrees in planes of two features: 1-Lipschitz in the 2-norm alone."""
    a, b = z.chunk(2, dim=-1)
    return torch.cat([a + b, a - b], dim=-1) / 2**0.5


def applied(change):
    """Spectral with this change of weights and biases in training, but not in baking."""
    return but(
        Spectral, apply=lambda self, layers: [Affine(*map(change, one)) for one in Spectral.apply(self, layers)]
    )


def baked(change, factor=1.0):
    """Spectral with this change of weights and biases in baking only, and the proven norms times `factor`."""

    def bake(self, layers, act):
        network = Spectral.bake(self, layers, act)
        norms = [[factor * norm for norm in runs] for runs in network.norms]
        return replace(network, layers=[Affine(*map(change, layer)) for layer in network.layers], norms=norms)

    return but(Spectral, bake=bake)


def at_the_lower_input(self, low, high):
    return Tanh.slopes_between(self, low, low)


def with_an_error_of_a_billionth(self, z):
    value, error = Tanh.enclosed(self, z)
    return value + 1e-9, error


def margin_of_the_first_run(self, f, y):
    return torch.relu(torch.as_tensor(self.margin).flatten()[0] - (2 * y - 1) * f)


def signs(self, parameters, gradient, progress):
    parameters -= 0.01 * torch.where(gradient < 0, -1, 1)


def mixing(self, parameters, gradient, progress):
    Adam.step(self, parameters, gradient - gradient.mean(dim=0), progress)


moons, mlp, adam = (functools.partial(but, base) for base in (TwoMoons, MLP, Adam))
draw, initial, step = TwoMoons.draw, MLP.initial, Adam.step
TOO_MANY = TwoMoons(n_train=65)
LAST = {"breakpoints": lambda self, width: np.array([[width - 1, -1]])}
OF_THE_LAST = {"breakpoints": lambda self, width: np.tile([width - 1, -1], (2 * width, 1))}
DOWN = {"groups": lambda self, width: np.arange(width)[None]}
TWICE = {"groups": lambda self, width: np.zeros((1, width), dtype=int)}

# A law, the group of a class that breaks it, and the class.
BROKEN = [
    ("keeps_shape_and_type", "act", act(torch.Tensor.double)),
    ("keeps_shape_and_type", "act", act(lambda z: z[..., :4])),
    ("keeps_shape_and_type", "act", act(torch.relu_)),
    ("is_lipschitz_in_its_norms", "act", act(lambda z: 2 * z)),
    ("is_lipschitz_in_its_norms", "act", act(rotated)),
    ("has_slopes_within_its_range", "act", act(torch.relu, slopes=(0.1, 1))),
    ("has_slopes_within_its_range", "act", act(torch.relu, slopes=(0, 0.9))),
    ("has_slopes_within_its_range", "act", act(rotated, slopes=(-1, 1))),
    ("has_slopes_between_two_inputs_within_their_hull", "act", but(Tanh, slopes_between=at_the_lower_input)),
    ("encloses_its_values", "act", but(Tanh, enclosed=with_an_error_of_a_billionth)),
    ("sorts_its_groups", "act", act(lambda z: z.sort(descending=True).values, **DOWN)),
    ("sorts_its_groups", "act", act(lambda z: z.sort().values, **TWICE)),
    ("equals_its_active_map", "act", act(torch.relu, active_map=identity_map)),
    ("equals_its_active_map", "act", but(ReLU, active_map=lambda self, z: None)),
    ("equals_its_active_map", "act", but(ReLU, active_map=lambda self, z: ReLU.active_map(self, z.reshape(-1)))),
    ("equals_its_active_map", "act", but(NActivation, thresholds=lambda self, width: np.zeros(2 * width))),
    ("changes_at_its_breakpoints_only", "act", but(ReLU, **LAST)),
    ("changes_at_its_breakpoints_only", "act", but(NActivation, **OF_THE_LAST)),
    ("treats_every_run_and_point_alone", "act", act(lambda z: z - z.mean(dim=1, keepdim=True))),
    ("treats_every_run_and_point_alone", "act", act(lambda z: z - z.mean(dim=0, keepdim=True))),
    ("has_finite_gradients", "act", act(lambda z: z.abs().sqrt())),
    ("keeps_parameters_that_are_within_its_range", "act", but(NActivation, within=lambda self, t, scale: 2 * t)),
    (
        "keeps_parameters_that_are_within_its_range",
        "act",
        but(NActivation, initial=lambda self, width: torch.zeros(1)),
    ),
    ("baked_networks_keep_the_bound", "constraint", baked(lambda w: 2 * w)),
    ("proven_norms_are_those_of_the_stored_numbers", "constraint", baked(lambda w: w, factor=0.5)),
    ("proven_norms_are_those_of_the_stored_numbers", "constraint", but(Spectral, target=lambda self, run: 0.9)),
    ("training_works_with_what_is_baked", "constraint", applied(lambda w: 0.9 * w)),
    ("training_works_with_what_is_baked", "constraint", baked(lambda w: w.roll(1, dims=0))),
    ("stacked_runs_equal_single_ones", "constraint", applied(lambda w: w - 0.1 * w.mean(dim=0))),
    ("has_true_finite_gradients", "constraint", applied(lambda w: 2 * w - w.detach())),
    ("has_true_finite_gradients", "constraint", applied(lambda w: w + 0 * (w - w.detach()).abs().sqrt())),
    ("one_number_per_sample", "loss", lambda f, y: (f - y).log()),
    ("one_number_per_sample", "loss", lambda f, y: (f - y).square()[:1]),
    ("is_a_mean_over_samples", "loss", lambda f, y: f.shape[1] * (f - y).square()),
    ("is_a_mean_over_samples", "loss", lambda f, y: (f - y).square().cumsum(dim=1)),
    ("stacked_runs_equal_single_ones", "loss", but(Hinge, forward=margin_of_the_first_run)),
    ("stacked_runs_equal_single_ones", "loss", lambda f, y: (f - f.mean(dim=0) - y).square()),
    ("loss_has_true_finite_gradients", "loss", lambda f, y: f.square().detach() + f),
    (
        "loss_has_true_finite_gradients",
        "loss",
        lambda f, y: -((1 - f.sigmoid()).log() * (1 - y) + f.sigmoid().log() * y),
    ),
    ("draws_what_it_declares", "dataset", moons(draw=lambda self, s: draw(TOO_MANY, s))),
    ("draws_the_same_from_the_same_stream", "dataset", moons(draw=lambda self, s: draw(self, s.spawn(1)[0]))),
    (
        "keeps_training_apart",
        "dataset",
        moons(draw=lambda self, s: (data := draw(self, s))._replace(test_x=data.train_x[:32])),
    ),
    (
        "keeps_training_apart",
        "dataset",
        moons(
            draw=lambda self, s: (data := draw(self, s))._replace(val_x=np.resize(data.train_x, data.val_x.shape))
        ),
    ),
    ("starts_the_same_from_the_same_stream", "model", mlp(initial=lambda self, s, g: initial(self, s, None))),
    ("starts_the_same_from_the_same_stream", "model", mlp(initial=lambda self, s, g: initial(self, s, g)[1:])),
    ("leads_from_inputs_to_outputs", "model", mlp(shapes=lambda self, n_in, n_out: [(8, 2), (1, 8)])),
    ("stacked_runs_equal_single_ones", "optim", adam(step=mixing)),
    ("descends", "optim", adam(step=lambda self, p, g, t: step(self, p, -g, t))),
    ("descends", "optim", adam(step=signs)),
    ("stacked_runs_equal_single_ones", "act", act(lambda z: z - 0.01 * z.mean(dim=0))),
    ("measured_is_below_proven", "act", act(lambda z: 2 * z)),
    ("measured_is_below_proven", "act", act(lambda z: z, slopes=(0, 0.5))),
    ("measured_is_below_proven", "constraint", baked(lambda w: 2 * w)),
    ("measured_gradients_are_slopes", "act", act(lambda z: torch.relu(z).detach() + z - z.detach())),
]
BY_NAME = {law.__name__: law for laws in LAWS.values() for law in laws}


def broken(number, **arguments):
    """What the configuration of a broken class names as its `_target_`."""
    thing = BROKEN[number][2]
    return thing(**arguments) if isinstance(thing, type) else thing


def test_every_law_has_a_class_that_breaks_it():
    assert {law for law, _, _ in BROKEN} == BY_NAME.keys()


@pytest.mark.parametrize("number", range(len(BROKEN)), ids=[f"{law}-{i}" for i, (law, _, _) in enumerate(BROKEN)])
def test_a_law_is_broken_by_a_class_that_breaks_it(number):
    law, group, thing = BROKEN[number]
    settings, choices = content(())
    arguments = defaults_of(thing) if isinstance(thing, type) else {}
    node = {"_target_": f"{__name__}.broken", "number": number, **arguments}
    with pytest.raises(Broken):
        BY_NAME[law](Subject({**settings, group: node}, choices))


# Classes that are sound ------------------------------------------------------------------------------------------


class Lattice(TwoMoons):
    """Points with whole coordinates, of which many coincide; the same for every seed."""

    def draw(self, stream):
        x = np.random.default_rng(0).integers(0, 4, size=(128, 2)).astype(np.float32)
        y = (x.sum(axis=1) > 3).astype(np.float32)
        return tuple(np.split(part, [64, 96])[i] for i in range(3) for part in (x, y))  # a tuple does as well


class Planar(MLP):
    """For two inputs only, and always from the same numbers, zero in the last layer."""

    def shapes(self, n_inputs, n_outputs):
        if (n_inputs, n_outputs) != (2, 1):
            raise ConfigError("n_inputs", n_inputs, "must be 2")
        return super().shapes(n_inputs, n_outputs)

    def initial(self, shapes, generator):
        start = super().initial(shapes, torch.Generator().manual_seed(0))
        start[-shapes[-1][1] - 1 :] = 0
        return start


SOUND = [
    ("dataset", Lattice, {"n_train": 64, "n_val": 32, "n_test": 32}),
    ("model", Planar, {"width": 8, "depth": 2}),
    ("loss", lambda f, y: ((1 - 2 * y) * f).exp(), {}),
]


def sound(number, **arguments):
    thing = SOUND[number][1]
    return thing(**arguments) if isinstance(thing, type) else thing


@pytest.mark.parametrize("number", range(len(SOUND)), ids=[group for group, *_ in SOUND])
def test_laws_hold_for_unusual_classes(number):
    group, _, arguments = SOUND[number]
    settings, choices = content((("constraint=none",),))
    node = {"_target_": f"{__name__}.sound", "number": number, **arguments}
    subject = Subject({**settings, "batch_size": 16, group: node}, choices)
    assert subject.member.config.batch_size == 16
    assert [law(subject) for law in LAWS[group]] == [None] * len(LAWS[group])


def test_an_argument_that_the_yaml_leaves_out_differs_between_the_runs_of_a_stack_as_well():
    settings, choices = content(())
    subject = Subject({**settings, "loss": {"_target_": "lipexp.losses.Hinge"}}, choices)
    assert [one.parts["loss"].margin for one in subject.variants(3)] == pytest.approx([0.5, 0.4, 0.3])


# The command -----------------------------------------------------------------------------------------------------

MINE = """
from lipexp.activations import ReLU

class Steep(ReLU):
    norms = (2,)

    def forward(self, z):
        return 2 * super().forward(z)
"""


@pytest.fixture
def check(lipexp):
    """check("act=mine") -> Result: the command beside mine.py and my_conf/."""
    Path("mine.py").write_text(MINE)
    Path("my_conf/act").mkdir(parents=True)
    Path("my_conf/act/mine.yaml").write_text("_target_: mine.Steep\n")
    yield lambda *arguments: lipexp("check", *arguments)
    sys.modules.pop("mine", None)


def test_a_sound_option_is_checked_with_exit_status_0(check):
    done = check("loss.margin=0.25", "loss=hinge")
    lines = [f"  holds   {statement(law)}" for law in (*LAWS["loss"], *LAWS["run"])]
    lines.insert(len(LAWS["loss"]), "the whole run")
    assert (done.code, done.err, done.out.splitlines()) == (0, "", ["loss=hinge", *lines])


def test_a_broken_law_is_shown_with_its_counterexample(check):
    done = check("-cd", "my_conf", "act=mine")
    lines = done.out.splitlines()
    place = lines.index("  BROKEN  |act(a) - act(b)| <= |a - b| in every norm that it declares.")
    assert re.match(r" +in norm 2: \S+ > \S+ at a = \[.*\], b = \[.*\]$", lines[place + 1])
    count = sum(line.startswith("  BROKEN") for line in lines)
    assert (done.code, done.err) == (1, f"lipexp: {count} laws are broken\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["act=rel"], "act=rel: no such option; did you mean act=relu?"),
        (["act=relu", "model.widht=8"], "model.widht: no such setting; did you mean model.width?"),
        (["-cd", "nowhere", "act=mine"], "--config-dir=nowhere: is no folder"),
        (["act._target_=mine.Missing"], "act._target_=mine.Missing: cannot be used: mine has no Missing"),
        (["act=relu", "--all"], "unrecognized arguments: --all"),
    ],
)
def test_bad_input_is_one_line(check, arguments, message):
    done = check(*arguments)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert done.err.startswith(f"lipexp: {message}")
