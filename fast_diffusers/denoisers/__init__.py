"""Denoisers: the one interface through which samplers and objectives see a model, and its adapters, one a family."""

from fast_diffusers.denoisers.base import Denoiser, TransformerDenoiser
from fast_diffusers.denoisers.flux import FluxDenoiser
from fast_diffusers.denoisers.guided import ClassifierFree
from fast_diffusers.denoisers.qwen_image import QwenImageDenoiser
from fast_diffusers.denoisers.registry import ADAPTERS, denoiser_for
from fast_diffusers.denoisers.sana import SanaDenoiser
from fast_diffusers.denoisers.sd3 import SD3Denoiser
from fast_diffusers.denoisers.z_image import ZImageDenoiser

__all__ = [
    "ADAPTERS",
    "ClassifierFree",
    "Denoiser",
    "FluxDenoiser",
    "QwenImageDenoiser",
    "SD3Denoiser",
    "SanaDenoiser",
    "TransformerDenoiser",
    "ZImageDenoiser",
    "denoiser_for",
]
