"""Distil a SANA into a 1-4-step student by SANA-Sprint: `python distill/train_sana_sprint.py [--recipe NAME]`.

Without arguments: the small SANA teacher of handwritten digits that ships with the project, in minutes on two cores.
On several devices: `python -m paddle.distributed.launch --nproc_per_node 2 distill/train_sana_sprint.py`.
"""

import logging
from contextlib import nullcontext
from pathlib import Path

from distill.batches import Encoder, reload_text_encoders
from distill.commands import SampleGrid, fit, num_tokens, run, train_parser
from distill.control import ControlEncoder
from distill.parallel import World, barrier, init
from distill.recipe import load_recipe, to_yaml
from distill.sana_sprint import STUDENT, Recipe, SanaSprint, Student
from distill.sana_sprint_memory import describe_run
from distill.sharding import check_recipe
from fast_diffusers import lora
from fast_diffusers.pipelines.shipped import open_pipeline

log = logging.getLogger(__name__)


def train(recipe: Recipe, resume: bool = False, world: World | None = None) -> Path:
    """Train the student of a recipe; returns the folder with its pipeline, LoRA files or ControlNet."""
    world = world or World()
    check_recipe(recipe, world)
    config, output = recipe.trainer, Path(recipe.trainer.output_dir)
    teacher = open_pipeline(recipe.model.path, config.dtype)
    num_tokens(teacher, recipe.data)  # which checks the size
    if config.gradient_checkpointing:
        teacher.transformer.enable_gradient_checkpointing()
    method = SanaSprint(recipe, teacher)
    pipe, guidance = method.student.pipe, recipe.sampler.guidance_scale
    controlled = method.student.controlnet is not None
    encoder = ControlEncoder(pipe, guidance, recipe.data) if controlled else Encoder(pipe, guidance)
    average = method.averages.get(STUDENT)
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
        with average.swapped() if average else nullcontext():
            return grid(done, method.student.role)

    fit(recipe, method, pipe, encoder, recipe.model.path, sample, resume, world)
    folder = output / FOLDERS[recipe.model.train]
    if world.is_main:
        with average.swapped() if average else nullcontext():
            save(method.student, folder, recipe)
        log.info("the student is in %s", folder)
    barrier(world)
    return folder


FOLDERS = {"full": "pipeline", "lora": "lora", "controlnet": "controlnet"}
"""Of the result in the output folder, by model.train."""


def save(student: Student, folder: Path, recipe: Recipe) -> None:
    """Write the student as it stands: a whole pipeline, its adapter in both layouts, or a ControlNet."""
    if student.controlnet is not None:
        student.controlnet.save_pretrained(folder, layout="diffusers")
    elif lora.adapters(student.pipe.transformer):
        for layout in ("paddle", "diffusers"):
            lora.save(student.pipe.transformer, folder, STUDENT, layout)
    else:
        reload_text_encoders(student.pipe, recipe.model.path, recipe.trainer.dtype)
        student.pipe.save_pretrained(folder, layout="diffusers")


def main(argv: list[str] | None) -> None:
    """Command line."""
    arguments = train_parser(__doc__, "sana_sprint_digits").parse_args(argv)
    recipe = load_recipe(Recipe, arguments.recipe, arguments.set)
    if arguments.dry_run:
        print(to_yaml(recipe))
        print(describe_run(recipe))
        return
    train(recipe, arguments.resume, init())


if __name__ == "__main__":
    run(main)
