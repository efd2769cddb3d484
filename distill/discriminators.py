"""Discriminator heads on the features of a frozen teacher."""

from collections.abc import Sequence

import paddle
from paddle import nn


class PatchHead(nn.Layer):
    """[B, C, h, w] features to [B, 1, h, w] logits: two 1×1 convolution blocks, the second residual, and a read-out.

    About 2·C² parameters (18.9 M for FLUX's C = 3072). GroupNorm takes 32 groups, or the largest power of two that
    divides C.
    """

    def __init__(self, channels: int):
        super().__init__()
        groups = min(32, channels & -channels)

        def block() -> nn.Layer:
            return nn.Sequential(
                nn.Conv2D(channels, channels, 1), nn.GroupNorm(groups, channels), nn.LeakyReLU(negative_slope=0.2)
            )

        self.entry, self.residual, self.readout = block(), block(), nn.Conv2D(channels, 1, 1)

    def forward(self, features: paddle.Tensor) -> paddle.Tensor:
        hidden = self.entry(features)
        return self.readout(hidden + self.residual(hidden))


class PatchDiscriminator(nn.Layer):
    """One `PatchHead` a tap: FLUX-Lightning puts one behind every transformer block (57 heads, 1.077 B parameters).

    forward: a list of features, each [B, C, h, w], to the list of logits [B, 1, h, w] in the heads' dtype.
    """

    def __init__(self, channels: int, num_taps: int):
        super().__init__()
        self.heads = nn.LayerList([PatchHead(channels) for _ in range(num_taps)])

    def forward(self, features: Sequence[paddle.Tensor]) -> list[paddle.Tensor]:
        if len(features) != len(self.heads):
            raise ValueError(f"{len(self.heads)} discriminator heads got {len(features)} feature maps")
        dtype = self.heads[0].readout.weight.dtype
        return [head(x.astype(dtype)) for head, x in zip(self.heads, features, strict=True)]
