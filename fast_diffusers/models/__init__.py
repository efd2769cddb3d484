"""Model families in Paddle, with HF diffusers' parameter names."""

from fast_diffusers.models.autoencoder_kl import AutoencoderKL
from fast_diffusers.models.flux import FluxTransformer2DModel

__all__ = ["AutoencoderKL", "FluxTransformer2DModel"]
