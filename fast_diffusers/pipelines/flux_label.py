"""FLUX's transformer on pixels, with class labels for prompts: the architecture at a size that trains in minutes."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType

from paddle import Tensor
from ppdiffusers import SchedulerMixin

from fast_diffusers.conditioning import Cond
from fast_diffusers.models import FluxTransformer2DModel
from fast_diffusers.pipelines.base import Pipeline
from fast_diffusers.pipelines.label import LabelMethods


class FluxLabelPipeline(LabelMethods, Pipeline):
    """Label to image with FLUX; arguments as in `LabelMethods`.

    A label is both the only text token and the pooled embedding. The transformer's `in_channels` is 4 times the image's
    channels (patches of 2 x 2 pixels).
    """

    component_types = MappingProxyType({"scheduler": SchedulerMixin, "transformer": FluxTransformer2DModel})
    label_widths = ("joint_attention_dim", "pooled_projection_dim")
    default_steps = 28
    default_guidance = 3.5

    @property
    def latent_channels(self) -> int:
        """See `Pipeline`: the channels of an image."""
        return self.transformer.config.in_channels // 4

    def encode_prompt(self, prompt: str | Sequence[str], num_images_per_prompt: int = 1) -> tuple[Tensor, Tensor]:
        """(prompt_embeds [N, 1, num_classes], pooled_prompt_embeds [N, num_classes]), float32."""
        pooled = self.one_hot(prompt, num_images_per_prompt)
        return pooled.unsqueeze(1), pooled

    def conditioning(self, prompts: Sequence[str]) -> Cond:
        """See `Pipeline`: `prompt_embeds` [N, 1, num_classes] and `pooled_prompt_embeds` [N, num_classes]."""
        prompt_embeds, pooled = self.encode_prompt(list(prompts))
        return Cond(prompt_embeds=prompt_embeds, pooled_prompt_embeds=pooled)
