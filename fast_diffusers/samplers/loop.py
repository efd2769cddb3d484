"""The loop that the samplers share: visit a list of noise levels, ask for a velocity at each, take a step."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import paddle
from paddle import Tensor

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]
"""velocity(x, t, target_t) -> v: x [B, C, H, W] float32, t and target_t [B] float32, v like x (any float dtype)."""

Callback = Callable[[int, float, Tensor], None]
"""callback(i, t, x), called after step i = 0, 1, ...: x is the state at time t; the last call has t = 0."""


@paddle.no_grad()
def run(
    velocity: Velocity,
    noise: Tensor,
    sigmas: np.ndarray,
    step: Callable[[Tensor, Tensor, float, float], Tensor],
    *,
    callback: Callback | None = None,
    aim_at_data: bool = False,
) -> Tensor:
    """Visit `sigmas` [steps + 1] (float32, descending to 0) with `step(x, v, sigma, sigma_next)`, state in float32.

    Args:
        aim_at_data: tell the model target time 0 instead of the next level.

    Raises:
        ValueError: the velocity's shape is not the state's.
    """
    x = noise.astype("float32")
    batch = x.shape[0]
    times = paddle.to_tensor(sigmas)  # one transfer to the device for the whole run
    for i in range(len(sigmas) - 1):
        target = times[-1 if aim_at_data else i + 1]
        v = velocity(x, times[i].expand([batch]), target.expand([batch]))
        check_velocity(v, x)
        x = step(x, v.astype("float32"), float(sigmas[i]), float(sigmas[i + 1]))
        if callback is not None:
            callback(i, float(sigmas[i + 1]), x)
    return x


def check_velocity(v: Tensor, x: Tensor) -> None:
    """Raise unless the velocity has the state's shape."""
    if v.shape != x.shape:
        raise ValueError(f"velocity(x, t, target_t) returned shape {list(v.shape)} for a state {list(x.shape)}")


def check_steps(steps: int) -> None:
    """Raise unless `steps` is a positive integer."""
    if isinstance(steps, bool) or not isinstance(steps, int | np.integer):
        raise TypeError(f"the number of steps must be an integer, got {type(steps).__name__}")
    if steps < 1:
        raise ValueError(f"the number of steps must be at least 1, got {steps}")
