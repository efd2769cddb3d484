"""Continuous-time consistency distillation (sCM) of flow models on TrigFlow's path."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import paddle

from distill.draws import Draws
from distill.objectives.phases import Batch
from distill.objectives.trigflow import TeacherGuidance, draw_angle, draw_guidance
from fast_diffusers.forward_ad import jvp
from fast_diffusers.models.layers import at_least_float32
from fast_diffusers.transports import TrigFlow, expand_time, flow_to_trigflow


def trigflow_consistency(
    roles: Any,
    batch: Batch,
    draws: Draws,
    *,
    sigma_data: float = 0.5,
    tau_mean: float = 0.2,
    tau_std: float = 1.6,
    guidance_scales: Sequence[float] | None = (4.0, 4.5, 5.0),
    teacher_guidance: TeacherGuidance = "cfg",
    tangent_ratio: float = 1.0,
    tangent_constant: float = 0.1,
    log_variance: Callable[[paddle.Tensor], paddle.Tensor] | None = None,
    derivative: Literal["exact", "finite_difference"] = "exact",
) -> tuple[paddle.Tensor, dict[str, paddle.Tensor]]:
    """L_sCM = mean[exp(−ℓ)·(F − sg(F) − g/(‖g‖ + c))² / (sigma_data·tan t) + ℓ]; Lu & Song, arXiv 2410.11081, eq. 8
    and algorithm 1, as SANA-Sprint (arXiv 2503.09641, section 3) uses it.

    F is the student as a TrigFlow model, its consistency function f(x_t, t) = cos t·x_t − sin t·sigma_data·F. At
    `tangent_ratio` r = 1 the tangent g is cos t·df/dt along the teacher's ODE; f is consistent where it vanishes:
    g = −cos²t·(sigma_data·sg(F) − dx/dt) − r·(cos t·sin t·x_t + sigma_data·J), with J = cos t·sin t·dF/dt. J is one
    evaluation with a forward derivative, whose directions hold the factor, which keeps dF/dt finite in low precision;
    prompts, masks and guidance are constants of it. The norm ‖g‖ is that of a row.

    Uses roles student and teacher; draws `tau`, `noise` and, with `guidance_scales`, `guidance`, see `draw_guidance`.

    Args:
        roles, batch, draws: see `distill.objectives`; latents are the teacher's, x_t is sigma_data·latents at t = 0.
        sigma_data, tau_mean, tau_std: angles are arctan(e^τ / sigma_data), τ ~ N(tau_mean, tau_std²).
        guidance_scales, teacher_guidance: see `draw_guidance`.
        tangent_ratio: r in [0, 1], the warm-up of the tangent's unstable part.
        tangent_constant: c.
        log_variance: ℓ of angles [B], as `distill.log_variance.LogVariance`; None is 0, with which the loss is of the
            order of 1 / (number of elements of a row).
        derivative: how J is computed; see `fast_diffusers.forward_ad.jvp`.

    Returns:
        The loss, float32 (float64 from float64 latents), and metrics: `consistency`, the loss; `consistency_error`,
        the mean of the squares without weights; `tangent_norm`, the mean of ‖g‖; and `log_variance`, of ℓ.
    """
    if not 0 <= tangent_ratio <= 1:
        raise ValueError(f"tangent_ratio must lie in [0, 1], got {tangent_ratio}")
    if derivative not in ("exact", "finite_difference"):
        raise ValueError(f"derivative is 'exact' or 'finite_difference', not {derivative!r}")
    x0, cond = at_least_float32(batch["latents"]), batch["cond"]
    angle = draw_angle(draws, "tau", x0.shape[0], tau_mean, tau_std, sigma_data, x0.dtype)
    x_hat = TrigFlow().interpolate(x0, draws.normal("noise", x0.shape).astype(x0.dtype), angle)
    guided = draw_guidance(roles, batch, draws, guidance_scales, teacher_guidance, x0.dtype)
    student, teacher = (flow_to_trigflow(model, sigma_data) for model in (roles.student, guided.teacher))
    data_time = paddle.zeros_like(angle)

    def evaluate(x_hat: paddle.Tensor, angle: paddle.Tensor) -> paddle.Tensor:
        return student(x_hat, angle, cond, target_t=data_time, guidance=guided.student)

    with paddle.no_grad():
        slope = teacher(x_hat, angle, cond, guidance=guided.strength)  # of x_hat: dx/dt = sigma_data * slope
        cos, sin = (expand_time(each, x_hat) for each in (paddle.cos(angle), paddle.sin(angle)))
        _, change = jvp(
            evaluate, [x_hat, angle], [cos * sin * slope, paddle.cos(angle) * paddle.sin(angle)], mode=derivative
        )

    prediction = evaluate(x_hat, angle)  # after the derivative, whose memory is free again
    with paddle.no_grad():
        tangent = cos * cos * (prediction - slope) + tangent_ratio * (cos * sin * x_hat + change)
        tangent = -sigma_data * tangent
        norm = tangent.flatten(1).norm(axis=1)
        tangent = tangent / expand_time(norm + tangent_constant, tangent)
    error = (prediction - prediction.detach() - tangent).square().flatten(1).mean(1)
    loss, metrics = error / (sigma_data * paddle.tan(angle)), {}
    if log_variance is not None:
        spread = log_variance(angle).astype(loss.dtype)
        loss, metrics = loss * paddle.exp(-spread) + spread, {"log_variance": spread.mean()}
    loss = loss.mean()
    metrics |= {"consistency": loss, "consistency_error": error.mean(), "tangent_norm": norm.mean()}
    return loss, {name: value.detach() for name, value in metrics.items()}
