"""TorchScript files: their source is parsed and followed call by call, and never compiled or run.

`torch.jit.load` would run what a file says is to be run when it is loaded. A TorchScript file is an archive of a
pickle with the modules and their weights, and of their methods in a small part of Python's syntax. Here the pickle
may name nothing but tensors, dictionaries and the modules of the archive, and of the methods those without loops
are followed, which is what `torch.jit.trace` writes.
"""

from __future__ import annotations

import ast
import operator
import pickle
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

import torch

from lipexp.config import one_line
from lipexp.foreign import aten
from lipexp.foreign.features import Rows, Stage, Unread, entry
from lipexp.foreign.operands import Decided
from lipexp.foreign.outputs import Graph, at, for_any_rows
from lipexp.foreign.programs import held

STORAGES = {
    f"{name}Storage": kind
    for name, kind in {
        **{"Float": torch.float32, "Double": torch.float64, "Half": torch.float16, "BFloat16": torch.bfloat16},
        **{"Long": torch.int64, "Int": torch.int32, "Bool": torch.bool},
    }.items()
}
MOST_CALLS = 100_000
MOST_NESTED = 60  # calls of methods within each other
COMPARED: Mapping[type[ast.cmpop], Any] = {
    **{ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le},
    **{ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Is: operator.is_, ast.IsNot: operator.is_not},
}

OF_NUMBERS = {  # what scripts ask of numbers, as `torch.lt(p, 0.)`
    **{
        name: getattr(operator, name)
        for name in ("lt", "le", "gt", "ge", "eq", "ne", "add", "sub", "mul", "floordiv")
    },
    **{"__is__": operator.is_, "__isnot__": operator.is_not, "__not__": operator.not_},
}


class Part:
    """A module of the archive, with its weights and modules as attributes."""

    path = ""  # of its class, as __torch__.torch.nn.modules.linear.Linear


class _Pickle(pickle._Unpickler):  # which, other than the one in C, believes no sizes
    """Reads tensors, plain data, and modules as `Part`s; everything else is refused."""

    def __init__(self, files: Mapping[str, bytes], name: str) -> None:
        super().__init__(BytesIO(files[f"{name}.pkl"]))
        self._files, self._folder = files, name
        self._parts: dict[str, type[Part]] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch._utils" and name == "_rebuild_tensor_v2":
            return _tensor
        if module == "torch" and name in STORAGES:
            return name
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch.jit._pickle" and name.startswith("build_") and name.endswith("list"):
            return list
        if module.partition(".")[0] == "__torch__":
            path = f"{module}.{name}"
            return self._parts.setdefault(path, type("Part", (Part,), {"path": path}))
        raise Unread(f"has a pickle that names {module}.{name}, which is not read")

    def persistent_load(self, pid: Any) -> Any:
        _, kind, key, *_ = pid
        return self._files[f"{self._folder}/{key}"], STORAGES[kind]


def _tensor(storage: Any, start: int, sizes: Sequence[int], strides: Sequence[int], *_: Any) -> Any:
    content, kind = storage
    return held(content, kind, sizes, strides, start, "a tensor")


def read(content: bytes, n_inputs: int) -> Graph:
    """The graph of a TorchScript file, for rows of `n_inputs` numbers.

    Raises:
        Unread: it cannot be read, and why: the operator and the line.
    """
    try:
        with zipfile.ZipFile(BytesIO(content)) as archive:
            stored = archive.infolist()
            # What is not stored as it is is source, and small.
            if sum(part.file_size for part in stored) > 2 * len(content) + 2**24:
                raise Unread("claims to be larger than it is")
            files = {
                part.filename.partition("/")[2]: archive.read(part)
                for part in stored
                if not part.filename.endswith(".debug_pkl")
            }
        script = _Script(files)
        with at("forward", script.module.path):
            return for_any_rows(lambda rows: script.graph(rows, n_inputs))
    except Unread:
        raise
    except (
        zipfile.BadZipFile,
        pickle.UnpicklingError,
        EOFError,
        RecursionError,
        NotImplementedError,
        zlib.error,
    ) as error:
        raise Unread(f"is a damaged TorchScript file: {one_line(error)}") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError, OverflowError) as error:
        raise Unread(f"is a damaged TorchScript file: {one_line(error)}") from None
    except (SyntaxError, MemoryError, ImportError) as error:
        raise Unread(f"is a damaged TorchScript file: {one_line(error)}") from None


class _Script:
    """The source and the modules of an archive."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self.module = _Pickle(files, "data").load()
        if not isinstance(self.module, Part):
            raise Unread("holds no module")
        self.constants = _Pickle(files, "constants").load() if "constants.pkl" in files else ()
        self.defined: dict[str, Any] = {}  # path -> a class, or a function
        self.calls, self.nested, self.changed = 0, 0, set[Stage]()
        for name, source in files.items():
            if name.startswith("code/") and name.endswith(".py"):
                path = name.removeprefix("code/").removesuffix(".py").replace("/", ".")
                for node in ast.parse(source.decode()).body:
                    if isinstance(node, ast.ClassDef | ast.FunctionDef):
                        self.defined[f"{path}.{node.name}"] = node

    def graph(self, rows: int, n_inputs: int) -> Graph:
        """What `forward` makes of its input (rows, n_inputs)."""
        self.calls, self.nested, self.changed = 0, 0, set()
        found = self._method(self.module, "forward", [entry(rows, [n_inputs])])
        outputs = found if isinstance(found, list | tuple) else [found]
        return aten.made([(str(i), part) for i, part in enumerate(outputs)], self.changed)

    def _method(self, module: Part, name: str, arguments: Sequence[Any]) -> Any:
        methods = {node.name: node for node in self.defined[module.path].body if isinstance(node, ast.FunctionDef)}
        if name not in methods:
            raise Unread(f"calls {name}, which is not read")
        return self._function(methods[name], [module, *arguments])

    def _function(self, node: ast.FunctionDef, arguments: Sequence[Any]) -> Any:
        names = [part.arg for part in node.args.args]
        if len(names) != len(arguments):
            raise Unread(f"{node.name} takes {len(names)} arguments, not {len(arguments)}")
        self.nested += 1
        if self.nested > MOST_NESTED:
            raise Unread("makes too many calls")
        found = self._body(node.body, dict(zip(names, arguments, strict=True)))
        self.nested -= 1
        return found

    def _body(self, body: Sequence[ast.stmt], names: dict[str, Any]) -> Any:
        """The value that is returned; `names` as it is if there is none."""
        for node in body:
            if isinstance(node, ast.Return):
                return None if node.value is None else self._value(node.value, names)
            if isinstance(node, ast.Assign):
                self._assign(node.targets[0], self._value(node.value, names), names)
            elif isinstance(node, ast.If):
                found = self._body(node.body if self._truth(node.test, names) else node.orelse, names)
                if found is not names:
                    return found
            elif isinstance(node, ast.Expr):
                self._value(node.value, names)
            elif not isinstance(node, ast.Pass):
                raise Unread(f"line {node.lineno} has a {type(node).__name__}, which is not read")
        return names

    def _assign(self, target: ast.expr, value: Any, names: dict[str, Any]) -> None:
        if isinstance(target, ast.Tuple):
            for part, own in zip(target.elts, value, strict=True):
                self._assign(part, own, names)
        elif isinstance(target, ast.Name):
            names[target.id] = value
        else:
            raise Unread("assigns to what is no name, which is not read")

    def _value(self, node: ast.expr, names: dict[str, Any]) -> Any:
        match node:
            case ast.Constant():
                return node.value
            case ast.Name() if node.id in names:
                return names[node.id]
            case ast.List() | ast.Tuple():
                return [self._value(part, names) for part in node.elts]
            case ast.UnaryOp(op=ast.USub()):
                return -self._value(node.operand, names)
            case ast.UnaryOp(op=ast.Not()):
                return not self._truth(node.operand, names)
            case ast.Compare(ops=[how], comparators=[right]):
                return COMPARED[type(how)](self._value(node.left, names), self._value(right, names))
            case ast.Subscript():
                return self._value(node.value, names)[self._value(node.slice, names)]
            case ast.Attribute(value=ast.Name(id="CONSTANTS")):
                return self.constants[int(node.attr.removeprefix("c"))]
            case ast.Attribute() if ast.unparse(node) in self.defined:
                return self.defined[ast.unparse(node)]
            case ast.Attribute():
                return vars(self._part(node.value, names))[node.attr]
            case ast.Call():
                return self._call(node, names)
        raise Unread(f"line {node.lineno} has {ast.unparse(node)[:40]}, which is not read")

    def _truth(self, node: ast.expr, names: dict[str, Any]) -> bool:
        found = self._value(node, names)
        if not isinstance(found, bool):
            raise Unread(f"line {node.lineno} asks whether a tensor is true, which is not read")
        return found

    def _part(self, node: ast.expr, names: dict[str, Any]) -> Part:
        found = self._value(node, names)
        if not isinstance(found, Part):
            raise Unread(f"line {node.lineno} asks something of what is no module")
        return found

    def _call(self, node: ast.Call, names: dict[str, Any]) -> Any:
        self.calls += 1
        if self.calls > MOST_CALLS:
            raise Unread("makes too many calls")
        what = ast.unparse(node.func)
        if what in ("annotate", "unchecked_cast"):
            return self._value(node.args[1], names)
        if what == "getattr":
            return vars(self._part(node.args[0], names))[self._value(node.args[1], names)]
        root = what.partition(".")[0]
        arguments = [self._value(part, names) for part in node.args]
        given = {str(part.arg): self._value(part.value, names) for part in node.keywords}
        if what == "torch.device":
            return None
        if what == "ops.prim.NumToTensor":
            return arguments[0]
        if what in ("int", "float", "bool"):
            if not isinstance(arguments[0], bool | int | float):
                raise Unread(f"{what} at line {node.lineno} takes a number from a tensor, which is not read")
            return {"int": int, "float": float, "bool": bool}[what](arguments[0])
        if root == "torch" and root not in names:
            name = what.partition(".")[2]
            with at(name, f"line {node.lineno}"):
                if name in OF_NUMBERS and not any(isinstance(part, Rows | Decided | list) for part in arguments):
                    return OF_NUMBERS[name](*arguments)
                return aten.call(name, _named(name, arguments) | given, self.changed)
        function = names.get(what, self.defined.get(what))
        if isinstance(function, ast.FunctionDef):
            return self._function(function, arguments)
        if isinstance(node.func, ast.Attribute) and root != "ops":
            return self._method(self._part(node.func.value, names), node.func.attr, arguments)
        raise Unread(f"{what} at line {node.lineno} is no operator that lipexp reads")


def _named(name: str, arguments: Sequence[Any]) -> dict[str, Any]:
    """The arguments by their names, as the first signature of the operator has them that they fit."""
    for schema in torch._C._jit_get_schemas_for_operator(f"aten::{name}"):
        own = schema.arguments
        if len(arguments) <= len(own) and all(map(_fits, arguments, [str(part.type) for part in own])):
            rest = own[len(arguments) :]
            if all(part.has_default_value() or part.kwarg_only for part in rest):
                named = {part.name: value for part, value in zip(own, arguments, strict=False)}
                if isinstance(named.get("dtype"), int):  # which a program of torch.export numbers from 1
                    named["dtype"] += 1
                return named
    raise Unread("is no operator that lipexp reads")


def _fits(value: Any, kind: str) -> bool:
    """Whether a value may be of a type of torch's signatures."""
    if kind.startswith("Optional["):
        return value is None or _fits(value, kind.removeprefix("Optional[").removesuffix("]"))
    if kind.startswith("List["):
        inner = kind.removeprefix("List[").removesuffix("]")
        return isinstance(value, list) and all(_fits(part, inner) for part in value)
    if isinstance(value, bool):
        return kind == "bool"
    if isinstance(value, int):
        return kind in ("int", "float", "number", "Scalar")
    if isinstance(value, float):
        return kind in ("float", "number", "Scalar")
    return kind == "str" if isinstance(value, str) else kind == "Tensor" and value is not None
