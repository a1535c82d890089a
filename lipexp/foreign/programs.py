"""Programs of torch.export, in a file or in memory: the graph is followed call by call, and never run.

A .pt2 file is an archive with the graph as JSON and the weights as plain bytes. Nothing of it is loaded by torch.

Reference: PyTorch, "torch.export IR specification", and the schema in torch/_export/serde/schema.py.
"""

from __future__ import annotations

import json
import logging
import math
import operator
import re
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from io import BytesIO, StringIO
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lipexp.config import ConfigError, one_line
from lipexp.foreign import aten
from lipexp.foreign.features import Numbers, Rows, Stage, Unread, entry
from lipexp.foreign.outputs import ROWS, Graph, at, for_any_rows
from lipexp.wording import count

MOST_ROWS = 4096
TYPES = {
    **{1: torch.uint8, 2: torch.int8, 3: torch.int16, 4: torch.int32, 5: torch.int64, 12: torch.bool},
    **{6: torch.float16, 7: torch.float32, 8: torch.float64, 13: torch.bfloat16},
}
INTEGERS = {  # operators on the sizes of tensors
    name: getattr(operator, name)
    for name in ("add", "sub", "mul", "floordiv", "mod", "neg", "eq", "ge", "le", "gt", "lt")
}


@dataclass(frozen=True)
class Named:
    """The value of that name."""

    name: str


@dataclass(frozen=True)
class Call:
    """One operator of a program."""

    target: str  # aten.relu.default
    arguments: Mapping[str, Any]  # with Named for values
    outputs: Sequence[Any]  # names; a list of them for an operator that returns a list
    where: str  # what a message calls the node


def follow(calls: Sequence[Call], values: dict[str, Any], outputs: Sequence[tuple[str, Named]]) -> Graph:
    """The outputs of a program, whose inputs and weights are among the values."""
    changed: set[Stage] = set()
    for call in calls:
        space, _, rest = call.target.partition(".")
        name = rest.partition(".")[0] if space == "aten" else call.target
        with at(name, call.where):
            if name in aten.CHECKS:
                continue
            arguments = {key: _resolved(value, values) for key, value in call.arguments.items()}
            if space == "_operator":
                found = _of_sizes(rest, list(arguments.values()))
            else:
                if space != "aten":
                    raise Unread("is no operator that lipexp reads")
                found = aten.call(name, arguments, changed)
            parts = found if isinstance(found, list) else [found]
            names = call.outputs
            if len(names) == 1 and isinstance(names[0], list):
                names = names[0]
            elif len(names) == 1 and isinstance(found, list):
                parts = [found]
            values.update(zip(names, parts, strict=False))
    return aten.made([(name, values.get(where.name)) for name, where in outputs], changed)


def _resolved(value: Any, values: Mapping[str, Any]) -> Any:
    if isinstance(value, Named):
        if value.name not in values:
            raise Unread(f"takes {value.name}, which is not read")
        return values[value.name]
    return [_resolved(part, values) for part in value] if isinstance(value, list | tuple) else value


def _of_sizes(name: str, arguments: Sequence[Any]) -> Any:
    if name == "getitem":
        return arguments[0][arguments[1]]
    if name not in INTEGERS or not all(isinstance(part, int) for part in arguments):
        raise Unread("is no operator that lipexp reads")
    return INTEGERS[name](*arguments)


def _entry(name: str, sizes: Sequence[int | None], rows: int = ROWS[0]) -> Rows:
    """The input (N, ...); None: a size that is open, which is `rows` for N."""
    with at("input", name):
        if len(sizes) < 2 or None in sizes[1:]:
            raise Unread("has no shape (N, D)")
        n_rows = rows if sizes[0] is None else sizes[0]
        shape = [int(n or 0) for n in sizes[1:]]
        if not 0 < n_rows <= MOST_ROWS or min(shape) < 1:
            raise Unread("has too many rows, or none")
        return entry(n_rows, shape)


# Modules ---------------------------------------------------------------------------------------------------------


def of_module(module: nn.Module, shape: Sequence[int]) -> Graph:
    """The graph of a torch module in evaluation mode, for rows of this shape, as torch.export finds it.

    Raises:
        Unread: torch cannot export it, or it has an operator that is not read; its module is named.
    """
    if any(parametrize.is_parametrized(part) for part in module.modules()):
        raise Unread(
            "has parametrised weights; torch.nn.utils.parametrize.remove_parametrizations makes them plain"
        )
    of_weights = next((part.dtype for part in module.parameters() if part.is_floating_point()), torch.float32)
    return for_any_rows(lambda rows: of_program(_exported(module, (rows, *shape), of_weights)))


def _exported(module: nn.Module, shape: Sequence[int], kind: torch.dtype) -> torch.export.ExportedProgram:
    """The program of a module for an input of this shape."""
    training = [part for part in module.modules() if part.training]
    try:
        module.eval()
        with _quiet(), torch.no_grad():
            device = next((part.device for part in module.parameters()), torch.device("cpu"))
            example = torch.zeros(*shape, dtype=kind, device=device)
            return torch.export.export(module, (example,), strict=False)
    except Exception as error:  # torch raises anything for what it cannot take, and so does a module
        first = next((part.in_features for part in module.modules() if isinstance(part, nn.Linear)), None)
        sizes = re.search(r"got \[\d+, (\d+)\] X \[(\d+), \d+\]", str(error))
        if sizes and [*map(int, sizes.groups())] == [math.prod(shape[1:]), first]:
            raise ConfigError(
                "x", None, f"has {count(int(sizes[1]), 'column')}, the network {count(int(sizes[2]), 'input')}"
            ) from None
        raise Unread(f"torch.export cannot take it: {one_line(error)}") from None
    finally:
        for part in training:
            part.training = True


@contextmanager
def _quiet() -> Iterator[None]:
    """Leaves out what torch says on many lines of a program that it cannot take: its error says it in one."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def of_program(program: torch.export.ExportedProgram) -> Graph:
    """The graph of a program in memory."""
    own = program.graph_signature
    stored: dict[str, Any] = {**program.constants, **program.state_dict}
    lifted = {**own.inputs_to_parameters, **own.inputs_to_buffers, **own.inputs_to_lifted_tensor_constants}
    values: dict[str, Any] = {
        name: _plain(stored[key]) for name, key in lifted.items() if isinstance(stored.get(key), Tensor)
    }
    calls, inputs, outputs = [], list(own.user_inputs), [str(name) for name in own.user_outputs]
    if len(inputs) != 1:
        raise Unread(f"takes {len(inputs)} inputs, not one")
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name == inputs[0]:
            sizes = [n if isinstance(n, int) else None for n in node.meta["val"].shape]
            values[node.name] = _entry(node.name, sizes)
        elif node.op == "call_function":
            calls.append(_call_of(node))
    return follow(calls, values, [(name, Named(name)) for name in outputs])


def _plain(part: Tensor) -> Numbers:
    found = part.detach().cpu()
    return found.double().numpy() if found.is_floating_point() else found.numpy()


def _call_of(node: Any) -> Call:
    """A node of torch.fx."""

    def named(value: Any) -> Any:
        if isinstance(value, torch.fx.Node):
            return Named(value.name)
        if isinstance(value, list | tuple):
            return [named(part) for part in value]
        return str(value) if isinstance(value, torch.dtype) else value

    schema = getattr(node.target, "_schema", None)
    names = (
        [part.name for part in schema.arguments] if schema is not None else [str(i) for i in range(len(node.args))]
    )
    target = (
        str(node.target) if schema is not None else f"_operator.{getattr(node.target, '__name__', node.target)}"
    )
    arguments = dict(zip(names, map(named, node.args), strict=False)) | {
        key: named(value) for key, value in node.kwargs.items()
    }
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    where = node.name if not stack else f"{node.name} of {_module(str(stack[-1][0]), stack[-1][1])}"
    return Call(target, arguments, [node.name], where)


def _module(path: str, kind: Any) -> str:
    """`module 3 (Softmax)`: what a message calls a module."""
    name = getattr(kind, "__name__", str(kind)).rpartition(".")[2]
    return f"module {path.removeprefix('L__self__').strip('.') or 'itself'} ({name})"


# Files -----------------------------------------------------------------------------------------------------------


def read(content: bytes) -> Graph:
    """The graph of a .pt2 file.

    Raises:
        Unread: it cannot be read, and why: the operator and the node.
    """
    try:
        with zipfile.ZipFile(BytesIO(content)) as archive:
            if sum(part.file_size for part in archive.infolist()) > len(content):
                raise Unread("is compressed")
            files = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
        if "models/model.json" not in files:
            raise Unread("has no models/model.json: an older torch wrote it, or it is no program of torch.export")
        module = json.loads(files["models/model.json"])["graph_module"]
        return _of_json(module["graph"], module["signature"], files)
    except Unread:
        raise
    except (zipfile.BadZipFile, NotImplementedError, EOFError, RecursionError, zlib.error) as error:
        raise Unread(f"is no program of torch.export: {one_line(error)}") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError, OverflowError) as error:
        raise Unread(f"is a damaged program: {one_line(error)}") from None


def _of_json(graph: Mapping[str, Any], signature: Mapping[str, Any], files: Mapping[str, bytes]) -> Graph:
    values: dict[str, Any] = {}
    inputs = []
    for spec in signature["input_specs"]:
        ((kind, own),) = spec.items()
        if kind == "user_input":
            inputs.append(own["arg"]["as_tensor"]["name"])
        elif kind in ("parameter", "buffer", "tensor_constant"):
            values[own["arg"]["name"]] = _stored(own[f"{kind}_name"], files)
    if len(inputs) != 1:
        raise Unread(f"takes {len(inputs)} inputs, not one")
    sizes = [size.get("as_int") for size in graph["tensor_values"][inputs[0]]["sizes"]]
    outputs = [
        (own["arg"]["as_tensor"]["name"], Named(own["arg"]["as_tensor"]["name"]))
        for spec in signature["output_specs"]
        for kind, own in spec.items()
        if kind == "user_output" and "as_tensor" in own["arg"]
    ]
    calls = [_call_in_json(node) for node in graph["nodes"]]

    def of_rows(rows: int) -> Graph:
        own = {name: size.get("as_int", rows) for name, size in graph.get("sym_int_values", {}).items()}
        return follow(calls, {**values, **own, inputs[0]: _entry(inputs[0], sizes, rows)}, outputs)

    return for_any_rows(of_rows) if sizes[:1] == [None] else of_rows(ROWS[0])


def _stored(name: str, files: Mapping[str, bytes]) -> Numbers:
    """A weight or a constant, whose size and strides must fit the bytes that are there."""
    for kind, config in (("weights", "model_weights_config"), ("constants", "model_constants_config")):
        found = json.loads(files.get(f"data/{kind}/{config}.json", b'{"config": {}}'))["config"].get(name)
        if found is not None:
            break
    else:
        raise Unread(f"lacks the numbers of {name}")
    if found["use_pickle"]:
        raise Unread(f"has {name} as a pickle")
    content, meta = files[f"data/{kind}/{found['path_name']}"], found["tensor_meta"]
    sizes, strides = ([int(part["as_int"]) for part in meta[key]] for key in ("sizes", "strides"))
    dtype, start = TYPES.get(meta["dtype"]), int(meta["storage_offset"]["as_int"])
    if dtype is None:
        raise Unread(f"has {name} in a number type that is not read")
    return held(content, dtype, sizes, strides, start, name)


def held(
    content: bytes, kind: torch.dtype, sizes: Sequence[int], strides: Sequence[int], start: int, name: str
) -> Numbers:
    """The tensor of this shape in some bytes.

    Raises:
        Unread: it is larger than they are.
    """
    own, n = [int(part) for part in (start, *sizes, *strides)], len(content) // kind.itemsize
    end = start + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True)) + 1
    if min(own) < 0 or 0 in sizes or end > n or np.prod([float(size) for size in sizes]) > n:
        raise Unread(f"claims more numbers for {name} than it holds")
    flat = torch.frombuffer(bytearray(content[: n * kind.itemsize]), dtype=kind)
    return _plain(flat.as_strided(list(sizes), list(strides), start))


def _call_in_json(node: Mapping[str, Any]) -> Call:
    target = node["target"].removeprefix("torch.ops.")
    arguments = {part["name"] or str(i): _argument(part["arg"]) for i, part in enumerate(node["inputs"])}
    outputs = [_output(part) for part in node["outputs"]]
    stack = [part.split(",") for part in node.get("metadata", {}).get("nn_module_stack", "").split(";") if part]
    name = node.get("name") or (outputs[0] if outputs else "?")
    where = f"{name} of {_module(stack[-1][1], stack[-1][2])}" if stack and len(stack[-1]) > 2 else str(name)
    return Call(target, arguments, outputs, where)


def _argument(part: Mapping[str, Any]) -> Any:
    """An argument of a call in its JSON."""
    ((kind, value),) = part.items()
    if kind == "as_tensor":
        return Named(value["name"])
    if kind == "as_tensors":
        return [Named(own["name"]) for own in value]
    if kind in ("as_sym_int", "as_sym_ints", "as_optional_tensors", "as_optional_tensor"):
        parts = (
            [_argument(own) if "name" not in own else Named(own["name"]) for own in value]
            if kind.endswith("s")
            else _argument(value)
        )
        return parts
    return None if kind == "as_none" else Named(value) if kind == "as_name" else value


def _output(part: Mapping[str, Any]) -> Any:
    ((kind, value),) = part.items()
    if kind == "as_tensors":
        return [own["name"] for own in value]
    return value.get("name", value.get("as_name")) if isinstance(value, Mapping) else str(value)
