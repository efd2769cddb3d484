"""One file of the latent cache: safetensors, written whole or not at all, checksummed."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

COND = "cond."  # prefix of the prompt embeddings' tensor names


class CorruptShard(Exception):
    """A shard that is missing, damaged or of another cache: which file, and why."""


def write_shard(path: Path, tensors: dict[str, np.ndarray], prompts: list[str], key: str) -> None:
    """Write beside the target, flush to disk, rename.

    Args:
        tensors: `latents` [S, C, H, W], `prompt_ids` int64 [S] (position in the cache's prompt table), `indices`
            int64 [S] (the records really read), `cond.<name>` [P, ...] for the P ``prompts`` that first occur here.
    """
    text = json.dumps(prompts)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        save_file(
            tensors, temporary, {"cache": f"{key}/{path.name}", "prompts": text, "sha256": _digest(tensors, text)}
        )
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class Shard:
    """A shard opened for reading rows; tensors stay on disk. Reading from several threads is safe.

    Args:
        rows: how many latents it must hold.
        first_prompt: how many prompts the shards before it hold.
        verify: read everything and compare the checksum, else only what the file's header tells.

    Raises:
        CorruptShard.
    """

    def __init__(self, path: Path, key: str, rows: int, first_prompt: int, *, verify: bool):
        if not path.is_file():
            raise CorruptShard(f"{path} is missing")
        try:
            self._file = safe_open(path, framework="numpy")
            metadata = self._file.metadata() or {}
            names = list(self._file.keys())
            if metadata.get("cache") != f"{key}/{path.name}":
                raise CorruptShard(f"{path} belongs to another cache, or elsewhere in this one")
            if verify and metadata["sha256"] != _digest(
                {n: self._file.get_tensor(n) for n in names}, metadata["prompts"]
            ):
                raise CorruptShard(f"{path} does not match its checksum")
            self.prompts: list[str] = json.loads(metadata["prompts"])
            self.cond_names = sorted(name.removeprefix(COND) for name in names if name.startswith(COND))
            self._slices = {name: self._file.get_slice(name) for name in names}
            self._prompt_ids = self._file.get_tensor("prompt_ids")
            self._indices = self._file.get_tensor("indices")
            sizes = {name: self._slices[name].get_shape()[0] for name in names}
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise CorruptShard(f"{path} is damaged ({error})") from None
        self.first_prompt = first_prompt
        stop = first_prompt + len(self.prompts)
        expected = {name: len(self.prompts) if name.startswith(COND) else rows for name in (*names, "latents")}
        if sizes != expected or self._prompt_ids.max() >= stop:
            raise CorruptShard(f"{path} does not fit the shards before it")

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """[C, H, W]."""
        return tuple(self._slices["latents"].get_shape()[1:])

    def row(self, row: int) -> tuple[np.ndarray, int, int]:
        """Latent [C, H, W], position in the prompt table, and index of the record, at ``row``."""
        return self._slices["latents"][row : row + 1][0], int(self._prompt_ids[row]), int(self._indices[row])

    def cond(self, row: int) -> dict[str, np.ndarray]:
        """Embeddings of this shard's prompt number ``row``, without batch axis."""
        return {name: self._slices[COND + name][row : row + 1][0] for name in self.cond_names}


def _digest(tensors: dict[str, np.ndarray], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        digest.update(repr((name, tensors[name].dtype.str, tensors[name].shape)).encode())
        digest.update(np.ascontiguousarray(tensors[name]))
    return digest.hexdigest()
