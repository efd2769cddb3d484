"""What the frozen encoders make of a data set, on disk: latents and prompt embeddings."""

import hashlib
import json
import logging
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from tqdm import tqdm

from distill.data.images import ImageBatches
from distill.data.records import one_of, whole_number
from distill.data.shards import COND, CorruptShard, Shard, write_shard
from fast_diffusers.errors import UserError

log = logging.getLogger(__name__)

META = "cache.json"

EncodeImages = Callable[[np.ndarray], Any]  # float32 [B, C, H, W] in [-1, 1] -> latents [B, c, h, w]
EncodePrompts = Callable[[list[str]], Mapping[str, Any]]  # B strings -> {name: [B, ...]}


class LatentCache:
    """Latents and prompt embeddings of a data set, read row by row from disk; a Loader reads from it.

    Each distinct prompt is stored once; the empty prompt is always there, for unconditional batches.
    Training from the cache sees exactly the records that training from the images would.

    Args:
        folder: what build() made (``cache.folder``).
        verify: compare every checksum, which reads the whole cache.

    Raises:
        UserError: a part is missing or damaged.
    """

    def __init__(self, folder: str | Path, *, verify: bool = False):
        self.folder = Path(folder)
        try:
            meta = json.loads((self.folder / META).read_bytes())
            self.key, self._count, self._shard_size = meta["key"], meta["count"], meta["shard_size"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"no latent cache in {self.folder} ({META}: {error}); build it first") from None
        self._table: dict[str, int] = {}
        self._shards: list[Shard] = []
        for path, _, rows in _layout(self.folder, self._count, self._shard_size):
            try:
                shard = Shard(path, self.key, rows, len(self._table), verify=verify)
            except CorruptShard as error:
                raise UserError(f"latent cache: {error}; build it again, whole shards are kept") from None
            self._shards.append(shard)
            _extend(self._table, shard.prompts)
        self._prompts = list(self._table)
        self._first_prompts = [shard.first_prompt for shard in self._shards]

    def __len__(self) -> int:
        return self._count

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """[C, H, W] of one latent."""
        return self._shards[0].latent_shape

    def fetch(self, indices: np.ndarray) -> dict[str, Any]:
        """{"latents": float32 [B, C, H, W], "cond": {name: float32 [B, ...]}, "prompts": B strings, "indices": int64
        [B], the records really read}."""
        rows = [self._shards[i // self._shard_size].row(i % self._shard_size) for i in indices.tolist()]
        latents, prompt_ids, read = zip(*rows, strict=True)
        prompts = [self._prompts[number] for number in prompt_ids]
        return {
            "latents": np.stack(latents).astype(np.float32),
            "cond": self.embeddings(prompts),
            "prompts": prompts,
            "indices": np.array(read, dtype=np.int64),
        }

    def embeddings(self, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """Stored embeddings of prompts, {name: float32 [B, ...]}; KeyError for a prompt that is not in the cache."""
        unique = {prompt: self._embedding(self._table[prompt]) for prompt in prompts}
        names = next(iter(unique.values()))
        return {name: np.stack([unique[prompt][name] for prompt in prompts]).astype(np.float32) for name in names}

    def _embedding(self, prompt_id: int) -> dict[str, np.ndarray]:
        # shards without new prompts start where the next one does: the last that starts at or before is the right one
        shard = self._shards[bisect_right(self._first_prompts, prompt_id) - 1]
        return shard.cond(prompt_id - shard.first_prompt)

    @classmethod
    def build(
        cls,
        batches: ImageBatches,
        encode_images: EncodeImages,
        encode_prompts: EncodePrompts,
        directory: str | Path,
        *,
        encoder: str,
        batch_size: int = 8,
        shard_size: int = 1024,
        dtype: str = "float32",
        verify: bool = True,
    ) -> Self:
        """Encode what is not yet in the cache and open it.

        Shards are written whole, one after another, so an interrupted build continues with the first one missing;
        a damaged shard is named in the log and made again.

        Args:
            encode_images: float32 [B, C, H, W] in [-1, 1] to latents; deterministic (a VAE's mode), for resuming.
            encode_prompts: strings to a mapping of tensors, batch first, of one shape whatever the prompts.
            directory: holds one folder for each combination of data, size and encoder.
            encoder: what identifies the encoders, such as the model's path and revision.
            dtype: of what is stored, "float32" or "float16".
            verify: check the checksums of the shards found (reads them), else only their headers.

        Raises:
            UserError: an encoder gives the wrong number of rows, or values that are not finite in ``dtype``.
        """
        one_of(dtype, ("float32", "float16"), "cache dtype")
        whole_number(batch_size, "cache batch_size", 1)
        whole_number(shard_size, "cache shard_size", 1)
        meta = {"data": batches.identity, "encoder": encoder, "dtype": dtype, "shard_size": shard_size}
        key = hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()
        folder = Path(directory) / key[:16]
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f"{META}.{os.getpid()}.tmp"
        temporary.write_text(json.dumps({**meta, "key": key, "count": len(batches)}, indent=1), encoding="utf-8")
        os.replace(temporary, folder / META)
        table: dict[str, int] = {}
        with tqdm(total=len(batches), desc="latent cache", unit="image", disable=None) as bar:
            for path, start, rows in _layout(folder, len(batches), shard_size):
                try:
                    shard = Shard(path, key, rows, len(table), verify=verify)
                except CorruptShard as error:
                    if path.exists():
                        log.warning("latent cache: %s; encoding it again", error)
                    indices = np.arange(start, start + rows)
                    tensors, new = _encode(batches, encode_images, encode_prompts, indices, batch_size, table, dtype)
                    write_shard(path, tensors, new, key)
                    shard = Shard(path, key, rows, len(table), verify=False)
                _extend(table, shard.prompts)
                bar.update(rows)
        return cls(folder)


def _encode(
    batches: ImageBatches,
    encode_images: EncodeImages,
    encode_prompts: EncodePrompts,
    indices: np.ndarray,
    batch_size: int,
    table: Mapping[str, int],
    dtype: str,
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Tensors of the shard for ``indices``, and the prompts that are not yet in the table."""
    known = dict(table) or {"": 0}
    latents, prompt_ids, read = [], [], []
    for start in range(0, len(indices), batch_size):
        batch = batches.fetch(indices[start : start + batch_size])
        latents.append(_array(encode_images(batch["images"]), len(batch["indices"]), dtype, "latents"))
        _extend(known, batch["prompts"])
        prompt_ids += [known[prompt] for prompt in batch["prompts"]]
        read.append(batch["indices"])
    new = list(known)[len(table) :]
    conds = []
    for start in range(0, len(new), batch_size):
        chunk = new[start : start + batch_size]
        embedded = encode_prompts(chunk)
        conds.append({name: _array(embedded[name], len(chunk), dtype, name) for name in embedded})
    tensors = {COND + name: np.concatenate([cond[name] for cond in conds]) for name in (conds[0] if conds else ())}
    tensors["latents"] = np.concatenate(latents)
    tensors["prompt_ids"] = np.array(prompt_ids, dtype=np.int64)
    tensors["indices"] = np.concatenate(read)
    return tensors, new


def _array(tensor: Any, rows: int, dtype: str, name: str) -> np.ndarray:
    """A Paddle tensor or array of any float dtype as an array to store."""
    with np.errstate(over="ignore"):
        array = np.asarray(tensor.astype("float32")).astype(dtype)
    if array.ndim == 0 or len(array) != rows:
        raise UserError(f"latent cache: the encoder gave {name} of shape {list(array.shape)} for a batch of {rows}")
    if not np.isfinite(array).all():
        raise UserError(f"latent cache: the encoder gave {name} with values that are not finite in {dtype}")
    return array


def _extend(table: dict[str, int], prompts: Sequence[str]) -> None:
    for prompt in prompts:
        table.setdefault(prompt, len(table))


def _layout(folder: Path, count: int, shard_size: int) -> Iterator[tuple[Path, int, int]]:
    """Path, first record and number of records of each shard."""
    for number, start in enumerate(range(0, count, shard_size)):
        yield folder / f"shard-{number:05d}.safetensors", start, min(shard_size, count - start)
