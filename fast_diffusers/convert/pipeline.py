"""A pipeline's folder from one layout to the other: models are converted, the rest is copied."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path

from fast_diffusers import target_time
from fast_diffusers.convert.model import CONFIG, convert_model, model_class, text_encoder_of
from fast_diffusers.convert.parts import copy_file
from fast_diffusers.convert.report import Part
from fast_diffusers.errors import UserError
from fast_diffusers.models.base import PretrainedModel
from fast_diffusers.models.checkpoint_io import read_json
from fast_diffusers.pipelines.components import CLASSES, INDEX, PYTORCH_NAMES, read_index, write_index
from fast_diffusers.text_encoders.base import TextEncoder

PYTORCH_LIBRARIES = ("diffusers", "transformers")
WEIGHT_ENDINGS = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth", ".ckpt", ".pdparams", ".msgpack")


def convert_pipeline(
    source: Path, target: Path, layout: str, max_shard_size: int | str, without: Collection[str]
) -> tuple[tuple[Part, ...], tuple[str, ...]]:
    """The parts of a pipeline, written to `target`, and the files at its top that were not copied."""
    index = read_index(source)
    components = {name: entry for name, entry in index.items() if _is_component(entry)}
    if outside := [name for name in components if Path(name).name != name]:
        raise UserError(f"{source / INDEX} names a component {outside[0]!r}, which is no folder of the pipeline")
    present = {name: entry for name, entry in components.items() if entry[1] is not None}
    if unknown := [name for name in without if name not in present]:
        raise UserError(f"{source} has no component {', '.join(unknown)}; it has {', '.join(present)}")
    kept = {name: entry for name, entry in present.items() if name not in without}
    classes = {name: _component_class(source, name, entry, layout) for name, entry in kept.items()}
    entries = {name: entry for name, entry in index.items() if not name.startswith("_") and name not in components}
    entries |= {name: [None, None] for name in components.keys() - kept.keys()}
    parts = [Part(name, present[name][1], "left out") for name in without]
    for name, entry in kept.items():
        entries[name] = _index_entry(classes[name], entry, layout)
        if classes[name] is None:
            parts.append(_copy(source / name, target / name, entry[1]))
        else:
            parts.append(convert_model(source / name, target / name, layout, max_shard_size, classes[name]))
    left_out = []
    for path in sorted(path for path in source.iterdir() if path.name != INDEX and path.name not in components):
        if path.is_file() and (path.name == target_time.WEIGHTS or not path.name.endswith(WEIGHT_ENDINGS)):
            copy_file(path, target / path.name)
        else:
            left_out.append(path.name)
    write_index(target, index["_class_name"], entries)
    return tuple(parts), tuple(left_out)


def _is_component(entry: object) -> bool:
    return isinstance(entry, list) and len(entry) == 2 and all(isinstance(x, str | None) for x in entry)


def _component_class(source: Path, name: str, entry: list[str], layout: str) -> type[PretrainedModel] | None:
    """The class of a component that is a model, None for one that is copied; UserError if it can be neither."""
    folder = source / name
    if not folder.is_dir():
        raise FileNotFoundError(f"{source} has no folder {name!r} ({entry[1]}); --without {name} leaves it out")
    cls = model_class(entry[1])
    if cls is None and (folder / CONFIG).is_file():
        cls = text_encoder_of(read_json(folder / CONFIG))
    if cls is None and (weights := [path.name for path in folder.iterdir() if path.name.endswith(WEIGHT_ENDINGS)]):
        raise UserError(
            f"{folder} holds weights ({weights[0]}) of a {entry[1]}, which there is no model for here; "
            f"--without {name} leaves it out"
        )
    _index_entry(cls, entry, layout)
    return cls


def _index_entry(cls: type[PretrainedModel] | None, entry: list[str], layout: str) -> list[str]:
    """What model_index.json is to say of a component: the classes of copied ones stay where they can."""
    if layout == "paddle":
        return entry if cls is None else list(CLASSES.get(cls.__name__, (cls.__module__, cls.__name__)))
    if cls is None and entry[0] in PYTORCH_LIBRARIES:
        return entry
    name = CLASSES.get(entry[1], (None, entry[1]))[1] if cls is None else cls.__name__
    if name in PYTORCH_NAMES:
        return list(PYTORCH_NAMES[name])
    if cls is None:
        raise UserError(
            f"PyTorch diffusers has no {entry[1]}: put another in its place, or convert to the paddle layout"
        )
    return ["transformers" if issubclass(cls, TextEncoder) else "diffusers", name]


def _copy(source: Path, target: Path, class_name: str) -> Part:
    """Copy a component that has no weights: a scheduler, a tokenizer, an image processor."""
    shutil.copytree(source, target, copy_function=copy_file)
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    return Part(source.name, class_name, "copied", num_bytes=size)
