"""The process of one backend in a benchmark: `python -m cinn_infer.bench_worker FOLDER BACKEND`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import paddle

from cinn_infer import engines
from cinn_infer.backends import BACKENDS
from cinn_infer.bench_job import Job, forward_arguments
from cinn_infer.bench_loop import Task, serve
from cinn_infer.calls import Call
from cinn_infer.compile import compile
from cinn_infer.runtime import load
from cinn_infer.stages import Stages, synchronize
from fast_diffusers.caching.intercept import Interceptor
from fast_diffusers.pipelines.base import Pipeline

EXPORT = "export"
"""Folder, in the benchmark's, of the exported pipeline."""
ONNX = "torch.onnx"
ONNX_PREFIX = "torch-onnx-"
"""Backends that run PyTorch's own ONNX file, in our pipeline: their memory holds its weights, too."""

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
        pipe = _torch_onnx_pipeline(folder, *EXPORTED[backend.removeprefix(ONNX_PREFIX)], job)
    elif backend in EXPORTED:
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


def _torch_onnx_pipeline(folder: Path, runtime: str, precision: str, job: Job) -> Pipeline:
    """The eager pipeline with PyTorch's ONNX file in place of its transformer's forward."""
    pipe = job.open()
    names = json.loads((folder / ONNX).with_suffix(".json").read_text())
    model = type(pipe.transformer).__name__
    engines.require(runtime, precision, model)
    engine = engines.open_engine(runtime, [folder / ONNX], names, precision, job.threads, model)

    def forward(original: Callable, args: tuple, kwargs: dict) -> tuple[paddle.Tensor]:
        call = Call(original, args, kwargs)
        given = dict(zip(call.names, call.tensors, strict=True))
        return (paddle.to_tensor(engine.run([given[name].numpy() for name in names])[0]),)

    Interceptor(pipe.transformer, "forward", forward)
    return pipe


def _task(call: Callable[[], np.ndarray], seconds: dict[str, float], about: dict[str, Any]) -> Task:
    last = []

    def run() -> None:
        last[:] = [call()]

    return Task(run, lambda path: np.save(path, last[0]), seconds, about)


if __name__ == "__main__":
    folder, backend = Path(sys.argv[1]), sys.argv[2]
    serve(lambda: open_task(folder, backend))
