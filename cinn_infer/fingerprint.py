"""What the graph of a layer's method depends on, apart from the values of its weights."""

from __future__ import annotations

import functools
import hashlib
import json
import platform
import sys
import sysconfig
import weakref
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import paddle
from paddle import nn

from cinn_infer.calls import CONSTANTS
from cinn_infer.units import GraphMethod
from fast_diffusers.lora.layers import AdapterSet

IGNORED = frozenset(
    {"_full_name", "_helper", "_op_recorder", "_loaddict_holder", "_original_funcs", "_built", "_customized_attrs"}
    | {"_use_default_values"}
)
"""Attributes that Paddle gives every layer, and an entry of ppdiffusers' configs (a list in random order), that no
forward reads and that differ from process to process."""

PACKAGES = ("paddlepaddle", "paddlepaddle-gpu", "paddlenlp", "ppdiffusers", "numpy")


class UnknownError(Exception):
    """Something of which it is not known how it acts on a graph."""


def fingerprint(layer: nn.Layer, facts: Any) -> str:
    """A digest of the layer's structure and constants, the source of its code, versions, flags and `facts`.

    Parameters count with shape and dtype, other tensors with their values. Code that is replaced while the program runs
    is not noticed, nor is a weight whose value a forward reads as a Python number.

    Raises:
        UnknownError: the layer has an attribute of which this cannot be told.
    """
    modules: set[str] = {type(layer).__module__, "cinn_infer.programs"}
    described = _Description(modules).of(layer, type(layer).__name__)
    everything = [described, facts, _sources(frozenset(modules)), _surroundings()]
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()


class _Description:
    """Values as JSON, where two that act alike are the same; collects the modules of their classes."""

    def __init__(self, modules: set[str]):
        self._modules = modules
        self._seen: dict[int, int] = {}
        self._kept: list[Any] = []  # ids stay those of these objects

    def of(self, value: Any, place: str) -> Any:
        """UnknownError naming `place` for what cannot be described."""
        if isinstance(value, CONSTANTS):
            return [type(value).__name__, repr(value)]
        if isinstance(value, paddle.base.framework.EagerParamBase):
            return ["parameter", list(value.shape), str(value.dtype)]
        if isinstance(value, paddle.Tensor):
            array = value.astype("float32").numpy() if value.dtype == paddle.bfloat16 else value.numpy()
            return ["tensor", str(value.dtype), self.of(array, place)]
        if isinstance(value, np.ndarray | np.generic) and value.dtype != object:
            data = np.ascontiguousarray(value)
            return ["array", str(data.dtype), list(np.shape(value)), hashlib.sha256(data.tobytes()).hexdigest()]
        if isinstance(value, paddle.ParamAttr | nn.initializer.Initializer | GraphMethod | AdapterSet):
            return None  # of no effect on a forward, or told apart by the caller
        if isinstance(value, type | FunctionType | BuiltinFunctionType):
            return self._code(value, place)
        if isinstance(value, ModuleType):
            return ["module", value.__name__]
        if id(value) in self._seen:
            return ["again", self._seen[id(value)]]
        self._seen[id(value)] = len(self._kept)
        self._kept.append(value)
        if isinstance(value, weakref.ref):
            return ["weak", self.of(value(), place)]
        if isinstance(value, MethodType):
            return ["method", value.__name__, self.of(value.__self__, place)]
        if isinstance(value, functools.partial):
            return ["partial", self.of([value.func, value.args, value.keywords], place)]
        if isinstance(value, set | frozenset):
            return [type(value).__name__, sorted(json.dumps(self.of(each, place)) for each in value)]
        kind = self._code(type(value), place)
        content = []
        if isinstance(value, Mapping):
            entries = [(key, each) for key, each in value.items() if key not in IGNORED]
            content = [[self.of(key, place), self.of(each, f"{place}.{key}")] for key, each in entries]
        elif isinstance(value, list | tuple):
            content = [self.of(each, f"{place}.{i}") for i, each in enumerate(value)]
        elif not hasattr(value, "__dict__"):
            raise UnknownError(f"{place} is a {type(value).__name__}")
        attributes = {k: v for k, v in getattr(value, "__dict__", {}).items() if k not in IGNORED}
        return [kind, content, [[k, self.of(attributes[k], f"{place}.{k}")] for k in sorted(attributes)]]

    def _code(self, code: Any, place: str) -> list[str]:
        """The name of a class or function, whose source counts too."""
        if isinstance(code, FunctionType) and code.__closure__:
            raise UnknownError(f"{place} is a function that refers to variables around it")
        classes = code.__mro__ if isinstance(code, type) else ()
        self._modules |= {each.__module__ for each in (code, *classes) if each.__module__}
        return ["code", f"{code.__module__}.{code.__qualname__}"]


@functools.lru_cache(maxsize=64)
def _sources(modules: frozenset[str]) -> list[list[str]]:
    """Digests of the files of these modules and of those they import, by whole packages; versions of installed ones."""
    pending, done, found = list(modules), set(), {}
    while pending:
        name = pending.pop()
        top, module = name.split(".")[0], sys.modules.get(name)
        if name in done or module is None or top in ("paddle", *sys.stdlib_module_names):
            continue
        done.add(name)
        file = getattr(module, "__file__", None)
        if file is None:
            if name in modules:
                raise UnknownError(f"the source of {name} is not in a file")
            continue
        if _is_installed(Path(file)):
            if name in modules:
                found[top] = _version(top)
            continue
        package = (
            getattr(sys.modules.get(top), "__file__", None) if "." in name or hasattr(module, "__path__") else None
        )
        if package is None:
            found[name] = hashlib.sha256(Path(file).read_bytes()).hexdigest()
        elif top not in found:
            found[top] = _folder_digest(Path(package).parent)
        for value in list(vars(module).values()):
            if isinstance(value, ModuleType):
                pending.append(value.__name__)
            else:
                code = value if isinstance(value, type | FunctionType) else type(value)
                pending.append(code.__module__ or "")
    return [[name, found[name]] for name in sorted(found)]


def _is_installed(file: Path) -> bool:
    places = (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), sysconfig.get_path("stdlib"))
    return any(file.is_relative_to(place) for place in places)


@functools.cache
def _folder_digest(folder: Path) -> str:
    files = [[path.relative_to(folder).as_posix(), path.read_bytes()] for path in sorted(folder.rglob("*.py"))]
    return hashlib.sha256(repr(files).encode()).hexdigest()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        raise UnknownError(f"the version of {package} is not known") from None


def _surroundings() -> dict[str, Any]:
    """Versions, flags and the device."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    flags = paddle.base.core.globals()
    return {
        "versions": versions,
        "python": platform.python_version(),
        "flags": {name: repr(flags[name]) for name in flags.keys()},  # noqa: SIM118  (not a dictionary)
        "device": paddle.get_device().split(":")[0],
        "dtype": paddle.get_default_dtype(),
        "commit": paddle.version.commit,
    }
