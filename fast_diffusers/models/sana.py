"""The SANA transformer (Xie et al. 2024, arXiv 2410.10629) and SANA-Sprint's (Chen et al. 2025, arXiv 2503.09641).

Linear attention over image latents, cross-attention to text, convolutional feed-forward layers instead of positions.
Sizes in shapes: B batch, L image tokens (h rows, w columns), T text tokens, C inner channels (heads * head size).
"""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import paddle
import paddle.nn.functional as F
from paddle import nn
from ppdiffusers.configuration_utils import register_to_config
from ppdiffusers.models.transformer_2d import Transformer2DModelOutput

from fast_diffusers.models.base import PretrainedModel
from fast_diffusers.models.checkpoint_io import Checkpoint
from fast_diffusers.models.joint_attention import refuse_attention_kwargs
from fast_diffusers.models.layers import (
    EmbeddingMLP,
    GLUMBConv,
    RMSNorm,
    attend,
    float16_clip,
    layer_norm,
    modulate,
    per_token,
    relu_attend,
    sinusoid,
    split_heads,
    zero_linear,
)
from fast_diffusers.models.sana_original import is_original, split_stored

QK_NORMS = (None, "rms_norm_across_heads")
MASKED = -10000.0


class SanaAttention(nn.Layer):
    """Projections of one attention layer; `qk_norm` normalises queries and keys over all heads at once."""

    def __init__(self, channels: int, num_heads: int, head_size: int, source_channels: int, bias: bool, qk_norm: bool):
        super().__init__()
        self.num_heads = num_heads
        inner, bias_attr = num_heads * head_size, None if bias else False
        self.norm_q = RMSNorm(inner, epsilon=1e-5) if qk_norm else nn.Identity()
        self.norm_k = RMSNorm(inner, epsilon=1e-5) if qk_norm else nn.Identity()
        self.to_q = nn.Linear(channels, inner, bias_attr=bias_attr)
        self.to_k = nn.Linear(source_channels, inner, bias_attr=bias_attr)
        self.to_v = nn.Linear(source_channels, inner, bias_attr=bias_attr)
        self.to_out = nn.LayerList([nn.Linear(inner, channels)])

    def _qkv(self, x: paddle.Tensor, source: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor, paddle.Tensor]:
        return self.norm_q(self.to_q(x)), self.norm_k(self.to_k(source)), self.to_v(source)


class SanaLinearAttention(SanaAttention):
    """Linear self-attention of image tokens."""

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        """[B, L, C] to [B, L, C]."""
        query, key, value = (
            part.transpose([0, 2, 1]).reshape([0, self.num_heads, part.shape[-1] // self.num_heads, -1])
            for part in self._qkv(x, x)
        )
        out = relu_attend(query, key, value).flatten(1, 2).transpose([0, 2, 1])
        return float16_clip(self.to_out[0](out))


class SanaCrossAttention(SanaAttention):
    """Softmax attention of image tokens to text tokens."""

    def forward(self, x: paddle.Tensor, text: paddle.Tensor, bias: paddle.Tensor | None) -> paddle.Tensor:
        """[B, L, C], text [B, T, C'] and what to add to scores [B, 1, 1, T] -> [B, L, C]."""
        query, key, value = (split_heads(part, self.num_heads) for part in self._qkv(x, text))
        return self.to_out[0](attend(query, key, value, bias))


class SanaTransformerBlock(nn.Layer):
    """Modulated linear attention, cross-attention without modulation, modulated convolutional feed-forward."""

    def __init__(self, channels: int, config: Mapping[str, Any]):
        super().__init__()
        qk_norm = config["qk_norm"] is not None
        self.epsilon = config["norm_eps"]
        self.attn1 = SanaLinearAttention(
            channels,
            config["num_attention_heads"],
            config["attention_head_dim"],
            channels,
            bias=config["attention_bias"],
            qk_norm=qk_norm,
        )
        self.attn2 = SanaCrossAttention(
            channels,
            config["num_cross_attention_heads"],
            config["cross_attention_head_dim"],
            config["cross_attention_dim"],
            bias=True,
            qk_norm=qk_norm,
        )
        self.ff = GLUMBConv(channels, config["mlp_ratio"])
        self.scale_shift_table = _modulation_table(self, 6, channels)

    def forward(
        self,
        hidden_states: paddle.Tensor,
        encoder_hidden_states: paddle.Tensor,
        bias: paddle.Tensor | None,
        modulation: paddle.Tensor,
        height: int,
    ) -> paddle.Tensor:
        """Image [B, L, C], text [B, T, C], its bias [B, 1, 1, T], modulation [B, 6 C], rows h of the image -> image."""
        x = hidden_states
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = _modulation_vectors(
            self.scale_shift_table, modulation.reshape([0, 6, -1])
        )
        attended = self.attn1(modulate(layer_norm(x, self.epsilon), shift, scale))
        x = x + attended * per_token(gate, x)
        x = x + self.attn2(x, encoder_hidden_states, bias)
        mixed = self.ff.on_tokens(modulate(layer_norm(x, self.epsilon), mlp_shift, mlp_scale), height)
        return x + mixed * per_token(mlp_gate, x)


class SanaPatchEmbed(nn.Layer):
    """Patches of an image to tokens; models for more than 2K pixels add fixed positions (`interpolation_scale`)."""

    def __init__(self, in_channels: int, channels: int, config: Mapping[str, Any]):
        super().__init__()
        self.proj = nn.Conv2D(in_channels, channels, config["patch_size"], stride=config["patch_size"])
        self.interpolation_scale = config["interpolation_scale"]
        self.base_size = config["sample_size"] // config["patch_size"]

    def forward(self, image: paddle.Tensor) -> paddle.Tensor:
        """[B, in, H, W] to [B, L, C]."""
        patches = self.proj(image)
        tokens = patches.flatten(2).transpose([0, 2, 1])
        if self.interpolation_scale is None:
            return tokens
        spacing = self.base_size / self.interpolation_scale
        table = sincos_table(patches.shape[2], patches.shape[3], tokens.shape[-1], spacing)
        return tokens + table.astype(tokens.dtype)


class SanaTimeEmbedding(nn.Layer):
    """Embedded time and, from it, the modulation shared by all blocks.

    Hooks on the layer `embedded` see and may change the embedded time [B, C] itself.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.emb = nn.LayerDict({"timestep_embedder": EmbeddingMLP(256, channels)})
        self.embedded = nn.Identity()
        self.linear = nn.Linear(channels, 6 * channels, weight_attr=nn.initializer.Normal(std=0.02))

    def forward(self, timestep: paddle.Tensor, guidance: None = None) -> tuple[paddle.Tensor, paddle.Tensor]:
        """Time [B] -> modulation [B, 6 C] and embedded time [B, C]."""
        return self._modulation(_embed_scalar(self.emb["timestep_embedder"], timestep))

    def _modulation(self, temb: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor]:
        temb = self.embedded(temb)
        return self.linear(F.silu(temb)), temb


class SanaTimeGuidanceEmbedding(SanaTimeEmbedding):
    """The same with an embedded guidance scale added to the time.

    The published models have other names here than those without guidance. A new guidance embedder adds zero and has a
    gradient: only its last layer starts at zero.
    """

    def __init__(self, channels: int):
        super().__init__(channels)
        self.timestep_embedder = self.emb.pop("timestep_embedder")
        self.guidance_embedder = EmbeddingMLP(256, channels, zero=True)
        del self.emb

    def forward(self, timestep: paddle.Tensor, guidance: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor]:
        """Time [B] and guidance [B] -> modulation [B, 6 C] and embedded conditions [B, C]."""
        temb = _embed_scalar(self.timestep_embedder, timestep)
        return self._modulation(temb + _embed_scalar(self.guidance_embedder, guidance))


class CaptionProjection(EmbeddingMLP):
    """Linear, tanh-GELU, linear: text embeddings [B, T, in] to [B, T, C]."""

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return self.linear_2(F.gelu(self.linear_1(x), approximate=True))


class SanaTrunk(PretrainedModel):
    """What SANA and its ControlNet share: embeddings of image, time, guidance and text, and the blocks."""

    _supports_gradient_checkpointing = True

    def _build_trunk(self, config: Mapping[str, Any]) -> int:
        """Make the shared layers; returns the inner channels C."""
        channels = config["num_attention_heads"] * config["attention_head_dim"]
        _check_config(config, channels)
        self.patch_embed = SanaPatchEmbed(config["in_channels"], channels, config)
        self.time_embed = (SanaTimeGuidanceEmbedding if config["guidance_embeds"] else SanaTimeEmbedding)(channels)
        self.caption_projection = CaptionProjection(config["caption_channels"], channels)
        self.caption_norm = RMSNorm(channels, epsilon=1e-5, initial=0.01)
        self.transformer_blocks = nn.LayerList(
            [SanaTransformerBlock(channels, config) for _ in range(config["num_layers"])]
        )
        return channels

    def embed_conditioning(
        self, timestep: paddle.Tensor, guidance: paddle.Tensor | None = None
    ) -> tuple[paddle.Tensor, paddle.Tensor]:
        """Time [B] and guidance [B] -> modulation of the blocks [B, 6 C] and embedded conditions [B, C].

        Sines and cosines are taken in float32 (float64 for float64 scalars), whatever the model's dtype.
        """
        guided = isinstance(self.time_embed, SanaTimeGuidanceEmbedding)
        if (guidance is not None) != guided:
            needed = "needs" if guided else "does not take"
            raise ValueError(f"this SANA model {needed} `guidance` (guidance_embeds={guided})")
        return self.time_embed(timestep, guidance)

    def embed_text(
        self, encoder_hidden_states: paddle.Tensor, mask: paddle.Tensor | None
    ) -> tuple[paddle.Tensor, paddle.Tensor | None]:
        """Text [B, T, caption_channels] and its mask [B, T] (1 = keep) or bias [B, 1, T] -> [B, T, C], [B, 1, 1, T]."""
        text = self.caption_norm(self.caption_projection(encoder_hidden_states))
        if mask is None:
            return text, None
        bias = (1 - mask.astype(text.dtype)) * MASKED if mask.ndim == 2 else mask.astype(text.dtype).squeeze(1)
        return text, bias.unsqueeze([1, 2])

    def run_block(
        self,
        index: int,
        hidden_states: paddle.Tensor,
        text: tuple[paddle.Tensor, paddle.Tensor | None],
        modulation: paddle.Tensor,
        height: int,
    ) -> paddle.Tensor:
        """Block `index` on image tokens [B, L, C]; the rest is what the embed_ methods give, and the image's rows."""
        return self._run_block(self.transformer_blocks[index], hidden_states, *text, modulation, height)

    @classmethod
    def _adapt_checkpoint(cls, checkpoint: Checkpoint) -> Checkpoint:
        return split_stored(checkpoint) if is_original(checkpoint.tensors) else checkpoint


class SanaTransformer2DModel(SanaTrunk):
    """SANA transformer; arguments, parameter names and results are those of HF diffusers' class of the same name.

    It also reads checkpoints with the authors' own parameter names. A new model predicts zero.
    `timestep_scale` and `guidance_embeds_scale` tell callers what to multiply times and guidance scales by.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 32,
        out_channels: int | None = 32,
        num_attention_heads: int = 70,
        attention_head_dim: int = 32,
        num_layers: int = 20,
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
        self.out_channels = out_channels or in_channels
        self.scale_shift_table = _modulation_table(self, 2, channels)
        self.proj_out = zero_linear(channels, patch_size * patch_size * self.out_channels)

    @classmethod
    def from_transformer(cls, transformer: Self, **changes: Any) -> Self:
        """A trainable float32 copy of a SANA transformer with some entries of its config changed.

        It makes a student of a teacher, or prepares a teacher: with `guidance_embeds=True` the copy starts as the same
        function; with `qk_norm="rms_norm_across_heads"` or another `timestep_scale` it needs fine-tuning.
        """
        model = cls.from_config({**own_config(transformer), **changes})
        copy_shared(transformer, model)
        return model

    def project_out(self, hidden_states: paddle.Tensor, temb: paddle.Tensor, height: int) -> paddle.Tensor:
        """Image tokens [B, L, C] and embedded conditions [B, C] to the prediction [B, out_channels, H, W]."""
        shift, scale = _modulation_vectors(self.scale_shift_table, temb.unsqueeze(1))
        tokens = self.proj_out(modulate(layer_norm(hidden_states), shift, scale))
        size = self.config.patch_size
        patches = tokens.reshape([0, height, -1, size, size, self.out_channels])
        return patches.transpose([0, 5, 1, 3, 2, 4]).reshape([0, self.out_channels, height * size, -1])

    def forward(
        self,
        hidden_states: paddle.Tensor,
        encoder_hidden_states: paddle.Tensor,
        timestep: paddle.Tensor,
        guidance: paddle.Tensor | None = None,
        encoder_attention_mask: paddle.Tensor | None = None,
        attention_mask: paddle.Tensor | None = None,
        attention_kwargs: Mapping | None = None,
        controlnet_block_samples: Sequence[paddle.Tensor] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[paddle.Tensor]:
        """Predict the velocity of latents (of SANA-Sprint's wrapped latents: its F).

        Args:
            hidden_states: latents [B, in_channels, H, W].
            encoder_hidden_states: text embeddings [B, T, caption_channels].
            timestep: [B], already multiplied by `config.timestep_scale`.
            guidance: [B], already multiplied by `config.guidance_embeds_scale`, exactly for models with
                `guidance_embeds`.
            encoder_attention_mask: mask [B, T], 1 = keep, or what to add to attention scores [B, 1, T].
            attention_mask: must be None; linear attention has no mask.
            attention_kwargs: must be empty; adapters are switched and scaled by `fast_diffusers.lora.active`.
            controlnet_block_samples: what a `SanaControlNetModel` returns; entry i is added to what block i + 1
                gives, as in diffusers (the paper adds it one block earlier).
            return_dict: return a `Transformer2DModelOutput` rather than a tuple.

        Returns:
            The prediction [B, out_channels, H, W] as `.sample` or as the only element of a tuple.
        """
        refuse_unsupported(attention_mask, attention_kwargs)
        controls = list(controlnet_block_samples or ())
        if len(controls) >= len(self.transformer_blocks):
            raise ValueError(
                f"{len(controls)} control samples for {len(self.transformer_blocks)} blocks: the first takes none"
            )
        height = hidden_states.shape[2] // self.config.patch_size
        modulation, temb = self.embed_conditioning(timestep, guidance)
        text = self.embed_text(encoder_hidden_states, encoder_attention_mask)
        tokens = self.patch_embed(hidden_states)
        for index in range(len(self.transformer_blocks)):
            tokens = self.run_block(index, tokens, text, modulation, height)
            if 0 < index <= len(controls):
                tokens = tokens + controls[index - 1].astype(tokens.dtype)
        sample = self.project_out(tokens, temb, height)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)


def own_config(model: SanaTrunk) -> dict[str, Any]:
    """The arguments of a model's constructor, without what ppdiffusers notes beside them (which would undo changes)."""
    return {name: value for name, value in model.config.items() if not name.startswith("_")}


def copy_shared(source: SanaTrunk, target: SanaTrunk) -> None:
    """Copy into `target` all weights that `source` has too, cast to the target's dtype."""
    values = {_unguided_name(name): value for name, value in source.state_dict().items()}
    with paddle.no_grad():
        for name, weight in target.state_dict().items():
            value = values.get(_unguided_name(name))
            if value is not None:
                weight.set_value(value.astype(weight.dtype))


def refuse_unsupported(attention_mask: paddle.Tensor | None, attention_kwargs: Mapping | None) -> None:
    """ValueError for arguments that diffusers' signature has and this implementation does not act on."""
    if attention_mask is not None:
        raise ValueError("attention_mask is not supported: linear attention has no mask; mask the text instead")
    refuse_attention_kwargs("attention_kwargs", attention_kwargs)


def sincos_table(height: int, width: int, channels: int, spacing: float) -> paddle.Tensor:
    """Fixed position embeddings [height * width, channels], float32: half for the column, half for the row.

    Positions run from 0 to `spacing` whatever the size of the grid; each half holds sines, then cosines.
    """
    quarter = channels // 4
    frequency = 10000.0 ** (-paddle.arange(quarter, dtype="float64") / quarter)
    columns, rows = (paddle.arange(size, dtype="float64") * (spacing / size) for size in (width, height))
    angles = (
        columns.unsqueeze(0).expand([height, width]).flatten().unsqueeze(-1) * frequency,
        rows.unsqueeze(1).expand([height, width]).flatten().unsqueeze(-1) * frequency,
    )
    return paddle.concat([part for x in angles for part in (x.sin(), x.cos())], axis=-1).astype("float32")


def _embed_scalar(layer: EmbeddingMLP, value: paddle.Tensor) -> paddle.Tensor:
    return layer(sinusoid(value).astype(layer.linear_1.weight.dtype))


def _modulation_table(layer: nn.Layer, count: int, channels: int) -> paddle.Tensor:
    return layer.create_parameter([count, channels], default_initializer=nn.initializer.Normal(std=channels**-0.5))


def _modulation_vectors(table: paddle.Tensor, vectors: paddle.Tensor) -> list[paddle.Tensor]:
    """Rows of table [n, C] + vectors [B, n or 1, C], each [B, C]."""
    return (table + vectors).unbind(axis=1)


def _unguided_name(name: str) -> str:
    return name.replace("time_embed.emb.", "time_embed.")


def _check_config(config: Mapping[str, Any], channels: int) -> None:
    """ValueError for a config that no published model has and that this implementation would not honour."""
    if config["qk_norm"] not in QK_NORMS:
        raise ValueError(f"unknown qk_norm {config['qk_norm']!r}: choose one of {QK_NORMS}")
    if config["cross_attention_dim"] != channels:
        raise ValueError(
            f"cross_attention_dim {config['cross_attention_dim']} must be num_attention_heads * attention_head_dim, "
            f"{channels}: text is projected to that size"
        )
    for name, value in (("dropout", 0), ("norm_elementwise_affine", False)):
        if config[name] != value:
            raise ValueError(f"{name}={config[name]} is not supported: SANA models have {value}")
