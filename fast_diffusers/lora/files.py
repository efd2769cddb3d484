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
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle import nn
from safetensors import SafetensorError, safe_open
from safetensors.paddle import save_file

from fast_diffusers.errors import UserError
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

FILE_NAMES = {"paddle": "paddle_lora_weights.safetensors", "diffusers": "pytorch_lora_weights.safetensors"}
FORMATS = {"paddle": "pd", "diffusers": "pt"}  # the header's "format"
METADATA_KEY = "lora_adapter_metadata"

# <layer>.lora_A[.name].weight (peft), <layer>.lora_down.weight (kohya), <layer>_lora.down.weight and
# <layer>.lora_linear_layer.down.weight (early diffusers)
_FACTOR = re.compile(r"(.+?)[._]lora(?:_linear_layer)?[._](A|B|down|up)(?:\.\w+)?\.weight")


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
    metadata = {
        "r": config.rank,
        "lora_alpha": config.alpha,
        "target_modules": list(config.targets),
        # ^ keeps peft from applying a layer's value to layers whose path ends in this one's
        "rank_pattern": {f"^{key}": rank for key, rank in ranks.items() if rank != config.rank},
        "alpha_pattern": {f"^{key}": alpha for key, alpha in alphas.items() if alpha != config.alpha},
    }
    described = json.dumps({f"{prefix}.{key}": value for key, value in metadata.items()}, sort_keys=True)
    tensors = {
        f"{prefix}.{key}": (weight.detach().cpu() if layout == "paddle" else weight.detach().cpu().T).contiguous()
        for key, weight in state.items()
    }
    file = Path(path)
    if file.suffix != ".safetensors":
        file = file / FILE_NAMES[layout]
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, file, metadata={**(header or {}), "format": FORMATS[layout], METADATA_KEY: described})
    return file


def load(
    model: nn.Layer,
    path: str | os.PathLike,
    name: str = "default",
    alpha: float | None = None,
    prefix: str = "transformer",
) -> list[paddle.Tensor]:
    """Adds the adapter in a file (or a directory with a file of a known name) to the model, as its default.

    Reads diffusers', peft's, kohya's (where layers bear the model's own names) and ppdiffusers' names, in either
    layout, in any float dtype. alpha: the alpha of every layer in place of the file's; a file that stores none gets
    alpha = rank without it, and a warning in any case. prefix: tensors named "<prefix>." are taken, the rest of such a
    file (a text encoder's) is left with a warning; a file without the prefix is taken as a whole.

    Returns the new parameters, as `inject`. Raises UserError, before the model is touched, for a file that cannot be
    read or does not fit the model.
    """
    if alpha is not None:
        check_alpha(alpha)
    file = _locate(Path(path))
    tensors, header = _read(file)
    factors, alphas = _parse(model, _own(tensors, prefix, file), file)
    layers = linear_layers(model)
    shapes = {layer: tuple(layers[layer].weight.shape) for layer in factors}
    if _is_torch_layout(factors, shapes, file, header):
        factors = {layer: {k: value.T for k, value in pair.items()} for layer, pair in factors.items()}
    ranks = {layer: pair["A"].shape[1] for layer, pair in factors.items()}
    metadata_alphas, targets = _metadata(header, prefix, ranks, file)
    alphas = metadata_alphas | alphas
    if len(alphas) < len(factors):
        used = "alpha = rank (scale 1)" if alpha is None else f"the given alpha {alpha:g}"
        warnings.warn(f"{file} does not store LoRA alpha: using {used}", stacklevel=2)
    if alpha is not None:
        alphas = dict.fromkeys(factors, float(alpha))
    adapter = {}
    for layer in (key for key in layers if key in factors):  # the model's order
        a, b = (np.ascontiguousarray(factors[layer][k], master_dtype(layers[layer])) for k in "AB")
        adapter[layer] = LayerAdapter(a, b, alphas.get(layer, float(ranks[layer])))
    return add_adapter(model, name, adapter, targets)


def read_header(path: str | os.PathLike) -> tuple[Path, dict[str, str]]:
    """The LoRA file that `load` would read, and the entries of its header. Errors as there."""
    file = _locate(Path(path))
    with _opened(file) as handle:
        return file, handle.metadata() or {}


def _locate(path: Path) -> Path:
    if path.is_dir():
        files = [path / name for name in FILE_NAMES.values() if (path / name).is_file()]
        if not files:
            raise FileNotFoundError(f"no LoRA file in {path}: expected {' or '.join(FILE_NAMES.values())}")
        return files[0]
    if not path.is_file():
        raise FileNotFoundError(f"no LoRA file {path}")
    return path


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """A safetensors file; a UserError where it turns out not to be one."""
    try:
        with safe_open(str(file), framework="paddle", device="cpu") as handle:
            yield handle
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is not a readable safetensors file ({error}): truncated or corrupt?") from error


def _read(file: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The file's tensors (bfloat16 and float16 as float32) and its header."""
    with _opened(file) as handle:
        tensors = {key: handle.get_tensor(key) for key in sorted(handle.keys())}
        header = handle.metadata() or {}
    low = (paddle.bfloat16, paddle.float16)
    return {k: (v.astype("float32") if v.dtype in low else v).numpy() for k, v in tensors.items()}, header


def _own(tensors: Mapping[str, np.ndarray], prefix: str, file: Path) -> dict[str, np.ndarray]:
    """The tensors under the prefix, without it; all of them if none is."""
    own = {key.removeprefix(f"{prefix}."): value for key, value in tensors.items() if key.startswith(f"{prefix}.")}
    if not own:
        return {key.removeprefix("base_model.model."): value for key, value in tensors.items()}
    if rest := [key for key in tensors if not key.startswith(f"{prefix}.")]:
        warnings.warn(f"{file}: left {_some(rest)}, which are not of {prefix!r}", stacklevel=3)
    return own


def _metadata(
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
    model: nn.Layer, tensors: Mapping[str, np.ndarray], file: Path
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, float]]:
    """({layer path: {"A": tensor, "B": tensor}}, {layer path: alpha}), with every tensor accounted for."""
    if not tensors:
        raise UserError(f"{file} holds no tensors")
    paths = linear_layers(model)
    flat = {path.replace(".", "_"): path for path in paths}
    factors: dict[str, dict[str, np.ndarray]] = {}
    alphas, foreign, unknown = {}, [], []
    for key, value in tensors.items():
        match = _FACTOR.fullmatch(key)
        if not match and not (key.endswith(".alpha") and value.size == 1):
            foreign.append(key)
            continue
        layer = (match[1] if match else key.removesuffix(".alpha")).replace(".processor.", ".")
        kohya = re.sub(r"^lora_(unet|transformer)_", "", layer)
        layer = next((path for path in (layer, f"{layer}.0", flat.get(kohya)) if path in paths), None)
        if layer is None:
            unknown.append(key)
        elif match:
            factors.setdefault(layer, {})["A" if match[2] in ("A", "down") else "B"] = value
        else:
            alphas[layer] = float(value.item())
    if foreign:
        raise UserError(f"{file} holds tensors that are not LoRA factors: {_some(foreign)}")
    if unknown:
        raise UserError(f"{file} was made for another model: this one has no linear layers for {_some(unknown)}")
    if single := [layer for layer, pair in factors.items() if len(pair) < 2] + [x for x in alphas if x not in factors]:
        raise UserError(f"{file} lacks one of the two LoRA factors of {_some(single)}")
    return factors, alphas


def _is_torch_layout(
    factors: Mapping[str, Mapping[str, np.ndarray]],
    shapes: Mapping[str, tuple[int, int]],
    file: Path,
    header: Mapping[str, str],
) -> bool:
    """Whether factors are stored transposed: what the header or else the file name says, unless only the other fits."""
    misfits = {
        torch: [
            f"{layer} A {list(pair['A'].shape)} B {list(pair['B'].shape)} in a layer {list(shapes[layer])}"
            for layer, pair in factors.items()
            if not _fits(pair["A"].shape, pair["B"].shape, shapes[layer], torch)
        ]
        for torch in (True, False)
    }
    declared = header.get("format", "pd" if file.name.startswith("paddle") else "pt") != "pd"
    if misfits[declared] and misfits[not declared]:
        raise UserError(f"{file} does not fit this model: {_some(misfits[declared])}")
    return not declared if misfits[declared] else declared


def _fits(a: tuple[int, ...], b: tuple[int, ...], layer: tuple[int, int], torch: bool) -> bool:
    """Whether factors of these shapes, in torch's layout or Paddle's, are an adapter of a layer [in, out]."""
    if torch:
        a, b = a[::-1], b[::-1]
    return len(a) == len(b) == 2 and (a[0], b[1]) == layer and a[1] == b[0]


def _some(names: Iterable[str]) -> str:
    """The first few of the names and how many more there are."""
    names = list(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
