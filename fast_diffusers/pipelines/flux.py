"""FLUX.1: text to image."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import paddle
from paddle import Tensor, nn
from ppdiffusers import SchedulerMixin
from ppdiffusers.pipelines.pipeline_utils import ImagePipelineOutput

from fast_diffusers.conditioning import Cond
from fast_diffusers.errors import UserError
from fast_diffusers.models import AutoencoderKL, FluxTransformer2DModel
from fast_diffusers.pipelines.base import Callback, Pipeline, as_prompts
from fast_diffusers.random import AnyGenerator, randn
from fast_diffusers.text_encoders import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer


class FluxPipeline(Pipeline):
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
    def pixels_per_latent(self) -> int:
        """See `Pipeline`: 8 for FLUX.1."""
        return 8 if self.vae is None else 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def default_size(self) -> int:
        """See `Pipeline`: 1024 for FLUX.1."""
        return 128 * self.pixels_per_latent

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
    ) -> ImagePipelineOutput | tuple:
        """Generate images.

        Args:
            prompt: one prompt or several.
            prompt_2: what T5 reads instead of `prompt`, as many.
            height, width: size in pixels, multiples of 16; default 1024.
            num_inference_steps: number of steps.
            timesteps, sigmas: what to visit instead, for schedulers that take them.
            guidance_scale: strength of the distilled guidance; without effect on a model that does not embed it
                (FLUX.1-schnell).
            num_images_per_prompt: the images of one prompt come one after another.
            generator: source of noise (`fast_diffusers.random.Generator(seed)`), or a list of them, one an image,
                which makes an image independent of the batch it is in.
            latents: initial noise [B, C, height / 8, width / 8] instead of drawing it.
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

        Returns:
            An output with `images`, or (images,).

        Raises:
            UserError: arguments that do not fit.
        """
        self._check_prompts(prompt, prompt_2, prompt_embeds, pooled_prompt_embeds)
        if self.vae is None and output_type != "latent":
            raise UserError("this pipeline has no vae: ask for output_type='latent'")

        def encode() -> Cond:
            embeds = self.encode_prompt(prompt, prompt_2, 1, prompt_embeds, pooled_prompt_embeds, max_sequence_length)
            return Cond(prompt_embeds=embeds[0], pooled_prompt_embeds=embeds[1])

        return self._generate(
            encode,
            len(prompt_embeds) if prompt is None else len(as_prompts(prompt)),
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
            pooled_prompt_embeds = _encode_distinct(
                prompts, lambda texts: self.text_encoder(self.tokenizer(texts)).pooler_output
            )
            prompt_embeds = _encode_distinct(
                prompts_2,
                lambda texts: self.text_encoder_2(self.tokenizer_2(texts, max_sequence_length)).last_hidden_state,
            )
        embeds = Cond(prompt_embeds=prompt_embeds, pooled_prompt_embeds=pooled_prompt_embeds)
        embeds = embeds.repeat_interleave(num_images_per_prompt)
        return embeds["prompt_embeds"], embeds["pooled_prompt_embeds"]

    def conditioning(self, prompts: Sequence[str], max_sequence_length: int = 512) -> Cond:
        """See `Pipeline`: `prompt_embeds` [N, max_sequence_length, D] and `pooled_prompt_embeds` [N, P]."""
        prompt_embeds, pooled = self.encode_prompt(list(prompts), max_sequence_length=max_sequence_length)
        return Cond(prompt_embeds=prompt_embeds, pooled_prompt_embeds=pooled)

    @paddle.no_grad()
    def encode_images(self, images: Tensor, generator: AnyGenerator | None = None) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] to latents [B, C, H / 8, W / 8], float32, scaled as the transformer expects.

        The posterior is sampled with `generator`; without one its mode is taken.
        """
        posterior = self._require_vae().encode(images.astype(_dtype(self.vae))).latent_dist
        z = posterior.mode()
        if generator is not None:
            z = z + posterior.std * randn(z.shape, generator, z.dtype)
        config = self.vae.config
        return (z.astype("float32") - (config.shift_factor or 0.0)) * config.scaling_factor

    def decode_latents(self, latents: Tensor) -> Tensor:
        """See `Pipeline`; [B, C, h, w] to [B, 3, 8 h, 8 w]. Differentiable."""
        config = self._require_vae().config
        z = latents.astype("float32") / config.scaling_factor + (config.shift_factor or 0.0)
        return self.vae.decode(z.astype(_dtype(self.vae)), return_dict=False)[0].astype("float32")

    def _require_vae(self) -> AutoencoderKL:
        if self.vae is None:
            raise UserError("this pipeline has no vae, which turns images into latents and back")
        return self.vae

    def _check_prompts(
        self,
        prompt: str | Sequence[str] | None,
        prompt_2: str | Sequence[str] | None,
        prompt_embeds: Tensor | None,
        pooled_prompt_embeds: Tensor | None,
    ) -> None:
        if (prompt is None) == (prompt_embeds is None):
            raise UserError("pass either prompt or prompt_embeds" + (", not both" if prompt is not None else ""))
        if (prompt_embeds is None) != (pooled_prompt_embeds is None):
            raise UserError("prompt_embeds and pooled_prompt_embeds belong together: pass both or neither")
        if prompt is None:
            if prompt_2 is not None:
                raise UserError("prompt_2 needs prompt; with prompt_embeds, encode it yourself")
            self._check_embeds(prompt_embeds, pooled_prompt_embeds)
            return
        number = len(as_prompts(prompt))
        if prompt_2 is not None and len(as_prompts(prompt_2, "prompt_2")) != number:
            raise UserError(f"prompt_2 must have as many prompts as prompt, {number}, got {len(as_prompts(prompt_2))}")
        names = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
        if missing := [name for name in names if getattr(self, name) is None]:
            raise UserError(
                f"prompts need {', '.join(missing)}, which this pipeline is without: "
                "pass prompt_embeds and pooled_prompt_embeds instead"
            )

    def _check_embeds(self, prompt_embeds: Tensor, pooled_prompt_embeds: Tensor) -> None:
        config, number = self.transformer.config, prompt_embeds.shape[0]
        sizes = [number, prompt_embeds.shape[1] if prompt_embeds.ndim > 1 else "T", config.joint_attention_dim]
        for name, embeds, shape in [
            ("prompt_embeds", prompt_embeds, sizes),
            ("pooled_prompt_embeds", pooled_prompt_embeds, [number, config.pooled_projection_dim]),
        ]:
            if list(embeds.shape) != shape:
                raise UserError(f"{name} must have shape {shape} for this transformer, got {list(embeds.shape)}")


def _encode_distinct(texts: Sequence[str], encode: Callable[[list[str]], Tensor]) -> Tensor:
    """Rows of `encode(list of texts)`, computed once for each distinct text and put in the order of `texts`."""
    distinct = {text: row for row, text in enumerate(dict.fromkeys(texts))}
    rows = encode(list(distinct))
    if len(distinct) == len(texts):
        return rows
    return paddle.gather(rows, paddle.to_tensor([distinct[text] for text in texts]), axis=0)


def _dtype(model: nn.Layer) -> paddle.dtype:
    return next(iter(model.parameters())).dtype
