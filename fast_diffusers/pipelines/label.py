"""What pipelines of class labels share: one-hot prompts, and pixels for latents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import paddle
from paddle import Tensor, nn
from ppdiffusers import SchedulerMixin
from ppdiffusers.pipelines.pipeline_utils import ImagePipelineOutput

from fast_diffusers.conditioning import Cond
from fast_diffusers.denoisers import Denoiser
from fast_diffusers.errors import UserError
from fast_diffusers.pipelines.base import Callback, as_prompts
from fast_diffusers.pipelines.image_input import ImageInput
from fast_diffusers.random import AnyGenerator


class LabelMethods:
    """Label to image, without a VAE: latents are the pixels in [-1, 1], prompts are "0", "1", ...

    A label is embedded as a one-hot vector; the empty prompt is all zeros. It stands before `Pipeline` among the bases
    of a class, which gives the types of the components and the transformer's geometry.

    Args:
        scheduler: any scheduler of flow-matching models.
        transformer: the entries `label_widths` of its config are `num_classes`.
        num_classes: number of labels.
        sample_size: height and width in pixels of an image when none is asked for; even.
    """

    label_widths: ClassVar[tuple[str, ...]]
    pixels_per_latent = 1

    def __init__(self, scheduler: SchedulerMixin, transformer: nn.Layer, num_classes: int = 10, sample_size: int = 8):
        super().__init__()
        self.register_modules(scheduler=scheduler, transformer=transformer)
        self.register_to_config(num_classes=num_classes, sample_size=sample_size)
        widths = {name: transformer.config[name] for name in self.label_widths}
        if set(widths.values()) != {num_classes}:
            raise UserError(
                f"{num_classes} classes need {' = '.join(widths)} = {num_classes}, "
                f"this transformer has {' and '.join(map(str, widths.values()))}"
            )

    @property
    def image_channels(self) -> int:
        """See `Pipeline`."""
        return self.latent_channels

    @property
    def default_size(self) -> int:
        """See `Pipeline`."""
        return self.config.sample_size

    @property
    def default_steps(self) -> int:
        """Number of steps when none is given."""
        raise NotImplementedError

    @property
    def default_guidance(self) -> float:
        """Guidance scale when none is given."""
        raise NotImplementedError

    def __call__(
        self,
        prompt: str | Sequence[str],
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        timesteps: Sequence[float] | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: AnyGenerator | Sequence[AnyGenerator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        joint_attention_kwargs: Mapping[str, Any] | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        sigmas: Sequence[float] | None = None,
        image: ImageInput | None = None,
        strength: float | None = None,
        control_image: ImageInput | None = None,
        controlnet_conditioning_scale: float = 1.0,
    ) -> ImagePipelineOutput | tuple:
        """Generate images of labels; arguments as in `FluxPipeline`, sizes being multiples of 2.

        control_image, controlnet_conditioning_scale: as in `SanaPipeline`; for models that can have a ControlNet.
        """
        prompts = as_prompts(prompt)
        self._labels(prompts)
        scale = self.default_guidance if guidance_scale is None else guidance_scale
        size = (height, width) if image is None else self._size_of(image, height, width)
        encode, denoiser = self._with_control(
            lambda: self.conditioning(prompts), control_image, controlnet_conditioning_scale, len(prompts), *size
        )
        return self._generate(
            encode,
            len(prompts),
            denoiser=denoiser,
            height=height,
            width=width,
            num_inference_steps=self.default_steps if num_inference_steps is None else num_inference_steps,
            timesteps=timesteps,
            sigmas=sigmas,
            guidance_scale=scale,
            negative=self._negative(len(prompts)) if scale > 1 else None,
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
            latents=latents,
            output_type=output_type,
            return_dict=return_dict,
            joint_attention_kwargs=joint_attention_kwargs,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
            image=image,
            strength=strength,
        )

    def one_hot(self, prompts: str | Sequence[str], num_images_per_prompt: int = 1) -> Tensor:
        """Labels as float32 rows [N, num_classes], zeros for the empty prompt; those of a prompt are neighbours."""
        table = np.eye(self.config.num_classes + 1, self.config.num_classes, dtype=np.float32)
        return paddle.to_tensor(np.repeat(table[self._labels(as_prompts(prompts))], num_images_per_prompt, axis=0))

    def encode_images(self, images: Tensor, generator: AnyGenerator | None = None) -> Tensor:
        """Images [B, C, H, W] in [-1, 1] as float32: latents are pixels here, so the generator has nothing to do."""
        return images.astype("float32")

    def decode_latents(self, latents: Tensor) -> Tensor:
        """See `Pipeline`: the latents as float32."""
        return latents.astype("float32")

    def conditioning(self, prompts: Sequence[str]) -> Cond:
        """See `Pipeline`."""
        raise NotImplementedError

    def _with_control(
        self, encode: Callable[[], Cond], image: ImageInput | None, *arguments: Any
    ) -> tuple[Callable[[], Cond], Denoiser | None]:
        """See `ControlMethods`, which a class that can have a ControlNet derives from; others take no image."""
        if image is not None:
            raise UserError(f"{type(self).__name__} has no ControlNet that could read control_image")
        return encode, None

    def _negative(self, number: int) -> Callable[[], Cond] | None:
        """What `number` prompts are led away from by classifier-free guidance; None for models that need none."""
        return None

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
