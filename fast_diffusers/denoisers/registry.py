"""Which adapter belongs to which transformer."""

from __future__ import annotations

from paddle import nn

from fast_diffusers.denoisers.base import Denoiser
from fast_diffusers.denoisers.flux import FluxDenoiser
from fast_diffusers.denoisers.qwen_image import QwenImageDenoiser
from fast_diffusers.denoisers.sana import SanaDenoiser
from fast_diffusers.denoisers.sd3 import SD3Denoiser
from fast_diffusers.denoisers.z_image import ZImageDenoiser
from fast_diffusers.target_time import AttachedDenoiser, attached

ADAPTERS = {
    "FluxTransformer2DModel": FluxDenoiser,
    "QwenImageTransformer2DModel": QwenImageDenoiser,
    "SD3Transformer2DModel": SD3Denoiser,
    "SanaTransformer2DModel": SanaDenoiser,
    "ZImageTransformer2DModel": ZImageDenoiser,
}
"""Adapter class by the name of the transformer class; names, so that using one family does not import them all."""


def denoiser_for(transformer: nn.Layer) -> Denoiser:
    """The denoiser of a transformer, chosen by its class (or a base class of it); see also `target_time.attach`."""
    for cls in type(transformer).__mro__:
        if cls.__name__ in ADAPTERS:
            denoiser = ADAPTERS[cls.__name__](transformer)
            return AttachedDenoiser(denoiser) if attached(transformer) else denoiser
    raise TypeError(f"no denoiser adapter for {type(transformer).__name__}; there are adapters for {sorted(ADAPTERS)}")
