"""ControlNet for SANA and SANA-Sprint (arXiv 2503.09641): copies of the first blocks that read a control image.

The method is that of Zhang et al. 2023 (arXiv 2302.05543). Sizes in shapes as in `fast_diffusers.models.sana`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import paddle
from paddle import nn
from ppdiffusers.configuration_utils import register_to_config
from ppdiffusers.utils import BaseOutput

from fast_diffusers.models.layers import zero_linear
from fast_diffusers.models.sana import SanaTransformer2DModel, SanaTrunk, copy_shared, own_config, refuse_unsupported


@dataclass
class SanaControlNetOutput(BaseOutput):
    """What to add to the transformer's image tokens: [B, L, C] for each block of the ControlNet."""

    controlnet_block_samples: list[paddle.Tensor]


class SanaControlNetModel(SanaTrunk):
    """ControlNet for a `SanaTransformer2DModel`; names and results are those of HF diffusers' class of the same name.

    That class has neither `guidance_embeds` nor `qk_norm`, which a SANA-Sprint student needs: they are additions here.
    A new ControlNet returns zeros and its transformer stays as it was.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 32,
        out_channels: int | None = 32,
        num_attention_heads: int = 70,
        attention_head_dim: int = 32,
        num_layers: int = 7,
        num_cross_attention_heads: int = 20,
        cross_attention_head_dim: int = 112,
        cross_attention_dim: int = 2240,
        caption_channels: int = 2304,
        mlp_ratio: float = 2.5,
        dropout: float = 0.0,
        attention_bias: bool = False,
        sample_size: int = 32,
        patch_size: int = 1,
        norm_elementwise_affine: bool = False,
        norm_eps: float = 1e-6,
        interpolation_scale: float | None = None,
        guidance_embeds: bool = False,
        guidance_embeds_scale: float = 0.1,
        qk_norm: str | None = None,
        timestep_scale: float = 1.0,
    ):
        super().__init__()
        channels = self._build_trunk(self.config)
        self.input_block = zero_linear(channels, channels)
        self.controlnet_blocks = nn.LayerList([zero_linear(channels, channels) for _ in range(num_layers)])

    @classmethod
    def from_transformer(cls, transformer: SanaTransformer2DModel, num_layers: int = 7) -> Self:
        """A trainable float32 ControlNet that starts as a copy of the first blocks, projections at zero.

        ValueError if the transformer has too few blocks: each sample is added after another block than the first.
        """
        blocks = transformer.config.num_layers
        if not 0 < num_layers < blocks:
            raise ValueError(
                f"num_layers must lie in 1..{blocks - 1} for a transformer of {blocks} blocks, not {num_layers}"
            )
        model = cls.from_config({**own_config(transformer), "num_layers": num_layers})
        copy_shared(transformer, model)
        return model

    def forward(
        self,
        hidden_states: paddle.Tensor,
        encoder_hidden_states: paddle.Tensor,
        timestep: paddle.Tensor,
        controlnet_cond: paddle.Tensor,
        conditioning_scale: float = 1.0,
        encoder_attention_mask: paddle.Tensor | None = None,
        attention_mask: paddle.Tensor | None = None,
        attention_kwargs: Mapping | None = None,
        return_dict: bool = True,
        guidance: paddle.Tensor | None = None,
    ) -> SanaControlNetOutput | tuple[list[paddle.Tensor]]:
        """Control samples for `SanaTransformer2DModel.forward`, which documents the arguments not named here.

        Args:
            controlnet_cond: control image as latents [B, in_channels, H, W], encoded as images are.
            conditioning_scale: multiplies the samples.
            return_dict: return a `SanaControlNetOutput` rather than a tuple.

        Returns:
            A sample [B, L, C] for each block, as `.controlnet_block_samples` or as the only element of a tuple.
        """
        refuse_unsupported(attention_mask, attention_kwargs)
        height = hidden_states.shape[2] // self.config.patch_size
        modulation, _ = self.embed_conditioning(timestep, guidance)
        text = self.embed_text(encoder_hidden_states, encoder_attention_mask)
        control = self.patch_embed(controlnet_cond.astype(hidden_states.dtype))
        tokens = self.patch_embed(hidden_states) + self.input_block(control)
        samples = []
        for index, projection in enumerate(self.controlnet_blocks):
            tokens = self.run_block(index, tokens, text, modulation, height)
            samples.append(projection(tokens) * conditioning_scale)
        return SanaControlNetOutput(controlnet_block_samples=samples) if return_dict else (samples,)
