"""Denoisers: the one interface through which samplers and objectives see a model, and its adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import paddle
from paddle import Tensor, nn

from fast_diffusers.models.layers import at_least_float32
from fast_diffusers.target_time import AttachedDenoiser, attached


class Denoiser(Protocol):
    """A velocity model: v = denoiser(x, t, cond), v being the prediction of noise minus data."""

    def __call__(
        self,
        x: Tensor,
        t: Tensor | float,
        cond: Mapping[str, Tensor],
        *,
        target_t: Tensor | float | None = None,
        guidance: Tensor | float | None = None,
    ) -> Tensor:
        """Velocity at (x, t).

        Args:
            x: state [B, C, H, W], any float dtype.
            t: time [B] or a scalar; 1 is noise, 0 data.
            cond: conditioning, batch first.
            target_t: time [B] that the caller is about to step to; a model without a second time ignores it.
            guidance: guidance strength [B] or a scalar, for models that embed it.

        Returns:
            [B, C, H, W], float32 (float64 from a float64 model).
        """


class FluxDenoiser:
    """Adapter of `FluxTransformer2DModel`: packs 2 x 2 patches into tokens and makes the position ids.

    FLUX has one time condition, so `target_t` is accepted and ignored.
    """

    def __init__(self, transformer: nn.Layer):
        self.transformer = transformer

    @property
    def num_taps(self) -> int:
        """Number of places where `features` can read: one after each double block, then one after each single block."""
        return len(self.transformer.transformer_blocks) + len(self.transformer.single_transformer_blocks)

    @property
    def feature_channels(self) -> int:
        """Channels D of a feature map."""
        config = self.transformer.config
        return config.num_attention_heads * config.attention_head_dim

    def __call__(
        self,
        x: Tensor,
        t: Tensor | float,
        cond: Mapping[str, Tensor],
        *,
        target_t: Tensor | float | None = None,
        guidance: Tensor | float | None = None,
    ) -> Tensor:
        """Velocity at (x, t), see `Denoiser`; reads `prompt_embeds` and `pooled_prompt_embeds` of `cond`.

        Raises:
            ValueError: x does not fit the model, or guidance is missing for a model that embeds it or given to one that
                does not (FLUX.1-schnell).
        """
        _, _, height, width = x.shape
        return at_least_float32(_unpack(self._forward(x, t, cond, guidance), height // 2, width // 2))

    def features(
        self,
        x: Tensor,
        t: Tensor | float,
        cond: Mapping[str, Tensor],
        taps: Sequence[int] | None = None,
        *,
        guidance: Tensor | float | None = None,
    ) -> list[Tensor]:
        """Image-token hidden states after the blocks `taps` (default: all), [B, D, H/2, W/2] in the model's dtype.

        Block i is double block i, or single block i - (number of double blocks); the list follows the order of `taps`.
        Gradients flow to x and to whatever parameters require them.
        """
        taps = range(self.num_taps) if taps is None else taps
        if not all(0 <= tap < self.num_taps for tap in taps):
            raise ValueError(f"taps must lie in 0..{self.num_taps - 1}, got {list(taps)}")
        double, single = self.transformer.transformer_blocks, self.transformer.single_transformer_blocks
        text_length = cond["prompt_embeds"].shape[1]
        taken: dict[int, Tensor] = {}

        def take(tap: int):
            def hook(block, inputs, outputs):
                taken[tap] = outputs[1] if tap < len(double) else outputs[:, text_length:]

            return hook

        blocks = [*double, *single]
        hooks = [blocks[tap].register_forward_post_hook(take(tap)) for tap in set(taps)]
        try:
            self._forward(x, t, cond, guidance)
        finally:
            for hook in hooks:
                hook.remove()
        rows, columns = x.shape[2] // 2, x.shape[3] // 2
        return [
            taken[tap].transpose([0, 2, 1]).reshape([x.shape[0], self.feature_channels, rows, columns]) for tap in taps
        ]

    def _forward(
        self, x: Tensor, t: Tensor | float, cond: Mapping[str, Tensor], guidance: Tensor | float | None
    ) -> Tensor:
        """Packed prediction [B, L, 4C] in the model's dtype."""
        batch, channels, height, width = x.shape
        config = self.transformer.config
        if 4 * channels != config.in_channels or height % 2 or width % 2:
            raise ValueError(
                f"latents of shape {list(x.shape)} do not fit this FLUX model: "
                f"it takes [B, {config.in_channels // 4}, H, W] with even H and W"
            )
        dtype = self.transformer.x_embedder.weight.dtype
        text = cond["prompt_embeds"].astype(dtype)
        if text.shape[0] != batch:
            raise ValueError(f"{batch} latents, but the conditioning has {text.shape[0]} rows")
        return self.transformer(
            hidden_states=_pack(x.astype(dtype)),
            encoder_hidden_states=text,
            pooled_projections=cond["pooled_prompt_embeds"].astype(dtype),
            timestep=_per_sample(t, batch),
            img_ids=_image_ids(height // 2, width // 2),
            txt_ids=paddle.zeros([text.shape[1], 3], dtype="float32"),
            guidance=None if guidance is None else _per_sample(guidance, batch),
            return_dict=False,
        )[0]


ADAPTERS = {"FluxTransformer2DModel": FluxDenoiser}
"""Adapter class by the name of the transformer class; names, so that using one family does not import them all."""


def denoiser_for(transformer: nn.Layer) -> Denoiser:
    """The denoiser of a transformer, chosen by its class (or a base class of it); see also `target_time.attach`."""
    for cls in type(transformer).__mro__:
        if cls.__name__ in ADAPTERS:
            denoiser = ADAPTERS[cls.__name__](transformer)
            return AttachedDenoiser(denoiser) if attached(transformer) else denoiser
    raise TypeError(f"no denoiser adapter for {type(transformer).__name__}; there are adapters for {sorted(ADAPTERS)}")


def _per_sample(value: Tensor | float, batch: int) -> Tensor:
    """A scalar or [B] value as float32 [B]."""
    value = value if isinstance(value, Tensor) else paddle.to_tensor(value, dtype="float32")
    if value.ndim > 1 or value.size not in (1, batch):
        raise ValueError(f"expected a scalar or one value for each of {batch} samples, got shape {list(value.shape)}")
    return value.astype("float32").expand([batch])


def _pack(x: Tensor) -> Tensor:
    """[B, C, 2h, 2w] -> tokens [B, h w, 4C], features ordered (channel, row in patch, column in patch)."""
    batch, channels, height, width = x.shape
    patches = x.reshape([batch, channels, height // 2, 2, width // 2, 2]).transpose([0, 2, 4, 1, 3, 5])
    return patches.reshape([batch, (height // 2) * (width // 2), channels * 4])


def _unpack(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of `_pack`: tokens [B, rows columns, 4C] -> [B, C, 2 rows, 2 columns]."""
    batch, _, features = tokens.shape
    patches = tokens.reshape([batch, rows, columns, features // 4, 2, 2]).transpose([0, 3, 1, 4, 2, 5])
    return patches.reshape([batch, features // 4, 2 * rows, 2 * columns])


def _image_ids(rows: int, columns: int) -> Tensor:
    """Position ids of the image tokens, float32 [rows columns, 3]: (0, row, column)."""
    row = paddle.arange(rows, dtype="float32").unsqueeze(1).expand([rows, columns])
    column = paddle.arange(columns, dtype="float32").unsqueeze(0).expand([rows, columns])
    return paddle.stack([paddle.zeros_like(row), row, column], axis=-1).reshape([rows * columns, 3])
