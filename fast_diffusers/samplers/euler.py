"""Euler's method for the probability-flow ODE of a velocity model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from paddle import Tensor

from fast_diffusers.random import AnyGenerator
from fast_diffusers.samplers.loop import Callback, Velocity, check_steps, run
from fast_diffusers.time_grids import shift_sigma


def euler_sigmas(steps: int, sigmas: Sequence[float] | None = None, mu: float | None = None) -> np.ndarray:
    """Noise levels that Euler's method visits, float32 [steps + 1], the last one 0.

    Args:
        steps: number of steps.
        sigmas: `steps` strictly descending levels in (0, 1], without the final 0; default 1, 1 - 1/steps, ..., 1/steps.
        mu: shift exponent applied to the levels (`time_grids.shift_sigma`); None does not shift.

    Raises:
        ValueError: steps < 1, or unusable sigmas.
    """
    check_steps(steps)
    levels = np.arange(steps, 0, -1) / steps if sigmas is None else np.asarray(sigmas, dtype=np.float64)
    if levels.shape != (steps,):
        raise ValueError(f"{steps} steps need {steps} sigmas (without the final 0), got shape {list(levels.shape)}")
    if not (np.all(np.diff(levels) < 0) and levels[0] <= 1 and levels[-1] > 0):
        raise ValueError(f"sigmas must descend strictly within (0, 1], got {levels.tolist()}")
    if mu is not None:
        levels = shift_sigma(levels, mu)
    return np.append(levels, 0.0).astype(np.float32)


def euler_step(x: Tensor, velocity: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """One Euler step of dx/dt = v from time sigma to sigma_next."""
    return x + (sigma_next - sigma) * velocity


def euler(
    velocity: Velocity,
    noise: Tensor,
    *,
    steps: int,
    sigmas: Sequence[float] | None = None,
    mu: float | None = None,
    generator: AnyGenerator | Sequence[AnyGenerator] | None = None,
    noise_sampler: Callable[[list[int]], Tensor] | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Integrate dx/dt = v(x, t) from noise to data in equal steps of (shifted) time; no gradient is kept.

    Args:
        velocity: the model, see `loop.Velocity`.
        noise: initial state [B, C, H, W]: pure noise, or a state at time sigmas[0].
        steps, sigmas, mu: the levels to visit, see `euler_sigmas`.
        generator, noise_sampler: taken because all samplers take them; this one is deterministic and does not draw.
        callback: see `loop.Callback`.

    Returns:
        x0 [B, C, H, W], float32.
    """
    return run(velocity, noise, euler_sigmas(steps, sigmas, mu), euler_step, callback=callback)
