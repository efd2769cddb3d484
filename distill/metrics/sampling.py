"""Many samples of a model from fixed noise: feature sets, a few images to look at, and a cache of both on disk."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle import Tensor, nn
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from tqdm import tqdm

from distill.batches import Encoder
from distill.metrics.clip_score import ClipScorer
from distill.metrics.features import Extractor, FeatureSet, join
from distill.parallel import World, gather_rows
from fast_diffusers.denoisers import Denoiser
from fast_diffusers.errors import UserError
from fast_diffusers.models.checkpoint_io import ADAPTER_NAMES
from fast_diffusers.random import Generator, randn

Sampler = Callable[..., Tensor]
"""sampler(velocity, noise, *, steps, generator) -> x0: one of `fast_diffusers.samplers`, its other arguments bound."""


@dataclass(frozen=True)
class SampleSettings:
    """What all runs of a comparison share.

    seed: of the initial noise; sample i gets the same noise whatever the batch size. height, width: pixels, None for
    the pipeline's own. guidance_scale: embedded, or else that of the teacher's classifier-free guidance.
    previews: number of images that are kept.
    """

    num_samples: int = 2000
    seed: int = 0
    batch_size: int = 250
    guidance_scale: float = 3.5
    height: int | None = None
    width: int | None = None
    previews: int = 16

    def __post_init__(self) -> None:
        if self.num_samples < 8:
            raise UserError(f"num_samples must be at least 8, got {self.num_samples}")
        if self.batch_size < 1 or self.seed < 0 or self.previews < 1:
            raise UserError("batch_size and previews must be positive and the seed not negative")


@dataclass(frozen=True, eq=False)
class Samples:
    """One run: the features of its N samples, its first K images uint8 [K, C, H, W], and the time an image took."""

    features: FeatureSet
    images: np.ndarray
    ms_per_image: float

    def save(self, path: Path) -> None:
        """Write a safetensors file, whole or not at all."""
        columns = {"features": self.features.features, "images": self.images, "ms": np.array(self.ms_per_image)}
        columns |= {"predictions": self.features.predictions, "clip": self.features.clip}
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")  # runs at a time may share the cache
        temporary.write_bytes(save({name: array for name, array in columns.items() if array is not None}))
        temporary.replace(path)

    @classmethod
    def load(cls, path: Path) -> Samples:
        """Read what `save` wrote; UserError for a damaged file."""
        try:
            columns = load_file(path)
            features = FeatureSet(columns["features"], columns.get("predictions"), columns.get("clip"))
            return cls(features, columns["images"], float(columns["ms"]))
        except (SafetensorError, KeyError) as error:
            raise UserError(f"the cached samples {path} are damaged ({error}): delete the file") from error


class SampleRunner:
    """Samples a pipeline's prompts with any denoiser and sampler, and extracts features on the way.

    Args:
        pipe: gives the conditioning, the latents' geometry and the decoder.
        prompts: repeated in order up to the number of samples.
        extractor: of the features.
        clip: also score the images with CLIP.
        world: each rank samples its share; all get the samples of all.
    """

    def __init__(
        self,
        pipe: Any,
        prompts: Sequence[str],
        extractor: Extractor,
        settings: SampleSettings,
        clip: ClipScorer | None = None,
        world: World | None = None,
    ):
        if not prompts:
            raise UserError("there are no prompts to sample")
        self.world = world or World()
        if settings.num_samples < self.world.size:
            raise UserError(f"{settings.num_samples} samples cannot be split over {self.world.size} processes")
        self.pipe, self.extractor, self.settings, self.clip = pipe, extractor, settings, clip
        self.prompts = [prompts[i % len(prompts)] for i in range(settings.num_samples)]
        size = [settings.height or pipe.default_size, settings.width or pipe.default_size]
        for name, edge in zip(("height", "width"), size, strict=True):
            if edge < 1 or edge % pipe.pixels_per_token:
                raise UserError(f"{name} must be a multiple of {pipe.pixels_per_token} for this model, got {edge}")
        self.num_tokens: int = size[0] * size[1] // pipe.pixels_per_token**2
        self.latent_shape = [pipe.latent_channels, *(edge // pipe.pixels_per_latent for edge in size)]
        self._encoder = Encoder(pipe, settings.guidance_scale)

    def noise(self, rows: range, seed: int) -> Tensor:
        """Initial noise of samples `rows`, [len(rows), C, h, w]: a pure function of seed and sample index."""
        return randn([len(rows), *self.latent_shape], [Generator((seed << 32) + i) for i in rows])

    @paddle.no_grad()
    def run(
        self, denoiser: Denoiser, sampler: Sampler, steps: int, seed: int, progress: tqdm, guided: bool = False
    ) -> Samples:
        """Sample every prompt in `steps` steps from the noise of `seed`.

        guided: use classifier-free guidance where it is not embedded, see `Encoder.velocity`.
        progress: advanced by one for each of this rank's samples and model calls.

        Raises:
            UserError: an image is not finite.
        """
        parts, images, seconds = [], [], 0.0
        share = self.world.share(self.settings.num_samples)
        kept = min(self.settings.previews, self.settings.num_samples)
        for start in range(share.start, share.stop, self.settings.batch_size):
            rows = range(start, min(start + self.settings.batch_size, share.stop))
            before = time.perf_counter()
            batch = self._images(denoiser, sampler, steps, seed, rows, progress, guided)
            seconds += time.perf_counter() - before
            features, predictions = self.extractor(batch)
            clip = self.clip and self.clip(batch.transpose(0, 2, 3, 1), self.prompts[rows.start : rows.stop])
            parts.append(FeatureSet(features, predictions, clip))
            images.append(batch[: max(0, kept - start)])
        shown = gather_rows(np.concatenate(images), min(share.start, kept), kept, self.world)
        return Samples(self._gather(join(parts)), shown, 1e3 * seconds / len(share))

    def _gather(self, mine: FeatureSet) -> FeatureSet:
        """The features of all ranks' samples, from this rank's."""
        start, total = self.world.share(self.settings.num_samples).start, self.settings.num_samples
        columns = (mine.features, mine.predictions, mine.clip)
        return FeatureSet(*(c if c is None else gather_rows(c, start, total, self.world) for c in columns))

    def _images(
        self,
        denoiser: Denoiser,
        sampler: Sampler,
        steps: int,
        seed: int,
        rows: range,
        progress: tqdm,
        guided: bool,
    ) -> np.ndarray:
        """Images uint8 [B, C, H, W]: what a user would save, and what real images are."""
        evaluate = self._encoder.velocity(denoiser, self.prompts[rows.start : rows.stop], guided)

        def velocity(x: Tensor, t: Tensor, target_t: Tensor) -> Tensor:
            progress.update(len(rows))
            return evaluate(x, t, target_t)

        generators = [Generator((1 << 64) + (seed << 32) + i) for i in rows]  # not those of the initial noise
        latents = sampler(velocity, self.noise(rows, seed), steps=steps, generator=generators)
        pixels = self.pipe.decode_latents(latents).numpy()
        if not np.isfinite(pixels).all():
            raise UserError(f"{steps} steps gave images with NaN or infinity: the weights are broken or diverged")
        return np.rint((pixels.clip(-1, 1) + 1) * 127.5).astype(np.uint8)

    def cache_name(self, sampler: str, steps: int, seed: int) -> str:
        """A file name that changes with everything that the base model's samples depend on.

        sampler: names the sampler and its settings.
        """
        return hashlib.sha256(f"{self._identity} {sampler} {steps} {seed}".encode()).hexdigest()[:32] + ".safetensors"

    @cached_property
    def _identity(self) -> str:
        settings = asdict(self.settings)
        del settings["batch_size"], settings["seed"]
        measured_by = [self.extractor.identity, self.clip and self.clip.identity]
        return json.dumps([weights_hash(self.pipe), settings, self.prompts, measured_by])


def weights_hash(pipe: Any) -> str:
    """sha256 of the weights of every model in a pipeline, adapters left out."""
    digest = hashlib.sha256()
    for name in sorted(pipe.component_types):
        component = getattr(pipe, name)
        if isinstance(component, nn.Layer):
            for key, tensor in component.state_dict().items():
                if not ADAPTER_NAMES.search(key):
                    digest.update(f"{name}.{key}".encode())
                    digest.update(np.ascontiguousarray(tensor.numpy()))
    return digest.hexdigest()
