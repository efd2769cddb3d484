"""The Qwen-Image transformer (Wu et al. 2025, arXiv 2508.02324): a double-stream MM-DiT of packed latents and text.

Sizes in shapes: B batch, L image tokens, T text tokens, C inner channels (heads * head size).
"""

from collections.abc import Mapping, Sequence

import paddle
import paddle.nn.functional as F
from paddle import nn
from ppdiffusers.configuration_utils import register_to_config
from ppdiffusers.models.transformer_2d import Transformer2DModelOutput

from fast_diffusers.errors import UserError
from fast_diffusers.models.base import PretrainedModel
from fast_diffusers.models.joint_attention import MASKED, JointAttention, refuse_attention_kwargs
from fast_diffusers.models.layers import (
    AdaLayerNorm,
    EmbeddingMLP,
    FeedForward,
    RMSNorm,
    Rope,
    at_least_float32,
    float16_clip,
    layer_norm,
    modulate,
    per_token,
    rope_tables,
    sinusoid,
    zero_linear,
)

Grid = tuple[int, int, int]


class QwenImageTimeEmbedding(nn.Layer):
    """Embedded time [B, C]."""

    def __init__(self, channels: int):
        super().__init__()
        self.timestep_embedder = EmbeddingMLP(256, channels)

    def forward(self, timestep: paddle.Tensor, dtype: paddle.dtype) -> paddle.Tensor:
        """Time [B], 1 = noise, to an embedding of type `dtype`; the sinusoid is float32."""
        return self.timestep_embedder(sinusoid(at_least_float32(timestep) * 1000.0).astype(dtype))


class QwenImageTransformerBlock(nn.Layer):
    """Double-stream block: image and text have their own weights and meet in attention."""

    def __init__(self, channels: int, num_heads: int):
        super().__init__()
        self.img_mod = nn.Sequential(nn.Silu(), zero_linear(channels, 6 * channels))
        self.txt_mod = nn.Sequential(nn.Silu(), zero_linear(channels, 6 * channels))
        self.attn = JointAttention(channels, num_heads)
        self.img_mlp = FeedForward(channels)
        self.txt_mlp = FeedForward(channels)

    def forward(
        self,
        hidden_states: paddle.Tensor,
        encoder_hidden_states: paddle.Tensor,
        temb: paddle.Tensor,
        image_rotary_emb: Rope,
        bias: paddle.Tensor | None = None,
    ) -> tuple[paddle.Tensor, paddle.Tensor]:
        """Image [B, L, C], text [B, T, C], time [B, C], rotary tables and bias of [text; image] -> (text, image)."""
        shift, scale, gate, *image_mlp = self.img_mod(temb).chunk(6, axis=-1)
        text_shift, text_scale, text_gate, *text_mlp = self.txt_mod(temb).chunk(6, axis=-1)
        image, text = self.attn(
            modulate(layer_norm(hidden_states), shift, scale),
            modulate(layer_norm(encoder_hidden_states), text_shift, text_scale),
            image_rotary_emb,
            bias,
        )
        hidden_states = hidden_states + image * per_token(gate, image)
        encoder_hidden_states = encoder_hidden_states + text * per_token(text_gate, text)
        hidden_states = _feed_forward(self.img_mlp, hidden_states, *image_mlp)
        encoder_hidden_states = _feed_forward(self.txt_mlp, encoder_hidden_states, *text_mlp)
        return float16_clip(encoder_hidden_states), float16_clip(hidden_states)


class QwenImageTransformer2DModel(PretrainedModel):
    """Qwen-Image transformer; arguments, parameter names and results are those of HF diffusers' class of the same name.

    A new model predicts zero (adaLN-zero and a zero output layer), the usual start of training.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        patch_size: int = 2,
        in_channels: int = 64,
        out_channels: int | None = 16,
        num_layers: int = 60,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 3584,
        guidance_embeds: bool = False,
        axes_dims_rope: Sequence[int] = (16, 56, 56),
        zero_cond_t: bool = False,
        use_additional_t_cond: bool = False,
        use_layer3d_rope: bool = False,
    ):
        super().__init__()
        variants = dict(
            guidance_embeds=guidance_embeds,
            zero_cond_t=zero_cond_t,
            use_additional_t_cond=use_additional_t_cond,
            use_layer3d_rope=use_layer3d_rope,
        )
        if any(variants.values()):
            names = ", ".join(name for name, chosen in variants.items() if chosen)
            raise UserError(f"Qwen-Image variants with {names} are not supported: use a text-to-image checkpoint")
        if sum(axes_dims_rope) != attention_head_dim or any(size % 2 for size in axes_dims_rope):
            raise ValueError(
                f"axes_dims_rope {tuple(axes_dims_rope)} must be even and sum to the head size {attention_head_dim}"
            )
        channels = num_attention_heads * attention_head_dim
        self.axes_dims_rope = tuple(axes_dims_rope)
        self.time_text_embed = QwenImageTimeEmbedding(channels)
        self.txt_norm = RMSNorm(joint_attention_dim)
        self.img_in = nn.Linear(in_channels, channels)
        self.txt_in = nn.Linear(joint_attention_dim, channels)
        self.transformer_blocks = nn.LayerList(
            [QwenImageTransformerBlock(channels, num_attention_heads) for _ in range(num_layers)]
        )
        self.norm_out = AdaLayerNorm(channels, 2)
        self.proj_out = zero_linear(channels, patch_size * patch_size * (out_channels or in_channels))

    def embed_text(self, encoder_hidden_states: paddle.Tensor) -> paddle.Tensor:
        """Text embeddings [B, T, joint_attention_dim] to tokens [B, T, C]."""
        return self.txt_in(self.txt_norm(encoder_hidden_states))

    def embed_positions(self, grids: Sequence[Grid], text_length: int) -> Rope:
        """Rotary tables of the sequence [text; image] for images of the given (frames, rows, columns).

        Rows and columns count from the centre of an image, frames from the image's number. Text lies on the diagonal
        behind the largest image (the paper's MSRoPE, §2.4).
        """
        ids = [_image_ids(grid, number) for number, grid in enumerate(grids)]
        start = max(max(rows // 2, columns // 2) for _, rows, columns in grids)
        text = paddle.arange(text_length, dtype="float32").unsqueeze(-1).expand([-1, 3]) + start
        dtype = "float64" if self.img_in.weight.dtype == paddle.float64 else "float32"
        return rope_tables(paddle.concat([text, *ids], axis=0), self.axes_dims_rope, dtype=dtype)

    def run_blocks(
        self,
        hidden_states: paddle.Tensor,
        encoder_hidden_states: paddle.Tensor,
        temb: paddle.Tensor,
        rope: Rope,
        bias: paddle.Tensor | None = None,
        controlnet_block_samples: Sequence[paddle.Tensor] = (),
    ) -> paddle.Tensor:
        """All blocks: image [B, L, C] and text [B, T, C] -> image."""
        for index, block in enumerate(self.transformer_blocks):
            encoder_hidden_states, hidden_states = self._run_block(
                block, hidden_states, encoder_hidden_states, temb, rope, bias
            )
            if controlnet_block_samples:
                blocks_each = -(-len(self.transformer_blocks) // len(controlnet_block_samples))
                hidden_states = hidden_states + controlnet_block_samples[index // blocks_each]
        return hidden_states

    def project_out(self, hidden_states: paddle.Tensor, temb: paddle.Tensor) -> paddle.Tensor:
        """Image tokens [B, L, C] to the predicted velocity [B, L, patch_size² out_channels]."""
        scale, shift = self.norm_out(temb)
        return self.proj_out(modulate(layer_norm(hidden_states), shift, scale))

    def forward(
        self,
        hidden_states: paddle.Tensor,
        encoder_hidden_states: paddle.Tensor,
        encoder_hidden_states_mask: paddle.Tensor | None,
        timestep: paddle.Tensor,
        img_shapes: Sequence[Grid] | Sequence[Sequence[Grid]],
        txt_seq_lens: Sequence[int] | None = None,
        guidance: paddle.Tensor | None = None,
        attention_kwargs: Mapping | None = None,
        controlnet_block_samples: Sequence[paddle.Tensor] | None = None,
        additional_t_cond: paddle.Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[paddle.Tensor]:
        """Predict the velocity of packed latents.

        Args:
            hidden_states: packed latents [B, L, in_channels].
            encoder_hidden_states: text embeddings [B, T, joint_attention_dim].
            encoder_hidden_states_mask: [B, T], not zero for the text that counts; None is all of it.
            timestep: [B], 1 = noise, 0 = data; negative times too.
            img_shapes: (frames, rows, columns) in tokens of the image, or of each image, of every sample; samples of a
                batch have the same.
            txt_seq_lens: what diffusers 0.3x wants beside the mask. The longest must be T; nothing is read from it.
            guidance, additional_t_cond: for variants that are not supported, must be None.
            attention_kwargs: must be empty; adapters are switched and scaled by `fast_diffusers.lora.active`.
            controlnet_block_samples: image tokens [B, L, C] to add after blocks, each after as many in a row.
            return_dict: return a `Transformer2DModelOutput` rather than a tuple.

        Returns:
            The velocity [B, L, patch_size² out_channels] as `.sample` or as the only element of a tuple.
        """
        refuse_attention_kwargs("attention_kwargs", attention_kwargs)
        if guidance is not None or additional_t_cond is not None:
            raise ValueError("this Qwen-Image model takes neither `guidance` nor `additional_t_cond`")
        grids, text_length = common_grids(img_shapes), encoder_hidden_states.shape[1]
        if paddle.in_dynamic_mode():  # a traced program does not know its sizes
            _check_lengths(grids, hidden_states.shape[1], txt_seq_lens, text_length)
        temb = self.time_text_embed(timestep, hidden_states.dtype)
        image = self.run_blocks(
            self.img_in(hidden_states),
            self.embed_text(encoder_hidden_states),
            temb,
            self.embed_positions(grids, text_length),
            joint_bias(encoder_hidden_states_mask, hidden_states),
            controlnet_block_samples or (),
        )
        sample = self.project_out(image, temb)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)


def common_grids(img_shapes: Sequence) -> list[Grid]:
    """The (frames, rows, columns) of the image, or the images, that all samples of a batch share."""
    shapes = img_shapes.tolist() if isinstance(img_shapes, paddle.Tensor) else img_shapes
    samples = []
    for sample in shapes:
        images = [sample] if isinstance(sample[0], int) else sample
        samples.append([tuple(grid) for grid in images])
    if any(sample != samples[0] for sample in samples):
        raise ValueError(f"img_shapes must be the same for all samples of a batch, got {shapes}")
    return samples[0]


def joint_bias(mask: paddle.Tensor | None, image: paddle.Tensor) -> paddle.Tensor | None:
    """A text mask [B, T] as what is added to attention scores of [text; image], [B, 1, 1, T + L]; image [B, L, c]."""
    if mask is None:
        return None
    text = (mask == 0).astype(image.dtype) * MASKED
    return F.pad(text, [0, 0, 0, image.shape[1]]).unsqueeze([1, 2])


def _image_ids(grid: Grid, number: int) -> paddle.Tensor:
    """Positions of an image's tokens, float32 [frames * rows * columns, 3]."""
    frames, rows, columns = grid
    starts = (number, rows // 2 - rows, columns // 2 - columns)
    axes = [paddle.arange(size, dtype="float32") + start for size, start in zip(grid, starts)]  # noqa: B905
    return paddle.stack(paddle.meshgrid(*axes), axis=-1).reshape([frames * rows * columns, 3])


def _check_lengths(
    grids: Sequence[Grid], image_length: int, txt_seq_lens: Sequence[int] | None, text_length: int
) -> None:
    tokens = sum(frames * rows * columns for frames, rows, columns in grids)
    if tokens != image_length:
        raise ValueError(f"img_shapes {grids} are {tokens} tokens, but hidden_states has {image_length}")
    if txt_seq_lens is not None and max(int(length) for length in txt_seq_lens) != text_length:
        raise ValueError(f"the longest of txt_seq_lens must be the text's {text_length} tokens")


def _feed_forward(
    layer: FeedForward, x: paddle.Tensor, shift: paddle.Tensor, scale: paddle.Tensor, gate: paddle.Tensor
) -> paddle.Tensor:
    return x + layer(modulate(layer_norm(x), shift, scale)) * per_token(gate, x)
