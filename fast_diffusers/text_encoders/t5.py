"""The encoder of T5 v1.1 (Raffel et al., 2020), with the parameter names of `transformers`."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn
from ppdiffusers.configuration_utils import register_to_config

from fast_diffusers.errors import UserError
from fast_diffusers.models.layers import RMSNorm
from fast_diffusers.text_encoders.base import TextEncoder, attend


class T5Output(NamedTuple):
    """`last_hidden_state` [B, L, D] after the final norm."""

    last_hidden_state: Tensor


def relative_position_buckets(length: int, num_buckets: int, max_distance: int) -> np.ndarray:
    """Bucket of every (query, key) pair, int64 [length, length].

    Half of the buckets belong to keys after the query. Of each half, the first half of the buckets holds one distance
    each, the rest distances that grow logarithmically up to `max_distance`, beyond which all share the last bucket.
    """
    offset = np.arange(length)[None, :] - np.arange(length)[:, None]
    half = num_buckets // 2
    exact = half // 2
    distance = np.abs(offset)
    # float32, as the models were trained: it decides which bucket a distance on a boundary falls into
    growth = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact)) / np.float32(
        math.log(max_distance / exact)
    )
    far = exact + (growth * np.float32(half - exact)).astype(np.int64)
    return np.where(distance < exact, distance, np.minimum(far, half - 1)) + half * (offset > 0)


class T5Attention(nn.Layer):
    """Self-attention without scaling, with a position bias that the first layer owns and all layers use."""

    def __init__(self, channels: int, num_heads: int, head_size: int, num_buckets: int | None):
        super().__init__()
        inner = num_heads * head_size
        self.num_heads = num_heads
        self.q = nn.Linear(channels, inner, bias_attr=False)
        self.k = nn.Linear(channels, inner, bias_attr=False)
        self.v = nn.Linear(channels, inner, bias_attr=False)
        self.o = nn.Linear(inner, channels, bias_attr=False)
        if num_buckets is not None:
            self.relative_attention_bias = nn.Embedding(num_buckets, num_heads)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return self.o(attend(self.q(x), self.k(x), self.v(x), self.num_heads, bias))


class T5GatedFeedForward(nn.Layer):
    """GELU-gated feed-forward (Shazeer, 2020)."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.wi_0 = nn.Linear(channels, hidden, bias_attr=False)
        self.wi_1 = nn.Linear(channels, hidden, bias_attr=False)
        self.wo = nn.Linear(hidden, channels, bias_attr=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(F.gelu(self.wi_0(x), approximate=True) * self.wi_1(x))


class T5SelfAttentionLayer(nn.Layer):
    def __init__(self, attention: T5Attention, norm: RMSNorm):
        super().__init__()
        self.SelfAttention = attention
        self.layer_norm = norm

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return x + self.SelfAttention(self.layer_norm(x), bias)


class T5FeedForwardLayer(nn.Layer):
    def __init__(self, feed_forward: T5GatedFeedForward, norm: RMSNorm):
        super().__init__()
        self.DenseReluDense = feed_forward
        self.layer_norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return x + self.DenseReluDense(self.layer_norm(x))


class T5Block(nn.Layer):
    def __init__(self, attention: T5SelfAttentionLayer, feed_forward: T5FeedForwardLayer):
        super().__init__()
        self.layer = nn.LayerList([attention, feed_forward])

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        attention, feed_forward = self.layer
        return feed_forward(attention(x, bias))


class T5Stack(nn.Layer):
    def __init__(self, blocks: list[T5Block], final_layer_norm: RMSNorm):
        super().__init__()
        self.block = nn.LayerList(blocks)
        self.final_layer_norm = final_layer_norm

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        for block in self.block:
            x = block(x, bias)
        return self.final_layer_norm(x)


class T5EncoderModel(TextEncoder):
    """T5 v1.1 encoder; arguments are the keys of its config.json, defaults those of FLUX.1.

    Every token attends to every token, padding included, which is how FLUX and Stable Diffusion 3 use it.
    """

    model_type = "t5"
    _keys_to_ignore_on_load_unexpected = (r"^encoder\.embed_tokens\.weight$",)  # `shared`, a second time

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 32128,
        d_model: int = 4096,
        d_kv: int = 64,
        d_ff: int = 10240,
        num_layers: int = 24,
        num_heads: int = 64,
        relative_attention_num_buckets: int = 32,
        relative_attention_max_distance: int = 128,
        layer_norm_epsilon: float = 1e-6,
        feed_forward_proj: str = "gated-gelu",
        eos_token_id: int = 1,
        pad_token_id: int = 0,
    ):
        super().__init__()
        if feed_forward_proj != "gated-gelu":
            raise UserError(f"T5EncoderModel is T5 v1.1, 'gated-gelu'; got feed_forward_proj {feed_forward_proj!r}")
        if paddle.get_default_dtype() == "float16":
            raise UserError("T5 leaves the range of float16: load the text encoder in bfloat16 or float32")

        def block(index: int) -> T5Block:
            buckets = relative_attention_num_buckets if index == 0 else None
            return T5Block(
                T5SelfAttentionLayer(
                    T5Attention(d_model, num_heads, d_kv, buckets), RMSNorm(d_model, layer_norm_epsilon)
                ),
                T5FeedForwardLayer(T5GatedFeedForward(d_model, d_ff), RMSNorm(d_model, layer_norm_epsilon)),
            )

        self.shared = nn.Embedding(vocab_size, d_model)
        self.encoder = T5Stack([block(i) for i in range(num_layers)], RMSNorm(d_model, layer_norm_epsilon))

    def forward(self, input_ids: Tensor) -> T5Output:
        """Encode token ids, int64 [B, L]."""
        return T5Output(self.encoder(self.shared(input_ids), self._position_bias(input_ids.shape[1])))

    def _position_bias(self, length: int) -> Tensor:
        """Added to the attention logits, [heads, length, length]."""
        config = self.config
        buckets = relative_position_buckets(
            length, config.relative_attention_num_buckets, config.relative_attention_max_distance
        )
        first: T5Attention = self.encoder.block[0].layer[0].SelfAttention
        return first.relative_attention_bias(paddle.to_tensor(buckets)).transpose([2, 0, 1])
