"""The only file that patches or works around paddle, paddlenlp or ppdiffusers.

`fast_diffusers/__init__.py` imports it before anything else. It imports paddle and ppdiffusers itself, because some
settings must be made before paddle loads and the others once both have patched it. Every item states its reason and
when it can go; tests/fast_diffusers/test_compat.py has a test for each, test_forward_ad.py those of
`intercepted_operators`.
"""

import atexit
import contextlib
import contextvars
import ctypes
import functools
import logging
import os
import platform
import socket
import sys
import tempfile
import threading
import time
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

_IS_X86 = platform.machine() in ("x86_64", "AMD64")


def usable_cores(quota_file: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Number of CPU cores this process may use: its affinity mask, capped by its container's quota (cgroup v2)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if quota_file.is_file():
        quota, period = quota_file.read_text().split()
        if quota != "max":
            cores = min(cores, max(1, round(int(quota) / int(period))))
    return cores


def mkl_cpu_type(cpuinfo: str) -> str | None:
    """The `MKL_DEBUG_CPU_TYPE` that suits the processor described by `cpuinfo` (text of /proc/cpuinfo).

    "7" selects MKL's AVX-512 kernels, "5" its AVX2 ones; None leaves the choice to MKL, which is right on Intel.
    """
    fields = dict(map(str.strip, line.split(":", 1)) for line in cpuinfo.splitlines() if ":" in line)
    flags = set(fields.get("flags", "").split())
    if fields.get("vendor_id") not in ("AuthenticAMD", "HygonGenuine"):
        return None
    if {"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"} <= flags:
        return "7"
    return "5" if {"avx2", "fma"} <= flags else None


def _select_gemm_kernels() -> None:
    """Reason: Paddle's CPU wheel bundles MKL 2019.5, which gives every processor not made by Intel its SSE kernels.
    On a Zen 5 core float32 GEMM runs at 45 GFLOP/s as installed, 120 with MKL's AVX2 kernels, 235 with its AVX-512
    ones. MKL reads the variable at its first call. A value set by the user stays.
    Remove when: the wheel bundles MKL 2020.1 or later (which ignores the variable).
    """
    cpuinfo = Path("/proc/cpuinfo")
    cpu_type = mkl_cpu_type(cpuinfo.read_text()) if _IS_X86 and cpuinfo.is_file() else None
    if cpu_type is not None:
        os.environ.setdefault("MKL_DEBUG_CPU_TYPE", cpu_type)


def openmp_threads() -> int | None:
    """Threads that the wheel's OpenMP gives a parallel region of the calling thread; None if it has no Intel OpenMP."""
    library = Path(paddle.__file__).parent / "libs" / "libiomp5.so"
    return ctypes.CDLL(str(library)).omp_get_max_threads() if library.is_file() else None


@contextlib.contextmanager
def _cpu_threads() -> Iterator[None]:
    """Reason: Paddle runs on one CPU thread unless OMP_NUM_THREADS says otherwise, and prints a two-line warning, about
    builds with OpenBLAS, when it says more than one. The variable is hidden while paddle is imported and set before
    OpenMP first reads it, so that every thread of the process gets it. Without a value from the user it is then
    unset again: child processes choose for themselves. Wheels for other processors than x86 do use OpenBLAS, which
    does not work with several threads: there nothing is changed.
    Remove when: Paddle uses the machine's cores by default.
    """
    if not _IS_X86:
        yield
        return
    late = "paddle" in sys.modules
    chosen = os.environ.pop("OMP_NUM_THREADS", None)
    if late and chosen == "1":
        chosen = None  # what Paddle itself sets where there was nothing
    yield
    from paddle.base import core

    os.environ["OMP_NUM_THREADS"] = chosen or str(usable_cores())
    if chosen is None:
        core.set_num_threads(usable_cores())  # starts OpenMP, which reads the variable
        del os.environ["OMP_NUM_THREADS"]
        if late and _in_new_thread(openmp_threads) not in (None, usable_cores()):
            warnings.warn(
                "paddle ran operators before fast_diffusers was imported: operators called from other threads use one "
                "CPU core, and matrix products may be slow. Import fast_diffusers first.",
                RuntimeWarning,
                stacklevel=2,
            )


def _in_new_thread(function: Callable[[], Any]) -> Any:
    result = []
    thread = threading.Thread(target=lambda: result.append(function()))
    thread.start()
    thread.join()
    return result[0]


@contextlib.contextmanager
def _explained_failure() -> Iterator[None]:
    """An import that fails because of a wrong version says which; ppdiffusers' own errors seldom do."""
    try:
        yield
    except Exception as error:
        from fast_diffusers import versions

        problems = "; ".join(versions.problems())
        if not problems:
            raise
        raise ImportError(
            f"{type(error).__name__}: {error}. Likely cause: {problems}. Install the tested versions: "
            "pip install -c constraints.txt -e ."
        ) from error


@contextlib.contextmanager
def _quiet_imports() -> Iterator[None]:
    """Reason: importing paddle and ppdiffusers warns about things no user of this package can act on. Only these
    messages, and only during these imports, are dropped.
    Remove when: `python -c "import paddle, ppdiffusers"` prints nothing without ccache installed.
    """
    known = "No ccache found|Setuptools is replacing distutils|pkg_resources is deprecated"
    warnings.filterwarnings("ignore", message=known)
    added = warnings.filters[0]
    try:
        yield
    finally:
        warnings.filters.remove(added)


@contextlib.contextmanager
def _untouched_root_logger() -> Iterator[None]:
    """Reason: paddle.distributed uses the root logger as its own: it attaches a handler and lowers the level to INFO,
    so that `logging.basicConfig` does nothing afterwards and every library's INFO messages appear on stderr.
    Remove when: `import paddle` leaves `logging.getLogger().handlers` as it was.
    """
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def _supply_attention() -> None:
    """Reason: ppdiffusers' attention processors call `F.scaled_dot_product_attention_`, which it defines only where the
    memory-efficient attention kernel runs, that is on a GPU. Elsewhere Paddle's own attention takes its place.
    Remove when: ppdiffusers defines it on CPU or calls `F.scaled_dot_product_attention`.
    """
    import paddle.nn.functional as F

    if hasattr(F, "scaled_dot_product_attention_"):
        return

    def scaled_dot_product_attention_(
        query,
        key,
        value,
        attn_mask=None,
        dropout_p=0.0,
        is_causal=False,
        scale=None,
        training=True,
        attention_op=None,
    ):
        """Attention over [B, L, heads, dim]; `attn_mask` [B, heads, L, S] is added to the scores, or boolean."""
        return F.scaled_dot_product_attention(
            query, key, value, None if is_causal else attn_mask, dropout_p, is_causal, training, scale=scale
        )

    F.scaled_dot_product_attention_ = scaled_dot_product_attention_


def is_eager_on_cpu(x: "paddle.Tensor") -> bool:
    """Whether x is a dygraph tensor in host memory, rather than a traced one or one on a device."""
    return paddle.in_dynamic_mode() and x.place.is_cpu_place()


@functools.lru_cache(maxsize=16)
def _rows_with_swapped_axes(batch: int, first: int, second: int) -> np.ndarray:
    return np.arange(batch * first * second).reshape(batch, first, second).transpose(0, 2, 1).ravel().copy()


def swap_middle_axes(x: "paddle.Tensor") -> "paddle.Tensor":
    """`x.transpose([0, 2, 1, 3])`, [B, M, N, D] -> [B, N, M, D], at the speed of a memory copy.

    Reason: in dygraph a transpose is a view, and the CPU kernel that later makes it contiguous goes element by element:
    1.0 ms for 64 × 17 × 2 × 64 floats where gathering rows takes 0.014 ms. Attention makes four such views.
    For eager CPU tensors only (`is_eager_on_cpu`): a traced program makes no views.
    Remove when: `x.transpose([0, 2, 1, 3]).contiguous()` is about as fast as `x + 0` on CPU.
    """
    batch, first, second, size = x.shape
    rows = paddle.to_tensor(_rows_with_swapped_axes(batch, first, second))
    return paddle.gather(x.reshape([-1, size]), rows).reshape([batch, second, first, size])


def replaced_functions() -> Iterator[types.FunctionType]:
    """The Python functions that paddlenlp, ppdiffusers or this file put into paddle's namespaces."""
    for namespace in (paddle, paddle.Tensor, paddle.nn, paddle.nn.functional):
        for value in vars(namespace).values():
            package = (getattr(value, "__module__", None) or "").split(".")[0]
            if isinstance(value, types.FunctionType) and package in ("paddlenlp", "ppdiffusers", "fast_diffusers"):
                yield value


def _keep_replaced_functions_out_of_tracing() -> None:
    """Reason: `to_static(full_graph=True)` hangs on a chained call of a replaced function, such as
    `paddle.permute(x, 1, 0).reshape([-1])`: while it holds its conversion lock, the translator evaluates the call's
    source text, which starts a conversion of the replaced function and waits for the same lock. Functions marked
    `not_to_static` are called as they are, so their operators are still traced.
    Remove when: `paddle.jit.dy2static` no longer evaluates call expressions under its lock.
    """
    for function in replaced_functions():
        paddle.jit.not_to_static(function)


def _keep_freed_memory() -> None:
    """Reason: Paddle's CPU allocator asks malloc for every operator's output, and glibc gives large freed blocks back
    to the system at once, so that each output is cleared page by page again: a quarter of a training step of
    examples/mnist, half of the processor time of sampling digits. With these thresholds blocks up to 1 GiB are used
    again; peak memory grows by about 6%. Thresholds that the user set (MALLOC_*) stay, as does GPU builds' host memory.
    Remove when: Paddle's CPU allocator keeps freed memory itself.
    """
    if paddle.is_compiled_with_cuda() or any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc and compatible libraries have it
    if mallopt is not None:
        for parameter in (-3, -1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD of malloc.h
            mallopt(parameter, 1 << 30)


_select_gemm_kernels()
with _explained_failure(), _untouched_root_logger(), _quiet_imports():
    with _cpu_threads():
        import paddle
    import ppdiffusers  # noqa: F401
_keep_freed_memory()
_supply_attention()
_keep_replaced_functions_out_of_tracing()


_STDOUT = threading.RLock()  # one thread at a time may have it elsewhere, else its way back could be lost


@contextlib.contextmanager
def without_kernel_names() -> Iterator[None]:
    """Leave names of oneDNN's kernels out of what the process writes to its standard output in this block; all else
    appears at its end.

    Reason: when a graph runs for the first time, each reduce_mean in oneDNN writes a line to stdout, which belongs to
    the results of whoever calls.
    Remove when: a graph with a mean runs in Paddle Inference with oneDNN and stdout stays empty.
    """

    def flush() -> None:
        sys.stdout.flush()
        ctypes.CDLL(None).fflush(None)

    with _STDOUT, tempfile.TemporaryFile() as written:
        flush()
        stdout = os.dup(1)
        os.dup2(written.fileno(), 1)
        try:
            yield
        finally:
            flush()
            os.dup2(stdout, 1)
            os.close(stdout)
            written.seek(0)
            for line in written:
                if line.strip() != b"ReduceMeanCheckIfOneDNNSupport":
                    os.write(1, line)


def outlive_peers(store: Any, host: str, rank: int, size: int, limit: float = 30.0) -> None:
    """Make rank 0 of `size` processes wait, when its interpreter exits, until the processes of the others have ended.

    Reason: rank 0 serves Paddle's key-value store from a thread that runs on while the C++ destructors of static
    objects do; when it logs a peer's disconnection through a logger that is gone already, it aborts, and a finished
    run is reported as failed with code -6 (seen in 3 of 125 launches). Every peer holds a connection that closes with
    its process, not before.
    Remove when: the store's thread stops before static destruction.

    Args:
        store: Paddle's store, for the port (`set`, `get` of bytes).
        host: the address of rank 0.
        limit: seconds after which rank 0 waits no longer.
    """
    key = "fast_diffusers/outlive_peers"
    if rank > 0:
        socket.create_connection((host, int(store.get(key))), timeout=limit).detach()  # the process's end closes it
        return
    listener = socket.create_server((host, 0), backlog=size)
    store.set(key, str(listener.getsockname()[1]).encode())

    def wait() -> None:
        deadline = time.monotonic() + limit
        with listener, contextlib.suppress(OSError):
            for peer in [_accepted(listener, deadline) for _ in range(size - 1)]:
                peer.settimeout(max(0.001, deadline - time.monotonic()))
                peer.recv(1)  # nothing is ever sent: this returns at the end of the connection

    atexit.register(wait)


def _accepted(listener: socket.socket, deadline: float) -> socket.socket:
    listener.settimeout(max(0.001, deadline - time.monotonic()))
    return listener.accept()[0]


OperatorHandler = Callable[[str, Callable[..., Any], tuple, dict[str, Any]], Any]
"""What stands in for an operator: (name, operator, args, kwargs) -> what the operator would return."""

_METADATA_NAMES = """
    _is_initialized _is_dense_tensor_hold_allocation _is_shared_buffer_with _is_shared_underline_tensor_with
    is_dense is_dist is_sparse is_sparse_coo is_sparse_csr is_same_shape is_selected_rows element_size is_contiguous
    get_strides stride _offset _holder_size _inplace_version _bump_inplace_version _reset_grad_inplace_version
    retain_grads clear_gradient _zero_grads _grad_name _grad_value _grad_ivar _set_grad_type _register_grad_hook
    _remove_grad_hook _register_backward_hook _apply_backward_hook
"""
_METADATA_METHODS = frozenset(_METADATA_NAMES.split())
"""Methods of a tensor that neither read nor write its values."""

_handlers: contextvars.ContextVar[tuple[OperatorHandler, Any] | None] = contextvars.ContextVar("handlers", default=None)
_interception = types.SimpleNamespace(lock=threading.Lock(), users=0, modules=0, namespaces=[])


@contextlib.contextmanager
def intercepted_operators(handler: OperatorHandler) -> Iterator[None]:
    """Within the block, operators called from this context (thread or task) go through `handler`.

    Names are those of `paddle._C_ops` ("matmul"), "legacy.*" for `paddle._legacy_C_ops`, "eager.*" for four functions
    beside them, "Tensor.*" for methods written in C++ ("Tensor.__add__"). The handler itself runs outside the block:
    what it calls, the operator included, goes to the block around this one, if any.

    Reason: Paddle has no counterpart of `__torch_function__`, and forward-mode differentiation needs one. Every eager
    operator is reached through an attribute of a module or of the type `paddle.Tensor`, so these are replaced while
    some block is open, and put back when the last one closes, whatever was raised. Calls from other contexts pass
    through. The constructor `paddle.Tensor(x)` cannot be replaced: a tensor made with it is a new one to the handler.
    Remove when: Paddle offers a way to override operators for a tensor type, or forward-mode differentiation.
    """
    with _interception.lock:
        if _interception.users == 0:
            _set_interception(True)
        _interception.users += 1
    token = _handlers.set((handler, _handlers.get()))
    try:
        yield
    finally:
        _handlers.reset(token)
        with _interception.lock:
            _interception.users -= 1
            if _interception.users == 0:
                _set_interception(False)


def _set_interception(on: bool) -> None:
    if on and _interception.modules != len(sys.modules):  # modules imported since may hold operators
        _interception.modules = len(sys.modules)
        _interception.namespaces = _interception_namespaces()
    for namespace, plain, replaced in _interception.namespaces:
        values = replaced if on else plain
        if isinstance(namespace, type):
            for name, value in values.items():
                setattr(namespace, name, value)
        else:
            vars(namespace).update(values)


def _interception_namespaces() -> list[tuple[Any, dict[str, Any], dict[str, Any]]]:
    """(namespace, its operators, their replacements) of every module and class through which operators are called."""
    replacements: dict[int, Callable[..., Any]] = {}
    for prefix, module in (("", paddle._C_ops), ("legacy.", paddle._legacy_C_ops)):
        for name, value in vars(module).items():
            if isinstance(value, types.BuiltinFunctionType):
                replacements[id(value)] = _replacement(prefix + name, value)
    eager = paddle.base.core.eager
    for name in ("tensor_copy", "scale", "_run_custom_op", "jit_function_call"):
        replacements[id(vars(eager)[name])] = _replacement(f"eager.{name}", vars(eager)[name])
    builtin_modules = (eager.ops, eager.ops.legacy, paddle.base.core.pir.ops)
    namespaces = []
    for module in list(sys.modules.values()):
        if isinstance(module, types.ModuleType) and module not in builtin_modules:
            plain = {name: value for name, value in list(vars(module).items()) if id(value) in replacements}
            if plain:
                namespaces.append((module, plain, {name: replacements[id(value)] for name, value in plain.items()}))
    methods = {
        name: value
        for name, value in vars(paddle.Tensor).items()
        if isinstance(value, types.MethodDescriptorType) and name not in _METADATA_METHODS
    }
    replaced = {name: _replacement(f"Tensor.{name}", value) for name, value in methods.items()}
    data = vars(paddle.Tensor)["data"]
    methods["data"] = data  # reading it is `detach`; writing it changes the values
    replaced["data"] = property(data.__get__, _replacement("Tensor.data", data.__set__))
    namespaces.append((paddle.Tensor, methods, replaced))
    return namespaces


def _replacement(name: str, operator: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        entry = _handlers.get()
        if entry is None:
            return operator(*args, **kwargs)
        handler, outer = entry
        token = _handlers.set(outer)
        try:
            return handler(name, call, args, kwargs)
        finally:
            _handlers.reset(token)

    call.__name__ = name
    return call
