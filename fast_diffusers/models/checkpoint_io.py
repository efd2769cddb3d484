"""Weights on disk: safetensors, sharded or not, in HF diffusers' layout or in Paddle's.

The layouts differ in one thing: diffusers keeps the weight of a linear layer as [out, in], Paddle as [in, out]. Which
weights those are is known from the model's layers, never from shapes. A file tells its layout by its name and by the
`format` tag of its metadata, "pt" or "pd". Tensors stream one by one: beyond the model itself, loading, saving and
converting need the memory of the largest tensor. On a terminal, a bar shows how far a long one is.
"""

import json
import math
import os
import re
import struct
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Self

import numpy as np
import paddle
from paddle import nn
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

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
FLOAT_TYPES = {"F64", "F32", "F16", "BF16"}
_MAX_NAMES = 20
_BLOCK_BYTES = 1 << 24  # how much of a tensor is transposed or written at a time


@dataclass(frozen=True)
class StoredTensor:
    """A tensor on disk: its file, its shape in the file's layout, its safetensors type and where its bytes start."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    offset: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * _item_size(self.dtype)

    def rows(self, start: int, end: int) -> Self:
        """A part of the tensor along its first axis."""
        row = math.prod(self.shape[1:])
        return replace(
            self, shape=(end - start, *self.shape[1:]), offset=self.offset + start * row * _item_size(self.dtype)
        )

    def read(self, transposed: bool = False) -> np.ndarray:
        """The values, in memory of their own; bfloat16 as raw uint16. A matrix can be transposed on the way."""
        values = np.empty(self.shape[::-1] if transposed else self.shape, _NUMPY_TYPES[self.dtype])
        with self.file.open("rb") as file:
            file.seek(self.offset)
            for block in _blocks(values.T) if transposed else [values]:
                read = np.empty(block.shape, block.dtype) if transposed else block
                if file.readinto(read.reshape(-1).view(np.uint8)) < read.nbytes:
                    raise UserError(f"{self.file} became shorter while it was read")
                if transposed:
                    block[...] = read
        return values

    def floats(self, dtype: str = "float32") -> np.ndarray:
        """The values of a tensor of floats in a type that numpy has."""
        values = self.read()
        if self.dtype == "BF16":  # the upper half of a float32
            values = np.left_shift(values, 16, dtype=np.uint32).view(np.float32)
        return values.astype(dtype)


@dataclass(frozen=True)
class Entry:
    """A tensor to be written: its shape and safetensors type in the file, and its values (any strides) on demand."""

    shape: tuple[int, ...]
    dtype: str
    values: Callable[[], np.ndarray]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * _item_size(self.dtype)

    @classmethod
    def of(cls, tensor: paddle.Tensor, transposed: bool = False) -> Self:
        """A tensor in memory, as it is when it is written."""
        shape = tuple(tensor.shape)
        if transposed:
            return cls(shape[::-1], _TYPES[tensor.dtype][0], lambda: tensor.detach().numpy().T)
        return cls(shape, _TYPES[tensor.dtype][0], lambda: tensor.detach().numpy())

    @classmethod
    def of_stored(cls, stored: StoredTensor, transposed: bool = False) -> Self:
        """A tensor on disk, in the type it has there."""
        shape = stored.shape[::-1] if transposed else stored.shape
        return cls(shape, stored.dtype, partial(stored.read, transposed))


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
    Where both layouts have the same stem, the files' metadata decides (paddlenlp's "np" is Paddle's layout), diffusers'
    layout if it is silent. Raises UserError for no weights, weights in both layouts, an unreadable file, or a metadata
    tag that contradicts the name.
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
        metadata, stored = read_header(file)
        tags.add(metadata.get("format"))
        tensors.update(stored)
    return Checkpoint(folder, _layout(folder, layouts, tags), tensors)


def load_into(model: nn.Layer, checkpoint: Checkpoint, ignore: Collection[str] = ()) -> None:
    """Copy a checkpoint into the parameters and buffers of `model`, tensor by tensor, cast to the model's dtypes.

    Names come first: missing, unexpected and misshapen tensors are named in one UserError and the model stays as
    it was. Adapters (".lora_A.", ".lora_B.") and unexpected names that match a pattern in `ignore` do not count.
    """
    targets = _base_state(model)
    transposed = linear_weights(model) if checkpoint.layout == "diffusers" else set()
    _compare(model, checkpoint, targets, transposed, ignore)
    total = sum(checkpoint.tensors[name].num_bytes for name in targets)
    with paddle.no_grad(), progress_bar(total, f"load {type(model).__name__}") as bar:
        for name, target in targets.items():
            stored = checkpoint.tensors[name]
            values = stored.read(name in transposed)
            same = stored.dtype == _TYPES[target.dtype][0]
            target.set_value(values if same else paddle.to_tensor(values).astype(target.dtype))
            bar.update(stored.num_bytes)


def save_from(
    model: nn.Layer, folder: Path, stem: str, layout: str = "paddle", max_shard_size: int | str = "10GB"
) -> None:
    """Write the parameters and buffers of `model`, without adapters; the rest is as in `write_checkpoint`."""
    transposed = linear_weights(model) if layout == "diffusers" else set()
    entries = {name: Entry.of(tensor, name in transposed) for name, tensor in _base_state(model).items()}
    write_checkpoint(entries, folder, stem, layout, max_shard_size, type(model).__name__)


def converted(
    model: nn.Layer, checkpoint: Checkpoint, layout: str, ignore: Collection[str] = ()
) -> tuple[dict[str, Entry], set[str]]:
    """What `save_from` would write after `load_into`, but in the types of the checkpoint, and which is transposed.

    Nothing but shapes is needed of `model`: it can be one that was made under paddle.LazyGuard. Errors as `load_into`.
    """
    targets, linear = _base_state(model), linear_weights(model)
    _compare(model, checkpoint, targets, linear if checkpoint.layout == "diffusers" else set(), ignore)
    transposed = linear if layout != checkpoint.layout else set()
    entries = {name: Entry.of_stored(checkpoint.tensors[name], name in transposed) for name in targets}
    return entries, transposed & entries.keys()


def write_checkpoint(
    entries: Mapping[str, Entry],
    folder: Path,
    stem: str,
    layout: str = "paddle",
    max_shard_size: int | str = "10GB",
    what: str = "weights",
) -> None:
    """Write tensors to "<stem>.safetensors", or to shards with an index; `what` they are is for the progress bar.

    All files are complete under temporary names before the first gets its final one; files of an earlier save under the
    same stem are then removed.
    """
    if layout not in FORMAT_TAGS:
        raise UserError(f"unknown layout {layout!r}: choose one of {', '.join(FORMAT_TAGS)}")
    shards = _split(entries, parse_size(max_shard_size))
    count = len(shards)
    names = [
        f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors" if count > 1 else f"{stem}.safetensors" for i in range(count)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    stale = set(_saved_files(folder, stem))
    temporary = [folder / f"{name}.tmp" for name in names]
    total = sum(entry.num_bytes for entry in entries.values())
    try:
        with progress_bar(total, f"write {what}") as bar:
            for path, shard in zip(temporary, shards, strict=True):
                write_safetensors(path, shard, {"format": FORMAT_TAGS[layout]}, bar.update)
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


def write_safetensors(
    path: Path,
    entries: Mapping[str, Entry],
    metadata: Mapping[str, str],
    report: Callable[[int], object] = lambda num_bytes: None,
) -> None:
    """The safetensors format written tensor by tensor: header length, JSON header, raw little-endian data.

    `report` is told the bytes of each tensor once it is written.
    """
    header, offset = {"__metadata__": dict(metadata)}, 0
    # Wide types first, so that every tensor starts at a multiple of its element size.
    ordered = sorted(entries.items(), key=lambda item: -_item_size(item[1].dtype))
    for name, entry in ordered:
        end = offset + entry.num_bytes
        header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, entry in ordered:
            for block in _blocks(entry.values()):
                np.ascontiguousarray(block).tofile(file)
            report(entry.num_bytes)
        file.flush()
        os.fsync(file.fileno())


def verify(entries: Mapping[str, Entry], written: Mapping[str, StoredTensor], what: str) -> None:
    """Read back what was written of `entries` and compare the bits; OSError names the first tensor that differs."""
    if missing := entries.keys() ^ written.keys():
        raise OSError(f"{what} was not written as it should: {_listing(missing)}")
    with progress_bar(sum(entry.num_bytes for entry in entries.values()), f"verify {what}") as bar:
        for name, entry in entries.items():
            stored = written[name]
            same = (stored.shape, stored.dtype) == (entry.shape, entry.dtype)
            # Compared as bytes, for a NaN is not equal to itself.
            pairs = zip(_blocks(entry.values()), _blocks(stored.read()), strict=True) if same else ()
            if not same or any(a.tobytes() != b.tobytes() for a, b in pairs):
                raise OSError(f"{what} was not written as it should: {name} differs (a full or faulty disk?)")
            bar.update(entry.num_bytes)


def progress_bar(total: int, what: str) -> tqdm:
    """A bar of bytes on stderr, for work that takes longer than a second and where a person can see it."""
    return tqdm(total=total, desc=what, unit="B", unit_scale=True, delay=1, disable=None)


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


def read_header(file: Path) -> tuple[dict[str, str], dict[str, StoredTensor]]:
    """The metadata of a safetensors file and its tensors; UserError if it is truncated or none."""
    try:
        with safe_open(file, framework="np"):  # checks the header, and that the file is as long as the header says
            pass
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is truncated or not a safetensors file ({error}): fetch it again") from error
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    metadata = header.pop("__metadata__", {})
    return metadata, {
        name: StoredTensor(file, tuple(entry["shape"]), entry["dtype"], 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
    }


def _layout(folder: Path, layouts: Collection[str], tags: Collection[str | None]) -> str:
    """The layout that the metadata names among those that the file name allows."""
    named = {layout for layout, tag in FORMAT_TAGS.items() if tag in tags}
    if not named:
        usual = "paddle" if "np" in tags else "diffusers"  # paddlenlp writes "np" for its models in Paddle's layout
        return usual if usual in layouts else layouts[0]
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
        types = FLOAT_TYPES if paddle.is_floating_point(targets[name]) else _NUMPY_TYPES.keys() - FLOAT_TYPES
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


def _item_size(dtype: str) -> int:
    """Bytes of an element of a safetensors type: BF16, F8_E4M3, BOOL, ..."""
    return int(re.search(r"\d+", dtype)[0]) // 8 if dtype != "BOOL" else 1


def _blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    """The array in parts along its first axis that are small enough to copy."""
    array = np.atleast_1d(array)
    step = max(1, _BLOCK_BYTES * len(array) // max(array.nbytes, 1))
    return (array[start : start + step] for start in range(0, len(array), step))


def _split(entries: Mapping[str, Entry], max_bytes: int) -> list[dict[str, Entry]]:
    """Fill shards in order; a tensor larger than a shard gets one of its own."""
    shards, size = [{}], 0
    for name, entry in entries.items():
        if shards[-1] and size + entry.num_bytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = entry
        size += entry.num_bytes
    return shards


def _index(shards: list[dict[str, Entry]], names: list[str]) -> dict:
    total = sum(entry.num_bytes for shard in shards for entry in shard.values())
    weight_map = {tensor: name for shard, name in zip(shards, names, strict=True) for tensor in shard}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
