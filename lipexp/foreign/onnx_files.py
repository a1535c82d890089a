"""Networks in ONNX files: the graph is followed node by node, and never run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from lipexp.config import one_line
from lipexp.foreign.features import Rows, Unread, entry
from lipexp.foreign.onnx_operators import FLOATS, KEEP, OPERATORS, Node, numbers
from lipexp.foreign.operands import Decided, Operand, reshape, split
from lipexp.foreign.outputs import Graph, at, for_any_rows

MOST_ROWS = 4096
DOMAINS = ("", "ai.onnx", "ai.onnx.ml")
OLDEST = 7  # opset


def read(content: bytes, folder: Path | None, n_inputs: int) -> Graph:
    """The graph of an ONNX file.

    Args:
        folder: that of the file, where its weights may lie in other files; None: it has none.
        n_inputs: the columns of the data, for an input that leaves their number open.

    Raises:
        Unread: it cannot be read, and why: the operator and the node.
    """
    try:
        model = onnx.load_from_string(content)
    except Exception as error:  # protobuf raises its own
        raise Unread(f"is no ONNX file: {one_line(error)}") from None
    return of_model(model, folder, n_inputs)


def of_model(model: onnx.ModelProto, folder: Path | None, n_inputs: int) -> Graph:
    """As `read`, of a model in memory."""
    graph = model.graph
    if graph.sparse_initializer:
        raise Unread("holds sparse weights")
    if not graph.node or not graph.output:
        raise Unread("holds no graph")
    opset = max((part.version for part in model.opset_import if part.domain in DOMAINS[:2]), default=1)
    if opset < OLDEST:
        raise Unread(f"is of opset {opset}, whose operators broadcast in other ways; {OLDEST} and newer are read")
    if any(part.domain in DOMAINS for part in model.functions):
        raise Unread("defines operators of ONNX anew")
    stored: dict[str, Operand] = {}
    for part in graph.initializer:
        with at("initializer", part.name):
            stored[part.name] = numbers(part, folder)
    return for_any_rows(lambda rows: _of_rows(graph, stored, opset, (rows, n_inputs)))


def _of_rows(graph: onnx.GraphProto, stored: Mapping[str, Operand], opset: int, shape: tuple[int, int]) -> Graph:
    """The graph for an input of this shape, where it leaves its own open."""
    values = dict(stored)
    names = _entries(graph, values, shape)
    for node in graph.node:
        with at(node.op_type, node.name or ", ".join(node.output)):
            if any(name in values for name in node.output if name):
                raise Unread("sets a value that there is already")
            found = _followed(node, values, opset)
        values.update(zip(node.output, found, strict=False))
    known = [(part.name, values.get(part.name)) for part in graph.output]
    return Graph([(name, value) for name, value in known if value is not None], names)


def _followed(node: onnx.NodeProto, values: Mapping[str, Operand], opset: int) -> Sequence[Operand]:
    """The outputs of a node."""
    missing = [name for name in node.input if name and name not in values]
    if missing:
        raise Unread(f"takes {missing[0]}, which is not read")
    operands = [values[name] if name else None for name in node.input]
    decided = [operand for operand in operands if isinstance(operand, Decided)]
    rest = [operand for operand in operands if isinstance(operand, Rows)]
    if decided and node.op_type not in ("Softmax", "LogSoftmax", "ArgMax", "Where"):
        if len(decided) > 1 or rest or not (decided[0].is_class or node.op_type in KEEP):
            raise Unread(f"works on what {decided[0].by[-1]} has made of the outputs")
        if not decided[0].is_class and node.op_type == "Cast" and _attributes(node).get("to") not in FLOATS:
            raise Unread("rounds probabilities")
        return [decided[0].then(node.op_type)] * len(node.output)
    if node.op_type not in OPERATORS or node.domain not in DOMAINS:
        raise Unread("is no operator that lipexp reads")
    found = OPERATORS[node.op_type](Node(node.op_type, operands, _attributes(node), len(node.output), opset))
    return found if isinstance(found, list) else [found]  # type: ignore[list-item]


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    found = {part.name: onnx.helper.get_attribute_value(part) for part in node.attribute}
    return {name: part.decode() if isinstance(part, bytes) else part for name, part in found.items()}


def _entries(graph: onnx.GraphProto, values: dict[str, Operand], shape: tuple[int, int]) -> list[str]:
    """Put the inputs among the values; returns their names where each is a column of its own."""
    rows, n_inputs = shape
    inputs = [part for part in graph.input if part.name not in values]
    shapes, n_rows = [], set()
    for part in inputs:
        with at("input", part.name):
            kind = part.type.tensor_type
            if kind.elem_type in (TensorProto.UNDEFINED, TensorProto.STRING):
                raise Unread("takes no numbers")
            dims = [int(dim.dim_value) for dim in kind.shape.dim]
            if len(dims) < 2:
                raise Unread("has no shape (N, D)")
            n_open = sum(n <= 0 for n in dims[1:])
            if n_open > (len(inputs) == 1):
                raise Unread("leaves its shape open")
            rest = int(np.prod([n for n in dims[1:] if n > 0]))
            if n_open and n_inputs % rest:
                raise Unread(f"takes no {n_inputs} columns")
            shapes.append([n if n > 0 else n_inputs // rest for n in dims[1:]])
            n_rows.add(dims[0] if dims[0] > 0 else rows)
    if len(n_rows) != 1 or max(n_rows) > MOST_ROWS:
        raise Unread("has no inputs" if not inputs else "has inputs with different numbers of rows, or too many")
    widths = [int(np.prod(shape)) for shape in shapes]
    whole = entry(n_rows.pop(), [sum(widths)])
    columns = split(whole, widths, 1)
    for part, dims, own in zip(inputs, shapes, columns, strict=True):
        values[part.name] = reshape(own, [own.shape[0], *dims])
    return [part.name for part in inputs] if len(inputs) > 1 and set(widths) == {1} else []
