"""Networks from elsewhere, certified: `lipexp certify NET --data FILE`, and `lipexp.certify` in Python."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from lipexp import record
from lipexp.arguments import check_output
from lipexp.config import ConfigError, one_of
from lipexp.finding import Finding, Request, Subject, default, look
from lipexp.fitting import Option
from lipexp.foreign import of, read
from lipexp.foreign.network import Foreign
from lipexp.foreign.points import Points, finite, labels
from lipexp.loop import generator
from lipexp.networks import BakedNetwork
from lipexp.process import cpu_threads
from lipexp.proven import Chain
from lipexp.proven.radii import predicted
from lipexp.runs import write_file
from lipexp.screen import Screen
from lipexp.wording import above, count, interval_line

TASKS = ("classification", "regression")
NO_RADII = "is for radii, which a regression has not"
SEED = 0  # of the searches for steep points, and of the attack


@dataclass(repr=False)
class Certified(record.Certification):
    """What is proven and measured of a network from elsewhere; the fields are those of metrics.json.

    `lipschitz` is the interval measured <= constant <= certified, `bounds` what each method proved, `robustness`
    the certified radii of a classifier in summary, and `radii` those of each point. Without classes for the
    points, the radii are those of the predicted class, which counts as right.
    """

    notes: list[str] = field(default_factory=list)  # what was left off behind the outputs
    rounding: float = 0.0  # the largest relative change of a number that was rounded to float32, at most 2^-24
    radii: pd.DataFrame | None = None  # a row for each point; None: there are none
    network: BakedNetwork | None = None  # what was certified, of which `rounding` is a part

    def __repr__(self) -> str:
        return f"<certified: {interval_line(self.lipschitz)}>"

    def json(self) -> dict[str, Any]:
        """All but the radii of each point and the network, as it is written by --json."""
        whole = dataclasses.replace(self, radii=None, network=None)
        own = dataclasses.asdict(whole)
        return {name: own[name] for name in own if name not in ("radii", "network", "changed")}


@dataclass(frozen=True)
class Asked:
    """A network and the points that it is certified on."""

    foreign: Foreign
    x: np.ndarray[Any, Any]  # (N, D) float64
    y: np.ndarray[Any, Any] | None  # (N,) numbers of classes
    decides: bool


def _found(asked: Asked, request: Request, report: Callable[[str], None]) -> Finding:
    p = 2.0 if request.p is None else request.p
    network, chain = Chain.without_bound(asked.foreign.network, p)
    x, decided = torch.from_numpy(asked.x), None
    if asked.decides:
        y = asked.y
        if y is None:
            y = predicted(network.double(x.unsqueeze(0))[0].numpy())
        nothing = x[:0], x.new_zeros(0)
        decided = {"val": nothing, "test": (x, torch.from_numpy(y).double())}
    limit = default("max_regions") if request.max_regions is None else request.max_regions
    subject = Subject(network, chain, x, decided, limit, lambda: generator(np.random.SeedSequence(SEED)))
    return look(subject, request, report)


def _certified(asked: Asked, finding: Finding, digest: str, radii: Sequence[float]) -> Certified:
    section = finding.section(digest, None, radii)
    own = {part.name: getattr(section, part.name) for part in dataclasses.fields(section)}
    table = None
    if finding.robustness is not None and finding.robustness.columns is not None:
        table = pd.DataFrame(finding.robustness.of("test")).drop(columns="split")
        if asked.y is None:
            table = table.drop(columns=["y", "correct"])
    foreign = asked.foreign
    return Certified(
        **own, notes=list(foreign.notes), rounding=foreign.rounding, radii=table, network=foreign.network
    )


def _digest(network: BakedNetwork) -> str:
    """The SHA-256 of the numbers of a network that lies in no file."""
    parts = [part.contiguous().numpy().tobytes() for part in network.state_dict().values()]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def _for_radii(request: Request, task: str | None, dashes: str = "") -> None:
    """Refuse what is asked of radii where there are none."""
    if task == "regression" and request.attack:
        raise ConfigError(f"{dashes}attack", None, NO_RADII)
    if task == "regression" and request.radii is not None:
        raise ConfigError(f"{dashes}radii", ",".join(f"{radius:g}" for radius in request.radii), NO_RADII)


# In Python -------------------------------------------------------------------------------------------------------


def certify(net: Any, x: Any, y: Any, act: Option | None, task: str | None, request: Request) -> Certified:
    """See `lipexp.certify`."""
    try:
        return _certify(net, x, y, act, task, request.checked())
    except ConfigError as error:
        if not error.option.startswith("--"):
            raise
        name = error.option.removeprefix("--").replace("-", "_")  # as Python spells it
        raise ConfigError(name, error.value, error.allowed) from None


def _certify(net: Any, x: Any, y: Any, act: Option | None, task: str | None, request: Request) -> Certified:
    if task is not None:
        one_of("task", task, TASKS)
    _for_radii(request, task)
    points = np.asarray(x.detach().cpu() if isinstance(x, torch.Tensor) else x)
    flat = finite("x", None, points)
    body = getattr(net, "network_", None)  # of a fitted estimator of lipexp, which takes X - center_
    classes: Sequence[Any] = ()
    if isinstance(body, BakedNetwork):
        flat, classes = flat - net.center_, getattr(net, "classes_", ())
        decides = hasattr(net, "certified_radius")
        foreign = Foreign(body, 0.0)
    else:
        last = net.steps[-1][1] if hasattr(net, "steps") else net
        decides = not (hasattr(last, "predict") and hasattr(last, "get_params")) or hasattr(last, "classes_")
        foreign = of(net, points.shape[1:], decides and task != "regression", act)
        classes = foreign.classes
    decides = decides and task != "regression"
    if foreign.network.n_inputs != flat.shape[1]:
        raise ConfigError(
            "x",
            None,
            f"has {count(flat.shape[1], 'column')}, the network {count(foreign.network.n_inputs, 'input')}",
        )
    numbers = None
    if y is not None and decides:
        own = y.detach().cpu().numpy() if isinstance(y, torch.Tensor) else y
        numbers = labels(own, len(flat), foreign.network.n_outputs, classes)
    given = Asked(foreign, flat, numbers, decides)
    radii = default("radii") if request.radii is None else request.radii
    finding = _found(given, request, lambda text: None)
    return _certified(given, finding, _digest(foreign.network), radii)


# The verb --------------------------------------------------------------------------------------------------------


def certify_file(options: argparse.Namespace) -> int:
    """Certify the network of one file; returns the exit status.

    Raises:
        ConfigError: it cannot be read, or does not fit its data.
    """
    request, decides = Request.of(options), options.task != "regression"
    if len(options.runs) != 1:
        raise ConfigError("NET", " ".join(options.runs), "must be one file, as --data is given")
    (path,) = options.runs
    _for_radii(request, options.task, "--")
    if options.output is not None and not decides:
        raise ConfigError("-o", options.output, NO_RADII)
    for option, name, suffix in (("--json", options.json, ".json"), ("-o", options.output, ".csv")):
        if name is not None and Path(name).suffix.lower() != suffix:
            raise ConfigError(option, name, f"must end in {suffix}")
        if name is not None:
            check_output(option, name, options.force, [path, options.data, options.target or path])
    screen = Screen()
    with screen.waiting(path) as waiting_for, cpu_threads(1):
        points = Points.read(options.data, options.target)
        foreign = read(path, points.n_columns, decides, options.act)
        x = points.x(foreign.names, foreign.network.n_inputs)
        y = points.classes(foreign.network.n_outputs, foreign.classes) if decides else None
        asked = Asked(foreign, x, y, decides)
        finding = _found(asked, request, lambda text: waiting_for(f"{path}: {text}"))
    radii = default("radii") if request.radii is None else request.radii
    for line in _described(path, asked, finding, radii, request.attack):
        screen.show(line)
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    _write(_certified(asked, finding, digest, radii), options, path)
    if finding.refuted:
        print(f"lipexp: {path}: {finding.failure()}", file=sys.stderr)
    return int(finding.refuted)


def _described(path: str, asked: Asked, finding: Finding, radii: Sequence[float], attacked: bool) -> Iterator[str]:
    """What was found, line by line."""
    network = asked.foreign.network
    acts = ", ".join(dict.fromkeys(act.label for _, act in network.placed))
    sizes = " -> ".join(map(str, [network.n_inputs, *network.hidden_widths, network.n_outputs]))
    own = "" if asked.y is not None or not asked.decides else ", whose classes are the predicted ones"
    yield f"{path}  {sizes}{f'  {acts}' if acts else ''}  on {count(len(asked.x), 'point')}{own}"
    yield from asked.foreign.notes
    if asked.foreign.rounding:
        change = above(asked.foreign.rounding, None, digits=2)
        yield f"certified with numbers rounded to float32: the largest relative change is {change}"
    yield from finding.described(radii, attacked)


def _write(found: Certified, options: argparse.Namespace, path: str) -> None:
    content = {"net": path, "data": options.data} | found.json()
    text = json.dumps(content, indent=2, allow_nan=False, default=str) + "\n"
    table = found.radii
    if options.output is not None and table is None:
        reason = found.robustness.reason if found.robustness is not None else None
        raise ConfigError("-o", options.output, f"there are no radii: {reason}")
    option, name = "--json", options.json
    try:
        if options.json is not None:
            write_file(Path(options.json), lambda file: file.write_text(text))
        option, name = "-o", options.output
        if options.output is not None and table is not None:
            write_file(Path(options.output), lambda file: table.to_csv(file, index=False))
    except OSError as error:
        raise ConfigError(option, name, f"cannot be written: {error.strerror or error}") from None
