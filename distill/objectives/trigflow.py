"""What the objectives of SANA-Sprint (arXiv 2503.09641) share: random angles, and guidance told or folded in."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import paddle

from distill.draws import Draws
from distill.objectives.phases import Batch, lookup
from fast_diffusers.denoisers import ClassifierFree
from fast_diffusers.transports import LinearPath, flow_time

TeacherGuidance = Literal["cfg", "embedded"]

STEEPEST = 1e4
"""Largest tangent of an angle: in float32 the largest arctangent is above pi/2, where tan t < 0."""


def draw_angle(
    draws: Draws, name: str, rows: int, mean: float, std: float, sigma_data: float, dtype: paddle.dtype
) -> paddle.Tensor:
    """t = arctan(e^τ / sigma_data) < pi/2 with τ ~ N(mean, std²), [rows]. Draw: `name`."""
    tau = draws.normal(name, [rows]).astype(dtype)
    return paddle.atan((paddle.exp(mean + std * tau) / sigma_data).clip(max=STEEPEST))


def one_step_sample(
    student: Any,
    x0: paddle.Tensor,
    cond: Mapping[str, paddle.Tensor],
    guidance: paddle.Tensor | None,
    draws: Draws,
    prefix: str,
    *,
    max_time_probability: float,
    sigma_data: float,
    tau_mean: float,
    tau_std: float,
) -> paddle.Tensor:
    """The student's one-step samples of the noisy data, x − s·v [B, C, H, W], which is TrigFlow's cos t·x_t − sin t·F.

    Rows are at pure noise, t = pi/2, with that probability, else at an angle of `draw_angle`. Draws: `max_time`, `tau`
    and `noise`, after `prefix` and a dot. ValueError for what is not a probability.
    """
    if not 0 <= max_time_probability <= 1:
        raise ValueError(f"max_time_probability must lie in [0, 1], got {max_time_probability}")
    rows, dtype = x0.shape[0], x0.dtype
    at_noise = draws.uniform(f"{prefix}.max_time", [rows]) < max_time_probability
    t = flow_time(draw_angle(draws, f"{prefix}.tau", rows, tau_mean, tau_std, sigma_data, dtype))
    t = paddle.where(at_noise, paddle.ones_like(t), t)
    noisy = LinearPath.interpolate(x0, draws.normal(f"{prefix}.noise", x0.shape).astype(dtype), t)
    velocity = student(noisy, t, cond, target_t=paddle.zeros_like(t), guidance=guidance)
    return LinearPath.x0_from_velocity(noisy, velocity.astype(dtype), t)


@dataclass(frozen=True)
class Guided:
    """A teacher under guidance, and what everybody is told: strengths [B], or None where there is no input for them.

    teacher: a denoiser; called with `strength` it gives the guided velocity. student: told to the student. features:
    told to the teacher where its features are read, which is without classifier-free guidance.
    """

    teacher: Any
    strength: paddle.Tensor | None
    student: paddle.Tensor | None
    features: paddle.Tensor | None


def draw_guidance(
    roles: Any,
    batch: Batch,
    draws: Draws,
    scales: Sequence[float] | None,
    teacher_guidance: TeacherGuidance,
    dtype: paddle.dtype,
) -> Guided:
    """A strength w for every row, uniform among `scales`, which the student learns. Draw: `guidance`.

    The teacher is guided classifier-free, F_u + w·(F_c − F_u) with F_u at batch["null_cond"] ("cfg": one call for
    both), or embeds w itself ("embedded"). A student that embeds no guidance learns a single scale. Without scales
    everybody is told batch["guidance"], if there is one.

    Raises:
        ValueError: an unknown way, no scale, several for a student that cannot tell them apart, or no null condition.
    """
    if teacher_guidance not in ("cfg", "embedded"):
        raise ValueError(f"teacher_guidance is 'cfg' or 'embedded', not {teacher_guidance!r}")
    if scales is None:
        told = batch.get("guidance")
        return Guided(roles.teacher, told, told, told)
    if not scales:
        raise ValueError("guidance_scales is empty: give at least one, or None for no guidance")
    embeds = getattr(roles.student, "embeds_guidance", True)
    if not embeds and len(scales) > 1:
        raise ValueError(f"the student embeds no guidance: it can learn one of {tuple(scales)}, not all")
    index = draws.integers("guidance", 0, len(scales), [batch["latents"].shape[0]])
    strength = lookup(np.array(scales), index).astype(dtype)
    student = strength if embeds else None
    if teacher_guidance == "embedded":
        return Guided(roles.teacher, strength, student, strength)
    if batch.get("null_cond") is None:
        raise ValueError("teacher_guidance 'cfg' needs batch['null_cond'], the conditioning of the empty prompt")
    return Guided(ClassifierFree(roles.teacher, batch["null_cond"]), strength, student, None)
