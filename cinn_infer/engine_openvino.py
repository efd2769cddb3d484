"""Graphs in OpenVINO."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fast_diffusers.errors import UserError


class OpenVINOEngine:
    """A graph in OpenVINO on the CPU, see `cinn_infer.engines.Engine`; the first file is the graph.

    In int8 NNCF gives every matrix one scale a column and eight bits an entry when the graph is opened, which needs
    no data. In bf16 the sines and cosines of time and positions are computed apart, in float32: OpenVINO would round
    their angles, of up to 1000, to bfloat16.
    """

    def __init__(self, files: Sequence[Path], names: Sequence[str], precision: str, threads: int, model: str):

        core = _core()
        graph = core.read_model(str(files[0]))
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
                self._waves = core.compile_model(waves, "CPU", options)
            options["INFERENCE_PRECISION_HINT"] = "bf16"
        self._compiled = core.compile_model(graph, "CPU", options)
        self._order = [own.index(name) for name in names]

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """See `Engine`."""
        given = dict(zip(self._order, inputs, strict=True))
        if self._waves is not None:
            found = self._waves(given)
            given |= {len(inputs) + i: found[i] for i in range(len(self._waves.outputs))}
        found = self._compiled(given)
        return [found[i] for i in range(len(self._compiled.outputs))]


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
