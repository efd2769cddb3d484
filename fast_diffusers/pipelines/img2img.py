"""Image to image, under the names that ppdiffusers and diffusers have for it.

A pipeline's call takes `image` and `strength` itself; these classes are for programs that were written for the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ppdiffusers.pipelines.pipeline_utils import ImagePipelineOutput

from fast_diffusers.errors import UserError
from fast_diffusers.pipelines.flux import FluxPipeline
from fast_diffusers.pipelines.image_input import ImageInput
from fast_diffusers.pipelines.image_start import DEFAULT_STRENGTH
from fast_diffusers.pipelines.qwen_image import QwenImagePipeline
from fast_diffusers.pipelines.sd3 import StableDiffusion3Pipeline
from fast_diffusers.pipelines.z_image import ZImagePipeline


class FromImage:
    """Makes the image an argument that must be there; stands before a pipeline's class, whose folders it opens."""

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        image: ImageInput | None = None,
        strength: float = DEFAULT_STRENGTH,
        **call: Any,
    ) -> ImagePipelineOutput | tuple:
        """Change an image; further arguments are those of the text-to-image pipeline, by name.

        Args:
            prompt: one prompt or several.
            image: where to begin, one for all prompts or one each: PIL images, arrays in [0, 1] or of uint8, or a
                tensor in [-1, 1].
            strength: how much of the schedule runs: 0 returns the image, 1 begins with noise alone.
        """
        if image is None:
            raise UserError(f"{type(self).__name__} needs an image to begin from")
        return super().__call__(prompt, image=image, strength=strength, **call)


class FluxImg2ImgPipeline(FromImage, FluxPipeline):
    """Image to image with FLUX.1."""


class StableDiffusion3Img2ImgPipeline(FromImage, StableDiffusion3Pipeline):
    """Image to image with Stable Diffusion 3 and 3.5."""


class QwenImageImg2ImgPipeline(FromImage, QwenImagePipeline):
    """Image to image with Qwen-Image."""


class ZImageImg2ImgPipeline(FromImage, ZImagePipeline):
    """Image to image with Z-Image."""
