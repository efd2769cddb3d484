"""Stable Diffusion 3 and 3.5 (Esser et al. 2024, arXiv 2403.03206): text to image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import paddle
from paddle import Tensor
from ppdiffusers import SchedulerMixin
from ppdiffusers.models.transformer_sd3 import SD3Transformer2DModel as PPDiffusersTransformer
from ppdiffusers.pipelines.pipeline_utils import ImagePipelineOutput

from fast_diffusers.conditioning import Cond
from fast_diffusers.errors import UserError
from fast_diffusers.models import AutoencoderKL, SD3Transformer2DModel
from fast_diffusers.pipelines.base import Callback, Pipeline, as_prompts, encode_distinct
from fast_diffusers.pipelines.image_input import ImageInput
from fast_diffusers.pipelines.kl_latents import KLLatents
from fast_diffusers.pipelines.prompts import PromptMethods, Shapes
from fast_diffusers.random import AnyGenerator
from fast_diffusers.text_encoders import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5Tokenizer


class StableDiffusion3Pipeline(KLLatents, PromptMethods, Pipeline):
    """Text to image with Stable Diffusion 3 and 3.5.

    Args:
        transformer: the velocity model, ours or ppdiffusers' own.
        scheduler: any scheduler of flow-matching models.
        vae: None if only latents are wanted.
        text_encoder, tokenizer, text_encoder_2, tokenizer_2: CLIP-L and OpenCLIP-G; None if embeddings are given
            instead of prompts.
        text_encoder_3, tokenizer_3: T5; without them its embeddings are zeros, as in training now and then.
    """

    component_types = MappingProxyType(
        {
            "transformer": SD3Transformer2DModel | PPDiffusersTransformer,
            "scheduler": SchedulerMixin,
            "vae": AutoencoderKL,
            "text_encoder": CLIPTextModelWithProjection,
            "tokenizer": CLIPTokenizer,
            "text_encoder_2": CLIPTextModelWithProjection,
            "tokenizer_2": CLIPTokenizer,
            "text_encoder_3": T5EncoderModel,
            "tokenizer_3": T5Tokenizer,
        }
    )
    _optional_components = ("text_encoder_3", "tokenizer_3")
    text_parts = ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2")
    _callback_tensor_inputs = (
        "latents",
        "prompt_embeds",
        "pooled_prompt_embeds",
        "negative_prompt_embeds",
        "negative_pooled_prompt_embeds",
    )

    def __init__(
        self,
        transformer: SD3Transformer2DModel | PPDiffusersTransformer,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL | None,
        text_encoder: CLIPTextModelWithProjection | None,
        tokenizer: CLIPTokenizer | None,
        text_encoder_2: CLIPTextModelWithProjection | None,
        tokenizer_2: CLIPTokenizer | None,
        text_encoder_3: T5EncoderModel | None = None,
        tokenizer_3: T5Tokenizer | None = None,
    ):
        super().__init__()
        if (text_encoder_3 is None) != (tokenizer_3 is None):
            raise UserError("text_encoder_3 and tokenizer_3 belong together: pass both or neither")
        self.register_modules(
            transformer=transformer,
            scheduler=scheduler,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            text_encoder_3=text_encoder_3,
            tokenizer_3=tokenizer_3,
        )

    @property
    def latent_channels(self) -> int:
        """See `Pipeline`: 16 for the published models."""
        return self.transformer.config.in_channels

    @property
    def pixels_per_token(self) -> int:
        """See `Pipeline`: 16 for the published models."""
        return self.transformer.config.patch_size * self.pixels_per_latent

    @property
    def default_size(self) -> int:
        """See `Pipeline`: what the transformer was trained at, 1024 for the published models."""
        return self.transformer.config.sample_size * self.pixels_per_latent

    @property
    def text_shapes(self) -> Shapes:
        """See `PromptMethods`."""
        config = self.transformer.config
        return {
            "prompt_embeds": ("N", "T", config.joint_attention_dim),
            "pooled_prompt_embeds": ("N", config.pooled_projection_dim),
        }

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        prompt_2: str | Sequence[str] | None = None,
        prompt_3: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 28,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float = 7.0,
        negative_prompt: str | Sequence[str] | None = None,
        negative_prompt_2: str | Sequence[str] | None = None,
        negative_prompt_3: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: AnyGenerator | Sequence[AnyGenerator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        joint_attention_kwargs: Mapping[str, Any] | None = None,
        clip_skip: int = 0,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int = 256,
        timesteps: Sequence[float] | None = None,
        image: ImageInput | None = None,
        strength: float | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Generate images; arguments as in `SanaPipeline`, where nothing else is said.

        Args:
            prompt_2, prompt_3: what the second CLIP and T5 read instead of `prompt`, as many; so for the negative ones.
            guidance_scale: strength of classifier-free guidance; 1 or less runs the prompt only.
            height, width: size in pixels, multiples of 16; default 1024.
            latents: initial noise [B, C, height / 8, width / 8] instead of drawing it.
            prompt_embeds, pooled_prompt_embeds: embeddings [N, T, D] and [N, P] instead of prompts.
            clip_skip: how many more of CLIP's last layers to leave out than the last one.
            max_sequence_length: number of T5 tokens.
            image, strength: where to begin instead of noise, see `FluxPipeline`.
        """
        embeds = self._given(prompt_embeds, pooled_prompt_embeds)
        null = self._given(negative_prompt_embeds, negative_pooled_prompt_embeds, prefix="negative_")
        number = self._count(prompt, embeds)
        self._check_decodable(output_type)
        if prompt is None and (prompt_2 is not None or prompt_3 is not None):
            raise UserError("prompt_2 and prompt_3 need prompt; with prompt_embeds, encode them yourself")

        def encode(texts: list[str], *others: str | Sequence[str] | None) -> Cond:
            return self.conditioning(texts, *others, max_sequence_length=max_sequence_length, clip_skip=clip_skip)

        negative = None
        if guidance_scale > 1:
            negative = self._negative(
                negative_prompt, null, number, lambda texts: encode(texts, negative_prompt_2, negative_prompt_3)
            )
        return self._generate(
            lambda: encode(as_prompts(prompt), prompt_2, prompt_3) if embeds is None else embeds,
            number,
            negative=negative,
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
            image=image,
            strength=strength,
        )

    @paddle.no_grad()
    def encode_prompt(
        self,
        prompt: str | Sequence[str],
        prompt_2: str | Sequence[str] | None = None,
        prompt_3: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        max_sequence_length: int = 256,
        clip_skip: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """(prompt_embeds [N * num_images_per_prompt, 77 + max_sequence_length, D], pooled_prompt_embeds [.., P])."""
        cond = self.conditioning(as_prompts(prompt), prompt_2, prompt_3, max_sequence_length, clip_skip)
        cond = cond.repeat_interleave(num_images_per_prompt)
        return cond["prompt_embeds"], cond["pooled_prompt_embeds"]

    @paddle.no_grad()
    def conditioning(
        self,
        prompts: Sequence[str],
        prompts_2: str | Sequence[str] | None = None,
        prompts_3: str | Sequence[str] | None = None,
        max_sequence_length: int = 256,
        clip_skip: int = 0,
    ) -> Cond:
        """See `Pipeline`: `prompt_embeds` [N, 77 + max_sequence_length, D] and `pooled_prompt_embeds` [N, P].

        The hidden states of both CLIPs beside each other, filled up with zeros to T5's width, and T5's behind them.
        """
        self._require_text_parts()
        first = _encode_clip(self.tokenizer, self.text_encoder, prompts, clip_skip)
        second = _encode_clip(self.tokenizer_2, self.text_encoder_2, _same_number(prompts_2, prompts), clip_skip)
        clip = paddle.concat([first["states"], second["states"]], axis=-1)
        t5 = self._encode_t5(_same_number(prompts_3, prompts), max_sequence_length).astype(clip.dtype)
        filling = paddle.zeros([*clip.shape[:2], t5.shape[-1] - clip.shape[-1]], clip.dtype)
        return Cond(
            prompt_embeds=paddle.concat([paddle.concat([clip, filling], axis=-1), t5], axis=1),
            pooled_prompt_embeds=paddle.concat([first["pooled"], second["pooled"]], axis=-1),
        )

    def _encode_t5(self, texts: Sequence[str], length: int) -> Tensor:
        """[N, length, D]."""
        if self.text_encoder_3 is None:
            return paddle.zeros([len(texts), length, self.transformer.config.joint_attention_dim])

        def encode(distinct: list[str]) -> Cond:
            return Cond(states=self.text_encoder_3(self.tokenizer_3(distinct, length)).last_hidden_state)

        return encode_distinct(texts, encode)["states"]


def _encode_clip(
    tokenizer: CLIPTokenizer, encoder: CLIPTextModelWithProjection, texts: Sequence[str], skip: int
) -> Cond:
    """`states` [N, L, D] after the last layer but one (and `skip` more), `pooled` [N, P]."""
    layers = encoder.config.num_hidden_layers
    if not 0 <= skip < layers - 1:
        raise UserError(f"clip_skip must lie in 0..{layers - 2}, got {skip!r}")

    def encode(distinct: list[str]) -> Cond:
        output = encoder(tokenizer(distinct))
        return Cond(states=output.hidden_states[-skip - 2], pooled=output.text_embeds)

    return encode_distinct(texts, encode)


def _same_number(texts: str | Sequence[str] | None, prompts: Sequence[str]) -> list[str]:
    """What another encoder reads: its own texts, one for all or as many as prompts, or else the prompts."""
    if texts is None:
        return list(prompts)
    texts = as_prompts(texts, "prompt_2 and prompt_3")
    if len(texts) not in (1, len(prompts)):
        raise UserError(f"got {len(texts)} prompts for another encoder, expected 1 or {len(prompts)} as of the first")
    return texts * (len(prompts) // len(texts))
