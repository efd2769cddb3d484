"""Conditioning: an immutable, batch-first mapping of tensors (prompt embeddings, pooled embeddings, labels, ...)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import paddle
from paddle import Tensor


class Cond(Mapping[str, Tensor]):
    """Named tensors that share their first dimension, the batch.

    A FLUX model reads `prompt_embeds` [B, T, D] and `pooled_prompt_embeds` [B, P]; other families name their own.
    Every method returns a new `Cond` and leaves this one as it is.

    Raises:
        ValueError: no tensor at all, a 0-d tensor, or tensors whose batch sizes differ.
    """

    __slots__ = ("_tensors",)

    def __init__(self, tensors: Mapping[str, Tensor] | None = None, /, **named: Tensor):
        merged = {**(tensors or {}), **named}
        if not merged:
            raise ValueError("Cond needs at least one tensor, e.g. Cond(prompt_embeds=...)")
        for name, tensor in merged.items():
            if not isinstance(tensor, Tensor):
                raise TypeError(f"Cond: {name} must be a paddle.Tensor, got {type(tensor).__name__}")
            if not tensor.shape:
                raise ValueError(f"Cond: {name} is a scalar; every entry needs a batch dimension first")
        if len({tensor.shape[0] for tensor in merged.values()}) > 1:
            shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in merged.items())
            raise ValueError(f"Cond: batch sizes (first dimensions) differ: {shapes}")
        self._tensors = merged

    def __getitem__(self, name: str) -> Tensor:
        try:
            return self._tensors[name]
        except KeyError:
            raise KeyError(f"the conditioning has no {name!r}; it has {sorted(self._tensors)}") from None

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        entries = ", ".join(f"{name}: {list(t.shape)} {str(t.dtype).split('.')[-1]}" for name, t in self.items())
        return f"Cond({entries})"

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        return next(iter(self._tensors.values())).shape[0]

    def map(self, fn: Callable[[Tensor], Tensor]) -> Cond:
        """Apply `fn` to every tensor."""
        return Cond({name: fn(tensor) for name, tensor in self.items()})

    def mask(self, keep: Tensor | np.ndarray | Sequence[int] | Sequence[bool]) -> Cond:
        """Select rows: `keep` is a boolean [B] (rows to keep) or an integer [K] (rows to take, in that order)."""
        keep = keep if isinstance(keep, Tensor) else paddle.to_tensor(np.asarray(keep))
        if keep.ndim != 1 or keep.dtype not in (paddle.bool, paddle.int32, paddle.int64):
            raise ValueError(f"Cond.mask wants a 1-d bool mask or int index, got {keep.dtype} {list(keep.shape)}")
        if keep.dtype == paddle.bool:
            if keep.shape[0] != self.batch_size:
                raise ValueError(f"Cond.mask: {keep.shape[0]} flags for a batch of {self.batch_size}")
            keep = keep.nonzero().flatten()
        return self.map(lambda tensor: paddle.gather(tensor, keep, axis=0))

    def roll(self, shift: int = 1) -> Cond:
        """Rotate the rows: row i moves to i + shift, so that every row meets another row's conditioning."""
        return self.mask((np.arange(self.batch_size) - shift) % self.batch_size)

    def concat(self, other: Mapping[str, Tensor]) -> Cond:
        """Append the rows of `other`, which must have the same names and, batch aside, the same shapes."""
        if set(self) != set(other):
            raise ValueError(f"Cond.concat: names differ: {sorted(self)} and {sorted(other)}")
        for name, tensor in self.items():
            if tensor.shape[1:] != other[name].shape[1:]:
                raise ValueError(
                    f"Cond.concat: {name} has shape {list(tensor.shape)} here and {list(other[name].shape)} there; "
                    "all but the first dimension must agree (encode both with the same sequence length)"
                )
        return Cond({name: paddle.concat([tensor, other[name]], axis=0) for name, tensor in self.items()})

    def null(self) -> Cond:
        """The same shapes filled with zeros."""
        return self.map(paddle.zeros_like)

    def expand(self, batch_size: int) -> Cond:
        """Repeat a single row to `batch_size` rows; a conditioning that already has that many is returned unchanged."""
        if self.batch_size == batch_size:
            return self
        if self.batch_size != 1:
            raise ValueError(f"Cond.expand: cannot expand a batch of {self.batch_size} to {batch_size}")
        return self.map(lambda tensor: tensor.expand([batch_size, *tensor.shape[1:]]))

    def repeat_interleave(self, repeats: int) -> Cond:
        """Repeat every row `repeats` times in place: rows a, b become a, a, b, b for `repeats` = 2."""
        return self.mask(np.repeat(np.arange(self.batch_size), repeats))
