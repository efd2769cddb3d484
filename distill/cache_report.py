"""What `bench_cache` has measured, as a table and as a plot of time against quality."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

COLUMNS = {
    "relative_time": ("time", "{:.3f}"),
    "speedup": ("speed-up", "{:.2f}"),
    "compute_fraction": ("computed", "{:.0%}"),
    "psnr": ("PSNR dB", "{:.2f}"),
    "lpips": ("LPIPS", "{:.4f}"),
    "frechet_same_noise": ("FD to no cache", "{:.3f}"),
    "frechet_real": ("FD to real", "{:.3f}"),
    "accuracy": ("accuracy", "{:.1%}"),
}
"""Metric to its heading and format, in order."""


def frontier(
    rows: Sequence[Mapping[str, Any]], metric: str = "psnr", best: Callable[[float, float], float] = max
) -> list[bool]:
    """Whether each row is Pareto-optimal in `speedup` and `metric`, of which `best` of two values is the better: no
    other row is at least as good in both and better in one. Rows without the metric (the baseline) are not on it."""

    def beaten(row: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
        (my_speed, mine), (its_speed, its) = ((each["speedup"], each[metric]) for each in (row, other))
        at_least_as_good = its_speed >= my_speed and best(its, mine) == its
        return at_least_as_good and (its_speed, its) != (my_speed, mine)

    judged = [row for row in rows if metric in row]
    return [metric in row and not any(beaten(row, other) for other in judged) for row in rows]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Plain text with aligned columns; a star on rows with `pareto`, "-" where a metric does not apply."""
    shown = [name for name in COLUMNS if any(name in row for row in rows)]
    lines = [["", *(COLUMNS[name][0] for name in shown)]]
    for row in rows:
        cells = (COLUMNS[name][1].format(row[name]) if name in row else "-" for name in shown)
        lines.append([f"{'*' if row.get('pareto') else ' '} {row['name']}", *cells])
    widths = [max(len(line[i]) for line in lines) for i in range(len(shown) + 1)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    )


def plot(rows: Sequence[Mapping[str, Any]], png: str | Path) -> None:
    """Speed-up against PSNR and against the Fréchet distance to the images without a cache, each with its frontier."""
    from matplotlib.figure import Figure

    measured = [row for row in rows if "psnr" in row]
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    panels = {
        "psnr": ("PSNR against no cache, dB", max),
        "frechet_same_noise": ("Fréchet distance to no cache", min),
    }
    for axes, (metric, (label, better)) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for number, method in enumerate(dict.fromkeys(row["method"] for row in measured)):
            points = sorted((row["speedup"], row[metric]) for row in measured if row["method"] == method)
            x, y = zip(*points, strict=True)
            axes.plot(x, y, "os^"[number // 10 % 3], color=f"C{number % 10}", label=method, markersize=5)
        kept = zip(measured, frontier(measured, metric, better), strict=True)
        best = sorted((row["speedup"], row[metric]) for row, optimal in kept if optimal)
        if best:
            axes.plot(*zip(*best, strict=True), color="black", linewidth=0.8, zorder=0, label="frontier")
        axes.set(xlabel="speed-up", ylabel=label)
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.savefig(png, dpi=120)
