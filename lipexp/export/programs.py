"""A network as a torch program: of torch.export, or TorchScript. Both hold plain torch operators and no class."""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
from torch import Tensor, nn

from lipexp.export.model import Model, Outputs
from lipexp.modules import Network
from lipexp.tasks import decision

DESCRIPTION = "lipexp.json"  # a file in the archive


class Module(nn.Module):
    """The model as torch computes it in float32: x (N, columns) -> f (N, C), for a classifier with the class (N,).

    A row that cannot be encoded has f = NaN and the class -1.
    """

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.network, self.task = Network(model.network), model.task
        self.encoding, self.unit = model.encoding, model.unit

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if self.encoding is None:
            f = self.network(x)
            return (f, decision(f)) if self.task.decides else f
        own = self.encoding
        x = x.where(~x.isnan(), own.fill)
        encodable = ((x - own.middle).abs() <= own.half).all(dim=1)
        x = x[:, own.column]
        numbers = (x.double() - own.mean) / own.scale
        f = self.network((x == own.place).where(own.is_category, numbers).float())
        if self.unit is not None:
            mean, scale = self.unit
            f = (mean + scale * f.double()).float()
        f = f.where(encodable[:, None], torch.nan)
        return (f, decision(f).where(encodable, -1)) if self.task.decides else f


class Read:
    """A program that was read back."""

    def __init__(self, program: Any, state: Mapping[str, Tensor]) -> None:
        self._program = program
        self.state = {name.removeprefix("network."): part for name, part in state.items() if "network." in name}

    def __call__(self, x: Tensor) -> Outputs:
        found = self._program(x)
        return Outputs(found, None) if isinstance(found, Tensor) else Outputs(*found)


def export(model: Model, description: Mapping[str, Any]) -> bytes:
    """The program of torch.export, for any number of points."""
    size = {0: torch.export.Dim("N")}
    with _quiet():
        program = torch.export.export(Module(model), (_example(model),), dynamic_shapes=(size,))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # has the paths and the source of this machine
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={DESCRIPTION: json.dumps(description)})
    return file.getvalue()


def read_exported(content: bytes, model: Model) -> Read:
    """The program of torch.export in a file."""
    program = torch.export.load(io.BytesIO(content))
    return Read(program.module(), program.state_dict)


def script(model: Model, description: Mapping[str, Any]) -> bytes:
    """The TorchScript program, traced for any number of points."""
    file = io.BytesIO()
    with _quiet():
        # What torch would check is checked for every format, on more points.
        program = torch.jit.trace(Module(model), _example(model), check_trace=False)
        torch.jit.save(program, file, _extra_files={DESCRIPTION: json.dumps(description)})
    return file.getvalue()


def read_script(content: bytes, model: Model) -> Read:
    """The TorchScript program in a file."""
    with _quiet():
        program = torch.jit.load(io.BytesIO(content))
    return Read(program, program.state_dict())


def _example(model: Model) -> Tensor:
    return torch.zeros(2, len(model.columns))


@contextmanager
def _quiet() -> Iterator[None]:
    """Leaves out what torch says on many lines of a program that it cannot take: its error says it in one.

    And its warnings that TorchScript is deprecated, as the help of the verb says, and that a trace might be wrong,
    which is found out in any case.
    """
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated", DeprecationWarning)
            warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
            yield
    finally:
        logging.disable(logging.NOTSET)
