"""Few-step sampling of TrigFlow consistency models (sCM, arXiv 2410.11081; SANA-Sprint, arXiv 2503.09641).

Levels are angles: pi/2 is noise, 0 data. A step predicts the data and puts fresh noise on it for the next angle. States
and velocities are those of the linear path, where the same step is `phased.renoise_step` at the times of the angles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from paddle import Tensor

from fast_diffusers.random import AnyGenerator, noise_source
from fast_diffusers.samplers.euler import euler_step
from fast_diffusers.samplers.loop import Callback, Velocity, check_steps, run
from fast_diffusers.samplers.phased import renoise_step
from fast_diffusers.transports import flow_time

NOISIEST = math.atan(400)
"""arctan(sigma_max / sigma_data) with sigma_max 200 and sigma_data 0.5, where the published schedules begin."""
PUBLISHED = {
    1: (math.pi / 2, 0.0),
    2: (NOISIEST, 1.3, 0.0),
    4: (NOISIEST, 1.3, 1.1, 0.6, 0.0),
}
"""Angles of the published students by number of steps (SANA-Sprint, appendix)."""


def trigflow_angles(steps: int, angles: Sequence[float] | None = None) -> np.ndarray:
    """Angles to visit with that many steps, float64 [steps + 1], from (almost) pi/2 down to 0.

    Given angles, n + 1 of them, are a curve of progress 0, 1/n, ..., 1, which is read at 0, 1/steps, ..., 1, linearly
    in between: as many as are visited stay as they are. Without any, those of 1, 2 and 4 steps are the published ones,
    and any other number reads the curve of 4 steps.

    Raises:
        ValueError: steps < 1, or angles that do not descend strictly from at most pi/2 to 0.
    """
    check_steps(steps)
    if angles is None and steps in PUBLISHED:
        return np.array(PUBLISHED[steps])
    curve = check_angles(PUBLISHED[4] if angles is None else angles)
    return np.interp(np.linspace(0, 1, steps + 1), np.linspace(0, 1, len(curve)), curve)


def check_angles(angles: Sequence[float], steps: int | None = None) -> np.ndarray:
    """The angles as float64. ValueError unless they descend strictly in [0, pi/2] to 0, in `steps` steps if given."""
    checked = np.asarray(angles, dtype=np.float64)
    if checked.ndim != 1 or len(checked) < 2 or (steps is not None and len(checked) != steps + 1):
        wanted = "at least 2 angles" if steps is None else f"{steps + 1} angles for {steps} steps"
        raise ValueError(f"expected {wanted}, the final 0 included, got shape {list(checked.shape)}")
    # Published files round pi/2 up to 1.5708.
    if not (np.all(np.diff(checked) < 0) and checked[0] <= math.pi / 2 + 1e-4 and checked[-1] == 0):
        raise ValueError(f"angles must descend strictly from at most pi/2 to 0, got {checked.tolist()}")
    return np.minimum(checked, math.pi / 2)


def flow_levels(angles: np.ndarray) -> np.ndarray:
    """The times of angles on the linear path, float32."""
    return np.array([flow_time(float(angle)) for angle in angles], dtype=np.float32)


def initial_scale(angle: float) -> float:
    """What pure noise is multiplied with to be the linear path's state at the first angle; 1 at pi/2.

    TrigFlow takes noise of deviation 1 for its state there. The linear path's state is smaller by sin + cos.
    """
    return 1 / (math.sin(angle) + math.cos(angle))


def scm_step(x: Tensor, velocity: Tensor, sigma: float, sigma_next: float, draw: Callable[[], Tensor]) -> Tensor:
    """Predict the data at time sigma; renoise them with `draw()` for sigma_next, unless that is 0."""
    if sigma_next == 0:
        return euler_step(x, velocity, sigma, sigma_next)
    return renoise_step(x, velocity, sigma, sigma_next, draw())


def trigflow(
    velocity: Velocity,
    noise: Tensor,
    *,
    steps: int,
    angles: Sequence[float] | None = None,
    generator: AnyGenerator | Sequence[AnyGenerator] | None = None,
    noise_sampler: Callable[[list[int]], Tensor] | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Multi-step consistency sampling along angles (sCM, arXiv 2410.11081, section 2); no gradient is kept.

    Args:
        velocity: the student as a model of the linear path, see `loop.Velocity`; it is told target time 0.
        noise: initial noise [B, C, H, W].
        steps: number of steps.
        angles: see `trigflow_angles`; `steps` + 1 are visited as they are.
        generator: source of fresh noise, or a list of B, one an image; None is Paddle's global generator.
        noise_sampler: `noise_sampler(shape) -> tensor`, replaces the generator.
        callback: see `loop.Callback`; times and states are those of the linear path.

    Returns:
        x0 [B, C, H, W], float32.

    Raises:
        ValueError: steps < 1, unusable angles, or a velocity of another shape.
    """
    visited = trigflow_angles(steps, angles)
    draw = noise_source(noise, generator, noise_sampler)

    def step(x: Tensor, v: Tensor, sigma: float, sigma_next: float) -> Tensor:
        return scm_step(x, v, sigma, sigma_next, draw)

    start = noise.astype("float32") * initial_scale(visited[0])
    return run(velocity, start, flow_levels(visited), step, callback=callback, aim_at_data=True)
