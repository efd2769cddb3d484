"""The graphs of an export, opened in runtimes and compared with the model."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from cinn_infer import check, engines
from cinn_infer.manifest import CHECK_FILE, GraphEntry, Manifest
from fast_diffusers.errors import UserError


class Graphs:
    """The graphs of an export in the runtimes that run them; each is opened when it is first run.

    The transformer runs in `runtime` and `precision`, other models in `runtime` and fp32. A graph that has no file for
    the runtime runs in Paddle Inference, in fp32.

    Attributes:
        runtime, precision, threads, cinn: how they run.
        seconds: time spent in each graph so far, by "component.method".
    """

    def __init__(
        self,
        manifest: Manifest,
        directory: Path,
        runtime: str = "paddle",
        precision: str = "fp32",
        threads: int | None = None,
        cinn: bool = False,
    ):
        self.manifest, self.directory, self.runtime, self.precision = manifest, directory, runtime, precision
        self.cinn = cinn
        self.threads = engines.default_threads() if threads is None else threads
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.runs: defaultdict[str, int] = defaultdict(int)
        self._engines: dict[int, engines.Engine] = {}

    def plan(self, graph: GraphEntry) -> tuple[str, str]:
        """(runtime, precision) of a graph."""
        if engines.FORMAT[self.runtime] not in graph.files:
            return "paddle", "fp32"
        return self.runtime, self.precision if graph.model == "transformer" else "fp32"

    def engine(self, graph: GraphEntry) -> engines.Engine:
        """What runs a graph."""
        index = self.manifest.graphs.index(graph)
        if index not in self._engines:
            runtime, precision = self.plan(graph)
            files = [self.directory / name for name in graph.files[engines.FORMAT[runtime]]]
            model = self.manifest.models[graph.model]
            siblings = sum(each.model == graph.model for each in self.manifest.graphs)
            self._engines[index] = engines.open_engine(
                runtime, files, graph.graph_names, precision, self.threads, model, self.cinn, siblings
            )
        return self._engines[index]

    def run(self, graph: GraphEntry, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Outputs of a graph."""
        engine = self.engine(graph)
        started = time.perf_counter()
        outputs = engine.run(inputs)
        self.seconds[graph.title] += time.perf_counter() - started
        self.runs[graph.title] += 1
        return outputs

    def self_check(self) -> float:
        """The largest error against the eager outputs, each in the measure of its graph's precision.

        Raises:
            UserError: an error is more than is allowed, or a graph does not run.
        """
        return max(self.check(*case) for case in self.cases())

    def check(self, graph: GraphEntry, inputs: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> float:
        """The same for one graph."""
        runtime, precision = self.plan(graph)
        title, limit = engines.TITLES[runtime], self.limit(precision)
        try:
            outputs = self.engine(graph).run(inputs)
        except UserError:
            raise
        except Exception as error:  # the runtimes raise classes of their own
            raise UserError(f"{graph.title} does not run in {title}: {engines.last_line(error)}") from error
        if len(outputs) != len(expected):
            raise UserError(
                f"{graph.title} of {self.directory} gives {len(outputs)} outputs in {title}, the model gives "
                f"{len(expected)}: export again"
            )
        errors = [check.error(*pair, precision) for pair in zip(outputs, expected, strict=True)]
        if not all(error <= limit for error in errors):  # NaN is not
            raise UserError(
                f"{graph.title} of {self.directory} differs by {max(errors):.1e} from the eager output in {title}, "
                f"{precision}, more than {limit:g}: do not use it; export again with the versions that are installed, "
                "or load it in another runtime or precision"
            )
        return max(errors)

    def limit(self, precision: str) -> float:
        """The largest error that the self-check allows, in the measure of `check.error`."""
        return self.manifest.tolerance if precision == "fp32" else check.TOLERANCES[precision]

    def cases(self) -> list[tuple[GraphEntry, list[np.ndarray], list[np.ndarray]]]:
        """(graph, inputs, eager outputs) of the self-check."""
        arrays = load_file(self.directory / CHECK_FILE)
        return [
            (graph, *(_numbered(arrays, f"{index}.{kind}.") for kind in ("input", "output")))
            for index, graph in enumerate(self.manifest.graphs)
        ]

    def report(self) -> dict[str, Any]:
        """What ran where, how often and how long, for JSON."""
        graphs = [
            {"graph": graph.title, **dict(zip(("runtime", "precision"), self.plan(graph), strict=True))}
            for graph in self.manifest.graphs
        ]
        return {
            "runtime": self.runtime,
            "precision": self.precision,
            "threads": self.threads,
            "cinn": self.cinn,
            "graphs": graphs,
            "seconds": dict(self.seconds),
            "runs": dict(self.runs),
        }


def require(manifest: Manifest, directory: Path, runtime: str, precision: str) -> None:
    """UserError unless the runtime can run the transformer of an export in this precision."""
    engines.require(runtime, precision, manifest.models["transformer"])
    for graph in manifest.graphs:
        if graph.model == "transformer" and engines.FORMAT[runtime] not in graph.files:
            reason = graph.lacking.get(engines.FORMAT[runtime], "it was exported without")
            raise UserError(
                f"{directory} has no ONNX file of its transformer, which {engines.TITLES[runtime]} needs ({reason}): "
                "export with format='onnx', or load with runtime='paddle'"
            )


def _numbered(arrays: Mapping[str, np.ndarray], prefix: str) -> list[np.ndarray]:
    count = sum(name.startswith(prefix) for name in arrays)
    return [arrays[f"{prefix}{i}"] for i in range(count)]
