"""The straight path between data and noise, and the conversions along it.

x_t = (1 - t) x0 + t eps, velocity v = eps - x0. Everything is computed in float32, or in float64 for float64 states.
"""

from __future__ import annotations

import paddle
from paddle import Tensor


def expand_time(t: Tensor | float, like: Tensor) -> Tensor:
    """Time as a tensor that broadcasts over `like`: [B] becomes [B, 1, ...], a scalar is kept; dtype as `like`'s state.

    Raises:
        ValueError: t is neither a scalar nor [B].
    """
    t = t if isinstance(t, Tensor) else paddle.to_tensor(t, dtype="float64")
    if t.ndim > 1 or t.size not in (1, like.shape[0]):
        raise ValueError(f"time must be a scalar or [{like.shape[0]}], got shape {list(t.shape)}")
    return t.astype(_state_dtype(like)).reshape([-1] + [1] * (like.ndim - 1))


class LinearPath:
    """x_t = (1 - t) x0 + t eps (rectified flow). Times are scalars or [B]; states are [B, ...] of any float dtype."""

    @staticmethod
    def interpolate(x0: Tensor, eps: Tensor, t: Tensor | float) -> Tensor:
        """The state at time t between data x0 and noise eps."""
        t = expand_time(t, x0)
        return (1 - t) * _state(x0) + t * _state(eps)

    @staticmethod
    def velocity_target(x0: Tensor, eps: Tensor) -> Tensor:
        """The velocity that a model regresses, eps - x0."""
        return _state(eps) - _state(x0)

    @staticmethod
    def x0_from_velocity(x: Tensor, velocity: Tensor, t: Tensor | float) -> Tensor:
        """The data that a velocity at (x, t) points to."""
        return _state(x) - expand_time(t, x) * _state(velocity)

    @staticmethod
    def noise_from_velocity(x: Tensor, velocity: Tensor, t: Tensor | float) -> Tensor:
        """The noise that a velocity at (x, t) comes from."""
        return _state(x) + (1 - expand_time(t, x)) * _state(velocity)

    @staticmethod
    def renoise(x: Tensor, t_from: Tensor | float, t_to: Tensor | float, noise: Tensor) -> Tensor:
        """Take a state at time t_from to the noisier time t_to with fresh noise, exactly in distribution.

        The data part must shrink from 1 - t_from to 1 - t_to, which scales x by s = (1 - t_to) / (1 - t_from); the
        noise already present is then s t_from, and fresh noise adds the missing variance t_to^2 - s^2 t_from^2.
        Where t_to < t_from no such variance exists and the result is nan.
        """
        t_from, t_to = expand_time(t_from, x), expand_time(t_to, x)
        # With r = (t_to - t_from) / (1 - t_from): s = 1 - r, and the variance is a product that suffers no cancellation
        # and is exactly 0 for t_to = t_from, pure noise (t_from = 1) included.
        ratio = _noise_ratio(t_from, t_to)
        scale = 1 - ratio
        return scale * _state(x) + paddle.sqrt(ratio * (t_to + scale * t_from)) * _state(noise)

    @staticmethod
    def renoise_published(x: Tensor, t_from: Tensor | float, t_to: Tensor | float, noise: Tensor) -> Tensor:
        """`renoise` as the published FLUX-Lightning training does it, with too little noise.

        It treats x as if it were data: s x + (t_to - t_from) / (1 - t_from) noise. From 0.513 to 0.65 the total noise
        has standard deviation 0.464 instead of 0.65.
        """
        ratio = _noise_ratio(expand_time(t_from, x), expand_time(t_to, x))
        return (1 - ratio) * _state(x) + ratio * _state(noise)


def _noise_ratio(t_from: Tensor, t_to: Tensor) -> Tensor:
    return (t_to - t_from) / (1 - t_from).clip(min=1e-12)


def _state_dtype(x: Tensor) -> paddle.dtype:
    return paddle.float64 if x.dtype == paddle.float64 else paddle.float32


def _state(x: Tensor) -> Tensor:
    return x.astype(_state_dtype(x))
