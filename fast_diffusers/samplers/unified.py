"""The unified sampler of UCGM (arXiv 2505.07447, algorithm 2): multi-step, any-step and few-step models on any path.

One sampling run is a list of `Evaluation`s of the model and a `State` that `advance` takes from one to the next; the
sampler and `schedulers.UnifiedScheduler` share both.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import paddle
from paddle import Tensor

from fast_diffusers.random import AnyGenerator, noise_source
from fast_diffusers.samplers.loop import Callback, Velocity, check_steps, check_velocity
from fast_diffusers.transports import LinearPath, Transport

STYLES = ("few", "any", "mul")
CORRECTIONS = ("published", "balanced")

Prediction = tuple[Tensor, Tensor]
"""(data, noise) that the model sees in a state, float64."""


@dataclass(frozen=True)
class UnifiedRule:
    """The settings of the unified sampler, see `unified`.

    Raises:
        ValueError: a setting out of its range.
    """

    order: int = 1
    stochasticity: float | str = 0.0
    extrapolation: float = 0.0
    time_warp: Sequence[float] = (1.0, 1.0, 1.0)
    gap: Sequence[float] = (0.0, 0.0)
    style: str = "few"
    correction: str = "published"
    transport: Transport = field(default_factory=LinearPath)

    def __post_init__(self) -> None:
        if self.order not in (1, 2):
            raise ValueError(f"order must be 1 or 2, got {self.order!r}")
        if self.style not in STYLES:
            raise ValueError(f"style must be one of {', '.join(STYLES)}, got {self.style!r}")
        if self.correction not in CORRECTIONS:
            raise ValueError(f"correction must be one of {', '.join(CORRECTIONS)}, got {self.correction!r}")
        if not self._follows_sde and not (_is_number(self.stochasticity) and 0 <= self.stochasticity <= 1):
            raise ValueError(f'stochasticity must be a number in [0, 1] or "sde", got {self.stochasticity!r}')
        if not (_is_number(self.extrapolation) and 0 <= self.extrapolation < math.inf):
            raise ValueError(f"extrapolation must be a number of at least 0, got {self.extrapolation!r}")
        if not (_are_numbers(self.time_warp, 3) and all(0 < value < math.inf for value in self.time_warp)):
            raise ValueError(f"time_warp must be three positive numbers (a, b, c), got {self.time_warp!r}")
        if not (_are_numbers(self.gap, 2) and all(0 <= value < 1 for value in self.gap) and sum(self.gap) < 1):
            raise ValueError(f"gap must be two numbers in [0, 1) with a sum below 1, got {self.gap!r}")

    def times(self, steps: int) -> np.ndarray:
        """Times that the steps start from and, last, the path's data time; float64.

        `steps` counts evaluations: order 2 makes (steps + 1) // 2 steps, all but the last of two evaluations. The
        steps divide [gap[0], 1 - gap[1]], or [gap[0], 1] where gap[1] is 0, whose end is then data; the Kumaraswamy
        distribution with `time_warp` bends them.

        Raises:
            ValueError: steps < 1.
        """
        check_steps(steps)
        count = (steps + 1) // 2 if self.order == 2 else steps
        first, last = self.gap
        grid = np.linspace(first, 1, count + 1)[:-1] if last == 0 else np.linspace(first, 1 - last, count)
        a, b, c = self.time_warp
        progress = np.append((1 - (1 - grid**a) ** b) ** c, 1.0)
        path = self.transport
        return path.noise_time * (1 - progress) + path.data_time * progress

    def evaluations(self, steps: int) -> list[Evaluation]:
        """The model's evaluations of a run, in order."""
        times = [float(t) for t in self.times(steps)]
        made = []
        for i, (t, t_next) in enumerate(itertools.pairwise(times)):
            made.append(Evaluation(i, t, self._target(t, t_next), t, t_next))
            if self.order == 2 and i < len(times) - 2:
                made.append(Evaluation(i, t_next, self._target(t_next, t_next), t, t_next, corrects=True))
        return made

    @property
    def _follows_sde(self) -> bool:
        return str(self.stochasticity).lower() == "sde"

    def noise_share(self, t: float, t_next: float) -> float:
        """Share of fresh noise in the variance of the noise at t_next, in [0, 1]; none where the path has no noise."""
        alpha_next = self.transport.alpha(t_next)
        if alpha_next == 0:
            return 0.0
        if self._follows_sde:
            return min(1.0, 2 * self.transport.alpha(t) * abs(t_next - t) / alpha_next**2)
        return self.stochasticity

    def _target(self, t: float, t_next: float) -> float:
        return {"few": self.transport.data_time, "any": t_next, "mul": t}[self.style]


@dataclass(frozen=True)
class Evaluation:
    """Step `step` from time `start` to `end` asks the model at time `t`, telling it the target time `target`.

    `corrects` marks the second evaluation of a step of order 2, at its end.
    """

    step: int
    t: float
    target: float
    start: float
    end: float
    corrects: bool = False


@dataclass(frozen=True)
class State:
    """Where the next evaluation is to be made, and what it needs of the earlier ones."""

    x: Tensor
    """[B, C, H, W] float64."""
    begun: tuple[Tensor, Prediction] | None = None
    """State and prediction at the start of a step that waits for its correction."""
    raw: Prediction | None = None
    """First prediction of the latest step, before extrapolation."""


def advance(
    rule: UnifiedRule, state: State, evaluation: Evaluation, velocity: Tensor, draw: Callable[[], Tensor]
) -> State:
    """The state after an evaluation gave `velocity` [B, C, H, W]; `draw` gives fresh noise.

    In a run of order 2, the state after the first evaluation of a step is where `evaluations` has the second one.
    """
    path, start, end = rule.transport, evaluation.start, evaluation.end
    prediction = path.predict(state.x, velocity.astype("float64"), evaluation.t)
    if evaluation.corrects:
        if state.begun is None:
            raise ValueError("the second evaluation of a step comes after its first")
        x, first = state.begun
        return State(_corrected(rule, x, first, prediction, start, end), raw=state.raw)
    x_hat, z_hat = prediction
    if rule.extrapolation and evaluation.step > 1 and state.raw is not None:
        x_hat = x_hat + rule.extrapolation * (x_hat - state.raw[0])
        z_hat = z_hat + rule.extrapolation * (z_hat - state.raw[1])
    x = path.gamma(end) * x_hat + path.alpha(end) * _renoised(rule, z_hat, start, end, draw)
    return State(x, begun=(state.x, (x_hat, z_hat)), raw=prediction)


def _renoised(rule: UnifiedRule, z_hat: Tensor, t: float, t_next: float, draw: Callable[[], Tensor]) -> Tensor:
    share = rule.noise_share(t, t_next)
    if share == 0:
        return z_hat
    return math.sqrt(1 - share) * z_hat + math.sqrt(share) * draw().astype("float64")


def _corrected(rule: UnifiedRule, x: Tensor, first: Prediction, second: Prediction, start: float, end: float) -> Tensor:
    """The step's end with the mean of the predictions at its two ends.

    Published: x / gamma moves by the change of alpha / gamma times the mean noise. Its mirror image: x / alpha moves by
    the change of gamma / alpha times the mean data. Both are exact where the predictions do not change; the former
    enlarges errors of the noise by gamma_end / gamma and is undefined at gamma = 0.
    """
    path = rule.transport
    alpha, gamma, alpha_end, gamma_end = path.alpha(start), path.gamma(start), path.alpha(end), path.gamma(end)
    least = alpha if rule.correction == "balanced" else 1e-12  # cos(pi / 2) is not exactly 0
    if gamma > least:
        z_hat = 0.5 * (first[1] + second[1])
        return gamma_end / gamma * x + (alpha_end - gamma_end * alpha / gamma) * z_hat
    x_hat = 0.5 * (first[0] + second[0])
    return alpha_end / alpha * x + (gamma_end - alpha_end * gamma / alpha) * x_hat


@paddle.no_grad()
def unified(
    velocity: Velocity,
    noise: Tensor,
    *,
    steps: int,
    order: int = 1,
    stochasticity: float | str = 0.0,
    extrapolation: float = 0.0,
    time_warp: Sequence[float] = (1.0, 1.0, 1.0),
    gap: Sequence[float] = (0.0, 0.0),
    style: str = "few",
    correction: str = "published",
    transport: Transport | None = None,
    generator: AnyGenerator | Sequence[AnyGenerator] | None = None,
    noise_sampler: Callable[[list[int]], Tensor] | None = None,
    callback: Callback | None = None,
    trajectory: list[Tensor] | None = None,
) -> Tensor:
    """Predict data and noise, go to the next time with them, and so on; the state is kept in float64, no gradient is.

    Args:
        velocity: the model, see `loop.Velocity`; it is asked in float32, in float64 if `noise` is float64.
        noise: initial noise [B, C, H, W], the state at the first of the times.
        steps, gap, time_warp: the times to visit, see `UnifiedRule.times`. Keeping away from the ends of the path, gap
            is (distance to pure noise, distance to data of the last step's start), as shares of the path.
        order: 1, or 2 for Heun-like corrections of all steps but the last. With order 2 the fresh noise of a step only
            moves the place of its second evaluation, as published; combine order 2 with stochasticity 0.
        stochasticity: share of fresh noise in the noise's variance at each time but the last, in [0, 1]; or "sde",
            2 alpha(t) |t' - t| / alpha(t')^2 up to 1, which follows a stochastic differential equation.
        extrapolation: from the third step on, move the predictions away from the previous step's by this factor.
        style: the target time told to the model: "few" the data's, "any" the end of the step, "mul" the time itself;
            at the end of a step (order 2), "any" has this end for a target.
        correction: of order 2; "published" takes the mean of the noise predicted at the two ends of a step, which
            enlarges its errors by gamma(t') / gamma(t): by hundreds near pure noise. "balanced" takes the mean of the
            data where the state is mostly noise, and that of the noise elsewhere.
        transport: the path that the model was trained on; None is `LinearPath`. Times are the path's own.
        generator: source of fresh noise, or a list of B, one an image; None is Paddle's global generator.
        noise_sampler: `noise_sampler(shape) -> tensor`, replaces the generator.
        callback: see `loop.Callback`; the last t is the path's data time.
        trajectory: a list to append the states to: before the first step and after each.

    Returns:
        x0 [B, C, H, W], float32, or float64 if `noise` is.

    Raises:
        ValueError: a setting out of its range, style "any" for a velocity whose attribute `takes_target_time` is false,
            or a velocity of another shape.
    """
    rule = UnifiedRule(
        order, stochasticity, extrapolation, time_warp, gap, style, correction, transport or LinearPath()
    )
    evaluations = rule.evaluations(steps)
    if style == "any" and not getattr(velocity, "takes_target_time", True):
        raise ValueError('style "any" needs a model that takes a target time; this one does not: use "few" or "mul"')
    dtype = "float64" if noise.dtype == paddle.float64 else "float32"
    times = paddle.to_tensor([[e.t, e.target] for e in evaluations], dtype=dtype)  # one transfer for the whole run
    draw = noise_source(noise, generator, noise_sampler)
    state, batch = State(noise.astype("float64")), noise.shape[0]
    if trajectory is not None:
        trajectory.append(state.x.astype(dtype))
    for i, evaluation in enumerate(evaluations):
        x = state.x.astype(dtype)
        v = velocity(x, times[i, 0].expand([batch]), times[i, 1].expand([batch]))
        check_velocity(v, x)
        state = advance(rule, state, evaluation, v, draw)
        if i + 1 < len(evaluations) and evaluations[i + 1].corrects:
            continue  # the step is not over
        if callback is not None:
            callback(evaluation.step, evaluation.end, state.x.astype(dtype))
        if trajectory is not None:
            trajectory.append(state.x.astype(dtype))
    return state.x.astype(dtype)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def _are_numbers(values: object, count: int) -> bool:
    return isinstance(values, Sequence | np.ndarray) and len(values) == count and all(map(_is_number, values))
