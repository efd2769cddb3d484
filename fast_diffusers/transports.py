"""Paths between data and noise, and the conversions along them.

A transport mixes data x0 and noise z at time t into x_t = gamma(t) x0 + alpha(t) z; a model of it predicts the velocity
F = dx_t/dt = gamma'(t) x0 + alpha'(t) z. Everything is computed in float32, or in float64 for float64 states.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import paddle
from paddle import Tensor

Time = TypeVar("Time", float, Tensor)


def expand_time(t: Tensor | float, like: Tensor) -> Tensor:
    """Time as a tensor that broadcasts over `like`: [B] becomes [B, 1, ...], a scalar is kept; dtype as `like`'s state.

    Raises:
        ValueError: t is neither a scalar nor [B].
    """
    t = t if isinstance(t, Tensor) else paddle.to_tensor(t, dtype="float64")
    if t.ndim > 1 or t.size not in (1, like.shape[0]):
        raise ValueError(f"time must be a scalar or [{like.shape[0]}], got shape {list(t.shape)}")
    return t.astype(_state_dtype(like)).reshape([-1] + [1] * (like.ndim - 1))


def per_sample(value: Tensor | float, like: Tensor) -> Tensor:
    """A scalar or [B] value (a time, a guidance strength) as [B], one for each row of `like` [B, ...].

    Tensors of float64 stay, all others become float32; numbers take the precision of `like`'s state.

    Raises:
        ValueError: value is neither a scalar nor [B].
    """
    rows = like.shape[0]
    value = value if isinstance(value, Tensor) else paddle.to_tensor(value, dtype=_state_dtype(like))
    if value.ndim > 1 or value.size not in (1, rows):
        raise ValueError(f"expected a scalar or one value for each of {rows} samples, got shape {list(value.shape)}")
    return value.astype(_state_dtype(value)).expand([rows])


class Transport:
    """A path by its coefficients alpha (of noise) and gamma (of data), functions of |t| (UCGM, arXiv 2505.07447).

    A negative time stands for the twin branch of TwinFlow (arXiv 2512.05150) at |t|; only the model tells them apart.
    Times are scalars or [B], states [B, ...] of any float dtype.
    """

    noise_time: ClassVar[float]
    """Where the path is pure noise; sampling starts there."""
    data_time: ClassVar[float]
    """Where the path is data."""

    def alpha(self, t: Time) -> Time:
        """Coefficient of the noise at |t|, for a number or a tensor."""
        raise NotImplementedError

    def gamma(self, t: Time) -> Time:
        """Coefficient of the data at |t|."""
        raise NotImplementedError

    def alpha_slope(self, t: Time) -> Time:
        """Derivative of alpha at |t|."""
        raise NotImplementedError

    def gamma_slope(self, t: Time) -> Time:
        """Derivative of gamma at |t|."""
        raise NotImplementedError

    def interpolate(self, x0: Tensor, eps: Tensor, t: Tensor | float) -> Tensor:
        """The state at time t between data x0 and noise eps."""
        t = expand_time(t, x0)
        return self.gamma(t) * _state(x0) + self.alpha(t) * _state(eps)

    def velocity(self, x0: Tensor, eps: Tensor, t: Tensor | float) -> Tensor:
        """The velocity at time t on the path between x0 and eps, which a model regresses."""
        t = expand_time(t, x0)
        return self.gamma_slope(t) * _state(x0) + self.alpha_slope(t) * _state(eps)

    def predict(self, x: Tensor, velocity: Tensor, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """(x_hat, z_hat), the data and the noise that a velocity at (x, t) points to.

        They solve x = gamma x_hat + alpha z_hat and F = gamma' x_hat + alpha' z_hat.
        """
        t, x, velocity = expand_time(t, x), _state(x), _state(velocity)
        alpha, gamma, alpha_slope, gamma_slope = self.alpha(t), self.gamma(t), self.alpha_slope(t), self.gamma_slope(t)
        determinant = alpha * gamma_slope - gamma * alpha_slope
        x_hat = (alpha * velocity - alpha_slope * x) / determinant
        z_hat = (gamma_slope * x - gamma * velocity) / determinant
        return x_hat, z_hat


class LinearPath(Transport):
    """x_t = (1 - t) x0 + t eps, v = eps - x0 (rectified flow), noise at t = 1."""

    noise_time, data_time = 1.0, 0.0

    def alpha(self, t: Time) -> Time:
        """See `Transport`."""
        return abs(t)

    def gamma(self, t: Time) -> Time:
        """See `Transport`."""
        return 1 - abs(t)

    def alpha_slope(self, t: Time) -> Time:
        """See `Transport`."""
        return 0 * t + 1

    def gamma_slope(self, t: Time) -> Time:
        """See `Transport`."""
        return 0 * t - 1

    @staticmethod
    def interpolate(x0: Tensor, eps: Tensor, t: Tensor | float) -> Tensor:
        """The state at time |t| between data x0 and noise eps."""
        t = expand_time(t, x0).abs()
        return (1 - t) * _state(x0) + t * _state(eps)

    @staticmethod
    def velocity_target(x0: Tensor, eps: Tensor) -> Tensor:
        """The velocity that a model regresses, eps - x0."""
        return _state(eps) - _state(x0)

    @staticmethod
    def x0_from_velocity(x: Tensor, velocity: Tensor, t: Tensor | float) -> Tensor:
        """The data that a velocity at (x, t) points to."""
        return _state(x) - expand_time(t, x).abs() * _state(velocity)

    @staticmethod
    def noise_from_velocity(x: Tensor, velocity: Tensor, t: Tensor | float) -> Tensor:
        """The noise that a velocity at (x, t) comes from."""
        return _state(x) + (1 - expand_time(t, x).abs()) * _state(velocity)

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


class Relinear(Transport):
    """The linear path with time reversed: x_t = t x0 + (1 - t) eps, F = x0 - eps, noise at t = 0 and data at t = 1."""

    noise_time, data_time = 0.0, 1.0

    def alpha(self, t: Time) -> Time:
        """See `Transport`."""
        return 1 - abs(t)

    def gamma(self, t: Time) -> Time:
        """See `Transport`."""
        return abs(t)

    def alpha_slope(self, t: Time) -> Time:
        """See `Transport`."""
        return 0 * t - 1

    def gamma_slope(self, t: Time) -> Time:
        """See `Transport`."""
        return 0 * t + 1


class TrigFlow(Transport):
    """x_t = cos(t) x0 + sin(t) eps with the angle t in [0, pi/2] (sCM, arXiv 2410.11081), noise at t = pi/2.

    UCGM writes the same path over [0, 1]; its time is 2 t / pi, and its velocity ours times pi / 2. Noise and data are
    those of the state: whoever scales by sigma_data scales both.
    """

    noise_time, data_time = math.pi / 2, 0.0

    def alpha(self, t: Time) -> Time:
        """See `Transport`."""
        return _sin(abs(t))

    def gamma(self, t: Time) -> Time:
        """See `Transport`."""
        return _cos(abs(t))

    def alpha_slope(self, t: Time) -> Time:
        """See `Transport`."""
        return _cos(abs(t))

    def gamma_slope(self, t: Time) -> Time:
        """See `Transport`."""
        return -_sin(abs(t))


def flow_time(angle: Time) -> Time:
    """Time on the linear path of the state that TrigFlow has at an angle in [0, pi/2]: sin t / (sin t + cos t).

    The two states differ by a factor only, see `flow_to_trigflow` (SANA-Sprint, arXiv 2503.09641, section 3.1).
    """
    sin, cos = _sin(angle), _cos(angle)
    return sin / (sin + cos)


def angle_of(time: Time) -> Time:
    """The inverse of `flow_time`: the angle in [0, pi/2] of a time in [0, 1] on the linear path."""
    return paddle.atan2(time, 1 - time) if isinstance(time, Tensor) else math.atan2(time, 1 - time)


@dataclass(frozen=True)
class FlowAsTrigFlow:
    """A velocity model of the linear path as a TrigFlow model F; made by `flow_to_trigflow`.

    TrigFlow states x_t = cos(t) x0 + sin(t) z have data and noise of standard deviation `sigma_data`. All methods take
    angles as scalars or [B], give the state's precision (at least float32), and pass further arguments to the model.
    """

    velocity: Callable[..., Tensor]
    sigma_data: float = 0.5

    def __call__(self, x_hat: Tensor, t: Tensor | float, *args: Any, **kwargs: Any) -> Tensor:
        """F(x_hat, t), the prediction of cos(t) z - sin(t) x0 in units of sigma_data, at x_hat = x_t / sigma_data."""
        angle = per_sample(t, x_hat).astype(_angle_dtype(t, x_hat))
        sin, cos = paddle.sin(angle), paddle.cos(angle)
        scale = 1 / (sin + cos)  # shrinks the circle's state to the line's, where data and noise sum to 1
        x_flow = expand_time(scale, x_hat) * _state(x_hat)
        v = self.velocity(x_flow, (sin * scale).astype(x_flow.dtype), *args, **kwargs)
        return expand_time(cos - sin, x_hat) * x_flow + expand_time(scale, x_hat) * _state(v).astype(x_flow.dtype)

    def slope(self, x: Tensor, t: Tensor | float, *args: Any, **kwargs: Any) -> Tensor:
        """dx_t/dt of the probability-flow ODE at the state x = x_t."""
        return self.sigma_data * self(_state(x) / self.sigma_data, t, *args, **kwargs)

    def data(self, x: Tensor, t: Tensor | float, *args: Any, **kwargs: Any) -> Tensor:
        """cos(t) x_t - sin(t) dx_t/dt, the data (with deviation sigma_data) that the model predicts at x = x_t."""
        return TrigFlow().predict(x, self.slope(x, t, *args, **kwargs), t)[0]


def flow_to_trigflow(velocity: Callable[..., Tensor], sigma_data: float = 0.5) -> FlowAsTrigFlow:
    """Turn a flow-matching model into a TrigFlow model without training (SANA-Sprint, arXiv 2503.09641, section 3.1).

    With s = `flow_time(t)` and lambda = sqrt(s^2 + (1 - s)^2) = 1 / (sin t + cos t):
    F(x_hat, t) = (1 - 2 s) x_hat + lambda v(lambda x_hat, s). It is exact: where v is the optimum, so is F.

    Args:
        velocity: `velocity(x, s, *args, **kwargs)` with x like the state, s [B] of x's dtype; predicts noise - data.
        sigma_data: standard deviation of data and noise in TrigFlow states, see `FlowAsTrigFlow`. F itself takes and
            gives states divided by it, whatever it is.

    Returns:
        A callable `F(x_hat, t, *args, **kwargs)`: float64 for a float64 x_hat, else float32.
    """
    return FlowAsTrigFlow(velocity, sigma_data)


def _angle_dtype(t: Tensor | float, x: Tensor) -> paddle.dtype:
    """Trigonometry is done in the better precision of state and angle."""
    return paddle.float64 if isinstance(t, Tensor) and t.dtype == paddle.float64 else _state_dtype(x)


def _sin(t: Time) -> Time:
    return paddle.sin(t) if isinstance(t, Tensor) else math.sin(t)


def _cos(t: Time) -> Time:
    return paddle.cos(t) if isinstance(t, Tensor) else math.cos(t)


def _noise_ratio(t_from: Tensor, t_to: Tensor) -> Tensor:
    return (t_to - t_from) / (1 - t_from).clip(min=1e-12)


def _state_dtype(x: Tensor) -> paddle.dtype:
    return paddle.float64 if x.dtype == paddle.float64 else paddle.float32


def _state(x: Tensor) -> Tensor:
    return x.astype(_state_dtype(x))
