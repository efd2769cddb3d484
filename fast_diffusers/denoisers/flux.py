"""FLUX as a denoiser."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import paddle
from paddle import Tensor, nn

from fast_diffusers.denoisers.base import TransformerDenoiser
from fast_diffusers.denoisers.packing import check_packable, pack, unpack
from fast_diffusers.transports import per_sample


class FluxDenoiser(TransformerDenoiser):
    """Adapter of `FluxTransformer2DModel`: packs 2 x 2 patches into tokens and makes the position ids.

    Reads `prompt_embeds` [B, T, D] and `pooled_prompt_embeds` [B, P] of the conditioning. Taps: double block i, then
    single block i - (number of double blocks).
    """

    family = "FLUX"

    def _predict(
        self, x: Tensor, t: Tensor | float, cond: Mapping[str, Tensor], guidance: Tensor | float | None
    ) -> Tensor:
        check_packable(x, self.transformer.config.in_channels, self.family)
        self._check_rows(x, cond)
        dtype = self.transformer.x_embedder.weight.dtype
        text = cond["prompt_embeds"].astype(dtype)
        rows, columns = self._token_grid(x)
        tokens = self.transformer(
            hidden_states=pack(x.astype(dtype)),
            encoder_hidden_states=text,
            pooled_projections=cond["pooled_prompt_embeds"].astype(dtype),
            timestep=per_sample(t, x),
            img_ids=_image_ids(rows, columns),
            txt_ids=paddle.zeros([text.shape[1], 3], dtype="float32"),
            guidance=None if guidance is None else per_sample(guidance, x),
            return_dict=False,
        )[0]
        return unpack(tokens, rows, columns)

    def _blocks(self) -> list[nn.Layer]:
        return [*self.transformer.transformer_blocks, *self.transformer.single_transformer_blocks]

    def _image_tokens(self, tap: int, output: Any, count: int) -> Tensor:
        # Double blocks return (text, image), single ones both in one sequence.
        return output[1] if tap < len(self.transformer.transformer_blocks) else output[:, -count:]

    def _token_grid(self, x: Tensor) -> tuple[int, int]:
        return x.shape[2] // 2, x.shape[3] // 2


def _image_ids(rows: int, columns: int) -> Tensor:
    """Position ids of the image tokens, float32 [rows columns, 3]: (0, row, column)."""
    row = paddle.arange(rows, dtype="float32").unsqueeze(1).expand([rows, columns])
    column = paddle.arange(columns, dtype="float32").unsqueeze(0).expand([rows, columns])
    return paddle.stack([paddle.zeros_like(row), row, column], axis=-1).reshape([rows * columns, 3])
