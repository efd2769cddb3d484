"""Who plays which part in an objective: student, teacher, target, fake score, discriminator.

A role is a Denoiser. Where one network plays several parts, a role switches the network's adapters for the time of
the call: the student has its adapter on, the teacher none.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import paddle
from paddle import nn

from fast_diffusers import lora


class AdapterRole:
    """A Denoiser that evaluates `denoiser` with the named adapters of `model` active (None: the base model)."""

    def __init__(self, denoiser: Any, model: nn.Layer, adapter: str | Sequence[str] | None):
        self.denoiser, self.model, self.adapter = denoiser, model, adapter

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
