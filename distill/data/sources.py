"""A data source from the `data` section of a recipe."""

import inspect
from collections.abc import Mapping
from typing import Any

from distill.data.folder import image_folder
from distill.data.laion import laion_list
from distill.data.memory import digits, mnist
from distill.data.records import Source, one_of
from distill.data.tables import parquet
from fast_diffusers.errors import UserError

SOURCES = {function.__name__: function for function in (digits, mnist, image_folder, laion_list, parquet)}


def open_source(config: Mapping[str, Any]) -> Source:
    """Open the source named by ``config["kind"]`` with the other entries as its arguments.

    Raises:
        UserError: an unknown kind or key (the nearest one is named), or a missing key.
    """
    if "kind" not in config:
        raise UserError(f"data needs a kind: one of {', '.join(SOURCES)}")
    kind = one_of(config["kind"], SOURCES, "data kind")
    parameters = inspect.signature(SOURCES[kind]).parameters
    settings = {key: value for key, value in config.items() if key != "kind"}
    for key in settings:
        one_of(key, parameters, f"{kind} setting")
    missing = [name for name, p in parameters.items() if p.default is p.empty and name not in settings]
    if missing:
        raise UserError(f"data kind {kind!r} needs {', '.join(missing)}")
    return SOURCES[kind](**settings)
