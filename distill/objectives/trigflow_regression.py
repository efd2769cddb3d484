"""Regression of one-step samples on the data, for students that are told nearly all of them."""

from collections.abc import Sequence
from typing import Any

import paddle

from distill.draws import Draws
from distill.objectives.phases import Batch, mean_square
from distill.objectives.trigflow import TeacherGuidance, draw_guidance, one_step_sample
from fast_diffusers.models.layers import at_least_float32


def trigflow_regression(
    roles: Any,
    batch: Batch,
    draws: Draws,
    *,
    max_time_probability: float = 0.5,
    sigma_data: float = 0.5,
    tau_mean: float = 0.2,
    tau_std: float = 1.6,
    guidance_scales: Sequence[float] | None = (4.0, 4.5, 5.0),
    teacher_guidance: TeacherGuidance = "embedded",
) -> tuple[paddle.Tensor, dict[str, paddle.Tensor]]:
    """E‖x̂0(x_t, t, c) − x0‖² with the student's one-step sample x̂0 = x − s·v: flow matching in units of the data.

    Its minimum is the mean of the data given the noisy ones and all of the conditioning: a sharp image where a control
    image decides nearly everything, even at pure noise, and a blurred one where much is left open. A student of prompts
    alone must not learn this.

    Uses role student. Draws: `data.tau`, `data.max_time`, `data.noise` and, with `guidance_scales`, `guidance`. The
    arguments and errors are those of `trigflow_adversarial`; the metric is `regression`.
    """
    x0 = at_least_float32(batch["latents"])
    guided = draw_guidance(roles, batch, draws, guidance_scales, teacher_guidance, x0.dtype)
    sample = one_step_sample(
        roles.student,
        x0,
        batch["cond"],
        guided.student,
        draws,
        "data",
        max_time_probability=max_time_probability,
        sigma_data=sigma_data,
        tau_mean=tau_mean,
        tau_std=tau_std,
    )
    loss = mean_square(sample - x0)
    return loss, {"regression": loss.detach()}
