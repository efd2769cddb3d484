"""Graphs in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fast_diffusers.errors import UserError


class OnnxRuntimeEngine:
    """A graph in ONNX Runtime on the CPU, in fp32, see `cinn_infer.engines.Engine`; the first file is the graph."""

    def __init__(self, files: Sequence[Path], names: Sequence[str], precision: str, threads: int, model: str):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3  # errors, which are raised as well
        self._session = onnxruntime.InferenceSession(str(files[0]), options, providers=["CPUExecutionProvider"])
        own = [each.name for each in self._session.get_inputs()]
        if sorted(own) != sorted(names):
            raise UserError(f"{files[0]} takes {own}, its manifest says {list(names)}: export again")
        self._names = list(names)

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """See `Engine`."""
        return self._session.run(None, dict(zip(self._names, inputs, strict=True)))
