"""Measure what can run a model here, side by side: `python -m cinn_infer.benchmark --preset digits`."""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import paddle

from cinn_infer import backends, engines
from cinn_infer.compile import compile
from cinn_infer.export import export
from cinn_infer.runtime import load
from fast_diffusers.errors import UserError
from fast_diffusers.models import FluxTransformer2DModel
from fast_diffusers.pipelines import FluxPipeline
from fast_diffusers.pipelines.base import Pipeline
from fast_diffusers.pipelines.shipped import SHIPPED, open_pipeline
from fast_diffusers.random import Generator
from fast_diffusers.schedulers import FlowMatchEulerDiscreteScheduler

FLUX_BLOCK = dict(
    in_channels=64,
    num_layers=4,
    num_single_layers=8,
    attention_head_dim=64,
    num_attention_heads=8,
    joint_attention_dim=512,
    pooled_projection_dim=512,
    axes_dims_rope=(16, 24, 24),
)
FLUX_BLOCK_SIDE, FLUX_BLOCK_TEXT = 16, 32  # 256 + 32 tokens


@dataclass
class Row:
    """One backend: milliseconds of the first call, of the median one and of all, and its error against eager.

    `peak_mib` is the process's peak resident memory after this backend was prepared and first run; backends share a
    process, so that it only grows from row to row.
    """

    backend: str
    first_ms: float
    median_ms: float
    times_ms: list[float]
    error: float
    peak_mib: float


@dataclass
class Report:
    """A benchmark: rows, failures by backend, and what they were measured on."""

    preset: str
    machine: dict[str, Any]
    rows: list[Row]
    failures: dict[str, str]

    def as_json(self) -> str:
        """For machines."""
        return json.dumps(asdict(self), indent=2)

    def as_table(self) -> str:
        """A Markdown table, the fastest row first."""
        lines = ["| backend | median ms | first call ms | error | peak MiB |", "| --- | ---: | ---: | ---: | ---: |"]
        for row in sorted(self.rows, key=lambda row: row.median_ms):
            lines.append(
                f"| {row.backend} | {row.median_ms:.2f} | {row.first_ms:.0f} | {row.error:.1e} | {row.peak_mib:.0f} |"
            )
        return "\n".join([*lines, *(f"\n{name}: {reason}" for name, reason in self.failures.items())])


def benchmark(
    preset: str = "digits",
    rounds: int = 20,
    warmup: int = 3,
    only: Sequence[str] | None = None,
    call: Mapping[str, Any] | None = None,
) -> Report:
    """Run a preset by every backend that can run here, in turns, so that a busy machine is so for all of them.

    Args:
        preset: "digits", the shipped pipeline from label to image in 4 steps; "flux-block", a forward of FLUX's
            architecture at 71 M parameters with 256 + 32 tokens; or a pipeline folder, one step of its default call.
        rounds: measured runs of each backend; the table shows their median.
        warmup: runs of each before them, the first one, which compiles, aside.
        only: names of backends to run; eager, the reference, always runs.
        call: arguments of a pipeline folder's call, beside its defaults.
    """
    if rounds < 1 or warmup < 0:
        raise UserError(f"rounds must be positive and warmup not negative, got {rounds} and {warmup}")
    runs: dict[str, Callable[[], np.ndarray]] = {}
    rows, failures = {}, {}
    with tempfile.TemporaryDirectory() as folder, paddle.no_grad():
        choices = list(_backends(_preset(preset, call or {}), Path(folder)))
        if unknown := set(only or ()) - {name for name, _ in choices}:
            raise UserError(f"no backend {sorted(unknown)}: choose among {', '.join(name for name, _ in choices)}")
        truth = None
        for name, prepare in choices:
            if only is not None and name not in {"eager", *only}:
                continue
            try:
                started = time.perf_counter()
                run = prepare()
                output = run()
                first = time.perf_counter() - started
            except UserError as error:
                if truth is None:
                    raise  # without the reference there is nothing to measure
                failures[name] = str(error)
                continue
            truth = output if truth is None else truth
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            rows[name] = Row(name, 1000 * first, 0.0, [], float(np.abs(output - truth).max()), peak)
            runs[name] = run
        for turn in range(warmup + rounds):
            for name, run in runs.items():
                started = time.perf_counter()
                run()
                if turn >= warmup:
                    rows[name].times_ms.append(1000 * (time.perf_counter() - started))
        for row in rows.values():
            row.median_ms = statistics.median(row.times_ms)
    return Report(preset, _machine(), list(rows.values()), failures)


def _preset(name: str, more: Mapping[str, Any]) -> Callable[[Pipeline | None], tuple[Pipeline, Mapping[str, Any]]]:
    """What makes (a new pipeline, the arguments of its call)."""
    if name == "flux-block":
        return _flux_block
    call: dict[str, Any] = {"output_type": "np", "num_inference_steps": 4 if name in SHIPPED else 1}
    prompt = "3" if name in SHIPPED else "a photo of a cat"
    return lambda: (open_pipeline(name), {**call, "prompt": prompt, **more})


def _flux_block() -> tuple[Pipeline, Mapping[str, Any]]:
    """The transformer inside the simplest pipeline, of which one step without decoding is one forward."""
    paddle.seed(0)
    model = FluxTransformer2DModel(**FLUX_BLOCK)
    for weight in model.parameters():
        if not float(weight.abs().max()):  # what starts at zero would hide the rest
            weight.set_value(0.02 * paddle.randn(weight.shape))
    model.eval()
    pipe = FluxPipeline(FlowMatchEulerDiscreteScheduler(), *[None] * 5, model)
    embeds = {"prompt_embeds": paddle.randn([1, FLUX_BLOCK_TEXT, 512]), "pooled_prompt_embeds": paddle.randn([1, 512])}
    size = {"height": 16 * FLUX_BLOCK_SIDE, "width": 16 * FLUX_BLOCK_SIDE}
    return pipe, {"output_type": "latent", "num_inference_steps": 1, **embeds, **size}


def _backends(make: Callable, folder: Path) -> Iterator[tuple[str, Callable[[], Callable[[], np.ndarray]]]]:
    """(name, what prepares a run) of every backend; eager, the reference, first."""

    def runner(pipe: Pipeline, call: Mapping[str, Any]) -> Callable[[], np.ndarray]:
        pipe.set_progress_bar_config(disable=True)

        def run() -> np.ndarray:
            images = pipe(**call, generator=Generator(0)).images
            return images.numpy() if isinstance(images, paddle.Tensor) else np.asarray(images)

        return run

    def compiled(backend: str) -> Callable[[], np.ndarray]:
        pipe, call = make()
        compile(pipe, backend)
        return runner(pipe, call)

    def exported(precision: str) -> Callable[[], np.ndarray]:
        pipe, call = make()
        if not (folder / "export").exists():
            export(pipe, folder / "export", calls=[{**call, "num_inference_steps": 1}])
        return runner(load(folder / "export", "paddle", precision), call)

    yield "eager", lambda: runner(*make())
    yield "pir", lambda: compiled("pir")
    yield "cinn", lambda: compiled("cinn")
    for precision in engines.PRECISIONS:
        yield f"paddle {precision}", lambda precision=precision: exported(precision)


def _machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return {
        "processor": next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown"),
        "threads": engines.default_threads(),
        "device": paddle.get_device(),
        "paddle": paddle.__version__,
        "python": platform.python_version(),
        "cinn": backends.missing_for_cinn() is None,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table of a benchmark, and write it as JSON."""
    parser = argparse.ArgumentParser(prog="cinn_infer.benchmark", description=benchmark.__doc__.splitlines()[0])
    parser.add_argument("--preset", default="digits", help="digits, sana_digits, flux-block, or a pipeline folder")
    parser.add_argument("--rounds", type=int, default=20, help="measured runs of each backend (default: %(default)s)")
    parser.add_argument("--only", action="append", help="a backend to run beside eager; repeatable")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the figures")
    arguments = parser.parse_args(argv)
    report = benchmark(arguments.preset, arguments.rounds, only=arguments.only)
    if arguments.json is not None:
        arguments.json.write_text(report.as_json() + "\n", encoding="utf-8")
    print(report.as_table())


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main()
