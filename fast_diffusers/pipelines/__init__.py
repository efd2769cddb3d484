"""Text-to-image pipelines with ppdiffusers' interface."""

from fast_diffusers.pipelines.base import Pipeline
from fast_diffusers.pipelines.flux import FluxPipeline
from fast_diffusers.pipelines.flux_label import FluxLabelPipeline
from fast_diffusers.pipelines.qwen_image import QwenImagePipeline
from fast_diffusers.pipelines.sana import SanaPipeline, SanaSprintPipeline
from fast_diffusers.pipelines.sana_label import SanaLabelPipeline
from fast_diffusers.pipelines.sd3 import StableDiffusion3Pipeline
from fast_diffusers.pipelines.z_image import ZImagePipeline

__all__ = [
    "FluxLabelPipeline",
    "FluxPipeline",
    "Pipeline",
    "QwenImagePipeline",
    "SanaLabelPipeline",
    "SanaPipeline",
    "SanaSprintPipeline",
    "StableDiffusion3Pipeline",
    "ZImagePipeline",
]
