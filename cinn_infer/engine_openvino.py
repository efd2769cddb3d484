"""Graphs in OpenVINO."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fast_diffusers.errors import UserError

COPIES, ROOM = 8, 2**30
"""How many shapes a graph is compiled for at a time, and how many bytes the weights of all copies of a model may be."""


class OpenVINOEngine:
    """A graph in OpenVINO on the CPU, see `cinn_infer.engines.Engine`; the first file is the graph.

    In int8 NNCF gives every matrix one scale a column and eight bits an entry when the graph is opened, which needs
    no data. In bf16 the sines and cosines of time and positions are computed apart, in float32: OpenVINO would round
    their angles, of up to 1000, to bfloat16. `siblings` is how many graphs share `ROOM`.
    """

    def __init__(
        self,
        files: Sequence[Path],
        names: Sequence[str],
        precision: str,
        threads: int,
        model: str,
        siblings: int = 1,
    ):
        graph = _core().read_model(str(files[0]))
        own = [each.get_any_name() for each in graph.inputs]
        if sorted(own) != sorted(names):
            raise UserError(f"{files[0]} takes {own}, its manifest says {list(names)}: export again")
        if precision == "int8":
            graph = _with_small_weights(graph)
        options = {
            "INFERENCE_PRECISION_HINT": "f32",  # its own choice would be bf16
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,  # with it, int8 would be that of activations too
        }
        self._waves = None
        if precision == "bf16":
            if waves := _take_waves(graph):
                self._waves = _Model(waves, options, siblings)
            options = options | {"INFERENCE_PRECISION_HINT": "bf16"}
        self._model = _Model(graph, options, siblings)
        self._places = [list(names).index(name) for name in own]

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """See `Engine`."""
        given = [inputs[place] for place in self._places]
        waves = [] if self._waves is None else self._waves.run(given)
        return self._model.run([*given, *waves])


class _Model:
    """A graph that is compiled for the shapes that come, as this is faster; a large one once, for all shapes."""

    def __init__(self, graph: Any, options: Mapping[str, Any], siblings: int):
        self._copies = min(COPIES, ROOM // siblings // max(1, _weights(graph)))
        self._request = functools.lru_cache(max(1, self._copies))(functools.partial(_request, graph, options))
        if not self._copies:
            self._request(None)

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Outputs for inputs in the graph's own order."""
        from openvino import Tensor

        request = self._request(tuple(each.shape for each in inputs) if self._copies else None)
        inputs = [np.asarray(each, order="C") for each in inputs]  # the request does not keep them alive
        for i, each in enumerate(inputs):
            request.set_input_tensor(i, Tensor(each, shared_memory=True))
        request.infer()
        return [each.data.copy() for each in request.output_tensors]


def _request(graph: Any, options: Mapping[str, Any], shapes: tuple[tuple[int, ...], ...] | None) -> Any:
    """What runs the graph for these shapes of its inputs, or for any."""
    if shapes is not None:
        graph = graph.clone()
        graph.reshape(dict(enumerate(map(list, shapes))))
    return _core().compile_model(graph, "CPU", options).create_infer_request()


def _weights(graph: Any) -> int:
    """Bytes of a graph's constants."""
    ends = [node.output(0) for node in graph.get_ops() if node.get_type_name() == "Constant"]
    return sum(int(np.prod(list(end.get_shape()))) * end.get_element_type().size for end in ends)


@functools.cache
def _core() -> Any:
    """OpenVINO, opened once and kept: with two of them, the second to be closed leaves the process a stack for signal
    handlers that the first has freed, and the next signal (Ctrl-C, SIGTERM) is a segmentation fault.
    """
    import openvino

    return openvino.Core()


def _take_waves(graph: Any) -> Any | None:
    """Sines and cosines that depend on inputs become further inputs of the graph; gives the model that computes them.

    Its inputs are those that the graph had. None if there are none.
    """
    import openvino
    from openvino import opset13

    nodes = [node for node in graph.get_ordered_ops() if node.get_type_name() in ("Sin", "Cos") and _is_variable(node)]
    if not nodes:
        return None
    waves = openvino.Model([node.output(0) for node in nodes], graph.get_parameters()).clone()
    inputs = [opset13.parameter(node.get_output_partial_shape(0), node.get_output_element_type(0)) for node in nodes]
    for node, each in zip(nodes, inputs, strict=True):
        node.output(0).replace(each.output(0))
    graph.add_parameters(inputs)
    return waves


def _is_variable(node: Any) -> bool:
    """Whether a node's value depends on an input."""
    pending, seen = [node], set()
    while pending:
        node = pending.pop()
        if node.get_type_name() == "Parameter":
            return True
        sources = [each.get_source_output().get_node() for each in node.inputs()]
        pending += [each for each in sources if each.get_friendly_name() not in seen]
        seen |= {each.get_friendly_name() for each in sources}
    return False


def _with_small_weights(graph: Any) -> Any:
    loggers = logging.getLoggerClass()
    import nncf

    # NNCF makes its own class that of all later loggers, and its set_log_level changes the handlers of others, too.
    logging.setLoggerClass(loggers)
    logging.getLogger("nncf").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()):  # a progress bar and a table
        return nncf.compress_weights(graph, mode=nncf.CompressWeightsMode.INT8_ASYM)


def has_bfloat16() -> bool:
    """Whether OpenVINO computes in bfloat16 on this processor."""
    return "BF16" in _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
