"""`fast-diffusers export MODEL DIR`: a pipeline, with its LoRA fused, as graphs for `cinn_infer.load`."""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cinn_infer import onnx_files
from cinn_infer.bench_report import table
from cinn_infer.export import FORMATS, GRANULARITIES, export
from cinn_infer.graphs import Graphs
from cinn_infer.manifest import FILE, Manifest
from fast_diffusers.errors import UserError
from fast_diffusers.model_arguments import add_option, add_student_arguments, open_student

logger = logging.getLogger(__name__)


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    made = argparse.ArgumentParser(
        prog="fast-diffusers export",
        description="Write a pipeline as static graphs. Weights stay float32: the precision is chosen at loading.",
        allow_abbrev=False,
    )
    made.add_argument("model", metavar="MODEL", help="pipeline folder, or a shipped one (digits, sana_digits)")
    made.add_argument("directory", metavar="DIR", type=Path, help="folder to write; an earlier export is replaced")
    add_student_arguments(made)
    add_option(made, "formats", help="paddle or paddle,onnx (default: both, if what writes ONNX is installed)")
    for edge in ("height", "width"):
        add_option(made, edge, type=int, action="append", help="in pixels; repeat both for several sizes (the model's)")
    add_option(
        made,
        "granularity",
        choices=GRANULARITIES,
        default="model",
        help="one graph of the transformer, or one of each block, between which caches can act (%(default)s)",
    )
    add_option(made, "prompt", help="one of the longest to come, where the graph depends on its length")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Export and print what was written."""
    arguments = parser().parse_args(argv)
    format = available_format() if arguments.formats is None else _format(arguments.formats)
    prompt = {} if arguments.prompt is None else {"prompt": arguments.prompt}
    calls = [size | prompt for size in _sizes(arguments.height or [], arguments.width or [])]
    started = time.perf_counter()
    logger.info("opening %s", arguments.model)
    pipe = open_student(arguments.model, arguments)
    logger.info("writing and checking the graphs of %d call%s", len(calls), "s" * (len(calls) > 1))
    manifest = export(pipe, arguments.directory, format, calls, granularity=arguments.granularity)
    print(summary(manifest, arguments.directory, time.perf_counter() - started))


def available_format() -> str:
    """ "onnx", which is Paddle's graphs and ONNX files, or "paddle" and a warning where these cannot be written."""
    try:
        onnx_files.require()
    except UserError as error:
        logger.warning("no ONNX files are written: %s", error)
        return "paddle"
    return "onnx"


def _format(text: str) -> str:
    """What `export` is asked for. UserError for an unknown one."""
    formats = [each.strip() for each in text.split(",")]
    if unknown := [each for each in formats if each not in FORMATS]:
        raise UserError(f"--formats takes {' and '.join(FORMATS)}, with commas, got {unknown[0]!r}")
    return "onnx" if "onnx" in formats else "paddle"


def _sizes(heights: Sequence[int], widths: Sequence[int]) -> list[dict[str, Any]]:
    """Arguments of a call for each size."""
    if len(heights) != len(widths):
        raise UserError(f"--height and --width make pairs, got {len(heights)} and {len(widths)} of them")
    return [{"height": height, "width": width} for height, width in zip(heights, widths, strict=True)] or [{}]


def summary(manifest: Manifest, folder: Path, seconds: float) -> str:
    """The graphs with their free axes and sizes, the whole folder's size, and the error of the self-check."""
    rows: list[tuple[Any, ...]] = []
    for graph in manifest.graphs:
        free = dict.fromkeys(axis for axes in graph.axes for axis in axes if isinstance(axis, str))
        size = {name: sum((folder / file).stat().st_size for file in files) for name, files in graph.files.items()}
        rows.append((graph.title, ", ".join(free) or "none", *(_mib(size.get(name)) for name in FORMATS)))
    total = sum(entry["bytes"] for entry in manifest.files.values()) + (folder / FILE).stat().st_size
    error = Graphs(manifest, folder).self_check()
    lacking = {
        f"{graph.title} has no {name} file: {why}" for graph in manifest.graphs for name, why in graph.lacking.items()
    }
    return "\n".join(
        [
            table(("graph", "free axes", *(f"{name} MiB" for name in FORMATS)), rows),
            *sorted(lacking),
            f"{manifest.pipeline} in {folder}: {_mib(total)} MiB in {seconds:.0f} s; largest difference to eager "
            f"outputs {error:.1e}, relative to the largest of them",
        ]
    )


def _mib(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**20:.1f}"
