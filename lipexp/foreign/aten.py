"""The operators of torch programs, by their names in aten."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

from lipexp.foreign import features, operands, operators
from lipexp.foreign.features import MOST_WEIGHTS, Rows, Stage, Unread, moved
from lipexp.foreign.operands import Decided, constant, numbers_of, tensor
from lipexp.foreign.outputs import Graph

Arguments = Mapping[str, Any]
FLOATS = {7, 8, "torch.float32", "torch.float64"}  # numbers of types, in a file, or names


def _x(a: Arguments) -> Any:
    return tensor(a["self"])


def _places(a: Arguments, name: str = "dim", default: Any = None) -> list[int] | None:
    found = a.get(name, default)
    return None if found is None else numbers_of(found)


def _linear(a: Arguments) -> Any:
    x, bias = tensor(a["input"]), a.get("bias")
    weight = constant(a["weight"], "a weight")
    if not isinstance(x, Rows):
        return x @ weight.T + (0 if bias is None else constant(bias))
    return features.linear(x, weight, None if bias is None else constant(bias, "a bias"))


def _addmm(a: Arguments) -> Any:
    product = operators.matmul(a["mat1"], a["mat2"])
    product = operators.multiply(product, np.asarray(a.get("alpha", 1)))
    return operators.add(product, operators.multiply(a["self"], np.asarray(a.get("beta", 1))))


def _add(a: Arguments, sign: float = 1.0) -> Any:
    alpha, other = a.get("alpha", 1), a["other"]
    other = other if alpha == 1 else operators.multiply(other, np.asarray(alpha))
    return operators.add(a["self"], other, sign)


def _extreme(largest: bool) -> Callable[[Arguments], Any]:
    def found(a: Arguments) -> Any:
        if "other" in a:
            return features.extreme([_x(a), tensor(a["other"])], largest)
        x, dims = _x(a), _places(a)
        if not isinstance(x, Rows) or dims is None or len(dims) != 1:
            raise Unread("is read along one axis of features")
        (axis,) = dims
        best = operands.gather(features.sort(x, axis), np.array([x.shape[axis] - 1 if largest else 0]), axis)
        return best if a.get("keepdim") else moved(best, lambda places: np.squeeze(places, axis))

    return found


def _with_places(of: Callable[[Arguments], Any]) -> Callable[[Arguments], Any]:
    """Of an operator that also returns the places of what it takes, which are not read."""
    return lambda a: [of(a), None] if "other" not in a else of(a)


def _sort(a: Arguments) -> Any:
    x, axis = _x(a), int(a.get("dim", -1))
    if not isinstance(x, Rows):
        raise Unread("sorts constants")
    found = features.sort(x, axis)
    return [found.moved(lambda places: np.flip(places, axis)) if a.get("descending") else found, None]


def _topk(a: Arguments) -> Any:
    x, k, axis = _x(a), int(a["k"]), int(a.get("dim", -1))
    if not isinstance(x, Rows) or not 1 <= k <= x.shape[axis] or not a.get("sorted", True):
        raise Unread("takes no features in order")
    order = np.arange(k) if not a.get("largest", True) else np.arange(x.shape[axis] - 1, x.shape[axis] - 1 - k, -1)
    return [operands.gather(features.sort(x, axis), order, axis), None]


def _split(a: Arguments) -> Any:
    x, axis = _x(a), int(a.get("dim", 0))
    n = x.shape[axis]
    sizes = a.get("split_sizes")
    if sizes is None:
        size = int(a["split_size"]) if "split_size" in a else -(-n // int(a["chunks"]))
        if size < 1:
            raise Unread("splits into nothing")
        sizes = [min(size, n - start) for start in range(0, n, size)]
    return operands.split(x, sizes, axis)


def _unbind(a: Arguments) -> Any:
    x, axis = _x(a), int(a.get("dim", 0))
    return [
        moved(part, lambda places: np.squeeze(places, axis))
        for part in operands.split(x, [1] * x.shape[axis], axis)
    ]


def _slice(a: Arguments) -> Any:
    ends = [a.get("start"), a.get("end")]
    start, end = (default if part is None else int(part) for part, default in zip(ends, (0, 2**62), strict=True))
    return operands.sliced(_x(a), [start], [end], [int(a.get("dim", 0))], [int(a.get("step", 1))])


def _index(a: Arguments) -> Any:
    parts = [slice(None) if part is None else constant(part) for part in a["indices"]]
    return moved(_x(a), lambda places: places[tuple(parts)])


def _unflatten(a: Arguments) -> Any:
    x, axis = _x(a), int(a["dim"])
    axis %= len(x.shape)
    return operands.reshape(x, [*x.shape[:axis], *map(int, a["sizes"]), *x.shape[axis + 1 :]], False)


def _swap(a: Arguments) -> Any:
    first, second = int(a.get("dim0", 0)), int(a.get("dim1", 1))
    return moved(_x(a), lambda places: np.swapaxes(places, first, second))


def _stack(a: Arguments) -> Any:
    axis = int(a.get("dim", 0))
    return operands.concat([operands.unsqueeze(tensor(part), [axis]) for part in a["tensors"]], axis)


def _dropout(a: Arguments) -> Any:
    if a.get("train"):
        raise Unread("is in training mode; eval() ends that")
    return a["input"]


def _normalised(a: Arguments) -> Any:
    if a.get("training"):
        raise Unread("is in training mode; eval() ends that")
    mean, variance, weight, bias = (a.get(name) for name in ("running_mean", "running_var", "weight", "bias"))
    return operators.normalised(a["input"], mean, variance, weight, bias, float(a.get("eps", 1e-5)))


def _mean(a: Arguments, total: bool = False) -> Any:
    x = _x(a)
    axes = _places(a) or range(len(x.shape))  # an empty list stands for all of them
    return operators.mean(x, axes, bool(a.get("keepdim")), total)


def _filled(value: float) -> Callable[[Arguments], Any]:
    def found(a: Arguments) -> Any:
        shape = _x(a).shape if "self" in a else numbers_of(a["size"])
        if np.prod([float(n) for n in shape]) > MOST_WEIGHTS:
            raise Unread("makes too many numbers")
        return np.full(shape, a.get("fill_value", value))

    return found


def _elu(a: Arguments) -> Any:
    scale, inner = float(a.get("scale", 1)), float(a.get("input_scale", 1))
    if inner != 1:
        raise Unread("has input_scale, which is not read")
    return operators.elu(a["self"], float(a.get("alpha", 1)), scale)


def _divide(a: Arguments) -> Any:
    if a.get("rounding_mode") is not None:
        raise Unread("rounds features")
    return operators.divide(a["self"], a["other"])


def _prelu(a: Arguments) -> Any:
    slopes = constant(a["weight"])  # of the channels, which are the second axis
    return operators.prelu(a["self"], slopes.reshape(-1, *[1] * (len(_x(a).shape) - 2)))


def _softplus(a: Arguments) -> Any:
    if float(a.get("threshold", 20)) < 20:  # above 20 what torch returns, x, is softplus(x) to 2e-9
        raise Unread("is no softplus, for its threshold")
    return operators.softplus(a["self"], float(a.get("beta", 1)))


def _compared(name: str, turned: bool) -> Callable[[Arguments], Any]:
    def found(a: Arguments) -> Any:
        pair = (a["other"], a["self"]) if turned else (a["self"], a["other"])
        return operators.above(*pair, name)

    return found


def _softmax(a: Arguments) -> Any:
    return operators.probabilities(a["self"], int(a["dim"]), "softmax")


def _activated(of: Callable[[Any], Any], a: Arguments) -> Any:
    return of(a["self"])


def _same(a: Arguments) -> Any:
    return a["self"]


OPERATORS: dict[str, Callable[[Arguments], Any]] = {
    **dict.fromkeys(
        ("detach", "detach_", "clone", "contiguous", "alias", "lift_fresh_copy", "lift_fresh", "positive"), _same
    ),
    **dict.fromkeys(("to", "_to_copy"), lambda a: a["self"]),
    **dict.fromkeys(("dropout", "feature_dropout", "alpha_dropout", "dropout_", "feature_dropout_"), _dropout),
    "flatten": lambda a: operands.flatten(_x(a), int(a.get("start_dim", 0)), int(a.get("end_dim", -1))),
    **dict.fromkeys(
        ("view", "reshape", "_unsafe_view"),
        lambda a: operands.reshape(_x(a), numbers_of(a["size"] if "size" in a else a["shape"]), False),
    ),
    "view_as": lambda a: operands.reshape(_x(a), tensor(a["other"]).shape, False),
    "unflatten": _unflatten,
    **dict.fromkeys(("transpose", "swapaxes"), _swap),
    **dict.fromkeys(("t", "numpy_T"), lambda a: moved(_x(a), lambda places: places.T)),
    "mT": lambda a: moved(_x(a), lambda places: places.swapaxes(-1, -2)),
    "permute": lambda a: moved(_x(a), lambda places: np.transpose(places, numbers_of(a["dims"]))),
    "squeeze": lambda a: operands.squeeze(_x(a), _places(a)),
    "unsqueeze": lambda a: operands.unsqueeze(_x(a), numbers_of(a["dim"])),
    **dict.fromkeys(
        ("cat", "concat", "concatenate"), lambda a: operands.concat(a["tensors"], int(a.get("dim", 0)))
    ),
    "stack": _stack,
    **dict.fromkeys(("split", "split_with_sizes", "chunk"), _split),
    "unbind": _unbind,
    "slice": _slice,
    "narrow": lambda a: operands.sliced(
        _x(a), [int(a["start"])], [int(a["start"]) + int(a["length"])], [int(a["dim"])]
    ),
    "select": lambda a: moved(_x(a), lambda places: np.take(places, int(a["index"]), int(a["dim"]))),
    "index_select": lambda a: operands.gather(_x(a), constant(a["index"]), int(a["dim"])),
    "index": _index,
    "flip": lambda a: moved(_x(a), lambda places: np.flip(places, tuple(numbers_of(a["dims"])))),
    "expand": lambda a: operands.expand(_x(a), numbers_of(a["size"])),
    "expand_as": lambda a: operands.expand(_x(a), tensor(a["other"]).shape),
    **dict.fromkeys(("sym_size", "size"), lambda a: int(_x(a).shape[int(a["dim"])])),
    "linear": _linear,
    "addmm": _addmm,
    "matmul": lambda a: operators.matmul(a["self"], a["other"]),
    **dict.fromkeys(("mm", "mv"), lambda a: operators.matmul(a["self"], a["mat2"] if "mat2" in a else a["vec"])),
    "add": _add,
    "sub": lambda a: _add(a, -1.0),
    "rsub": lambda a: _add({"self": a["other"], "other": a["self"], "alpha": a.get("alpha", 1)}, -1.0),
    "mul": lambda a: operators.multiply(a["self"], a["other"]),
    "div": _divide,
    "neg": lambda a: operators.multiply(a["self"], np.asarray(-1)),
    **dict.fromkeys(("batch_norm", "_native_batch_norm_legit_no_training"), _normalised),
    "mean": _mean,
    "sum": lambda a: _mean(a, total=True),
    "ones_like": _filled(1.0),
    "zeros_like": _filled(0.0),
    "ones": _filled(1.0),
    "zeros": _filled(0.0),
    "full": _filled(0.0),
    "sort": _sort,
    "topk": _topk,
    "max": _with_places(_extreme(True)),
    "min": _with_places(_extreme(False)),
    **dict.fromkeys(("maximum", "amax"), _extreme(True)),
    **dict.fromkeys(("minimum", "amin"), _extreme(False)),
    **{name: partial(_activated, of) for name, of in operators.ACTIVATIONS.items()},
    "leaky_relu": lambda a: operators.leaky_relu(a["self"], float(a.get("negative_slope", 0.01))),
    "prelu": _prelu,
    "elu": _elu,
    "celu": lambda a: operators.celu(a["self"], float(a.get("alpha", 1))),
    "gelu": lambda a: operators.gelu(a["self"], a.get("approximate", "none")),
    "softplus": _softplus,
    "hardtanh": lambda a: operators.clip(a["self"], a.get("min_val", -1), a.get("max_val", 1)),
    "hardsigmoid": lambda a: operators.hard_sigmoid(a["self"], 1 / 6, 0.5),
    "clamp": lambda a: operators.clip(a["self"], a.get("min"), a.get("max")),
    "clamp_min": lambda a: operators.clip(a["self"], a["min"], None),
    "clamp_max": lambda a: operators.clip(a["self"], None, a["max"]),
    **dict.fromkeys(("softmax", "log_softmax", "_softmax", "_log_softmax"), _softmax),
    "argmax": lambda a: operators.largest(a["self"], int(a["dim"]), "argmax"),
    **{name: _compared(name, False) for name in ("gt", "ge")},
    **{name: _compared(name, True) for name in ("lt", "le")},
}
# What may come behind probabilities without changing which is the largest, or their axes.
KEEP = {"detach", "clone", "contiguous", "alias", "log", "to"}
WRITTEN = ("out", "values", "max_values", "min_indices")  # arguments for results
CHECKS = {"_assert_scalar", "_assert_tensor_metadata", "sym_constrain_range_for_size", "_assert_async"}


def call(name: str, arguments: Arguments, changed: set[Stage]) -> Any:
    """What an operator makes of its arguments: an operand, or a list of several.

    Args:
        changed: the stages of tensors that were changed in place, as by `relu_`. Neither they nor views of them
            may be used any more; what the operator returned may.
    """
    if any(part.stage in changed for part in _features(arguments.values())):
        raise Unread("uses a tensor that was changed in place before")
    if any(arguments.get(key) is not None for key in WRITTEN):
        raise Unread("writes into an argument")
    if name.endswith("_") and not name.startswith("_") and name not in OPERATORS:
        target = next(iter(arguments.values()))
        if not isinstance(target, Rows):
            raise Unread("changes a constant in place")
        changed.add(target.stage)
        name = name[:-1]
    decided = [part for part in arguments.values() if isinstance(part, Decided)]
    if decided and name not in ("softmax", "log_softmax", "_softmax", "_log_softmax", "argmax"):
        if len(decided) > 1 or not (decided[0].is_class or name in KEEP) or any(_features(arguments.values())):
            raise Unread(f"works on what {decided[0].by[-1]} has made of the outputs")
        if not decided[0].is_class and arguments.get("dtype") not in (None, *FLOATS):
            raise Unread("rounds probabilities")
        return decided[0].then(name)
    if name not in OPERATORS:
        raise Unread("is no operator that lipexp reads")
    if (
        arguments.get("dtype") is not None
        and arguments["dtype"] not in FLOATS
        and any(_features(arguments.values()))
    ):
        raise Unread("rounds features")
    return OPERATORS[name](arguments)


def made(outputs: Iterable[tuple[str, Any]], changed: set[Stage]) -> Graph:
    """The outputs of a program that depend on its input, none of which was changed in place.

    Raises:
        Unread: one was, or is a view of what was.
    """
    found = [(name, value) for name, value in outputs if isinstance(value, Rows | Decided)]
    for name, value in found:
        rows: Rows | None = value.outputs if isinstance(value, Decided) else value
        while rows is not None:
            if rows.stage in changed:
                raise Unread(f"output at {name!r}: is a tensor that was changed in place before")
            rows = rows.beside
    return Graph(found)


def _features(values: Iterable[Any]) -> Iterator[Rows]:
    """All features among some values, and in the lists among them."""
    for part in values:
        if isinstance(part, Rows):
            yield part
        elif isinstance(part, list):
            yield from _features(part)
