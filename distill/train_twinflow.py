"""Train an any-step student by TwinFlow or RCGM: `python distill/train_twinflow.py [--recipe NAME]`.

Without arguments: a LoRA of the small FLUX teacher of handwritten digits that ships with the project.
On several devices: `python -m paddle.distributed.launch --nproc_per_node 2 distill/train_twinflow.py`.
"""

import logging
from pathlib import Path

from distill.batches import Encoder, reload_text_encoders
from distill.commands import SampleGrid, fit, num_tokens, run, train_parser
from distill.parallel import World, barrier, init
from distill.recipe import load_recipe, to_yaml
from distill.sharding import check_recipe
from distill.twinflow import AVERAGE, STUDENT, Recipe, TwinFlow
from distill.twinflow_memory import describe_run
from fast_diffusers.pipelines.shipped import open_pipeline
from fast_diffusers.target_time import save_lora

log = logging.getLogger(__name__)


def train(recipe: Recipe, resume: bool = False, world: World | None = None) -> Path:
    """Train the student of a recipe; returns the folder with its LoRA files, or its pipeline where all is trained."""
    world = world or World()
    check_recipe(recipe, world)
    config, output = recipe.trainer, Path(recipe.trainer.output_dir)

    def teacher_pipeline():
        return open_pipeline(recipe.model.path, config.dtype)

    pipe = teacher_pipeline()
    num_tokens(pipe, recipe.data)  # which checks the size
    if config.gradient_checkpointing:
        pipe.transformer.enable_gradient_checkpointing()
    encoder = Encoder(pipe, recipe.objective.guidance_scale)
    method = TwinFlow(recipe, pipe, teacher_pipeline)
    grid = SampleGrid(
        pipe,
        encoder,
        recipe.data,
        output / "samples",
        steps=recipe.sampler.steps,
        prompts=list(config.sample_prompts),
        sampler=recipe.sampler.sampler(),
        write=world.is_main,
    )

    def sample(done: int) -> dict[str, float]:
        return grid(done, (method.average or method.student).role)

    fit(recipe, method, pipe, encoder, recipe.model.path, sample, resume, world)
    folder = output / ("lora" if recipe.model.train == "lora" else "pipeline")
    if world.is_main:
        save(method, folder, recipe)
        log.info("the student is in %s", folder)
    barrier(world)
    return folder


def save(method: TwinFlow, folder: Path, recipe: Recipe) -> None:
    """Write the student to `folder`: the average, if there is one.

    Adapters are written in both layouts, and beside an average the last weights, to <folder>_last.
    """
    if not method.trains_adapter:
        pipe = method.average_pipe or method.pipe
        reload_text_encoders(pipe, recipe.model.path, recipe.trainer.dtype)
        pipe.save_pretrained(folder, layout="diffusers")
        return
    adapters = {folder: STUDENT}
    if method.average is not None:
        adapters = {folder: AVERAGE, folder.with_name(f"{folder.name}_last"): STUDENT}
    for place, adapter in adapters.items():
        for layout in ("paddle", "diffusers"):
            save_lora(method.pipe.transformer, place, adapter, layout)


def main(argv: list[str] | None) -> None:
    """Command line."""
    arguments = train_parser(__doc__, "twinflow_digits").parse_args(argv)
    recipe = load_recipe(Recipe, arguments.recipe, arguments.set)
    if arguments.dry_run:
        print(to_yaml(recipe))
        print(describe_run(recipe))
        return
    train(recipe, arguments.resume, init())


if __name__ == "__main__":
    run(main)
