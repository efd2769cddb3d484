"""SANA's transformer on pixels, with class labels for prompts: the architecture at a size that trains in minutes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import MappingProxyType

from paddle import Tensor
from ppdiffusers import SchedulerMixin

from fast_diffusers.conditioning import Cond
from fast_diffusers.models import SanaControlNetModel, SanaTransformer2DModel
from fast_diffusers.pipelines.base import Pipeline
from fast_diffusers.pipelines.control import ControlMethods, check_controlnet
from fast_diffusers.pipelines.label import LabelMethods


class SanaLabelPipeline(ControlMethods, LabelMethods, Pipeline):
    """Label to image with SANA, or with a SANA-Sprint student (`guidance_embeds`); arguments as in `LabelMethods`.

    A teacher is guided by classifier-free guidance, at twice the cost; a scale of 1 or less runs the label alone.
    A label is the only text token. The transformer's channels are those of the image; its patches have any size.

    controlnet: reads `control_image`, which has the channels of an image; None without.
    """

    component_types = MappingProxyType(
        {"scheduler": SchedulerMixin, "transformer": SanaTransformer2DModel, "controlnet": SanaControlNetModel}
    )
    label_widths = ("caption_channels",)
    _callback_tensor_inputs = ("latents", "prompt_embeds", "negative_prompt_embeds")
    default_guidance = 4.5

    def __init__(
        self,
        scheduler: SchedulerMixin,
        transformer: SanaTransformer2DModel,
        num_classes: int = 10,
        sample_size: int = 8,
        controlnet: SanaControlNetModel | None = None,
    ):
        super().__init__(scheduler, transformer, num_classes, sample_size)
        self.register_modules(controlnet=controlnet)
        check_controlnet(controlnet, transformer)

    @property
    def default_steps(self) -> int:
        """See `LabelMethods`: 2 for a student, 20 for a teacher."""
        return 2 if self.transformer.config.guidance_embeds else 20

    @property
    def latent_channels(self) -> int:
        """See `Pipeline`: the channels of an image."""
        return self.transformer.config.in_channels

    @property
    def pixels_per_token(self) -> int:
        """See `Pipeline`: the edge of a patch."""
        return self.transformer.config.patch_size

    def encode_prompt(self, prompt: str | Sequence[str], num_images_per_prompt: int = 1) -> Tensor:
        """`prompt_embeds` [N, 1, num_classes], float32."""
        return self.one_hot(prompt, num_images_per_prompt).unsqueeze(1)

    def conditioning(self, prompts: Sequence[str]) -> Cond:
        """See `Pipeline`: `prompt_embeds` [N, 1, num_classes]."""
        return Cond(prompt_embeds=self.encode_prompt(list(prompts)))

    def _negative(self, number: int) -> Callable[[], Cond] | None:
        """See `LabelMethods`: the empty prompt, unless guidance is embedded."""
        return None if self.transformer.config.guidance_embeds else lambda: self.conditioning([""] * number)
