"""The CLIP text encoder (Radford et al., 2021), with the parameter names of `transformers`."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn
from ppdiffusers.configuration_utils import register_to_config

from fast_diffusers.errors import UserError
from fast_diffusers.models.checkpoint_io import Checkpoint
from fast_diffusers.text_encoders.base import TextEncoder, attend

LEGACY_EOS_ID = 2
"""Configurations older than transformers 4.31 carry this wrong end-token id; the end token is then the largest id."""


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x), the GELU of OpenAI's checkpoints."""
    return x * F.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu}


class CLIPTextOutput(NamedTuple):
    """`last_hidden_state` [B, L, D] after the final layer norm; `pooler_output` [B, D], its row at the end token."""

    last_hidden_state: Tensor
    pooler_output: Tensor


class CLIPAttention(nn.Layer):
    """Causal self-attention."""

    def __init__(self, channels: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(channels, channels)
        self.k_proj = nn.Linear(channels, channels)
        self.v_proj = nn.Linear(channels, channels)
        self.out_proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        query, key, value = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        scale = (x.shape[-1] // self.num_heads) ** -0.5
        return self.out_proj(attend(query * scale, key, value, self.num_heads, mask))


class CLIPMLP(nn.Layer):
    def __init__(self, channels: int, hidden: int, activation: str):
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class CLIPEncoderLayer(nn.Layer):
    def __init__(self, channels: int, hidden: int, num_heads: int, activation: str, epsilon: float):
        super().__init__()
        self.self_attn = CLIPAttention(channels, num_heads)
        self.layer_norm1 = nn.LayerNorm(channels, epsilon=epsilon)
        self.mlp = CLIPMLP(channels, hidden, activation)
        self.layer_norm2 = nn.LayerNorm(channels, epsilon=epsilon)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp(self.layer_norm2(x))


class CLIPEmbeddings(nn.Layer):
    def __init__(self, vocab_size: int, max_length: int, channels: int):
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, channels)
        self.position_embedding = nn.Embedding(max_length, channels)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.token_embedding(input_ids) + self.position_embedding.weight[: input_ids.shape[1]]


class CLIPEncoder(nn.Layer):
    def __init__(self, num_layers: int, *layer: int | float | str):
        super().__init__()
        self.layers = nn.LayerList([CLIPEncoderLayer(*layer) for _ in range(num_layers)])

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, mask)
        return x


class CLIPTextTransformer(nn.Layer):
    def __init__(self, embeddings: CLIPEmbeddings, encoder: CLIPEncoder, final_layer_norm: nn.LayerNorm):
        super().__init__()
        self.embeddings = embeddings
        self.encoder = encoder
        self.final_layer_norm = final_layer_norm


class CLIPTextModel(TextEncoder):
    """CLIP text encoder; arguments are the keys of its config.json, defaults those of FLUX.1."""

    model_type = "clip_text_model"
    _keys_to_ignore_on_load_unexpected = (r"\.position_ids$",)  # 0, 1, ..., in files of older versions

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 49408,
        hidden_size: int = 768,
        intermediate_size: int = 3072,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        max_position_embeddings: int = 77,
        hidden_act: str = "quick_gelu",
        layer_norm_eps: float = 1e-5,
        bos_token_id: int = 49406,
        eos_token_id: int = 49407,
        pad_token_id: int = 1,
    ):
        super().__init__()
        if hidden_act not in ACTIVATIONS:
            raise UserError(f"CLIPTextModel: hidden_act {hidden_act!r} is not one of {sorted(ACTIVATIONS)}")
        layer = (hidden_size, intermediate_size, num_attention_heads, hidden_act, layer_norm_eps)
        self.text_model = CLIPTextTransformer(
            CLIPEmbeddings(vocab_size, max_position_embeddings, hidden_size),
            CLIPEncoder(num_hidden_layers, *layer),
            nn.LayerNorm(hidden_size, epsilon=layer_norm_eps),
        )

    @classmethod
    def _adapt_checkpoint(cls, checkpoint: Checkpoint) -> Checkpoint:
        """transformers 5 leaves the prefix "text_model." out."""
        if any(name.startswith("text_model.") for name in checkpoint.tensors):
            return checkpoint
        return replace(
            checkpoint, tensors={f"text_model.{name}": stored for name, stored in checkpoint.tensors.items()}
        )

    def forward(self, input_ids: Tensor) -> CLIPTextOutput:
        """Encode token ids, int64 [B, L] with L up to `max_position_embeddings`."""
        length = input_ids.shape[1]
        if length > self.config.max_position_embeddings:
            raise ValueError(f"CLIP takes at most {self.config.max_position_embeddings} tokens, got {length}")
        x = self.text_model.embeddings(input_ids)
        mask = paddle.triu(paddle.full([length, length], float("-inf"), dtype="float32"), diagonal=1)
        x = self.text_model.final_layer_norm(self.text_model.encoder(x, mask))
        is_end = input_ids if self.config.eos_token_id == LEGACY_EOS_ID else input_ids == self.config.eos_token_id
        end = is_end.astype("int64").argmax(axis=-1)  # the first one where several are equal
        rows = paddle.arange(x.shape[0], dtype="int64")
        return CLIPTextOutput(x, x.gather_nd(paddle.stack([rows, end], axis=-1)))
