"""The process of one backend in a benchmark: `python -m cinn_infer.bench_worker FOLDER BACKEND`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from safetensors.numpy import load_file

from cinn_infer import engines
from cinn_infer.backends import BACKENDS
from cinn_infer.bench_job import Job, forward_arguments
from cinn_infer.bench_loop import Task, serve
from cinn_infer.compile import compile
from cinn_infer.runtime import load
from cinn_infer.stages import Stages, synchronize
from fast_diffusers.pipelines.base import Pipeline

EXPORT = "export"
"""Folder, in the benchmark's, of the exported pipeline."""
ONNX = "torch.onnx"
TORCH_INPUTS = "torch_inputs.safetensors"
ONNX_PREFIX = "torch-onnx-"
"""Backends that run PyTorch's own ONNX file."""

COMPILED = tuple(name for name in BACKENDS if name not in ("auto", "eager"))
EXPORTED = {
    f"{runtime}-{precision}": (runtime, precision) for runtime in engines.RUNTIMES for precision in engines.CAN[runtime]
}


def open_task(folder: Path, backend: str) -> Task:
    """What a backend runs.

    Raises:
        UserError: it cannot run here.
    """
    job = Job.read(folder)
    if backend.startswith(ONNX_PREFIX):
        return _onnx_task(folder, *EXPORTED[backend.removeprefix(ONNX_PREFIX)], job.threads)
    if backend in EXPORTED:
        pipe = load(folder / EXPORT, *EXPORTED[backend], job.threads)
    else:
        pipe = job.open()
        if backend != "eager":
            compile(pipe, backend)
    return pipeline_task(pipe, job)


def pipeline_task(pipe: Pipeline, job: Job) -> Task:
    """Runs the job's call, or the transformer alone."""
    pipe.set_progress_bar_config(disable=True)
    if job.forward:
        args, kwargs = forward_arguments(pipe, job)

    def call() -> np.ndarray:
        with paddle.no_grad():
            result = pipe.transformer(*args, **kwargs)[0] if job.forward else pipe(**job.arguments()).images
        synchronize()
        return result.numpy() if isinstance(result, paddle.Tensor) else np.asarray(result)

    clocks = Stages(pipe)
    return _task(call, clocks.seconds, {"paddle": paddle.__version__})


def _onnx_task(folder: Path, runtime: str, precision: str, threads: int) -> Task:
    """Runs PyTorch's ONNX file."""
    inputs = load_file(folder / TORCH_INPUTS)
    names = json.loads((folder / ONNX).with_suffix(".json").read_text())
    engines.require(runtime, precision, "FluxTransformer2DModel")
    engine = engines.open_engine(runtime, [folder / ONNX], names, precision, threads, "FluxTransformer2DModel")
    return _task(lambda: engine.run([inputs[name] for name in names])[0], {}, {})


def _task(call: Callable[[], np.ndarray], seconds: dict[str, float], about: dict[str, Any]) -> Task:
    last = []

    def run() -> None:
        last[:] = [call()]

    return Task(run, lambda path: np.save(path, last[0]), seconds, about)


if __name__ == "__main__":
    folder, backend = Path(sys.argv[1]), sys.argv[2]
    serve(lambda: open_task(folder, backend))
