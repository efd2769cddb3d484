"""The tensors in a call's arguments and results, and everything else, apart.

A static graph takes and gives flat lists of tensors. What a method is called with is a nest of containers, tensors and
constants: `Call` takes it apart, and `Structure` puts a result together again.
"""

from __future__ import annotations

import functools
import inspect
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import paddle

CONSTANTS = (bool, int, float, str, bytes, type(None), paddle.dtype)
"""Types whose values become part of a graph."""


class Slot(NamedTuple):
    """Where a tensor was in a nest of arguments: its place in the list of tensors."""

    index: int


class Call:
    """The arguments of one call of a method, by name.

    Attributes:
        names: of the tensors, dotted where they lie in containers: "hidden_states", "image_rotary_emb.0".
        tensors: as many.
        constants: a text that is the same for two calls exactly when everything but their tensors is.
    """

    def __init__(self, method: Callable, args: Sequence[Any], kwargs: Mapping[str, Any]):
        self._bound = _signature(method).bind(*args, **kwargs)
        self.names: list[str] = []
        self.tensors: list[paddle.Tensor] = []
        arguments = {name: self._take(value, name) for name, value in self._bound.arguments.items()}
        self._bound.arguments = OrderedDict(arguments)
        self.constants = repr(arguments)

    def _take(self, value: Any, name: str) -> Any:
        """The value with a `Slot` in place of every tensor."""
        if isinstance(value, paddle.Tensor):
            self.names.append(name)
            self.tensors.append(value)
            return Slot(len(self.tensors) - 1)
        if isinstance(value, Mapping):
            return {key: self._take(each, f"{name}.{key}") for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [self._take(each, f"{name}.{i}") for i, each in enumerate(value)]
        if isinstance(value, CONSTANTS):
            return value
        raise TypeError(f"{name} is a {type(value).__name__}: a graph takes tensors, numbers, texts and containers")

    def arguments(self, tensors: Sequence[Any]) -> tuple[tuple, dict[str, Any]]:
        """(args, kwargs) of the same call with other tensors; containers are lists and dictionaries."""
        bound = inspect.BoundArguments(
            self._bound.signature, OrderedDict((k, _put(v, tensors)) for k, v in self._bound.arguments.items())
        )
        return bound.args, bound.kwargs


def _signature(method: Callable) -> inspect.Signature:
    """As `inspect.signature`, which would be a tenth of a small model's step in OpenVINO, read once a function."""
    function = getattr(method, "__func__", None)
    return inspect.signature(method) if function is None else _signature_of_bound(function)


@functools.lru_cache(maxsize=256)
def _signature_of_bound(function: Callable) -> inspect.Signature:
    signature = inspect.signature(function)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def _put(value: Any, tensors: Sequence[Any]) -> Any:
    if isinstance(value, Slot):
        return tensors[value.index]
    if isinstance(value, dict):
        return {key: _put(each, tensors) for key, each in value.items()}
    return [_put(each, tensors) for each in value] if isinstance(value, list) else value


class Structure:
    """What a method returned, without its tensors.

    `layout` is made of lists (of tuples and lists), dictionaries {"fields": {...}} (of objects with named entries, in
    their order), numbers (places in the list of tensors) and null, so that JSON can hold it.
    """

    def __init__(self, layout: Any):
        self.layout = layout

    @classmethod
    def of(cls, result: Any) -> tuple[Structure, list[Any]]:
        """(structure, tensors) of a result."""
        tensors: list[Any] = []

        def take(value: Any) -> Any:
            if value is None:
                return None
            if isinstance(value, Mapping):  # ppdiffusers' outputs are mappings too
                return {"fields": {name: take(each) for name, each in value.items()}}
            if hasattr(value, "_asdict"):
                return {"fields": {name: take(each) for name, each in value._asdict().items()}}
            if isinstance(value, list | tuple):
                return [take(each) for each in value]
            for place, other in enumerate(tensors):
                if other is value:  # an exported graph gives a tensor once
                    return place
            tensors.append(value)
            return len(tensors) - 1

        return cls(take(result)), tensors

    def fill(self, tensors: Sequence[Any]) -> Any:
        """The result with these tensors: tuples, and tuples with named entries."""

        def put(layout: Any) -> Any:
            if layout is None:
                return None
            if isinstance(layout, int):
                return tensors[layout]
            if isinstance(layout, dict):
                fields = layout["fields"]
                return namedtuple("Output", fields)(*map(put, fields.values()))
            return tuple(map(put, layout))

        return put(self.layout)
