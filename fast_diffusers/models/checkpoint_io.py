"""Weights on disk: safetensors, sharded or not, in HF diffusers' layout or in Paddle's.

The layouts differ in one thing: diffusers keeps the weight of a linear layer as [out, in], Paddle as [in, out]. Which
weights those are is known from the model's layers, never from shapes. A file tells its layout by its name and by the
`format` tag of its metadata, "pt" or "pd". Tensors stream one by one, so that loading and saving need the memory of the
model and of its largest tensor.
"""

import json
import math
import os
import re
import struct
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import paddle
from paddle import nn
from safetensors import SafetensorError, safe_open

from fast_diffusers.errors import UserError

FORMAT_TAGS = {"paddle": "pd", "diffusers": "pt"}
ADAPTER_NAMES = re.compile(r"\.lora_[AB]\.")
_TYPES = {
    paddle.float64: ("F64", "<f8"),
    paddle.float32: ("F32", "<f4"),
    paddle.float16: ("F16", "<f2"),
    paddle.bfloat16: ("BF16", "<u2"),  # numpy has no bfloat16; Paddle gives and takes its bits as uint16
    paddle.int64: ("I64", "<i8"),
    paddle.int32: ("I32", "<i4"),
    paddle.bool: ("BOOL", "?"),
}
_NUMPY_TYPES = dict(_TYPES.values())
_FLOAT_TYPES = {"F64", "F32", "F16", "BF16"}
_MAX_NAMES = 20


@dataclass(frozen=True)
class StoredTensor:
    """A tensor on disk: its file, its shape in the file's layout, its safetensors type and where its bytes start."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    offset: int

    def read(self) -> np.ndarray:
        """The values, in memory of their own; bfloat16 as raw uint16."""
        count = math.prod(self.shape)
        values = np.fromfile(self.file, _NUMPY_TYPES[self.dtype], count, offset=self.offset)
        if values.size < count:
            raise UserError(f"{self.file} became shorter while it was read")
        return values.reshape(self.shape)


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a model on disk by name; only headers have been read."""

    folder: Path
    layout: str
    tensors: Mapping[str, StoredTensor]


def linear_weights(model: nn.Layer) -> set[str]:
    """Names of the weights that are transposed between the layouts: those of linear layers."""
    return {f"{name}.weight" for name, layer in model.named_sublayers() if isinstance(layer, nn.Linear)}


def find_checkpoint(folder: Path, stems: Mapping[str, str]) -> Checkpoint:
    """Locate the weights in `folder` and read their headers.

    `stems` maps a layout to the name of its files: "<stem>.safetensors" or "<stem>.safetensors.index.json" with shards.
    Where both layouts have the same stem, the files' metadata decides, diffusers' layout if it is silent. Raises
    UserError for no weights, weights in both layouts, an unreadable file, or a metadata tag that contradicts the name.
    """
    found = {}
    for layout, stem in stems.items():
        files = _checkpoint_files(folder, stem)
        if files:
            found.setdefault(tuple(files), []).append(layout)
    if not found:
        names = " or ".join(f"{stem}.safetensors" for stem in dict.fromkeys(stems.values()))
        raise UserError(
            f"no weights in {folder}: expected {names}, or shards with their .safetensors.index.json "
            "(pickled .bin and .pdparams files are not read; save them as safetensors first)"
        )
    if len(found) > 1:
        names = ", ".join(files[0].name for files in found)
        raise UserError(f"{folder} holds weights in several layouts ({names}): keep the one that is meant")
    [(files, layouts)] = found.items()
    tags, tensors = set(), {}
    for file in files:
        tag, entries = _read_header(file)
        tags.add(tag)
        tensors.update(entries)
    return Checkpoint(folder, _layout(folder, layouts, tags), tensors)


def load_into(model: nn.Layer, checkpoint: Checkpoint, ignore: Collection[str] = ()) -> None:
    """Copy a checkpoint into the parameters and buffers of `model`, tensor by tensor, cast to the model's dtypes.

    Names come first: missing, unexpected and misshapen tensors are named in one UserError and the model stays as
    it was. Adapters (".lora_A.", ".lora_B.") and unexpected names that match a pattern in `ignore` do not count.
    """
    targets = _base_state(model)
    transposed = linear_weights(model) if checkpoint.layout == "diffusers" else set()
    _compare(model, checkpoint, targets, transposed, ignore)
    with paddle.no_grad():
        for name, target in targets.items():
            stored = checkpoint.tensors[name]
            values = stored.read()
            if name in transposed:
                values = np.ascontiguousarray(values.T)
            same = stored.dtype == _TYPES[target.dtype][0]
            target.set_value(values if same else paddle.to_tensor(values).astype(target.dtype))


def save_from(
    model: nn.Layer, folder: Path, stem: str, layout: str = "paddle", max_shard_size: int | str = "10GB"
) -> None:
    """Write the parameters and buffers of `model`, without adapters, to "<stem>.safetensors" or shards with an index.

    All files are complete under temporary names before the first gets its final one; files of an earlier save under the
    same stem are then removed.
    """
    if layout not in FORMAT_TAGS:
        raise UserError(f"unknown layout {layout!r}: choose one of {', '.join(FORMAT_TAGS)}")
    state = _base_state(model)
    transposed = linear_weights(model) if layout == "diffusers" else set()
    shards = _split(state, parse_size(max_shard_size))
    count = len(shards)
    names = [
        f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors" if count > 1 else f"{stem}.safetensors" for i in range(count)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    stale = set(_saved_files(folder, stem))
    temporary = [folder / f"{name}.tmp" for name in names]
    try:
        for path, shard in zip(temporary, shards, strict=True):
            _write_safetensors(path, shard, transposed, FORMAT_TAGS[layout])
        for path, name in zip(temporary, names, strict=True):
            path.replace(folder / name)
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)
    written = {folder / name for name in names}
    if count > 1:
        index = folder / f"{stem}.safetensors.index.json"
        write_text(index, json.dumps(_index(shards, names), indent=2) + "\n")
        written.add(index)
    for path in stale - written:
        path.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is there in full or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def read_json(path: Path) -> dict:
    """A JSON object from a file; UserError names the file if it is missing or broken."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object")
    return content


def parse_size(size: int | str) -> int:
    """Bytes of a size such as 1000, "200MB" or "10GB" (decimal units)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)B?", str(size).strip(), flags=re.IGNORECASE)
    value = int(float(match[1]) * {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}[match[2].upper()]) if match else 0
    if value <= 0:
        raise UserError(f"bad size {size!r}: give bytes or a number with KB, MB or GB, such as '10GB'")
    return value


def _base_state(model: nn.Layer) -> dict[str, paddle.Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if not ADAPTER_NAMES.search(name)}


def _checkpoint_files(folder: Path, stem: str) -> list[Path]:
    index = folder / f"{stem}.safetensors.index.json"
    if not index.is_file():
        single = folder / f"{stem}.safetensors"
        return [single] if single.is_file() else []
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(f"{index} has no weight_map from tensor names to files")
    files = [folder / name for name in sorted(set(weight_map.values()))]
    for file in files:
        if file.parent != folder or not file.is_file():
            raise UserError(f"{file}, which {index.name} lists, does not exist: complete the download")
    return files


def _saved_files(folder: Path, stem: str) -> Iterator[Path]:
    pattern = re.compile(re.escape(stem) + r"(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
    return (path for path in folder.iterdir() if pattern.fullmatch(path.name))


def _read_header(file: Path) -> tuple[str | None, dict[str, StoredTensor]]:
    try:
        with safe_open(file, framework="np"):  # checks the header, and that the file is as long as the header says
            pass
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is truncated or not a safetensors file ({error}): fetch it again") from error
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    tag = header.pop("__metadata__", {}).get("format")
    return tag, {
        name: StoredTensor(file, tuple(entry["shape"]), entry["dtype"], 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
    }


def _layout(folder: Path, layouts: Collection[str], tags: Collection[str | None]) -> str:
    """The layout that the metadata names among those that the file name allows."""
    named = {layout for layout, tag in FORMAT_TAGS.items() if tag in tags}
    if not named:
        return "diffusers" if "diffusers" in layouts else layouts[0]
    if len(named) > 1 or not named <= set(layouts):
        raise UserError(
            f"the weights in {folder} are named as {' or '.join(layouts)} layout, "
            f"but their metadata says {' and '.join(sorted(named))}: rename or convert them"
        )
    return named.pop()


def _compare(
    model: nn.Layer,
    checkpoint: Checkpoint,
    targets: Mapping[str, paddle.Tensor],
    transposed: Collection[str],
    ignore: Collection[str],
) -> None:
    stored = checkpoint.tensors
    ignored = re.compile("|".join([ADAPTER_NAMES.pattern, *ignore]))
    wrong = []
    for name in targets.keys() & stored.keys():
        shape = list(targets[name].shape)
        expected = shape[::-1] if name in transposed else shape
        types = _FLOAT_TYPES if paddle.is_floating_point(targets[name]) else _NUMPY_TYPES.keys() - _FLOAT_TYPES
        if list(stored[name].shape) != expected:
            wrong.append(f"{name} {list(stored[name].shape)} instead of {expected}")
        elif stored[name].dtype not in types:
            wrong.append(f"{name} of type {stored[name].dtype}")
    problems = {
        "missing": targets.keys() - stored.keys(),
        "unexpected": {name for name in stored.keys() - targets.keys() if not ignored.search(name)},
        "misshapen": wrong,
    }
    if any(problems.values()):
        parts = [f"{kind}: {_listing(names)}" for kind, names in problems.items() if names]
        raise UserError(
            f"the weights in {checkpoint.folder} do not fit {type(model).__name__} as its config.json describes it; "
            + "; ".join(parts)
        )


def _listing(names: Collection[str]) -> str:
    shown = ", ".join(sorted(names)[:_MAX_NAMES])
    return shown if len(names) <= _MAX_NAMES else f"{shown} and {len(names) - _MAX_NAMES} more"


def _num_bytes(tensor: paddle.Tensor) -> int:
    return math.prod(tensor.shape) * tensor.element_size()


def _split(state: Mapping[str, paddle.Tensor], max_bytes: int) -> list[dict[str, paddle.Tensor]]:
    """Fill shards in order; a tensor larger than a shard gets one of its own."""
    shards, size = [{}], 0
    for name, tensor in state.items():
        if shards[-1] and size + _num_bytes(tensor) > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += _num_bytes(tensor)
    return shards


def _index(shards: list[dict[str, paddle.Tensor]], names: list[str]) -> dict:
    total = sum(_num_bytes(tensor) for shard in shards for tensor in shard.values())
    weight_map = {tensor: name for shard, name in zip(shards, names, strict=True) for tensor in shard}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def _write_safetensors(
    path: Path, tensors: Mapping[str, paddle.Tensor], transposed: Collection[str], format_tag: str
) -> None:
    """The safetensors format written tensor by tensor: header length, JSON header, raw little-endian data."""
    header, offset = {"__metadata__": {"format": format_tag}}, 0
    # Wide types first, so that every tensor starts at a multiple of its element size.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    for name, tensor in ordered:
        shape = list(tensor.shape)
        end = offset + _num_bytes(tensor)
        header[name] = {
            "dtype": _TYPES[tensor.dtype][0],
            "shape": shape[::-1] if name in transposed else shape,
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in ordered:
            array = tensor.numpy()
            np.ascontiguousarray(array.T if name in transposed else array).tofile(file)
        file.flush()
        os.fsync(file.fileno())
