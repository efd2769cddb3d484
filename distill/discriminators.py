"""Discriminator heads on the features of a frozen teacher."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn
from paddle.autograd import PyLayer


def patch_logits(groups: int, features: Tensor, *weights: Tensor) -> Tensor:
    """What a `PatchHead` computes, as a function of its ten parameters in order; features are cast to their dtype."""

    def block(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        x = F.group_norm(F.conv2d(x, weight, bias), groups, weight=scale, bias=shift)
        return F.leaky_relu(x, negative_slope=0.2)

    hidden = block(features.astype(weights[0].dtype), *weights[:4])
    return F.conv2d(hidden + block(hidden, *weights[4:8]), *weights[8:])


class _RecomputedLogits(PyLayer):
    """`patch_logits` that keeps only its inputs: the backward pass computes it again, start to end, in one node.

    With saved-tensor hooks instead, the backward of a sum over heads visits all heads one layer at a time, so that the
    recomputed activations of all of them are there at once. Gradients go through aliases of the inputs: every
    parameter receives its gradient once, from this node, as it does without recomputation.
    """

    @staticmethod
    def forward(ctx: Any, groups: int, *inputs: Tensor) -> Tensor:
        ctx.groups, ctx.wanted = groups, [not x.stop_gradient for x in inputs]
        ctx.save_for_backward(*inputs)
        return patch_logits(groups, *inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        aliases = [x.detach() for x in ctx.saved_tensor()]
        for alias, wanted in zip(aliases, ctx.wanted, strict=True):
            alias.stop_gradient = not wanted
        with paddle.enable_grad():
            logits = patch_logits(ctx.groups, *aliases)
        logits.backward(gradient)  # paddle.grad does not nest
        return tuple(alias.grad if wanted else None for alias, wanted in zip(aliases, ctx.wanted, strict=True))


class PatchHead(nn.Layer):
    """[B, C, h, w] features to [B, 1, h, w] logits: two 1×1 convolution blocks, the second residual, and a read-out.

    About 2·C² parameters (18.9 M for FLUX's C = 3072). GroupNorm takes 32 groups, or the largest power of two that
    divides C. With `checkpointing` nothing but the features, in their own dtype, is kept for the backward pass.
    """

    def __init__(self, channels: int, checkpointing: bool = False):
        super().__init__()
        self.groups, self.checkpointing = min(32, channels & -channels), checkpointing

        def block() -> nn.Layer:
            return nn.Sequential(nn.Conv2D(channels, channels, 1), nn.GroupNorm(self.groups, channels))

        self.entry, self.residual, self.readout = block(), block(), nn.Conv2D(channels, 1, 1)

    def forward(self, features: Tensor) -> Tensor:
        compute = _RecomputedLogits.apply if self.checkpointing and paddle.is_grad_enabled() else patch_logits
        return compute(self.groups, features, *self.parameters())


class _Heads(nn.Layer):
    """A head a tap. forward: a list of features [B, C, h, w] to a list of logits [B, 1, h, w], in the heads' dtype."""

    def __init__(self, heads: Sequence[nn.Layer]):
        super().__init__()
        self.heads = nn.LayerList(heads)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        if len(features) != len(self.heads):
            raise ValueError(f"{len(self.heads)} discriminator heads got {len(features)} feature maps")
        return [head(x) for head, x in zip(self.heads, features, strict=True)]


class PatchDiscriminator(_Heads):
    """One `PatchHead` a tap: FLUX-Lightning puts one behind every transformer block (57 heads, 1.077 B parameters)."""

    def __init__(self, channels: int, num_taps: int, checkpointing: bool = False):
        super().__init__([PatchHead(channels, checkpointing) for _ in range(num_taps)])


# ---------------------------------------------------------------------------------------------- heads of LADD
class SpectralConv1D(nn.Layer):
    """A convolution [B, C, N] -> [B, out, N] over a closed circle of tokens, its weight matrix divided by its largest
    singular value (spectral normalisation, Miyato et al. 2018, arXiv 1802.05957, algorithm 1).

    That value is uᵀWv. The vectors `u` and `v`, buffers of the layer, follow the weights by one power iteration in each
    forward pass that trains them: in training mode, with gradients, and not frozen. All other passes leave them alone,
    so that the student's loss changes nothing, and see the function that was last trained.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 1):
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        self.reach = kernel_size // 2
        bound = (in_channels * kernel_size) ** -0.5
        uniform = nn.initializer.Uniform(-bound, bound)
        self.weight = self.create_parameter([out_channels, in_channels, kernel_size], default_initializer=uniform)
        self.bias = self.create_parameter([out_channels], default_initializer=uniform)
        with paddle.no_grad():
            u, v = _unit(paddle.randn([out_channels], dtype=self.weight.dtype)), None
            for _ in range(15):  # a bad first estimate would scale the first logits up
                u, v = _power_iteration(self.weight.flatten(1), u)
        self.register_buffer("u", u)
        self.register_buffer("v", v)

    def forward(self, x: Tensor) -> Tensor:
        matrix, u, v = self.weight.flatten(1), self.u, self.v
        if self.training and paddle.is_grad_enabled() and not self.weight.stop_gradient:
            with paddle.no_grad():
                u, v = _power_iteration(matrix, u)  # new tensors: an earlier pass may still need the old values
                self.u.set_value(u)
                self.v.set_value(v)
        weight = self.weight / (u * paddle.mv(matrix, v)).sum()
        return F.conv1d(_wrap(x, self.reach), weight, self.bias)


def _power_iteration(matrix: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    v = _unit(paddle.matmul(u, matrix))
    return _unit(paddle.mv(matrix, v)), v


def _unit(x: Tensor, epsilon: float = 1e-12) -> Tensor:
    return x / x.norm().clip(min=epsilon)


def _wrap(x: Tensor, reach: int) -> Tensor:
    """[B, C, N] with its last `reach` tokens before and its first ones after it, also where N < reach."""
    if reach == 0:
        return x
    around = x if x.shape[-1] >= reach else paddle.concat([x] * -(-reach // x.shape[-1]), axis=-1)
    return paddle.concat([around[..., -reach:], x, around[..., :reach]], axis=-1)


class BatchNormLocal(nn.Layer):
    """Batch normalisation of [B, C, N] within groups of at most 8 neighbouring rows; no running statistics.

    ceil(B / 8) groups whose sizes differ by one at most, so that any B will do (StyleGAN-T, arXiv 2301.09515).
    """

    VIRTUAL_BATCH = 8

    def __init__(self, channels: int, epsilon: float = 1e-5):
        super().__init__()
        self.epsilon = epsilon
        self.weight = self.create_parameter([channels], default_initializer=nn.initializer.Constant(1.0))
        self.bias = self.create_parameter([channels], is_bias=True)

    def forward(self, x: Tensor) -> Tensor:
        within = paddle.to_tensor(_averaging(x.shape[0], self.VIRTUAL_BATCH), dtype=x.dtype)
        # Rows [B, C] are averaged over their group by a matrix product, and spread over the last axis only, which
        # Paddle does faster than over others.
        x = x - paddle.matmul(within, x.mean(-1)).unsqueeze(-1)
        variance = paddle.matmul(within, x.square().mean(-1))
        scale = self.weight * paddle.rsqrt(variance + self.epsilon)
        return x * scale.unsqueeze(-1) + self.bias.expand_as(scale).unsqueeze(-1)


def _averaging(rows: int, virtual_batch: int) -> np.ndarray:
    """[rows, rows]: replaces a value of every row by its mean over the row's group."""
    groups = np.array_split(np.arange(rows), -(-rows // virtual_batch))
    group = np.repeat(np.arange(len(groups)), [len(each) for each in groups])
    same = group[:, None] == group[None, :]
    return same / same.sum(1, keepdims=True)


class LaddHead(nn.Layer):
    """[B, C, h, w] features to [B, 1, h, w] logits: convolutions over the row-major sequence of tokens, 1, 9 and 1
    long, the second one residual. Spectral normalisation throughout, local batch normalisation after the first two.
    """

    def __init__(self, channels: int):
        super().__init__()

        def block(kernel_size: int) -> nn.Layer:
            convolution = SpectralConv1D(channels, channels, kernel_size)
            return nn.Sequential(convolution, BatchNormLocal(channels), nn.LeakyReLU(0.2))

        self.entry, self.residual, self.readout = block(1), block(9), SpectralConv1D(channels, 1)

    def forward(self, features: Tensor) -> Tensor:
        hidden = self.entry(features.flatten(2).astype(self.readout.weight.dtype))
        hidden = (self.residual(hidden) + hidden) * 0.5**0.5
        return self.readout(hidden).reshape([features.shape[0], 1, *features.shape[2:]])


class LaddDiscriminator(_Heads):
    """One `LaddHead` a tap: the heads of SANA-Sprint (arXiv 2503.09641), from LADD (arXiv 2403.12015).

    Its buffers, the vectors of `SpectralConv1D`, are as much of its state as the parameters: `state_dict` has both.
    """

    def __init__(self, channels: int, num_taps: int):
        super().__init__([LaddHead(channels) for _ in range(num_taps)])
