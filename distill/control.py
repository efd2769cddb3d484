"""Edges as control images: what a ControlNet is trained with, and how well samples follow them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import paddle

from distill.batches import Encoder, open_data
from distill.config import DataConfig
from distill.data import ImageBatches
from fast_diffusers.conditioning import Cond
from fast_diffusers.denoisers import Denoiser
from fast_diffusers.errors import UserError
from fast_diffusers.samplers.loop import Velocity

SEARCHED = 10
"""Images that are looked at for each control of a sample grid."""


def edge_map(images: np.ndarray) -> np.ndarray:
    """Length of the Sobel gradient of images [B, C, H, W] in [-1, 1], of each channel; float32 in [-1, 1], -1: flat.

    Borders repeat the last pixel. A step from black to white along a straight line is the strongest edge there is.
    """
    x = np.pad(images.astype(np.float32), ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge")
    rows = x[:, :, :-2] + 2 * x[:, :, 1:-1] + x[:, :, 2:]
    columns = x[..., :-2] + 2 * x[..., 1:-1] + x[..., 2:]
    across, down = rows[..., 2:] - rows[..., :-2], columns[:, :, 2:] - columns[:, :, :-2]
    return np.clip(np.hypot(across, down) / 4 - 1, -1, 1)


def agreement(images: np.ndarray, controls: np.ndarray) -> dict[str, float]:
    """How well images follow the edge maps that they were made under, both [N, C, H, W] in [-1, 1]; edges are compared.

    Returns:
        correlation: Pearson's over the elements of an image, mean over the images; of one without edges it is 0.
        overlap: Σ min(a, b) / Σ max(a, b) of the strengths of both from 0 up, mean over the images.
        found: the share of images that correlate with no other control of the set more than with their own.
    """
    found, wanted = ((edges.reshape(len(edges), -1) + 1.0).clip(0) for edges in (edge_map(images), controls))
    correlations = _standardised(found) @ _standardised(wanted).T
    own = np.diag(correlations)
    overlap = np.minimum(found, wanted).sum(1) / np.maximum(found, wanted).sum(1).clip(1e-12)
    return {
        "correlation": float(own.mean()),
        "overlap": float(overlap.mean()),
        "found": float(np.mean(own >= correlations.max(1))),
    }


def _standardised(rows: np.ndarray) -> np.ndarray:
    """Rows [N, D] less their means, of length 1, or 0 where they are constant."""
    rows = rows - rows.mean(1, keepdims=True)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-12)


class ControlEncoder(Encoder):
    """An Encoder whose conditioning has `control`, the latents of each image's edges.

    Args:
        pipe: as in `Encoder`.
        guidance_scale: as in `Encoder`.
        data: where the images of sample grids come from, each with the prompt asked for where there is one.
    """

    def __init__(self, pipe: Any, guidance_scale: float, data: DataConfig):
        super().__init__(pipe, guidance_scale)
        if data.cache is not None:
            raise UserError("data.cache keeps no control images: set data.cache=null to train a ControlNet")
        self.data = data

    def batch(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """See `Encoder`; the empty prompt comes with the same control."""
        found, control = super().batch(raw), self.controls(raw["images"])
        return found | {name: Cond(found[name], control=control) for name in ("cond", "null_cond")}

    def controls(self, images: np.ndarray) -> paddle.Tensor:
        """Images [B, C, H, W] in [-1, 1] to the latents of their edges."""
        return self.images(edge_map(images))

    def velocity(self, denoiser: Denoiser, prompts: list[str], guided: bool = False) -> Velocity:
        """See `Encoder`; under the controls of `examples`."""
        cond = Cond(self.prompts(prompts), control=self.controls(self.examples(prompts)))
        return lambda x, t, target_t: denoiser(x, t, cond, target_t=target_t, guidance=self.guidance_scale)

    def examples(self, prompts: Sequence[str]) -> np.ndarray:
        """An image [N, C, H, W] for each prompt from the start of the data: a new one with that prompt, or any."""
        batches = ImageBatches(open_data(self.data), self.data.height, self.data.width, self.pipe.image_channels)
        found = batches.fetch(np.arange(min(len(batches), SEARCHED * len(prompts))))
        left, chosen = list(range(len(found["prompts"]))), []
        for prompt in prompts:
            fits = [index for index in left if found["prompts"][index] == prompt]
            index = (fits or left or [0])[0]
            chosen.append(index)
            if index in left:
                left.remove(index)
        return found["images"][chosen]
