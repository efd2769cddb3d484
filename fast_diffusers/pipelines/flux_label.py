"""FLUX's transformer on pixels, with class labels for prompts: the architecture at a size that trains in minutes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import paddle
from paddle import Tensor
from ppdiffusers import SchedulerMixin
from ppdiffusers.pipelines.pipeline_utils import ImagePipelineOutput

from fast_diffusers.conditioning import Cond
from fast_diffusers.errors import UserError
from fast_diffusers.models import FluxTransformer2DModel
from fast_diffusers.pipelines.base import Callback, Pipeline, as_prompts
from fast_diffusers.random import AnyGenerator


class FluxLabelPipeline(Pipeline):
    """Label to image, without a VAE: latents are the pixels in [-1, 1], prompts are "0", "1", ...

    A label is embedded as a one-hot vector, once as the only text token and once as the pooled embedding; the empty
    prompt is all zeros. The transformer's `in_channels` is 4 times the image's channels (patches of 2 x 2 pixels).

    Args:
        scheduler: any scheduler of flow-matching models.
        transformer: its `joint_attention_dim` and `pooled_projection_dim` are `num_classes`.
        num_classes: number of labels.
        sample_size: height and width in pixels of an image when none is asked for; even.
    """

    component_types = MappingProxyType({"scheduler": SchedulerMixin, "transformer": FluxTransformer2DModel})
    pixels_per_latent = 1

    def __init__(
        self,
        scheduler: SchedulerMixin,
        transformer: FluxTransformer2DModel,
        num_classes: int = 10,
        sample_size: int = 8,
    ):
        super().__init__()
        self.register_modules(scheduler=scheduler, transformer=transformer)
        self.register_to_config(num_classes=num_classes, sample_size=sample_size)
        config = transformer.config
        if not config.joint_attention_dim == config.pooled_projection_dim == num_classes:
            raise UserError(
                f"{num_classes} classes need joint_attention_dim = pooled_projection_dim = {num_classes}, "
                f"this transformer has {config.joint_attention_dim} and {config.pooled_projection_dim}"
            )

    @property
    def latent_channels(self) -> int:
        """See `Pipeline`: the channels of an image."""
        return self.transformer.config.in_channels // 4

    @property
    def default_size(self) -> int:
        """See `Pipeline`."""
        return self.config.sample_size

    def __call__(
        self,
        prompt: str | Sequence[str],
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 28,
        timesteps: Sequence[float] | None = None,
        guidance_scale: float = 3.5,
        num_images_per_prompt: int = 1,
        generator: AnyGenerator | Sequence[AnyGenerator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        joint_attention_kwargs: Mapping[str, Any] | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        sigmas: Sequence[float] | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Generate images of labels; arguments as in `FluxPipeline`, sizes being multiples of 2."""
        prompts = as_prompts(prompt)
        self._labels(prompts)
        return self._generate(
            lambda: self.conditioning(prompts),
            len(prompts),
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            timesteps=timesteps,
            sigmas=sigmas,
            guidance_scale=guidance_scale,
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
            latents=latents,
            output_type=output_type,
            return_dict=return_dict,
            joint_attention_kwargs=joint_attention_kwargs,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )

    def encode_prompt(self, prompt: str | Sequence[str], num_images_per_prompt: int = 1) -> tuple[Tensor, Tensor]:
        """(prompt_embeds [N, 1, num_classes], pooled_prompt_embeds [N, num_classes]), float32."""
        table = np.eye(self.config.num_classes + 1, self.config.num_classes, dtype=np.float32)
        rows = np.repeat(table[self._labels(as_prompts(prompt))], num_images_per_prompt, axis=0)
        pooled = paddle.to_tensor(rows)
        return pooled.unsqueeze(1), pooled

    def conditioning(self, prompts: Sequence[str]) -> Cond:
        """See `Pipeline`: `prompt_embeds` [N, 1, num_classes] and `pooled_prompt_embeds` [N, num_classes]."""
        prompt_embeds, pooled = self.encode_prompt(list(prompts))
        return Cond(prompt_embeds=prompt_embeds, pooled_prompt_embeds=pooled)

    def encode_images(self, images: Tensor, generator: AnyGenerator | None = None) -> Tensor:
        """Images [B, C, H, W] in [-1, 1] as float32: latents are pixels here, so the generator has nothing to do."""
        return images.astype("float32")

    def decode_latents(self, latents: Tensor) -> Tensor:
        """See `Pipeline`: the latents as float32."""
        return latents.astype("float32")

    def _labels(self, prompts: Sequence[str]) -> list[int]:
        """Label of each prompt; `num_classes` stands for none."""
        number = self.config.num_classes
        labels = {str(label): label for label in range(number)} | {"": number}
        for prompt in prompts:
            if prompt not in labels:
                raise UserError(
                    f"prompts of this model are the labels 0 to {number - 1} (or '' for none), got {prompt!r}"
                )
        return [labels[prompt] for prompt in prompts]
