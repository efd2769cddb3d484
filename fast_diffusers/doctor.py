"""What this machine has, what will run how on it, and what to change: `fast-diffusers doctor`."""

from __future__ import annotations

import importlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
import paddle
import paddle.nn.functional as F

from fast_diffusers import __version__, compat, versions

MODULES = (
    "ppdiffusers",
    "fast_diffusers.models",
    "fast_diffusers.pipelines",
    "fast_diffusers.samplers",
    "fast_diffusers.schedulers",
    "fast_diffusers.lora",
    "distill.trainer",
    "cinn_infer",
)
INSTALL = "install the tested versions: pip install -c constraints.txt -e ."
MARKS = {"ok": " ", "note": "-", "broken": "!"}
EXPORT_PACKAGES = ("paddle2onnx", "onnxruntime", "openvino", "nncf")


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    `status`: "ok"; "note", works but could be better; "broken", something asked of the installation does not work.
    `advice`: what to change, for the latter two.
    """

    section: str
    name: str
    value: str
    status: Literal["ok", "note", "broken"] = "ok"
    advice: str = ""


def diagnose() -> list[Finding]:
    """All checks, in report order. Takes a few seconds; a check that raises is reported as broken."""
    checks = [check_versions, check_wheel, check_imports, check_cpu, check_gpu, check_gemm, check_attention]
    checks += [check_tracing, describe_use]
    findings: list[Finding] = []
    for check in checks:
        findings.extend(_guarded(check))
    return findings


def _guarded(check: Callable[[], Iterator[Finding]]) -> list[Finding]:
    try:
        return list(check())
    except Exception as error:  # whatever is wrong with the installation is what the report is for
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        return [Finding("failed checks", check.__name__, what, "broken", INSTALL)]


# ---- checks ----------------------------------------------------------------------------------------------------------


def check_versions() -> Iterator[Finding]:
    """Installed versions against the required ones."""
    section = "versions"
    yield Finding(section, "fast-diffusers", __version__)
    yield Finding(section, "python", platform.python_version())
    required = versions.requirements()
    if not required:
        advice = "install it (`make`, or pip install -c constraints.txt -e .) so that versions can be checked"
        yield Finding(section, "installation", "running from a bare checkout", "note", advice)
    shown = ("paddlepaddle", "ppdiffusers", "paddlenlp", "numpy")
    for requirement in sorted(required, key=lambda r: shown.index(r.name) if r.name in shown else len(shown)):
        if problem := versions.problem(requirement):
            yield Finding(section, requirement.name, problem, "broken", INSTALL)
        elif requirement.name in shown:
            for name, version in versions.installed(requirement.name).items():
                yield Finding(section, name, version)
    if len(paddles := versions.installed("paddlepaddle")) > 1:
        advice = "keep one: uninstall both, then install the one you want"
        yield Finding(section, "paddle", f"{' and '.join(paddles)} overwrite each other", "broken", advice)


def check_wheel() -> Iterator[Finding]:
    """What Paddle was compiled with."""
    section = "paddle wheel"
    cuda = f"{paddle.version.cuda()}, cuDNN {paddle.version.cudnn()}" if paddle.is_compiled_with_cuda() else "no"
    yield Finding(section, "CUDA", cuda)
    yield Finding(section, "CINN", _yes(paddle.is_compiled_with_cinn()))
    yield Finding(section, "oneDNN", _yes(paddle.base.core.is_compiled_with_onednn()))
    yield Finding(section, "distributed", _yes(paddle.is_compiled_with_distribute()))


def check_imports() -> Iterator[Finding]:
    """Whether the packages import."""
    failures = []
    for name in MODULES:
        try:
            importlib.import_module(name)
        except Exception as error:  # a broken third-party module may raise anything
            failures.append(f"{name}: {type(error).__name__}: {error}".splitlines()[0])
    for failure in failures:
        yield Finding("imports", "failed", failure, "broken", INSTALL)
    if not failures:
        yield Finding("imports", "packages", f"all {len(MODULES)} import")


def check_cpu() -> Iterator[Finding]:
    """Cores, and what Paddle uses of them."""
    section, cores, threads = "cpu", compat.usable_cores(), compat.openmp_threads()
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    models = [line.split(":", 1)[1].strip() for line in cpuinfo.splitlines() if line.startswith("model name")]
    yield Finding(section, "processor", models[0] if models else platform.machine())
    yield Finding(section, "cores", f"{cores} usable of {os.cpu_count()}")
    if threads is None:
        yield Finding(section, "threads", "unknown (no OpenMP library in the wheel)")
    elif threads == cores:
        yield Finding(section, "threads", str(threads))
    else:
        advice = f"unset OMP_NUM_THREADS or set it to {cores}, and import fast_diffusers before paddle"
        yield Finding(section, "threads", f"{threads} for {cores} cores", "note", advice)
    wanted, actual = compat.mkl_cpu_type(cpuinfo), os.environ.get("MKL_DEBUG_CPU_TYPE")
    names = {None: "chosen by MKL", "5": "AVX2", "7": "AVX-512"}
    if actual == wanted:
        yield Finding(section, "GEMM kernels", names[wanted])
    else:
        advice = f"MKL_DEBUG_CPU_TYPE={wanted}" if wanted else "unset MKL_DEBUG_CPU_TYPE"
        yield Finding(section, "GEMM kernels", f"MKL_DEBUG_CPU_TYPE={actual}", "note", f"{advice} suits this processor")


def check_gpu() -> Iterator[Finding]:
    """GPUs that Paddle sees, or why it sees none."""
    if paddle.is_compiled_with_cuda() and (count := paddle.device.cuda.device_count()):
        for index in range(count):
            properties = paddle.device.cuda.get_device_properties(index)
            memory = f"{properties.total_memory / 2**30:.0f} GiB, compute {properties.major}.{properties.minor}"
            yield Finding("gpu", f"gpu:{index}", f"{properties.name}, {memory}")
    elif not Path("/proc/driver/nvidia/version").is_file():
        yield Finding("gpu", "devices", "none")
    elif paddle.is_compiled_with_cuda():
        yield Finding("gpu", "devices", "none visible", "note", "check CUDA_VISIBLE_DEVICES and the driver's version")
    else:
        advice = "install the GPU wheel (README, GPU)"
        yield Finding("gpu", "devices", "an NVIDIA driver, but Paddle's CPU wheel", "note", advice)


def check_gemm(size: int | None = None, seconds: float = 0.5) -> Iterator[Finding]:
    """Rate and error of float32 matrix multiplication on the current device.

    Args:
        size: edge of the square matrices; default 1024 on CPU, 8192 on GPU.
        seconds: how long to measure.
    """
    device = paddle.get_device()
    on_cpu = device == "cpu"
    size = size or (1024 if on_cpu else 8192)
    rng = np.random.default_rng(0)
    a, b = (paddle.to_tensor(rng.standard_normal((size, size), dtype=np.float32)) for _ in range(2))
    rows = min(size, 64)
    exact = a[:rows].numpy().astype(np.float64) @ b.numpy().astype(np.float64)
    error = np.abs(paddle.matmul(a, b)[:rows].numpy() - exact).max() / np.abs(exact).max()
    durations = []
    end = time.perf_counter() + seconds
    while not durations or time.perf_counter() < end:
        start = time.perf_counter()
        paddle.matmul(a, b)
        if not on_cpu:
            paddle.device.synchronize()
        durations.append(time.perf_counter() - start)
    value = f"{2 * size**3 / np.median(durations) / 1e9:.0f} GFLOP/s, relative error {error:.0e} ({size}^3 on {device})"
    tolerance = 1e-5 if on_cpu else 5e-3  # a GPU may multiply in TF32
    if error < tolerance:
        yield Finding("operators", "float32 GEMM", value)
    else:
        advice = "results are wrong: unset MKL_DEBUG_CPU_TYPE and reinstall paddle"
        yield Finding("operators", "float32 GEMM", value, "broken", advice)


def check_attention() -> Iterator[Finding]:
    """ppdiffusers' attention function against its definition."""
    if not hasattr(F, "scaled_dot_product_attention_"):
        advice = "import fast_diffusers, which supplies it, before anything replaces paddle.nn.functional"
        yield Finding("operators", "attention", "F.scaled_dot_product_attention_ is missing", "broken", advice)
        return
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 16, 4, 8), dtype=np.float32) for _ in range(3))
    scores = np.einsum("blhd,bshd->bhls", q, k) / np.sqrt(8.0)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    exact = np.einsum("bhls,bshd->blhd", weights / weights.sum(-1, keepdims=True), v)
    error = np.abs(F.scaled_dot_product_attention_(*map(paddle.to_tensor, (q, k, v))).numpy() - exact).max()
    if error < 5e-3:
        yield Finding("operators", "attention", f"error {error:.0e}")
    else:
        yield Finding("operators", "attention", f"error {error:.0e}", "broken", "results are wrong: reinstall paddle")


def check_tracing() -> Iterator[Finding]:
    """Functions that would hang `paddle.jit.to_static`, see compat.py."""
    from paddle.jit.dy2static.utils import TransformOptions

    mode = TransformOptions.ToStaticMode.AST
    hanging = [f.__name__ for f in compat.replaced_functions() if TransformOptions.check_fn_need_transform(f, mode)]
    if hanging:
        advice = "something replaced them after fast_diffusers was imported: mark them paddle.jit.not_to_static"
        yield Finding("operators", "tracing", f"may hang on {', '.join(sorted(hanging))}", "broken", advice)
    else:
        yield Finding("operators", "tracing", "replaced functions are marked")


def describe_use() -> Iterator[Finding]:
    """What will run how."""
    section, device = "what runs how", paddle.get_device()
    on_cpu = device == "cpu"
    yield Finding(section, "training, sampling", f"eager, float32 on {device}" if on_cpu else f"eager on {device}")
    if paddle.is_compiled_with_cinn() and not on_cpu:
        yield Finding(section, "compilation", f"CINN on {device}")
    else:
        yield Finding(section, "compilation", f"Paddle's static graphs (PIR) on {device}, without CINN")
    missing = [name for name in EXPORT_PACKAGES if find_spec(name) is None]
    if missing:
        advice = 'for all export targets: pip install -c constraints.txt -e ".[export]"'
        yield Finding(section, "export", f"Paddle's format; {', '.join(missing)} not installed", "note", advice)
    else:
        yield Finding(section, "export", "Paddle's format, ONNX, OpenVINO")


def _yes(value: bool) -> str:
    return "yes" if value else "no"


# ---- report ----------------------------------------------------------------------------------------------------------


def as_text(findings: Sequence[Finding]) -> str:
    """The report for a terminal: aligned, one section after another, advice at the end."""
    width = max(len(f.name) for f in findings)
    lines, section = [], None
    for f in findings:
        if f.section != section:
            section = f.section
            lines += ["", section] if lines else [section]
        lines.append(f"{MARKS[f.status]} {f.name:{width}}  {f.value}")
    to_do = [f for f in findings if f.advice]
    if to_do:
        lines += ["", "what to change", *(f"{MARKS[f.status]} {f.name:{width}}  {f.advice}" for f in to_do)]
    broken = sum(f.status == "broken" for f in findings)
    lines += ["", f"{broken} broken" if broken else "nothing is broken"]
    return "\n".join(lines)


def as_json(findings: Sequence[Finding]) -> str:
    """The report for programs: {"ok": bool, "findings": [{section, name, value, status, advice}]}."""
    return json.dumps({"ok": is_sound(findings), "findings": [asdict(f) for f in findings]}, indent=2)


def is_sound(findings: Sequence[Finding]) -> bool:
    """Whether nothing is broken."""
    return all(f.status != "broken" for f in findings)
