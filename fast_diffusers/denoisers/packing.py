"""Latents as tokens of 2 x 2 patches, for the transformers that take them packed."""

from __future__ import annotations

from paddle import Tensor


def check_packable(x: Tensor, in_channels: int, family: str) -> None:
    """ValueError unless latents [B, C, H, W] can be packed into tokens of `in_channels` features."""
    if x.ndim != 4 or 4 * x.shape[1] != in_channels or x.shape[2] % 2 or x.shape[3] % 2:
        raise ValueError(
            f"latents of shape {list(x.shape)} do not fit this {family} model: "
            f"it takes [B, {in_channels // 4}, H, W] with even H and W"
        )


def pack(x: Tensor) -> Tensor:
    """[B, C, 2h, 2w] -> tokens [B, h w, 4C], features ordered (channel, row in patch, column in patch)."""
    batch, channels, height, width = x.shape
    patches = x.reshape([batch, channels, height // 2, 2, width // 2, 2]).transpose([0, 2, 4, 1, 3, 5])
    return patches.reshape([batch, (height // 2) * (width // 2), channels * 4])


def unpack(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of `pack`: tokens [B, rows columns, 4C] -> [B, C, 2 rows, 2 columns]."""
    batch, _, features = tokens.shape
    patches = tokens.reshape([batch, rows, columns, features // 4, 2, 2]).transpose([0, 3, 1, 4, 2, 5])
    return patches.reshape([batch, features // 4, 2 * rows, 2 * columns])
