"""ONNX files: what exporters write is read as what onnxruntime computes."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from graphs import (
    CLOSE,
    EXACT,
    READ,
    D,
    Net,
    max_min,
    network_of,
    outputs,
    points,
    read_case,
    run,
)
from networks import NORMS
from torch import nn

import lipexp
from lipexp.activations import Householder, LipschitzSpline, NActivation
from lipexp.config import ConfigError
from lipexp.foreign import features, read
from lipexp.foreign.features import Unread, entry
from lipexp.measured.gradients import Maximum
from lipexp.proven import Chain, Problem, prove

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from onnx import TensorProto, numpy_helper  # noqa: E402


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
def test_both_exporters_of_torch_write_files_that_are_read(dynamo, static, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(logging.root, "handlers", [])  # of an earlier test, whose folder is gone
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


def test_the_irrational_numbers_of_gelu_count_as_rounded_and_others_are_not_read(tmp_path):
    def gelu(factor: np.float32) -> onnx.ModelProto:
        net = Net()
        x = net.gemm("x", D, 8)
        share = net.node("Add", net.node("Erf", net.node("Mul", x, factor)), np.float32(1))
        half = net.node("Mul", net.node("Mul", x, share), np.float32(0.5))
        return net.model(net.gemm(half, 8, 1))

    assert network_of(gelu(np.float32(math.sqrt(0.5))), tmp_path).rounding == 2.0**-24
    with pytest.raises(ConfigError, match="a part of GELU alone"):
        network_of(gelu(np.float32(math.sqrt(0.5) * (1 + 1e-6))), tmp_path)
