"""What the decoder-only language models have in common that serve as text encoders, with HF's parameter names.

Sizes in shapes: B batch, T tokens, H query heads, K key and value heads, G = H / K, D head size, C hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn

from fast_diffusers.errors import UserError
from fast_diffusers.models.checkpoint_io import Checkpoint
from fast_diffusers.models.layers import RMSNorm, Rope, at_least_float32, split_heads, spread
from fast_diffusers.text_encoders.base import TextEncoder

QUERY_BLOCK = 256
"""Queries whose attention is in memory at one time."""

MASKED = -1e30
"""Added to the logits of hidden keys; finite, so that a query without any key, such as padding, gets finite values."""

WEIGHT_PREFIXES = ("model.language_model.", "language_model.model.", "language_model.", "model.", "")
"""What the names of the text model's weights start with, in files of different classes and versions."""

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate=True),
}


class DecoderOutput(NamedTuple):
    """`last_hidden_state` [B, T, C] after the final norm; `hidden_states`, if asked for: the embeddings, then what each
    layer gives, the last one after the final norm."""

    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...] | None = None


class DecoderLayer(nn.Layer):
    """Pre-norm attention and gated feed-forward (Zhang & Sennrich 2019; Shazeer 2020)."""

    def __init__(self, arch: Architecture):
        super().__init__()
        self.self_attn = DecoderAttention(arch)
        self.mlp = GatedMLP(arch.hidden_size, arch.intermediate_size, arch.activation)
        self.input_layernorm = arch.norm(arch.hidden_size, arch.epsilon)
        self.post_attention_layernorm = arch.norm(arch.hidden_size, arch.epsilon)

    def forward(self, x: Tensor, rope: Rope, blocks: Sequence[QueryBlock]) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, blocks)
        return x + self.mlp(self.post_attention_layernorm(x))


@dataclass(frozen=True)
class Architecture:
    """Everything in which the models differ."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    windows: tuple[int | None, ...]
    """For every layer, to how many tokens, itself included, a token attends; None: all up to itself."""
    activation: str
    epsilon: float
    rope_theta: float
    attention_scale: float
    logit_cap: float | None = None
    """Attention logits are bent into (-cap, cap) by a tanh."""
    embedding_scale: float = 1.0
    qkv_bias: bool = False
    head_norm: bool = False
    """RMSNorm of every head's queries and keys."""
    norm: Callable[[int, float], nn.Layer] = RMSNorm
    layer: Callable[[Architecture], nn.Layer] = DecoderLayer


class QueryBlock(NamedTuple):
    """Neighbouring queries, the keys that any of them may see, and what the logits get added, [B or 1, 1, 1, q, k]."""

    queries: slice
    keys: slice
    bias: Tensor


def query_blocks(length: int, window: int | None, mask: Tensor | None, dtype: str) -> list[QueryBlock]:
    """Causal attention of `length` tokens, block by block; `mask` [B, length] is 0 where a key is padding.

    Keys after a block, and those that its window no longer reaches, are left out of its products altogether.
    """
    hidden = None if mask is None else ((1 - mask.astype(dtype)) * MASKED).reshape([0, 1, 1, 1, -1])
    blocks = []
    for start in range(0, length, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, length)
        first = 0 if window is None else max(0, start - window + 1)
        distance = np.arange(start, stop)[:, None] - np.arange(first, stop)
        visible = (distance >= 0) & (distance < (window or length))
        bias = paddle.to_tensor(np.where(visible, 0.0, MASKED)[None, None, None], dtype=dtype)
        if hidden is not None:
            bias = bias + hidden[..., first:stop]
        blocks.append(QueryBlock(slice(start, stop), slice(first, stop), bias))
    return blocks


def half_rope_tables(length: int, size: int, theta: float, dtype: str) -> Rope:
    """Cosines and sines of positions 0 ... length - 1 for a head of `size` channels, two [length, 1, size / 2].

    Angles are rounded to float32 where the released models were trained with them so rounded.
    """
    frequency = np.float32(1.0) / np.float32(theta) ** (np.arange(0, size, 2, dtype=np.float32) / np.float32(size))
    angle = (np.arange(length, dtype=np.float32)[:, None] * frequency)[:, None]
    return paddle.to_tensor(np.cos(angle), dtype=dtype), paddle.to_tensor(np.sin(angle), dtype=dtype)


def apply_half_rope(x: Tensor, rope: Rope) -> Tensor:
    """Turn x [B, T, H, D] by the angles of `rope`: channel i of a head is paired with channel i + D / 2."""
    real, imaginary = at_least_float32(x).chunk(2, axis=-1)
    cos, sin = (spread(table, real) for table in rope)
    return paddle.concat([real * cos - imaginary * sin, imaginary * cos + real * sin], axis=-1).astype(x.dtype)


class DecoderAttention(nn.Layer):
    """Causal grouped-query attention (Ainslie et al. 2023), softmax in float32, one block of queries at a time."""

    def __init__(self, arch: Architecture):
        super().__init__()
        inner, shared = (heads * arch.head_dim for heads in (arch.num_heads, arch.num_key_value_heads))
        bias = None if arch.qkv_bias else False
        self.num_heads = arch.num_heads
        self.num_key_value_heads = arch.num_key_value_heads
        self.scale = arch.attention_scale
        self.logit_cap = arch.logit_cap
        self.q_proj = nn.Linear(arch.hidden_size, inner, bias_attr=bias)
        self.k_proj = nn.Linear(arch.hidden_size, shared, bias_attr=bias)
        self.v_proj = nn.Linear(arch.hidden_size, shared, bias_attr=bias)
        self.o_proj = nn.Linear(inner, arch.hidden_size, bias_attr=False)
        self.q_norm = arch.norm(arch.head_dim, arch.epsilon) if arch.head_norm else nn.Identity()
        self.k_norm = arch.norm(arch.head_dim, arch.epsilon) if arch.head_norm else nn.Identity()

    def forward(self, x: Tensor, rope: Rope, blocks: Sequence[QueryBlock]) -> Tensor:
        query = apply_half_rope(self.q_norm(split_heads(self.q_proj(x), self.num_heads)), rope)
        key = apply_half_rope(self.k_norm(split_heads(self.k_proj(x), self.num_key_value_heads)), rope)
        value = split_heads(self.v_proj(x), self.num_key_value_heads)
        size, groups = query.shape[-1], self.num_heads // self.num_key_value_heads
        query = query.reshape([0, 0, -1, groups, size]).transpose([0, 2, 3, 1, 4])  # [B, K, G, T, D]
        key, value = (tensor.transpose([0, 2, 1, 3]) for tensor in (key, value))  # [B, K, T, D]
        out = [
            self._attend(query[:, :, :, block.queries], key[:, :, block.keys], value[:, :, block.keys], block.bias)
            for block in blocks
        ]
        return self.o_proj(paddle.concat(out, axis=3).transpose([0, 3, 1, 2, 4]).flatten(2))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        """[B, K, G, q, D] from queries of that shape, keys and values [B, K, k, D] and bias [B or 1, 1, 1, q, k].

        The queries of a group are rows of one product with its key head, which is never repeated.
        """
        groups, queries = query.shape[2:4]
        logits = at_least_float32(paddle.matmul(query.flatten(2, 3), key, transpose_y=True))
        if self.logit_cap is None:
            logits = logits * self.scale
        else:
            logits = paddle.tanh(logits * (self.scale / self.logit_cap)) * self.logit_cap
        logits = logits.reshape([0, 0, groups, queries, -1]) + bias
        weights = F.softmax(logits, axis=-1).astype(value.dtype).flatten(2, 3)
        return paddle.matmul(weights, value).reshape([0, 0, groups, queries, value.shape[-1]])


class GatedMLP(nn.Layer):
    """down(activation(gate(x)) * up(x))."""

    def __init__(self, channels: int, hidden: int, activation: str):
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.gate_proj = nn.Linear(channels, hidden, bias_attr=False)
        self.up_proj = nn.Linear(channels, hidden, bias_attr=False)
        self.down_proj = nn.Linear(hidden, channels, bias_attr=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class TextDecoder(TextEncoder):
    """A causal language model without its output layer. Subclasses turn their configuration into an `Architecture`.

    Positions count from the first column, padding included: attention sees only their differences.
    """

    config_types: ClassVar[tuple[str, ...]]
    """The `model_type` that a config.json of this class may state."""
    _keys_to_ignore_on_load_unexpected = (r"(^|\.)lm_head\.", r"\.rotary_emb\.inv_freq$")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Make a model, its weights at random, from the content of a config.json of any version of `transformers`.

        Raises:
            UserError: the configuration is another model's or asks for something that these models do not do.
        """
        return super().from_config(_flat_config(cls, config))

    @classmethod
    def _adapt_checkpoint(cls, checkpoint: Checkpoint) -> Checkpoint:
        """Take the prefix off the text model's weights; names that do not have it stay and are judged as they are."""
        stored = checkpoint.tensors
        prefix = next((p for p in WEIGHT_PREFIXES if f"{p}embed_tokens.weight" in stored), "")
        return replace(checkpoint, tensors={name.removeprefix(prefix): tensor for name, tensor in stored.items()})

    def _assemble(self, arch: Architecture) -> None:
        if arch.activation not in ACTIVATIONS:
            raise UserError(
                f"{type(self).__name__}: activation {arch.activation!r} is not one of {sorted(ACTIVATIONS)}"
            )
        self.architecture = arch
        self.embed_tokens = nn.Embedding(arch.vocab_size, arch.hidden_size)
        self.layers = nn.LayerList([arch.layer(arch) for _ in arch.windows])
        self.norm = arch.norm(arch.hidden_size, arch.epsilon)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, output_hidden_states: bool = False
    ) -> DecoderOutput:
        """Encode token ids.

        Args:
            input_ids: integers [B, T], padded on either side.
            attention_mask: [B, T], 0 where a token is padding; values there are finite and mean nothing.
            output_hidden_states: return all hidden states as well.
        """
        arch, length = self.architecture, input_ids.shape[1]
        x = self.embed_tokens(input_ids) * arch.embedding_scale
        wide = "float64" if x.dtype == paddle.float64 else "float32"
        rope = half_rope_tables(length, arch.head_dim, arch.rope_theta, wide)
        blocks = {window: query_blocks(length, window, attention_mask, wide) for window in set(arch.windows)}
        states = [x]
        for layer, window in zip(self.layers, arch.windows):  # noqa: B905  tracing knows no `strict`
            x = layer(x, rope, blocks[window])
            if output_hidden_states:
                states.append(x)
        x = self.norm(x)
        return DecoderOutput(x, (*states[:-1], x) if output_hidden_states else None)


def layer_windows(layer_types: Sequence[str], num_layers: int, window: int | None) -> tuple[int | None, ...]:
    """The windows of `Architecture` from the entries of a config.json: one of two types for every layer."""
    if len(layer_types) != num_layers or not set(layer_types) <= {"full_attention", "sliding_attention"}:
        raise UserError(
            f"layer_types should be full_attention or sliding_attention for each of {num_layers} layers, "
            f"not {list(layer_types)}"
        )
    return tuple(window if kind == "sliding_attention" else None for kind in layer_types)


def _flat_config(cls: type[TextDecoder], config: Mapping[str, Any]) -> dict[str, Any]:
    """One level of keys: those of the text model, with `rope_theta` among them, wherever a version puts them."""
    flat = {**config, **(config.get("text_config") or {})}
    stated = flat.get("model_type", cls.model_type)
    if stated not in cls.config_types:
        raise UserError(f"the configuration is that of a {stated!r} model, not of a {cls.__name__}")
    if flat.get("use_bidirectional_attention"):
        raise UserError(f"{cls.__name__} is causal; the configuration has use_bidirectional_attention")
    rope = flat.get("rope_parameters") or flat.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "mrope"):  # the three axes of mrope agree on text
        raise UserError(f"{cls.__name__} has no rotary embedding of type {kind!r}, only the default one")
    if "mrope_section" in rope:
        flat["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    return flat | ({"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {})
