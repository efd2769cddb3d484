"""Distribution matching distillation inside a phase, and the fake score it needs."""

from typing import Any

import paddle

from distill.draws import Draws
from distill.objectives.phases import (
    Batch,
    Jump,
    draw_cell_in_phase,
    euler_move,
    lookup,
    mean_square,
    renoise_from_phase_end,
    student_jump,
    teacher_velocity,
)
from fast_diffusers.time_grids import PhaseGrid
from fast_diffusers.transports import expand_time

EPSILON = 1e-5


def distribution_matching(
    roles: Any,
    batch: Batch,
    draws: Draws,
    *,
    grid: PhaseGrid,
    cfg_weight: float = 0.0,
    reference_compat: bool = False,
    jump: Jump | None = None,
) -> tuple[paddle.Tensor, dict[str, paddle.Tensor]]:
    """L_dmd = mean(x̂ − sg(x̂ − g))², whose gradient moves x̂ along the difference of the fake and the real score.

    x̂ is re-noised to a random σ_d of its phase; with x̂_v = x_d + (σ_end − σ_d)·v the point at the phase's end that a
    velocity predicts, g = (x̂_fake − x̂_real) / mean|x̂ − x̂_real| (Yin et al., arXiv 2405.14867, eq. 7, with both
    predictions at the phase's end). `reference_compat` divides v_real − v_fake by mean|x̂ − v_real| instead, which
    compares a latent with a velocity. Roles: student, teacher, fake. Draws: `cell`, `noise`, `dmd.cell`, `dmd.noise`.
    """
    jump = jump or student_jump(roles, batch, draws, grid)
    with paddle.no_grad():
        prediction = jump.prediction.detach()
        sigma = lookup(grid.sigma_prev, draw_cell_in_phase("dmd.cell", jump, draws, grid))
        noise = draws.normal("dmd.noise", prediction.shape)
        noisy = renoise_from_phase_end(prediction, jump, sigma, noise, reference_compat)
        guidance = batch.get("guidance")
        real = teacher_velocity(roles.teacher, noisy, sigma, batch, cfg_weight).astype(prediction.dtype)
        fake = roles.fake(noisy, sigma, batch["cond"], guidance=guidance).astype(prediction.dtype)
        axes = list(range(1, prediction.ndim))
        if reference_compat:
            direction, error = real - fake, prediction - real
        else:
            direction = expand_time(sigma - jump.sigma_end, real) * (real - fake)
            error = prediction - euler_move(noisy, real, sigma, jump.sigma_end)
        gradient = direction / (error.abs().mean(axes, keepdim=True) + EPSILON)
        goal = prediction - gradient
    loss = mean_square(jump.prediction - goal)
    return loss, {"distribution_matching": loss.detach()}


def fake_score(
    roles: Any, batch: Batch, draws: Draws, *, grid: PhaseGrid, jump: Jump | None = None
) -> tuple[paddle.Tensor, dict[str, paddle.Tensor]]:
    """Denoising score matching that makes `roles.fake` the velocity of the student's own samples.

    x̂ lies at σ_end, not at 0. With x_d = s·x̂ + k·ξ, s = (1 − σ_d)/(1 − σ_end), k² = σ_d² − s²·σ_end², the score of the
    re-noised samples is −ξ/k, hence the velocity (σ_d·ξ/k − x_d)/(1 − σ_d), which simplifies to
    ξ·(σ_d + (1 − σ_d)·σ_end²/(1 − σ_end)²)/k − x̂/(1 − σ_end) and is finite at σ_d = 1. The error is weighted by k so
    that σ_d = σ_end, where nothing is to be learned, costs nothing. Without phases (σ_end = 0) this is σ_d times the
    flow-matching error. Draws `cell`, `noise`, `fake.cell`, `fake.noise`.
    """
    if jump is None:
        with paddle.no_grad():
            jump = student_jump(roles, batch, draws, grid)
    prediction = jump.prediction.detach()
    sigma = lookup(grid.sigma_prev, draw_cell_in_phase("fake.cell", jump, draws, grid))
    noise = draws.normal("fake.noise", prediction.shape).astype(prediction.dtype)
    noisy = renoise_from_phase_end(prediction, jump, sigma, noise, reference_compat=False)
    velocity = roles.fake(noisy, sigma, batch["cond"], guidance=batch.get("guidance")).astype(prediction.dtype)
    end = expand_time(jump.sigma_end, prediction)
    at = expand_time(sigma, prediction)
    scale = (1 - at) / (1 - end)
    k = paddle.sqrt((at * at - scale * scale * end * end).clip(min=0))
    noise_gain = at + (1 - at) * end * end / ((1 - end) * (1 - end))
    loss = mean_square(k * velocity - (noise_gain * noise - k * prediction / (1 - end)))
    return loss, {"fake_score": loss.detach()}
