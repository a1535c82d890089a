"""One configuration as checked objects, and runs of one signature as a stack."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from omegaconf import MISSING, DictConfig
from torch import Tensor

from lipexp.activations import as_activation
from lipexp.config import (
    GROUPS,
    ROOMS,
    SETTINGS,
    ConfigError,
    Settings,
    Unfit,
    instantiate,
    lipschitz_constant,
    number,
    one_of,
    plain,
    whole,
)
from lipexp.constraints import Constraint
from lipexp.datasets import Data, Dataset
from lipexp.loop import Stack, Streams
from lipexp.losses import as_loss, check_loss, losses_for, tasks_of
from lipexp.models import Layout, Model, signs
from lipexp.optim import Optimiser
from lipexp.tasks import SPLITS, TASKS

BASES = {"dataset": Dataset, "constraint": Constraint, "model": Model, "optim": Optimiser}


@dataclass
class Member:
    """One run before training: its settings, its objects, and what names them on the command line."""

    config: Settings
    names: dict[str, str]  # group -> the option chosen
    parts: dict[str, Any]  # group -> object

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(out, in) of each weight matrix of the model."""
        dataset: Dataset = self.parts["dataset"]
        return self.parts["model"].shapes(dataset.n_inputs, dataset.n_outputs)

    @property
    def layout(self) -> Layout:
        """Of the parameters of the run."""
        return self.parts["constraint"].layout(self.shapes, self.parts["act"])

    @property
    def signs(self) -> Tensor | None:
        """(D,) the directions of monotone inputs; see `models.signs`."""
        dataset: Dataset = self.parts["dataset"]
        return signs(self.parts["model"], dataset.features, dataset.n_inputs)

    @property
    def device(self) -> str:
        """The one to train on, cpu or cuda: auto takes a GPU if there is one."""
        automatic = "cuda" if torch.cuda.is_available() else "cpu"
        return automatic if self.config.device == "auto" else self.config.device

    @property
    def batch_size(self) -> int:
        """Points per step: all training points where there are fewer than were asked for."""
        return min(self.config.batch_size, self.parts["dataset"].n_train)

    def drawn(self, streams: Streams) -> Data:
        """The data of this run."""
        return drawn(self.parts["dataset"], streams.data, self.names["dataset"])


def build(
    content: DictConfig | Mapping[str, Any],
    choices: Mapping[str, Any] = {},
    here: bool = True,
    made: dict[str, Any] | None = None,
) -> Member:
    """Check one configuration and make its objects.

    Args:
        content: the composed configuration, without Hydra's own node.
        choices: the option chosen in each group, for messages.
        here: it will be trained on this machine, which must have its device.
        made: the objects that earlier calls have made, by their `made_key`: they are shared.

    Raises:
        ConfigError: whatever is wrong with it, by the name that the command line uses; Unfit, where its parts do
            not fit each other.
    """
    config = _settings(plain(content))
    if here and config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device", "cuda", "no CUDA device is available here (auto, cpu)")
    names = {
        group: str(choices.get(group) or str(plain(getattr(config, group)).get("_target_", "")).rpartition(".")[2])
        for group in GROUPS
    }
    parts: dict[str, Any] = {} if made is None else made
    keys = {group: made_key(group, getattr(config, group)) for group in GROUPS}
    for group, key in keys.items():
        if key not in parts:
            parts[key] = part(getattr(config, group), group, names[group])
    member = Member(config, names, {group: parts[key] for group, key in keys.items()})
    try:
        _check_together(member)
    except ConfigError as error:
        raise Unfit(error.option, error.value, error.allowed) from None
    return member


def _check_together(member: Member) -> None:
    """Raise ConfigError where parts that are right by themselves do not fit each other."""
    names, config = member.names, member.config
    dataset, loss, constraint, act = (member.parts[group] for group in ("dataset", "loss", "constraint", "act"))
    if (tasks := tasks_of(loss)) and dataset.task not in tasks:
        suitable = " or ".join(f"loss={option}" for option in losses_for(dataset.task))
        fitting = " or ".join(TASKS[task].called for task in tasks)
        own = TASKS[dataset.task].called
        allowed = f"is for {fitting}, but dataset={names['dataset']} has {own}: take {suitable}"
        raise ConfigError("loss", names["loss"], allowed)
    check_loss(loss, names["loss"], dataset.n_outputs, TASKS[dataset.task].has_classes)
    if dataset.p is not None and dataset.p != constraint.p:
        moving = f"must be the norm that constraint={names['constraint']} is for, p={constraint.p:g}"
        raise ConfigError("dataset.p", f"{dataset.p:g}", moving)
    for width, _ in member.shapes[:-1]:
        act.check_width(width)
    if member.shapes[0][1] != dataset.n_inputs or member.shapes[-1][0] != dataset.n_outputs:
        allowed = (
            f"must lead from {dataset.n_inputs} inputs to {dataset.n_outputs} outputs, not by {member.shapes}"
        )
        raise ConfigError("model", names["model"], allowed)
    constraint.check(act, names["act"])
    if constraint.needs_classes and not TASKS[dataset.task].decides:
        raise ConfigError("constraint", names["constraint"], f"is for classes, not for dataset={names['dataset']}")
    if member.signs is not None:
        if constraint.lipschitz is None:
            raise ConfigError("model.monotone", plain(config.model)["monotone"], "needs a constraint")
        if dataset.n_outputs != 1 or dataset.task == "transport":
            allowed = f"is for one output that is fitted, not for dataset={names['dataset']}"
            raise ConfigError("model.monotone", plain(config.model)["monotone"], allowed)


def made_key(group: str, node: Any) -> str:
    """What an object of `group` that is made from a configuration node is known by."""
    return repr((group, sorted(plain(node).items())))


def part(node: Any, group: str, name: str, trust: bool = True) -> Any:
    """The object of one group, checked against what the program asks of it.

    Args:
        name: the option chosen, for messages.
        trust: see `config.instantiate`.

    Raises:
        ConfigError: it cannot be made, or is none of its group.
    """
    found = instantiate(node, group, trust=trust)
    if group == "act":
        return as_activation(found)
    for argument in _per_run(found):
        if not isinstance(getattr(found, argument, None), int | float):
            raise ConfigError(group, name, f"names {argument} in per_run, but has no number of that name")
    if group == "loss":
        return as_loss(found, name)
    base = BASES[group]
    if not isinstance(found, base):
        allowed = f"cannot be used as {group}: it does not derive from {'.'.join(ROOMS[group])}"
        raise ConfigError(group, name, allowed)
    if isinstance(found, Dataset):
        task = TASKS[one_of(f"{group}.task", found.task, list(TASKS))]
        for count in ("n_inputs", "n_outputs", *(f"n_{split}" for split in SPLITS)):
            whole(f"{group}.{count}", getattr(found, count), least=1)
        if found.n_outputs > 1 and not task.several and task.has_classes:
            raise ConfigError(group, name, f"has {found.n_outputs} outputs; {found.task} needs one")
    return found


def _settings(content: Mapping[str, Any]) -> Settings:
    for key in SETTINGS:
        if content.get(key) in (None, MISSING):
            raise ConfigError(key, "null", "must be set")
    config = Settings(**{key: content[key] for key in SETTINGS})
    whole("seed", config.seed, least=0)
    lipschitz_constant("lipschitz", config.lipschitz)
    for key, least in (("steps", 0), ("batch_size", 1), ("eval_every", 0), ("patience", 0), ("max_regions", 0)):
        whole(key, content[key], least=least)
    whole("threads", config.threads, least=1, most=1024)
    for radius in config.radii:
        number("radii", radius, above=0)
    one_of("keep", config.keep, ["last", "best"])
    one_of("device", config.device, ["auto", "cpu", "cuda"])
    return config


# Stacks ----------------------------------------------------------------------------------------------------------


def signature(member: Member) -> str:
    """What runs of one stack must share: every argument but those that may differ between its runs."""
    shared: dict[str, Any] = {
        key: getattr(member.config, key) for key in SETTINGS if key not in (*GROUPS, "seed", "lipschitz", "resume")
    }
    for group in GROUPS:
        own = _per_run(member.parts[group])
        shared[group] = {k: v for k, v in getattr(member.config, group).items() if k not in own}
    return repr(sorted(shared.items()))


def _per_run(part: Any) -> tuple[str, ...]:
    """The arguments that may differ between the runs of a stack.

    Activations have none: networks are also evaluated one at a time, which must not change what they do.
    """
    return tuple(getattr(part, "per_run", ()))


def run_bytes(member: Member) -> int:
    """About how much memory one run of a stack takes: what grows with the number of runs, at its largest.

    In training: the batch at each layer, eight times, and the parameters, twelve times, in float32. In evaluation:
    the points, their targets, values, gradients and norms in float64, as numbers and as the text of gradients.csv.
    The factors were fitted to the peak of sweeps of 32 to 128 runs.
    """
    dataset = member.parts["dataset"]
    features = sum(n_out for n_out, _ in member.layout.shapes)
    parameters = sum(member.layout.sizes)
    n_points = sum(getattr(dataset, f"n_{split}") for split in SPLITS)
    points = n_points * (8 * dataset.n_inputs * dataset.n_outputs + 40)
    return 4 * (8 * member.batch_size * features + 12 * parameters) + 8 * points


def preferred_stack_size(member: Member) -> int:
    """The number of runs of a stack on a CPU whose features behind a layer together take 1 MiB.

    That is about the second-level cache of a core, so each operation finds its operands there. With fewer than
    four runs, too little of the fixed cost of a step would be shared.
    """
    widest = max(n_out for n_out, _ in member.shapes)
    return max(4, 2**20 // (4 * member.batch_size * widest))


def stack(members: Sequence[Member]) -> Stack:
    """One stack of runs that share their signature, with their data drawn.

    Raises:
        ValueError: they do not share it.
        ConfigError: a dataset draws something else than it declares.
    """
    if len({signature(member) for member in members}) > 1:
        raise ValueError("runs of different signatures cannot be trained as one stack")
    config = members[0].config
    streams = [Streams.of(int(member.config.seed)) for member in members]
    return Stack(
        **{group: _stacked(group, members) for group in ("model", "act", "constraint", "loss", "optim")},
        layout=members[0].layout,
        task=TASKS[members[0].parts["dataset"].task],
        data=[member.drawn(own) for member, own in zip(members, streams, strict=True)],
        streams=streams,
        steps=config.steps,
        batch_size=members[0].batch_size,
        eval_every=config.eval_every,
        keep=config.keep,
        patience=config.patience,
        max_regions=config.max_regions,
    )


def _stacked(group: str, members: Sequence[Member]) -> Any:
    """The object of `group` for all members: a copy of the first one's, with (K,) tensors for what may differ."""
    one = copy.deepcopy(members[0].parts[group])
    if group == "constraint":
        one.signs = members[0].signs
    for name in _per_run(one):
        values = [float(getattr(member.parts[group], name)) for member in members]
        setattr(one, name, torch.tensor(values, dtype=torch.float64))
    return one


def drawn(dataset: Dataset, stream: np.random.SeedSequence, name: str) -> Data:
    """The data that `dataset`, called `name` in the configuration, draws from `stream`, in float32.

    Raises:
        ConfigError: they contradict what it declares.
    """
    arrays: Any = dataset.draw(stream)
    if not isinstance(arrays, tuple) or len(arrays) != len(Data._fields):
        raise ConfigError("dataset", name, f"must draw lipexp.datasets.Data, not {type(arrays).__name__}")
    data = Data(*(np.asarray(array, dtype=np.float32) for array in arrays))
    task = TASKS[dataset.task]
    of_target = () if dataset.n_outputs == 1 or task.has_classes else (dataset.n_outputs,)
    for split in SPLITS:
        n = getattr(dataset, f"n_{split}")
        for what, shape in ((f"{split}_x", (n, dataset.n_inputs)), (f"{split}_y", (n, *of_target))):
            array = getattr(data, what)
            if array.shape != shape:
                allowed = f"draws {what} of shape {array.shape}, but declares {shape}"
                raise ConfigError("dataset", name, allowed)
            if not np.isfinite(array).all():
                raise ConfigError("dataset", name, f"draws {what} with numbers that are not finite")
        _, targets = data.part(split)
        n_classes = dataset.n_outputs if task.several else 2
        if task.has_classes and not np.isin(targets, range(n_classes)).all():
            allowed = f"draws targets that are not {task.targets}, as {dataset.task} needs"
            raise ConfigError("dataset", name, allowed)
    return data
