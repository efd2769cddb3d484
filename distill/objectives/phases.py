"""What the objectives of a phased student share: its jump to the end of a phase, and re-noising from there."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle

from distill.draws import Draws
from fast_diffusers.time_grids import PhaseGrid
from fast_diffusers.transports import LinearPath, expand_time

Batch = Mapping[str, Any]


def lookup(table: np.ndarray, index: paddle.Tensor) -> paddle.Tensor:
    """Rows of a small host table at device indices [B], without a synchronisation."""
    return paddle.to_tensor(table)[index]


@dataclass(frozen=True)
class Jump:
    """The student's one-step prediction of the end of a phase (phased consistency models, arXiv 2405.18407).

    cell [B] int64: the solver cell n. noisy [B, C, H, W]: x_n at `sigma` [B]. prediction [B, C, H, W]:
    x̂ = x_n + (σ_end − σ_n)·v_student(x_n, σ_n), at `sigma_end` [B], with gradient unless made under no_grad.
    """

    cell: paddle.Tensor
    noisy: paddle.Tensor
    sigma: paddle.Tensor
    sigma_end: paddle.Tensor
    prediction: paddle.Tensor


def euler_move(x: paddle.Tensor, velocity: paddle.Tensor, t: paddle.Tensor, target_t: paddle.Tensor) -> paddle.Tensor:
    """x + (target_t − t)·velocity for times [B]."""
    return x + expand_time(target_t - t, x) * velocity.astype(x.dtype)


def student_jump(roles: Any, batch: Batch, draws: Draws, grid: PhaseGrid) -> Jump:
    """Noise the data to a random cell of the solver grid and let the student jump to the end of its phase.

    Draws: `cell` (uniform over the grid's cells) and `noise`.
    """
    latents = batch["latents"]
    size = [latents.shape[0]]
    cell = draws.integers("cell", 0, grid.num_cells, size)
    noise = draws.normal("noise", latents.shape).astype(latents.dtype)
    sigma, sigma_end = lookup(grid.sigma, cell), lookup(grid.sigma_end, cell)
    noisy = LinearPath.interpolate(latents, noise, sigma)
    velocity = roles.student(noisy, sigma, batch["cond"], target_t=sigma_end, guidance=batch.get("guidance"))
    return Jump(cell, noisy, sigma, sigma_end, euler_move(noisy, velocity, sigma, sigma_end))


def teacher_velocity(
    teacher: Any, x: paddle.Tensor, t: paddle.Tensor, batch: Batch, cfg_weight: float
) -> paddle.Tensor:
    """The teacher's velocity, with true classifier-free guidance v_c + w·(v_c − v_u) where w ≠ 0."""
    velocity = teacher(x, t, batch["cond"], guidance=batch.get("guidance"))
    if cfg_weight == 0:
        return velocity
    if batch.get("null_cond") is None:
        raise ValueError("cfg_weight needs batch['null_cond'], the conditioning of the empty prompt")
    return velocity + cfg_weight * (velocity - teacher(x, t, batch["null_cond"], guidance=batch.get("guidance")))


def draw_cell_in_phase(name: str, jump: Jump, draws: Draws, grid: PhaseGrid) -> paddle.Tensor:
    """A cell [B], uniform over the phase that the jump went through."""
    start, stop = lookup(grid.phase_start, jump.cell), lookup(grid.phase_stop, jump.cell)
    return draws.integers(name, start.astype("int64"), stop.astype("int64"), jump.cell.shape)


def renoise_from_phase_end(
    x: paddle.Tensor, jump: Jump, sigma: paddle.Tensor, noise: paddle.Tensor, reference_compat: bool
) -> paddle.Tensor:
    """Carry x from the end of the phase back up to `sigma` [B] with fresh noise.

    The variance is exact unless `reference_compat`, which under-noises as the published training script does.
    """
    move = LinearPath.renoise_published if reference_compat else LinearPath.renoise
    return move(x, jump.sigma_end, sigma, noise.astype(x.dtype))


def pseudo_huber(difference: paddle.Tensor, c: float) -> paddle.Tensor:
    """Mean of sqrt(d² + c²) − c in at least float32 (Song & Dhariwal, arXiv 2310.14189)."""
    wide = difference if difference.dtype == paddle.float64 else difference.astype("float32")
    return (paddle.sqrt(wide * wide + c * c) - c).mean()


def mean_square(difference: paddle.Tensor) -> paddle.Tensor:
    """Mean of d² in at least float32."""
    wide = difference if difference.dtype == paddle.float64 else difference.astype("float32")
    return (wide * wide).mean()
