"""What a run leaves to look at: metrics as JSON lines (and for VisualDL), a progress bar, sample grids, loss plots."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from paddle import Tensor
from PIL import Image
from tqdm import tqdm

_NOT_PLOTTED = ("_lr", "_grad_norm", "step", "_per_second", "data_wait_fraction", "skipped")


class MetricsLog:
    """Appends one JSON object a line to a file; use as a context manager.

    Args:
        path: the file; its folder is created.
        start: steps done by the checkpoint that the run continues from, 0 for a new run. Later lines, and what a kill
            left of a half-written one, are removed, so that the file reads as one uninterrupted run.
        visualdl: also write to the folder `visualdl` beside the file.
        enabled: False on the processes that do not log: nothing is touched.
    """

    def __init__(self, path: str | Path, start: int = 0, *, visualdl: bool = False, enabled: bool = True) -> None:
        self.path = Path(path)
        self._file = self._board = None
        if not enabled:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_metrics(self.path) if line["step"] <= start]
        shortened = self.path.with_suffix(".tmp")
        shortened.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        shortened.replace(self.path)
        self._file = self.path.open("a", encoding="utf-8")
        if visualdl:
            from visualdl import LogWriter

            self._board = LogWriter(str(self.path.parent / "visualdl"))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log values after `step` steps. Non-finite ones become null, which JSON has and NaN is not."""
        if self._file is None:
            return
        plain = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **plain}) + "\n")
        self._file.flush()
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close."""
        for stream in (self._file, self._board):
            if stream:
                stream.close()
        self._file = self._board = None

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics file up to the first damaged one; none if there is no file."""
    path, lines = Path(path), []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            values = json.loads(line)
        except ValueError:
            break
        if not isinstance(values, dict) or not isinstance(values.get("step"), int):
            break
        lines.append(values)
    return lines


def progress(total: int, done: int = 0, *, enabled: bool = True) -> tqdm:
    """A progress bar over steps, on a terminal only."""
    return tqdm(total=total, initial=done, unit="step", dynamic_ncols=True, disable=None if enabled else True)


def image_grid(
    images: Tensor | np.ndarray, columns: int | None = None, upscale: int = 1, margin: int = 2
) -> Image.Image:
    """Arrange images on white, row by row.

    Args:
        images: [B, C, H, W] in [-1, 1], C = 1 or 3; values beyond are clipped, NaN is black.
        columns: images a row; about square if None.
        upscale: each pixel becomes a square of this many.
        margin: pixels between images.
    """
    pixels = np.asarray(images.astype("float32").numpy() if isinstance(images, Tensor) else images, np.float32)
    if pixels.ndim != 4 or len(pixels) == 0 or pixels.shape[1] not in (1, 3):
        raise ValueError(f"a grid takes images [B, 1 or 3, H, W], not {list(pixels.shape)}")
    pixels = np.nan_to_num(pixels, nan=-1.0).clip(-1, 1)
    pixels = np.rint((pixels + 1) * 127.5).astype(np.uint8).repeat(upscale, axis=2).repeat(upscale, axis=3)
    batch, channels, height, width = pixels.shape
    columns = columns or math.ceil(math.sqrt(batch))
    rows = math.ceil(batch / columns)
    shape = [rows * (height + margin) + margin, columns * (width + margin) + margin, channels]
    sheet = np.full(shape, 255, np.uint8)
    for i, image in enumerate(pixels.transpose(0, 2, 3, 1)):
        top, left = (margin + n * (size + margin) for n, size in zip(divmod(i, columns), (height, width), strict=True))
        sheet[top : top + height, left : left + width] = image
    return Image.fromarray(sheet.squeeze(-1) if channels == 1 else sheet)


def save_grid(
    images: Tensor | np.ndarray, path: str | Path, columns: int | None = None, upscale: int | None = None
) -> Path:
    """Write `image_grid` to a file. By default small images are enlarged, to at least 64 pixels an edge."""
    upscale = upscale or math.ceil(64 / min(images.shape[-2:]))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    image_grid(images, columns, upscale).save(path)
    return path


def plot_losses(metrics: str | Path, png: str | Path, names: Sequence[str] | None = None) -> Path:
    """Plot metrics over steps, one panel each: the values, and their running mean over a twentieth of the run.

    Args:
        metrics: file of a `MetricsLog`.
        png: file to write.
        names: which metrics; if None, all but learning rates, gradient norms and counters.
    """
    from matplotlib.figure import Figure

    lines = read_metrics(metrics)
    names = names or sorted({name for line in lines for name in line if not name.endswith(_NOT_PLOTTED)})
    if not names:
        raise ValueError(f"{metrics} has no losses to plot")
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(4.5 * columns, 3.2 * rows), layout="constrained")
    for axes, name in zip(figure.subplots(rows, columns, squeeze=False).flat, names, strict=False):
        points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
        steps, values = np.array(points, np.float64).reshape(-1, 2).T
        axes.plot(steps, values, color="tab:blue", alpha=0.3, linewidth=0.8)
        window = max(1, len(values) // 20)
        mean = np.convolve(values, np.full(window, 1 / window), "valid") if len(values) else values
        axes.plot(steps[len(steps) - len(mean) :], mean, color="tab:blue", linewidth=1.5)
        axes.set(title=name, xlabel="step")
        axes.grid(alpha=0.3)
    figure.savefig(png, dpi=120)
    return Path(png)
