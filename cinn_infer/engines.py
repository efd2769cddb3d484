"""What runs exported graphs: Paddle Inference on CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import paddle

from fast_diffusers.compat import openmp_threads, usable_cores
from fast_diffusers.errors import UserError

PRECISIONS = ("fp32", "bf16")

BF16_MODELS = frozenset({"FluxTransformer2DModel", "SanaTransformer2DModel", "SD3Transformer2DModel"})
"""Transformers whose graphs are right in Paddle Inference's oneDNN, which computes bfloat16."""


class PaddleEngine:
    """A graph in Paddle Inference.

    `inplace_pass` is left out. With it, as by default, the predictor of 3.0 to 3.3.1 writes a unary operator's result
    over its input although another operator still reads that: cos and sin of one angle come out wrong, silently.

    oneDNN runs `BF16_MODELS` in bf16 and nothing else. In 3.3.1 it has no kernel for the interpolation of VAE decoders
    (an error at the first run), the outputs of ppdiffusers' SD3 transformer are wrong, Qwen-Image's transformer
    corrupts memory in it, and in fp32 Paddle's own kernels are faster.
    """

    def __init__(self, files: Sequence[Path], names: Sequence[str], precision: str, threads: int, model: str):
        from paddle import inference

        graph, weights = map(str, files)
        config = inference.Config(graph, weights)
        config.disable_glog_info()
        config.enable_new_ir(True)
        config.enable_new_executor(True)
        config.enable_memory_optim()
        config.delete_pass("inplace_pass")
        config.disable_gpu()
        config.set_cpu_math_library_num_threads(threads)
        if precision == "bf16" and model in BF16_MODELS:
            config.enable_mkldnn_bfloat16()
        else:
            config.disable_mkldnn()
        self._predictor = inference.create_predictor(config)
        own = list(self._predictor.get_input_names())
        if sorted(own) != sorted(names):
            raise UserError(f"{graph} takes {own}, its manifest says {list(names)}: export again")
        self._inputs = [self._predictor.get_input_handle(name) for name in names]
        self._outputs = [self._predictor.get_output_handle(name) for name in self._predictor.get_output_names()]

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Outputs of the graph for inputs in the order of `names`."""
        for handle, array in zip(self._inputs, inputs, strict=True):
            handle.copy_from_cpu(np.ascontiguousarray(array))
        before = openmp_threads()
        self._predictor.run()
        if before is not None:
            paddle.base.core.set_num_threads(before)  # the predictor leaves the process with one thread
        return [handle.copy_to_cpu() for handle in self._outputs]


def require(runtime: str) -> None:
    """UserError unless the runtime is Paddle Inference."""
    if runtime not in ("auto", "paddle"):
        raise UserError(
            f"runtime must be auto or paddle, which is Paddle Inference, got {runtime!r}: for another one "
            "export with format='onnx' and open the .onnx file there"
        )


def require_bf16(model: str) -> None:
    """UserError unless a transformer of this class runs in bfloat16 on this processor."""
    if model not in BF16_MODELS:
        raise UserError(
            f"precision='bf16' is there for {', '.join(sorted(BF16_MODELS))}, not for {model}: load it in fp32"
        )
    if not paddle.base.core.supports_bfloat16():
        raise UserError("precision='bf16' needs a processor with AVX-512, which this one is without: load in fp32")


def default_threads() -> int:
    """Threads of a runtime when none are asked for: those that Paddle uses, or else all cores."""
    return openmp_threads() or usable_cores()
