"""What the training scripts share: arguments, errors, the teacher, data and sample grids."""

import argparse
import logging
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import paddle

from distill.batches import Encoder, open_batches
from distill.config import DataConfig, TrainerConfig
from distill.data import Loader
from distill.health import Health
from distill.logs import plot_losses, save_grid
from distill.metrics.sampling import Sampler
from distill.parallel import World, main_first
from distill.recipe import to_dict
from distill.stopping import EXIT_CODE, Interrupted, StopRequest
from distill.trainer import Batch, Method, Trainer
from fast_diffusers.denoisers import Denoiser
from fast_diffusers.errors import UserError
from fast_diffusers.random import Generator


def train_parser(description: str, recipe: str) -> argparse.ArgumentParser:
    """--recipe, --set, --resume and --dry-run, the arguments of every training script."""
    parser = argparse.ArgumentParser(
        description=description,
        epilog=f"SIGTERM and SIGINT finish the running step, save a checkpoint and exit with code {EXIT_CODE}.",
    )
    parser.add_argument("--recipe", default=recipe, help="YAML file, or the name of a shipped recipe (%(default)s)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting: --set trainer.steps=100"
    )
    parser.add_argument("--resume", action="store_true", help="continue from the newest whole checkpoint")
    parser.add_argument("--dry-run", action="store_true", help="print recipe, parameter counts and memory, then stop")
    return parser


def run(main: Callable[[list[str] | None], None], argv: list[str] | None = None) -> None:
    """Run a script's main on `argv`, by default the command line's.

    A user's mistake ends with one line and exit code 1, SIGTERM and SIGINT with one and 75. These signals end training
    after the running step, everything else at once; a second one kills.
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    with StopRequest(raising=True):
        try:
            main(argv)
        except (UserError, FileNotFoundError) as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            sys.exit(1)
        except Interrupted as stopped:
            print(stopped, file=sys.stderr)
            sys.exit(EXIT_CODE)


def open_loader(
    pipe: Any, data: DataConfig, trainer: TrainerConfig, encoder: Encoder, model: str, world: World
) -> Loader:
    """This rank's part of the recipe's data behind a loader that reads ahead."""
    channels = pipe.latent_channels if pipe.pixels_per_latent == 1 else 3
    with main_first(world):  # which downloads, and encodes the latent cache
        keep = trainer.sample_prompts if trainer.sample_every else ()
        batches = open_batches(data, encoder, channels, model, Path(trainer.output_dir), keep)
    return Loader(
        batches,
        trainer.batch_size,
        trainer.seed,
        micro_steps=trainer.gradient_accumulation,
        rank=world.rank,
        world=world.size,
        num_workers=data.num_workers,
    )


def fit(
    recipe: Any,
    method: Method,
    pipe: Any,
    encoder: Encoder,
    model: str,
    sample: Callable[[int], Mapping[str, float] | None],
    resume: bool,
    world: World | None = None,
) -> None:
    """Train a method on its recipe's data (sections `data` and `trainer`) and plot the losses.

    `model` identifies the encoders in the key of a latent cache; `sample` is called as `Trainer` says.
    """
    config, world = recipe.trainer, world or World()
    with open_loader(pipe, recipe.data, config, encoder, model, world) as loader:

        def read(step: int, micro_step: int) -> Batch:
            return encoder.batch(loader.batch(step, micro_step))

        trainer = Trainer(
            config,
            method,
            read,
            sample=sample,
            recipe=to_dict(recipe),
            world=world,
            health=Health(config.health),
            waited=lambda: loader.wait_seconds,
        )
        trainer.fit(resume)
    if world.is_main:
        plot_losses(Path(config.output_dir) / "metrics.jsonl", Path(config.output_dir) / "losses.png")


def num_tokens(pipe: Any, data: DataConfig) -> int:
    """Image tokens of the transformer at the recipe's size. UserError if the size does not fit the model."""
    edge = pipe.pixels_per_token
    for name, pixels in (("height", data.height), ("width", data.width)):
        if pixels % edge:
            raise UserError(f"data.{name} is {pixels}; this model takes multiples of {edge}")
    return (data.height // edge) * (data.width // edge)


class SampleGrid:
    """Writes a grid of samples from fixed noise and prompts: call it with the steps done.

    The call returns `sample_statistics` of the latents.

    Args:
        sampler: `sampler(velocity, noise, *, steps, generator)`.
        guided: use classifier-free guidance where it is not embedded, see `Encoder.velocity`.
        seed: of the initial noise, and of what the sampler draws.
        write: False on the ranks that only measure.
    """

    def __init__(
        self,
        pipe: Any,
        encoder: Encoder,
        data: DataConfig,
        folder: Path,
        *,
        steps: int,
        prompts: list[str],
        sampler: Sampler,
        guided: bool = False,
        seed: int = 0,
        write: bool = True,
    ):
        shape = [len(prompts), pipe.latent_channels]
        shape += [data.height // pipe.pixels_per_latent, data.width // pipe.pixels_per_latent]
        self.noise = paddle.to_tensor(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))
        self.pipe, self.encoder, self.prompts, self.folder = pipe, encoder, prompts, folder
        self.steps, self.sampler, self.guided, self.seed, self.write = steps, sampler, guided, seed, write

    @paddle.no_grad()
    def __call__(self, done: int, denoiser: Denoiser | None = None) -> dict[str, float]:
        """`denoiser`: whose samples; the pipeline's by default."""
        velocity = self.encoder.velocity(denoiser or self.pipe.denoiser, self.prompts, self.guided)
        latents = self.sampler(velocity, self.noise, steps=self.steps, generator=Generator(self.seed))
        if self.write:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_grid(self.pipe.decode_latents(latents), self.folder / f"step-{done:08d}.png", columns=10)
        return sample_statistics(latents, self.prompts)


def sample_statistics(latents: paddle.Tensor, prompts: list[str]) -> dict[str, float]:
    """What shows a collapse or drift of samples, [B, C, H, W] and a prompt each.

    Returns:
        `sample_mean` and `sample_std` over all elements, and `sample_diversity`, the root-mean-square deviation of a
        sample from the mean of its prompt; where no prompt comes twice, from the mean of all.
    """
    values = latents.astype("float64").numpy()
    labels = np.array(prompts if len(set(prompts)) < len(prompts) else [""] * len(prompts))
    spread = [values[labels == label] - values[labels == label].mean(0) for label in dict.fromkeys(labels)]
    deviations = np.concatenate([each for each in spread if len(each) > 1] or spread)
    return {
        "sample_mean": float(values.mean()),
        "sample_std": float(values.std()),
        "sample_diversity": float(np.sqrt((deviations**2).mean())),
    }
