"""SANA (Xie et al. 2024, arXiv 2410.10629) and SANA-Sprint (Chen et al. 2025, arXiv 2503.09641): text to image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from types import MappingProxyType
from typing import Any

import paddle
from paddle import Tensor, nn
from ppdiffusers import SchedulerMixin
from ppdiffusers.pipelines.pipeline_utils import ImagePipelineOutput

from fast_diffusers.conditioning import Cond
from fast_diffusers.errors import UserError
from fast_diffusers.models import AutoencoderDC, SanaControlNetModel, SanaTransformer2DModel
from fast_diffusers.pipelines.base import Callback, Pipeline, as_prompts, encode_distinct
from fast_diffusers.pipelines.control import ControlMethods, check_controlnet
from fast_diffusers.pipelines.image_input import ImageInput
from fast_diffusers.pipelines.prompts import PromptMethods, Shapes
from fast_diffusers.random import AnyGenerator
from fast_diffusers.text_encoders import Gemma2Model, GemmaTokenizer

PARTS: Mapping[str, type] = MappingProxyType(
    {
        "tokenizer": GemmaTokenizer,
        "text_encoder": Gemma2Model,
        "vae": AutoencoderDC,
        "transformer": SanaTransformer2DModel,
        "scheduler": SchedulerMixin,
        "controlnet": SanaControlNetModel,
    }
)


class SanaMethods(ControlMethods, PromptMethods):
    """What SANA's pipelines share: the parts, text and latents; it stands before `Pipeline`.

    Args:
        tokenizer, text_encoder: Gemma-2; None if embeddings are given instead of prompts.
        vae: the deep-compression autoencoder; None if only latents are wanted.
        transformer: the velocity model.
        scheduler: any scheduler of flow-matching models.
        controlnet: reads `control_image`; None without.
    """

    component_types = PARTS
    attention_argument = "attention_kwargs"
    _callback_tensor_inputs = (
        "latents",
        "prompt_embeds",
        "prompt_attention_mask",
        "negative_prompt_embeds",
        "negative_prompt_attention_mask",
    )

    def __init__(
        self,
        tokenizer: GemmaTokenizer | None,
        text_encoder: Gemma2Model | None,
        vae: AutoencoderDC | None,
        transformer: SanaTransformer2DModel,
        scheduler: SchedulerMixin,
        controlnet: SanaControlNetModel | None = None,
    ):
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            vae=vae,
            transformer=transformer,
            scheduler=scheduler,
            controlnet=controlnet,
        )
        check_controlnet(controlnet, transformer)

    # ---- geometry ----------------------------------------------------------------------------------------------------

    @property
    def latent_channels(self) -> int:
        """See `Pipeline`: 32 for the published models."""
        return self.transformer.config.in_channels

    @property
    def pixels_per_latent(self) -> int:
        """See `Pipeline`: 32 for the published models."""
        return 32 if self.vae is None else self.vae.spatial_compression_ratio

    @property
    def pixels_per_token(self) -> int:
        """See `Pipeline`."""
        return self.transformer.config.patch_size * self.pixels_per_latent

    @property
    def default_size(self) -> int:
        """See `Pipeline`: what the transformer was trained at."""
        return self.transformer.config.sample_size * self.pixels_per_latent

    # ---- autoencoder -------------------------------------------------------------------------------------------------

    def enable_vae_tiling(self, **sizes: int) -> None:
        """Encode and decode large images in overlapping tiles; sizes as in `AutoencoderDC.enable_tiling`."""
        self._require_vae().enable_tiling(**sizes)

    def disable_vae_tiling(self) -> None:
        """Encode and decode in one piece again."""
        self._require_vae().disable_tiling()

    def enable_vae_slicing(self) -> None:
        """Encode and decode one image of a batch at a time."""
        self._require_vae().enable_slicing()

    def disable_vae_slicing(self) -> None:
        """Encode and decode batches at once again."""
        self._require_vae().disable_slicing()

    @paddle.no_grad()
    def encode_images(self, images: Tensor, generator: AnyGenerator | None = None) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] to latents [B, C, H / 32, W / 32], float32, scaled as the transformer expects.

        The autoencoder is deterministic: the generator has nothing to do.
        """
        vae = self._require_vae()
        return vae.encode(images.astype(_dtype(vae))).latent.astype("float32") * vae.config.scaling_factor

    def decode_latents(self, latents: Tensor) -> Tensor:
        """See `Pipeline`; [B, C, h, w] to [B, 3, 32 h, 32 w]. Differentiable."""
        vae = self._require_vae()
        z = latents.astype("float32") / vae.config.scaling_factor
        return vae.decode(z.astype(_dtype(vae)), return_dict=False)[0].astype("float32")

    # ---- text --------------------------------------------------------------------------------------------------------

    @paddle.no_grad()
    def encode_prompt(
        self,
        prompt: str | Sequence[str],
        num_images_per_prompt: int = 1,
        max_sequence_length: int = 300,
        complex_human_instruction: Sequence[str] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Embeddings of prompts, each distinct one being encoded once; a negative prompt takes no instruction.

        Returns:
            (prompt_embeds [N * num_images_per_prompt, max_sequence_length, D], prompt_attention_mask [.., T], 1 = keep)
        """
        cond = self.conditioning(as_prompts(prompt), max_sequence_length, complex_human_instruction)
        cond = cond.repeat_interleave(num_images_per_prompt)
        return cond["prompt_embeds"], cond["prompt_attention_mask"]

    @paddle.no_grad()
    def conditioning(
        self,
        prompts: Sequence[str],
        max_sequence_length: int = 300,
        complex_human_instruction: Sequence[str] | None = None,
    ) -> Cond:
        """See `Pipeline`: `prompt_embeds` [N, T, D] and `prompt_attention_mask` [N, T], T = max_sequence_length.

        Prompts are lower-cased and stripped, as in training. With an instruction before it, a prompt has as many tokens
        as without; of the result the first token and the last T - 1 are kept (section 3.1 of the SANA paper).
        """
        self._require_text_parts()
        if isinstance(max_sequence_length, bool) or not isinstance(max_sequence_length, Integral):
            raise UserError(f"max_sequence_length must be an integer, got {max_sequence_length!r}")
        if max_sequence_length < 2:
            raise UserError(f"max_sequence_length must be at least 2, got {max_sequence_length}")
        if isinstance(complex_human_instruction, str):
            raise UserError("complex_human_instruction must be a list of lines, not one string")
        instruction = "\n".join(complex_human_instruction or ())
        length = max_sequence_length
        if instruction:
            length += self.tokenizer.count(instruction) - 2

        def encode(texts: list[str]) -> Cond:
            ids, mask = self.tokenizer(texts, length, padding="max_length", padding_side="right")
            embeds = self.text_encoder(ids, mask).last_hidden_state
            kept = [_first_and_last(each, max_sequence_length) for each in (embeds, mask)]
            return Cond(prompt_embeds=kept[0], prompt_attention_mask=kept[1])

        return encode_distinct([instruction + prompt.lower().strip() for prompt in prompts], encode)

    @property
    def text_shapes(self) -> Shapes:
        """See `PromptMethods`."""
        width = self.transformer.config.caption_channels
        return {"prompt_embeds": ("N", "T", width), "prompt_attention_mask": ("N", "T")}

    # ---- generation --------------------------------------------------------------------------------------------------

    def _sample(
        self,
        prompt: str | Sequence[str] | None,
        embeds: Cond | None,
        max_sequence_length: int,
        complex_human_instruction: Sequence[str] | None,
        control_image: ImageInput | None,
        controlnet_conditioning_scale: float,
        **call: Any,
    ) -> ImagePipelineOutput | tuple:
        """`Pipeline._generate` for SANA."""
        number = self._count(prompt, embeds)
        self._check_decodable(call["output_type"])

        def encode() -> Cond:
            if embeds is not None:
                return embeds
            return self.conditioning(as_prompts(prompt), max_sequence_length, complex_human_instruction)

        size = call["height"], call["width"]
        encode, denoiser = self._with_control(encode, control_image, controlnet_conditioning_scale, number, *size)
        return self._generate(encode, number, denoiser=denoiser, **call)


class SanaPipeline(SanaMethods, Pipeline):
    """Text to image with SANA by classifier-free guidance, with a ControlNet if it has one."""

    def __init__(
        self,
        tokenizer: GemmaTokenizer | None,
        text_encoder: Gemma2Model | None,
        vae: AutoencoderDC | None,
        transformer: SanaTransformer2DModel,
        scheduler: SchedulerMixin,
        controlnet: SanaControlNetModel | None = None,
    ):
        super().__init__(tokenizer, text_encoder, vae, transformer, scheduler, controlnet)
        if transformer.config.guidance_embeds:
            raise UserError("this transformer embeds guidance, as SANA-Sprint's does: use SanaSprintPipeline")

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        num_inference_steps: int = 20,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float = 4.5,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        generator: AnyGenerator | Sequence[AnyGenerator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        attention_kwargs: Mapping[str, Any] | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int = 300,
        complex_human_instruction: Sequence[str] | None = None,
        control_image: ImageInput | None = None,
        controlnet_conditioning_scale: float = 1.0,
    ) -> ImagePipelineOutput | tuple:
        """Generate images.

        Args:
            prompt: one prompt or several.
            negative_prompt: what guidance leads away from: one text for all prompts or one each; default "".
            num_inference_steps: number of steps.
            timesteps, sigmas: what to visit instead, for schedulers that take them.
            guidance_scale: strength of classifier-free guidance; 1 or less runs the prompt only, at half the cost.
            num_images_per_prompt: the images of one prompt come one after another.
            height, width: size in pixels, multiples of 32; default that of the transformer's training.
            generator: source of noise (`fast_diffusers.random.Generator(seed)`), or a list of them, one an image,
                which makes an image independent of the batch it is in.
            latents: initial noise [B, C, height / 32, width / 32], of unit variance, instead of drawing it.
            prompt_embeds, prompt_attention_mask: embeddings [N, T, D] and mask [N, T] (1 = keep) instead of prompts.
            negative_prompt_embeds, negative_prompt_attention_mask: the same instead of negative prompts, with as many
                tokens.
            output_type: "pil"; "np", float32 [B, height, width, 3] in [0, 1]; "pd", the same as a tensor
                [B, 3, height, width]; or "latent", [B, C, height / 32, width / 32].
            return_dict: False returns a 1-tuple.
            attention_kwargs: {"scale": s} scales the running LoRA in this call.
            callback_on_step_end: `callback(pipe, step, timestep, tensors) -> dict | None`, called after every step;
                tensors in the returned dict replace the pipeline's.
            callback_on_step_end_tensor_inputs: names of the tensors to hand to the callback: "latents" and the
                embeddings and masks, the negative ones being there only with guidance.
            max_sequence_length: number of text tokens.
            complex_human_instruction: lines that tell the text encoder what to make of the prompt which follows them;
                None for none. The published models were trained with one: pass the list that is the default of this
                argument in diffusers (`inspect.signature(diffusers.SanaPipeline.__call__)`) to get what they give.
            control_image: image for the ControlNet, one for all prompts or one each: PIL images, which are resized,
                arrays in [0, 1], or a tensor [N, 3, height, width] in [-1, 1].
            controlnet_conditioning_scale: strength of the ControlNet.

        Returns:
            An output with `images`, or (images,).

        Raises:
            UserError: arguments that do not fit.
        """
        embeds = self._given(prompt_embeds, prompt_attention_mask)
        null = self._given(negative_prompt_embeds, negative_prompt_attention_mask, prefix="negative_")
        tokens = max_sequence_length if embeds is None else embeds["prompt_embeds"].shape[1]
        if null is not None and null["prompt_embeds"].shape[1] != tokens:
            raise UserError(
                f"negative_prompt_embeds has {null['prompt_embeds'].shape[1]} tokens and the prompt {tokens}: "
                "encode both with the same max_sequence_length"
            )
        negative = None
        if guidance_scale > 1:
            number = self._count(prompt, embeds)
            negative = self._negative(negative_prompt, null, number, lambda texts: self.conditioning(texts, tokens))
        return self._sample(
            prompt,
            embeds,
            max_sequence_length,
            complex_human_instruction,
            control_image,
            controlnet_conditioning_scale,
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
            joint_attention_kwargs=attention_kwargs,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )

    def _name_in(self, layout: str) -> str:
        """See `Pipeline`: diffusers has a class of its own for a pipeline with a ControlNet."""
        if layout == "diffusers" and self.controlnet is not None:
            return "SanaControlNetPipeline"
        return super()._name_in(layout)


class SanaSprintPipeline(SanaMethods, Pipeline):
    """Text to image with SANA-Sprint in 1 to 4 steps: the guidance scale is an input of the transformer.

    Its scheduler is usually `SCMScheduler`, any other one of flow-matching models works too.
    """

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        num_inference_steps: int = 2,
        timesteps: Sequence[float] | None = None,
        max_timesteps: float | None = None,
        intermediate_timesteps: float | None = None,
        guidance_scale: float = 4.5,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        generator: AnyGenerator | Sequence[AnyGenerator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        attention_kwargs: Mapping[str, Any] | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int = 300,
        complex_human_instruction: Sequence[str] | None = None,
        control_image: ImageInput | None = None,
        controlnet_conditioning_scale: float = 1.0,
        sigmas: Sequence[float] | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Generate images; arguments as in `SanaPipeline`, where nothing else is said.

        Args:
            timesteps: for `SCMScheduler`, angles of TrigFlow to visit, from pi / 2 (noise) down to 0, instead of the
                published ones for `num_inference_steps`.
            max_timesteps, intermediate_timesteps: the first and the middle angle of the schedule, as in diffusers;
                None is the published schedule. See `SCMScheduler.set_timesteps`.
            guidance_scale: the embedded guidance; trained between 4 and 5.
        """
        return self._sample(
            prompt,
            self._given(prompt_embeds, prompt_attention_mask),
            max_sequence_length,
            complex_human_instruction,
            control_image,
            controlnet_conditioning_scale,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            timesteps=timesteps,
            sigmas=sigmas,
            schedule={"max_timesteps": max_timesteps, "intermediate_timesteps": intermediate_timesteps},
            guidance_scale=guidance_scale,
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
            latents=latents,
            output_type=output_type,
            return_dict=return_dict,
            joint_attention_kwargs=attention_kwargs,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )

    def _name_in(self, layout: str) -> str:
        """See `Pipeline`."""
        if layout == "diffusers" and self.controlnet is not None:
            raise UserError("diffusers has no SanaSprintPipeline with a controlnet: save in the paddle layout")
        return super()._name_in(layout)


def _first_and_last(x: Tensor, length: int) -> Tensor:
    """Positions 0 and the last length - 1 of [B, T, ...]."""
    return paddle.concat([x[:, :1], x[:, x.shape[1] - length + 1 :]], axis=1)


def _dtype(model: nn.Layer) -> paddle.dtype:
    return next(iter(model.parameters())).dtype
