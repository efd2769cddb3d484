"""What paddle2onnx 2.1.0 gets wrong or cannot read, set right before and after it runs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fast_diffusers.errors import UserError

DOUBLES = ("nearest_interp", "bilinear_interp", "group_norm")
"""Operators with attributes in float64, which paddle2onnx stops at, or reads as if they were float32."""


def readable(graph: Path) -> str:
    """The text of a Paddle graph whose `DOUBLES` have attributes in float32."""
    content = json.loads(graph.read_text(encoding="utf-8"))
    for operator in _operators(content, *DOUBLES):
        for attribute in operator["A"]:
            values = attribute["AT"]
            for value in values["D"] if isinstance(values["D"], list) else [values]:
                if value["#"] == "0.a_f64":
                    value["#"] = "0.a_f32"
    return json.dumps(content)


def mend(path: Path, graph: Path) -> None:
    """Rewrite an ONNX file that was made from a Paddle graph.

    - Sizes of -1 in Expand become 1: in Paddle -1 keeps an axis, in ONNX 1 does.
    - GELUs by tanh, which are written as those by erf and differ from them by up to 5e-4, become what they were.

    Raises:
        UserError: it cannot be told which GELU is which.
    """
    import onnx

    model = onnx.load(path, load_external_data=False)
    _mend_expand(model.graph, path.parent)
    content = json.loads(graph.read_text(encoding="utf-8"))
    by_tanh = [_attribute(operator, "approximate") for operator in _operators(content, "gelu")]
    if any(by_tanh):
        _mend_gelu(model.graph, by_tanh)
    onnx.save(model, path)


def _operators(content: Any, *names: str) -> Iterator[dict[str, Any]]:
    """Operators of a program in their order."""
    if isinstance(content, dict):
        if str(content.get("#", "")).split(".")[-1] in names:
            yield content
        content = list(content.values())
    if isinstance(content, list):
        for each in content:
            yield from _operators(each, *names)


def _attribute(operator: dict[str, Any], name: str) -> Any:
    return next(each["AT"]["D"] for each in operator["A"] if each["N"] == name)


def _mend_expand(graph: Any, folder: Path) -> None:
    from onnx import numpy_helper

    shapes = {node.input[1] for node in graph.node if node.op_type == "Expand"}
    constants = [node for node in graph.node if node.op_type == "Constant" and node.output[0] in shapes]
    values = [attribute.t for node in constants for attribute in node.attribute if attribute.name == "value"]
    for value in [*values, *(each for each in graph.initializer if each.name in shapes)]:
        sizes = numpy_helper.to_array(value, base_dir=str(folder))
        value.CopyFrom(numpy_helper.from_array(np.where(sizes == -1, 1, sizes), value.name))


def _mend_gelu(graph: Any, by_tanh: list[bool]) -> None:
    """x / sqrt(2) -> Erf -> 1 + . -> x * . -> . / 2 becomes x * (0.5 * (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))).

    The form is the one that ONNX Runtime and OpenVINO recognise and run as one operator.
    """
    from onnx import helper, numpy_helper

    made_by = {name: node for node in graph.node for name in node.output}
    used_by: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            used_by.setdefault(name, []).append(node)
    erfs = [node for node in graph.node if node.op_type == "Erf"]
    if len(erfs) != len(by_tanh):
        raise UserError(f"the ONNX graph has {len(erfs)} error functions, the Paddle graph {len(by_tanh)} GELUs")
    numbers = {"three": 3.0, "cubic": 0.044715, "slope": math.sqrt(2 / math.pi), "one": 1.0, "half": 0.5}
    numbers = {f"gelu.{name}": value for name, value in numbers.items()}
    for name, value in numbers.items():
        graph.initializer.append(numpy_helper.from_array(np.float32(value), name))
    three, cubic, slope, one, half = numbers
    replaced: dict[str, list[Any]] = {}  # by the output of the last node of each
    dropped = set()
    for erf in (erf for erf, tanh in zip(erfs, by_tanh, strict=True) if tanh):
        divide = made_by[erf.input[0]]
        chain, x = [divide, erf], divide.input[0]
        for expected in ("Add", "Mul", "Mul"):
            (node,) = used_by[chain[-1].output[0]]
            if node.op_type != expected:
                raise UserError(f"a GELU of the ONNX graph goes on with {node.op_type}, not {expected}")
            chain.append(node)
        if x not in chain[3].input:
            raise UserError("a GELU of the ONNX graph has an unknown form")
        out, stem = chain[-1].output[0], erf.output[0]
        steps = [
            ("Pow", (x, three)),
            ("Mul", (f"{stem}.0", cubic)),
            ("Add", (x, f"{stem}.1")),
            ("Mul", (f"{stem}.2", slope)),
            ("Tanh", (f"{stem}.3",)),
            ("Add", (f"{stem}.4", one)),
            ("Mul", (f"{stem}.5", half)),
        ]
        nodes = [helper.make_node(kind, inputs, [f"{stem}.{i}"]) for i, (kind, inputs) in enumerate(steps)]
        replaced[out] = [*nodes, helper.make_node("Mul", (x, f"{stem}.6"), [out])]
        dropped |= {node.output[0] for node in chain}
    nodes = []
    for node in graph.node:
        nodes += replaced.get(node.output[0], []) if node.output[0] in dropped else [node]
    del graph.node[:]
    graph.node.extend(nodes)
