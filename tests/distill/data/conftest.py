import io

import numpy as np
import pytest
from PIL import Image


def encode_png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def png():
    """uint8 [H, W, C] -> PNG bytes."""
    return encode_png


@pytest.fixture
def pictures() -> np.ndarray:
    """Six different images, uint8 [6, 5, 7, 3]."""
    return np.random.default_rng(0).integers(0, 256, (6, 5, 7, 3), dtype=np.uint8)
