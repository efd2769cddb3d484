"""LoRA methods of a pipeline, on its transformer."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from paddle import nn

from fast_diffusers import lora, target_time
from fast_diffusers.errors import UserError
from fast_diffusers.lora.layers import find_set


class LoRAMethods:
    """Mixin of pipelines: load, choose, scale, fuse and unload adapters of `self.transformer`."""

    transformer: nn.Layer
    attention_argument: ClassVar[str] = "joint_attention_kwargs"
    """What a pipeline's call names the argument that `_lora_scale` reads."""

    def load_lora_weights(
        self,
        path: str | os.PathLike,
        weight_name: str | None = None,
        adapter_name: str = "default",
        alpha: float | None = None,
    ) -> None:
        """Add an adapter and make it the one that runs; see `fast_diffusers.lora.load`.

        An adapter that was trained to be told its target time (the file's header says so) will be, whenever it runs.

        Args:
            path: a file, or a folder with a file of a known name.
            weight_name: the file's name in the folder `path`, if it is another.
            adapter_name: what to call the adapter.
            alpha: alpha of a file that does not store it.

        Raises:
            FileNotFoundError, UserError: no such file, or it does not fit this transformer.
        """
        file = Path(path, weight_name or "")
        way = target_time.of_lora(file, self.transformer)
        lora.load(self.transformer, file, name=adapter_name, alpha=alpha)
        target_time.attach(self.transformer, way, adapter_name)

    def set_adapters(self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float] = 1.0) -> None:
        """Choose the adapters that run, each with its weight (one number for all, or one each)."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        weights = adapter_weights if isinstance(adapter_weights, Sequence) else [adapter_weights] * len(names)
        if len(weights) != len(names):
            raise UserError(f"set_adapters: {len(weights)} weights for {len(names)} adapters")
        lora.set_default(self.transformer, dict(zip(names, weights, strict=True)))

    def fuse_lora(self, lora_scale: float = 1.0) -> None:
        """Add the running adapters into the weights, where they cost nothing; `unfuse_lora` takes them out."""
        lora.fuse(self.transformer, self._running_adapters(), scale=lora_scale)

    def unfuse_lora(self) -> None:
        """Put back, bitwise, the weights that `fuse_lora` replaced."""
        lora.unfuse(self.transformer)

    def unload_lora_weights(self) -> None:
        """Take all adapters off. What `fuse_lora` added to the weights stays, for good."""
        adapters = find_set(self.transformer)
        if adapters is not None and adapters.fused:
            fused = adapters.fused
            lora.unfuse(self.transformer)
            lora.fuse(self.transformer, fused, keep_base=False)
            for way in filter(None, map(target_time.attached(self.transformer).get, fused)):
                target_time.attach(self.transformer, way)
        for name in lora.adapters(self.transformer):
            lora.remove(self.transformer, name)

    @contextmanager
    def _lora_scale(self, attention_kwargs: Mapping[str, Any] | None) -> Iterator[None]:
        """Run the chosen adapters at `attention_kwargs["scale"]` inside the block."""
        if not attention_kwargs:
            yield
            return
        if unknown := set(attention_kwargs) - {"scale"}:
            raise UserError(f"{self.attention_argument} takes only 'scale', that of the LoRA, not {sorted(unknown)}")
        with lora.active(self.transformer, self._running_adapters(), float(attention_kwargs["scale"])):
            yield

    def _running_adapters(self) -> dict[str, float]:
        adapters = find_set(self.transformer)
        if adapters is None or not (adapters.default or adapters.fused):
            raise UserError("no LoRA is running in this pipeline: call load_lora_weights (or set_adapters) first")
        return dict(adapters.default)
