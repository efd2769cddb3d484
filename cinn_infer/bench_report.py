"""The figures of a benchmark, as JSON, as tables and as a chart."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np


@dataclass
class Row:
    """One backend.

    Attributes:
        open_ms, first_ms: opening it (an export that is there already, with its self-check), and its first call, which
            traces and compiles.
        max_error, rms_error: against eager's output: the largest difference, relative to the largest entry (at least
            1), and the root mean square of the difference, relative to that of the output.
        times_ms: of its turns, see `bench_loop.TURN_SECONDS`; `median_ms` is their median.
        cpu_ms: median processor time of all threads, which other work on the machine changes little.
        stages: median milliseconds of the parts of the call.
        peak_mib: peak resident memory of its process, with all libraries.
    """

    backend: str
    open_ms: float
    first_ms: float
    max_error: float
    rms_error: float
    times_ms: list[float] = field(default_factory=list)
    median_ms: float = float("nan")
    cpu_ms: float = float("nan")
    stages: dict[str, float] = field(default_factory=dict)
    peak_mib: float = float("nan")


@dataclass
class Report:
    """A benchmark: rows, why others are missing, and what they were measured on."""

    preset: str
    measured: str
    machine: dict[str, Any]
    rows: list[Row]
    failures: dict[str, str]

    @property
    def fastest_first(self) -> list[Row]:
        """The rows in the order of their medians."""
        return sorted(self.rows, key=lambda row: row.median_ms)

    def as_json(self) -> str:
        """For machines."""
        return json.dumps(asdict(self), indent=2) + "\n"

    def as_text(self) -> str:
        """What was measured where, Markdown tables of times and, if there are several, stages, and what is missing."""
        machine = ", ".join(f"{name} {value}" for name, value in self.machine.items())
        parts = [f"{self.preset}: {self.measured}\n{machine}", self._times()]
        if len({name for row in self.rows for name in row.stages}) > 1:
            parts.append(self._stages())
        parts += ["\n".join(f"{name} did not run: {why}" for name, why in self.failures.items())] * bool(self.failures)
        return "\n\n".join(parts)

    def _times(self) -> str:
        eager = next(row.median_ms for row in self.rows if row.backend == "eager")
        header = (
            "backend",
            "median ms",
            "speed-up",
            "CPU ms",
            "first call ms",
            "open ms",
            "peak MiB",
            "max error",
            "rms error",
        )
        rows = [
            (
                row.backend,
                short(row.median_ms),
                f"{eager / row.median_ms:.2f}",
                short(row.cpu_ms),
                f"{row.first_ms:.0f}",
                f"{row.open_ms:.0f}",
                f"{row.peak_mib:.0f}",
                f"{row.max_error:.1e}",
                f"{row.rms_error:.1e}",
            )
            for row in self.fastest_first
        ]
        return table(header, rows)

    def _stages(self) -> str:
        staged = [row for row in self.fastest_first if row.stages]
        names = list(dict.fromkeys(name for row in staged for name in row.stages))
        rows = [(row.backend, *(short(row.stages.get(name, 0.0)) for name in names)) for row in staged]
        return table(("median ms of", *names), rows)

    def plot(self, path: Path) -> None:
        """A bar chart of the medians, with lines from the first to the third quartile."""
        from matplotlib.figure import Figure

        rows = self.fastest_first[::-1]
        medians = np.array([row.median_ms for row in rows])
        quartiles = np.array([np.percentile(row.times_ms, [25, 75]) for row in rows]).T
        figure = Figure(figsize=(8, 1.2 + 0.32 * len(rows)), layout="constrained")
        axes = figure.subplots()
        colors = ["tab:gray" if row.backend.startswith("torch") else "tab:blue" for row in rows]
        spread = np.abs(quartiles - medians)
        bars = axes.barh([row.backend for row in rows], medians, color=colors, xerr=spread, ecolor="black")
        axes.bar_label(bars, [f" {short(median)}" for median in medians], fontsize="small")
        axes.set(xlabel="milliseconds", title=f"{self.preset}: {self.measured}")
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.12)
        figure.savefig(path, dpi=150)


def short(ms: float) -> str:
    """Milliseconds with about three digits."""
    return f"{ms:.2f}" if ms < 10 else f"{ms:.1f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown, the first column to the left and the others to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
