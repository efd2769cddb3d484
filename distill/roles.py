"""Who plays which part in an objective: student, teacher, target, fake score, discriminator.

A role is a Denoiser. Where one network plays several parts, a role switches the network's adapters for the time of
the call: the student has its adapter on, the teacher none.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import paddle
from paddle import nn

from distill.config import LoraConfig
from distill.optim import EMA
from fast_diffusers import lora
from fast_diffusers.target_time import Mode, TargetTime, attach


class AdapterRole:
    """A Denoiser that evaluates `denoiser` with the named adapters of `model` active (None: the base model)."""

    def __init__(self, denoiser: Any, model: nn.Layer, adapter: str | Sequence[str] | None):
        self.denoiser, self.model, self.adapter = denoiser, model, adapter

    @property
    def takes_target_time(self) -> bool:
        """Whether the target time makes a difference to it."""
        with lora.active(self.model, self.adapter):
            return getattr(self.denoiser, "takes_target_time", False)

    @property
    def embeds_guidance(self) -> bool:
        """Whether it takes a guidance strength."""
        return self.denoiser.embeds_guidance

    def __call__(self, x: paddle.Tensor, t: paddle.Tensor, cond: Any, **settings: Any) -> paddle.Tensor:
        with lora.active(self.model, self.adapter):
            return self.denoiser(x, t, cond, **settings)

    def features(self, x: paddle.Tensor, t: paddle.Tensor, cond: Any, taps: Any = None, **settings: Any) -> list:
        with lora.active(self.model, self.adapter):
            return self.denoiser.features(x, t, cond, taps, **settings)


@dataclass(frozen=True)
class Roles:
    """The parts of an objective. Those that it does not ask for may stay None.

    student, teacher, target, fake: Denoisers. discriminator: maps a list of features [B, D, h, w] to a list of logits.
    """

    student: Any
    teacher: Any
    target: Any = None
    fake: Any = None
    discriminator: Any = None


def adapter_roles(
    denoiser: Any, model: nn.Layer, student: str, fake: str | None = None, discriminator: nn.Layer | None = None
) -> Roles:
    """One network in every role: student = target = adapter `student`, teacher = no adapter.

    The fake score is the adapter `fake`, or the student itself where none is given, as published for FLUX-Lightning.
    """
    student_role = AdapterRole(denoiser, model, student)
    return Roles(
        student=student_role,
        teacher=AdapterRole(denoiser, model, None),
        target=student_role,
        fake=AdapterRole(denoiser, model, fake) if fake else student_role,
        discriminator=discriminator,
    )


@dataclass(frozen=True)
class Network:
    """A role with weights of its own, by path, and the way in which it is told the target time."""

    role: Any
    parameters: Mapping[str, paddle.Tensor]
    target_time: TargetTime


def adapter_network(denoiser: Any, model: nn.Layer, name: str, config: LoraConfig, mode: Mode, seed: int) -> Network:
    """A new adapter of `model`. Two of the same seed start equal, with the same paths."""
    lora.inject(model, config.rank, config.alpha, config.targets, name=name, seed=seed)
    paddle.seed(seed)
    way = TargetTime.new(mode, model)
    attach(model, way, name)
    return Network(AdapterRole(way.wrap(denoiser), model, name), lora.state_dict(model, name) | _of_embedding(way), way)


def whole_network(denoiser: Any, model: nn.Layer, mode: Mode, seed: int) -> Network:
    """All weights of `model`."""
    paddle.seed(seed)
    way = TargetTime.new(mode, model)
    attach(model, way)
    return Network(way.wrap(denoiser), dict(model.named_parameters()) | _of_embedding(way), way)


def _of_embedding(way: TargetTime) -> dict[str, paddle.Tensor]:
    named = way.embedding.named_parameters() if way.embedding is not None else ()
    return {f"target_time.{path}": parameter for path, parameter in named}


def average_into(average: Network, student: Network, decay: float) -> EMA:
    """The running average of the student's weights, kept in those of `average`, which learns nothing else."""
    for parameter in average.parameters.values():
        parameter.stop_gradient = True
    return EMA(student.parameters, decay, into=average.parameters)
