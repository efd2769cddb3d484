"""SANA and SANA-Sprint as denoisers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paddle import Tensor, nn

from fast_diffusers.denoisers.base import TransformerDenoiser
from fast_diffusers.transports import per_sample


class SanaDenoiser(TransformerDenoiser):
    """Adapter of `SanaTransformer2DModel`, with or without a ControlNet.

    Reads `prompt_embeds` [B, T, D] and, where it is there, `prompt_attention_mask` [B, T] (1 = keep) of the
    conditioning; a ControlNet reads `control`, the control image as latents [B, C, H, W].

    A model with `guidance_embeds` (SANA-Sprint) is shown the time itself, other ones 1000 times
    `config.timestep_scale` times it (SANA-Sprint, arXiv 2503.09641, section 3.2: 0.001 is its dense time).

    Args:
        transformer: the SANA transformer.
        controlnet: a `SanaControlNetModel` for it.
        conditioning_scale: how strongly the ControlNet acts.
    """

    family = "SANA"

    def __init__(self, transformer: nn.Layer, controlnet: nn.Layer | None = None, conditioning_scale: float = 1.0):
        super().__init__(transformer)
        self.controlnet, self.conditioning_scale = controlnet, conditioning_scale

    def _predict(
        self, x: Tensor, t: Tensor | float, cond: Mapping[str, Tensor], guidance: Tensor | float | None
    ) -> Tensor:
        self._check_inputs(x, cond, guidance)
        dtype = self.transformer.patch_embed.proj.weight.dtype
        return self.transformer(
            hidden_states=x.astype(dtype),
            **_text(cond, dtype),
            **_scalars(self.transformer, t, guidance, x),
            controlnet_block_samples=None if self.controlnet is None else self._control(x, t, cond, guidance),
            return_dict=False,
        )[0]

    def _control(
        self, x: Tensor, t: Tensor | float, cond: Mapping[str, Tensor], guidance: Tensor | float | None
    ) -> list[Tensor]:
        """What the ControlNet adds to the image tokens after the blocks but the first."""
        if "control" not in cond:
            raise ValueError("this SANA model has a ControlNet: the conditioning must hold `control`, its latents")
        dtype = self.controlnet.patch_embed.proj.weight.dtype
        return self.controlnet(
            hidden_states=x.astype(dtype),
            **_text(cond, dtype),
            **_scalars(self.controlnet, t, guidance, x),
            controlnet_cond=cond["control"].astype(dtype),
            conditioning_scale=self.conditioning_scale,
            return_dict=False,
        )[0]

    def _image_tokens(self, tap: int, output: Any, count: int) -> Tensor:
        return output


def _text(cond: Mapping[str, Tensor], dtype: Any) -> dict[str, Tensor | None]:
    """The arguments of a SANA network that say what is to be seen."""
    return {
        "encoder_hidden_states": cond["prompt_embeds"].astype(dtype),
        "encoder_attention_mask": cond.get("prompt_attention_mask"),
    }


def _scalars(
    network: nn.Layer, t: Tensor | float, guidance: Tensor | float | None, x: Tensor
) -> dict[str, Tensor | None]:
    """Time and guidance [B] as a SANA network reads them."""
    config = network.config
    scale = 1.0 if config.guidance_embeds else 1000 * config.timestep_scale
    shown = per_sample(t, x) * scale
    if not config.guidance_embeds:
        return {"timestep": shown, "guidance": None}
    return {"timestep": shown, "guidance": per_sample(guidance, x) * config.guidance_embeds_scale}
