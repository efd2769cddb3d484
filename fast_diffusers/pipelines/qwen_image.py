"""Qwen-Image (Qwen Team 2025, arXiv 2508.02324): text to image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from types import MappingProxyType
from typing import Any

import numpy as np
import paddle
from paddle import Tensor
from ppdiffusers import SchedulerMixin
from ppdiffusers.pipelines.pipeline_utils import ImagePipelineOutput

from fast_diffusers.conditioning import Cond
from fast_diffusers.denoisers import ClassifierFree
from fast_diffusers.errors import UserError
from fast_diffusers.models import AutoencoderKLQwenImage, QwenImageTransformer2DModel
from fast_diffusers.pipelines.base import Callback, Pipeline, as_prompts, encode_distinct
from fast_diffusers.pipelines.image_input import ImageInput
from fast_diffusers.pipelines.prompts import PromptMethods, Shapes, fit_text
from fast_diffusers.random import AnyGenerator
from fast_diffusers.text_encoders import Qwen2_5_VLTextModel, Qwen2Tokenizer
from fast_diffusers.transports import expand_time, per_sample

LONGEST_PROMPT = 1024
"""Tokens of a prompt that the text encoder reads."""

TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
"""The chat in which the published model was trained to see prompts; what stands before the prompt is left out again."""


class TokenNormGuidance(ClassifierFree):
    """Classifier-free guidance that gives every token (2 x 2 latents) the length of its conditional velocity.

    Qwen-Image's published sampler does so against too strong contrasts.
    """

    def __call__(
        self,
        x: Tensor,
        t: Tensor | float,
        cond: Mapping[str, Tensor],
        *,
        target_t: Tensor | float | None = None,
        guidance: Tensor | float | None = None,
    ) -> Tensor:
        """See `ClassifierFree`."""
        if guidance is None:
            return self.denoiser(x, t, cond, target_t=target_t)
        times = [None if each is None else paddle.concat([per_sample(each, x)] * 2) for each in (t, target_t)]
        both = self.denoiser(paddle.concat([x, x]), times[0], self._conditions(cond, x.shape[0]), target_t=times[1])
        conditional, null = both.chunk(2)
        guided = null + expand_time(guidance, null) * (conditional - null)
        return guided * (_token_norm(conditional) / _token_norm(guided).clip(min=1e-12))


class QwenImagePipeline(PromptMethods, Pipeline):
    """Text to image with Qwen-Image.

    Args:
        scheduler: any scheduler of flow-matching models.
        vae: None if only latents are wanted.
        text_encoder, tokenizer: the text part of Qwen2.5-VL; None if embeddings are given instead of prompts.
        transformer: the velocity model.
    """

    component_types = MappingProxyType(
        {
            "scheduler": SchedulerMixin,
            "vae": AutoencoderKLQwenImage,
            "text_encoder": Qwen2_5_VLTextModel,
            "tokenizer": Qwen2Tokenizer,
            "transformer": QwenImageTransformer2DModel,
        }
    )
    classifier_free = TokenNormGuidance
    attention_argument = "attention_kwargs"
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
        vae: AutoencoderKLQwenImage | None,
        text_encoder: Qwen2_5_VLTextModel | None,
        tokenizer: Qwen2Tokenizer | None,
        transformer: QwenImageTransformer2DModel,
    ):
        super().__init__()
        self.register_modules(
            scheduler=scheduler, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, transformer=transformer
        )

    @property
    def latent_channels(self) -> int:
        """See `Pipeline`: 16 for the published model."""
        return self.transformer.config.in_channels // 4

    @property
    def pixels_per_latent(self) -> int:
        """See `Pipeline`: 8 for the published model."""
        return 8 if self.vae is None else self.vae.spatial_compression_ratio

    @property
    def default_size(self) -> int:
        """See `Pipeline`: 1024 for the published model."""
        return 128 * self.pixels_per_latent

    @property
    def text_shapes(self) -> Shapes:
        """See `PromptMethods`."""
        width = self.transformer.config.joint_attention_dim
        return {"prompt_embeds": ("N", "T", width), "prompt_embeds_mask": ("N", "T")}

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        true_cfg_scale: float = 4.0,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        sigmas: Sequence[float] | None = None,
        num_images_per_prompt: int = 1,
        generator: AnyGenerator | Sequence[AnyGenerator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_embeds_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_embeds_mask: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        attention_kwargs: Mapping[str, Any] | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int = 512,
        timesteps: Sequence[float] | None = None,
        image: ImageInput | None = None,
        strength: float | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Generate images; arguments as in `SanaPipeline`, where nothing else is said.

        Args:
            negative_prompt: what guidance leads away from, " " being usual. Without it, or its embeddings, there is no
                guidance, whatever the scale.
            true_cfg_scale: strength of classifier-free guidance; 1 or less runs the prompt only.
            height, width: size in pixels, multiples of 16; default 1024.
            latents: initial noise [B, C, height / 8, width / 8] instead of drawing it.
            prompt_embeds, prompt_embeds_mask: embeddings [N, T, D] and mask [N, T] instead of prompts.
            max_sequence_length: number of text tokens at most, up to 1024.
            image, strength: where to begin instead of noise, see `FluxPipeline`.
        """
        embeds = self._given(prompt_embeds, prompt_embeds_mask)
        null = self._given(negative_prompt_embeds, negative_prompt_embeds_mask, prefix="negative_")
        number = self._count(prompt, embeds)
        self._check_decodable(output_type)
        negative = None
        if true_cfg_scale > 1 and (negative_prompt is not None or null is not None):
            negative = self._negative(
                negative_prompt, null, number, lambda texts: self.conditioning(texts, max_sequence_length)
            )

        @cache
        def conditions() -> list[Cond]:
            """What to lead to, and away from, without the tokens that are padding everywhere."""
            cond = self.conditioning(as_prompts(prompt), max_sequence_length) if embeds is None else embeds
            found = [cond] if negative is None else [cond, negative()]
            longest = max(_last_token(each["prompt_embeds_mask"]) for each in found)
            return [fit_text(each, longest) for each in found]

        return self._generate(
            lambda: conditions()[0],
            number,
            negative=None if negative is None else lambda: conditions()[1],
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            timesteps=timesteps,
            sigmas=sigmas,
            guidance_scale=true_cfg_scale,
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
            latents=latents,
            output_type=output_type,
            return_dict=return_dict,
            joint_attention_kwargs=attention_kwargs,
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
        """See `Pipeline`: `prompt_embeds` [N, max_sequence_length, D], 0 where `prompt_embeds_mask` [N, T] is."""
        self._require_text_parts()
        if not 1 <= max_sequence_length <= LONGEST_PROMPT:
            raise UserError(f"max_sequence_length must lie in 1..{LONGEST_PROMPT}, got {max_sequence_length}")
        start = self.tokenizer.count(TEMPLATE.split("{}")[0])

        def encode(texts: list[str]) -> Cond:
            ids, mask = self.tokenizer(texts, LONGEST_PROMPT + start, template=TEMPLATE, padding_side="right")
            states, kept = self.text_encoder(ids, mask).last_hidden_state[:, start:], mask[:, start:]
            states = states * kept.unsqueeze(-1).astype(states.dtype)
            return fit_text(Cond(prompt_embeds=states, prompt_embeds_mask=kept), max_sequence_length)

        return encode_distinct(prompts, encode)

    @paddle.no_grad()
    def encode_images(self, images: Tensor, generator: AnyGenerator | None = None) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] to latents [B, C, H / 8, W / 8], float32, normalised channel by channel.

        The mode of the posterior: the generator has nothing to do.
        """
        vae = self._require_vae()
        z = vae.encode(images.astype(vae.dtype).unsqueeze(2)).latent_dist.mode().squeeze(2).astype("float32")
        mean, std = self._latent_statistics()
        return (z - mean) / std

    def decode_latents(self, latents: Tensor) -> Tensor:
        """See `Pipeline`; [B, C, h, w] to [B, 3, 8 h, 8 w]. Differentiable."""
        vae = self._require_vae()
        mean, std = self._latent_statistics()
        z = (latents.astype("float32") * std + mean).unsqueeze(2)
        return vae.decode(z.astype(vae.dtype), return_dict=False)[0].squeeze(2).astype("float32")

    def _latent_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the autoencoder's latents, [C, 1, 1]."""
        config = self.vae.config
        mean, std = (paddle.to_tensor(each, "float32") for each in (config.latents_mean, config.latents_std))
        return mean.reshape([-1, 1, 1]), std.reshape([-1, 1, 1])


def _last_token(mask: Tensor) -> int:
    """How many of the first tokens hold all that is not padding in any row of a mask [N, T]; at least one."""
    used = np.flatnonzero(mask.numpy().any(axis=0))
    return int(used[-1]) + 1 if used.size else 1


def _token_norm(v: Tensor) -> Tensor:
    """Length of every token's 4 C numbers in [B, C, 2 h, 2 w], at each of its latents: [B, 1, 2 h, 2 w]."""
    squares = v.square().sum(axis=1, keepdim=True)
    rows, columns = squares.shape[2] // 2, squares.shape[3] // 2
    patches = squares.reshape([0, 1, rows, 2, columns, 2]).sum(axis=[3, 5], keepdim=True)
    return patches.expand([-1, 1, rows, 2, columns, 2]).reshape(squares.shape).sqrt()
