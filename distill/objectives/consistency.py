"""Phased consistency distillation."""

from typing import Any

import paddle

from distill.draws import Draws
from distill.objectives.phases import (
    Batch,
    Jump,
    euler_move,
    lookup,
    mean_square,
    pseudo_huber,
    student_jump,
    teacher_velocity,
)
from fast_diffusers.time_grids import PhaseGrid


@paddle.no_grad()
def consistency_target(
    roles: Any, batch: Batch, jump: Jump, grid: PhaseGrid, *, cfg_weight: float = 0.0
) -> paddle.Tensor:
    """y: one Euler cell of the teacher from x_n, then the target network's jump to the end of the phase, no gradient.

    y = x' + (σ_end − σ')·v_target(x', σ'), x' = x_n + (σ' − σ_n)·v_teacher(x_n, σ_n), σ' = sigma_prev of the cell.
    """
    sigma_prev = lookup(grid.sigma_prev, jump.cell)
    noisy = jump.noisy.detach()
    velocity = teacher_velocity(roles.teacher, noisy, jump.sigma, batch, cfg_weight)
    solved = euler_move(noisy, velocity, jump.sigma, sigma_prev)
    velocity = roles.target(solved, sigma_prev, batch["cond"], target_t=jump.sigma_end, guidance=batch.get("guidance"))
    return euler_move(solved, velocity, sigma_prev, jump.sigma_end)


def phased_consistency(
    roles: Any,
    batch: Batch,
    draws: Draws,
    *,
    grid: PhaseGrid,
    distance: str = "huber",
    huber_c: float = 1e-3,
    cfg_weight: float = 0.0,
    jump: Jump | None = None,
    target: paddle.Tensor | None = None,
) -> tuple[paddle.Tensor, dict[str, paddle.Tensor]]:
    """L_cm = d(x̂ − y): jumping from x_n, and from one teacher step below it, must end at the same point.

    Phased consistency models, arXiv 2405.18407, algorithm 1. Uses roles student, teacher and target; draws `cell` and
    `noise`. `distance` is "huber" (sqrt(d² + c²) − c) or "l2". `jump` and `target` reuse what another objective made.
    """
    jump = jump or student_jump(roles, batch, draws, grid)
    if target is None:
        target = consistency_target(roles, batch, jump, grid, cfg_weight=cfg_weight)
    difference = jump.prediction - target
    if distance == "huber":
        loss = pseudo_huber(difference, huber_c)
    elif distance == "l2":
        loss = mean_square(difference)
    else:
        raise ValueError(f"distance is 'huber' or 'l2', not {distance!r}")
    return loss, {"consistency": loss.detach()}
