"""A network as an ONNX graph of standard operators, written node by node, and the runtime that reads it back.

Matrices are Gemm nodes with the stored weights as initialisers, named as in model.pt. Nothing is folded into them,
so what is proven of the weights is proven of the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

import lipexp
from lipexp.activations import Activation, Array
from lipexp.blocks import act_width
from lipexp.config import ConfigError
from lipexp.export.model import Encoding, Model, Outputs
from lipexp.networks import BakedNetwork

ML = "ai.onnx.ml"
OPSETS, IR_VERSION = {"": 17, ML: 3}, 8  # of 2022, so that older runtimes read it too


class Graph:
    """The nodes and the constants of an ONNX graph that is being written."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def node(self, operator: str, *inputs: str | Array, output: str = "", **attributes: Any) -> str:
        """Add a node; returns the name of its (first) output, which it gets from `output` if that is given.

        Args:
            inputs: names, or constants.
        """
        output = output or f"{operator}_{len(self.nodes)}"
        outputs = [output, f"{output}_places"] if operator == "TopK" else [output]
        names = [part if isinstance(part, str) else self.constant(part) for part in inputs]
        self.nodes.append(helper.make_node(operator, names, outputs, output, **attributes))
        return output

    def constant(self, value: Any, name: str = "") -> str:
        """Add a constant; returns its name."""
        name = name or f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def gather(self, z: str, features: Array, width: int) -> str:
        """z (N, width) -> (N, len(features)): some of its features, in this order."""
        if np.array_equal(features, np.arange(width)):
            return z
        return self.node("Gather", z, self.constant(features.astype(np.int64)), axis=1)


def write(model: Model, description: Mapping[str, Any]) -> bytes:
    """The ONNX file.

    Raises:
        ConfigError: the activation declares too little to be written.
    """
    graph = Graph()
    inputs, x = _inputs(graph, model)
    points, encodable = (x, None) if model.encoding is None else _encoded(graph, model.encoding, x)
    _outputs(graph, model, _network(graph, model.network, points), encodable)
    outputs = [helper.make_tensor_value_info("f", TensorProto.FLOAT, ["N", model.network.n_outputs])]
    if model.task.decides:
        kind = TensorProto.STRING if model.classes else TensorProto.INT64
        outputs.append(helper.make_tensor_value_info("prediction", kind, ["N"]))
    file = helper.make_model(
        helper.make_graph(graph.nodes, "lipexp", inputs, outputs, graph.constants),
        ir_version=IR_VERSION,
        opset_imports=[helper.make_opsetid(domain, version) for domain, version in OPSETS.items()],
        producer_name="lipexp",
        producer_version=lipexp.__version__,
    )
    helper.set_model_props(file, {"lipexp": json.dumps(description)})
    onnx.checker.check_model(file, full_check=True)
    return file.SerializeToString()


class Read:
    """A graph that was read back, in onnxruntime."""

    def __init__(self, content: bytes, model: Model) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what goes wrong is raised as well
        self._session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        self._model = model
        constants = {part.name: part for part in onnx.load_from_string(content).graph.initializer}
        names = constants.keys() & model.network.state_dict().keys()
        self.state = {name: torch.from_numpy(numpy_helper.to_array(constants[name]).copy()) for name in names}

    def __call__(self, x: Tensor) -> Outputs:
        f, *predictions = self._session.run(None, self._feed(x))
        if not predictions:
            return Outputs(torch.from_numpy(f), None)
        (prediction,) = predictions
        if self._model.classes:
            number = {name: place for place, name in enumerate(self._model.classes)}
            prediction = np.array([number.get(name, -1) for name in prediction], dtype=np.int64)
        return Outputs(torch.from_numpy(f), torch.from_numpy(prediction))

    def _feed(self, x: Tensor) -> dict[str, Array]:
        if self._model.preprocessing is None or not self._model.has_categories:
            return {"x": x.numpy()}
        rows = self._model.frame(x)
        return {
            column.name: rows[[column.name]].fillna("").to_numpy(dtype=object)
            if column.categories
            else x[:, [j]].numpy()
            for j, column in enumerate(self._model.preprocessing.columns)
        }


def _inputs(graph: Graph, model: Model) -> tuple[list[onnx.ValueInfoProto], str]:
    """The inputs of the graph, and the name of x (N, columns), in which categories are numbers."""
    if model.preprocessing is None or not model.has_categories:
        return [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", len(model.columns)])], "x"
    inputs, parts = [], []
    for column in model.preprocessing.columns:
        part = column.name
        kind = TensorProto.STRING if column.categories else TensorProto.FLOAT
        inputs.append(helper.make_tensor_value_info(part, kind, ["N", 1]))
        if column.categories:
            places = {name: float(place) for place, name in enumerate(column.categories)}
            if column.fill is not None:
                places.setdefault("", column.fill)  # the missing text
            part = graph.node(
                "LabelEncoder",
                part,
                domain=ML,
                keys_strings=[*places],
                values_floats=[*places.values()],
                default_float=-1.0,  # which cannot be used: NaN would be filled in
            )
        parts.append(part)
    return inputs, graph.node("Concat", *parts, axis=1)


def _encoded(graph: Graph, own: Encoding, x: str) -> tuple[str, str]:
    """The points (N, D) of rows x (N, columns), and whether they are encodable, (N, 1) bool."""
    if not bool(own.fill.isnan().all()):
        x = graph.node("Where", graph.node("IsNaN", x), graph.constant(own.fill), x)
    away = graph.node("Abs", graph.node("Sub", x, graph.constant(own.middle)))
    near = graph.node("LessOrEqual", away, graph.constant(own.half))
    least = graph.node("ReduceMin", graph.node("Cast", near, to=TensorProto.FLOAT), axes=[1])
    encodable = graph.node("Cast", least, to=TensorProto.BOOL)
    x = graph.gather(x, own.column.numpy(), len(own.fill))
    # In float64, since numbers may be large and close to each other, such as years.
    z = graph.node("Sub", graph.node("Cast", x, to=TensorProto.DOUBLE), graph.constant(own.mean))
    z = graph.node("Cast", graph.node("Div", z, graph.constant(own.scale)), to=TensorProto.FLOAT)
    if bool(own.is_category.any()):
        one = graph.node("Cast", graph.node("Equal", x, graph.constant(own.place)), to=TensorProto.FLOAT)
        z = graph.node("Where", graph.constant(own.is_category), one, z)
    return z, encodable


def _network(graph: Graph, network: BakedNetwork, points: str) -> str:
    """The outputs of the network, (N, C), at points (N, D)."""
    state = {name: graph.constant(part, name) for name, part in network.state_dict().items()}
    x = points
    for i, layer in enumerate(network.layers):
        weight, bias = (state[f"layers.{i}.{name}"] for name in ("weight", "bias"))
        z = graph.node("Gemm", x, weight, bias, transB=int(not layer.is_residual))
        width = act_width(network.layers, i)
        theta = state.get(f"acts.{i}", "")
        activated = _activation(graph, network.acts[i], z, width, theta) if width else z
        if layer.is_residual:
            inside = graph.node("Mul", activated, state[f"layers.{i}.t"])
            activated = graph.node("Gemm", inside, weight, x, transB=1, alpha=-1.0)
        x = activated
    linear = state.get("linear")  # the term beside the layers
    return x if linear is None else graph.node("Gemm", points, linear, x, transB=1)


def _outputs(graph: Graph, model: Model, f: str, encodable: str | None) -> None:
    """f and prediction from the outputs of the network, as in `programs.Module`."""
    if model.unit is not None:
        mean, scale = map(graph.constant, model.unit)
        f = graph.node("Mul", graph.node("Cast", f, to=TensorProto.DOUBLE), scale)
        f = graph.node("Cast", graph.node("Add", f, mean), to=TensorProto.FLOAT)
    if encodable is None:
        graph.node("Identity", f, output="f")
    else:
        graph.node("Where", encodable, f, graph.constant(np.float32(np.nan)), output="f")
    if not model.task.decides:
        return
    if model.task.several:
        number = graph.node("ArgMax", f, axis=1)
    else:
        number = graph.node("Cast", graph.node("Greater", f, graph.constant(np.float32(0))), to=TensorProto.INT64)
    if encodable is not None:
        number = graph.node("Where", encodable, number, graph.constant(-1))
    number = graph.node("Squeeze", number, graph.constant([1]), output="" if model.classes else "prediction")
    if model.classes:
        keys = {"keys_int64s": [*range(len(model.classes))], "values_strings": [*model.classes]}
        graph.node("LabelEncoder", number, output="prediction", domain=ML, default_string="", **keys)


def _activation(graph: Graph, act: Activation, z: str, width: int, theta: str) -> str:
    """`act` of z (N, width), by its own operators, its two slopes, or the groups that it sorts.

    Args:
        theta: the name of its parameters, if it has any.

    Raises:
        ConfigError: it declares none of them.
    """
    written = act.onnx(graph.node, z, theta)
    if written is not None:
        return written
    slopes, groups = act.two_slopes(width), act.groups(width)
    if slopes is not None:
        return _two_slopes(graph, z, *slopes)
    if groups is None:
        allowed = "declares neither two slopes nor the groups that it sorts, which ONNX needs; --to torch does not"
        raise ConfigError("act", act.label, allowed)
    return _sorted(graph, z, groups)


def _two_slopes(graph: Graph, z: str, below: float, above: float) -> str:
    """above z where z > 0, and below z elsewhere."""
    if above != 1:
        lines = [graph.node("Mul", z, graph.constant(np.float32(slope))) for slope in (below, above)]
        return graph.node("Max" if below < above else "Min", *lines)
    if below == 1:
        return z
    if below in (0, -1):
        return graph.node("Relu" if below == 0 else "Abs", z)
    return graph.node("LeakyRelu", z, alpha=below)


def _sorted(graph: Graph, z: str, groups: Array) -> str:
    """z (N, H) with the features of each of the groups (n, size) in ascending order, by Min and Max or TopK."""
    n, size = groups.shape
    width = n * size
    if size == 2:
        pairs = [graph.gather(z, members, width) for members in groups.T]
        z = graph.node("Concat", *(graph.node(end, *pairs) for end in ("Min", "Max")), axis=1)
        order = groups.T.ravel()
    else:
        order = groups.ravel()
        # In a shape, 0 stands for the size that is there.
        members = graph.node("Reshape", graph.gather(z, order, width), graph.constant([0, n, size]))
        ascending = graph.node("TopK", members, graph.constant([size]), axis=-1, largest=0)
        z = graph.node("Reshape", ascending, graph.constant([0, width]))
    return graph.gather(z, np.argsort(order), width)
