"""The operators of ONNX, and of its domain ai.onnx.ml."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from lipexp.foreign import features, operands, operators
from lipexp.foreign.features import MOST_WEIGHTS, Numbers, Rows, Unread, moved
from lipexp.foreign.operands import Compared, Decided, Operand, constant, numbers_of, tensor
from lipexp.reading import LARGE_BYTES, plain_file

FLOATS = (TensorProto.FLOAT, TensorProto.DOUBLE)


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
    is_row = isinstance(c, np.ndarray) and (c.ndim < 2 or c.shape[0] == 1)
    if alpha == beta == 1 and isinstance(a, Rows) and isinstance(b, np.ndarray) and is_row:
        return features.linear(a, b.T, np.reshape(constant(c), -1))
    product = operators.matmul(a, b)
    product = product if alpha == 1 else operators.multiply(product, np.asarray(alpha))
    if c is None:
        return product
    return operators.add(product, c if beta == 1 else operators.multiply(c, np.asarray(beta)))


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
    return operands.gather(features.sort(x, axis), places, axis)


def _reduce(node: Node) -> Operand:
    x, keep = tensor(node.x), bool(node.attributes.get("keepdims", 1))
    axes = node.axes()
    if not axes:
        if node.attributes.get("noop_with_empty_axes", 0):
            return x
        axes = list(range(len(x.shape)))
    if node.operator in ("ReduceMean", "ReduceSum"):
        return operators.mean(x, axes, keep, total=node.operator == "ReduceSum")
    if not isinstance(x, Rows) or len(axes) != 1:
        raise Unread("is read along one axis of features")
    place = -1 if node.operator == "ReduceMax" else 0
    found = operands.gather(features.sort(x, axes[0]), np.array([place % x.shape[axes[0]]]), axes[0])
    return found if keep else operands.squeeze(found, axes)


def _slice(node: Node) -> Operand:
    starts, ends = (node.option(name, i) for name, i in (("starts", 1), ("ends", 2)))
    axes, steps = node.option("axes", 3), node.option("steps", 4)
    lists = [None if part is None else numbers_of(part) for part in (starts, ends, axes, steps)]
    if lists[0] is None or lists[1] is None:
        raise Unread("needs starts and ends")
    return operands.sliced(tensor(node.x), lists[0], lists[1], lists[2], lists[3])


def _split(node: Node) -> Sequence[Operand]:
    x, axis, sizes = tensor(node.x), node.axis(0), node.option("split", 1)
    if sizes is not None:
        return operands.split(x, numbers_of(sizes), axis)
    n = int(node.attributes.get("num_outputs", node.n_outputs))
    size = -(-x.shape[axis] // n)
    return operands.split(x, [min(size, x.shape[axis] - i * size) for i in range(n)], axis)


def _flatten(node: Node) -> Operand:
    x, axis = tensor(node.x), node.axis(1)
    lead = int(np.prod(x.shape[:axis], dtype=np.int64))
    return moved(x, lambda a: a.reshape(lead, -1))


def _constant(node: Node) -> Operand:
    for name in ("value", "value_float", "value_int", "value_floats", "value_ints"):
        if name in node.attributes:
            value = node.attributes[name]
            return numbers(value) if isinstance(value, TensorProto) else np.asarray(value)
    raise Unread("holds no tensor of numbers")


def _filled(node: Node) -> Operand:
    shape, value = numbers_of(node.x), node.attributes.get("value")
    if min(shape, default=1) < 0 or np.prod([float(n) for n in shape]) > MOST_WEIGHTS:
        raise Unread("makes too many numbers")
    return np.full(shape, 0 if value is None else numbers(value).reshape(-1)[0])


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
    if node.attributes.get("training_mode", 0) or node.n_outputs > 1:
        raise Unread("is in training mode")
    return operators.normalised(x, mean, variance, weight, bias, node.attributes.get("epsilon", 1e-5))


def _softmax(node: Node) -> Operand:
    return operators.probabilities(node.x, node.axis(1 if node.opset < 13 else -1), node.operator)


def _gather(node: Node) -> Operand:
    return operands.gather(tensor(node.x), constant(node.operand(1)), node.axis(0))


def _where(node: Node) -> Operand:
    condition, a, b = (node.operand(i) for i in range(3))
    if isinstance(condition, Compared | Decided):
        return operators.softplus_of(condition, a, b)
    return np.where(constant(condition), constant(a), constant(b))


def _divide(node: Node) -> Operand:
    a, b = node.x, node.operand(1)
    if all(isinstance(part, np.ndarray) and part.dtype.kind in "iu" for part in (a, b)):
        quotient = np.abs(a) // np.abs(b)  # towards 0
        return np.asarray(np.where((a < 0) == (b < 0), quotient, -quotient)).astype(a.dtype)
    return operators.divide(a, b)


def _remainder(node: Node) -> Operand:
    of = np.fmod if node.attributes.get("fmod", 0) else np.mod
    return np.asarray(of(constant(node.x), constant(node.operand(1))))


OF_CONSTANTS: dict[str, Callable[..., Numbers]] = {
    "Sqrt": np.sqrt,
    "Reciprocal": lambda x: 1 / x,
    "Equal": np.equal,
    "Not": np.logical_not,
    "Floor": np.floor,
    "Ceil": np.ceil,
}


def _of_constants(of: Callable[..., Numbers], node: Node) -> Operand:
    return np.asarray(of(*(constant(node.operand(i)) for i in range(len(node.operands)))))


def _of_all(node: Node) -> list[Operand]:
    return [node.operand(i) for i in range(len(node.operands))]


def _sum(node: Node) -> Operand:
    found, *others = _of_all(node)
    for other in others:
        found = operators.add(found, other)
    return found


OPERATORS: dict[str, Callable[[Node], Operand | Sequence[Operand]]] = {
    **dict.fromkeys(("Identity", "ZipMap"), lambda node: node.x),
    "Dropout": _dropout,
    "Cast": _cast,
    "Flatten": _flatten,
    "Reshape": lambda node: operands.reshape(
        tensor(node.x), numbers_of(node.option("shape", 1)), not node.attributes.get("allowzero", 0)
    ),
    "Transpose": lambda node: moved(tensor(node.x), lambda a: np.transpose(a, node.attributes.get("perm"))),
    "Squeeze": lambda node: operands.squeeze(tensor(node.x), node.axes()),
    "Unsqueeze": lambda node: operands.unsqueeze(tensor(node.x), node.axes() or []),
    "Slice": _slice,
    "Gather": _gather,
    "ArrayFeatureExtractor": lambda node: operands.gather(
        tensor(node.x), constant(node.operand(1)).reshape(-1), -1
    ),
    "Split": _split,
    "Concat": lambda node: operands.concat(_of_all(node), node.axis(0)),
    "FeatureVectorizer": lambda node: operands.concat(_of_all(node), 1),
    "Expand": lambda node: operands.expand(tensor(node.x), numbers_of(node.operand(1))),
    "Shape": lambda node: np.asarray(
        tensor(node.x).shape[node.attributes.get("start", 0) : node.attributes.get("end", None)]
    ),
    "Constant": _constant,
    "ConstantOfShape": _filled,
    "Range": _range,
    "Where": _where,
    **{name: partial(_of_constants, of) for name, of in OF_CONSTANTS.items()},
    "Gemm": _gemm,
    "MatMul": lambda node: operators.matmul(node.x, node.operand(1)),
    "Add": lambda node: operators.add(node.x, node.operand(1)),
    "Sum": _sum,
    "Sub": lambda node: operators.subtract(node.x, node.operand(1)),
    "Pow": lambda node: operators.power(node.x, node.operand(1)),
    "Mul": lambda node: operators.multiply(node.x, node.operand(1)),
    "Div": _divide,
    "Mod": _remainder,
    "Neg": lambda node: operators.multiply(node.x, np.asarray(-1)),
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
    "Log": lambda node: operators.log(node.x),
    "Erf": lambda node: operators.erf(node.x),
    "Gelu": lambda node: operators.gelu(node.x, node.attributes.get("approximate", "none")),
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
# What may come behind probabilities without changing which is the largest, or their axes.
KEEP = {"Identity", "Cast", "ZipMap", "Log"}


# Constants -------------------------------------------------------------------------------------------------------


def numbers(part: TensorProto, folder: Path | None = None) -> Numbers:
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
