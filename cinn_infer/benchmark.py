"""Measure what can run a model here, side by side: `fast-diffusers bench infer --preset flux-block`."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from safetensors.numpy import save_file

from cinn_infer import backends, check, engines, program_cache, stages
from cinn_infer.bench_job import FLUX_BLOCK, Job, forward_tensors, preset
from cinn_infer.bench_loop import Worker, WorkerError
from cinn_infer.bench_report import Report, Row
from cinn_infer.bench_worker import COMPILED, EXPORT, EXPORTED, ONNX, ONNX_PREFIX
from cinn_infer.export import export
from cinn_infer.export_command import available_format
from fast_diffusers.compat import usable_cores
from fast_diffusers.errors import UserError
from fast_diffusers.models import FluxTransformer2DModel

__all__ = ["FLUX_BLOCK", "Report", "Row", "benchmark", "main"]

logger = logging.getLogger(__name__)

TORCH_SCRIPT = Path(__file__).parents[1] / "benchmarks" / "infer_torch.py"
TORCH = tuple(f"torch{kind}-{precision}" for kind in ("", "-compile", "-frozen") for precision in ("fp32", "bf16"))
TORCH_ONNX = tuple(ONNX_PREFIX + name for name, (runtime, _) in EXPORTED.items() if engines.FORMAT[runtime] == "onnx")


def backend_names(torch: bool = False) -> tuple[str, ...]:
    """All backends, in the order of their turns; eager, the reference, first."""
    return ("eager", *COMPILED, *EXPORTED, *(TORCH + TORCH_ONNX if torch else ()))


def benchmark(
    name: str = "digits",
    rounds: int = 20,
    warmup: int = 3,
    only: Sequence[str] | None = None,
    threads: int | None = None,
    torch: str | None = None,
    call: Mapping[str, Any] | None = None,
    forward: bool = False,
    alone: bool = False,
) -> Report:
    """Run a model by every backend that can run here, in turns, so that a busy machine is so for all of them.

    Args:
        name: "digits" or "sana_digits", a shipped pipeline from label to image in 4 steps; "flux-block", a forward of
            FLUX's architecture at 71 M parameters with 256 + 32 tokens; or a pipeline folder, one step of its call.
        rounds: measured turns of each backend.
        warmup: turns of each before them, beside the first call, which compiles.
        only: names of backends to run, or beginnings of names; eager always runs.
        threads: of every backend; None is OMP_NUM_THREADS, or else all cores.
        torch: interpreter of an environment with PyTorch and diffusers, whose FLUX then runs beside ours: by itself, if
            `forward`, and as PyTorch's own ONNX file in our pipeline.
        call: arguments of the pipeline's call, beside its defaults.
        forward: measure one forward of the transformer instead of the whole call.
        alone: run the backends one after another rather than in turns, for a model of which memory holds few copies.

    Raises:
        UserError: a bad argument, or a model that does not run eagerly.
    """
    for what, value, least in [("rounds", rounds, 1), ("warmup", warmup, 0), ("threads", threads, 1)]:
        if value is not None and value < least:
            raise UserError(f"{what} must be at least {least}, got {value}")
    threads = threads or int(os.environ.get("OMP_NUM_THREADS") or usable_cores())
    chosen = _chosen(backend_names(torch is not None), only)
    if torch is not None:
        _check_torch(torch)
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        folder = Path(temporary)
        job = preset(name, folder, call or {}, forward, threads)
        job.write(folder)
        failures = _make_files(job, folder, chosen, torch)
        workers = {each: _command(folder, each, torch) for each in chosen if each not in failures}
        rows, about = _measure(workers, folder, rounds, warmup, threads, alone, failures)
    what = "a forward of the transformer" if job.forward else f"a call with {job.call['num_inference_steps']} steps"
    what += f", {rounds} turns each" + (", one backend after another" if alone else "")
    return Report(name, what, _machine(threads) | about, rows, failures)


def _chosen(known: Sequence[str], only: Sequence[str] | None) -> list[str]:
    for wanted in only or ():
        if not any(name.startswith(wanted) for name in known):
            raise UserError(f"no backend is called {wanted!r}: choose among {', '.join(known)}")
    return [name for name in known if only is None or name == "eager" or name.startswith(tuple(only))]


def _check_torch(python: str) -> None:
    """UserError unless PyTorch can be measured with this interpreter."""
    if not TORCH_SCRIPT.is_file():
        raise UserError(f"{TORCH_SCRIPT} is not here: PyTorch is measured from a checkout of this project")
    if shutil.which(python) is None:
        raise UserError(f"{python} cannot be run: give the interpreter of an environment with PyTorch and diffusers")
    if why := _said_last(subprocess.run([python, "-c", "import torch, diffusers"], capture_output=True, text=True)):
        raise UserError(f"{python} cannot import PyTorch and diffusers: {why}")


def _said_last(done: subprocess.CompletedProcess) -> str | None:
    """The last line of a process that failed; None for one that did not."""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return None if done.returncode == 0 else lines[-1] if lines else f"exit code {done.returncode}"


def _command(folder: Path, backend: str, torch: str | None) -> list[Any]:
    if backend in TORCH:
        return [torch, TORCH_SCRIPT, folder, backend]
    return [sys.executable, "-m", "cinn_infer.bench_worker", folder, backend]


def _make_files(job: Job, folder: Path, chosen: Sequence[str], torch: str | None) -> dict[str, str]:
    """Write what backends open, an export and PyTorch's model and graph; {backend: why it has none}."""
    pipe = job.open()
    pipe.set_progress_bar_config(disable=True)
    if torch is not None and not isinstance(pipe.transformer, FluxTransformer2DModel):
        raise UserError(f"PyTorch is compared by FLUX's transformer, not by {type(pipe.transformer).__name__}")
    failures = _unavailable(chosen, type(pipe.transformer).__name__, job.forward)
    chosen = [each for each in chosen if each not in failures]

    @contextlib.contextmanager
    def needed_by(names: list[str], what: str) -> Iterator[None]:
        try:
            logger.info("writing %s", what)
            yield
        except UserError as error:
            failures.update(dict.fromkeys(names, str(error)))

    if exported := [each for each in chosen if each in EXPORTED]:
        needs_onnx = any(engines.FORMAT[EXPORTED[each][0]] == "onnx" for each in exported)
        format = available_format() if needs_onnx else "paddle"
        with needed_by(exported, "the export"):
            export(pipe, folder / EXPORT, format, [{**job.arguments(), "num_inference_steps": 1}])
    if torch is not None:
        pipe.transformer.save_pretrained(folder / "torch", layout="diffusers")
        save_file(forward_tensors(pipe, job), folder / "torch_inputs.safetensors")
    if onnx := [each for each in chosen if each in TORCH_ONNX]:
        with needed_by(onnx, "PyTorch's ONNX file"):
            command = [torch, TORCH_SCRIPT, folder, ONNX]
            if why := _said_last(subprocess.run(list(map(str, command)), capture_output=True, text=True)):
                raise UserError(f"PyTorch wrote no ONNX file: {why}")
    return failures


def _unavailable(chosen: Sequence[str], model: str, forward: bool) -> dict[str, str]:
    """Why backends cannot run here a transformer of class `model`, alone or in its pipeline, of those that cannot."""
    failures = {}
    for name in chosen:
        try:
            if name in COMPILED:
                backends.choose(name)
            elif name in TORCH:
                if not forward:
                    raise UserError("it runs the transformer alone: ask for forward")
            elif name != "eager":
                engines.require(*EXPORTED[name.removeprefix(ONNX_PREFIX)], model)
        except UserError as error:
            failures[name] = str(error)
    return failures


def _measure(
    commands: Mapping[str, Sequence[Any]],
    folder: Path,
    rounds: int,
    warmup: int,
    threads: int,
    alone: bool,
    failures: dict[str, str],
) -> tuple[list[Row], dict[str, Any]]:
    """Rows, and what the workers say of themselves; `failures` takes why a backend has no row."""
    rows: dict[str, Row] = {}
    about: dict[str, Any] = {}
    environment = {  # first calls compile, whatever was compiled before
        "OMP_NUM_THREADS": str(threads),
        program_cache.VARIABLE: "off",
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
    }
    for group in [[name] for name in commands] if alone else [list(commands)]:
        with contextlib.ExitStack() as cleanup:
            workers: dict[str, Worker] = {}
            for name in group:
                logger.info("opening %s", name)
                worker = Worker(commands[name], environment, folder / f"{name}.log")
                cleanup.callback(worker.close)
                try:
                    rows[name] = _open(worker, name, folder, about)
                    workers[name] = worker
                except WorkerError as error:
                    if name == "eager":  # nothing to compare the others with
                        raise UserError(f"the model does not run eagerly: {error}") from error
                    failures[name] = str(error)
                    worker.close()
            logger.info("%d turns of %s", warmup + rounds, ", ".join(workers))
            for name, error in _take_turns(workers, rows, rounds, warmup).items():
                failures[name] = f"it stopped while it was measured: {error}"
                del rows[name]
    return list(rows.values()), about


def _open(worker: Worker, name: str, folder: Path, about: dict[str, Any]) -> Row:
    """Open a backend, run it once and compare what it gives with eager's."""
    output = folder / f"{name}.npy"
    answer = worker.prepare(output)
    about |= answer["about"]
    found, truth = np.load(output), np.load(folder / "eager.npy")
    errors = [check.error(found, truth, precision) for precision in ("fp32", "bf16")]  # largest, root mean square
    return Row(name, answer["open_ms"], answer["first_ms"], *errors)


def _take_turns(workers: Mapping[str, Worker], rows: Mapping[str, Row], rounds: int, warmup: int) -> dict[str, str]:
    """Fill in the rows' times and memory; why workers ended, of those that did."""
    parts: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
    cpu: dict[str, list[float]] = {name: [] for name in workers}
    failures: dict[str, str] = {}
    for turn in range(warmup + rounds + 1):
        for name, worker in workers.items():
            if name in failures:
                continue
            try:
                if turn == warmup + rounds:
                    rows[name].peak_mib = worker.peak_mib()
                    continue
                answer = worker.turn()
            except WorkerError as error:
                failures[name] = str(error)
                continue
            if turn >= warmup:
                rows[name].times_ms.append(answer["ms"])
                cpu[name].append(answer["cpu_ms"])
                parts[name].append(stages.with_rest(answer["stages"], answer["ms"]) if answer["stages"] else {})
    for name in workers.keys() - failures.keys():
        rows[name].median_ms = statistics.median(rows[name].times_ms)
        rows[name].cpu_ms = statistics.median(cpu[name])
        rows[name].stages = {each: statistics.median(part[each] for part in parts[name]) for each in parts[name][0]}
    return failures


def _machine(threads: int) -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    machine = {
        "processor": next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown"),
        "cores": usable_cores(),
        "threads": threads,
        "device": paddle.get_device(),
        "cinn": "yes" if backends.missing_for_cinn() is None else "no",
        "python": platform.python_version(),
        "paddle": paddle.__version__,
    }
    return machine | {name: metadata.version(name) for name in engines.installed() if name != "paddle"}


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables of a benchmark; write figures and chart where asked."""
    parser = argparse.ArgumentParser(prog="fast-diffusers bench infer", description=__doc__.partition(":")[0] + ".")
    add = parser.add_argument
    add("--preset", default="digits", help="digits, sana_digits, flux-block, or a pipeline folder (%(default)s)")
    add("--rounds", type=int, default=20, help="measured turns of each backend (default: %(default)s)")
    add("--warmup", type=int, default=3, help="turns before them, beside the first call (default: %(default)s)")
    add("--only", nargs="+", metavar="NAME", help="backends, or beginnings of their names, to run beside eager")
    add("--threads", type=int, help="of every backend (default: OMP_NUM_THREADS, or all cores)")
    add("--forward", action="store_true", help="one forward of the transformer, not the whole call; as for flux-block")
    add("--alone", action="store_true", help="one backend after another, so that one at a time is in memory")
    add("--steps", type=int, help="of the pipeline's call (default: 4 for a shipped model, 1 for a folder)")
    add("--height", type=int, help="in pixels (default: the model's)")
    add("--width", type=int, help="in pixels (default: the model's)")
    add("--torch", metavar="PYTHON", help="interpreter with PyTorch and diffusers, whose FLUX then runs too")
    add("--json", type=Path, metavar="FILE", help="write the figures here")
    add("--plot", type=Path, metavar="FILE.png", help="draw the medians here")
    arguments = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through the blocks that remove files and end workers
    asked = {"num_inference_steps": arguments.steps, "height": arguments.height, "width": arguments.width}
    report = benchmark(
        arguments.preset,
        arguments.rounds,
        arguments.warmup,
        arguments.only,
        arguments.threads,
        arguments.torch,
        {name: value for name, value in asked.items() if value is not None},
        arguments.forward,
        arguments.alone,
    )
    for path, write in [
        (arguments.json, lambda path: path.write_text(report.as_json())),
        (arguments.plot, report.plot),
    ]:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path)
    print(report.as_text())
