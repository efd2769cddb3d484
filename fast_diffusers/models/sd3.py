"""The MM-DiT of Stable Diffusion 3 (Esser et al. 2024, arXiv 2403.03206) and of 3.5: image latents in patches, text.

Sizes in shapes: B batch, L image tokens (patches), T text tokens, C inner channels (heads * head size).
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np
import paddle
from paddle import nn
from ppdiffusers.configuration_utils import register_to_config
from ppdiffusers.models.transformer_2d import Transformer2DModelOutput

from fast_diffusers.errors import UserError
from fast_diffusers.models.base import PretrainedModel
from fast_diffusers.models.checkpoint_io import Checkpoint
from fast_diffusers.models.flux import FluxConditioning
from fast_diffusers.models.joint_attention import JointAttention, refuse_attention_kwargs
from fast_diffusers.models.layers import (
    AdaLayerNorm,
    FeedForward,
    RMSNorm,
    attend,
    float16_clip,
    layer_norm,
    modulate,
    per_token,
    split_heads,
    zero_linear,
)


def position_table(size: int, channels: int, base_size: int) -> np.ndarray:
    """Sine-cosine position embedding of a size x size grid of patches, float32 [1, size * size, channels].

    Positions run in units of size / base_size, which spread a grid of the training size base_size over the table. The
    first half of the channels embeds the column, the second the row, each as [sin, cos].
    """
    if channels % 4:
        raise ValueError(f"a position table needs a multiple of four channels, got {channels}")
    frequency = 1.0 / 10000 ** (np.arange(channels // 4) / (channels / 4))
    angle = np.outer(np.arange(size) / (size / base_size), frequency)
    axis = np.concatenate([np.sin(angle), np.cos(angle)], axis=-1)
    column = np.broadcast_to(axis, [size, size, channels // 2])
    table = np.concatenate([column, column.swapaxes(0, 1)], axis=-1)
    return table.reshape(1, size * size, channels).astype(np.float32)


class PatchEmbedding(nn.Layer):
    """Latents [B, c, H, W] to tokens [B, L, C], to which the centre of a fixed table of positions is added.

    The table is a buffer that checkpoints hold, so that a model keeps the one that it was trained with.
    """

    def __init__(self, in_channels: int, channels: int, patch_size: int, sample_size: int, max_size: int):
        super().__init__()
        self.patch_size, self.max_size = patch_size, max_size
        self.proj = nn.Conv2D(in_channels, channels, patch_size, stride=patch_size)
        table = position_table(max_size, channels, sample_size // patch_size)
        self.register_buffer("pos_embed", paddle.to_tensor(table))

    def forward(self, latents: paddle.Tensor) -> paddle.Tensor:
        tokens = self.proj(latents).flatten(2).transpose([0, 2, 1])
        rows, columns = latents.shape[2] // self.patch_size, latents.shape[3] // self.patch_size
        return (tokens + self.positions(rows, columns)).astype(tokens.dtype)

    def positions(self, rows: int, columns: int) -> paddle.Tensor:
        """The middle rows x columns of the table, [1, rows * columns, C]."""
        top, left = (self.max_size - rows) // 2, (self.max_size - columns) // 2
        table = self.pos_embed.reshape([1, self.max_size, self.max_size, -1])
        return table[:, top : top + rows, left : left + columns].flatten(1, 2)


class SelfAttention(nn.Layer):
    """Attention of the image to itself, the second one of SD3.5's dual blocks."""

    def __init__(self, channels: int, num_heads: int, qk_norm: bool):
        super().__init__()
        self.num_heads, self.qk_norm = num_heads, qk_norm
        if qk_norm:
            self.norm_q = RMSNorm(channels // num_heads)
            self.norm_k = RMSNorm(channels // num_heads)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.LayerList([nn.Linear(channels, channels)])

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        query, key, value = (split_heads(project(x), self.num_heads) for project in (self.to_q, self.to_k, self.to_v))
        if self.qk_norm:
            query, key = self.norm_q(query), self.norm_k(key)
        return self.to_out[0](attend(query, key, value))


NORM_BIASES = ("norm_out.norm.bias", "norm1_context.norm.bias")
"""What only ppdiffusers' transformer has."""


class SD3TransformerBlock(nn.Layer):
    """Image and text have their own weights and meet in attention.

    Args:
        qk_norm: RMS-normalise queries and keys (SD3.5).
        dual_attention: a second attention of the image to itself, beside the joint one (SD3.5 medium).
        text_output: false in the last block, which reads the text and leaves it as it is.
    """

    def __init__(self, channels: int, num_heads: int, qk_norm: bool, dual_attention: bool, text_output: bool):
        super().__init__()
        self.dual_attention, self.text_output = dual_attention, text_output
        self.norm1 = AdaLayerNorm(channels, 9 if dual_attention else 6)
        self.norm1_context = AdaLayerNorm(channels, 6 if text_output else 2)
        self.attn = JointAttention(channels, num_heads, qk_norm, text_output)
        if dual_attention:
            self.attn2 = SelfAttention(channels, num_heads, qk_norm)
        self.ff = FeedForward(channels)
        if text_output:
            self.ff_context = FeedForward(channels)

    def forward(
        self, hidden_states: paddle.Tensor, encoder_hidden_states: paddle.Tensor, temb: paddle.Tensor
    ) -> tuple[paddle.Tensor, paddle.Tensor]:
        """Image [B, L, C], text [B, T, C], conditioning [B, C] -> (text, image)."""
        image, text = hidden_states, encoder_hidden_states
        vectors = self.norm1(temb)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = vectors[:6]
        text_vectors = self.norm1_context(temb)
        # A norm without gates holds its two vectors in the other order.
        text_shift, text_scale = text_vectors[:2] if self.text_output else text_vectors[::-1]
        normed = layer_norm(image)
        image_out, text_out = self.attn(
            modulate(normed, shift, scale), modulate(layer_norm(text), text_shift, text_scale)
        )
        image = image + image_out * per_token(gate, image)
        if self.dual_attention:
            shift, scale, gate = vectors[6:]
            image = image + self.attn2(modulate(normed, shift, scale)) * per_token(gate, image)
        image = image + self.ff(modulate(layer_norm(image), mlp_shift, mlp_scale)) * per_token(mlp_gate, image)
        if self.text_output:
            gate, mlp_shift, mlp_scale, mlp_gate = text_vectors[2:]
            text = text + text_out * per_token(gate, text)
            text = text + self.ff_context(modulate(layer_norm(text), mlp_shift, mlp_scale)) * per_token(mlp_gate, text)
        return float16_clip(text), float16_clip(image)


class SD3Transformer2DModel(PretrainedModel):
    """Transformer of SD3 and SD3.5; arguments, parameter names and results are those of HF diffusers' class.

    A new model predicts zero (adaLN-zero and a zero output layer), the usual start of training.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        sample_size: int = 128,
        patch_size: int = 2,
        in_channels: int = 16,
        num_layers: int = 18,
        attention_head_dim: int = 64,
        num_attention_heads: int = 18,
        joint_attention_dim: int = 4096,
        caption_projection_dim: int = 1152,
        pooled_projection_dim: int = 2048,
        out_channels: int | None = 16,
        pos_embed_max_size: int = 96,
        dual_attention_layers: Sequence[int] = (),
        qk_norm: str | None = None,
    ):
        super().__init__()
        channels = num_attention_heads * attention_head_dim
        if caption_projection_dim != channels:
            raise ValueError(f"caption_projection_dim {caption_projection_dim} must be heads * head size, {channels}")
        if qk_norm not in (None, "rms_norm"):
            raise ValueError(f"unknown qk_norm {qk_norm!r}: choose None or 'rms_norm'")
        self.patch_size, self.out_channels = patch_size, out_channels or in_channels
        self.pos_embed = PatchEmbedding(in_channels, channels, patch_size, sample_size, pos_embed_max_size)
        self.time_text_embed = FluxConditioning(channels, pooled_projection_dim, guidance_embeds=False)
        self.context_embedder = nn.Linear(joint_attention_dim, caption_projection_dim)
        self.transformer_blocks = nn.LayerList(
            [
                SD3TransformerBlock(
                    channels,
                    num_attention_heads,
                    qk_norm=qk_norm is not None,
                    dual_attention=layer in dual_attention_layers,
                    text_output=layer < num_layers - 1,
                )
                for layer in range(num_layers)
            ]
        )
        self.norm_out = AdaLayerNorm(channels, 2)
        self.proj_out = zero_linear(channels, patch_size * patch_size * self.out_channels)

    def embed_conditioning(self, timestep: paddle.Tensor, pooled_projections: paddle.Tensor) -> paddle.Tensor:
        """Conditioning vector [B, C] of time [B] in 0..1000, embedded in float32, and pooled text [B, P]."""
        return self.time_text_embed(timestep, None, pooled_projections)

    def run_blocks(
        self,
        hidden_states: paddle.Tensor,
        encoder_hidden_states: paddle.Tensor,
        temb: paddle.Tensor,
        block_controlnet_hidden_states: Sequence[paddle.Tensor] = (),
        skip_layers: Collection[int] = (),
    ) -> paddle.Tensor:
        """All blocks: image [B, L, C] and text [B, T, C] -> image."""
        count = len(self.transformer_blocks)
        for index, block in enumerate(self.transformer_blocks):
            if index not in skip_layers:
                encoder_hidden_states, hidden_states = self._run_block(
                    block, hidden_states, encoder_hidden_states, temb
                )
            if block_controlnet_hidden_states and index < count - 1:
                residual = block_controlnet_hidden_states[index * len(block_controlnet_hidden_states) // count]
                hidden_states = hidden_states + residual
        return hidden_states

    def project_out(self, hidden_states: paddle.Tensor, temb: paddle.Tensor, rows: int, columns: int) -> paddle.Tensor:
        """Image tokens [B, rows * columns, C] to the velocity [B, out_channels, H, W]."""
        scale, shift = self.norm_out(temb)
        patches = self.proj_out(modulate(layer_norm(hidden_states), shift, scale))
        patches = patches.reshape([-1, rows, columns, self.patch_size, self.patch_size, self.out_channels])
        return patches.transpose([0, 5, 1, 3, 2, 4]).flatten(4, 5).flatten(2, 3)

    def forward(
        self,
        hidden_states: paddle.Tensor,
        encoder_hidden_states: paddle.Tensor,
        pooled_projections: paddle.Tensor,
        timestep: paddle.Tensor,
        block_controlnet_hidden_states: Sequence[paddle.Tensor] | None = None,
        joint_attention_kwargs: Mapping | None = None,
        return_dict: bool = True,
        skip_layers: Collection[int] | None = None,
    ) -> Transformer2DModelOutput | tuple[paddle.Tensor]:
        """Predict the velocity of latents.

        Args:
            hidden_states: latents [B, in_channels, H, W]; H and W in whole patches, up to `pos_embed_max_size` of them.
            encoder_hidden_states: text embeddings [B, T, joint_attention_dim].
            pooled_projections: pooled text embedding [B, pooled_projection_dim].
            timestep: [B], 1000 = noise, 0 = data; any number type, fractions and negative times too.
            block_controlnet_hidden_states: image tokens [B, L, C] to add after blocks, spread evenly over them.
            joint_attention_kwargs: must be empty; adapters are switched and scaled by `fast_diffusers.lora.active`.
            return_dict: return a `Transformer2DModelOutput` rather than a tuple.
            skip_layers: numbers of blocks to leave out (skip-layer guidance).

        Returns:
            The velocity [B, out_channels, H, W] as `.sample` or as the only element of a tuple.
        """
        refuse_attention_kwargs("joint_attention_kwargs", joint_attention_kwargs)
        height, width = hidden_states.shape[2:]
        if paddle.in_dynamic_mode():  # a traced program does not know its sizes
            self._check_size(height, width)
        rows, columns = height // self.patch_size, width // self.patch_size
        temb = self.embed_conditioning(timestep, pooled_projections)
        image = self.run_blocks(
            self.pos_embed(hidden_states),
            self.context_embedder(encoder_hidden_states),
            temb,
            block_controlnet_hidden_states or (),
            skip_layers or (),
        )
        sample = self.project_out(image, temb, rows, columns)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    @classmethod
    def _adapt_checkpoint(cls, checkpoint: Checkpoint) -> Checkpoint:
        """ppdiffusers' model has biases in norms that are modulated right after; they are zero unless trained there."""
        surplus = {name: stored for name, stored in checkpoint.tensors.items() if name.endswith(NORM_BIASES)}
        if trained := [name for name, stored in surplus.items() if stored.floats().any()]:
            raise UserError(
                f"{checkpoint.folder} holds a model that was trained in ppdiffusers with biases that {cls.__name__} "
                f"has not, {' and '.join(trained)}: load it with ppdiffusers, whose model runs here as well"
            )
        return replace(checkpoint, tensors={k: v for k, v in checkpoint.tensors.items() if k not in surplus})

    def _check_size(self, height: int, width: int) -> None:
        size, limit = self.patch_size, self.patch_size * self.pos_embed.max_size
        if height % size or width % size or max(height, width) > limit:
            raise ValueError(
                f"latents of {height} x {width} do not fit this SD3 model: it takes multiples of {size} up to {limit}"
            )
