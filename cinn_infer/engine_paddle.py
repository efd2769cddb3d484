"""Graphs in Paddle Inference."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import paddle
from paddle import inference

from fast_diffusers.compat import openmp_threads, without_kernel_names
from fast_diffusers.errors import UserError

ONEDNN_MODELS = frozenset({"FluxTransformer2DModel", "SanaTransformer2DModel", "SD3Transformer2DModel"})
"""Transformers whose graphs are right in Paddle Inference's oneDNN, which is faster and also computes bfloat16."""

GPU_POOL_MIB = 256
"""Memory that the predictor takes at first; it grows."""


class PaddleEngine:
    """A graph in Paddle Inference, see `cinn_infer.engines.Engine`; files are the graph and its weights."""

    def __init__(
        self, files: Sequence[Path], names: Sequence[str], precision: str, threads: int, model: str, cinn: bool = False
    ):
        self._predictor = inference.create_predictor(configuration(files, precision, threads, model, cinn))
        own = list(self._predictor.get_input_names())
        if sorted(own) != sorted(names):
            raise UserError(f"{files[0]} takes {own}, its manifest says {list(names)}: export again")
        self._inputs = [self._predictor.get_input_handle(name) for name in names]
        self._outputs = [self._predictor.get_output_handle(name) for name in self._predictor.get_output_names()]
        self._has_run = False

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """See `Engine`."""
        for handle, array in zip(self._inputs, inputs, strict=True):
            handle.copy_from_cpu(np.ascontiguousarray(array))
        before = openmp_threads()
        with nullcontext() if self._has_run else without_kernel_names():
            self._predictor.run()
        self._has_run = True
        if before is not None:
            paddle.base.core.set_num_threads(before)  # the predictor leaves the process with one thread
        return [handle.copy_to_cpu() for handle in self._outputs]


def runs_on_gpu() -> bool:
    """Whether Paddle computes on a CUDA device, and Paddle Inference then too."""
    return paddle.is_compiled_with_cuda() and paddle.get_device().startswith("gpu")


def configuration(
    files: Sequence[Path], precision: str, threads: int, model: str, cinn: bool = False
) -> inference.Config:
    """How Paddle Inference runs a graph: on the device that Paddle uses.

    `inplace_pass` is left out. With it, as by default, the predictor of 3.0 to 3.3.1 writes a unary operator's result
    over its input although another operator still reads that: cos and sin of one angle come out wrong, silently.

    On the CPU oneDNN runs `ONEDNN_MODELS` and nothing else. In 3.3.1 it has no kernel for the interpolation of VAE
    decoders (an error at the first run), the outputs of ppdiffusers' SD3 transformer are wrong, and Qwen-Image's
    transformer corrupts memory in it.

    Args:
        cinn: let Paddle's compiler fuse and compile the graph, on the GPU; the order of the calls matters to it.
    """
    config = inference.Config(*map(str, files))
    config.disable_glog_info()
    if runs_on_gpu():
        kinds = {"fp32": inference.PrecisionType.Float32, "bf16": inference.PrecisionType.Bfloat16}
        config.enable_use_gpu(GPU_POOL_MIB, int(paddle.get_device().split(":")[1]), kinds[precision])
    else:
        config.disable_gpu()
        config.set_cpu_math_library_num_threads(threads)
        if model not in ONEDNN_MODELS:
            config.disable_mkldnn()
        elif precision == "bf16":
            config.enable_mkldnn_bfloat16()
        else:
            config.enable_mkldnn()
    config.enable_new_ir(True)
    config.enable_new_executor(True)
    if cinn:
        config.enable_cinn()
    config.enable_memory_optim()
    config.delete_pass("inplace_pass")
    return config
