"""Pipelines by name or path: those that ship with the project, or a folder."""

import os
from pathlib import Path
from typing import Any

from fast_diffusers.errors import UserError
from fast_diffusers.pipelines.base import Pipeline

_ASSETS = Path(__file__).parents[1] / "assets"
SHIPPED = {"digits": _ASSETS / "flux_digits", "sana_digits": _ASSETS / "sana_digits"}
"""Name to folder of the pipelines in the package."""


def pipeline_folder(name_or_path: str | Path) -> Path:
    """The folder of a shipped pipeline (see `SHIPPED`), or the folder given. UserError if it is neither."""
    folder = SHIPPED.get(str(name_or_path), Path(name_or_path))
    if not os.path.isdir(folder):  # unlike Path.is_dir false, not an error, for a name that is too long
        raise UserError(f"model {name_or_path} is neither a pipeline folder nor one of: {', '.join(SHIPPED)}")
    return folder


def open_pipeline(name_or_path: str | Path, paddle_dtype: str | None = None, **components: Any) -> Pipeline:
    """Open a shipped pipeline or a pipeline folder; see `Pipeline.from_pretrained`."""
    return Pipeline.from_pretrained(pipeline_folder(name_or_path), paddle_dtype, **components)
