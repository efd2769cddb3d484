"""FLUX.1: text to image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import paddle
from paddle import Tensor
from ppdiffusers import SchedulerMixin
from ppdiffusers.pipelines.pipeline_utils import ImagePipelineOutput

from fast_diffusers.conditioning import Cond
from fast_diffusers.errors import UserError
from fast_diffusers.models import AutoencoderKL, FluxTransformer2DModel
from fast_diffusers.pipelines.base import Callback, Pipeline, as_prompts, encode_distinct
from fast_diffusers.pipelines.image_input import ImageInput
from fast_diffusers.pipelines.kl_latents import KLLatents
from fast_diffusers.pipelines.prompts import PromptMethods, Shapes
from fast_diffusers.random import AnyGenerator
from fast_diffusers.text_encoders import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer


class FluxPipeline(KLLatents, PromptMethods, Pipeline):
    """Text to image with FLUX.1-dev, FLUX.1-schnell and models distilled from them.

    Args:
        scheduler: any scheduler of flow-matching models.
        vae: decodes latents; None if only latents are wanted.
        text_encoder, tokenizer: CLIP, for the pooled embedding; None if embeddings are given instead of prompts.
        text_encoder_2, tokenizer_2: T5, for the token embeddings; None likewise.
        transformer: the velocity model.
    """

    component_types = MappingProxyType(
        {
            "scheduler": SchedulerMixin,
            "vae": AutoencoderKL,
            "text_encoder": CLIPTextModel,
            "tokenizer": CLIPTokenizer,
            "text_encoder_2": T5EncoderModel,
            "tokenizer_2": T5Tokenizer,
            "transformer": FluxTransformer2DModel,
        }
    )
    text_parts = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")

    def __init__(
        self,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL | None,
        text_encoder: CLIPTextModel | None,
        tokenizer: CLIPTokenizer | None,
        text_encoder_2: T5EncoderModel | None,
        tokenizer_2: T5Tokenizer | None,
        transformer: FluxTransformer2DModel,
    ):
        super().__init__()
        self.register_modules(
            scheduler=scheduler,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            transformer=transformer,
        )

    @property
    def latent_channels(self) -> int:
        """See `Pipeline`: 16 for FLUX.1."""
        return self.transformer.config.in_channels // 4

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
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 28,
        timesteps: Sequence[float] | None = None,
        guidance_scale: float = 3.5,
        num_images_per_prompt: int = 1,
        generator: AnyGenerator | Sequence[AnyGenerator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        joint_attention_kwargs: Mapping[str, Any] | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int = 512,
        sigmas: Sequence[float] | None = None,
        image: ImageInput | None = None,
        strength: float | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Generate images.

        Args:
            prompt: one prompt or several.
            prompt_2: what T5 reads instead of `prompt`, as many.
            height, width: size in pixels, multiples of 16; default 1024, or what an image has.
            num_inference_steps: number of steps.
            timesteps, sigmas: what to visit instead, for schedulers that take them.
            guidance_scale: strength of the distilled guidance; without effect on a model that does not embed it
                (FLUX.1-schnell).
            num_images_per_prompt: the images of one prompt come one after another.
            generator: source of noise (`fast_diffusers.random.Generator(seed)`), or a list of them, one an image,
                which makes an image independent of the batch it is in.
            latents: the noise [B, C, height / 8, width / 8] to begin with instead of drawing it.
            prompt_embeds, pooled_prompt_embeds: embeddings [N, T, D] and [N, P] instead of prompts.
            output_type: "pil"; "np", float32 [B, height, width, 3] in [0, 1]; "pd", the same as a tensor
                [B, 3, height, width]; or "latent", [B, C, height / 8, width / 8].
            return_dict: False returns a 1-tuple.
            joint_attention_kwargs: {"scale": s} scales the running LoRA in this call.
            callback_on_step_end: `callback(pipe, step, timestep, tensors) -> dict | None`, called after every step;
                tensors in the returned dict replace the pipeline's.
            callback_on_step_end_tensor_inputs: names of the tensors to hand to the callback: "latents",
                "prompt_embeds", "pooled_prompt_embeds".
            max_sequence_length: number of T5 tokens, 256 at most for FLUX.1-schnell.
            image: where to begin instead of noise, one for all prompts or one each: PIL images, which are resized,
                arrays in [0, 1] or of uint8, or a tensor [N, 3, height, width] in [-1, 1]. Without height and width,
                its own size counts, rounded down to multiples of 16.
            strength: how much of the schedule runs from the image: 0 returns it, 1 begins with noise alone; default
                0.6.

        Returns:
            An output with `images`, or (images,).

        Raises:
            UserError: arguments that do not fit.
        """
        number = self._check_prompts(prompt, prompt_2, prompt_embeds, pooled_prompt_embeds)
        self._check_decodable(output_type)

        def encode() -> Cond:
            embeds = self.encode_prompt(prompt, prompt_2, 1, prompt_embeds, pooled_prompt_embeds, max_sequence_length)
            return Cond(prompt_embeds=embeds[0], pooled_prompt_embeds=embeds[1])

        return self._generate(
            encode,
            number,
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
        prompt: str | Sequence[str] | None,
        prompt_2: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        max_sequence_length: int = 512,
    ) -> tuple[Tensor, Tensor]:
        """Embeddings of prompts, each distinct prompt being encoded once; given embeddings are passed on.

        Returns:
            (prompt_embeds [N * num_images_per_prompt, max_sequence_length, D], pooled_prompt_embeds [.., P]).
        """
        self._check_prompts(prompt, prompt_2, prompt_embeds, pooled_prompt_embeds)
        if prompt is not None:
            prompts = as_prompts(prompt)
            prompts_2 = prompts if prompt_2 is None else as_prompts(prompt_2, "prompt_2")
            clip = encode_distinct(prompts, self._encode_clip)
            t5 = encode_distinct(prompts_2, lambda texts: self._encode_t5(texts, max_sequence_length))
            prompt_embeds, pooled_prompt_embeds = t5["states"], clip["pooled"]
        embeds = Cond(prompt_embeds=prompt_embeds, pooled_prompt_embeds=pooled_prompt_embeds)
        embeds = embeds.repeat_interleave(num_images_per_prompt)
        return embeds["prompt_embeds"], embeds["pooled_prompt_embeds"]

    def conditioning(self, prompts: Sequence[str], max_sequence_length: int = 512) -> Cond:
        """See `Pipeline`: `prompt_embeds` [N, max_sequence_length, D] and `pooled_prompt_embeds` [N, P]."""
        prompt_embeds, pooled = self.encode_prompt(list(prompts), max_sequence_length=max_sequence_length)
        return Cond(prompt_embeds=prompt_embeds, pooled_prompt_embeds=pooled)

    def _encode_clip(self, texts: list[str]) -> Cond:
        """`pooled` [N, P]."""
        return Cond(pooled=self.text_encoder(self.tokenizer(texts)).pooler_output)

    def _encode_t5(self, texts: list[str], length: int) -> Cond:
        """`states` [N, length, D]."""
        return Cond(states=self.text_encoder_2(self.tokenizer_2(texts, length)).last_hidden_state)

    def _check_prompts(
        self,
        prompt: str | Sequence[str] | None,
        prompt_2: str | Sequence[str] | None,
        prompt_embeds: Tensor | None,
        pooled_prompt_embeds: Tensor | None,
    ) -> int:
        """How many prompts there are, once they are known to be usable."""
        number = self._count(prompt, self._given(prompt_embeds, pooled_prompt_embeds))
        if prompt_2 is None:
            return number
        if prompt is None:
            raise UserError("prompt_2 needs prompt; with prompt_embeds, encode it yourself")
        if (others := len(as_prompts(prompt_2, "prompt_2"))) != number:
            raise UserError(f"prompt_2 must have as many prompts as prompt, {number}, got {others}")
        return number
