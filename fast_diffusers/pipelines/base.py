"""What all pipelines share: components on disk, argument checks, the denoising loop, image output."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Self, get_args

import paddle
from paddle import Tensor
from ppdiffusers import DiffusionPipeline, SchedulerMixin
from ppdiffusers.pipelines.pipeline_utils import ImagePipelineOutput

from fast_diffusers.conditioning import Cond
from fast_diffusers.denoisers import ClassifierFree, Denoiser, denoiser_for
from fast_diffusers.errors import UserError
from fast_diffusers.pipelines.components import (
    INDEX,
    LAYOUTS,
    PIPELINE_ALIASES,
    index_entry,
    load_component,
    read_index,
    save_component,
    write_index,
)
from fast_diffusers.pipelines.image_input import ImageInput, image_size, image_tensor
from fast_diffusers.pipelines.image_start import DEFAULT_STRENGTH, check_strength, first_index, state_at
from fast_diffusers.pipelines.lora_methods import LoRAMethods
from fast_diffusers.random import AnyGenerator, randn
from fast_diffusers.schedulers import UnifiedScheduler
from fast_diffusers.schedulers.base import FlowMatchScheduler
from fast_diffusers.target_time import TargetTime, attach, save_attached
from fast_diffusers.time_grids import scheduler_mu

logger = logging.getLogger(__name__)

OUTPUT_TYPES = ("pil", "np", "pd", "latent")
Callback = Callable[["Pipeline", int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None]


class Pipeline(LoRAMethods, DiffusionPipeline):
    """A ppdiffusers pipeline around a velocity model.

    A subclass registers its components, whose types it gives in `component_types`, and says how to turn prompts into
    conditioning and latents into images. `Pipeline.from_pretrained` opens a pipeline of any class.
    """

    component_types: ClassVar[Mapping[str, type | UnionType]]
    _optional_components: ClassVar[Sequence[str]] = ()
    """Components that a model_index.json need not name."""
    classifier_free: ClassVar[type[ClassifierFree]] = ClassifierFree
    """How a call with a negative prompt is guided."""
    _callback_tensor_inputs: ClassVar[tuple[str, ...]] = ("latents", "prompt_embeds", "pooled_prompt_embeds")

    # ---- geometry and conversion, for subclasses to give -------------------------------------------------------------

    @property
    def latent_channels(self) -> int:
        """Channels C of the latents [B, C, H / pixels_per_latent, W / pixels_per_latent]."""
        raise NotImplementedError

    @property
    def pixels_per_latent(self) -> int:
        """Edge of the square of pixels that one latent stands for."""
        raise NotImplementedError

    @property
    def pixels_per_token(self) -> int:
        """Edge of the square of pixels that one token of the transformer stands for; sizes are multiples of it."""
        return 2 * self.pixels_per_latent

    @property
    def default_size(self) -> int:
        """Height and width in pixels of an image when none is asked for."""
        raise NotImplementedError

    @property
    def image_channels(self) -> int:
        """Channels of an image: 3, or 1 where images are gray."""
        return 3

    def encode_images(self, images: Tensor, generator: AnyGenerator | None = None) -> Tensor:
        """Images [B, image_channels, H, W] in [-1, 1] to latents [B, C, h, w], float32.

        Where these have a distribution it is sampled with `generator`; without one its mode is taken.
        """
        raise NotImplementedError

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] to images [B, channels, H, W], float32, about [-1, 1] (not clipped)."""
        raise NotImplementedError

    def conditioning(self, prompts: Sequence[str]) -> Cond:
        """What the denoiser needs to know of each prompt, one row each."""
        raise NotImplementedError

    @property
    def denoiser(self) -> Denoiser:
        """The transformer as a function of unpacked latents and time."""
        return denoiser_for(self.transformer)

    # ---- components --------------------------------------------------------------------------------------------------

    def register_modules(self, **components: Any) -> None:
        """Set the components, after checking their types; None is an absent one."""
        for name, component in components.items():
            if component is not None and not isinstance(component, self.component_types[name]):
                kinds = get_args(self.component_types[name]) or (self.component_types[name],)
                raise UserError(
                    f"{type(self).__name__}: {name} must be of class {kinds[0].__name__}, "
                    f"got {type(component).__name__}"
                )
        super().register_modules(**components)

    @classmethod
    def from_pretrained(
        cls, directory: str | os.PathLike, paddle_dtype: str | paddle.dtype | None = None, **components: Any
    ) -> Self:
        """Open a pipeline folder in our layout or in that of PyTorch diffusers.

        Args:
            directory: folder with model_index.json and one subfolder for each component.
            paddle_dtype: dtype of the models; None is Paddle's default dtype, float32.
            **components: components to use instead of the folder's, which is then not read; None leaves one out. A
                pipeline's settings (`num_classes`, ...) can be replaced the same way.

        Raises:
            FileNotFoundError, UserError: something is missing, of the wrong class or unreadable.
        """
        directory = Path(directory)
        index = read_index(directory)
        cls = cls._class_named(index["_class_name"], directory)
        settings = set(inspect.signature(cls.__init__).parameters) - {"self", *cls.component_types}
        if unknown := set(components) - set(cls.component_types) - settings:
            raise UserError(
                f"{cls.__name__}.from_pretrained does not take {sorted(unknown)}; "
                f"its components are {list(cls.component_types)}"
            )
        for name, entry in index.items():
            if isinstance(entry, list) and entry[-1:] not in ([], [None]) and name not in cls.component_types:
                logger.warning("%s has no part %r: the one in %s is not used", cls.__name__, name, directory)
        arguments = {name: index[name] for name in settings if name in index} | components
        for name in cls.component_types:
            if name not in components and (name in index or name not in cls._optional_components):
                if name not in index:
                    raise UserError(f"{directory / INDEX} has no {name!r}; pass {name}= (None to do without it)")
                arguments[name] = load_component(directory, name, index[name], paddle_dtype)
        pipe = cls(**arguments)
        if "transformer" not in components and (way := TargetTime.load(directory, pipe.transformer)):
            attach(pipe.transformer, way)
        return pipe

    @classmethod
    def _class_named(cls, name: str, directory: Path) -> type[Self]:
        """The pipeline class for a folder of that name: this one, or the one which derives from it."""
        name = PIPELINE_ALIASES.get(name, name)
        classes = [each for each in (*cls.__subclasses__(), cls) if each is not Pipeline]
        known = {PIPELINE_ALIASES.get(each.__name__, each.__name__): each for each in classes}
        if name not in known:
            raise UserError(f"{directory} holds a {name}, expected a pipeline of class {' or '.join(sorted(known))}")
        return known[name]

    def _name_in(self, layout: str) -> str:
        """The pipeline's class name in a layout's model_index.json."""
        return PIPELINE_ALIASES.get(type(self).__name__, type(self).__name__)

    def save_pretrained(self, directory: str | os.PathLike, layout: str = "paddle") -> None:
        """Write a folder that `from_pretrained` opens, and PyTorch diffusers too if `layout` is "diffusers".

        The weights are saved as they stand, with what `fuse_lora` added and without the adapters.
        """
        if layout not in LAYOUTS:
            raise UserError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
        components = {name: getattr(self, name) for name in self.component_types}
        class_name = self._name_in(layout)
        entries = {
            name: index_entry(component, layout)
            for name, component in components.items()
            if component is not None or name not in self._optional_components
        }
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / INDEX).unlink(missing_ok=True)  # written last: a folder that has one is complete
        for name, component in components.items():
            if component is not None:
                save_component(component, directory / name, layout)
        names = set(inspect.signature(type(self).__init__).parameters) & set(self.config) - set(components)
        save_attached(self.transformer, directory)
        write_index(directory, class_name, {name: self.config[name] for name in names} | entries)

    # ---- generation --------------------------------------------------------------------------------------------------

    @paddle.no_grad()
    def _generate(
        self,
        encode: Callable[[], Cond],
        num_prompts: int,
        *,
        height: int | None,
        width: int | None,
        num_inference_steps: int,
        timesteps: Sequence[float] | None,
        sigmas: Sequence[float] | None,
        guidance_scale: float,
        num_images_per_prompt: int,
        generator: AnyGenerator | Sequence[AnyGenerator] | None,
        latents: Tensor | None,
        output_type: str,
        return_dict: bool,
        joint_attention_kwargs: Mapping[str, Any] | None,
        callback_on_step_end: Callback | None,
        callback_on_step_end_tensor_inputs: Sequence[str],
        negative: Callable[[], Cond] | None = None,
        denoiser: Denoiser | None = None,
        schedule: Mapping[str, Any] | None = None,
        image: ImageInput | None = None,
        strength: float | None = None,
    ) -> ImagePipelineOutput | tuple:
        """From prompts to images: check, `encode` (called once, giving a row a prompt), denoise, decode.

        Images of one prompt are neighbours in the output. The other arguments are those of a pipeline's call, and:

        Args:
            negative: gives what classifier-free guidance leads away from, a row a prompt, with the names (control
                aside) and shapes of what `encode` gives; `guidance_scale` is then the strength of that guidance. None
                guides only where the transformer embeds guidance.
            denoiser: what to run instead of `self.denoiser`.
            schedule: more arguments for the scheduler's `set_timesteps`; None among them stands for its default.
            image: where to begin instead of noise alone, one for all prompts or one each; its size is that of the
                result where none is given, rounded down to what the pipeline can make.
            strength: how much of the schedule runs from the image, see `image_start`; default 0.6.
        """
        self._check_output(output_type)
        self._check_callback_inputs(callback_on_step_end_tensor_inputs)
        for name, value in [
            ("num_inference_steps", num_inference_steps),
            ("num_images_per_prompt", num_images_per_prompt),
        ]:
            if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
                raise UserError(f"{name} must be a positive integer, got {value!r}")
        batch = num_prompts * num_images_per_prompt
        if isinstance(generator, list | tuple) and len(generator) != batch:
            raise UserError(f"got {len(generator)} generators for {batch} images: pass one for each, or a single one")
        if image is not None:
            height, width = self._size_of(image, height, width)
        elif strength is not None:
            raise UserError("strength needs an image to begin from: pass image too")
        shape = self._latent_shape(batch, height, width)
        if latents is not None and list(latents.shape) != shape:
            raise UserError(f"latents must have shape {shape} for this call, got {list(latents.shape)}")
        self._set_timesteps(num_inference_steps, timesteps, sigmas, shape, schedule or {})
        begin, data = 0, None
        if image is not None:
            begin = first_index(self.scheduler, check_strength(DEFAULT_STRENGTH if strength is None else strength))
            data = self._to_latents(image, num_prompts, shape).repeat_interleave(num_images_per_prompt, axis=0)
        with self._lora_scale(joint_attention_kwargs):
            cond = encode().repeat_interleave(num_images_per_prompt)
            null = None if negative is None else negative().repeat_interleave(num_images_per_prompt)
            latents = randn(shape, generator) if latents is None else latents.astype("float32")
            if data is None:
                latents = latents * getattr(self.scheduler, "init_noise_sigma", 1.0)
            else:
                latents = state_at(self.scheduler, begin, data, latents)
            guidance = self._embedded_guidance(guidance_scale, batch) if null is None else guidance_scale
            latents = self._denoise(
                self.denoiser if denoiser is None else denoiser,
                latents,
                cond,
                null,
                guidance,
                generator,
                callback_on_step_end,
                callback_on_step_end_tensor_inputs,
                begin,
            )
        images = self._to_output(latents, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _denoise(
        self,
        denoiser: Denoiser,
        latents: Tensor,
        cond: Cond,
        null: Cond | None,
        guidance: Tensor | float | None,
        generator: AnyGenerator | Sequence[AnyGenerator] | None,
        callback: Callback | None,
        callback_inputs: Sequence[str],
        begin: int,
    ) -> Tensor:
        """Run the scheduler's steps from `latents` to data, float32; away from `null` if it is given.

        `latents` are the state at the scheduler's timestep `begin`.
        """
        scheduler = self.scheduler
        target_times = getattr(scheduler, "target_times", None)
        _check_target_times(scheduler, denoiser)
        # ppdiffusers' own schedulers know another kind of generator, which does nothing on CPU.
        options = {"generator": generator} if isinstance(scheduler, FlowMatchScheduler) else {}
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(begin)
        timesteps = list(scheduler.timesteps)[begin:]
        with self.progress_bar(total=len(timesteps)) as progress:
            for i, timestep in enumerate(timesteps):
                t = timestep / scheduler.config.num_train_timesteps
                target_t = None if target_times is None else target_times[begin + i]
                model = denoiser if null is None else self.classifier_free(denoiser, null)
                velocity = model(latents, t, cond, target_t=target_t, guidance=guidance)
                latents = scheduler.step(velocity, timestep, latents, return_dict=False, **options)[0]
                if callback is not None:
                    tensors = {"latents": latents, **cond, **({} if null is None else _negative_names(null))}
                    asked = {name: tensors[name] for name in callback_inputs if name in tensors}
                    changed = callback(self, i, timestep, asked) or {}
                    latents = changed.get("latents", latents)
                    cond = Cond({name: changed.get(name, tensor) for name, tensor in cond.items()})
                    if null is not None:
                        null = Cond({name: changed.get(f"negative_{name}", each) for name, each in null.items()})
                progress.update()
        return latents

    def _embedded_guidance(self, scale: float, batch: int) -> Tensor | None:
        """Guidance [batch] for a transformer that embeds it, else None."""
        return paddle.full([batch], scale, dtype="float32") if self.denoiser.embeds_guidance else None

    def _set_timesteps(
        self,
        steps: int,
        timesteps: Sequence[float] | None,
        sigmas: Sequence[float] | None,
        shape: Sequence[int],
        more: Mapping[str, Any],
    ) -> None:
        """Tell the scheduler what to visit for latents of `shape`; `more` are further arguments, None a default."""
        scheduler, accepted = self.scheduler, inspect.signature(self.scheduler.set_timesteps).parameters
        custom = {k: v for k, v in {"timesteps": timesteps, "sigmas": sigmas}.items() if v is not None}
        if len(custom) > 1:
            raise UserError("pass timesteps or sigmas, not both")
        more = {name: value for name, value in more.items() if value is not None}
        for name in custom | more:
            if name not in accepted:
                raise UserError(f"{type(scheduler).__name__} does not take {name}: pass num_inference_steps instead")
        options = (custom or {"num_inference_steps": steps}) | more
        if scheduler.config.get("use_dynamic_shifting"):
            latents_per_token = (self.pixels_per_token // self.pixels_per_latent) ** 2
            options["mu"] = scheduler_mu(scheduler.config, shape[2] * shape[3] // latents_per_token)
        try:
            scheduler.set_timesteps(**options)
        except ValueError as error:  # levels that it cannot visit
            raise UserError(str(error)) from error

    def _latent_shape(self, batch: int, height: int | None, width: int | None) -> list[int]:
        """[B, C, h, w] of images of that size in pixels."""
        size = [self.default_size if edge is None else edge for edge in (height, width)]
        multiple = self.pixels_per_token
        for name, edge in zip(("height", "width"), size, strict=True):
            if isinstance(edge, bool) or not isinstance(edge, Integral) or edge < 1 or edge % multiple:
                raise UserError(f"{name} must be a positive multiple of {multiple}, got {edge!r}")
        return [batch, self.latent_channels, *(edge // self.pixels_per_latent for edge in size)]

    def _size_of(self, image: ImageInput, height: int | None, width: int | None) -> tuple[int | None, int | None]:
        """The size asked for, or else an image's own, rounded down to multiples of `pixels_per_token`."""
        multiple = self.pixels_per_token
        own = [max(edge // multiple, 1) * multiple for edge in image_size(image) or ()] or [None, None]
        return own[0] if height is None else height, own[1] if width is None else width

    def _to_latents(self, image: ImageInput, number: int, shape: Sequence[int], what: str = "image") -> Tensor:
        """Images of a call, one or `number` of them, as latents [number, C, h, w] of `shape` [.., C, h, w]."""
        height, width = (edge * self.pixels_per_latent for edge in shape[2:])
        images = image_tensor(image, height, width, what, self.image_channels)
        if images.shape[0] not in (1, number):
            kind = what.replace("_", " ") + "s"
            raise UserError(f"got {images.shape[0]} {kind} for {number} prompts: pass 1, or one a prompt")
        latents = self.encode_images(images)
        return latents.expand([number, *latents.shape[1:]])

    def _check_output(self, output_type: str) -> None:
        if output_type not in OUTPUT_TYPES:
            raise UserError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}")

    def _check_callback_inputs(self, names: Sequence[str]) -> None:
        if unknown := set(names) - set(self._callback_tensor_inputs):
            raise UserError(
                f"callback_on_step_end_tensor_inputs knows {list(self._callback_tensor_inputs)}, not {sorted(unknown)}"
            )

    def _to_output(self, latents: Tensor, output_type: str) -> Any:
        """pil: list of PIL images; np: float32 [B, H, W, C] in [0, 1]; pd: tensor [B, C, H, W] in [0, 1]; latent."""
        if output_type == "latent":
            return latents
        images = (self.decode_latents(latents) / 2 + 0.5).clip(0, 1)
        if output_type == "pd":
            return images
        images = images.transpose([0, 2, 3, 1]).numpy()
        return images if output_type == "np" else self.numpy_to_pil(images)


def _negative_names(null: Cond) -> dict[str, Tensor]:
    """The tensors that guidance leads away from, as the callback calls them."""
    return {f"negative_{name}": tensor for name, tensor in null.items()}


def _check_target_times(scheduler: SchedulerMixin, denoiser: Denoiser) -> None:
    """UserError unless the model reads times as the scheduler gives them."""
    if not isinstance(scheduler, UnifiedScheduler):
        return
    takes_target_time = getattr(denoiser, "takes_target_time", False)
    shortcut = scheduler.config.time_input == "shortcut"
    if shortcut and takes_target_time:
        raise UserError('this model is told its target time: use time_input "pair" in place of "shortcut"')
    if not shortcut and not takes_target_time and scheduler.config.style == "any":
        raise UserError(
            'style "any" needs a model that is told its target time, and this one is not: use style "few" or "mul", or '
            'time_input "shortcut" if it was trained with that'
        )


def as_prompts(prompt: str | Sequence[str], what: str = "prompt") -> list[str]:
    """A prompt or a list of prompts as a list."""
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, list | tuple) or not prompts or not all(isinstance(text, str) for text in prompts):
        raise UserError(f"{what} must be a string or a non-empty list of strings, got {prompt!r:.80}")
    return list(prompts)


def encode_distinct(texts: Sequence[str], encode: Callable[[list[str]], Cond]) -> Cond:
    """Rows of `encode(list of texts)`, computed once for each distinct text and put in the order of `texts`."""
    distinct = {text: row for row, text in enumerate(dict.fromkeys(texts))}
    return encode(list(distinct)).mask([distinct[text] for text in texts])
