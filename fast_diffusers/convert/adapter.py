"""A LoRA file from one layout to the other."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path

from fast_diffusers import target_time
from fast_diffusers.convert.model import empty_model
from fast_diffusers.convert.parts import copy_file, origins_of, renamed, staging
from fast_diffusers.convert.report import Part, Report
from fast_diffusers.errors import UserError
from fast_diffusers.lora import files as lora_files
from fast_diffusers.lora.layers import linear_layers
from fast_diffusers.models.checkpoint_io import StoredTensor, read_header, verify
from fast_diffusers.pipelines.components import INDEX

LORA_PREFIXES = ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3")


def convert_lora(
    source: Path, target: Path, layout: str, model: str | os.PathLike | None, alpha: float | None
) -> Report:
    """Convert the adapters of all models in a LoRA file, and the files beside it that it needs."""
    file, header = lora_files.read_header(source)
    tensors = read_header(file)[1]
    result = lora_files.target_file(target, layout)
    companions = (target_time.CONFIG, target_time.WEIGHTS) if target_time.HEADER in header else ()
    copies = {file.parent / name: result.parent / name for name in companions if (file.parent / name).is_file()}
    if existing := [path for path in (result, *copies.values()) if path.exists()]:
        raise UserError(f"{existing[0]} exists already: give a new name, or remove it first")
    adapters = {
        prefix: lora_files.open_file(file, _shapes(model) if prefix == LORA_PREFIXES[0] else None, prefix)
        for prefix in _prefixes(tensors)
    }
    entries, description, parts = {}, {}, []
    for prefix, adapter in adapters.items():
        own_entries, own_description = lora_files.converted(adapter, layout, prefix, alpha)
        parts.append(_lora_part(prefix, adapter, tensors, layout, alpha))
        entries |= own_entries
        description |= own_description
    with staging(result) as stage:
        lora_files.write(stage / result.name, entries, layout, description, header)
        verify(entries, read_header(stage / result.name)[1], result.name)
        for prefix, adapter in adapters.items():
            written = lora_files.open_file(stage / result.name, None, prefix)
            if written.is_torch != (layout == "diffusers") or written.alphas != adapter.all_alphas(alpha):
                raise OSError(f"{result} was not written as it should: its header does not read as it was meant")
        for path, copy in copies.items():
            copy_file(path, stage / copy.name)
        for path in (*copies.values(), result):
            (stage / path.name).replace(path)
    covered = {name for name in tensors if not all(name in adapter.left_out for adapter in adapters.values())}
    return Report("lora", str(file), str(result), layout, tuple(parts), tuple(sorted(tensors.keys() - covered)))


def _prefixes(names: Collection[str]) -> list[str]:
    """The models that the tensors of a LoRA file are for, by their names; the transformer if they have no prefix."""
    return [p for p in LORA_PREFIXES if any(name.startswith(f"{p}.") for name in names)] or [LORA_PREFIXES[0]]


def _shapes(model: str | os.PathLike | None) -> dict[str, tuple[int, int]] | None:
    """Shape [in, out] of each linear layer of the model in a folder, or of the transformer of the pipeline there."""
    if model is None:
        return None
    folder = Path(model)
    if (folder / INDEX).is_file():
        folder = folder / LORA_PREFIXES[0]
    return {path: tuple(layer.weight.shape) for path, layer in linear_layers(empty_model(folder)[1]).items()}


def _lora_part(
    prefix: str,
    adapter: lora_files.AdapterFile,
    tensors: Mapping[str, StoredTensor],
    layout: str,
    alpha: float | None,
) -> Part:
    used = {f"{prefix}.{layer}.lora_{k}.weight": pair[k] for layer, pair in adapter.factors.items() for k in "AB"}
    ranks = sorted({adapter.rank(layer) for layer in adapter.factors})
    alphas = sorted(set(adapter.all_alphas(alpha).values()))
    stored = len(adapter.alphas) == len(adapter.factors)
    origin = "" if stored and alpha is None else " (given)" if alpha is not None else " (not stored: the rank is taken)"
    return Part(
        name=prefix,
        class_name="LoRA",
        action="converted",
        source_layout="diffusers" if adapter.is_torch else "paddle",
        tensors=len(used),
        num_bytes=sum(stored.num_bytes for stored in used.values()),
        transposed=len(used) if adapter.is_torch != (layout == "diffusers") else 0,
        renamed=renamed(origins_of(tensors, used)),
        notes=(f"rank {', '.join(map(str, ranks))}", f"alpha {', '.join(f'{a:g}' for a in alphas)}{origin}"),
    )
