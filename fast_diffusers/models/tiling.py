"""Run a map of images on overlapping tiles and blend the results: large images in bounded memory."""

from collections.abc import Callable

import paddle


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles start that cover `length`; the last one ends at the border, so that every tile is full."""
    if tile >= length:
        return [0]
    return [*range(0, length - tile, tile - overlap), length - tile]


def run_tiled(
    function: Callable[[paddle.Tensor], paddle.Tensor],
    x: paddle.Tensor,
    tile: tuple[int, int],
    overlap: tuple[int, int],
    scale: int | float = 1,
) -> paddle.Tensor:
    """function(x) from tiles of x.

    Where tiles overlap their results are averaged with weights that fall towards a tile's edge as the square of the
    distance, so a function of single pixels gives what it gives on the whole image, and others change without a seam.
    Near its edge a tile misses its surroundings: squares halve the error of linear weights there.

    Args:
        function: maps [B, C, h, w] to [B, C', h * scale, w * scale].
        x: [B, C, H, W].
        tile: rows and columns of a tile.
        overlap: rows and columns that neighbours share at least; less than a tile.
        scale: output pixels per input pixel; where it is a fraction 1 / n, all sizes must be multiples of n.
    """
    height, width = x.shape[2:]
    rows, columns = min(tile[0], height), min(tile[1], width)
    window = _ramp(rows, overlap[0], scale).unsqueeze(-1) * _ramp(columns, overlap[1], scale)
    total, weight = None, paddle.zeros([round(height * scale), round(width * scale)])
    for top in tile_starts(height, rows, overlap[0]):
        for left in tile_starts(width, columns, overlap[1]):
            part = function(x[:, :, top : top + rows, left : left + columns])
            if total is None:
                total = paddle.zeros([*part.shape[:2], *weight.shape], dtype=part.dtype)
            y, down = round(top * scale), part.shape[2]
            z, right = round(left * scale), part.shape[3]
            total[:, :, y : y + down, z : z + right] += part * window.astype(part.dtype)
            weight[y : y + down, z : z + right] += window
    return total / weight.astype(total.dtype)


def _ramp(length: int, overlap: int, scale: float) -> paddle.Tensor:
    """Weights over a tile's output pixels: 1 in the middle, falling over the overlap to almost 0 at both edges."""
    size, fade = round(length * scale), max(1, round(overlap * scale))
    position = paddle.arange(size, dtype="float32")
    return ((paddle.minimum(position, size - 1 - position) + 0.5).clip(max=fade) / fade) ** 2
