"""Weights of ONNX files that stay in the file that Paddle wrote, for graphs too large for protobuf."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from fast_diffusers.errors import UserError

DTYPES = {2: "int32", 3: "int64", 5: "float32", 6: "float64"}
"""By their numbers in Paddle's VarType.Type, framework.proto."""


class Stored(NamedTuple):
    """Where the numbers of a tensor lie in a file."""

    shape: tuple[int, ...]
    dtype: str
    offset: int

    @property
    def size(self) -> int:
        """In bytes."""
        return int(np.prod(self.shape, dtype="int64")) * np.dtype(self.dtype).itemsize


def attach(path: Path, graph: Path, weights: Path) -> None:
    """Give an ONNX file the weights that it names and lacks, by reference (ONNX's external data), without a copy.

    Args:
        path: what paddle2onnx made of `graph` alone: it calls weights by their names there.
        graph: the Paddle graph, whose parameters `weights` holds in the order of their names.
        weights: beside `path` or in a folder there.

    Raises:
        UserError: the graph and the weights do not fit.
    """
    import onnx

    model = onnx.load(path, load_external_data=False)
    own = {output for node in model.graph.node for output in node.output}
    own |= {each.name for each in (*model.graph.input, *model.graph.initializer)}
    used = dict.fromkeys(name for node in model.graph.node for name in node.input if name and name not in own)
    parameters = sorted(_parameters(json.loads(graph.read_text(encoding="utf-8"))))
    stored = list(tensors(weights))
    if [shape for _, shape in parameters] != [each.shape for each in stored]:
        raise UserError(f"{weights.name} holds other tensors than {graph.name} has parameters")
    found = {name: each for (name, _), each in zip(parameters, stored, strict=True)}
    if strange := [name for name in used if name not in found]:
        raise UserError(f"the ONNX graph takes {strange[0]!r}, which nothing gives")
    location = weights.relative_to(path.parent).as_posix()
    for name in used:
        model.graph.initializer.append(_reference(name, found[name], location))
    onnx.save(model, path)


def tensors(weights: Path) -> Iterator[Stored]:
    """What a .pdiparams file holds, in its order; only the headers are read."""
    end = weights.stat().st_size
    with weights.open("rb") as file:
        while file.tell() < end:
            entry = _header(file)
            if entry.offset + entry.size > end:
                raise UserError(f"{weights} is cut off")
            yield entry
            file.seek(entry.offset + entry.size)


def _header(file: BinaryIO) -> Stored:
    """Version, level of detail (none), version, and a message TensorDesc: data_type = 1, repeated int64 dims = 2."""
    version, levels, tensor_version, length = struct.unpack("<IQIi", file.read(20))
    if version or levels or tensor_version:
        raise UserError(f"{file.name} is not in the layout of Paddle 3's weights")
    numbers = list(_varints(file.read(length)))
    fields = list(zip(numbers[::2], numbers[1::2], strict=True))
    kinds, dims = ([value for tag, value in fields if tag >> 3 == number] for number in (1, 2))
    if len(kinds) != 1 or kinds[0] not in DTYPES or any(tag & 7 for tag, _ in fields):
        raise UserError(f"{file.name} holds a tensor of a kind that is not known here")
    return Stored(tuple(dims), DTYPES[kinds[0]], file.tell())


def _varints(content: bytes) -> Iterator[int]:
    value = shift = 0
    for byte in content:
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            yield value
            value = shift = 0


def _parameters(content: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of a program's parameters: operators "p", whose name is the fourth attribute."""
    if isinstance(content, dict):
        if content.get("#") == "p":
            yield content["A"][3], tuple(content["O"]["TT"]["D"][1])
        content = list(content.values())
    if isinstance(content, list):
        for each in content:
            yield from _parameters(each)


def _reference(name: str, stored: Stored, location: str) -> Any:
    """A tensor without its numbers."""
    import onnx

    kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(stored.dtype))
    tensor = onnx.TensorProto(name=name, data_type=kind, dims=stored.shape, data_location=onnx.TensorProto.EXTERNAL)
    for key, value in dict(location=location, offset=stored.offset, length=stored.size).items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor
