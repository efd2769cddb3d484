"""Train a teacher by flow matching: `python distill/train_teacher.py [--recipe NAME]`.

A small FLUX, told its guidance strength, or a small SANA, whose guidance is classifier-free, from scratch; or a trained
SANA of any size that is prepared for SANA-Sprint (recipe `teacher_sana_prepare`). The result is a pipeline folder.
Without arguments: the FLUX teacher of handwritten digits that ships with the project.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import paddle

from distill.architectures import ArchitectureConfig
from distill.batches import Encoder
from distill.commands import SampleGrid, fit, num_tokens, run, train_parser
from distill.config import DataConfig, OptimizerConfig, TrainerConfig
from distill.draws import Draws
from distill.objectives.flow_matching import flow_matching
from distill.optim import EMA, make_optimizer
from distill.parallel import World, barrier, init
from distill.recipe import load_recipe, number, to_yaml
from distill.roles import Roles
from distill.sharding import check_recipe
from distill.trainer import Batch, Loss
from fast_diffusers.errors import UserError
from fast_diffusers.pipelines import Pipeline
from fast_diffusers.samplers import euler
from fast_diffusers.time_grids import scheduler_mu

log = logging.getLogger(__name__)
TEACHER = "teacher"


@dataclass(frozen=True)
class FlowMatchingConfig:
    """The objective; see `distill.objectives.flow_matching`."""

    time_mean: float = number(0.0, doc="of the logit-normal times, before the shift")
    time_std: float = number(1.0, above=0, doc="of the logit-normal times")
    drop_rate: float = number(0.1, minimum=0, maximum=1, doc="fraction of conditions replaced by the empty prompt")
    guided_rate: float = number(0.5, minimum=0, maximum=1, doc="fraction of rows that learn the guided velocity")
    guided_from: int = number(0, minimum=0, doc="step from which they do")
    guidance_range: tuple[float, float] = number((1.0, 5.0), minimum=0, doc="of the guidance strengths they learn")


@dataclass(frozen=True)
class Recipe:
    """All settings of `train_teacher.py`."""

    architecture: ArchitectureConfig = ArchitectureConfig()
    data: DataConfig = DataConfig()
    objective: FlowMatchingConfig = FlowMatchingConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    trainer: TrainerConfig = TrainerConfig()

    def __post_init__(self) -> None:
        if self.architecture.prepared is None and self.trainer.dtype != "float32":
            raise ValueError("trainer.dtype must be float32: all weights are trained")


class FlowMatchingTeacher:
    """The method for `distill.trainer.Trainer`. Its target network is the running average of the trained one."""

    def __init__(self, recipe: Recipe, pipe: Pipeline, mu: float):
        if recipe.trainer.ema_decay is None:
            raise UserError("a teacher is the average of its weights: set trainer.ema_decay (0.999 is usual)")
        self.settings, self.mu = recipe.objective, mu
        self.embeds_guidance = pipe.transformer.config.guidance_embeds
        if recipe.objective.guided_rate and not self.embeds_guidance:
            raise UserError("this model embeds no guidance that it could learn: set objective.guided_rate to 0")
        parameters = dict(pipe.transformer.named_parameters())
        self.optimizers = {TEACHER: make_optimizer(parameters, recipe.optimizer, recipe.trainer.steps)}
        self.average = EMA(parameters, recipe.trainer.ema_decay)
        self.averages = {TEACHER: self.average}
        self.roles = Roles(student=pipe.denoiser, teacher=None, target=self._averaged(pipe.denoiser))

    def _averaged(self, denoiser: Any) -> Any:
        def target(*arguments: Any, **settings: Any) -> paddle.Tensor:
            with self.average.swapped():
                return denoiser(*arguments, **settings)

        return target

    def turns(self, step: int) -> Sequence[str]:
        """See `Method`."""
        return [TEACHER]

    def loss(self, player: str, batch: Batch, draws: Draws) -> Loss:
        """See `Method`."""
        s = self.settings
        return flow_matching(
            self.roles,
            batch,
            draws,
            mu=self.mu,
            time_mean=s.time_mean,
            time_std=s.time_std,
            drop_rate=s.drop_rate,
            guided_rate=s.guided_rate if self.average.steps >= s.guided_from else 0.0,
            guidance_range=s.guidance_range,
            embeds_guidance=self.embeds_guidance,
        )


def new_pipeline(recipe: Recipe) -> Pipeline:
    """The untrained pipeline of a recipe."""
    paddle.seed(recipe.trainer.seed)
    return recipe.architecture.chosen.pipeline(recipe.data, recipe.trainer)


def train(recipe: Recipe, resume: bool = False, world: World | None = None) -> Path:
    """Train the teacher of a recipe and save it as a pipeline folder, which is returned."""
    world = world or World()
    check_recipe(recipe, world)
    config, output = recipe.trainer, Path(recipe.trainer.output_dir)
    pipe = new_pipeline(recipe)
    if config.gradient_checkpointing:
        pipe.transformer.enable_gradient_checkpointing()
    mu = scheduler_mu(pipe.scheduler.config, num_tokens(pipe, recipe.data))
    encoder = Encoder(pipe, guidance_scale=3.5)
    method = FlowMatchingTeacher(recipe, pipe, mu)
    prompts = list(config.sample_prompts)
    folder = output / "samples"
    grid = SampleGrid(
        pipe,
        encoder,
        recipe.data,
        folder,
        steps=20,
        prompts=prompts,
        sampler=partial(euler, mu=mu),
        guided=True,
        write=world.is_main,
    )

    def sample(done: int) -> dict[str, float]:
        with method.average.swapped():
            return grid(done)

    fit(recipe, method, pipe, encoder, "pixels", sample, resume, world)
    if world.is_main:
        with method.average.swapped():
            pipe.save_pretrained(output / "pipeline", layout="diffusers")
        log.info("the teacher is in %s", output / "pipeline")
    barrier(world)
    return output / "pipeline"


def main(argv: list[str] | None) -> None:
    """Command line."""
    arguments = train_parser(__doc__, "teacher_digits").parse_args(argv)
    recipe = load_recipe(Recipe, arguments.recipe, arguments.set)
    if arguments.dry_run:
        print(f"{to_yaml(recipe)}\n{recipe.architecture.chosen.parameters():,} trained parameters")
        return
    train(recipe, arguments.resume, init())


if __name__ == "__main__":
    run(main)
