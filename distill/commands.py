"""What the training scripts share: arguments, errors, the teacher, data and sample grids."""

import argparse
import logging
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import paddle

from distill.batches import Encoder, open_batches
from distill.config import DataConfig, TrainerConfig
from distill.data import Loader
from distill.logs import plot_losses, save_grid
from distill.recipe import to_dict
from distill.trainer import Batch, Method, Trainer
from fast_diffusers.errors import UserError
from fast_diffusers.samplers import euler, phased
from fast_diffusers.time_grids import PhaseGrid


def train_parser(description: str, recipe: str) -> argparse.ArgumentParser:
    """--recipe, --set, --resume and --dry-run, the arguments of every training script."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--recipe", default=recipe, help="YAML file, or the name of a shipped recipe (%(default)s)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting: --set trainer.steps=100"
    )
    parser.add_argument("--resume", action="store_true", help="continue from the newest whole checkpoint")
    parser.add_argument("--dry-run", action="store_true", help="print recipe, parameter counts and memory, then stop")
    return parser


def run(main: Callable[[list[str] | None], None]) -> None:
    """Run a script's main: a user's mistake ends with one line and exit code 1, an interrupt with 130."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    try:
        main(None)
    except (UserError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted; continue with --resume", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def open_loader(pipe: Any, data: DataConfig, trainer: TrainerConfig, encoder: Encoder, model: str) -> Loader:
    """The recipe's data behind a loader that reads ahead."""
    channels = pipe.latent_channels if pipe.pixels_per_latent == 1 else 3
    batches = open_batches(data, encoder, channels, model, Path(trainer.output_dir))
    return Loader(
        batches,
        trainer.batch_size,
        trainer.seed,
        micro_steps=trainer.gradient_accumulation,
        num_workers=data.num_workers,
    )


def fit(
    recipe: Any, method: Method, pipe: Any, encoder: Encoder, model: str, sample: Callable[[int], None], resume: bool
) -> None:
    """Train a method on its recipe's data (sections `data` and `trainer`) and plot the losses.

    `model` identifies the encoders in the key of a latent cache; `sample` is called as `Trainer` says.
    """
    config = recipe.trainer
    with open_loader(pipe, recipe.data, config, encoder, model) as loader:

        def read(step: int, micro_step: int) -> Batch:
            return encoder.batch(loader.batch(step, micro_step))

        Trainer(config, method, read, sample=sample, recipe=to_dict(recipe)).fit(resume)
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

    Args:
        grid: sample with `phased` on these phases; None samples with Euler at shift `mu`.
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
        mu: float = 0.0,
        grid: PhaseGrid | None = None,
        seed: int = 0,
    ):
        shape = [len(prompts), pipe.latent_channels]
        shape += [data.height // pipe.pixels_per_latent, data.width // pipe.pixels_per_latent]
        self.noise = paddle.to_tensor(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))
        self.pipe, self.encoder, self.prompts, self.folder = pipe, encoder, prompts, folder
        self.steps, self.mu, self.grid = steps, mu, grid

    @paddle.no_grad()
    def __call__(self, done: int) -> None:
        denoiser, cond = self.pipe.denoiser, self.encoder.prompts(self.prompts)
        embeds = self.pipe.transformer.config.guidance_embeds
        guidance = self.encoder.guidance_scale if embeds else None

        def velocity(x: paddle.Tensor, t: paddle.Tensor, target_t: paddle.Tensor) -> paddle.Tensor:
            return denoiser(x, t, cond, target_t=target_t, guidance=guidance)

        if self.grid is None:
            latents = euler(velocity, self.noise, steps=self.steps, mu=self.mu)
        else:
            latents = phased(velocity, self.noise, steps=self.steps, grid=self.grid)
        self.folder.mkdir(parents=True, exist_ok=True)
        save_grid(self.pipe.decode_latents(latents), self.folder / f"step-{done:08d}.png", columns=10)
