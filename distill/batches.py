"""From a recipe's data section to the batches that objectives take."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import paddle

from distill.config import DataConfig
from distill.data import ImageBatches, LatentCache, Source, jsonl_log, open_source
from distill.data.loader import Batches
from fast_diffusers.conditioning import Cond
from fast_diffusers.denoisers import ClassifierFree, Denoiser
from fast_diffusers.pipelines.components import load_component, read_index
from fast_diffusers.pipelines.shipped import pipeline_folder
from fast_diffusers.samplers.loop import Velocity

TEXT_PARTS = tuple(f"{part}{number}" for number in ("", "_2", "_3") for part in ("text_encoder", "tokenizer"))
"""Components that a pipeline needs for nothing but prompts."""

PATH_ARGUMENT = {"mnist": "folder", "image_folder": "dir", "laion_list": "list_file", "parquet": "paths"}


def open_data(config: DataConfig) -> Source:
    """The data set of a recipe. UserError where it is missing, empty or of the wrong kind."""
    settings: dict[str, Any] = {"kind": config.kind}
    if config.path is not None and config.kind in PATH_ARGUMENT:
        settings[PATH_ARGUMENT[config.kind]] = config.path
    if config.kind in ("digits", "mnist"):
        settings["split"] = config.split
    if config.kind == "mnist":
        settings |= {"download": config.download, "size": max(config.height, config.width)}
    return open_source(settings)


class Encoder:
    """Images and prompts to latents and conditioning, through the frozen encoders of a pipeline.

    Each distinct prompt is encoded once and kept, up to `max_prompts` of them (256 of FLUX.1's are 1 GiB in bfloat16).
    """

    def __init__(self, pipe: Any, guidance_scale: float, max_prompts: int = 256):
        self.pipe, self.guidance_scale, self.max_prompts = pipe, guidance_scale, max_prompts
        self.table: Cond | None = None
        self.row: dict[str, int] = {}

    @paddle.no_grad()
    def images(self, images: np.ndarray) -> paddle.Tensor:
        """float32 [B, C, H, W] in [-1, 1] to latents, the mode of the encoder's posterior."""
        return self.pipe.encode_images(paddle.to_tensor(images))

    @paddle.no_grad()
    def prompts(self, prompts: list[str]) -> Cond:
        """One row a prompt."""
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.row]
        if missing and len(self.row) + len(missing) > self.max_prompts:
            self.table, self.row, missing = None, {}, list(dict.fromkeys(prompts))
        if missing:
            encoded = self.pipe.conditioning(missing)
            self.row |= {prompt: len(self.row) + i for i, prompt in enumerate(missing)}
            self.table = encoded if self.table is None else self.table.concat(encoded)
        return self.table.mask([self.row[prompt] for prompt in prompts])

    def release_text_encoders(self, keep_prompts: Sequence[str]) -> None:
        """Keep the embeddings of `keep_prompts` and of the empty prompt, and drop the encoders from the pipeline.

        The memory is free once nothing else refers to them. Other prompts are an error from now on.
        """
        prompts = list(dict.fromkeys(["", *keep_prompts]))
        self.table, self.row, self.max_prompts = None, {}, len(prompts)
        self.prompts(prompts)
        present = [name for name in TEXT_PARTS if getattr(self.pipe, name, None) is not None]
        if present:
            self.pipe.register_modules(**dict.fromkeys(present))

    def velocity(self, denoiser: Denoiser, prompts: list[str], guided: bool = False) -> Velocity:
        """What a sampler evaluates to draw these prompts, at the encoder's guidance if the denoiser embeds it.

        guided: classifier-free guidance where it does not, as teachers need it; the guidance of their students is
        either embedded or none.
        """
        told = embeds_guidance(denoiser)
        if guided and not told:
            denoiser, told = ClassifierFree(denoiser, self.prompts([""])), True
        cond, guidance = self.prompts(prompts), self.guidance_scale if told else None
        return lambda x, t, target_t: denoiser(x, t, cond, target_t=target_t, guidance=guidance)

    def batch(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """What a loader gives, images and prompts or cached latents and embeddings, as an objective's batch.

        Returns `latents` [B, C, H, W], `cond`, `null_cond` (the empty prompt) and `guidance` [B], or None for a model
        that does not embed its guidance.
        """
        if "latents" in raw:
            latents = paddle.to_tensor(raw["latents"])
            cond = Cond({name: paddle.to_tensor(value) for name, value in raw["cond"].items()})
        else:
            latents, cond = self.images(raw["images"]), self.prompts(raw["prompts"])
        size = latents.shape[0]
        guidance = self.guidance_scale if embeds_guidance(self.pipe.denoiser) else None
        return {
            "latents": latents,
            "cond": cond,
            "null_cond": self.prompts([""]).expand(size),
            "guidance": None if guidance is None else paddle.full([size], guidance),
        }


def embeds_guidance(denoiser: Denoiser) -> bool:
    """Whether a denoiser takes a guidance strength; functions, which do not say, are given it."""
    return getattr(denoiser, "embeds_guidance", True)


def reload_text_encoders(pipe: Any, model: str, paddle_dtype: str | None = None) -> None:
    """Give a pipeline that is to be saved what `Encoder.release_text_encoders` dropped, from the folder of the teacher.

    model: the name or path that the teacher was opened with.
    """
    folder = pipeline_folder(model)
    index = read_index(folder)
    for name in TEXT_PARTS:
        if name in index and name in pipe.component_types and getattr(pipe, name) is None:
            pipe.register_modules(**{name: load_component(folder, name, index[name], paddle_dtype)})


def open_batches(
    config: DataConfig,
    encoder: Encoder,
    channels: int,
    model: str,
    output_dir: Path,
    keep_prompts: Sequence[str] | None = None,
) -> Batches:
    """The images of the recipe, or their latents and embeddings on disk where the recipe names a cache folder.

    Bad records are named in `output_dir`/bad_records.jsonl. `model` identifies the encoders in the cache's key. With a
    cache and `keep_prompts`, the pipeline's text encoders are dropped; see `Encoder.release_text_encoders`.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    images = ImageBatches(
        open_data(config),
        config.height,
        config.width,
        channels,
        max_bad_fraction=config.max_bad_fraction,
        on_bad=jsonl_log(output_dir / "bad_records.jsonl"),
    )
    if config.cache is None:
        return images
    cache = LatentCache.build(
        images, encoder.images, lambda prompts: encoder.prompts(list(prompts)), config.cache, encoder=model
    )
    if keep_prompts is not None:
        encoder.release_text_encoders(keep_prompts)
    return cache
