"""What can run a model here: Paddle's compiler CINN, its static graphs (PIR), or eager execution."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import paddle

from fast_diffusers.errors import UserError

BACKENDS = ("auto", "cinn", "pir", "eager")

CINN_FLAGS: Mapping[str, bool] = {
    "FLAGS_prim_all": True,
    "FLAGS_prim_enable_dynamic": True,
    "FLAGS_use_cinn": True,
    "FLAGS_cinn_new_group_scheduler": True,
    "FLAGS_group_schedule_tiling_first": True,
    "FLAGS_cinn_bucket_compile": True,
}
"""What PaddlePaddle's own scripts set beside `to_static(backend="CINN")`: decompose operators into primitive ones, with
free axes too, and fuse and schedule these; one kernel for a range of sizes rather than one for each."""

KERNEL_CACHE_FLAGS = ("FLAGS_enable_cinn_kernel_cache", "FLAGS_cinn_kernel_cache_save_path")
"""CINN's own cache of compiled kernels on disk: whether it is used (by default not), and its folder."""

CPU_FLAGS: Mapping[str, bool] = {"FLAGS_enable_pir_in_executor_trace_run": True}
"""For static graphs on a CPU: operators run in order in the caller's thread. Handing each to a pool of threads, as
Paddle does by itself, is for devices that run beside the host, and makes small operators several times as long."""

HOW_TO_GET_CINN = (
    "install a GPU wheel of PaddlePaddle, whose Linux builds contain it: "
    "pip install paddlepaddle-gpu==3.3.1 -i https://www.paddlepaddle.org.cn/packages/stable/cu126/, "
    "and run on a CUDA device; or ask for backend='pir' or 'auto'"
)


def missing_for_cinn() -> str | None:
    """What CINN lacks here, in a few words; None if it can run."""
    if not paddle.is_compiled_with_cinn():
        return "this wheel of PaddlePaddle was built without CINN"
    if not paddle.is_compiled_with_cuda() or not paddle.get_device().startswith("gpu"):
        return f"CINN compiles for CUDA devices, and Paddle runs on {paddle.get_device()}"
    return None


def choose(backend: str) -> str:
    """The backend for a request; "auto" takes CINN where it can run, and static graphs elsewhere.

    Raises:
        UserError: an unknown one, or CINN where it cannot run.
    """
    if backend not in BACKENDS:
        raise UserError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    missing = missing_for_cinn() if backend in ("auto", "cinn") else None
    if backend == "auto":
        return "pir" if missing else "cinn"
    if missing:
        raise UserError(f"backend='cinn' cannot run: {missing}; {HOW_TO_GET_CINN}")
    return backend


def translator_backend(backend: str) -> str | None:
    """The `backend` argument of `paddle.jit.to_static`, whose default would ask for CINN."""
    return "CINN" if backend == "cinn" else None


def uses_cinn(static: Any) -> bool:
    """Whether a static function that was asked for with CINN has it: where it cannot, Paddle drops it silently."""
    backend = static._kwargs.get("backend")
    return backend is not None and backend.is_cinn()


def known_flags() -> dict[str, Any]:
    """The values of those of our flags that this wheel knows; some come and go with versions."""
    found: dict[str, Any] = {}
    for name in (*CINN_FLAGS, *KERNEL_CACHE_FLAGS, *CPU_FLAGS):
        with contextlib.suppress(ValueError):
            found |= paddle.get_flags([name])
    return found


def wanted_flags(backend: str, cache: Path | None) -> Mapping[str, Any]:
    """What flags should be; CINN's kernels are kept beside the programs, or not at all without a folder."""
    if backend != "cinn":
        return CPU_FLAGS if backend == "pir" and paddle.get_device() == "cpu" else {}
    if cache is None:
        return {**CINN_FLAGS, "FLAGS_enable_cinn_kernel_cache": False}
    return {**CINN_FLAGS, **dict(zip(KERNEL_CACHE_FLAGS, (True, f"{cache.parent / 'kernels'}/"), strict=True))}


@contextlib.contextmanager
def flags(backend: str, cache: Path | None = None) -> Iterator[None]:
    """Within the block, Paddle's flags are those that the backend needs; for tracing and for every run.

    Args:
        cache: the folder of programs, see `wanted_flags`.
    """
    before = known_flags()
    paddle.set_flags({name: value for name, value in wanted_flags(backend, cache).items() if name in before})
    try:
        yield
    finally:
        paddle.set_flags(before)
