"""Configurations as checked objects: what a room asks of its members, and which runs train together."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import INLINE, TINY

from lipexp.activations import GroupSort, LeakyReLU
from lipexp.config import ConfigError
from lipexp.constraints import LInf, Spectral
from lipexp.datasets import (
    AbsoluteValue,
    Annulus,
    Checkerboard,
    Circles,
    Cones,
    DigitsParity,
    Flower,
    Spirals,
    TwoMoons,
)
from lipexp.evaluate import Evaluator
from lipexp.loop import Trainer, fit
from lipexp.losses import (
    BCE,
    HKR,
    CertifiedRadius,
    CrossEntropy,
    Hinge,
    Huber,
    Kantorovich,
    MultiMargin,
    SoftHKR,
    SoftMargin,
)
from lipexp.members import build, signature, stack
from lipexp.models import MLP
from lipexp.optim import SGD, Adam, AggMo


@pytest.fixture
def member(compose):
    """member("loss=bce", act={"_target_": "torch.nn.Tanh"}) -> a run, with some nodes in the place of others."""

    def member(*overrides, **nodes):
        return build({**compose("model.width=8", *TINY, *overrides), **nodes})

    return member


# What is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name", "values"),
    [
        *((GroupSort, name, [0, 2.0, "2", True]) for name in ("n_groups", "group_size")),
        (LeakyReLU, "slope", [0, 1e-10, 1.5, math.nan]),
        *((kind, "lipschitz", [0, 1e31]) for kind in (Spectral, LInf, Hinge, Kantorovich)),
        (LInf, "p", [3, "x", math.nan, -1, [2]]),
        *((BCE, "temperature", [0]), (Hinge, "margin", [-0.1])),
        *((CrossEntropy, "temperature", [0]), (MultiMargin, "margin", [-0.1]), (Huber, "delta", [0])),
        *((kind, "alpha", [-0.1, 1.1]) for kind in (HKR, SoftHKR)),
        *((kind, "temperature", [0]) for kind in (SoftMargin, SoftHKR)),
        *((HKR, "margin", [-0.1]), (CertifiedRadius, "radius", [0])),
        *((Circles, "factor", [-0.1, 1]), (Spirals, "n_classes", [1, 2.5]), (Spirals, "turns", [-1])),
        *((TwoMoons, "noise", [-0.1]), (TwoMoons, "scale", [0]), (Cones, "p", [3]), (Cones, "spacing", [1.9])),
        *(
            (Cones, "n_inputs", [0]),
            (Cones, "n_cones", [0]),
            (Flower, "petals", [-1]),
            (Flower, "depth", [-0.1, 1]),
        ),
        *((Checkerboard, "n_cells", [1]), (Checkerboard, "cell", [0]), (Checkerboard, "gap", [-0.1, 2.0])),
        *((Annulus, name, [bad]) for name, bad in (("n_inputs", 0), ("radius", 0), ("gap", -0.1), ("width", 0))),
        *((kind, name, [0]) for kind in (TwoMoons, AbsoluteValue, DigitsParity) for name in ("n_train", "n_test")),
        (DigitsParity, "n_train", [1398]),
        *((MLP, "width", [0, 1.5]), (MLP, "depth", [-1, 1.5])),
        *((Adam, "lr", [0]), (Adam, "eps", [0]), (Adam, "weight_decay", [-1]), (Adam, "schedule", ["cosin"])),
        (Adam, "betas", [0.9, [0.9], [0.9, 1.0], [-0.1, 0.9], ["a", "b"]]),
        *((Adam, "clip", [0, "x"]), (Adam, "milestones", [0.5, [], [1.0], ["a"]]), (Adam, "decay", [0, 1.5])),
        *((SGD, "momentum", [-0.1, 1.1]), (SGD, "nesterov", [1, "yes"]), (AggMo, "betas", [0.9, [], [1.0]])),
    ],
)
def test_a_bad_argument_is_named(kind, name, values):
    for value in values:
        with pytest.raises(ConfigError, match=f"^{name}={re.escape(str(value))}: .+"):
            kind(**{name: value})


class Moons(TwoMoons):
    """Moons that change what they draw or declare."""

    def __init__(self, n_outputs=1, task="classification", per_run=(), **drawn):
        super().__init__(n_train=64, n_val=32, n_test=32)
        self.n_outputs, self.task, self.per_run, self.drawn = n_outputs, task, per_run, drawn

    def draw(self, stream):
        return super().draw(stream)._replace(**{name: np.array(value) for name, value in self.drawn.items()})


class Narrow(MLP):
    def shapes(self, n_inputs, n_outputs):
        return [(8, 3), (1, 8)]


class Forgetful(Spectral):
    per_run = ("lipschitz", "slack")


class Unrelated:
    """It has all that is asked of a model, but does not derive from Model."""

    shapes, initial = MLP.shapes, MLP.initial


REFUSED = [
    ("dataset", "Unrelated", {}, "cannot be used as dataset: it does not derive from lipexp.datasets.Dataset$"),
    ("constraint", "Unrelated", {}, "cannot be used .* does not derive from lipexp.constraints.Constraint$"),
    ("model", "Unrelated", {}, "cannot be used as model: it does not derive from lipexp.models.Model$"),
    ("optim", "Unrelated", {}, "cannot be used as optim: it does not derive from lipexp.optim.Optimiser$"),
    ("act", "Unrelated", {}, "must be a map of features"),
    ("loss", "Unrelated", {}, "must be a function of outputs and targets"),
    ("loss", "torch.nn.HuberLoss", {}, r'must return one number per sample.* shape \(\) \(reduction="none"\?\)'),
    (
        "act",
        "torch.nn.PReLU",
        {},
        r"has parameters or buffers of torch \(function.weight\); its own are declared by n_parameters",
    ),
    ("dataset", "Moons", {"per_run": ["task"]}, "names task in per_run, but has no number of that name"),
    ("loss", "torch.nn.Linear", {"in_features": 3, "out_features": 2}, "cannot be used: TypeError: "),
    ("model", "Narrow", {}, "must lead from 2 inputs to 1 output"),
    ("constraint", "Forgetful", {}, "names slack in per_run, but has no number of that name"),
    ("dataset", "Moons", {"per_run": ["size"]}, "names size in per_run, but has no number of that name"),
    ("dataset", "Moons", {"n_outputs": 2}, "has 2 outputs; classification needs one"),
    ("dataset", "Moons", {"test_x": [[0.0]] * 32}, r"draws test_x of shape \(32, 1\), but declares \(32, 2\)"),
    ("dataset", "Moons", {"test_y": [[0]] * 32}, r"draws test_y of shape \(32, 1\), but declares \(32,\)"),
    ("dataset", "Moons", {"train_y": [0] * 65}, r"draws train_y of shape \(65,\), but declares \(64,\)"),
    ("dataset", "Moons", {"train_x": [[0, math.nan]] * 64}, "draws train_x with numbers that are not finite"),
    ("dataset", "Moons", {"train_y": [-1, 1] * 32}, "draws targets that are not 0 and 1, as classification needs"),
]


@pytest.mark.parametrize(("group", "target", "arguments", "message"), REFUSED)
def test_what_does_not_fit_its_room_is_refused_in_one_line(member, group, target, arguments, message):
    target = target if "." in target else f"{__name__}.{target}"
    with pytest.raises(ConfigError, match=rf"^{group}={target.rpartition('.')[2]}: {message}") as caught:
        stack([member(**{group: {"_target_": target, **arguments}})])
    assert "\n" not in str(caught.value)


# What works as it is --------------------------------------------------------------------------------------------


def test_modules_of_torch_work_as_they_are(member):
    nodes = {"act": {"_target_": "torch.nn.Tanh"}, "loss": {"_target_": "torch.nn.HuberLoss", "reduction": "none"}}
    runs = stack([member("constraint=none", f"seed={seed}", **nodes) for seed in range(2)])
    evaluator, last = Evaluator(runs), fit(runs, lambda checkpoint: None)
    for run, row in enumerate(evaluator.history(last)):
        f = last.network.double(evaluator.x)[run, evaluator.parts["val"], 0]
        assert row["val_loss"] == pytest.approx(
            float(torch.nn.HuberLoss()(f, evaluator.y[run, evaluator.parts["val"]])), rel=1e-9
        )


COUNTED = """
from lipexp.activations import ReLU
from lipexp.datasets import TwoMoons
from lipexp.models import MLP

made = []

def counted(base):
    def __init__(self, **arguments):
        made.append(base.__name__)
        base.__init__(self, **arguments)
    return type(base.__name__, (base,), {"__init__": __init__})

Act, Data, Net = counted(ReLU), counted(TwoMoons), counted(MLP)
"""


def test_objects_are_constructed_once(lipexp, monkeypatch):
    Path("counts.py").write_text(COUNTED)
    monkeypatch.delitem(sys.modules, "counts", raising=False)
    own = ["act=relu", *(f"{group}._target_=counts.{name}" for group, name in (("act", "Act"), ("model", "Net")))]
    own.append("dataset._target_=counts.Data")
    assert lipexp("train", *TINY, *own).code == 0
    made = sys.modules["counts"].made
    assert sorted(made) == ["MLP", "ReLU", "TwoMoons"]
    made.clear()
    sweep = ("seed=1,2", "dataset.noise=0.1,0.2", "eval_every=1,2")
    assert lipexp("train", "-m", *TINY, *own, INLINE, *sweep).code == 0
    assert sorted(made) == ["MLP", "ReLU", "TwoMoons", "TwoMoons"]  # one for each noise; both stacks share them


# Stacks ---------------------------------------------------------------------------------------------------------


def test_what_may_differ_within_a_stack_becomes_a_tensor(member):
    changes = (
        "seed=3",
        "lipschitz=2",
        "optim.lr=0.1",
        "optim.weight_decay=0.1",
        "loss.margin=0.1",
        "dataset.noise=0",
    )
    members = [member(), member(*changes)]
    assert signature(members[0]) == signature(members[1])
    runs = stack(members)
    assert (runs.optim.lr.tolist(), runs.optim.weight_decay.tolist()) == ([0.01, 0.1], [0, 0.1])
    assert runs.constraint.lipschitz.tolist() == runs.loss.lipschitz.tolist() == [1, 2]
    assert runs.loss.margin.tolist() == [0.5, 0.1]
    assert members[0].parts["loss"].margin == 0.5  # the objects of the members are left alone
    clipping = stack([member("optim=sgd", f"optim.clip={clip}", f"optim.momentum={clip / 3}") for clip in (1, 3)])
    assert (clipping.optim.clip.tolist(), clipping.optim.momentum.tolist()) == ([1, 3], [1 / 3, 1])


@pytest.mark.parametrize(
    "override",
    [
        *(
            "act=relu",
            "act=fullsort",
            "constraint=linf",
            "loss=bce",
            "model.width=10",
            "model.depth=3",
            "steps=21",
        ),
        *("batch_size=31", "eval_every=5", "dataset.scale=1", "optim.schedule=linear", "optim.clip=1"),
    ],
)
def test_what_may_not_differ_makes_another_signature(member, override):
    with pytest.raises(ValueError, match="signature"):
        stack([member(), member(override)])


def test_a_step_takes_all_training_points_where_there_are_fewer_than_a_batch(member):
    one = member("dataset.n_train=20", "batch_size=256")
    assert (one.batch_size, stack([one]).batch_size) == (20, 20)
    assert Trainer(stack([one])).step().isfinite().all()
