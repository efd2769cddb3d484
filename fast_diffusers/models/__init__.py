"""Model families in Paddle, with HF diffusers' parameter names."""

from fast_diffusers.models.autoencoder_dc import AutoencoderDC
from fast_diffusers.models.autoencoder_kl import AutoencoderKL
from fast_diffusers.models.autoencoder_kl_qwen_image import AutoencoderKLQwenImage
from fast_diffusers.models.controlnet_sana import SanaControlNetModel
from fast_diffusers.models.flux import FluxTransformer2DModel
from fast_diffusers.models.qwen_image import QwenImageTransformer2DModel
from fast_diffusers.models.sana import SanaTransformer2DModel
from fast_diffusers.models.sd3 import SD3Transformer2DModel
from fast_diffusers.models.z_image import ZImageTransformer2DModel

__all__ = [
    "AutoencoderDC",
    "AutoencoderKL",
    "AutoencoderKLQwenImage",
    "FluxTransformer2DModel",
    "QwenImageTransformer2DModel",
    "SD3Transformer2DModel",
    "SanaControlNetModel",
    "SanaTransformer2DModel",
    "ZImageTransformer2DModel",
]
