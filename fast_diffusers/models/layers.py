"""Building blocks shared by the diffusion transformers.

Sizes in shapes: B batch, L tokens, H heads, D head size, C channels (= H * D inside a block).
"""

import functools
import math
from collections.abc import Sequence

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import nn

from fast_diffusers.compat import is_eager_on_cpu, swap_middle_axes

Rope = tuple[paddle.Tensor, paddle.Tensor]

MAX_DENSE_PIXELS = 64
"""Up to this size `GLUMBConv` runs convolutions of tokens as matrix products on CPU."""


def is_traced_for_cpu() -> bool:
    """Whether a program is being traced that will run on CPU, where the engines have slow kernels for some operators.

    Paddle Inference's oneDNN broadcasts the last axis, and splits and joins pairs of channels, element by element.
    Eager code, which also trains, and programs for GPUs keep the forms that are faster there.
    """
    return not paddle.in_dynamic_mode() and not paddle.is_compiled_with_cuda()


def zero_linear(in_features: int, out_features: int) -> nn.Linear:
    """A linear layer that starts at zero, so that a residual branch or an output starts as the identity or zero."""
    return nn.Linear(in_features, out_features, weight_attr=nn.initializer.Constant(0.0))


def spread(x: paddle.Tensor, like: paddle.Tensor) -> paddle.Tensor:
    """x with axes of length 1, in a shape that multiplies `like`.

    On CPU the values are copied along them: Paddle broadcasts a middle axis about ten times slower than it copies.
    """
    return x if paddle.is_compiled_with_cuda() else x.expand_as(like)


def per_token(x: paddle.Tensor, like: paddle.Tensor) -> paddle.Tensor:
    """Vectors [B, C] in a shape that multiplies tokens `like` [B, L, C]."""
    return spread(x.unsqueeze(1), like)


def at_least_float32(x: paddle.Tensor) -> paddle.Tensor:
    """x in float32, or as it is in float64."""
    return x if x.dtype in (paddle.float32, paddle.float64) else x.astype("float32")


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

    def __init__(self, size: int, epsilon: float = 1e-6, initial: float = 1.0):
        super().__init__()
        self.weight = self.create_parameter([size], default_initializer=nn.initializer.Constant(initial))
        self.epsilon = epsilon

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        wide = at_least_float32(x)
        rate = paddle.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)
        if is_traced_for_cpu():
            rate = rate.expand_as(wide)
        return (wide * rate).astype(x.dtype) * self.weight


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
    """Linear, SiLU, linear: from an embedding [B, in] to a conditioning vector [B, C]; `zero` starts it at zero."""

    def __init__(self, in_features: int, channels: int, zero: bool = False):
        super().__init__()
        normal = nn.initializer.Normal(std=0.02)
        self.linear_1 = nn.Linear(in_features, channels, weight_attr=normal)
        self.linear_2 = zero_linear(channels, channels) if zero else nn.Linear(channels, channels, weight_attr=normal)

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

    ids [L, len(axes)], or [B, L, len(axes)] where samples differ, holds the position of every token on every axis;
    axes[i] channels of a head turn with axis i. Angles are taken in float64.
    Returns two tensors [(B,) L, 1, sum(axes) / 2] of `dtype`.
    """
    angles = []
    for axis, size in enumerate(axes):
        frequency = 1.0 / theta ** (paddle.arange(0, size, 2, dtype="float64") / size)
        angles.append(ids[..., axis].astype("float64").unsqueeze(-1) * frequency)
    angle = paddle.concat(angles, axis=-1).unsqueeze(-2)
    return angle.cos().astype(dtype), angle.sin().astype(dtype)


def apply_rope(x: paddle.Tensor, rope: Rope) -> paddle.Tensor:
    """Turn neighbouring channel pairs of x [B, L, H, D] by the angles of `rope`, in the tables' dtype.

    In dygraph a pair is one complex number, which gives the same numbers as slicing and stacking three to four times
    faster on CPU; traced programs keep to real arithmetic, which every exporter and compiler takes.
    """
    cos, sin = rope
    wide = x.astype(cos.dtype)
    if is_traced_for_cpu():
        return _turn_by_product(wide, cos, sin).astype(x.dtype)
    pairs = wide.reshape([0, 0, 0, -1, 2])
    if paddle.in_dynamic_mode():
        turned = paddle.as_real(paddle.as_complex(pairs) * paddle.complex(cos, sin))
    else:
        real, imaginary = pairs[..., 0], pairs[..., 1]
        turned = paddle.stack([real * cos - imaginary * sin, imaginary * cos + real * sin], axis=-1)
    return turned.flatten(3).astype(x.dtype)


def _turn_by_product(x: paddle.Tensor, cos: paddle.Tensor, sin: paddle.Tensor) -> paddle.Tensor:
    """`apply_rope` without taking pairs apart: x cos + (x with its pairs swapped) (-sin, sin).

    A product with a permutation matrix swaps, exactly in any precision.
    """
    size = x.shape[-1]
    swap = paddle.eye(size, dtype=x.dtype).reshape([size // 2, 2, size]).flip(1).reshape([size, size])
    cos = paddle.stack([cos, cos], axis=-1).flatten(-2)
    sin = paddle.stack([-sin, sin], axis=-1).flatten(-2)
    return x * spread(cos, x) + paddle.matmul(x, swap) * spread(sin, x)


def split_heads(x: paddle.Tensor, num_heads: int) -> paddle.Tensor:
    """[B, L, H * D] to [B, L, H, D]; D is stated, as attention in traced programs must know it."""
    return x.reshape([0, 0, num_heads, x.shape[-1] // num_heads])


def attend(
    query: paddle.Tensor, key: paddle.Tensor, value: paddle.Tensor, bias: paddle.Tensor | None = None
) -> paddle.Tensor:
    """Softmax attention of queries [B, L, H, D] to keys and values [B, S, H, D], heads joined: [B, L, H * D].

    `bias` [B, 1, 1, S] is added to the scores.
    """
    if not is_eager_on_cpu(query):
        if bias is not None:
            bias = bias.expand([-1, -1, query.shape[1], -1])  # GPU kernels want a row for every query
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias).flatten(2)
    scale = query.shape[-1] ** -0.5
    query, key, value = (swap_middle_axes(x) for x in (query * scale, key, value))
    scores = paddle.matmul(query, key, transpose_y=True)
    weights = F.softmax(scores if bias is None else scores + spread(bias, scores), axis=-1)
    return swap_middle_axes(paddle.matmul(weights, value)).flatten(2)


def relu_attend(
    query: paddle.Tensor, key: paddle.Tensor, value: paddle.Tensor, epsilon: float = 1e-15
) -> paddle.Tensor:
    """Linear attention with ReLU kernels of channel-first tensors [B, H, D, L] (Cai et al. 2023, EfficientViT, §3.1).

    o_i = sum_j v_j (relu(k_j) . relu(q_i)) / sum_j (relu(k_j) . relu(q_i)), computed in O(L) and in float32 (float64
    for float64 input); a query that meets no key gives zero. Returns [B, H, D, L] in the input's dtype.
    """
    dtype = query.dtype
    query, key, value = F.relu(at_least_float32(query)), F.relu(at_least_float32(key)), at_least_float32(value)
    out = paddle.matmul(paddle.matmul(value, key, transpose_y=True), query)
    total = paddle.matmul(key.sum(axis=-1).unsqueeze(-2), query)
    return (out / spread(total + epsilon, out)).astype(dtype)


class GLUMBConv(nn.Layer):
    """Gated inverted bottleneck of convolutions, SANA's Mix-FFN (Xie et al. 2024, arXiv 2410.10629, §2.2).

    1 x 1 to twice the hidden size, SiLU, depthwise 3 x 3, gate, 1 x 1 back; image [B, C, H, W] to the same shape.
    """

    def __init__(self, channels: int, ratio: float):
        super().__init__()
        hidden = int(ratio * channels)
        self.conv_inverted = nn.Conv2D(channels, 2 * hidden, 1)
        self.conv_depth = nn.Conv2D(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)
        self.conv_point = nn.Conv2D(hidden, channels, 1, bias_attr=False)

    def forward(self, x: paddle.Tensor) -> paddle.Tensor:
        x, gate = self.conv_depth(F.silu(self.conv_inverted(x))).chunk(2, axis=1)
        return self.conv_point(x * F.silu(gate))

    def on_tokens(self, tokens: paddle.Tensor, height: int) -> paddle.Tensor:
        """The same for an image of `height` rows as tokens [B, L, C]."""
        if is_eager_on_cpu(tokens) and tokens.shape[1] <= MAX_DENSE_PIXELS:
            return self._dense(tokens, height)
        image = tokens.transpose([0, 2, 1]).reshape([0, 0, height, -1])
        return self.forward(image).flatten(2).transpose([0, 2, 1])

    def _dense(self, tokens: paddle.Tensor, height: int) -> paddle.Tensor:
        """Convolutions of small images as matrix products, channels first: [C, B, L] all the way.

        On CPU Paddle's depthwise convolution takes four times as long as both 1 x 1 convolutions together; training
        this layer on 64 images of 8 x 8 is three times as fast so, on 4 x 4 ten times.
        """
        batch, length, channels = tokens.shape
        inverted, depth, point = (
            conv.weight.flatten(1) for conv in (self.conv_inverted, self.conv_depth, self.conv_point)
        )
        x = paddle.matmul(inverted, tokens.reshape([-1, channels]), transpose_y=True)
        x = F.silu(x + spread(self.conv_inverted.bias.unsqueeze(-1), x)).reshape([-1, batch, length])
        shifts = paddle.to_tensor(_shift_matrices(height, length // height)).astype(x.dtype)
        x = paddle.bmm(x, paddle.matmul(depth, shifts).reshape([-1, length, length]))
        x, gate = (x + spread(self.conv_depth.bias.unsqueeze([-1, -2]), x)).chunk(2, axis=0)
        x = paddle.matmul((x * F.silu(gate)).flatten(1), point, transpose_x=True, transpose_y=True)
        return x.reshape([batch, length, channels])


@functools.lru_cache(maxsize=16)
def _shift_matrices(height: int, width: int) -> np.ndarray:
    """[9, L * L]: for each tap of a padded 3 x 3 convolution which of L input pixels it takes to which output pixel."""
    row, column = np.divmod(np.arange(height * width), width)
    rows, columns = row[:, None] - row, column[:, None] - column
    taps = [(rows == i) & (columns == j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    return np.stack(taps).reshape([9, -1]).astype(np.float32)
