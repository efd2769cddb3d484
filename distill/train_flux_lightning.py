"""Distil a flow model into a few-step LoRA student: `python distill/train_flux_lightning.py [--recipe NAME]`.

Without arguments: the small FLUX teacher of handwritten digits that ships with the project, in minutes on two cores.
On several devices: `python -m paddle.distributed.launch --nproc_per_node 2 distill/train_flux_lightning.py`.
"""

import logging
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from distill.batches import Encoder
from distill.commands import SampleGrid, fit, num_tokens, run, train_parser
from distill.flux_lightning import STUDENT, FluxLightning, Recipe
from distill.memory import describe_run
from distill.parallel import World, barrier, init
from distill.recipe import load_recipe, to_yaml
from distill.sharding import check_recipe
from fast_diffusers import lora
from fast_diffusers.pipelines.shipped import open_pipeline
from fast_diffusers.samplers import phased

log = logging.getLogger(__name__)


def train(recipe: Recipe, resume: bool = False, world: World | None = None) -> Path:
    """Train the student of a recipe and save its LoRA file; returns the folder it is in."""
    world = world or World()
    check_recipe(recipe, world)
    config, output = recipe.trainer, Path(recipe.trainer.output_dir)
    pipe = open_pipeline(recipe.model.path, config.dtype)
    tokens = num_tokens(pipe, recipe.data)
    if config.gradient_checkpointing:
        pipe.transformer.enable_gradient_checkpointing()
    encoder = Encoder(pipe, recipe.objective.guidance_scale)
    method = FluxLightning(recipe, pipe, tokens)
    average = method.averages.get(STUDENT)

    grid_writer = SampleGrid(
        pipe,
        encoder,
        recipe.data,
        output / "samples",
        steps=recipe.objective.num_phases,
        prompts=list(config.sample_prompts),
        sampler=partial(phased, grid=method.grid),
        write=world.is_main,
    )

    def sample(done: int) -> dict[str, float]:
        with average.swapped() if average else nullcontext(), lora.active(pipe.transformer, STUDENT):
            return grid_writer(done)

    fit(recipe, method, pipe, encoder, recipe.model.path, sample, resume, world)
    if world.is_main:
        with average.swapped() if average else nullcontext():
            for layout in ("paddle", "diffusers"):
                lora.save(pipe.transformer, output / "lora", STUDENT, layout)
        log.info("the student's LoRA is in %s", output / "lora")
    barrier(world)
    return output / "lora"


def main(argv: list[str] | None) -> None:
    """Command line."""
    arguments = train_parser(__doc__, "flux_lightning_digits").parse_args(argv)
    recipe = load_recipe(Recipe, arguments.recipe, arguments.set)
    if arguments.dry_run:
        print(to_yaml(recipe))
        print(describe_run(recipe))
        return
    train(recipe, arguments.resume, init())


if __name__ == "__main__":
    run(main)
