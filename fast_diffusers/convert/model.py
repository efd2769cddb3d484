"""One model from one layout to the other."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import paddle

from fast_diffusers import models, text_encoders
from fast_diffusers.convert.parts import origins_of, renamed
from fast_diffusers.convert.report import Part
from fast_diffusers.errors import UserError
from fast_diffusers.models.base import PretrainedModel
from fast_diffusers.models.checkpoint_io import (
    converted,
    find_checkpoint,
    read_json,
    verify,
    write_checkpoint,
    write_text,
)
from fast_diffusers.pipelines.components import CLASSES
from fast_diffusers.text_encoders.base import TextEncoder

CONFIG = PretrainedModel.config_name


def convert_model(
    source: Path,
    target: Path,
    layout: str,
    max_shard_size: int | str,
    cls: type[PretrainedModel] | None = None,
) -> Part:
    """Convert a model's folder; `cls` is what its pipeline says it is, None for what its config.json says."""
    cls, model = empty_model(source, cls)
    found = find_checkpoint(source, cls.weight_stems)
    checkpoint = cls._adapt_checkpoint(found)
    entries, transposed = converted(model, checkpoint, layout, cls._keys_to_ignore_on_load_unexpected or ())
    write_checkpoint(entries, target, cls.weight_stems[layout], layout, max_shard_size, cls.__name__)
    write_text(target / CONFIG, model.to_json_string(to_diffusers=layout == "diffusers"))
    written = find_checkpoint(target, cls.weight_stems)
    if written.layout != layout:
        raise OSError(f"{target} was written in {layout} layout, but reads as {written.layout}")
    verify(entries, written.tensors, cls.__name__)
    origins = origins_of(found.tensors, {name: checkpoint.tensors[name] for name in entries})
    used = {stored.file.name for stored in found.tensors.values()} | {CONFIG}
    used |= {f"{stem}.safetensors.index.json" for stem in cls.weight_stems.values()}
    return Part(
        name=source.name,
        class_name=cls.__name__,
        action="converted",
        source_layout=found.layout,
        tensors=len(entries),
        num_bytes=sum(entry.num_bytes for entry in entries.values()),
        transposed=len(transposed),
        renamed=renamed(origins),
        left_out=(
            *sorted(found.tensors.keys() - origins.keys()),
            *sorted(path.name for path in source.iterdir() if path.name not in used),
        ),
    )


def empty_model(
    folder: Path, cls: type[PretrainedModel] | None = None
) -> tuple[type[PretrainedModel], PretrainedModel]:
    """The model that a folder's config.json describes, without memory for its weights."""
    config = read_json(folder / CONFIG)
    stated = config.get("_class_name") or next(iter(config.get("architectures") or ()), None)
    cls = cls or model_class(stated) or text_encoder_of(config)
    if cls is None:
        raise UserError(
            f"{folder / CONFIG} describes {stated or 'no class of model'}, which there is no model for here"
        )
    if config.get("_class_name", cls.__name__) != cls.__name__:
        raise UserError(f"{folder} holds a {stated}, not a {cls.__name__}")
    with paddle.LazyGuard():
        return cls, cls.from_config(config)


def model_class(name: str | None) -> type[PretrainedModel] | None:
    """Our class of model for a name in a model_index.json or config.json."""
    if name in CLASSES:
        module, own = CLASSES[name]
        found = getattr(import_module(module), own)
    else:
        found = next((getattr(each, name) for each in (models, text_encoders) if name in each.__all__), None)
    return found if isinstance(found, type) and issubclass(found, PretrainedModel) else None


def text_encoder_of(config: Mapping[str, Any]) -> type[TextEncoder] | None:
    """The text encoder whose type a config.json of transformers states."""
    known = (getattr(text_encoders, name) for name in text_encoders.__all__)
    for cls in known:
        if issubclass(cls, TextEncoder) and config.get("model_type") in getattr(cls, "config_types", [cls.model_type]):
            return cls
    return None
