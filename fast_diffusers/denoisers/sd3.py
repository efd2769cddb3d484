"""Stable Diffusion 3 and 3.5 as denoisers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paddle import Tensor

from fast_diffusers.denoisers.base import TransformerDenoiser
from fast_diffusers.transports import per_sample


class SD3Denoiser(TransformerDenoiser):
    """Adapter of `SD3Transformer2DModel`, which reads times of 0..1000.

    Reads `prompt_embeds` [B, T, D] and `pooled_prompt_embeds` [B, P] of the conditioning.
    """

    family = "SD3"

    def _predict(
        self, x: Tensor, t: Tensor | float, cond: Mapping[str, Tensor], guidance: Tensor | float | None
    ) -> Tensor:
        self._check_inputs(x, cond, guidance)
        dtype = self.transformer.pos_embed.proj.weight.dtype
        return self.transformer(
            hidden_states=x.astype(dtype),
            encoder_hidden_states=cond["prompt_embeds"].astype(dtype),
            pooled_projections=cond["pooled_prompt_embeds"].astype(dtype),
            timestep=per_sample(t, x) * 1000.0,
            return_dict=False,
        )[0]

    def _image_tokens(self, tap: int, output: Any, count: int) -> Tensor:
        return output[1]  # (text, image)
