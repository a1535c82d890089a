"""Networks that lipexp has not trained: read without running them, and certified as any other.

| module         | what it does                                                                              |
|----------------|-------------------------------------------------------------------------------------------|
| `features`     | follows tensors symbolically, as features of layers                                       |
| `operators`    | the operators that all formats have in common                                             |
| `products`     | SiLU and GELU, in the parts that exporters make of them                                   |
| `onnx_files`   | ONNX                                                                                      |
| `programs`     | torch.export: files, and torch modules in memory; `aten` has the operators of torch       |
| `scripts`      | TorchScript files                                                                         |
| `weights`      | state dicts with a named activation, and scikit-learn's estimators                        |
| `outputs`      | what of the outputs is certified                                                          |
| `network`      | the network as a chain of affine layers, in float32                                       |
| `points`       | the data that it is certified on                                                          |
| `certificates` | `lipexp certify NET --data FILE`, and `lipexp.certify` in Python                          |
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from torch import nn

from lipexp.config import ConfigError, one_line
from lipexp.fitting import Option
from lipexp.foreign import programs, scripts, weights
from lipexp.foreign.features import Unread
from lipexp.foreign.network import Foreign
from lipexp.foreign.outputs import Graph, network
from lipexp.loading import LoadedRun, plain_state
from lipexp.modules import Network
from lipexp.networks import BakedNetwork
from lipexp.reading import LARGE_BYTES, Unreadable, plain_file

__all__ = ["Foreign", "of", "read"]


def read(path: str | os.PathLike[str], n_inputs: int, decides: bool, act: Option | None = None) -> Foreign:
    """The network in a file: ONNX, a program of torch.export or TorchScript, or a state dict with `act`.

    Args:
        n_inputs: the columns of the data.
        decides: it is a classifier, of which operators are left off that do not change its decision.

    Raises:
        ConfigError: it cannot be read; one line names the operator and the node.
    """
    file = Path(os.path.realpath(path))
    if not file.is_file():
        raise ConfigError("NET", path, "is no file" if file.exists() else "does not exist")
    try:
        plain = plain_file(file.parent, file.name, LARGE_BYTES)
        found = _read(plain, n_inputs, decides, act)
    except (Unread, Unreadable) as error:
        raise ConfigError("NET", path, str(error)) from None
    except OSError as error:
        raise ConfigError("NET", path, f"cannot be read: {error.strerror}") from None
    return found


def _read(file: Path, n_inputs: int, decides: bool, act: Option | None) -> Foreign:
    content = file.read_bytes()
    names, suffix = _members(content), file.suffix.lower()
    is_program = suffix == ".pt2" or any(name.endswith("/models/model.json") for name in names)
    is_script = any("/code/" in name for name in names)
    if act is not None and (suffix == ".onnx" or is_program or is_script):
        raise ConfigError("--act", act, f"is for a state dict; {file.name} has its own activations")
    if suffix == ".onnx":
        return network(_onnx(content, file.parent, n_inputs), decides)
    if is_program:
        return network(programs.read(content), decides)
    if is_script:
        return network(scripts.read(content, n_inputs), decides)
    try:
        state = plain_state(file)
    except ValueError as error:
        known = "an ONNX file (.onnx), a program of torch.export or TorchScript, nor a plain state dict"
        raise Unread(f"is neither {known}: {error}") from None
    return weights.of_lipexp(state, act) or weights.of_state(state, act)


def _members(content: bytes) -> list[str]:
    """The names in an archive; none where it is none."""
    try:
        with zipfile.ZipFile(BytesIO(content)) as archive:
            return archive.namelist()
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError):
        return []


def _onnx(content: Any, folder: Path | None, n_inputs: int) -> Graph:
    """The graph of an ONNX file, or of a model in memory."""
    try:
        from lipexp.foreign import onnx_files
    except ImportError as error:
        raise Unread(f"needs onnx: pip install 'lipexp[onnx]' ({one_line(error)})") from None
    if isinstance(content, bytes):
        return onnx_files.read(content, folder, n_inputs)
    return onnx_files.of_model(content, folder, n_inputs)


def of(net: Any, shape: Sequence[int], decides: bool, act: Option | None = None) -> Foreign:
    """The network that a Python object is: a torch module, a scikit-learn estimator, an ONNX model or a path.

    Args:
        shape: that of a row of the data.

    Raises:
        ConfigError: it cannot be read; one line names the module, or the operator and the node.
    """
    n_inputs = 1
    for n in shape:
        n_inputs *= n
    if isinstance(net, str | os.PathLike):
        return read(net, n_inputs, decides, act)
    if isinstance(net, BakedNetwork):
        return Foreign(net, 0.0)
    try:
        own = getattr(net, "baked", None) if isinstance(net, Network | LoadedRun) else None
        if own is not None:
            return Foreign(own, 0.0)
        if isinstance(net, nn.Module):
            return network(programs.of_module(net, shape), decides)
        if type(net).__module__.startswith("onnx."):
            return network(_onnx(net, None, n_inputs), decides)
        if hasattr(net, "predict") and hasattr(net, "get_params"):
            return weights.of_sklearn(net)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError("net", type(net).__name__, str(error)) from None
    known = "a torch module, a scikit-learn MLP, an ONNX model, a network of lipexp, or the path of a file"
    raise ConfigError("net", type(net).__name__, f"must be {known}")
