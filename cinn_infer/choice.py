"""The fastest runtime for an export, measured once on this machine and remembered."""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
import statistics
import time
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

from cinn_infer import engines, program_cache
from cinn_infer.graphs import Graphs, require
from cinn_infer.manifest import FILE, Manifest
from fast_diffusers.compat import usable_cores
from fast_diffusers.errors import UserError
from fast_diffusers.models.checkpoint_io import write_text

ROUNDS = 5
"""Measured runs of each runtime, after one that is not; their median counts."""


def choose(manifest: Manifest, directory: Path, precision: str, threads: int | None) -> Graphs:
    """The checked graphs in the runtime that ran the transformer fastest.

    All that are installed and can run it in this precision are compared, in turns, on the inputs of the self-check; the
    choice is kept in a file of the user's cache folder, under the export's checksum, the processor, the versions of
    the runtimes, threads and precision. A runtime that fails the self-check is left out with a warning.

    Raises:
        UserError: none can.
    """
    candidates, reasons = _candidates(manifest, directory, precision)
    if not candidates:
        raise UserError(f"nothing that is installed can run {directory} in {precision}: {'; '.join(reasons)}")
    threads = engines.default_threads() if threads is None else threads
    key = _key(directory, precision, threads, candidates)
    if len(candidates) > 1 and (known := _recall(key)) in candidates:
        candidates = [known]
    opened, failures = [], []
    for runtime in candidates:
        graphs = Graphs(manifest, directory, runtime, precision, threads)
        try:
            graphs.self_check()
        except UserError as error:
            failures.append(error)
            continue
        opened.append(graphs)
    if not opened:
        raise failures[0]
    for error in failures:
        warnings.warn(f"a runtime is not used: {error}", RuntimeWarning, stacklevel=3)
    if len(opened) == 1:
        return opened[0]
    times = _measure(opened)
    best = min(opened, key=lambda graphs: times[graphs.runtime])
    _remember(key, {"runtime": best.runtime, "milliseconds": times})
    return best


def _candidates(manifest: Manifest, directory: Path, precision: str) -> tuple[list[str], list[str]]:
    """(runtimes that can be tried, why the others cannot)."""
    candidates, reasons = [], []
    for runtime in engines.RUNTIMES:
        try:
            require(manifest, directory, runtime, precision)
            candidates.append(runtime)
        except UserError as error:
            reasons.append(str(error))
    return candidates, reasons


def _measure(opened: list[Graphs]) -> dict[str, float]:
    """Milliseconds of one run of every transformer graph, by runtime."""
    cases = [(graph, inputs) for graph, inputs, _ in opened[0].cases() if graph.model == "transformer"]
    times: dict[str, list[float]] = {graphs.runtime: [] for graphs in opened}
    for turn in range(1 + ROUNDS):
        for graphs in opened:
            started = time.perf_counter()
            for graph, inputs in cases:
                graphs.engine(graph).run(inputs)
            if turn:
                times[graphs.runtime].append(1000 * (time.perf_counter() - started))
    return {runtime: statistics.median(each) for runtime, each in times.items()}


def _file(key: str) -> Path | None:
    """Where a choice is kept; None if the user has switched caches off."""
    programs = program_cache.folder()
    return None if programs is None else programs.parent / "runtimes" / f"{key}.json"


def _key(directory: Path, precision: str, threads: int, candidates: list[str]) -> str:
    packages = ["paddlepaddle", "paddlepaddle-gpu", "onnxruntime", "openvino", "nncf"]
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    facts = [
        hashlib.sha256((directory / FILE).read_bytes()).hexdigest(),
        sorted({line for line in lines if line.startswith(("model name", "flags"))}),
        platform.machine(),
        usable_cores(),
        [_version(package) for package in packages],
        candidates,
        precision,
        threads,
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _recall(key: str) -> str | None:
    """The runtime that was chosen before; None if there is none, or the file cannot be read."""
    path = _file(key)
    try:
        return None if path is None else json.loads(path.read_bytes())["runtime"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _remember(key: str, content: dict[str, Any]) -> None:
    """Write a choice; where that cannot be it is measured again next time."""
    path = _file(key)
    if path is None:
        return
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(content, indent=2) + "\n")
