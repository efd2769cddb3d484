"""LoRA files: diffusers' and peft's pytorch_lora_weights.safetensors, ppdiffusers' paddle_lora_weights.safetensors.

The two differ in the orientation of the factors only: A is [in, rank] in Paddle's layout and [rank, in] in torch's, B
is [rank, out] and [out, rank]. Alpha is stored in the header, as the `lora_adapter_metadata` that diffusers (0.34 and
later) hands to peft: diffusers refuses a file with both that and `.alpha` tensors, and ppdiffusers refuses `.alpha`
tensors. Older diffusers and every ppdiffusers ignore the header and run a file at alpha = rank: pass them alpha / rank
as the scale.
"""

import json
import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import paddle
from paddle import nn

from fast_diffusers.errors import UserError
from fast_diffusers.lora import flux_original
from fast_diffusers.lora.layers import (
    LayerAdapter,
    adapters,
    add_adapter,
    check_alpha,
    linear_layers,
    lora_layers,
    master_dtype,
    state_dict,
)
from fast_diffusers.models.checkpoint_io import FLOAT_TYPES, FORMAT_TAGS, Entry, StoredTensor, write_safetensors
from fast_diffusers.models.checkpoint_io import read_header as read_tensors

Shapes = Mapping[str, tuple[int, int]]
"""Shape [in, out] of the weight of each linear layer, by path."""

FILE_NAMES = {"paddle": "paddle_lora_weights.safetensors", "diffusers": "pytorch_lora_weights.safetensors"}
METADATA_KEY = "lora_adapter_metadata"

# <layer>.lora_A[.name].weight (peft), <layer>.lora_down.weight (kohya), <layer>_lora.down.weight and
# <layer>.lora_linear_layer.down.weight (early diffusers)
_FACTOR = re.compile(r"(.+?)[._]lora(?:_linear_layer)?[._](A|B|down|up)(?:\.\w+)?\.weight")
_WHOLE_MODEL = re.compile(r"^(base_model\.model|diffusion_model)\.")  # before every name, by peft and by ComfyUI
_KOHYA = re.compile(r"^lora_(unet|transformer)_")
_TEXT_ENCODER = re.compile(r"text_encoder(_\d)?\.|lora_te\d?_")


@dataclass(frozen=True)
class AdapterFile:
    """The adapter of one model in a file whose values have not been read.

    `factors` has A and B of each layer, transposed if `is_torch`; `alphas` those of the layers for which the file
    stores one; `left_out` names the tensors that are not of this model.
    """

    file: Path
    header: Mapping[str, str]
    factors: Mapping[str, Mapping[str, StoredTensor]]
    is_torch: bool
    alphas: Mapping[str, float]
    targets: tuple[str, ...]
    left_out: tuple[str, ...]

    def rank(self, layer: str) -> int:
        return self.factors[layer]["A"].shape[0 if self.is_torch else 1]

    def all_alphas(self, given: float | None = None) -> dict[str, float]:
        """Alpha of every layer: the given one, else the file's, else the rank."""
        if given is not None:
            return dict.fromkeys(self.factors, float(given))
        return {layer: self.alphas.get(layer, float(self.rank(layer))) for layer in self.factors}

    def adapter(self, layer: str, alpha: float, dtype: str) -> LayerAdapter:
        """The values in one layer."""
        a, b = (self.factors[layer][k].floats(dtype) for k in "AB")
        return LayerAdapter(*(np.ascontiguousarray(v.T if self.is_torch else v) for v in (a, b)), alpha)


def save(
    model: nn.Layer,
    path: str | os.PathLike,
    name: str = "default",
    layout: str = "paddle",
    prefix: str = "transformer",
    header: Mapping[str, str] | None = None,
) -> Path:
    """Writes an adapter with its alpha.

    path: a .safetensors file, or a directory that gets the file under the name its layout has everywhere. layout:
    "paddle" or "diffusers". prefix: the model's name within its pipeline, put before every tensor's name. header: more
    entries of the file's header (`read_header`), which other programs ignore.
    Returns the file written.
    """
    if layout not in FILE_NAMES:
        raise UserError(f"LoRA layout must be one of {', '.join(FILE_NAMES)}, got {layout!r}")
    state, config = state_dict(model, name), adapters(model)[name]
    layers = {key: layer for key, layer in lora_layers(model) if name in layer.alphas}
    ranks = {key: layer.factors(name)[0].shape[1] for key, layer in layers.items()}
    alphas = {key: layer.alphas[name] for key, layer in layers.items()}
    entries = {f"{prefix}.{key}": Entry.of(weight, layout == "diffusers") for key, weight in state.items()}
    file = target_file(path, layout)
    file.parent.mkdir(parents=True, exist_ok=True)
    write(file, entries, layout, _describe(prefix, ranks, alphas, config.targets), header or {})
    return file


def target_file(path: str | os.PathLike, layout: str) -> Path:
    """The file that a path stands for: itself if it ends in .safetensors, else one of the usual name in that folder."""
    path = Path(path)
    return path if path.suffix == ".safetensors" else path / FILE_NAMES[layout]


def write(
    file: Path,
    entries: Mapping[str, Entry],
    layout: str,
    description: Mapping[str, object],
    header: Mapping[str, str],
) -> None:
    """Write a LoRA file, in full or not at all, with its description and the other entries of its header."""
    own = {"format": FORMAT_TAGS[layout], METADATA_KEY: json.dumps(description, sort_keys=True)}
    temporary = file.with_name(f"{file.name}.tmp")
    try:
        write_safetensors(temporary, entries, own | {key: value for key, value in header.items() if key not in own})
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def load(
    model: nn.Layer,
    path: str | os.PathLike,
    name: str = "default",
    alpha: float | None = None,
    prefix: str = "transformer",
) -> list[paddle.Tensor]:
    """Adds the adapter in a file (or a directory with a file of a known name) to the model, as its default.

    Reads diffusers', peft's, kohya's (layers with the model's own names, or for FLUX its authors') and ppdiffusers'
    names, in either layout, in any float dtype. alpha: the alpha of every layer in place of the file's; a file that
    stores none gets alpha = rank without it, and a warning in any case. prefix: tensors named "<prefix>." are taken,
    the rest of such a file (a text encoder's) is left with a warning; a file without the prefix is taken as a whole.

    Returns the new parameters, as `inject`. Raises UserError, before the model is touched, for a file that cannot be
    read or does not fit the model.
    """
    if alpha is not None:
        check_alpha(alpha)
    layers = linear_layers(model)
    shapes = {key: tuple(layer.weight.shape) for key, layer in layers.items()}
    stored = open_file(path, shapes, prefix)
    if stored.left_out:
        warnings.warn(f"{stored.file}: left {_some(stored.left_out)}, which are not of {prefix!r}", stacklevel=2)
    if len(stored.alphas) < len(stored.factors):
        used = "alpha = rank (scale 1)" if alpha is None else f"the given alpha {alpha:g}"
        warnings.warn(f"{stored.file} does not store LoRA alpha: using {used}", stacklevel=2)
    alphas = stored.all_alphas(alpha)
    adapter = {  # in the model's order
        key: stored.adapter(key, alphas[key], master_dtype(layer)) for key, layer in layers.items() if key in alphas
    }
    return add_adapter(model, name, adapter, stored.targets)


def open_file(path: str | os.PathLike, shapes: Shapes | None, prefix: str = "transformer") -> AdapterFile:
    """What a LoRA file, or the one in a folder, holds for the model that is called `prefix` in a pipeline.

    shapes: the model's linear layers, which every tensor must fit. None: not known. Layers are then called what the
    file calls them, and names in which kohya's dots have become underscores cannot be read.

    Raises:
        FileNotFoundError, UserError: no such file, or it cannot be read or does not fit.
    """
    file = _locate(Path(path))
    header, tensors = read_tensors(file)
    own = _own(tensors, prefix)
    factors, alphas = _parse({short: tensors[name] for name, short in own.items()}, shapes, file)
    torch = _is_torch_layout(factors, shapes, file, header)
    ranks = {layer: pair["A"].shape[0 if torch else 1] for layer, pair in factors.items()}
    described, targets = _described(header, prefix, ranks, file)
    left_out = tuple(name for name in tensors if name not in own)
    return AdapterFile(file, header, factors, torch, described | alphas, targets, left_out)


def converted(
    stored: AdapterFile, layout: str, prefix: str, alpha: float | None = None
) -> tuple[dict[str, Entry], dict[str, object]]:
    """What `save` would write after `load`, but in the types of the file: its tensors and their description."""
    transposed = stored.is_torch != (layout == "diffusers")
    entries = {
        f"{prefix}.{layer}.lora_{k}.weight": Entry.of_stored(pair[k], transposed)
        for layer, pair in stored.factors.items()
        for k in "AB"
    }
    ranks = {layer: stored.rank(layer) for layer in stored.factors}
    return entries, _describe(prefix, ranks, stored.all_alphas(alpha), stored.targets)


def read_header(path: str | os.PathLike) -> tuple[Path, dict[str, str]]:
    """The LoRA file that `load` would read, and the entries of its header. Errors as there."""
    file = _locate(Path(path))
    return file, read_tensors(file)[0]


def _locate(path: Path) -> Path:
    if path.is_dir():
        files = [path / name for name in FILE_NAMES.values() if (path / name).is_file()]
        if not files:
            raise FileNotFoundError(f"no LoRA file in {path}: expected {' or '.join(FILE_NAMES.values())}")
        return files[0]
    if not path.is_file():
        raise FileNotFoundError(f"no LoRA file {path}")
    return path


def _own(names: Collection[str], prefix: str) -> dict[str, str]:
    """The names under the prefix, each with what is left of it; all that are of no text encoder if none is."""
    own = {name: name.removeprefix(f"{prefix}.") for name in names if name.startswith(f"{prefix}.")}
    return own or {name: _WHOLE_MODEL.sub("", name) for name in names if not _TEXT_ENCODER.match(name)}


def _describe(
    prefix: str, ranks: Mapping[str, int], alphas: Mapping[str, float], targets: Sequence[str]
) -> dict[str, object]:
    """peft's configuration of an adapter, as diffusers keeps it in the header."""
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    metadata = {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": list(targets),
        # ^ keeps peft from applying a layer's value to layers whose path ends in this one's
        "rank_pattern": {f"^{key}": value for key, value in ranks.items() if value != rank},
        "alpha_pattern": {f"^{key}": value for key, value in alphas.items() if value != alpha},
    }
    return {f"{prefix}.{key}": value for key, value in metadata.items()}


def _described(
    header: Mapping[str, str], prefix: str, ranks: Mapping[str, int], file: Path
) -> tuple[dict[str, float], tuple[str, ...]]:
    """(alpha per layer, targets) of peft's configuration in the header; ({}, the layers) if it has none."""
    try:
        metadata = json.loads(header.get(METADATA_KEY, "{}"))
        metadata = {key.removeprefix(f"{prefix}."): value for key, value in metadata.items()}
        if metadata.get("use_dora"):
            raise UserError(f"{file} holds a DoRA adapter, which is not supported")
        common, patterns = metadata.get("lora_alpha"), metadata.get("alpha_pattern") or {}
        alphas = {}
        for layer, rank in ranks.items():
            own = (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", layer))  # as peft
            alpha = next(own, common)
            if alpha is not None:  # rslora divides by sqrt(rank) where others divide by rank
                alphas[layer] = float(alpha) * (math.sqrt(rank) if metadata.get("use_rslora") else 1.0)
        targets = metadata.get("target_modules")
        return alphas, tuple(targets if isinstance(targets, list) else ranks)
    except UserError:
        raise
    except (ValueError, TypeError, AttributeError, re.error) as error:
        raise UserError(f"{file}: malformed {METADATA_KEY} in the header ({error})") from error


def _parse(
    tensors: Mapping[str, StoredTensor], shapes: Shapes | None, file: Path
) -> tuple[dict[str, dict[str, StoredTensor]], dict[str, float]]:
    """({layer path: {"A": tensor, "B": tensor}}, {layer path: alpha}), with every tensor accounted for."""
    if not tensors:
        raise UserError(f"{file} holds no tensors")
    pairs: dict[str, dict[str, StoredTensor]] = {}
    scalars, foreign = {}, []
    for key, value in tensors.items():
        match = _FACTOR.fullmatch(key)
        is_alpha = key.endswith(".alpha") and math.prod(value.shape) == 1
        if not (match or is_alpha) or value.dtype not in FLOAT_TYPES:
            foreign.append(key)
        elif match:
            pairs.setdefault(match[1], {})["A" if match[2] in ("A", "down") else "B"] = value
        else:
            scalars[key.removesuffix(".alpha")] = float(value.floats().item())
    if foreign:
        raise UserError(f"{file} holds tensors that are not LoRA factors: {_some(foreign)}")
    flat = {path.replace(".", "_"): path for path in shapes or ()}
    paths = {layer: _paths(layer, shapes, flat) for layer in pairs | scalars}
    if unknown := [layer for layer, found in paths.items() if not found]:
        if shapes is None:
            raise UserError(f"{file} writes paths with underscores ({_some(unknown)}): --model tells them from dots")
        raise UserError(f"{file} was made for another model: this one has no linear layers for {_some(unknown)}")
    if single := [layer for layer in paths if len(pairs.get(layer, ())) < 2]:
        raise UserError(f"{file} lacks one of the two LoRA factors of {_some(single)}")
    factors, alphas = {}, {}
    for layer, pair in pairs.items():
        factors |= flux_original.split(paths[layer], pair)
        alphas |= dict.fromkeys(paths[layer], scalars[layer]) if layer in scalars else {}
    return factors, alphas


def _paths(layer: str, shapes: Shapes | None, flat: Mapping[str, str]) -> tuple[str, ...]:
    """The paths of the layers that a file's name for one means; none if it means none. `flat` is for kohya's names."""
    layer = layer.replace(".processor.", ".")
    kohya = _KOHYA.sub("", layer)
    if shapes is not None:
        path = next((path for path in (layer, f"{layer}.0", flat.get(kohya)) if path in shapes), None)
        original = flux_original.translate(kohya)
        return (path,) if path else original if set(original) <= shapes.keys() else ()
    if original := flux_original.translate(kohya):
        return original if kohya != layer or "." in layer else (layer,)
    # The output projection of attention is a list of one layer, whose index early diffusers left out.
    return () if kohya != layer else (f"{layer}.0" if layer.endswith(".to_out") else layer,)


def _is_torch_layout(
    factors: Mapping[str, Mapping[str, StoredTensor]],
    shapes: Shapes | None,
    file: Path,
    header: Mapping[str, str],
) -> bool:
    """Whether factors are stored transposed: what the header or else the file name says, unless only the other fits."""
    misfits = {
        torch: [
            f"{layer} A {list(pair['A'].shape)} B {list(pair['B'].shape)}"
            + (f" in a layer {list(shapes[layer])}" if shapes else "")
            for layer, pair in factors.items()
            if not _fits(pair["A"].shape, pair["B"].shape, shapes and shapes[layer], torch)
        ]
        for torch in (True, False)
    }
    declared = header.get("format", "pd" if file.name.startswith("paddle") else "pt") != "pd"
    if misfits[declared] and misfits[not declared]:
        raise UserError(f"{file} does not fit {'this model' if shapes else 'any model'}: {_some(misfits[declared])}")
    return not declared if misfits[declared] else declared


def _fits(a: tuple[int, ...], b: tuple[int, ...], layer: tuple[int, int] | None, torch: bool) -> bool:
    """Whether factors of these shapes, in torch's layout or Paddle's, are an adapter of a layer [in, out]."""
    if torch:
        a, b = a[::-1], b[::-1]
    return len(a) == len(b) == 2 and a[1] == b[0] and layer in (None, (a[0], b[1]))


def _some(names: Iterable[str]) -> str:
    """The first few of the names and how many more there are."""
    names = list(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
