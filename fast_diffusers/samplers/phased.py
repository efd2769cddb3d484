"""Sampling of phased consistency models (PCM, arXiv 2405.18407) along the student's own phase boundaries."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from paddle import Tensor

from fast_diffusers.random import AnyGenerator, noise_source
from fast_diffusers.samplers.euler import euler_step
from fast_diffusers.samplers.loop import Callback, Velocity, check_steps, run
from fast_diffusers.time_grids import PhaseGrid


def phased_sigmas(steps: int, grid: PhaseGrid) -> np.ndarray:
    """Noise levels to visit with a student trained on `grid`, float32 [steps + 1], from 1 to 0.

    With M phases, N cells and b_0 < ... < b_{M-1} the phase boundaries:

    - steps = M: 1, b_{M-1}, ..., b_1, 0: one step a phase, exactly the jumps that were trained (b_0, the lower end of
      the lowest phase, is close to 0 and replaced by it);
    - steps < M: entries floor(i M / steps), i = 0 .. steps - 1, of 1, b_{M-1}, ..., b_1, then 0: some steps cross a
      boundary, which the student was not trained for;
    - M < steps <= N: all boundaries, and levels of the solver grid in between. Each step beyond M splits the phase that
      has the most cells a step, the less noisy one on a tie; s steps in a phase of c cells start at the cells that lie
      floor(j c / s), j = 0 .. s - 1, below its top.

    Raises:
        ValueError: steps < 1 or steps > N.
    """
    check_steps(steps)
    if steps > grid.num_cells:
        raise ValueError(f"{steps} steps, but the student's solver grid has only {grid.num_cells} cells")
    if steps <= grid.num_phases:
        tops = np.append(grid.boundaries[1:], grid.sigma[-1])[::-1]
        levels = tops[np.arange(steps) * grid.num_phases // steps]
    else:
        cells = grid.stops - grid.starts
        share = np.ones_like(cells)
        for _ in range(steps - grid.num_phases):
            share[np.argmax(cells / share)] += 1
        top_cells = [stop - 1 - np.arange(s) * c // s for stop, c, s in zip(grid.stops, cells, share, strict=True)]
        levels = grid.sigma[np.concatenate(top_cells[::-1])]
    return np.append(levels, np.float32(0))


def renoise_step(x: Tensor, velocity: Tensor, sigma: float, sigma_next: float, noise: Tensor) -> Tensor:
    """Predict the data from time sigma and put fresh noise on it for time sigma_next."""
    return (1 - sigma_next) * (x - sigma * velocity) + sigma_next * noise


def phased(
    velocity: Velocity,
    noise: Tensor,
    *,
    steps: int,
    grid: PhaseGrid,
    stochastic: bool = False,
    generator: AnyGenerator | Sequence[AnyGenerator] | None = None,
    noise_sampler: Callable[[list[int]], Tensor] | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Jump from phase boundary to phase boundary; no gradient is kept.

    Deterministic: each step follows the student's velocity, the chord to the lower end of the phase, to the next level.
    Stochastic: each step but the last predicts the data and puts fresh noise on it; the target time told to the model
    is then 0.

    Args:
        velocity: the student, see `loop.Velocity`.
        noise: initial noise [B, C, H, W].
        steps, grid: the levels to visit, see `phased_sigmas`; `grid` is the one of the training at this resolution
            (`PhaseGrid.for_tokens`).
        stochastic: draw fresh noise at every level.
        generator: source of that noise, or a list of B, one an image; None is Paddle's global generator.
        noise_sampler: `noise_sampler(shape) -> tensor`, replaces the generator.
        callback: see `loop.Callback`.

    Returns:
        x0 [B, C, H, W], float32.
    """
    sigmas = phased_sigmas(steps, grid)
    if not stochastic:
        return run(velocity, noise, sigmas, euler_step, callback=callback)
    draw = noise_source(noise, generator, noise_sampler)

    def step(x: Tensor, v: Tensor, sigma: float, sigma_next: float) -> Tensor:
        return renoise_step(x, v, sigma, sigma_next, draw()) if sigma_next > 0 else euler_step(x, v, sigma, sigma_next)

    return run(velocity, noise, sigmas, step, callback=callback, aim_at_data=True)
