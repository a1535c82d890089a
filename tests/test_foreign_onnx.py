"""ONNX files: what exporters write is read as what onnxruntime computes, or refused by operator and node."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import NORMS
from torch import nn

import lipexp
from lipexp.activations import GELU, Householder, LipschitzSpline, NActivation, SiLU
from lipexp.activations.smooth import Smooth
from lipexp.config import ConfigError
from lipexp.foreign import features, read
from lipexp.foreign.features import Unread, entry
from lipexp.measured.gradients import Maximum
from lipexp.proven import Chain, Problem, prove

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

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


@pytest.mark.parametrize("name", READ)
def test_a_graph_is_the_network_that_onnxruntime_computes(name, tmp_path):
    foreign, x, known = read_case(name, tmp_path)
    np.testing.assert_allclose(outputs(foreign, x), known.reshape(len(x), -1), rtol=CLOSE, atol=CLOSE)
    assert foreign.rounding <= 2.0**-24
    if name in EXACT:  # nothing is divided, and no weights are multiplied with each other
        assert foreign.rounding == 0


def test_what_readme_says_is_refused_of_exports(tmp_path):
    for act in (Householder(), LipschitzSpline(), NActivation()):
        net = Net()
        z = net.gemm("x", D, 8)
        own = act.at(act.initial(8)[None])
        z = own.onnx(net.node, z, net.constant(own.theta[0].numpy()))
        with pytest.raises(ConfigError, match=r"Sin at|joins features of|takes a sum of"):
            network_of(net.model(net.gemm(z, 8, 2)), tmp_path)


@pytest.mark.parametrize("name", READ)
def test_no_difference_quotient_is_above_a_bound(name, tmp_path):
    foreign, x, _ = read_case(name, tmp_path)
    at = torch.from_numpy(x).double()
    for p in NORMS:
        network, chain = Chain.without_bound(foreign.network, p)
        problem = Problem(network, chain, (at.amin(0), at.amax(0)), Maximum(0.0, ()), 0, seconds=1.0)
        proofs = prove(problem).proofs
        steps = 1e-3 * torch.randn(20, *at.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        moved = network.double((at + steps).reshape(1, -1, D))[0].reshape(20, len(x), -1)
        change = torch.linalg.vector_norm(moved - network.double(at[None])[0], ord=chain.output_p, dim=-1)
        seen = float((change / torch.linalg.vector_norm(steps, ord=p, dim=-1)).max())
        found = {method: proof.value for method, proof in proofs.items() if proof.value is not None}
        assert found
        assert all(seen <= value for value in found.values()), (p, seen, found)


def test_sorting_takes_no_more_layers_than_the_file_has(tmp_path):
    for name, widths in (("max_min", [8]), ("interleaved_pairs", [8]), ("descending_groups", [8])):
        foreign, _, _ = read_case(name, tmp_path)
        assert foreign.network.hidden_widths == widths
        assert [type(act).__name__ for _, act in foreign.network.placed] == ["GroupSort"]
    foreign, _, _ = read_case("beside_the_layers", tmp_path)
    assert foreign.network.linear is not None


# Exporters -------------------------------------------------------------------------------------------------------


class MaxMin(nn.Module):
    def forward(self, z):
        a, b = z.chunk(2, -1)
        return torch.cat([torch.maximum(a, b), torch.minimum(a, b)], -1)


class Sorted(nn.Module):
    def forward(self, z):
        return z.view(z.shape[0], -1, 4).sort(-1, descending=True)[0].flatten(1)


def of_torch() -> nn.Sequential:
    torch.manual_seed(0)
    parts = (nn.Linear(D, 8), MaxMin(), nn.Linear(8, 8), Sorted(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.PReLU(8))
    more = nn.Linear(8, 6), nn.LeakyReLU(0.1), nn.Dropout(), nn.Linear(6, 4), nn.Hardtanh(), nn.Linear(4, 3)
    return nn.Sequential(nn.Flatten(), *parts, *more, nn.Softmax(-1)).eval()


def exported(tmp_path: Path, dynamo: bool, static: bool) -> Path:
    path = tmp_path / "torch.onnx"
    options: dict[str, object] = {"dynamo": dynamo, "verbose": False}
    if dynamo:
        options["dynamic_shapes"] = None if static else ({0: torch.export.Dim("N")},)
    elif not static:
        options |= {"dynamic_axes": {"input": {0: "N"}}, "input_names": ["input"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(of_torch(), (torch.zeros(3, D),), path, **options)
    return path


@pytest.mark.parametrize(
    ("dynamo", "static"),
    [
        (False, False),
        (False, True),
        pytest.param(True, False, marks=pytest.mark.slow),
        pytest.param(True, True, marks=pytest.mark.slow),
    ],
)
def test_both_exporters_of_torch_write_files_that_are_read(dynamo, static, tmp_path, capsys):
    if dynamo:
        pytest.importorskip("onnxscript")
    path = exported(tmp_path, dynamo, static)
    foreign = read(path, D, True)
    assert foreign.notes == ["left off behind the outputs: Softmax"]
    x = points(3 if static else 60)
    found = torch.from_numpy(outputs(foreign, x)).softmax(-1).numpy()
    np.testing.assert_allclose(found, run(path, x), rtol=CLOSE, atol=CLOSE)


def test_scikit_learn_s_converter_writes_files_that_are_read(tmp_path):
    skl2onnx = pytest.importorskip("skl2onnx")
    from sklearn.neural_network import MLPClassifier, MLPRegressor
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x = points()
    names = np.array(["left", "middle", "right"])[np.arange(len(x)) % 3]
    options = {"hidden_layer_sizes": (8, 6), "max_iter": 5, "random_state": 0}
    models = [
        (MLPClassifier(**options), names),
        (MLPClassifier(activation="tanh", **options), x[:, 0] > 0),
        (make_pipeline(StandardScaler(), MLPClassifier(activation="logistic", **options)), np.arange(len(x)) % 4),
        (make_pipeline(StandardScaler(), MLPRegressor(**options)), x[:, 0]),
    ]
    for model, y in models:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it has not converged
            model.fit(x, y)
        decides = hasattr(model, "classes_")
        file = skl2onnx.to_onnx(model, x[:1])
        foreign = network_of(file, tmp_path, decides)
        f, known = outputs(foreign, x), run(file, x)
        if decides:
            number = f.argmax(axis=1) if f.shape[1] > 1 else (f[:, 0] > 0).astype(int)
            assert (model.classes_[number] == known).all()
        else:
            np.testing.assert_allclose(f, known, rtol=CLOSE, atol=CLOSE)


def test_a_run_s_own_export_is_read_as_the_run(lipexp, run, tmp_path):
    folder = run("max_regions=0", "act=fullsort")
    assert lipexp("export", str(folder), "--to", "onnx").code == 0
    foreign = read(folder / "model.onnx", 2, True)
    state, known = foreign.network.state_dict(), torch.load(folder / "model.pt", weights_only=True)
    assert all(torch.equal(part, known[name]) for name, part in state.items())
    assert state.keys() == known.keys()


# Classifiers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["softmax", "labels", "sigmoid", "both", "sign", "half"])
def test_what_does_not_change_a_decision_is_left_off(ending, tmp_path):
    net = Net()
    several = ending in ("softmax", "labels")
    logits = net.gemm(net.node("Relu", net.gemm("x", D, 8)), 8, 3 if several else 1)
    decision = {
        "softmax": lambda: net.node("Softmax", logits, axis=1),
        "labels": lambda: net.node("Cast", net.node("ArgMax", net.node("LogSoftmax", logits), axis=1), to=1),
        "sigmoid": lambda: net.node("Sigmoid", logits),
        "both": lambda: net.node(
            "Concat", net.node("Sub", np.float32(1), p := net.node("Sigmoid", logits)), p, axis=1
        ),
        "sign": lambda: net.node("Cast", net.node("Greater", logits, np.float32(0)), to=1),
        "half": lambda: net.node("Cast", net.node("Less", np.float32(0.5), net.node("Sigmoid", logits)), to=1),
    }[ending]()
    foreign = network_of(net.model(decision), tmp_path, decides=True)
    x = points()
    np.testing.assert_allclose(outputs(foreign, x), run(net.model(logits), x), rtol=CLOSE, atol=CLOSE)
    assert "left off behind the outputs" in foreign.notes[0]
    if ending == "sigmoid":  # which a regression keeps
        whole = network_of(net.model(decision), tmp_path)
        np.testing.assert_allclose(outputs(whole, x), run(net.model(decision), x), rtol=CLOSE, atol=CLOSE)


@pytest.mark.parametrize("threshold", [0.25, 0.75])
@pytest.mark.parametrize("ending", ["above", "beside"])
def test_what_would_change_a_decision_is_kept(ending, threshold, tmp_path):
    net = Net()
    p = net.node("Sigmoid", net.node("Mul", net.gemm("x", D, 1), np.float32(4)))
    limit = np.float32(threshold)
    if ending == "above":
        decision = net.node("Cast", net.node("Greater", p, limit), to=TensorProto.FLOAT)
    else:
        decision = net.node("Concat", net.node("Sub", 2 * limit, p), p, axis=1)
    model, x = net.model(decision), points(400)
    f, known = outputs(network_of(model, tmp_path, decides=True), x), run(model, x)
    number = f.argmax(axis=1) if f.shape[1] > 1 else f[:, 0] > 0
    expected = known.argmax(axis=1) if known.shape[1] > 1 else known[:, 0] > 0
    np.testing.assert_array_equal(number, expected)
    assert 0 < expected.mean() < 1


DECIDED_OTHERWISE = {
    "softmax over the batch": (lambda net, p: net.node("Softmax", p, axis=0), "Softmax at .*: decides along"),
    "largest of the batch": (lambda net, p: net.node("ArgMax", p, axis=0), "ArgMax at .*: decides along"),
    "reshaped": (lambda net, p: net.node("Reshape", p, np.array([3, -1])), "Reshape at .*: works on what Softmax"),
    "rounded": (lambda net, p: net.node("Cast", p, to=TensorProto.INT64), "Cast at .*: rounds probabilities"),
    "largest class": (
        lambda net, p: net.node("ArgMax", net.node("ArgMax", p, axis=1, keepdims=0), axis=-1),
        "ArgMax at .*: works on what ArgMax",
    ),
}


@pytest.mark.parametrize("name", DECIDED_OTHERWISE)
def test_probabilities_are_decided_between_along_their_own_axis(name, tmp_path):
    write, message = DECIDED_OTHERWISE[name]
    net = Net()
    model = net.model(write(net, net.node("Softmax", net.gemm("x", D, 3), axis=1)))
    with pytest.raises(ConfigError, match=message):
        network_of(model, tmp_path, decides=True)


@pytest.mark.parametrize("operator", ["Softmax", "LogSoftmax", "ArgMax"])
def test_a_regression_keeps_what_ends_it(operator, tmp_path):
    net = Net()
    model = net.model(net.node(operator, net.gemm("x", D, 3), axis=1))
    network_of(model, tmp_path, decides=True)
    with pytest.raises(ConfigError, match=f"{operator} is read at the end of a classifier alone"):
        network_of(model, tmp_path, decides=False)


# What is refused -------------------------------------------------------------------------------------------------


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


def test_files_with_other_contents_are_refused(tmp_path):
    net = Net()
    model = net.model(net.gemm("x", D, 2))

    def refusal(change: Callable[[onnx.ModelProto], object]) -> str:
        other = onnx.ModelProto()
        other.CopyFrom(model)
        change(other)
        with pytest.raises(ConfigError) as refused:
            network_of(other, tmp_path)
        return str(refused.value)

    assert "opset 6" in refusal(lambda own: setattr(own.opset_import[0], "version", 6))
    assert "no numbers" in refusal(
        lambda own: setattr(own.graph.input[0].type.tensor_type, "elem_type", TensorProto.STRING)
    )
    assert "claims more numbers" in refusal(lambda own: own.graph.initializer[0].dims.extend([2**40]))
    assert "defines operators" in refusal(lambda own: own.functions.add(name="Relu", domain=""))
    assert "holds no graph" in refusal(lambda own: own.graph.ClearField("node"))
    assert "no inputs" in refusal(lambda own: own.graph.ClearField("input"))
    assert "sparse" in refusal(lambda own: own.graph.sparse_initializer.add())


def test_weights_in_other_files_lie_in_the_same_folder(tmp_path):
    net = Net()
    model = net.model(net.gemm("x", D, 8))
    weight = next(part for part in model.graph.initializer if len(part.dims) == 2)
    numbers = numpy_helper.to_array(weight)
    (tmp_path / "weights.bin").write_bytes(bytes(8) + numbers.tobytes())

    def stored(location: str, offset: int = 8) -> onnx.ModelProto:
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
        del weight.external_data[:]
        for key, value in (("location", location), ("offset", str(offset)), ("length", str(numbers.nbytes))):
            weight.external_data.add(key=key, value=value)
        return model

    found = network_of(stored("weights.bin"), tmp_path).network.layers[0].weight[0].numpy()
    np.testing.assert_array_equal(found, numbers)
    (tmp_path / "link.bin").symlink_to(tmp_path / "weights.bin")
    (tmp_path.parent / "outside.bin").write_bytes(bytes(8) + numbers.tobytes())
    for location, offset, message in (
        ("../outside.bin", 8, "outside of the folder"),
        ("link.bin", 8, "it is a link"),
        ("weights.bin", 16, "claims more numbers than weights.bin holds"),
        ("gone.bin", 8, "there is no gone.bin"),
    ):
        with pytest.raises(ConfigError, match=message):
            network_of(stored(location, offset), tmp_path)


# Following features ----------------------------------------------------------------------------------------------


def test_features_are_moved_without_being_computed():
    x = entry(3, [D])
    moved = x.moved(lambda places: places[:, ::-1])
    assert moved.stage is x.stage
    assert moved.per_row.tolist() == [3, 2, 1, 0]
    with pytest.raises(Unread, match="mixes the rows"):
        x.moved(lambda places: places[::-1]).per_row  # noqa: B018
    low, high = (features.extreme([x, moved], largest) for largest in (False, True))
    assert low.stage is high.stage
    assert low.stage.act.n_groups == 2


def test_a_model_in_memory_is_certified():
    net = Net()
    found = lipexp.certify(net.model(max_min(net, "x")), points(), max_regions=0)
    assert found.lipschitz.measured <= found.lipschitz.certified
    assert len(found.radii) == 60
