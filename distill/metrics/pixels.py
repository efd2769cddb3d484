"""How far images are from others of the same seeds, pixel by pixel."""

from __future__ import annotations

import numpy as np

ROUNDING = 1 / (12 * 255**2)
"""Mean square of what rounding to 8 bits does to values from 0 to 1. Images that agree are not told closer than that:
their peak signal-to-noise ratio is 58.9 dB instead of infinite."""


def psnr(images: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in dB of images uint8 [N, ...] against `reference`, one by one: float64 [N].

    It is −10 log10 of the mean squared difference of values from 0 to 1. ValueError for sets of different shapes.
    """
    if images.shape != reference.shape or images.dtype != np.uint8 or reference.dtype != np.uint8:
        raise ValueError(f"expected two uint8 arrays of one shape, got {images.shape} and {reference.shape}")
    difference = (images.astype(np.float64) - reference) / 255
    error = np.square(difference).reshape(len(images), -1).mean(axis=1)
    return -10 * np.log10(np.maximum(error, ROUNDING))
