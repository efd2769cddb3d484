"""Paddle's static graphs as ONNX files, by paddle2onnx."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from cinn_infer import onnx_mend, onnx_weights
from fast_diffusers.errors import UserError

LARGEST = 2**31 - 2**26
"""Bytes of weights that paddle2onnx can write, beside a graph: beyond protobuf's 2 GiB it leaves an empty file.

Files of larger models refer to the weights in Paddle's own file, which must stay beside them.
"""

_CHILD = """
import sys
import paddle2onnx
for i in range(1, len(sys.argv), 3):
    graph, weights, target = sys.argv[i : i + 3]
    # an optimize_tool other than "None" installs packages; its checker wants weights
    options = dict(opset_version=17, optimize_tool="None", enable_onnx_checker=bool(weights))
    paddle2onnx.export(graph, weights, target, **options)
"""


class Job(NamedTuple):
    """A Paddle graph with its weights, and the file to write."""

    graph: Path
    weights: Path
    target: Path

    @property
    def readable(self) -> Path:
        """Where the graph lies for paddle2onnx while it runs."""
        return self.graph.with_suffix(".paddle2onnx.json")

    @property
    def is_large(self) -> bool:
        """Whether the weights stay where they are."""
        return self.weights.stat().st_size > LARGEST


def missing() -> list[str]:
    """Packages that writing ONNX files needs and that are not installed."""
    return [package for package in ("onnx", "paddle2onnx") if find_spec(package) is None]


def require() -> None:
    """UserError unless ONNX files can be written here."""
    if packages := missing():
        raise UserError(
            f"format='onnx' needs {' and '.join(packages)}, not installed here: pip install \"fast-diffusers[export]\""
        )


def write(jobs: Sequence[Job]) -> dict[Path, str]:
    """Write ONNX files that pass the onnx package's checker.

    paddle2onnx ends its process at an operator that it does not know, so it has one of its own; where that ends, the
    next begins with the job after.

    Returns:
        Why there is none, by the target of each job that failed.
    """
    failed: dict[Path, str] = {}
    left = list(jobs)
    while left:
        for job in left:
            job.readable.write_text(onnx_mend.readable(job.graph), encoding="utf-8")
        parts = [(job.readable, "" if job.is_large else job.weights, job.target) for job in left]
        arguments = [str(part) for each in parts for part in each]
        child = subprocess.run([sys.executable, "-c", _CHILD, *arguments], capture_output=True, text=True)
        for job in left:
            job.readable.unlink()
        done = [job for job in left if job.target.is_file()]
        left = left[len(done) :]
        for job in done:
            if reason := _finish(job):
                failed[job.target] = reason
        if left:
            failed[left.pop(0).target] = _reason(child.stdout + child.stderr)
    for target in failed:
        target.unlink(missing_ok=True)
    return failed


def _finish(job: Job) -> str | None:
    """Mend and check a file; what is wrong with it."""
    import onnx

    try:
        if job.is_large:
            onnx_weights.attach(job.target, job.graph, job.weights)
        onnx_mend.mend(job.target, job.graph)
        onnx.checker.check_model(str(job.target), full_check=True)
    except Exception as error:  # the checker's and protobuf's own classes
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return None


def _reason(log: str) -> str:
    """What paddle2onnx said before it ended."""
    said = [line.split("]", 2)[-1].strip() for line in log.splitlines() if line.startswith("[ERROR][Paddle2ONNX]")]
    said = [line for line in dict.fromkeys(said) if line != "There are unsupported features."]
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return "paddle2onnx: " + ("; ".join(said) or (lines[-1] if lines else "it ended without a message"))
