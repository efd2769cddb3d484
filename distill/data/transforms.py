"""Pixels of any size to network input: resize, crop, channels, range."""

import numpy as np
from PIL import Image, ImageOps


def fit_image(image: np.ndarray, height: int, width: int, channels: int) -> np.ndarray:
    """Lanczos resize and centre crop that fill height × width, then gray to RGB or RGB to gray (ITU-R 601 luma).

    Args:
        image: uint8 [H, W, 1 or 3].
        channels: 1 or 3.

    Returns:
        uint8 [channels, height, width].
    """
    if image.shape[:2] != (height, width):
        pillow = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
        image = np.asarray(ImageOps.fit(pillow, (width, height), Image.Resampling.LANCZOS)).reshape(height, width, -1)
    if image.shape[2] > channels:
        image = np.asarray(Image.fromarray(image).convert("L"))[..., None]
    return np.broadcast_to(image.transpose(2, 0, 1), (channels, height, width))


def normalise(pixels: np.ndarray) -> np.ndarray:
    """uint8 0..255 to float32 in [-1, 1], any shape."""
    out = pixels.astype(np.float32)
    out /= 127.5
    out -= 1
    return out
