"""The FLUX transformer (Black Forest Labs, 2024): a rectified-flow model of packed image latents, conditioned on text.

Sizes in shapes: B batch, L image tokens, T text tokens, C inner channels (heads * head size).
"""

from collections.abc import Mapping, Sequence

import paddle
import paddle.nn.functional as F
from paddle import nn
from ppdiffusers.configuration_utils import register_to_config
from ppdiffusers.models.transformer_2d import Transformer2DModelOutput

from fast_diffusers.models.base import PretrainedModel
from fast_diffusers.models.joint_attention import JointAttention, refuse_attention_kwargs
from fast_diffusers.models.layers import (
    AdaLayerNorm,
    EmbeddingMLP,
    FeedForward,
    RMSNorm,
    Rope,
    apply_rope,
    attend,
    float16_clip,
    layer_norm,
    modulate,
    per_token,
    rope_tables,
    sinusoid,
    split_heads,
    zero_linear,
)


class FluxAttention(nn.Layer):
    """Self-attention with RMS-normalised, rotated queries and keys, heads joined and not projected."""

    def __init__(self, channels: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm_q = RMSNorm(channels // num_heads)
        self.norm_k = RMSNorm(channels // num_heads)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)

    def forward(self, x: paddle.Tensor, image_rotary_emb: Rope) -> paddle.Tensor:
        """One sequence [B, N, C] to [B, N, C]."""
        query, key, value = (split_heads(project(x), self.num_heads) for project in (self.to_q, self.to_k, self.to_v))
        query, key = apply_rope(self.norm_q(query), image_rotary_emb), apply_rope(self.norm_k(key), image_rotary_emb)
        return attend(query, key, value)


class FluxTransformerBlock(nn.Layer):
    """Double-stream block: image and text have their own weights and meet in attention."""

    def __init__(self, channels: int, num_heads: int):
        super().__init__()
        self.norm1 = AdaLayerNorm(channels, 6)
        self.norm1_context = AdaLayerNorm(channels, 6)
        self.attn = JointAttention(channels, num_heads)
        self.ff = FeedForward(channels)
        self.ff_context = FeedForward(channels)

    def forward(
        self,
        hidden_states: paddle.Tensor,
        encoder_hidden_states: paddle.Tensor,
        temb: paddle.Tensor,
        image_rotary_emb: Rope,
    ) -> tuple[paddle.Tensor, paddle.Tensor]:
        """Image [B, L, C], text [B, T, C], conditioning [B, C], rotary tables of text then image -> (text, image)."""
        shift, scale, gate, *image_mlp = self.norm1(temb)
        text_shift, text_scale, text_gate, *text_mlp = self.norm1_context(temb)
        image, text = self.attn(
            modulate(layer_norm(hidden_states), shift, scale),
            modulate(layer_norm(encoder_hidden_states), text_shift, text_scale),
            image_rotary_emb,
        )
        hidden_states = hidden_states + image * per_token(gate, image)
        encoder_hidden_states = encoder_hidden_states + text * per_token(text_gate, text)
        hidden_states = self._feed_forward(self.ff, hidden_states, *image_mlp)
        encoder_hidden_states = self._feed_forward(self.ff_context, encoder_hidden_states, *text_mlp)
        return float16_clip(encoder_hidden_states), hidden_states

    @staticmethod
    def _feed_forward(
        layer: FeedForward, x: paddle.Tensor, shift: paddle.Tensor, scale: paddle.Tensor, gate: paddle.Tensor
    ) -> paddle.Tensor:
        return x + layer(modulate(layer_norm(x), shift, scale)) * per_token(gate, x)


class FluxSingleTransformerBlock(nn.Layer):
    """Single-stream block: attention and MLP side by side over the joint sequence [text; image]."""

    def __init__(self, channels: int, num_heads: int, mlp_ratio: int = 4):
        super().__init__()
        self.norm = AdaLayerNorm(channels, 3)
        self.attn = FluxAttention(channels, num_heads)
        self.proj_mlp = nn.Linear(channels, mlp_ratio * channels)
        self.proj_out = nn.Linear((mlp_ratio + 1) * channels, channels)

    def forward(self, hidden_states: paddle.Tensor, temb: paddle.Tensor, image_rotary_emb: Rope) -> paddle.Tensor:
        """Joint sequence [B, T + L, C], conditioning [B, C], rotary tables -> joint sequence."""
        shift, scale, gate = self.norm(temb)
        x = modulate(layer_norm(hidden_states), shift, scale)
        mlp = F.gelu(self.proj_mlp(x), approximate=True)
        x = self.proj_out(paddle.concat([self.attn(x, image_rotary_emb), mlp], axis=-1))
        return float16_clip(hidden_states + x * per_token(gate, x))


class FluxConditioning(nn.Layer):
    """Conditioning vector [B, C] = embedded time + embedded pooled text (+ embedded guidance scale)."""

    def __init__(self, channels: int, pooled_size: int, guidance_embeds: bool):
        super().__init__()
        self.timestep_embedder = EmbeddingMLP(256, channels)
        if guidance_embeds:
            self.guidance_embedder = EmbeddingMLP(256, channels)
        self.guidance_embeds = guidance_embeds
        self.text_embedder = EmbeddingMLP(pooled_size, channels)

    def forward(
        self, timestep: paddle.Tensor, guidance: paddle.Tensor | None, pooled_projections: paddle.Tensor
    ) -> paddle.Tensor:
        dtype = pooled_projections.dtype
        temb = self.timestep_embedder(sinusoid(timestep).astype(dtype))
        if self.guidance_embeds:
            temb = temb + self.guidance_embedder(sinusoid(guidance).astype(dtype))
        return temb + self.text_embedder(pooled_projections)


class FluxTransformer2DModel(PretrainedModel):
    """FLUX.1 transformer; arguments, parameter names and results are those of HF diffusers' class of the same name.

    A new model predicts zero (adaLN-zero and a zero output layer), the usual start of training.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        patch_size: int = 1,
        in_channels: int = 64,
        out_channels: int | None = None,
        num_layers: int = 19,
        num_single_layers: int = 38,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 4096,
        pooled_projection_dim: int = 768,
        guidance_embeds: bool = False,
        axes_dims_rope: Sequence[int] = (16, 56, 56),
    ):
        super().__init__()
        if sum(axes_dims_rope) != attention_head_dim or any(size % 2 for size in axes_dims_rope):
            raise ValueError(
                f"axes_dims_rope {tuple(axes_dims_rope)} must be even and sum to the head size {attention_head_dim}"
            )
        channels = num_attention_heads * attention_head_dim
        self.axes_dims_rope = tuple(axes_dims_rope)
        self.time_text_embed = FluxConditioning(channels, pooled_projection_dim, guidance_embeds)
        self.context_embedder = nn.Linear(joint_attention_dim, channels)
        self.x_embedder = nn.Linear(in_channels, channels)
        self.transformer_blocks = nn.LayerList(
            [FluxTransformerBlock(channels, num_attention_heads) for _ in range(num_layers)]
        )
        self.single_transformer_blocks = nn.LayerList(
            [FluxSingleTransformerBlock(channels, num_attention_heads) for _ in range(num_single_layers)]
        )
        self.norm_out = AdaLayerNorm(channels, 2)
        self.proj_out = zero_linear(channels, patch_size * patch_size * (out_channels or in_channels))

    def embed_conditioning(
        self, timestep: paddle.Tensor, guidance: paddle.Tensor | None, pooled_projections: paddle.Tensor
    ) -> paddle.Tensor:
        """Conditioning vector [B, C] of time [B] in [0, 1], guidance scale [B] and pooled text [B, P].

        Both scalars are multiplied by 1000 and embedded in float32, whatever the model's dtype.
        """
        if (guidance is not None) != self.time_text_embed.guidance_embeds:
            needed = "needs" if guidance is None else "does not take"
            raise ValueError(
                f"this FLUX model {needed} `guidance` (guidance_embeds={self.time_text_embed.guidance_embeds})"
            )
        guidance = None if guidance is None else _thousandfold(guidance)
        return self.time_text_embed(_thousandfold(timestep), guidance, pooled_projections)

    def embed_positions(self, txt_ids: paddle.Tensor, img_ids: paddle.Tensor) -> Rope:
        """Rotary tables of the joint sequence from txt_ids [T, 3] and img_ids [L, 3]."""
        ids = paddle.concat([txt_ids.astype("float32"), img_ids.astype("float32")], axis=0)
        dtype = "float64" if self.x_embedder.weight.dtype == paddle.float64 else "float32"
        return rope_tables(ids, self.axes_dims_rope, dtype=dtype)

    def run_double_blocks(
        self, hidden_states: paddle.Tensor, encoder_hidden_states: paddle.Tensor, temb: paddle.Tensor, rope: Rope
    ) -> tuple[paddle.Tensor, paddle.Tensor]:
        """All double-stream blocks: image [B, L, C] and text [B, T, C] -> (text, image)."""
        for block in self.transformer_blocks:
            encoder_hidden_states, hidden_states = self._run_block(
                block, hidden_states, encoder_hidden_states, temb, rope
            )
        return encoder_hidden_states, hidden_states

    def run_single_blocks(self, hidden_states: paddle.Tensor, temb: paddle.Tensor, rope: Rope) -> paddle.Tensor:
        """All single-stream blocks over the joint sequence [B, T + L, C]."""
        for block in self.single_transformer_blocks:
            hidden_states = self._run_block(block, hidden_states, temb, rope)
        return hidden_states

    def project_out(self, hidden_states: paddle.Tensor, temb: paddle.Tensor) -> paddle.Tensor:
        """Image tokens [B, L, C] to the predicted velocity [B, L, out_channels]."""
        scale, shift = self.norm_out(temb)
        return self.proj_out(modulate(layer_norm(hidden_states), shift, scale))

    def forward(
        self,
        hidden_states: paddle.Tensor,
        encoder_hidden_states: paddle.Tensor,
        pooled_projections: paddle.Tensor,
        timestep: paddle.Tensor,
        img_ids: paddle.Tensor,
        txt_ids: paddle.Tensor,
        guidance: paddle.Tensor | None = None,
        joint_attention_kwargs: Mapping | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[paddle.Tensor]:
        """Predict the velocity of packed latents.

        Args:
            hidden_states: packed latents [B, L, in_channels].
            encoder_hidden_states: text embeddings [B, T, joint_attention_dim].
            pooled_projections: pooled text embedding [B, pooled_projection_dim].
            timestep: [B], 1 = noise, 0 = data.
            img_ids: positions of image tokens [L, 3] (zero, row, column).
            txt_ids: positions of text tokens [T, 3] (zeros).
            guidance: distilled guidance scale [B], exactly for models with `guidance_embeds`.
            joint_attention_kwargs: must be empty; adapters are switched and scaled by `fast_diffusers.lora.active`.
            return_dict: return a `Transformer2DModelOutput` rather than a tuple.

        Returns:
            The velocity [B, L, out_channels] as `.sample` or as the only element of a tuple.
        """
        refuse_attention_kwargs("joint_attention_kwargs", joint_attention_kwargs)
        temb = self.embed_conditioning(timestep, guidance, pooled_projections)
        rope = self.embed_positions(txt_ids, img_ids)
        text, image = self.run_double_blocks(
            self.x_embedder(hidden_states), self.context_embedder(encoder_hidden_states), temb, rope
        )
        joint = self.run_single_blocks(paddle.concat([text, image], axis=1), temb, rope)
        sample = self.project_out(joint[:, text.shape[1] :], temb)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)


def _thousandfold(x: paddle.Tensor) -> paddle.Tensor:
    return (x if x.dtype == paddle.float64 else x.astype("float32")) * 1000.0
