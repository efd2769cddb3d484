"""Metrics of several samplers side by side: as a table, as JSON, as a grid of images."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from distill.data.transforms import normalise
from distill.logs import image_grid
from fast_diffusers.errors import UserError

COLUMNS = {
    "frechet_teacher": ("FD teacher", "{:.3f}"),
    "frechet_same_noise": ("same noise", "{:.3f}"),
    "frechet_real": ("FD real", "{:.3f}"),
    "accuracy": ("accuracy", "{:.1%}"),
    "precision": ("precision", "{:.3f}"),
    "recall": ("recall", "{:.3f}"),
    "diversity": ("diversity", "{:.3f}"),
    "diversity_within": ("in class", "{:.3f}"),
    "clip_score": ("CLIP", "{:.4f}"),
    "ms_per_image": ("ms/image", "{:.2f}"),
}
"""Metric to its heading and format in the table, in order."""


@dataclass(frozen=True)
class Row:
    """One sampler: `role` is "teacher" or "student", `note` says what sets two rows of the same steps apart."""

    role: str
    steps: int
    metrics: Mapping[str, float]
    note: str = ""

    @property
    def name(self) -> str:
        """For example "teacher, 50 steps (reference)"."""
        plural = "" if self.steps == 1 else "s"
        return f"{self.role}, {self.steps} step{plural}" + (f" ({self.note})" if self.note else "")


@dataclass(frozen=True)
class Report:
    """Rows of metrics and the settings they were measured with (plain JSON values)."""

    rows: tuple[Row, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def row(self, role: str, steps: int, note: str = "") -> Row:
        """The row of that sampler; KeyError if there is none."""
        for row in self.rows:
            if (row.role, row.steps, row.note) == (role, steps, note):
                return row
        raise KeyError(f"no row {Row(role, steps, {}, note).name!r}; there are {[row.name for row in self.rows]}")

    def table(self) -> str:
        """Plain text with aligned columns; "-" where a metric does not apply."""
        shown = [name for name in COLUMNS if any(name in row.metrics for row in self.rows)]
        lines = [["", *(COLUMNS[name][0] for name in shown)]]
        for row in self.rows:
            cells = (COLUMNS[name][1].format(row.metrics[name]) if name in row.metrics else "-" for name in shown)
            lines.append([row.name, *cells])
        widths = [max(len(line[i]) for line in lines) for i in range(len(shown) + 1)]
        return "\n".join(
            "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
            for line in lines
        )

    def save(self, path: str | Path) -> None:
        """Write the report as JSON."""
        rows = [
            {"role": row.role, "steps": row.steps, "note": row.note, "metrics": dict(row.metrics)} for row in self.rows
        ]
        text = json.dumps({"settings": dict(self.settings), "rows": rows}, indent=2, allow_nan=False)
        Path(path).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Read what `save` wrote; UserError names a file that is not a report."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(tuple(Row(**row) for row in content["rows"]), content["settings"])
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path} is not a report of distill/evaluate.py: {error}") from error


def comparison_grid(rows: Mapping[str, np.ndarray], smallest: int = 64) -> Image.Image:
    """Images in labelled rows, one column for each noise.

    Args:
        rows: label to images uint8 [K, C, H, W], the same K everywhere.
        smallest: small images are enlarged to at least this many pixels an edge.
    """
    first = next(iter(rows.values()))
    upscale = -(-smallest // min(first.shape[-2:]))
    sheet = image_grid(normalise(np.concatenate(list(rows.values()))), columns=len(first), upscale=upscale)
    font = ImageFont.load_default(size=max(12, upscale * first.shape[-2] // 5))
    margin = int(max(font.getlength(label) for label in rows)) + 16
    canvas = Image.new("RGB", (margin + sheet.width, sheet.height), "white")
    canvas.paste(sheet, (margin, 0))
    draw = ImageDraw.Draw(canvas)
    for index, label in enumerate(rows):
        draw.text((8, (index + 0.5) * sheet.height / len(rows)), label, fill="black", font=font, anchor="lm")
    return canvas
