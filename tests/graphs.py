"""ONNX graphs in the shapes that exporters write, as the tests of networks from elsewhere read them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from lipexp.activations import GELU, SiLU
from lipexp.activations.smooth import Smooth
from lipexp.foreign import read

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper  # noqa: E402

from lipexp.export.graph import Graph  # noqa: E402

D = 4
# onnxruntime computes in float32: sums of some ten terms of size 1 in a few layers are off by about 1e-6.
CLOSE = 1e-5


class Net(Graph):
    """A graph that is being written, with random weights."""

    def __init__(self) -> None:
        super().__init__()
        self.random = np.random.default_rng(0)
        self.inputs = [("x", ["N", D], TensorProto.FLOAT)]

    def numbers(self, *shape: int) -> np.ndarray:
        return (self.random.normal(size=shape) / math.sqrt(shape[-1])).astype(np.float32)

    def gemm(self, x: str, n_in: int, n_out: int) -> str:
        """As torch writes a linear layer."""
        return self.node("Gemm", x, self.numbers(n_out, n_in), self.numbers(n_out), transB=1)

    def dense(self, x: str, n_in: int, n_out: int) -> str:
        """As Keras and scikit-learn write it."""
        return self.node("Add", self.node("MatMul", x, self.numbers(n_in, n_out)), self.numbers(n_out))

    def model(self, output: str, opset: int = 17) -> onnx.ModelProto:
        inputs = [helper.make_tensor_value_info(name, kind, shape) for name, shape, kind in self.inputs]
        outputs = [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)]
        graph = helper.make_graph(self.nodes, "net", inputs, outputs, self.constants)
        opsets = [helper.make_opsetid("", opset), helper.make_opsetid("ai.onnx.ml", 3)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def run(model: onnx.ModelProto | Path, x: np.ndarray) -> np.ndarray:
    content = model.read_bytes() if isinstance(model, Path) else model.SerializeToString()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    inputs = session.get_inputs()
    feed = {inputs[0].name: x} if len(inputs) == 1 else {part.name: x[:, [i]] for i, part in enumerate(inputs)}
    return np.asarray(session.run(None, feed)[0])


def network_of(model: onnx.ModelProto, tmp_path: Path, decides: bool = False):
    (tmp_path / "net.onnx").write_bytes(model.SerializeToString())
    return read(tmp_path / "net.onnx", D, decides)


def points(n: int = 60) -> np.ndarray:
    return (2 * np.random.default_rng(1).normal(size=(n, D))).astype(np.float32)


def outputs(foreign, x: np.ndarray) -> np.ndarray:
    return foreign.network.double(torch.from_numpy(x).double().reshape(1, len(x), -1))[0].numpy()


# What is read ----------------------------------------------------------------------------------------------------


def halves(net: Net, z: str, n: int) -> list[str]:
    ends = [(0, n // 2), (n // 2, n)]
    return [net.node("Slice", z, np.array([start]), np.array([end]), np.array([1])) for start, end in ends]


def max_min(net: Net, x: str) -> str:
    a, b = halves(net, net.gemm(x, D, 8), 8)
    return net.gemm(net.node("Concat", net.node("Max", a, b), net.node("Min", b, a), axis=1), 8, 2)


def interleaved_pairs(net: Net, x: str) -> str:
    z = net.gemm(x, D, 8)
    even, odd = (net.node("Gather", z, np.arange(start, 8, 2), axis=1) for start in (0, 1))
    both = [net.node("Unsqueeze", net.node(end, even, odd), np.array([2])) for end in ("Min", "Max")]
    return net.gemm(net.node("Reshape", net.node("Concat", *both, axis=2), np.array([-1, 8])), 8, 2)


def descending_groups(net: Net, x: str) -> str:
    z = net.node("Reshape", net.gemm(x, D, 8), np.array([0, 2, 4]))
    return net.gemm(net.node("Reshape", net.node("TopK", z, np.array([4]), axis=-1), np.array([0, -1])), 8, 2)


def largest_three_of_columns(net: Net, x: str) -> str:
    z = net.node("Transpose", net.node("Reshape", net.gemm(x, D, 8), np.array([-1, 2, 4])), perm=[0, 2, 1])
    top = net.node("TopK", z, np.array([3]), axis=1, largest=0)
    return net.gemm(net.node("Flatten", top, axis=1), 6, 2)


def maxout(net: Net, x: str) -> str:
    first = net.node("Max", net.gemm(x, D, 8), net.dense(x, D, 8), net.gemm(x, D, 8))
    pools = net.node("Reshape", net.gemm(first, 8, 6), np.array([0, 3, 2]))
    return net.gemm(net.node("ReduceMax", pools, axes=[2], keepdims=0), 3, 2)


def pairs_of_two_layers(net: Net, x: str) -> str:
    a, b = net.gemm(x, D, 4), net.dense(x, D, 4)
    z = net.node("Concat", net.node("Sub", a, b), net.node("Mul", net.node("Sub", b, a), np.float32(2)), axis=1)
    a, b = net.gemm(net.node("Relu", z), 8, 4), net.dense(net.node("Relu", z), 8, 4)
    return net.gemm(net.node("Concat", net.node("Max", a, b), net.node("Min", b, a), axis=1), 8, 2)


def twice_the_same(net: Net, x: str) -> str:
    z = net.node("Relu", net.gemm(x, D, 4))
    return net.gemm(net.node("Concat", z, z, axis=1), 8, 2)


def preprocessed(net: Net, x: str) -> str:
    z = net.node("Div", net.node("Sub", x, net.numbers(D)), 1 + np.abs(net.numbers(D)))
    return net.dense(net.node("Relu", net.dense(z, D, 8)), 8, 2)


def scaled(net: Net, x: str) -> str:
    z = net.node("Mul", net.node("Add", x, net.numbers(1, D)), np.float32(3))
    return net.dense(net.node("Relu", net.dense(net.node("Neg", z), D, 8)), 8, 2)


def branches(net: Net, x: str) -> str:
    parts = net.node("Split", x, np.array([1, 3]), axis=1), f"{net.nodes[-1].name}_rest"
    net.nodes[-1].output.append(parts[1])
    found = [net.node("Relu", net.gemm(part, n, 4)) for part, n in zip(parts, (1, 3), strict=True)]
    return net.gemm(net.node("Concat", *found, axis=1), 8, 2)


def both_signs(net: Net, x: str) -> str:
    z = net.gemm(x, D, 6)
    return net.gemm(net.node("Concat", net.node("Relu", z), net.node("Relu", net.node("Neg", z)), axis=1), 12, 2)


def beside_the_layers(net: Net, x: str) -> str:
    term = net.node("MatMul", net.node("Mul", x, np.float32(0.5)), net.numbers(D, 1))
    return net.node("Add", net.gemm(net.node("Relu", net.gemm(x, D, 8)), 8, 1), term)


def turned(net: Net, x: str) -> str:
    z = net.node("MatMul", net.numbers(8, D), net.node("Transpose", x, perm=[1, 0]))
    z = net.node("Add", z, net.numbers(8, 1))
    return net.gemm(net.node("Transpose", net.node("Relu", z), perm=[1, 0]), 8, 2)


def shapes_of_torch(net: Net, x: str) -> str:
    z = net.gemm(x, D, 8)
    n = net.node("Gather", net.node("Shape", z), np.array(0), axis=0)
    shape = net.node("Concat", net.node("Unsqueeze", n, np.array([0])), np.array([2, -1]), axis=0)
    z = net.node("Reshape", net.node("Relu", z), shape)
    z = net.node("Squeeze", net.node("Unsqueeze", z, np.array([1])), np.array([1]))
    return net.gemm(net.node("Flatten", z), 8, 2)


def leaky_by_max(net: Net, x: str) -> str:
    z = net.dense(x, D, 8)
    return net.dense(net.node("Max", net.node("Mul", z, np.float32(0.2)), z), 8, 2)


def relu6_of_keras(net: Net, x: str) -> str:
    z = net.node("Min", net.node("Relu", net.dense(x, D, 8)), np.float32(0.7))
    return net.dense(net.node("Max", net.dense(z, 8, 8), np.float32(-0.2)), 8, 2)


def normalised(net: Net, x: str) -> str:
    z, positive = net.gemm(x, D, 8), 1 + np.abs(net.numbers(8))
    z = net.node("BatchNormalization", z, net.numbers(8), net.numbers(8), net.numbers(8), positive)
    return net.gemm(net.node("Relu", z), 8, 2)


def gelu_of_older_exporters(net: Net, x: str) -> str:
    z = net.gemm(x, D, 8)
    share = net.node("Add", net.node("Erf", net.node("Div", z, np.float32(math.sqrt(2)))), np.float32(1))
    return net.gemm(net.node("Mul", net.node("Mul", z, share), np.float32(0.5)), 8, 2)


def gelu_by_tanh(cube: Callable[[Net, str], str]) -> Callable[[Net, str], str]:
    def write(net: Net, x: str) -> str:
        z = net.gemm(x, D, 8)
        inside = net.node("Add", z, net.node("Mul", np.float32(0.044715), cube(net, z)))
        share = net.node("Tanh", net.node("Mul", np.float32(math.sqrt(2 / math.pi)), inside))
        half = net.node("Mul", np.float32(0.5), net.node("Add", np.float32(1), share))
        return net.gemm(net.node("Mul", z, half), 8, 2)

    return write


def by_lipexp(act: Smooth) -> Callable[[Net, str], str]:
    def write(net: Net, x: str) -> str:
        z = net.gemm(x, D, 8)
        return net.gemm(act.onnx(net.node, z, ""), 8, 2)

    return write


def silu_of_exporters(net: Net, x: str) -> str:
    z = net.gemm(x, D, 8)
    return net.gemm(net.node("Mul", net.node("Sigmoid", z), z), 8, 2)


def softplus_of_torch(net: Net, x: str) -> str:
    z = net.gemm(x, D, 8)
    return net.gemm(net.node("Where", net.node("Greater", z, np.float32(20)), z, net.node("Softplus", z)), 8, 2)


def sums(net: Net, x: str) -> str:
    z = net.node("Relu", net.node("Sum", net.gemm(x, D, 8), net.dense(x, D, 8)))
    return net.node("ReduceMean", net.node("Reshape", z, np.array([0, 2, 4])), axes=[-1], keepdims=0)


def weighted_gemm(net: Net, x: str) -> str:
    z = net.node("Gemm", x, net.numbers(D, 8), net.numbers(1, 8), alpha=2.0, beta=0.5)
    return net.gemm(net.node("Abs", z), 8, 2)


def columns(net: Net, x: str) -> str:
    net.inputs = [(f"c{i}", ["N", 1], TensorProto.FLOAT) for i in range(D)]
    z = net.node("Concat", *(name for name, *_ in net.inputs), axis=1)
    z = net.node("Scaler", z, domain="ai.onnx.ml", offset=[0.5] * D, scale=[1.5] * D)
    return net.dense(net.node("Relu", net.dense(z, D, 8)), 8, 2)


def image(net: Net, x: str) -> str:
    net.inputs = [("x", ["N", 1, 2, 2], TensorProto.FLOAT)]
    z = net.node("Reshape", net.node("Transpose", x, perm=[0, 2, 3, 1]), np.array([-1, 4]))
    return net.dense(net.node("Relu", net.dense(net.node("Cast", z, to=TensorProto.FLOAT), D, 8)), 8, 2)


def by_activation(operator: str, *more: np.ndarray, **attributes: float) -> Callable[[Net, str], str]:
    def write(net: Net, x: str) -> str:
        z = net.node(operator, net.gemm(x, D, 8), *more, **attributes)
        return net.gemm(net.node(operator, net.gemm(z, 8, 8), *more, **attributes), 8, 2)

    return write


def rounded_constants(net: Net, x: str) -> str:
    """Integers are divided towards 0. Mod has the sign of the divisor, and with fmod that of the dividend."""
    signs, others = np.array([-7, 7, -7, 7]), np.array([2, -2, -2, 2])
    remainders = [net.node("Mod", signs, others), net.node("Mod", signs, others, fmod=1)]
    shift, *more = (net.node("Cast", of, to=1) for of in (net.node("Div", signs, others), *remainders))
    return net.gemm(net.node("Sum", x, shift, *more), D, 2)


def two_layers(net: Net, x: str) -> str:
    return net.dense(net.node("Dropout", net.node("Identity", net.dense(x, D, 8))), 8, 2)


SLOPES = np.linspace(-0.5, 2, 8, dtype=np.float32)
READ = {
    **{
        name: by_activation(name) for name in ("Relu", "Abs", "Tanh", "Sigmoid", "Softplus", "Selu", "HardSigmoid")
    },
    "LeakyRelu": by_activation("LeakyRelu", alpha=0.1),
    "LeakyRelu that rises more below": by_activation("LeakyRelu", alpha=1.5),
    "PRelu": by_activation("PRelu", SLOPES),
    "Elu": by_activation("Elu"),
    "Elu with alpha": by_activation("Elu", alpha=0.5),
    "Celu": by_activation("Celu", alpha=2.0),
    "Clip": by_activation("Clip", np.float32(-0.5), np.float32(0.75)),
    "GELU by tanh": gelu_by_tanh(lambda net, z: net.node("Mul", z, net.node("Mul", z, z))),
    "GELU by tanh, with a power": gelu_by_tanh(lambda net, z: net.node("Pow", z, np.float32(3))),
    "GELU of lipexp": by_lipexp(GELU()),
    "GELU of lipexp by tanh": by_lipexp(GELU(approximate="tanh")),
    "plain GELU of lipexp": by_lipexp(GELU(scaled=False)),
    "SiLU of lipexp": by_lipexp(SiLU()),
    "Clip below": by_activation("Clip", np.float32(0)),
    **{
        write.__name__: write
        for write in (
            *(
                pairs_of_two_layers,
                twice_the_same,
                max_min,
                interleaved_pairs,
                descending_groups,
                largest_three_of_columns,
                maxout,
                preprocessed,
            ),
            *(scaled, branches, both_signs, beside_the_layers, turned, shapes_of_torch, leaky_by_max),
            *(
                relu6_of_keras,
                normalised,
                gelu_of_older_exporters,
                silu_of_exporters,
                softplus_of_torch,
                sums,
                weighted_gemm,
                columns,
                image,
                rounded_constants,
                two_layers,
            ),
        )
    },
}
EXACT = {"max_min", "interleaved_pairs", "descending_groups", "largest_three_of_columns", "branches", "turned"}


def read_case(name: str, tmp_path: Path):
    net = Net()
    model = net.model(READ[name](net, "x"))
    x = points()
    given = x.reshape(-1, 1, 2, 2) if name == "image" else x
    return network_of(model, tmp_path), x, run(model, given)
