"""ONNX graphs that are no network of layers are refused by operator and node."""

from __future__ import annotations

import math

import numpy as np
import pytest
from graphs import (
    D,
    Net,
    network_of,
)

from lipexp.config import ConfigError

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from onnx import TensorProto  # noqa: E402


def residual(net: Net, x: str) -> str:
    h = net.node("Relu", net.gemm(x, D, 8))
    return net.node("Add", h, net.node("Relu", net.gemm(h, 8, 8)))


def beside_several_outputs(net: Net, x: str) -> str:
    return net.node("Add", net.gemm(net.node("Relu", net.gemm(x, D, 8)), 8, 2), net.gemm(x, D, 2))


def mixed_rows(net: Net, x: str) -> str:
    return net.node("MatMul", net.node("Softmax", x), net.node("Transpose", x))


def over_the_batch(net: Net, x: str) -> str:
    return net.node("ReduceMax", net.gemm(x, D, 2), axes=[0], keepdims=1)


def times_rows(net: Net, x: str) -> str:
    n = net.node("Cast", net.node("Gather", net.node("Shape", x), np.array(0)), to=TensorProto.FLOAT)
    return net.node("Mul", x, n)


def over_no_axes(net: Net, x: str) -> str:
    return net.node("ReduceSum", net.gemm(x, D, 2), np.zeros(0, dtype=np.int64))


def sorted_batch(net: Net, x: str) -> str:
    z = net.node("Reshape", net.gemm(x, D, 2), np.array([1, -1]))
    return net.node("Reshape", net.node("TopK", z, np.array([2])), np.array([-1, 1]))


def not_finite(net: Net, x: str) -> str:
    return net.node("MatMul", x, np.full((D, 2), np.nan, dtype=np.float32))


def weighted_probabilities(net: Net, x: str) -> str:
    return net.node("ArgMax", net.node("Mul", net.node("Softmax", net.gemm(x, D, 3)), net.numbers(3)), axis=1)


def half_precision(net: Net, x: str) -> str:
    return net.node("Cast", x, to=TensorProto.FLOAT16)


def huge(net: Net, x: str) -> str:
    return net.node("Expand", net.node("Unsqueeze", x, np.array([0])), np.array([2**40, 1, D]))


def plain_error_function(net: Net, x: str) -> str:
    return net.node("Erf", net.node("Mul", x, np.float32(math.sqrt(0.5))))


def softplus_with_another_threshold(net: Net, x: str) -> str:
    return net.node("Where", net.node("Greater", x, np.float32(0)), x, net.node("Softplus", x))


def softplus_below(net: Net, x: str) -> str:
    return net.node("Where", net.node("Less", x, np.float32(-20)), x, net.node("Softplus", x))


def softplus_of_another(net: Net, x: str) -> str:
    other = net.node("Gather", x, np.array([1, 2, 3, 0]), axis=1)
    return net.node("Where", net.node("Greater", other, np.float32(20)), x, net.node("Softplus", x))


def softplus_where_not(net: Net, x: str) -> str:
    z = net.gemm(x, D, 1)
    return net.node("Where", net.node("Not", net.node("Greater", z, np.float32(20))), z, net.node("Softplus", z))


def training(net: Net, x: str) -> str:
    node = net.node("BatchNormalization", x, *(np.ones(D, dtype=np.float32) for _ in range(4)))
    net.nodes[-1].output.extend(["mean", "variance"])
    return node


def another_cube(net: Net, x: str) -> str:
    z = net.node("Relu", x)
    return net.node("Add", z, net.node("Mul", np.float32(0.045), net.node("Pow", z, np.float32(3))))


def ended_twice(net: Net, x: str) -> str:
    net.node("Relu", x, output="y")
    return net.node("Tanh", x, output="y")


REFUSED = {
    "Conv": (lambda net, x: net.node("Conv", x, net.numbers(1, 1, 2)), "Conv at 'Conv_0': is no operator"),
    "Exp": (lambda net, x: net.node("Exp", x), "Exp at 'Exp_0': is no operator"),
    "a product": (lambda net, x: net.node("Mul", x, x), "output at 'Mul_0': multiplies features with each other"),
    "a power": (lambda net, x: net.node("Pow", x, np.float32(4)), "Pow at 'Pow_0': takes a power of features"),
    "another cube": (another_cube, "joins features of different depths"),
    "a quotient": (lambda net, x: net.node("Div", np.float32(1), x), "Div at 'Div_0': divides by features"),
    "residual": (residual, "Add at 'Add_4': joins features of different depths"),
    "beside several": (beside_several_outputs, "output at 'Add_4': adds an affine map of the input to several"),
    "mixed rows": (mixed_rows, "MatMul at 'MatMul_2': works on what Softmax"),
    "over the batch": (over_the_batch, "ReduceMax at 'ReduceMax_1': mixes the rows"),
    "times the rows": (times_rows, "output at 'Mul_3': depends on the number of rows"),
    "over no axes": (over_no_axes, "ReduceSum at 'ReduceSum_1': mixes the rows"),
    "Celu below 0": (lambda net, x: net.node("Celu", x, alpha=-1.0), "Celu at 'Celu_0': has alpha=-1"),
    "Elu below 0": (lambda net, x: net.node("Elu", x, alpha=-1.0), "Elu at 'Elu_0': alpha=-1.0: must be"),
    "sorted batch": (sorted_batch, "TopK at 'TopK_2': mixes the rows"),
    "not finite": (not_finite, "MatMul at 'MatMul_0': holds a number that is not finite"),
    "weighted probabilities": (weighted_probabilities, "Mul at 'Mul_2': works on what Softmax"),
    "half precision": (half_precision, "Cast at 'Cast_0': rounds features"),
    "huge": (huge, "Expand at 'Expand_1': makes too many numbers"),
    "error function": (plain_error_function, "output at 'Erf_1': takes the error function outside of GELU"),
    "another softplus": (softplus_with_another_threshold, "Where at 'Where_2': chooses between features"),
    "softplus below": (softplus_below, "Where at 'Where_2': chooses between features"),
    "softplus of another": (softplus_of_another, "Where at 'Where_3': chooses between features"),
    "softplus where not": (softplus_where_not, "Where at 'Where_4': chooses between features"),
    "a name twice": (ended_twice, "Tanh at 'y': sets a value that there is already"),
    "training": (training, "BatchNormalization at 'BatchNormalization_0': is in training mode"),
    "nothing": (lambda net, x: net.node("Relu", "nowhere"), "Relu at 'Relu_0': takes nowhere, which is not read"),
    "another domain": (lambda net, x: net.node("Relu", x, domain="mine"), "Relu at 'Relu_0': is no operator"),
    "a constant": (lambda net, x: net.node("Relu", net.numbers(2, 2)), "Relu at 'Relu_0': activates a constant"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_read_is_named_with_its_operator_and_node(name, tmp_path):
    write, message = REFUSED[name]
    net = Net()
    with pytest.raises(ConfigError) as refused:
        network_of(net.model(write(net, "x")), tmp_path)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
