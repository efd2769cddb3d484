"""Images that a user hands to a pipeline, as one tensor."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import paddle
from paddle import Tensor
from PIL import Image

from fast_diffusers.errors import UserError

ImageInput = Image.Image | np.ndarray | Tensor | Sequence[Image.Image | np.ndarray]


def image_size(images: ImageInput) -> tuple[int, int] | None:
    """(height, width) of the first image; None of what is not one, which `image_tensor` refuses."""
    if isinstance(images, list | tuple) and images:
        images = images[0]
    if isinstance(images, Image.Image):
        return images.height, images.width
    if isinstance(images, Tensor) and images.ndim == 4:
        return tuple(images.shape[2:])
    if isinstance(images, np.ndarray) and images.ndim in (3, 4):
        return images.shape[-3:-1]
    return None


def image_tensor(images: ImageInput, height: int, width: int, what: str = "image", channels: int = 3) -> Tensor:
    """Images as float32 [B, channels, height, width] in [-1, 1].

    Args:
        images: PIL images, which are made RGB or gray and resized (Lanczos); arrays [height, width, channels], uint8
            or floats in [0, 1], or one array [B, height, width, channels]; or a tensor [B, channels, height, width] in
            [-1, 1].
        height, width: the size in pixels, which arrays and tensors must have already.
        what: the argument's name, for messages.
        channels: 3, or 1 for gray images.

    Raises:
        UserError: another type, shape or range.
    """
    if isinstance(images, Tensor):
        _check_shape(images.shape, [None, channels, height, width], what)
        return images.astype("float32")
    if isinstance(images, np.ndarray) and images.ndim == 4:
        images = list(images)
    images = images if isinstance(images, list | tuple) else [images]
    if not images:
        raise UserError(f"{what} is an empty list")
    arrays = np.stack([_array(image, [height, width, channels], what) for image in images])
    return paddle.to_tensor(arrays.transpose(0, 3, 1, 2) * np.float32(2) - np.float32(1))


def _array(image: Image.Image | np.ndarray, shape: Sequence[int], what: str) -> np.ndarray:
    """Float32 of that shape [height, width, channels] in [0, 1]."""
    height, width, channels = shape
    if isinstance(image, Image.Image):
        image = image.convert("RGB" if channels == 3 else "L")
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.LANCZOS)
        image = np.asarray(image).reshape(shape)
    if not isinstance(image, np.ndarray):
        raise UserError(f"{what} must be PIL images, arrays or a tensor, got {type(image).__name__}")
    _check_shape(image.shape, shape, what)
    values = image.astype(np.float32) / (255 if image.dtype == np.uint8 else 1)
    if not (values.min() >= 0 and values.max() <= 1):
        raise UserError(f"{what}: arrays are uint8, or floats in [0, 1]; got {values.min():g} to {values.max():g}")
    return values


def _check_shape(shape: Sequence[int], expected: Sequence[int | None], what: str) -> None:
    if len(shape) != len(expected) or any(e is not None and s != e for s, e in zip(shape, expected, strict=True)):
        wanted = ", ".join("B" if e is None else str(e) for e in expected)
        raise UserError(f"{what} must have shape [{wanted}], got {list(shape)}")
