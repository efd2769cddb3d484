"""Flow matching, where the model has one with the guidance strength as an input: how teachers are trained."""

from typing import Any

import paddle
import paddle.nn.functional as F

from distill.draws import Draws
from distill.objectives.phases import Batch, mean_square
from fast_diffusers.conditioning import Cond
from fast_diffusers.transports import LinearPath, expand_time


def flow_matching(
    roles: Any,
    batch: Batch,
    draws: Draws,
    *,
    mu: float = 0.0,
    time_mean: float = 0.0,
    time_std: float = 1.0,
    drop_rate: float = 0.1,
    guided_rate: float = 0.0,
    guidance_range: tuple[float, float] = (1.0, 5.0),
    embeds_guidance: bool = True,
) -> tuple[paddle.Tensor, dict[str, paddle.Tensor]]:
    """E‖v_student(x_t, t, c, g) − u‖², with u = ε − x0 + (g − 1)·(v_target(x_t, t, c, 1) − v_target(x_t, t, ∅, 1)).

    The first round(guided_rate·B) rows draw g uniformly from `guidance_range`; their fixed point is the
    classifier-free-guided velocity (arXiv 2207.12598), so that one evaluation replaces two, as in FLUX.1-dev. The other
    rows have g = 1, which is conditional flow matching (arXiv 2209.03003, 2210.02747), a fraction `drop_rate` of them
    with the null condition. Raw time is logit-normal(time_mean, time_std), shifted by `mu` (arXiv 2403.03206).

    Without `embeds_guidance` no role is told g: guided_rate must then be 0, and guidance takes two evaluations of the
    trained model, with the condition and with the null condition that some rows had (`denoisers.ClassifierFree`).

    Uses role student, and role target (no gradient; an average of the student, say) where guided_rate > 0. Batch:
    `latents`, `cond`, and `null_cond` of the same shapes. Draws: `t`, `noise`, `drop`, `guidance`.

    Raises:
        ValueError: rows are to learn guidance that the model does not embed.
    """
    if guided_rate and not embeds_guidance:
        raise ValueError(f"guided_rate is {guided_rate}, but the model does not embed its guidance")
    latents, cond, null_cond = batch["latents"], Cond(batch["cond"]), Cond(batch["null_cond"])
    rows = latents.shape[0]
    t = F.sigmoid(time_mean + time_std * draws.normal("t", [rows]) + mu)  # the shift adds mu to the logit
    noise = draws.normal("noise", latents.shape).astype(latents.dtype)
    noisy = LinearPath.interpolate(latents, noise, t)
    velocity = LinearPath.velocity_target(latents, noise)

    guided = round(guided_rate * rows)
    low, high = guidance_range
    is_guided = paddle.arange(rows) < guided
    guidance = paddle.where(is_guided, low + (high - low) * draws.uniform("guidance", [rows]), paddle.ones([rows]))
    if guided:
        first = list(range(guided))
        both = cond.mask(first).concat(null_cond.mask(first))
        with paddle.no_grad():
            twice_noisy, twice_t = paddle.concat([noisy[:guided]] * 2), paddle.concat([t[:guided]] * 2)
            prediction = roles.target(twice_noisy, twice_t, both, guidance=paddle.ones([2 * guided]))
            difference = prediction[:guided] - prediction[guided:]
            extra = expand_time(guidance[:guided] - 1, difference) * difference
            velocity = paddle.concat([velocity[:guided] + extra, velocity[guided:]])

    dropped = (draws.uniform("drop", [rows]) < drop_rate).logical_and(~is_guided)
    mixed = Cond({name: paddle.where(_per_row(dropped, x), null_cond[name], x) for name, x in cond.items()})
    told = guidance if embeds_guidance else None
    loss = mean_square(roles.student(noisy, t, mixed, guidance=told) - velocity)
    return loss, {"flow_matching": loss.detach()}


def _per_row(flags: paddle.Tensor, like: paddle.Tensor) -> paddle.Tensor:
    """Flags [B] shaped to broadcast over the rows of `like`."""
    return flags.reshape([-1] + [1] * (like.ndim - 1))
