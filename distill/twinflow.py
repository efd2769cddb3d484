"""RCGM and TwinFlow: an any-step student of a flow model, as a LoRA or by training all weights."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from distill.config import DataConfig, LoraConfig, ModelConfig, OptimizerConfig, TrainerConfig
from distill.draws import Draws
from distill.objectives import rcgm, twinflow
from distill.objectives.rcgm import AnyStep
from distill.optim import make_optimizer
from distill.recipe import entry, number
from distill.roles import AdapterRole, Network, Roles, adapter_network, average_into, whole_network
from distill.samplers import SampleConfig
from distill.trainer import Batch, Loss
from fast_diffusers import lora
from fast_diffusers.pipelines import Pipeline

STUDENT, AVERAGE = "student", "average"


@dataclass(frozen=True)
class StudentConfig(ModelConfig):
    """The teacher, and what of it becomes the student."""

    train: Literal["lora", "full"] = entry("lora", doc="an adapter, or all weights of a copy")
    target_time: Literal["shortcut", "auxiliary"] = entry(
        "shortcut", doc="how the model is told it: t − target_t/2 in place of t, or by an embedding of its own"
    )


@dataclass(frozen=True)
class Weights:
    """Weights of the terms in form whole; that of rectify is objective.rectify_weight."""

    base: float = number(1.0, minimum=0, doc="RCGM on data")
    adv: float = number(1.0, minimum=0, doc="the student's own samples at negative times")
    velocity: float = number(0.0, minimum=0, doc="the supervision at target_t = t")
    e2e: float = number(0.0, minimum=0, doc="RCGM from t = 1 to 0")


@dataclass(frozen=True)
class Parts:
    """Shares of the batch in form split."""

    e2e: float = number(1.0, minimum=0, doc="from t = 1 to 0")
    mul: float = number(1.0, minimum=0, doc="a short way")
    any: float = number(1.0, minimum=0, doc="any way")
    adv: float = number(1.0, minimum=0, doc="the student's own samples at negative times")
    one: float = number(0.0, minimum=0, doc="from any t to 0")

    def __post_init__(self) -> None:
        if not any(asdict(self).values()):
            raise ValueError("every part of the batch has weight 0")


@dataclass(frozen=True)
class TwinFlowConfig:
    """The objective; see `distill.objectives.rcgm.AnyStep` and `distill.objectives.twinflow`."""

    method: Literal["twinflow", "rcgm"] = entry("twinflow", doc="rcgm: the any-step loss alone")
    form: Literal["whole", "split"] = entry("split", doc="of twinflow: all terms on all rows, or one part for each row")
    weights: Weights = Weights()
    parts: Parts = Parts()
    rectify_weight: float = number(0.5, minimum=0, doc="of matching the two flows")
    real_score: Literal["student", "teacher"] = entry("student", doc="whose flow stands for the data in rectify")
    reference: Literal["average", "student", "teacher"] = entry(
        "average", doc="the reference network; average: that of trainer.ema_decay"
    )
    order: int = number(1, minimum=1, doc="N, Euler steps of the reference network")
    consistency_ratio: float = number(1.0, minimum=0, maximum=1, doc="how far off the target time may lie")
    delta: float = number(0.01, above=0, below=1, doc="length of the supervised first piece of the way")
    clamp: float | None = number(1.0, above=0, doc="of corrections, for each element; null: unbounded")
    times: tuple[float, float, float] = number((1.0, 1.0, 1.0), above=0, doc="(a, b, c): t is c·Beta(a, b)")
    loss: Literal["barron", "l2"] = entry("barron", doc="l2, or with adaptive weights")
    time_weighting: bool = entry(True, doc="short ways weigh more")
    velocity_target: Literal["data", "teacher"] = entry(
        "data", doc="what supervises the first piece; teacher: where guidance is embedded, which data do not show"
    )
    enhanced_ratio: float = number(0.0, minimum=0, doc="of classifier-free guidance folded into the supervision")
    enhanced_range: tuple[float, float] = number((0.0, 1.0), minimum=0, maximum=1, doc="the times it is for")
    image_free: bool = entry(False, doc="the student's own samples in place of data")
    guidance_scale: float = number(3.5, minimum=0, doc="embedded guidance given to student and teacher")

    def __post_init__(self) -> None:
        if self.times[2] > 1:
            raise ValueError(f"times must not exceed 1, c is {self.times[2]}")
        self.any_step()

    def any_step(self) -> dict[str, Any]:
        """The settings of `AnyStep`."""
        settings = {field.name: getattr(self, field.name) for field in fields(AnyStep)}
        AnyStep(**settings)  # which checks them
        return settings

    @property
    def needs_teacher(self) -> bool:
        """Whether anything is asked of the teacher."""
        asked = {self.reference, self.velocity_target} | ({self.real_score} if self.method == "twinflow" else set())
        return "teacher" in asked


@dataclass(frozen=True)
class Recipe:
    """All settings of `train_twinflow.py`."""

    model: StudentConfig = StudentConfig()
    data: DataConfig = DataConfig()
    lora: LoraConfig = LoraConfig()
    objective: TwinFlowConfig = TwinFlowConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    trainer: TrainerConfig = TrainerConfig(ema_decay=0.99)
    sampler: SampleConfig = SampleConfig()

    def __post_init__(self) -> None:
        if self.objective.reference == "average" and self.trainer.ema_decay is None:
            raise ValueError("objective.reference is average: set trainer.ema_decay, or reference student or teacher")
        if self.model.train == "full" and self.trainer.dtype != "float32":
            raise ValueError("model.train is full: trained weights are float32, so trainer.dtype must be")


class TwinFlow:
    """The method for `distill.trainer.Trainer`: one player, the student.

    `student` and `average` (None without trainer.ema_decay) are adapters of `pipe`, or all of it and of a copy,
    `average_pipe`.
    """

    def __init__(self, recipe: Recipe, pipe: Pipeline, copy: Callable[[], Pipeline]):
        """`pipe`: the teacher's pipeline, whose transformer is trained. `copy`: gives another such pipeline."""
        self.settings = recipe.objective
        mode, seed, decay = recipe.model.target_time, recipe.trainer.seed, recipe.trainer.ema_decay
        denoiser, model = pipe.denoiser, pipe.transformer
        self.pipe, self.trains_adapter = pipe, recipe.model.train == "lora"
        self.average: Network | None = None
        self.average_pipe: Pipeline | None = None
        teacher = None
        if self.trains_adapter:
            lora.freeze(model)
            if decay is not None:
                self.average = adapter_network(denoiser, model, AVERAGE, recipe.lora, mode, seed)
            self.student = adapter_network(denoiser, model, STUDENT, recipe.lora, mode, seed)
            teacher = AdapterRole(denoiser, model, None)
        else:
            if self.settings.needs_teacher:
                teacher = _frozen(copy()).denoiser
            if decay is not None:
                self.average_pipe = _frozen(copy())
                self.average = whole_network(self.average_pipe.denoiser, self.average_pipe.transformer, mode, seed)
            self.student = whole_network(denoiser, model, mode, seed)
        optimizer = make_optimizer(self.student.parameters, recipe.optimizer, recipe.trainer.steps)
        self.optimizers = {STUDENT: optimizer}
        self.averages = {}
        if self.average is not None:
            self.averages[STUDENT] = average_into(self.average, self.student, decay)
        references = {"average": self.average, "student": self.student}
        reference = references.get(self.settings.reference)
        self.roles = Roles(self.student.role, teacher, teacher if reference is None else reference.role)

    def turns(self, step: int) -> Sequence[str]:
        """See `Method`."""
        return [STUDENT]

    def loss(self, player: str, batch: Batch, draws: Draws) -> Loss:
        """See `Method`."""
        s = self.settings
        if s.method == "rcgm":
            return rcgm(self.roles, batch, draws, **s.any_step())
        if s.form == "split":
            shares = {"parts": asdict(s.parts), "rectify_weight": s.rectify_weight}
        else:
            shares = {"weights": asdict(s.weights) | {"rectify": s.rectify_weight}}
        return twinflow(self.roles, batch, draws, form=s.form, real_score=s.real_score, **shares, **s.any_step())


def _frozen(pipe: Pipeline) -> Pipeline:
    lora.freeze(pipe.transformer)
    return pipe
