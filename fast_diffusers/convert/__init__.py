"""Files of diffusers' layout to Paddle's and back: pipelines, single models and LoRA; `fast-diffusers convert`.

The result is what loading and saving would give, through the same code, but nothing is loaded: tensors go from file to
file one by one, in the types they have. What was written is read back and compared before it gets its name.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from fast_diffusers.convert.adapter import convert_lora
from fast_diffusers.convert.model import CONFIG, convert_model
from fast_diffusers.convert.parts import staging
from fast_diffusers.convert.pipeline import convert_pipeline
from fast_diffusers.convert.report import Part, Report
from fast_diffusers.errors import UserError
from fast_diffusers.lora.files import FILE_NAMES
from fast_diffusers.lora.layers import check_alpha
from fast_diffusers.models.checkpoint_io import parse_size
from fast_diffusers.pipelines.components import INDEX, LAYOUTS

__all__ = ["Part", "Report", "convert"]


def convert(
    source: str | os.PathLike,
    target: str | os.PathLike,
    layout: str,
    *,
    max_shard_size: int | str = "10GB",
    without: Collection[str] = (),
    model: str | os.PathLike | None = None,
    alpha: float | None = None,
) -> Report:
    """Write `source` to `target`, a new name, in a layout.

    Args:
        source: a folder with model_index.json or config.json, a LoRA file, or a folder with one.
        target: a folder, for a LoRA also a .safetensors file. It appears when all of it is written and verified.
        layout: "paddle" or "diffusers".
        max_shard_size: bytes or a text such as "10GB"; larger weights are split.
        without: components of a pipeline to leave out.
        model: folder of the model or pipeline that a LoRA is for, whose config.json gives the layers' names and shapes.
        alpha: alpha of a LoRA, in place of what the file says.

    Raises:
        UserError, FileNotFoundError: what is wrong with the arguments or the files.
        OSError: what was written is not what should have been.
    """
    source, target = Path(source), Path(target)
    if layout not in LAYOUTS:
        raise UserError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    parse_size(max_shard_size)
    if alpha is not None:
        check_alpha(alpha)
    kind = _kind(source)
    if kind != "pipeline" and without:
        raise UserError(f"{source} is no pipeline that {', '.join(without)} could be left out of")
    if kind != "lora" and (model is not None or alpha is not None):
        raise UserError(f"{source} is no LoRA; a model to read its names by, or an alpha, are for one")
    if kind == "lora":
        return convert_lora(source, target, layout, model, alpha)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists already: give a new name, or remove it first")
    with staging(target) as stage:
        if kind == "model":
            report = Report(
                kind, str(source), str(target), layout, (convert_model(source, stage, layout, max_shard_size),)
            )
        else:
            parts, rest = convert_pipeline(source, stage, layout, max_shard_size, without)
            report = Report(kind, str(source), str(target), layout, parts, rest)
        stage.replace(target)
    return report


def _kind(source: Path) -> str:
    if (source / INDEX).is_file():
        return "pipeline"
    if (source / CONFIG).is_file():
        return "model"
    if source.is_file() or any((source / name).is_file() for name in FILE_NAMES.values()):
        return "lora"
    if source.is_dir():
        raise UserError(f"{source} has neither a pipeline's {INDEX}, a model's {CONFIG} nor a LoRA file")
    raise FileNotFoundError(f"{source} does not exist; give a local file or folder, nothing is downloaded")
