"""Networks known by their weights: state dicts, whose activation is named, and scikit-learn's estimators."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lipexp.activations import Activation, as_activation
from lipexp.config import ConfigError, conf_dir, instantiate, no_such
from lipexp.fitting import Option, node, number_of_python
from lipexp.foreign import features, operators
from lipexp.foreign.features import Rows, Unread, entry, linear
from lipexp.foreign.network import Foreign
from lipexp.foreign.outputs import Graph, at, network
from lipexp.networks import BakedNetwork

Act = Callable[[Rows], Any]

# Of torch, by its names; what they take is what their functions take.
OWN: Mapping[str, Callable[..., Any]] = {
    **operators.ACTIVATIONS,
    "identity": lambda x: x,
    "leaky_relu": lambda x, slope=0.01: operators.leaky_relu(x, slope),
    "elu": operators.elu,
    "celu": lambda x, alpha=1.0: operators.celu(x, alpha),
    "softplus": operators.softplus,
    "gelu": operators.gelu,
    "hardtanh": lambda x, low=-1.0, high=1.0: operators.clip(x, low, high),
}
REPARAMETRISED = ("parametrizations", "_orig", "_g", "_v", "original0", "original1")
KINDS = {"weight": "weight", "bias": "bias"}


def act_named(choice: Option) -> Act:
    """The activation of `--act`: one of torch's by its name in torch.nn.functional, or an option of conf/act/.

    Args:
        choice: `leaky_relu,slope=0.2`; or a mapping, {"option": "leaky_relu", "slope": 0.2}.

    Raises:
        ConfigError: there is none, or it does not take these arguments.
    """
    given = _parsed(choice)
    name = given.pop("option", None)
    if name not in OWN:
        known = sorted({*OWN, *(path.stem for path in (conf_dir() / "act").glob("*.yaml"))})
        if name is not None and name not in known:
            raise ConfigError("--act", name, no_such("activation", str(name), known))
        act = _of_lipexp(choice)
        if act.n_parameters(4):
            raise ConfigError("--act", _shown(choice), "has parameters, which this state dict does not hold")
        return lambda x: features.activated(features.separated(x), act)
    own, shown = OWN[name], _shown(choice)
    takes = {part.name: part.default for part in [*inspect.signature(own).parameters.values()][1:]}
    for key, value in given.items():
        if key not in takes:
            known = [f"{key}={default}" for key, default in takes.items()]
            raise ConfigError("--act", shown, f"{name} takes {' and '.join(known) or 'no arguments'}, not {key}")
        if isinstance(takes[key], str):
            if value not in ("none", "tanh"):
                raise ConfigError("--act", shown, f"{key} must be none or tanh")
        elif isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ConfigError("--act", shown, f"{key} must be a finite number")

    try:
        own(entry(1, [1]), **given)
    except ConfigError as error:
        raise ConfigError("--act", shown, f"{error.option} {error.allowed}") from None
    except Unread as error:
        raise ConfigError("--act", shown, str(error)) from None
    return lambda x: own(x, **given)


def _parsed(choice: Option) -> dict[str, Any]:
    """The name of an activation as `option`, and its arguments."""
    if not isinstance(choice, str):
        return {key: number_of_python(value) for key, value in dict(choice).items()}
    name, *parts = choice.split(",")
    pairs = [part.partition("=") for part in parts]
    if not all(sign and value for _, sign, value in pairs):
        raise ConfigError("--act", choice, "must be a name, or NAME,KEY=VALUE")
    return {"option": name} | {key: _number(value) for key, _, value in pairs}


def _shown(choice: Option) -> str:
    """As the command line spells it."""
    name, *rest = _parsed(choice).items()
    return ",".join([str(name[1]), *(f"{key}={value}" for key, value in rest)])


def _of_lipexp(choice: Option) -> Activation:
    """An option of conf/act/."""
    try:
        return as_activation(instantiate(node("act", _parsed(choice), 1.0), "act"))
    except ConfigError as error:
        name = error.option.removeprefix("act").removeprefix(".").removeprefix("_target_")
        raise ConfigError("--act", _shown(choice), f"{name} {error.allowed}".strip()) from None


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def of_state(state: Mapping[str, Any], act: Option | None) -> Foreign:
    """The network of a state dict: its matrices in their order, with the activation between them.

    Raises:
        Unread: an entry is no weight or bias of a linear layer, or does not fit; it is named.
    """
    if act is None:
        raise Unread("holds weights alone: name the activation with --act, such as --act relu")
    layers = _matrices(state)
    apply = act_named(act)
    x = entry(1, [layers[0][1].shape[1]])
    for i, (name, weight, bias) in enumerate(layers):
        with at("layer", name):
            x = linear(x, weight, bias)
            x = apply(x) if i + 1 < len(layers) else x
    return network(Graph([(layers[-1][0], x)]), decides=False)


def _matrices(state: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(name, weight (out, in), bias (out,) or None) of each layer."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, part in state.items():
        layer, _, kind = str(name).rpartition(".")
        if any(word in str(name) for word in REPARAMETRISED[:1]) or kind.endswith(REPARAMETRISED[1:]):
            raise Unread(f"{name} belongs to a parametrisation: remove it before saving (remove_parametrizations)")
        fits = (
            isinstance(part, Tensor) and part.is_floating_point() and part.dim() == (2 if kind == "weight" else 1)
        )
        if kind not in KINDS or not fits or part.numel() == 0:
            shape = f" of shape {tuple(part.shape)}" if isinstance(part, Tensor) else ""
            raise Unread(f"{name}{shape} is no weight or bias of a linear layer")
        found.setdefault(layer, {})[kind] = part
    layers: list[tuple[str, Any, Any]] = []
    for layer, parts in found.items():
        if "weight" not in parts:
            raise Unread(f"{layer}.bias has no weight")
        weight, bias = (None if part is None else part.double().numpy() for part in map(parts.get, KINDS))
        assert weight is not None
        if bias is not None and len(bias) != len(weight):
            raise Unread(f"{layer}.bias has {len(bias)} entries for {len(weight)} features")
        if layers and layers[-1][1].shape[0] != weight.shape[1]:
            raise Unread(
                f"{layer}.weight takes {weight.shape[1]} features, {layers[-1][0]} gives {len(layers[-1][1])}"
            )
        layers.append((layer or "weight", weight, bias))
    if not layers:
        raise Unread("holds no weights")
    return layers


def of_lipexp(state: Mapping[str, Tensor], act: Option | None) -> Foreign | None:
    """The network of model.pt of a run, where it has parts that only lipexp has; None for any other state dict."""
    special = any(
        name.endswith(".t") or name in ("linear", "multipliers") or name.startswith("acts.") for name in state
    )
    if "layers.0.weight" not in state or not special:
        return None
    if act is None:
        raise Unread("holds weights alone: name the activation with --act, such as --act relu")
    own = _of_lipexp(act)
    try:
        return Foreign(BakedNetwork.from_state_dict(state, own), 0.0)
    except (ValueError, TypeError) as error:
        raise Unread(f"holds no such network: {error}") from None


# scikit-learn ----------------------------------------------------------------------------------------------------

OF_SKLEARN = {"identity": "identity", "logistic": "sigmoid", "tanh": "tanh", "relu": "relu"}


def of_sklearn(model: Any) -> Foreign:
    """An MLPClassifier or MLPRegressor, or a Pipeline of scalers that ends in one.

    Of a classifier its last softmax or logistic function is left off.

    Raises:
        Unread: it is not fitted, or has a step that is no map of a known kind.
    """
    steps = [step for _, step in model.steps] if hasattr(model, "steps") else [model]
    *before, last = steps
    if not hasattr(last, "coefs_"):
        raise Unread(f"{type(last).__name__} has no coefs_: it is not fitted, or no MLPClassifier or MLPRegressor")
    first = next((step for step in steps if hasattr(step, "n_features_in_")), last)
    x: Any = entry(1, [int(first.n_features_in_)])
    for step in before:
        with at("step", type(step).__name__):
            x = _scaled(step, x)
    apply, layers = act_named(OF_SKLEARN[last.activation]), list(zip(last.coefs_, last.intercepts_, strict=True))
    for i, (weight, bias) in enumerate(layers):
        x = linear(x, np.asarray(weight, dtype=np.float64).T, np.asarray(bias, dtype=np.float64))
        x = apply(x) if i + 1 < len(layers) else x
    left = {"softmax": "softmax", "logistic": "the logistic function"}.get(last.out_activation_)
    notes = [f"left off behind the outputs: {left}"] if left else []
    if left == "the logistic function" and len(layers[-1][1]) > 1:
        raise Unread("MLPClassifier decides several labels at once")
    found = network(Graph([("predict", x)]), decides=False)
    return Foreign(found.network, found.rounding, notes, classes=tuple(getattr(last, "classes_", ())))


def _scaled(step: Any, x: Any) -> Any:
    """The map of a fitted scaler."""
    kind = type(step).__name__
    if kind == "StandardScaler":
        x = x if step.mean_ is None else operators.subtract(x, step.mean_)
        return x if step.scale_ is None else operators.divide(x, step.scale_)
    if kind == "MinMaxScaler" and not step.clip:
        return operators.add(operators.multiply(x, step.scale_), step.min_)
    if kind in ("RobustScaler", "MaxAbsScaler"):
        center, scale = getattr(step, "center_", None), step.scale_
        x = x if center is None else operators.subtract(x, center)
        return x if scale is None else operators.divide(x, scale)
    raise Unread("is no map that lipexp reads")


def texts(values: Sequence[Any]) -> list[str]:
    """Names of classes as they are shown."""
    return [str(value.item() if isinstance(value, np.generic | torch.Tensor) else value) for value in values]
