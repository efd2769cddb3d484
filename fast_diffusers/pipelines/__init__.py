"""Text-to-image and image-to-image pipelines with ppdiffusers' interface."""

from fast_diffusers.pipelines.base import Pipeline
from fast_diffusers.pipelines.flux import FluxPipeline
from fast_diffusers.pipelines.flux_label import FluxLabelPipeline
from fast_diffusers.pipelines.from_ppdiffusers import from_ppdiffusers
from fast_diffusers.pipelines.img2img import (
    FluxImg2ImgPipeline,
    QwenImageImg2ImgPipeline,
    StableDiffusion3Img2ImgPipeline,
    ZImageImg2ImgPipeline,
)
from fast_diffusers.pipelines.qwen_image import QwenImagePipeline
from fast_diffusers.pipelines.sana import SanaPipeline, SanaSprintPipeline
from fast_diffusers.pipelines.sana_label import SanaLabelPipeline
from fast_diffusers.pipelines.sd3 import StableDiffusion3Pipeline
from fast_diffusers.pipelines.z_image import ZImagePipeline

__all__ = [
    "FluxImg2ImgPipeline",
    "FluxLabelPipeline",
    "FluxPipeline",
    "Pipeline",
    "QwenImageImg2ImgPipeline",
    "QwenImagePipeline",
    "SanaLabelPipeline",
    "SanaPipeline",
    "SanaSprintPipeline",
    "StableDiffusion3Img2ImgPipeline",
    "StableDiffusion3Pipeline",
    "ZImageImg2ImgPipeline",
    "ZImagePipeline",
    "from_ppdiffusers",
]
