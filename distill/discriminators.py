"""Discriminator heads on the features of a frozen teacher."""

from collections.abc import Sequence
from typing import Any

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


class PatchDiscriminator(nn.Layer):
    """One `PatchHead` a tap: FLUX-Lightning puts one behind every transformer block (57 heads, 1.077 B parameters).

    forward: a list of features, each [B, C, h, w], to the list of logits [B, 1, h, w] in the heads' dtype.
    """

    def __init__(self, channels: int, num_taps: int, checkpointing: bool = False):
        super().__init__()
        self.heads = nn.LayerList([PatchHead(channels, checkpointing) for _ in range(num_taps)])

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        if len(features) != len(self.heads):
            raise ValueError(f"{len(self.heads)} discriminator heads got {len(features)} feature maps")
        return [head(x) for head, x in zip(self.heads, features, strict=True)]
