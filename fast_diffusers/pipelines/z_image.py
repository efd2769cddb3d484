"""Z-Image and Z-Image-Turbo (Z-Image Team 2025, arXiv 2511.22699): text to image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import paddle
from paddle import Tensor
from ppdiffusers import SchedulerMixin
from ppdiffusers.pipelines.pipeline_utils import ImagePipelineOutput

from fast_diffusers.conditioning import Cond
from fast_diffusers.models import AutoencoderKL, ZImageTransformer2DModel
from fast_diffusers.pipelines.base import Callback, Pipeline, as_prompts, encode_distinct
from fast_diffusers.pipelines.image_input import ImageInput
from fast_diffusers.pipelines.kl_latents import KLLatents
from fast_diffusers.pipelines.prompts import PromptMethods, Shapes
from fast_diffusers.random import AnyGenerator
from fast_diffusers.text_encoders import Qwen2Tokenizer, Qwen3Model

TEMPLATE = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
"""Qwen3's chat, thinking allowed, in which the published models see prompts."""


class ZImagePipeline(KLLatents, PromptMethods, Pipeline):
    """Text to image with Z-Image.

    Args:
        scheduler: any scheduler of flow-matching models.
        vae: None if only latents are wanted.
        text_encoder, tokenizer: Qwen3; None if embeddings are given instead of prompts.
        transformer: the velocity model.
    """

    component_types = MappingProxyType(
        {
            "scheduler": SchedulerMixin,
            "vae": AutoencoderKL,
            "text_encoder": Qwen3Model,
            "tokenizer": Qwen2Tokenizer,
            "transformer": ZImageTransformer2DModel,
        }
    )
    _callback_tensor_inputs = (
        "latents",
        "prompt_embeds",
        "prompt_embeds_mask",
        "negative_prompt_embeds",
        "negative_prompt_embeds_mask",
    )

    def __init__(
        self,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL | None,
        text_encoder: Qwen3Model | None,
        tokenizer: Qwen2Tokenizer | None,
        transformer: ZImageTransformer2DModel,
    ):
        super().__init__()
        self.register_modules(
            scheduler=scheduler, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, transformer=transformer
        )

    @property
    def latent_channels(self) -> int:
        """See `Pipeline`: 16 for the published models."""
        return self.transformer.config.in_channels

    @property
    def pixels_per_token(self) -> int:
        """See `Pipeline`: 16 for the published models."""
        return self.transformer.config.all_patch_size[0] * self.pixels_per_latent

    @property
    def text_shapes(self) -> Shapes:
        """See `PromptMethods`."""
        width = self.transformer.config.cap_feat_dim
        return {"prompt_embeds": ("N", "T", width), "prompt_embeds_mask": ("N", "T")}

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float = 5.0,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: AnyGenerator | Sequence[AnyGenerator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_embeds_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_embeds_mask: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        joint_attention_kwargs: Mapping[str, Any] | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int = 512,
        timesteps: Sequence[float] | None = None,
        image: ImageInput | None = None,
        strength: float | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Generate images; arguments as in `SanaPipeline`, where nothing else is said.

        Args:
            num_inference_steps: number of steps; diffusers' pipeline, whose last step does nothing, counts one more:
                Z-Image-Turbo's 9 steps are 8 here.
            guidance_scale: how much of the difference to the negative prompt is added to the prompt's velocity, which
                is one less than elsewhere; 1 or less (0 for Z-Image-Turbo) runs the prompt only.
            height, width: size in pixels, multiples of 16; default 1024.
            latents: initial noise [B, C, height / 8, width / 8] instead of drawing it.
            prompt_embeds, prompt_embeds_mask: embeddings [N, T, D] and mask [N, T] instead of prompts.
            max_sequence_length: number of text tokens at most.
            image, strength: where to begin instead of noise, see `FluxPipeline`.
        """
        embeds = self._given(prompt_embeds, prompt_embeds_mask)
        null = self._given(negative_prompt_embeds, negative_prompt_embeds_mask, prefix="negative_")
        number = self._count(prompt, embeds)
        self._check_decodable(output_type)
        negative = None
        if guidance_scale > 1:
            negative = self._negative(
                negative_prompt, null, number, lambda texts: self.conditioning(texts, max_sequence_length)
            )
        return self._generate(
            lambda: self.conditioning(as_prompts(prompt), max_sequence_length) if embeds is None else embeds,
            number,
            negative=negative,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            timesteps=timesteps,
            sigmas=sigmas,
            guidance_scale=1 + guidance_scale,
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

    @paddle.no_grad()
    def encode_prompt(
        self, prompt: str | Sequence[str], num_images_per_prompt: int = 1, max_sequence_length: int = 512
    ) -> tuple[Tensor, Tensor]:
        """(prompt_embeds [N * num_images_per_prompt, max_sequence_length, D], prompt_embeds_mask [.., T])."""
        cond = self.conditioning(as_prompts(prompt), max_sequence_length).repeat_interleave(num_images_per_prompt)
        return cond["prompt_embeds"], cond["prompt_embeds_mask"]

    @paddle.no_grad()
    def conditioning(self, prompts: Sequence[str], max_sequence_length: int = 512) -> Cond:
        """See `Pipeline`: `prompt_embeds` [N, T, D], the last hidden state but one, and `prompt_embeds_mask` [N, T]."""
        self._require_text_parts()

        def encode(texts: list[str]) -> Cond:
            ids, mask = self.tokenizer(
                texts, max_sequence_length, template=TEMPLATE, padding="max_length", padding_side="right"
            )
            states = self.text_encoder(ids, mask, output_hidden_states=True).hidden_states[-2]
            return Cond(prompt_embeds=states, prompt_embeds_mask=mask)

        return encode_distinct(prompts, encode)
