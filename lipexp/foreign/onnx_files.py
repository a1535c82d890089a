"""Networks in ONNX files: the graph is followed node by node, and never run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from lipexp.config import one_line
from lipexp.foreign import features, operators
from lipexp.foreign.features import MOST_WEIGHTS, Numbers, Rows, Unread, entry, moved
from lipexp.foreign.operators import Decided, Operand, constant, numbers_of, tensor
from lipexp.foreign.outputs import Graph, at
from lipexp.reading import LARGE_BYTES, plain_file

FLOATS = (TensorProto.FLOAT, TensorProto.DOUBLE)
ROWS = 2  # of the input, where the graph leaves their number open, so that what mixes them is seen
MOST_ROWS = 4096


@dataclass
class Node:
    """A node with its operands."""

    operator: str
    operands: Sequence[Operand | None]
    attributes: Mapping[str, Any]
    n_outputs: int
    opset: int

    @property
    def x(self) -> Any:
        """The first operand."""
        return self.operand(0)

    def operand(self, place: int) -> Any:
        """An operand that must be there."""
        if place >= len(self.operands) or self.operands[place] is None:
            raise Unread("lacks an operand")
        return self.operands[place]

    def option(self, name: str, place: int, default: Any = None) -> Any:
        """What newer operators have as an operand, and older ones as an attribute; as a constant, or None."""
        if place < len(self.operands) and self.operands[place] is not None:
            return constant(self.operands[place], name)
        value = self.attributes.get(name, default)
        return None if value is None else np.asarray(value)

    def axes(self, place: int = 1) -> list[int] | None:
        """The option `axes`."""
        found = self.option("axes", place)
        return None if found is None else numbers_of(found)

    def axis(self, default: int) -> int:
        """The attribute `axis`."""
        return int(self.attributes.get("axis", default))


# Operators -------------------------------------------------------------------------------------------------------


def _cast(node: Node) -> Operand:
    x, to = tensor(node.x), node.attributes.get("to")
    if isinstance(x, Rows):
        if to not in FLOATS:
            raise Unread("rounds features")
        return x
    return x.astype(onnx.helper.tensor_dtype_to_np_dtype(int(to or 0)))


def _gemm(node: Node) -> Operand:
    a, b = (tensor(node.operand(i)) for i in (0, 1))
    if node.attributes.get("transA", 0):
        a = moved(a, lambda value: value.T)
    if node.attributes.get("transB", 0):
        b = moved(b, lambda value: value.T)
    c = node.operands[2] if len(node.operands) > 2 else None
    alpha, beta = (float(node.attributes.get(name, 1.0)) for name in ("alpha", "beta"))
    plain = isinstance(a, Rows) and not isinstance(b, Rows) and isinstance(c, np.ndarray) and alpha == beta == 1
    if plain and (c.ndim < 2 or c.shape[0] == 1):
        return features.linear(a, b.T, c.reshape(-1))
    product = operators.matmul(a, b)
    product = product if alpha == 1 else operators.multiply(product, np.float64(alpha))
    if c is None:
        return product
    return operators.add(product, c if beta == 1 else operators.multiply(c, np.float64(beta)))


def _topk(node: Node) -> Operand:
    k, x, axis = node.option("k", 1), tensor(node.x), node.axis(-1)
    if k is None or not isinstance(x, Rows):
        raise Unread("needs features and k")
    if not node.attributes.get("sorted", 1):
        raise Unread("leaves the order open (sorted=0)")
    n, size = int(np.reshape(k, -1)[0]), x.shape[axis]
    if not 1 <= n <= size:
        raise Unread(f"takes {n} of {size} features")
    places = np.arange(n) if not node.attributes.get("largest", 1) else np.arange(size - 1, size - 1 - n, -1)
    return operators.gather(features.sort(x, axis), places, axis)


def _reduce(node: Node) -> Operand:
    x, keep = tensor(node.x), bool(node.attributes.get("keepdims", 1))
    axes = node.axes()
    axes = list(range(len(x.shape))) if axes is None else axes
    if node.operator in ("ReduceMean", "ReduceSum"):
        return operators.mean(x, axes, keep, total=node.operator == "ReduceSum")
    if not isinstance(x, Rows) or len(axes) != 1:
        raise Unread("is read along one axis of features")
    place = -1 if node.operator == "ReduceMax" else 0
    found = operators.gather(features.sort(x, axes[0]), np.array([place % x.shape[axes[0]]]), axes[0])
    return found if keep else operators.squeeze(found, axes)


def _slice(node: Node) -> Operand:
    starts, ends = (node.option(name, i) for name, i in (("starts", 1), ("ends", 2)))
    axes, steps = node.option("axes", 3), node.option("steps", 4)
    lists = [None if part is None else numbers_of(part) for part in (starts, ends, axes, steps)]
    if lists[0] is None or lists[1] is None:
        raise Unread("needs starts and ends")
    return operators.sliced(tensor(node.x), lists[0], lists[1], lists[2], lists[3])


def _split(node: Node) -> Sequence[Operand]:
    x, axis, sizes = tensor(node.x), node.axis(0), node.option("split", 1)
    if sizes is not None:
        return operators.split(x, numbers_of(sizes), axis)
    n = int(node.attributes.get("num_outputs", node.n_outputs))
    size = -(-x.shape[axis] // n)
    return operators.split(x, [min(size, x.shape[axis] - i * size) for i in range(n)], axis)


def _flatten(node: Node) -> Operand:
    x, axis = tensor(node.x), node.axis(1)
    lead = int(np.prod(x.shape[:axis], dtype=np.int64))
    return moved(x, lambda a: a.reshape(lead, -1))


def _constant(node: Node) -> Operand:
    for name in ("value", "value_float", "value_int", "value_floats", "value_ints"):
        if name in node.attributes:
            value = node.attributes[name]
            return _numbers(value) if isinstance(value, TensorProto) else np.asarray(value)
    raise Unread("holds no tensor of numbers")


def _filled(node: Node) -> Operand:
    shape, value = numbers_of(node.x), node.attributes.get("value")
    if min(shape, default=1) < 0 or np.prod([float(n) for n in shape]) > MOST_WEIGHTS:
        raise Unread("makes too many numbers")
    return np.full(shape, 0 if value is None else _numbers(value).reshape(-1)[0])


def _range(node: Node) -> Operand:
    start, end, step = (constant(node.operand(i)).reshape(-1)[0] for i in range(3))
    if step == 0 or not abs((end - start) / step) <= MOST_WEIGHTS:
        raise Unread("makes too many numbers")
    return np.arange(start, end, step)


def _scaler(node: Node) -> Operand:
    offset, scale = (
        np.asarray(node.attributes.get(name, default)) for name, default in (("offset", 0), ("scale", 1))
    )
    return operators.multiply(operators.subtract(node.x, offset), scale)


def _dropout(node: Node) -> Operand:
    training = node.operands[2] if len(node.operands) > 2 else None
    if training is not None and bool(np.any(constant(training))):
        raise Unread("is in training mode")
    return node.x


def _normalised(node: Node) -> Operand:
    x, weight, bias, mean, variance = (node.operand(i) for i in range(5))
    if node.attributes.get("training_mode", 0):
        raise Unread("is in training mode")
    return operators.normalised(x, mean, variance, weight, bias, node.attributes.get("epsilon", 1e-5))


def _softmax(node: Node) -> Operand:
    return operators.probabilities(node.x, node.axis(1 if node.opset < 13 else -1), node.operator)


def _gather(node: Node) -> Operand:
    return operators.gather(tensor(node.x), constant(node.operand(1)), node.axis(0))


def _where(node: Node) -> Operand:
    condition, a, b = (constant(node.operand(i)) for i in range(3))
    return np.where(condition, a, b)


def _of_all(node: Node) -> list[Operand]:
    return [node.operand(i) for i in range(len(node.operands))]


def _sum(node: Node) -> Operand:
    found, *others = _of_all(node)
    for other in others:
        found = operators.add(found, other)
    return found


OPERATORS: dict[str, Callable[[Node], Operand | Sequence[Operand]]] = {
    "Identity": lambda node: node.x,
    "Dropout": _dropout,
    "Cast": _cast,
    "Flatten": _flatten,
    "Reshape": lambda node: operators.reshape(
        tensor(node.x), numbers_of(node.option("shape", 1)), not node.attributes.get("allowzero", 0)
    ),
    "Transpose": lambda node: moved(tensor(node.x), lambda a: np.transpose(a, node.attributes.get("perm"))),
    "Squeeze": lambda node: operators.squeeze(tensor(node.x), node.axes()),
    "Unsqueeze": lambda node: operators.unsqueeze(tensor(node.x), node.axes() or []),
    "Slice": _slice,
    "Gather": _gather,
    "ArrayFeatureExtractor": lambda node: operators.gather(
        tensor(node.x), constant(node.operand(1)).reshape(-1), -1
    ),
    "Split": _split,
    "Concat": lambda node: operators.concat(_of_all(node), node.axis(0)),
    "FeatureVectorizer": lambda node: operators.concat(_of_all(node), 1),
    "Expand": lambda node: operators.expand(tensor(node.x), numbers_of(node.operand(1))),
    "Shape": lambda node: np.asarray(tensor(node.x).shape),
    "Constant": _constant,
    "ConstantOfShape": _filled,
    "Range": _range,
    "Where": _where,
    "Sqrt": lambda node: np.sqrt(constant(node.x)),
    "Reciprocal": lambda node: 1 / constant(node.x),
    "Gemm": _gemm,
    "MatMul": lambda node: operators.matmul(node.x, node.operand(1)),
    "Add": lambda node: operators.add(node.x, node.operand(1)),
    "Sum": _sum,
    "Sub": lambda node: operators.subtract(node.x, node.operand(1)),
    "Mul": lambda node: operators.multiply(node.x, node.operand(1)),
    "Div": lambda node: operators.divide(node.x, node.operand(1)),
    "Neg": lambda node: operators.multiply(node.x, np.float64(-1)),
    "Scaler": _scaler,
    "BatchNormalization": _normalised,
    **dict.fromkeys(("ReduceMax", "ReduceMin", "ReduceMean", "ReduceSum"), _reduce),
    "Max": lambda node: features.extreme([tensor(value) for value in _of_all(node)], True),
    "Min": lambda node: features.extreme([tensor(value) for value in _of_all(node)], False),
    "TopK": _topk,
    "Relu": lambda node: operators.relu(node.x),
    "Tanh": lambda node: operators.ACTIVATIONS["tanh"](node.x),
    "Sigmoid": lambda node: operators.sigmoid(node.x),
    "Abs": lambda node: operators.ACTIVATIONS["abs"](node.x),
    "LeakyRelu": lambda node: operators.leaky_relu(node.x, node.attributes.get("alpha", 0.01)),
    "PRelu": lambda node: operators.prelu(node.x, constant(node.operand(1))),
    "Elu": lambda node: operators.elu(node.x, node.attributes.get("alpha", 1.0)),
    "Selu": lambda node: operators.elu(
        node.x, *(node.attributes.get(*own) for own in zip(("alpha", "gamma"), operators.SELU, strict=True))
    ),
    "Celu": lambda node: operators.celu(node.x, node.attributes.get("alpha", 1.0)),
    "Softplus": lambda node: operators.softplus(node.x),
    "Gelu": lambda node: operators.gelu(node.x, node.attributes.get("approximate", "none")),
    "Swish": lambda node: operators.silu(node.x),
    "HardSigmoid": lambda node: operators.hard_sigmoid(
        node.x, *(node.attributes.get(*own) for own in (("alpha", 0.2), ("beta", 0.5)))
    ),
    "Clip": lambda node: operators.clip(node.x, node.option("min", 1), node.option("max", 2)),
    **dict.fromkeys(("Softmax", "LogSoftmax"), _softmax),
    "ArgMax": lambda node: operators.largest(node.x, node.axis(0), "ArgMax"),
    **dict.fromkeys(
        ("Greater", "GreaterOrEqual"), lambda node: operators.above(node.x, node.operand(1), node.operator)
    ),
    **dict.fromkeys(("Less", "LessOrEqual"), lambda node: operators.above(node.operand(1), node.x, node.operator)),
}
# What may come behind probabilities without changing which is the largest.
KEEP = {"Identity", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "ZipMap", "Log"}


# Files -----------------------------------------------------------------------------------------------------------


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
    opset = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=1)
    values: dict[str, Operand] = {}
    for part in graph.initializer:
        with at("initializer", part.name):
            values[part.name] = _numbers(part, folder)
    names = _entries(graph, values, n_inputs)
    for node in graph.node:
        with at(node.op_type, node.name or ", ".join(node.output)):
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
    if decided and node.op_type not in ("Softmax", "LogSoftmax", "ArgMax"):
        if len(decided) > 1 or rest or not (decided[0].is_class or node.op_type in KEEP):
            raise Unread(f"works on what {decided[0].by[-1]} has made of the outputs")
        return [decided[0].then(node.op_type)] * len(node.output)
    if node.op_type not in OPERATORS or node.domain not in ("", "ai.onnx", "ai.onnx.ml"):
        raise Unread("is no operator that lipexp reads")
    attributes = {part.name: onnx.helper.get_attribute_value(part) for part in node.attribute}
    attributes = {name: part.decode() if isinstance(part, bytes) else part for name, part in attributes.items()}
    found = OPERATORS[node.op_type](Node(node.op_type, operands, attributes, len(node.output), opset))
    return found if isinstance(found, list) else [found]  # type: ignore[list-item]


def _entries(graph: onnx.GraphProto, values: dict[str, Operand], n_inputs: int) -> list[str]:
    """Put the inputs among the values; returns their names where each is a column of its own."""
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
            n_rows.add(dims[0] if dims[0] > 0 else ROWS)
    if len(n_rows) != 1 or max(n_rows) > MOST_ROWS:
        raise Unread("has no inputs" if not inputs else "has inputs with different numbers of rows, or too many")
    widths = [int(np.prod(shape)) for shape in shapes]
    whole = entry(n_rows.pop(), [sum(widths)])
    for part, shape, end, width in zip(inputs, shapes, np.cumsum(widths), widths, strict=True):
        own = whole.moved(lambda a, end=end, width=width: a[:, end - width : end])
        values[part.name] = own.moved(lambda a, shape=shape: a.reshape(len(a), *shape))
    return [part.name for part in inputs] if len(inputs) > 1 and set(widths) == {1} else []


def _numbers(part: TensorProto, folder: Path | None = None) -> Numbers:
    """A tensor of a file. It may have its numbers in another file of the same folder, and nowhere else."""
    if part.data_location == TensorProto.EXTERNAL:
        entries = {own.key: own.value for own in part.external_data}
        name = entries.get("location", "")
        if folder is None or Path(name).name != name or name in ("", ".", ".."):
            raise Unread(f"has its numbers in {name or 'no file'}, outside of the folder")
        content = plain_file(folder, name, LARGE_BYTES).read_bytes()
        start = int(entries.get("offset", 0))
        length = int(entries.get("length", len(content) - start))
        if not 0 <= start <= start + length <= len(content):
            raise Unread(f"claims more numbers than {name} holds")
        inside = TensorProto()
        inside.dims.extend(part.dims)
        inside.data_type, inside.raw_data = part.data_type, content[start : start + length]
        part = inside
    if part.data_type == TensorProto.STRING:
        return np.array([text.decode(errors="replace") for text in part.string_data], dtype=object)
    size, held = float(np.prod([float(n) for n in part.dims])), part.ByteSize()
    if size > 8 * held or min(part.dims, default=1) < 0:
        raise Unread("claims more numbers than it holds")
    found = np.asarray(numpy_helper.to_array(part))
    return found.astype(np.float64) if found.dtype.kind not in "iufb" else found
