"""What runs exported graphs: which runtimes there are, which are installed, and what each can do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import numpy as np
import paddle

from cinn_infer import backends
from cinn_infer.engine_onnxruntime import OnnxRuntimeEngine
from cinn_infer.engine_openvino import OpenVINOEngine, has_bfloat16
from cinn_infer.engine_paddle import ONEDNN_MODELS, PaddleEngine, runs_on_gpu
from fast_diffusers.compat import openmp_threads, usable_cores
from fast_diffusers.errors import UserError

__all__ = ["ENGINES", "PRECISIONS", "RUNTIMES", "Engine", "OnnxRuntimeEngine", "OpenVINOEngine", "PaddleEngine"]

RUNTIMES = ("paddle", "onnxruntime", "openvino")
PRECISIONS = ("fp32", "bf16", "int8")
"""Of the transformer; other models run in fp32. int8 is that of weights: what is computed with them is float32."""

CAN: Mapping[str, tuple[str, ...]] = {
    "paddle": ("fp32", "bf16"),
    "onnxruntime": ("fp32",),
    "openvino": ("fp32", "bf16", "int8"),
}
"""Precisions of each runtime."""

FORMAT: Mapping[str, str] = {"paddle": "paddle", "onnxruntime": "onnx", "openvino": "onnx"}
"""What each runtime opens."""

TITLES: Mapping[str, str] = {"paddle": "Paddle Inference", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}


class Engine(Protocol):
    """A graph that is ready to run.

    `Engine(files, names, precision, threads, model)`: its files, the names of its inputs in order, one of `PRECISIONS`,
    CPU threads and the class name of the model that it was made from.
    """

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Outputs of the graph for inputs in the order of `names`."""


ENGINES: Mapping[str, type[Engine]] = {
    "paddle": PaddleEngine,
    "onnxruntime": OnnxRuntimeEngine,
    "openvino": OpenVINOEngine,
}


def installed() -> tuple[str, ...]:
    """Those of `RUNTIMES` that can be imported; Paddle Inference always is."""
    return tuple(name for name in RUNTIMES if name == "paddle" or find_spec(name) is not None)


def require(runtime: str, precision: str, model: str) -> None:
    """UserError unless the runtime is there and runs a transformer of class `model` in this precision."""
    if runtime not in RUNTIMES:
        raise UserError(f"runtime must be auto or one of {', '.join(RUNTIMES)}, got {runtime!r}")
    if precision not in CAN[runtime]:
        able = [name for name in RUNTIMES if precision in CAN[name]]
        raise UserError(
            f"{TITLES[runtime]} runs {' and '.join(CAN[runtime])} here, not {precision}: "
            f"load with runtime={' or '.join(map(repr, able))}, or in another precision"
        )
    if runtime not in installed():
        raise UserError(f'{TITLES[runtime]} is not installed: pip install "fast-diffusers[export]"')
    if precision == "int8" and find_spec("nncf") is None:
        raise UserError("precision='int8' needs NNCF, which is not installed: pip install \"fast-diffusers[export]\"")
    if precision == "bf16":
        _require_bf16(runtime, model)


def require_cinn(runtime: str) -> None:
    """UserError unless Paddle's compiler can run in this runtime, here."""
    if runtime != "paddle":
        raise UserError(f"cinn=True is for runtime='paddle', not {runtime!r}")
    if missing := backends.missing_for_cinn():
        raise UserError(f"cinn=True cannot run: {missing}; {backends.HOW_TO_GET_CINN}")


def _require_bf16(runtime: str, model: str) -> None:
    if runtime == "paddle" and runs_on_gpu():
        return
    if runtime == "paddle" and model not in ONEDNN_MODELS:
        raise UserError(
            f"Paddle Inference runs {', '.join(sorted(ONEDNN_MODELS))} in bf16, not {model}: "
            "load it in fp32, or with runtime='openvino'"
        )
    able = paddle.base.core.supports_bfloat16() if runtime == "paddle" else has_bfloat16()
    if not able:
        raise UserError(
            f"precision='bf16' of {TITLES[runtime]} needs a processor with AVX-512, which this one is without: "
            "load in fp32"
        )


def default_threads() -> int:
    """Threads of a runtime when none are asked for: those that Paddle uses, or else all cores."""
    return openmp_threads() or usable_cores()


def open_engine(
    runtime: str,
    files: Sequence[Path],
    names: Sequence[str],
    precision: str,
    threads: int,
    model: str,
    cinn: bool = False,
    siblings: int = 1,
) -> Engine:
    """The engine of a graph, which is one of `siblings` of its model; `cinn` is for Paddle Inference only.

    Raises:
        UserError: the runtime does not open these files.
    """
    try:
        own = {"paddle": {"cinn": cinn}, "openvino": {"siblings": siblings}}.get(runtime, {})
        return ENGINES[runtime](files, names, precision, threads, model, **own)
    except UserError:
        raise
    except Exception as error:  # the runtimes raise classes of their own
        raise UserError(f"{TITLES[runtime]} does not open {files[0]}: {last_line(error)}") from error


def last_line(error: Exception) -> str:
    """The end of a message, which in Paddle's and OpenVINO's is what went wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
