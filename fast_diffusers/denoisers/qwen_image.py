"""Qwen-Image as a denoiser."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paddle import Tensor

from fast_diffusers.denoisers.base import TransformerDenoiser
from fast_diffusers.denoisers.packing import check_packable, pack, unpack
from fast_diffusers.transports import per_sample


class QwenImageDenoiser(TransformerDenoiser):
    """Adapter of `QwenImageTransformer2DModel`: packs 2 x 2 patches of an image (one frame) into tokens.

    Reads `prompt_embeds` [B, T, D] and, where it is there, `prompt_embeds_mask` [B, T] (not 0 = keep) of the
    conditioning.
    """

    family = "Qwen-Image"

    def _predict(
        self, x: Tensor, t: Tensor | float, cond: Mapping[str, Tensor], guidance: Tensor | float | None
    ) -> Tensor:
        check_packable(x, self.transformer.config.in_channels, self.family)
        self._check_rows(x, cond)
        self._check_guidance(guidance)
        dtype = self.transformer.img_in.weight.dtype
        rows, columns = self._token_grid(x)
        tokens = self.transformer(
            hidden_states=pack(x.astype(dtype)),
            encoder_hidden_states=cond["prompt_embeds"].astype(dtype),
            encoder_hidden_states_mask=cond.get("prompt_embeds_mask"),
            timestep=per_sample(t, x),
            img_shapes=[(1, rows, columns)] * x.shape[0],
            return_dict=False,
        )[0]
        return unpack(tokens, rows, columns)

    def _image_tokens(self, tap: int, output: Any, count: int) -> Tensor:
        return output[1]  # (text, image)
