"""RCGM: regress the velocity that carries a state from any time t straight to any earlier time."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import paddle

from distill.draws import Draws
from distill.objectives.phases import Batch, euler_move
from fast_diffusers.conditioning import Cond
from fast_diffusers.transports import LinearPath, expand_time

BARRON_C = 1e-3


@dataclass(frozen=True)
class AnyStep:
    """Settings that `rcgm` and `twinflow` share.

    order: N, Euler steps of the reference network on the way to the target time.
    consistency_ratio: how much of the way from t to 0 the target time may lie off, in [0, 1].
    delta: length of the first, supervised piece of the way.
    clamp: largest correction of an element of the velocity in the regression target; None: unbounded.
    times: (a, b, c), t ~ c·Beta(a, b).
    loss: "barron" (see `regression`) or "l2".
    time_weighting: weight a row by tan((1 − (|t| − |target_t|))·π/2.5) + 1.
    velocity_target: what supervises the first piece: "data", noise − x0 of the row, or "teacher", the velocity of
        roles.teacher, which for a model with embedded guidance is the guided one that data do not show.
    enhanced_ratio, enhanced_range: classifier-free guidance folded in: for t in the range, the supervision gains
        ratio·(F_target(x_t, t, cond) − F_target(x_t, t, null_cond)).
    image_free: replace the data by the student's one-step samples of `fake.noise`.
    """

    order: int = 1
    consistency_ratio: float = 1.0
    delta: float = 0.01
    clamp: float | None = 1.0
    times: tuple[float, float, float] = (1.0, 1.0, 1.0)
    loss: Literal["barron", "l2"] = "barron"
    time_weighting: bool = True
    velocity_target: Literal["data", "teacher"] = "data"
    enhanced_ratio: float = 0.0
    enhanced_range: tuple[float, float] = (0.0, 1.0)
    image_free: bool = False

    def __post_init__(self) -> None:
        if self.order < 1:
            raise ValueError(f"order must be at least 1, got {self.order}")
        if not 0 <= self.consistency_ratio <= 1:
            raise ValueError(f"consistency_ratio must lie in [0, 1], got {self.consistency_ratio}")
        if not 0 < self.delta < 1:
            raise ValueError(f"delta must lie in (0, 1), got {self.delta}")
        if self.loss not in ("barron", "l2"):
            raise ValueError(f"loss is 'barron' or 'l2', not {self.loss!r}")
        if self.velocity_target not in ("data", "teacher"):
            raise ValueError(f"velocity_target is 'data' or 'teacher', not {self.velocity_target!r}")


def rcgm(roles: Any, batch: Batch, draws: Draws, **settings: Any) -> tuple[paddle.Tensor, dict[str, paddle.Tensor]]:
    """Recursive consistent generation model of order N (arXiv 2505.07447), on the linear path.

    The student's F(x_t, t, target_t) regresses the velocity whose straight line ends where `any_step_target`'s path
    ends. Uses roles student and target, the reference network: an average of the student, the student itself or a
    frozen teacher; with velocity_target "teacher" also teacher. Settings: `AnyStep`.
    Draws: `t`, `target_t`, `noise`, and `fake.noise` where image-free.
    """
    s = AnyStep(**settings)
    if s.image_free:
        fake_noise = draws.normal("fake.noise", batch["latents"].shape).astype(batch["latents"].dtype)
        with paddle.no_grad():
            batch = {**batch, "latents": one_step(roles.student, batch, fake_noise)[0]}
    t = draw_time(draws, batch["latents"].shape[0], s)
    target_t = t - draws.uniform("target_t", t.shape) * t * s.consistency_ratio
    noise = draws.normal("noise", batch["latents"].shape).astype(batch["latents"].dtype)
    loss = any_step_loss(roles, batch, noise, t, target_t, s).mean()
    return loss, {"rcgm": loss.detach()}


def any_step_loss(
    roles: Any, batch: Batch, noise: paddle.Tensor, t: paddle.Tensor, target_t: paddle.Tensor, s: AnyStep
) -> paddle.Tensor:
    """The loss of every row, [B], at given times [B]."""
    noisy = LinearPath.interpolate(batch["latents"], noise, t)
    prediction = evaluate(roles.student, batch, noisy, t, target_t)
    supervision = velocity_supervision(roles, batch, noisy, noise, t, s)
    goal = any_step_target(roles.target, batch, noisy, supervision, prediction.detach(), t, target_t, s)
    return regression(prediction, goal, s.loss) * time_weight(t, target_t, s)


@paddle.no_grad()
def velocity_supervision(
    roles: Any, batch: Batch, noisy: paddle.Tensor, noise: paddle.Tensor, t: paddle.Tensor, s: AnyStep
) -> paddle.Tensor:
    """The velocity of the first piece of the way, [B, C, H, W]; see `AnyStep`."""
    if s.velocity_target == "teacher":
        velocity = evaluate(roles.teacher, batch, noisy, t, t)
    else:
        velocity = LinearPath.velocity_target(batch["latents"], noise)
    if s.enhanced_ratio == 0:
        return velocity
    if batch.get("null_cond") is None:
        raise ValueError("enhanced_ratio needs batch['null_cond'], the conditioning of the empty prompt")
    difference = evaluate(roles.target, batch, noisy, t, t)
    difference = difference - evaluate(roles.target, {**batch, "cond": batch["null_cond"]}, noisy, t, t)
    low, high = s.enhanced_range
    inside = ((t >= low) & (t <= high)).astype(t.dtype)
    return velocity + s.enhanced_ratio * expand_time(inside, difference) * difference


@paddle.no_grad()
def any_step_target(
    reference: Any,
    batch: Batch,
    noisy: paddle.Tensor,
    supervision: paddle.Tensor,
    prediction: paddle.Tensor,
    t: paddle.Tensor,
    target_t: paddle.Tensor,
    s: AnyStep,
) -> paddle.Tensor:
    """The student's own velocity, corrected by Δ, [B, C, H, W] (arXiv 2505.07447, the N-th order consistent loss).

    From x_t the supervision leads to t_m = max(t − delta, target_t), then N Euler steps of the reference to target_t,
    S being their displacement. A consistent velocity F covers both: (t − target_t)·F = (t − t_m)·v + S. Its error is
    measured in units of the first piece, Δ = ((t − target_t)·F − S)/(t − t_m) − v, clamped, which with delta = 0.01
    is the published one. Where target_t is closer than delta, S = 0 and Δ = F − v, at target_t = t too.
    """
    middle = paddle.maximum(t - s.delta, target_t)
    x = euler_move(noisy, supervision, t, middle)
    displacement = paddle.zeros_like(x)
    for n in range(s.order):
        current = middle + (target_t - middle) * (n / s.order)
        following = middle + (target_t - middle) * ((n + 1) / s.order)
        move = euler_move(x, evaluate(reference, batch, x, current, following), current, following) - x
        x, displacement = x + move, displacement - move
    first = t - middle
    inverse = paddle.where(first > 0, 1 / first.clip(min=1e-12), paddle.ones_like(first))
    stretch = paddle.where(first > 0, (t - target_t) * inverse, paddle.ones_like(first))
    correction = expand_time(stretch, x) * prediction - expand_time(inverse, x) * displacement - supervision
    if s.clamp is not None:
        correction = correction.clip(-s.clamp, s.clamp)
    return prediction - correction


def evaluate(
    model: Any, batch: Batch, x: paddle.Tensor, t: paddle.Tensor | float, target_t: paddle.Tensor | float
) -> paddle.Tensor:
    """The model's velocity for the rows of a batch; times are [B] or numbers."""
    times = (each if isinstance(each, paddle.Tensor) else paddle.full([x.shape[0]], each) for each in (t, target_t))
    t, target_t = times
    velocity = model(x, t, batch["cond"], target_t=target_t, guidance=batch.get("guidance"))
    return velocity.astype(x.dtype if x.dtype == paddle.float64 else "float32")


def one_step(model: Any, batch: Batch, noise: paddle.Tensor) -> tuple[paddle.Tensor, paddle.Tensor]:
    """One-step samples from noise, and the velocity that made them, both [B, C, H, W]."""
    velocity = evaluate(model, batch, noise, 1.0, 0.0)
    return noise - velocity, velocity


def draw_time(draws: Draws, rows: int, s: AnyStep) -> paddle.Tensor:
    """Random times [rows] in (0, c]. Draw: `t`."""
    a, b, c = s.times
    return draws.beta("t", a, b, [rows]) * c


def time_weight(t: paddle.Tensor, target_t: paddle.Tensor, s: AnyStep) -> paddle.Tensor | float:
    """Weight of rows [B] by the length of their way (TwinFlow, arXiv 2512.05150); 1 for a step from 1 to 0."""
    if not s.time_weighting:
        return 1.0
    return paddle.tan((1 - (t.abs() - target_t.abs())) * (math.pi / 2.5)) + 1


def regression(prediction: paddle.Tensor, goal: paddle.Tensor, kind: str) -> paddle.Tensor:
    """The error of every row, [B]: mse, or mse·sg(w).

    w is the adaptive weight of the general robust loss (Barron, arXiv 1701.03077) with α = 1, c = 1e-3:
    w = 1/(c·sqrt(mse/c² + 1)), so that large errors count by their root.
    """
    error = (prediction - goal).square().flatten(1).mean(1)
    if kind == "l2":
        return error
    return error / (BARRON_C * paddle.sqrt(error.detach() / BARRON_C**2 + 1))


def rows_of(batch: Batch, index: Sequence[int]) -> Batch:
    """The rows `index` of latents, conditioning and guidance."""
    taken = {"latents": paddle.gather(batch["latents"], paddle.to_tensor(index), axis=0)}
    for name in ("cond", "null_cond"):
        if batch.get(name) is not None:
            taken[name] = Cond(batch[name]).mask(index) if batch[name] else batch[name]
    if batch.get("guidance") is not None:
        taken["guidance"] = paddle.gather(batch["guidance"], paddle.to_tensor(index), axis=0)
    return taken
