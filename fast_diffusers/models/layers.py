"""Building blocks shared by the diffusion transformers.

Sizes in shapes: B batch, L tokens, H heads, D head size, C channels (= H * D inside a block).
"""

import math
from collections.abc import Sequence

import paddle
import paddle.nn.functional as F
from paddle import nn

from fast_diffusers.compat import is_eager_on_cpu, swap_middle_axes

Rope = tuple[paddle.Tensor, paddle.Tensor]


def zero_linear(in_features: int, out_features: int) -> nn.Linear:
    """A linear layer that starts at zero, so that a residual branch or an output starts as the identity or zero."""
    return nn.Linear(in_features, out_features, weight_attr=nn.initializer.Constant(0.0))


def per_token(x: paddle.Tensor, like: paddle.Tensor) -> paddle.Tensor:
    """Vectors [B, C] in a shape that multiplies tokens `like` [B, L, C].

    On CPU the vectors are copied to every token: Paddle broadcasts a middle axis about ten times slower than it copies.
    """
    x = x.unsqueeze(1)
    return x if paddle.is_compiled_with_cuda() else x.expand_as(like)


def modulate(x: paddle.Tensor, shift: paddle.Tensor, scale: paddle.Tensor) -> paddle.Tensor:
    """x (1 + scale) + shift, with x [B, L, C] and shift, scale [B, C]."""
    return x * per_token(1 + scale, x) + per_token(shift, x)


def layer_norm(x: paddle.Tensor, epsilon: float = 1e-6) -> paddle.Tensor:
    """Layer normalisation of the last axis without weights."""
    return F.layer_norm(x, x.shape[-1:], epsilon=epsilon)


def float16_clip(x: paddle.Tensor) -> paddle.Tensor:
    """Residual streams of large models leave the range of float16; other types pass through."""
    return x.clip(-65504, 65504) if x.dtype == paddle.float16 else x


class RMSNorm(nn.Layer):
    """x / rms(x) * weight over the last axis; statistics in float32 (float64 for float64 input)."""

    def __init__(self, size: int, epsilon: float = 1e-6):
        super().__init__()
        self.weight = self.create_parameter([size], default_initializer=nn.initializer.Constant(1.0))
        self.epsilon = epsilon

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        wide = x if x.dtype in (paddle.float32, paddle.float64) else x.astype("float32")
        wide = wide * paddle.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)
        return wide.astype(x.dtype) * self.weight


class AdaLayerNorm(nn.Layer):
    """The `count` modulation vectors [B, C] that a conditioning vector gives (adaLN-zero, Peebles & Xie 2023, §3.2).

    The linear layer starts at zero, so that gated residual branches start as the identity.
    """

    def __init__(self, channels: int, count: int):
        super().__init__()
        self.count = count
        self.linear = zero_linear(channels, count * channels)

    def forward(self, temb: paddle.Tensor) -> list[paddle.Tensor]:
        return self.linear(F.silu(temb)).chunk(self.count, axis=-1)


class GELUProjection(nn.Layer):
    """Linear, then GELU in its tanh form."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.proj = nn.Linear(in_features, out_features)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return F.gelu(self.proj(x), approximate=True)


class FeedForward(nn.Layer):
    """Two linear layers with a tanh-GELU between them; the middle entry of `net` keeps the published names."""

    def __init__(self, channels: int, ratio: int = 4):
        super().__init__()
        hidden = channels * ratio
        self.net = nn.Sequential(GELUProjection(channels, hidden), nn.Identity(), nn.Linear(hidden, channels))

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return self.net(x)


class EmbeddingMLP(nn.Layer):
    """Linear, SiLU, linear: from an embedding [B, in] to a conditioning vector [B, C]."""

    def __init__(self, in_features: int, channels: int):
        super().__init__()
        normal = nn.initializer.Normal(std=0.02)
        self.linear_1 = nn.Linear(in_features, channels, weight_attr=normal)
        self.linear_2 = nn.Linear(channels, channels, weight_attr=normal)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


def sinusoid(position: paddle.Tensor, size: int = 256, max_period: float = 10000.0) -> paddle.Tensor:
    """Embed positions [B] as [cos, sin] [B, size], in float32 (float64 for float64 positions)."""
    if position.dtype != paddle.float64:
        position = position.astype("float32")
    half = size // 2
    # Angles reach thousands, where the last bit of a frequency shows: exponents are rounded to float32, in the order
    # that released models were trained with, and their exponentials rounded once.
    exponent = paddle.arange(half, dtype="float32") * -math.log(max_period) / half
    frequency = exponent.astype("float64").exp().astype("float32").astype(position.dtype)
    angle = position.unsqueeze(-1) * frequency
    return paddle.concat([angle.cos(), angle.sin()], axis=-1)


def rope_tables(ids: paddle.Tensor, axes: Sequence[int], theta: float = 10000.0, dtype: str = "float32") -> Rope:
    """Cosines and sines of a multi-axis rotary embedding (RoFormer, Su et al. 2021).

    ids [L, len(axes)] holds the position of every token on every axis; axes[i] channels of a head turn with axis i.
    Angles are taken in float64. Returns two tensors [L, 1, sum(axes) / 2] of `dtype`.
    """
    angles = []
    for axis, size in enumerate(axes):
        frequency = 1.0 / theta ** (paddle.arange(0, size, 2, dtype="float64") / size)
        angles.append(ids[:, axis].astype("float64").unsqueeze(-1) * frequency)
    angle = paddle.concat(angles, axis=-1).unsqueeze(1)
    return angle.cos().astype(dtype), angle.sin().astype(dtype)


def apply_rope(x: paddle.Tensor, rope: Rope) -> paddle.Tensor:
    """Turn neighbouring channel pairs of x [B, L, H, D] by the angles of `rope`, in the tables' dtype.

    In dygraph a pair is one complex number, which gives the same numbers as slicing and stacking three to four times
    faster on CPU; traced programs keep to real arithmetic, which every exporter and compiler takes.
    """
    cos, sin = rope
    pairs = x.astype(cos.dtype).reshape([0, 0, 0, -1, 2])
    if paddle.in_dynamic_mode():
        turned = paddle.as_real(paddle.as_complex(pairs) * paddle.complex(cos, sin))
    else:
        real, imaginary = pairs[..., 0], pairs[..., 1]
        turned = paddle.stack([real * cos - imaginary * sin, imaginary * cos + real * sin], axis=-1)
    return turned.flatten(3).astype(x.dtype)


def split_heads(x: paddle.Tensor, num_heads: int) -> paddle.Tensor:
    """[B, L, H * D] to [B, L, H, D]."""
    return x.reshape([0, 0, num_heads, -1])


def attend(query: paddle.Tensor, key: paddle.Tensor, value: paddle.Tensor) -> paddle.Tensor:
    """Softmax attention of [B, L, H, D] tensors, heads joined: [B, L, H * D]."""
    if not is_eager_on_cpu(query):
        return F.scaled_dot_product_attention(query, key, value).flatten(2)
    scale = query.shape[-1] ** -0.5
    query, key, value = (swap_middle_axes(x) for x in (query * scale, key, value))
    weights = F.softmax(paddle.matmul(query, key, transpose_y=True), axis=-1)
    return swap_middle_axes(paddle.matmul(weights, value)).flatten(2)
