"""SANA-Sprint: a 1-4-step student of a flow model by continuous-time consistency (sCM) and adversarial heads (LADD).

The method of arXiv 2503.09641. A student is a copy of a SANA, told its guidance, or a LoRA of any model; or a
ControlNet is trained for a student that is there already.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any, Literal

import paddle

from distill.config import DataConfig, LoraConfig, ModelConfig, OptimizerConfig, TrainerConfig
from distill.discriminators import LaddDiscriminator
from distill.draws import Draws
from distill.log_variance import LogVariance
from distill.objectives import trigflow_adversarial, trigflow_consistency, trigflow_regression
from distill.optim import EMA, make_optimizer
from distill.recipe import entry, number
from distill.roles import AdapterRole, Roles
from distill.samplers import TrigFlowConfig
from distill.trainer import Batch, Loss, frozen
from fast_diffusers import lora
from fast_diffusers.denoisers import SanaDenoiser
from fast_diffusers.errors import UserError
from fast_diffusers.models import SanaControlNetModel, SanaTransformer2DModel
from fast_diffusers.pipelines import Pipeline, SanaPipeline, SanaSprintPipeline
from fast_diffusers.schedulers import SCMScheduler

STUDENT, DISCRIMINATOR = "student", "discriminator"
DENSE_TIME = 1e-3  # timestep_scale of a prepared SANA, which is told times in [0, 1]


@dataclass(frozen=True)
class StudentConfig(ModelConfig):
    """The teacher, and what of it becomes the student."""

    path: str = entry("sana_digits", doc="pipeline folder (HF diffusers' or Paddle's layout), or a shipped name")
    train: Literal["full", "lora", "controlnet"] = entry(
        "full",
        doc="all weights of a float32 copy told its guidance; an adapter; or a ControlNet of the student at path",
    )
    control_blocks: int = number(7, minimum=1, doc="controlnet: how many blocks it copies")


@dataclass(frozen=True)
class SprintConfig:
    """The objective: scm_weight · L_sCM + adversarial_weight · L_LADD; a weight of 0 leaves a term out.

    A ControlNet can have a third one, see `distill.objectives.trigflow_regression`.
    """

    scm_weight: float = number(1.0, minimum=0, doc="of continuous-time consistency")
    adversarial_weight: float = number(0.5, minimum=0, doc="of the discriminator's opinion; 0: no discriminator")
    regression_weight: float = number(0.0, minimum=0, doc="of a ControlNet's squared error; blurs what is left open")
    sigma_data: float = number(0.5, above=0, doc="standard deviation of latents in TrigFlow's units")
    tau_mean: float = number(
        0.2, doc="of the normal variable whose tangent is exp(τ) / sigma_data: the student's times"
    )
    tau_std: float = number(1.6, above=0, doc="of it")
    guidance_scales: tuple[float, ...] | None = number(
        (4.0, 4.5, 5.0), minimum=0, doc="the student learns these strengths; null: no guidance"
    )
    tangent_warmup: int = number(4000, minimum=0, doc="student updates until the tangent counts in full")
    tangent_constant: float = number(0.1, above=0, doc="c of the tangent's normalisation g / (‖g‖ + c)")
    derivative: Literal["exact", "finite_difference"] = entry("exact", doc="how the student's tangent is computed")
    log_variance_rate: float = number(1.0, minimum=0, doc="factor on the learning rate of the learned weighting")
    taps: tuple[int, ...] | None = entry(None, doc="blocks whose features the heads see; null: all")
    max_time_probability: float = number(0.5, minimum=0, maximum=1, doc="of one-step samples from pure noise")
    renoise_mean: float = number(-0.6, doc="as tau_mean, of what the heads see")
    renoise_std: float = number(1.0, above=0, doc="of it")
    misaligned: bool = entry(True, doc="real images with other prompts are fake, too")

    def __post_init__(self) -> None:
        if self.scm_weight == self.adversarial_weight == self.regression_weight == 0:
            raise ValueError("scm_weight, adversarial_weight and regression_weight are 0: there is nothing to learn")
        for name in ("guidance_scales", "taps"):
            if getattr(self, name) == ():
                raise ValueError(f"{name} is an empty list: give null or at least one")


@dataclass(frozen=True)
class SampleConfig(TrigFlowConfig):
    """How the sample grids of a training run are made; the scheduler of a student's pipeline has the angles."""

    steps: int = number(2, minimum=1, doc="number of steps")
    guidance_scale: float = number(4.5, minimum=0, doc="embedded guidance, where the student is told it")


@dataclass(frozen=True)
class Recipe:
    """All settings of `train_sana_sprint.py`."""

    model: StudentConfig = StudentConfig()
    data: DataConfig = DataConfig()
    lora: LoraConfig = LoraConfig()
    objective: SprintConfig = SprintConfig()
    student_optimizer: OptimizerConfig = OptimizerConfig()
    discriminator_optimizer: OptimizerConfig = OptimizerConfig()
    trainer: TrainerConfig = TrainerConfig()
    sampler: SampleConfig = SampleConfig()


@dataclass(frozen=True)
class Student:
    """What is trained, its teacher, and how that is told its guidance; `pipe` samples the student."""

    pipe: Pipeline
    weights: Mapping[str, paddle.Tensor]
    role: Any
    teacher: Any
    teacher_guidance: Literal["cfg", "embedded"]
    controlnet: SanaControlNetModel | None = None


def adapter_student(recipe: Recipe, pipe: Pipeline) -> Student:
    """A LoRA of the teacher. UserError if it would have to be told its guidance, and the model is not."""
    model, embeds, config = pipe.transformer, pipe.denoiser.embeds_guidance, recipe.lora
    if len(recipe.objective.guidance_scales or ()) > 1 and not embeds:
        raise UserError(
            "this model does not embed its guidance, which an adapter cannot change: "
            "set model.train=full, or objective.guidance_scales to a single one or null"
        )
    lora.inject(model, config.rank, config.alpha, config.targets, name=STUDENT, seed=recipe.trainer.seed)
    role, teacher = (AdapterRole(pipe.denoiser, model, name) for name in (STUDENT, None))
    return Student(pipe, lora.state_dict(model, STUDENT), role, teacher, "embedded" if embeds else "cfg")


def copied_student(recipe: Recipe, pipe: Pipeline) -> Student:
    """All weights of a float32 copy of a SANA, in a pipeline with the teacher's other parts."""
    paddle.seed(recipe.trainer.seed)
    model = student_transformer(pipe.transformer, guided=recipe.objective.guidance_scales is not None)
    if recipe.trainer.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    own, guidance = (
        student_pipeline(pipe, model, recipe.sampler.angles),
        "embedded" if pipe.denoiser.embeds_guidance else "cfg",
    )
    return Student(own, dict(model.named_parameters()), own.denoiser, pipe.denoiser, guidance)


def control_student(recipe: Recipe, pipe: Pipeline) -> Student:
    """A ControlNet of a frozen student. UserError if that is none, or has too few blocks."""
    if not isinstance(pipe.transformer, SanaTransformer2DModel) or not pipe.denoiser.embeds_guidance:
        raise UserError(f"model.train=controlnet takes a SANA-Sprint student, which {recipe.model.path} is not")
    try:
        network = SanaControlNetModel.from_transformer(pipe.transformer, recipe.model.control_blocks)
    except ValueError as error:
        raise UserError(f"model.control_blocks: {error}") from error
    if recipe.trainer.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    role = SanaDenoiser(pipe.transformer, network)
    return Student(pipe, dict(network.named_parameters()), role, pipe.denoiser, "embedded", network)


STUDENTS = {"full": copied_student, "lora": adapter_student, "controlnet": control_student}


class DataTeacher:
    """The teacher of a ControlNet, where no model knows the control: the velocity of the data themselves.

    That of one batch, whatever the state and the time. sCM then is consistency training (arXiv 2410.11081, section 3):
    the velocity is right in the mean, given all that is told. Features are those of the frozen model `denoiser`.
    """

    def __init__(self, denoiser: Any, batch: Batch, draws: Draws):
        self.features = denoiser.features
        self.velocity = draws.normal("noise", batch["latents"].shape) - batch["latents"]

    def __call__(self, x: paddle.Tensor, t: paddle.Tensor, cond: Any, **settings: Any) -> paddle.Tensor:
        return self.velocity


class SanaSprint:
    """The method for `distill.trainer.Trainer`: even steps train the heads, odd steps the student.

    Without an adversarial term every step trains the student. The learned weighting of the consistency loss belongs to
    the student's player.
    """

    def __init__(self, recipe: Recipe, pipe: Pipeline):
        """`pipe`: the teacher's pipeline; its transformer is frozen, and may get an adapter.

        UserError where the model cannot become what the recipe wants.
        """
        self.settings = s = recipe.objective
        seed = recipe.trainer.seed
        if s.regression_weight > 0 and recipe.model.train != "controlnet":
            raise UserError("objective.regression_weight would teach mean images: it is for model.train=controlnet")
        lora.freeze(pipe.transformer)
        self.student = student = STUDENTS[recipe.model.train](recipe, pipe)
        self.log_variance = LogVariance(num_elements(pipe, recipe.data)) if s.scm_weight > 0 else None
        learned = dict(self.log_variance.named_parameters()) if self.log_variance else {}
        learned = {f"log_variance.{path}": parameter for path, parameter in learned.items()}
        self.discriminator = None
        self.buffers: Mapping[str, paddle.Tensor] = {}
        turns, steps = 1, recipe.trainer.steps
        if s.adversarial_weight > 0:
            paddle.seed(seed)
            channels, taps = pipe.denoiser.feature_channels, s.taps or range(pipe.denoiser.num_taps)
            if not all(0 <= tap < pipe.denoiser.num_taps for tap in taps):
                raise UserError(f"objective.taps {list(taps)}: this model has blocks 0 to {pipe.denoiser.num_taps - 1}")
            self.discriminator, turns = LaddDiscriminator(channels, len(taps)), 2
        self.optimizers = {
            STUDENT: make_optimizer(
                {**student.weights, **learned},
                recipe.student_optimizer,
                max(1, steps // turns),
                rates=dict.fromkeys(learned, s.log_variance_rate),
            )
        }
        if self.discriminator is not None:
            heads = dict(self.discriminator.named_parameters())
            self.buffers = dict(self.discriminator.named_buffers())
            config = recipe.discriminator_optimizer
            self.optimizers[DISCRIMINATOR] = make_optimizer(heads, config, (steps + 1) // 2)
        decay = recipe.trainer.ema_decay
        self.averages = {} if decay is None else {STUDENT: EMA(student.weights, decay)}
        self.roles = Roles(student=student.role, teacher=student.teacher, discriminator=self.discriminator)

    def turns(self, step: int) -> Sequence[str]:
        """See `Method`."""
        return [DISCRIMINATOR if self.discriminator is not None and step % 2 == 0 else STUDENT]

    @property
    def tangent_ratio(self) -> float:
        """r, the share of the tangent that counts: from 0 to 1 in the first `tangent_warmup` updates of the student."""
        warmup = self.settings.tangent_warmup
        return min(1.0, self.optimizers[STUDENT].steps / warmup) if warmup else 1.0

    def loss(self, player: str, batch: Batch, draws: Draws) -> Loss:
        """See `Method`."""
        s, roles = self.settings, self.roles
        if self.student.controlnet is not None:
            roles = replace(roles, teacher=DataTeacher(roles.teacher, batch, draws))
        given = roles, batch, draws
        if player == DISCRIMINATOR:
            return trigflow_adversarial(*given, side="discriminator", **self._adversarial_settings())
        terms: list[tuple[float, Loss]] = []
        if s.scm_weight > 0:
            consistency = trigflow_consistency(
                *given,
                tangent_ratio=self.tangent_ratio,
                tangent_constant=s.tangent_constant,
                log_variance=self.log_variance,
                derivative=s.derivative,
                **self._shared_settings(),
            )
            terms.append((s.scm_weight, consistency))
        if s.adversarial_weight > 0:
            with frozen(self.discriminator):
                terms.append((s.adversarial_weight, trigflow_adversarial(*given, **self._adversarial_settings())))
        if s.regression_weight > 0:
            regression = trigflow_regression(
                *given, max_time_probability=s.max_time_probability, **self._shared_settings()
            )
            terms.append((s.regression_weight, regression))
        metrics = {name: value for _, (_, parts) in terms for name, value in parts.items()}
        return sum(weight * loss for weight, (loss, _) in terms), metrics

    def _shared_settings(self) -> dict[str, Any]:
        names = "sigma_data", "tau_mean", "tau_std", "guidance_scales"
        return {name: getattr(self.settings, name) for name in names} | {
            "teacher_guidance": self.student.teacher_guidance
        }

    def _adversarial_settings(self) -> dict[str, Any]:
        names = "taps", "max_time_probability", "renoise_mean", "renoise_std", "misaligned"
        return {name: getattr(self.settings, name) for name in names} | self._shared_settings()


def student_transformer(teacher: paddle.nn.Layer, guided: bool) -> SanaTransformer2DModel:
    """A trainable float32 copy of a SANA; `guided`: it embeds its guidance, and starts as the same function.

    UserError for other families, and for a SANA that has to be prepared for dense times first.
    """
    if not isinstance(teacher, SanaTransformer2DModel):
        raise UserError(f"model.train=full takes a SANA, and this is a {type(teacher).__name__}: set model.train=lora")
    if not guided or teacher.config.guidance_embeds:
        return SanaTransformer2DModel.from_transformer(teacher)
    if abs(teacher.config.timestep_scale / DENSE_TIME - 1) > 1e-6:
        raise UserError(
            f"this SANA is told times up to {1000 * teacher.config.timestep_scale:g}, and a student times up to 1: "
            "prepare it first, with architecture.prepared.path of distill/train_teacher.py"
        )
    return SanaTransformer2DModel.from_transformer(teacher, guidance_embeds=True)


def student_pipeline(
    teacher: Pipeline, transformer: SanaTransformer2DModel, angles: Sequence[float] | None = None
) -> Pipeline:
    """The student's pipeline: the teacher's other components and settings, and the scheduler of SANA-Sprint.

    angles: see `SCMScheduler`.
    """
    cls = SanaSprintPipeline if isinstance(teacher, SanaPipeline) else type(teacher)
    parts: Mapping[str, Any] = {name: getattr(teacher, name, None) for name in cls.component_types}
    settings = {name: teacher.config[name] for name in signature(cls).parameters if name in teacher.config}
    return cls(**settings | parts | {"transformer": transformer, "scheduler": SCMScheduler(angles=angles)})


def num_elements(pipe: Pipeline, data: DataConfig) -> int:
    """Numbers in the latents of one image, D."""
    return pipe.latent_channels * (data.height // pipe.pixels_per_latent) * (data.width // pipe.pixels_per_latent)
