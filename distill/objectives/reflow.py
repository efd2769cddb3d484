"""Reflow of the student's own samples inside a phase."""

from typing import Any

import paddle

from distill.draws import Draws
from distill.objectives.phases import (
    Batch,
    Jump,
    draw_cell_in_phase,
    euler_move,
    lookup,
    pseudo_huber,
    renoise_from_phase_end,
    student_jump,
)
from fast_diffusers.time_grids import PhaseGrid


def reflow(
    roles: Any,
    batch: Batch,
    draws: Draws,
    *,
    grid: PhaseGrid,
    huber_c: float = 1e-3,
    reference_compat: bool = False,
    jump: Jump | None = None,
) -> tuple[paddle.Tensor, dict[str, paddle.Tensor]]:
    """L_reflow = d(u − sg x̂): from a re-noised x̂ the student must jump back to x̂.

    u = x_r + (σ_end − σ_r)·v_student(x_r, σ_r), where x_r is x̂ carried up to a random σ_r = sigma_prev of its phase.
    `reference_compat` takes the step length from the next cell up (sigma instead of sigma_prev). Draws `cell`, `noise`,
    `reflow.cell`, `reflow.noise`.
    """
    if jump is None:
        with paddle.no_grad():
            jump = student_jump(roles, batch, draws, grid)
    goal = jump.prediction.detach()
    cell = draw_cell_in_phase("reflow.cell", jump, draws, grid)
    sigma = lookup(grid.sigma_prev, cell)
    noisy = renoise_from_phase_end(goal, jump, sigma, draws.normal("reflow.noise", goal.shape), reference_compat)
    velocity = roles.student(noisy, sigma, batch["cond"], target_t=jump.sigma_end, guidance=batch.get("guidance"))
    start = lookup(grid.sigma, cell) if reference_compat else sigma
    loss = pseudo_huber(euler_move(noisy, velocity, start, jump.sigma_end) - goal, huber_c)
    return loss, {"reflow": loss.detach()}
