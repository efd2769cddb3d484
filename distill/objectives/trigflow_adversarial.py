"""Latent adversarial distillation (LADD) of a TrigFlow student, with heads on the features of the frozen teacher."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import paddle

from distill.draws import Draws
from distill.objectives.adversarial import discriminator_loss, generator_loss
from distill.objectives.phases import Batch
from distill.objectives.trigflow import TeacherGuidance, draw_angle, draw_guidance, one_step_sample
from fast_diffusers.conditioning import Cond
from fast_diffusers.models.layers import at_least_float32
from fast_diffusers.transports import LinearPath, flow_time


def trigflow_adversarial(
    roles: Any,
    batch: Batch,
    draws: Draws,
    *,
    side: Literal["generator", "discriminator"] = "generator",
    taps: Sequence[int] | None = None,
    max_time_probability: float = 0.5,
    renoise_mean: float = -0.6,
    renoise_std: float = 1.0,
    misaligned: bool = True,
    sigma_data: float = 0.5,
    tau_mean: float = 0.2,
    tau_std: float = 1.6,
    guidance_scales: Sequence[float] | None = (4.0, 4.5, 5.0),
    teacher_guidance: TeacherGuidance = "cfg",
) -> tuple[paddle.Tensor, dict[str, paddle.Tensor]]:
    """The student's (side="generator") or the heads' (side="discriminator") loss; SANA-Sprint, arXiv 2503.09641,
    section 3, after LADD, arXiv 2403.12015.

    L_G = −mean D(fake), L_D = ½·[mean relu(1 − D(real)) + mean relu(1 + D(fake))], means over the logits of all taps.
    Fake are the student's one-step samples of noisy data, at pure noise for some rows, real the data. Both are seen by
    the heads through the teacher's features at an angle of their own. The heads' fake rows also hold the noisy real
    ones with another row's prompt (`misaligned`, for batches of more than one).

    Everything is a state of the linear path, on which TrigFlow's cos t·x_t − sin t·sigma_data·F is x − s·v. The caller
    freezes the heads on the generator's side. Uses roles student, teacher and discriminator. Draws: `adv.tau`,
    `adv.max_time`, `adv.noise` for the samples and, with `guidance_scales`, `guidance`; then for the generator
    `adv.renoise_tau` and `adv.renoise`, for the heads `disc.real_tau`, `disc.fake_tau` and `disc.noise`, which real and
    fake rows share.

    Args:
        roles, batch, draws: see `distill.objectives`.
        side: whose loss.
        taps: blocks whose features the heads see; None is all.
        max_time_probability: of a row to be sampled from pure noise, t = pi/2.
        renoise_mean, renoise_std: of τ for the angles arctan(e^τ / sigma_data) at which the heads see samples.
        misaligned: see above.
        sigma_data, tau_mean, tau_std, guidance_scales, teacher_guidance: see `trigflow_consistency`; the teacher's
            features are those without classifier-free guidance.

    Returns:
        The loss and metrics: `adversarial`, or `discriminator`, `logit_real`, `logit_fake` (of the student's samples)
        and `logit_misaligned`.
    """
    if side not in ("generator", "discriminator"):
        raise ValueError(f"side is 'generator' or 'discriminator', not {side!r}")
    x0, cond = at_least_float32(batch["latents"]), batch["cond"]
    rows, dtype = x0.shape[0], x0.dtype
    guided = draw_guidance(roles, batch, draws, guidance_scales, teacher_guidance, dtype)

    def time(name: str, mean: float, std: float) -> paddle.Tensor:
        return flow_time(draw_angle(draws, name, rows, mean, std, sigma_data, dtype))

    def noise(name: str) -> paddle.Tensor:
        return draws.normal(name, x0.shape).astype(dtype)

    def sample() -> paddle.Tensor:
        return one_step_sample(
            roles.student,
            x0,
            cond,
            guided.student,
            draws,
            "adv",
            max_time_probability=max_time_probability,
            sigma_data=sigma_data,
            tau_mean=tau_mean,
            tau_std=tau_std,
        )

    if side == "generator":
        t = time("adv.renoise_tau", renoise_mean, renoise_std)
        noisy = LinearPath.interpolate(sample(), noise("adv.renoise"), t)
        features = roles.teacher.features(noisy, t, cond, taps, guidance=guided.features)
        loss = generator_loss([_logits(roles.discriminator, features)], "non_saturating")
        return loss, {"adversarial": loss.detach()}

    with paddle.no_grad():
        fresh = noise("disc.noise")
        times = [time(name, renoise_mean, renoise_std) for name in ("disc.real_tau", "disc.fake_tau")]
        states = [LinearPath.interpolate(x, fresh, t) for x, t in zip((x0, sample()), times, strict=True)]
        if misaligned and rows > 1:
            states.append(states[0].roll(1, axis=0))
            times.append(times[0].roll(1, axis=0))
        # All rows in one pass; the heads, whose normalisation mixes rows, see real and fake ones apart.
        again = len(states)
        told = guided.features if guided.features is None else paddle.concat([guided.features] * again)
        features = roles.teacher.features(
            paddle.concat(states), paddle.concat(times), _repeat(cond, rows, again), taps, guidance=told
        )
    real = _logits(roles.discriminator, [each[:rows] for each in features])
    fake = _logits(roles.discriminator, [each[rows:] for each in features])
    loss = 0.5 * discriminator_loss([real], [fake], "hinge")
    metrics = {"discriminator": loss, "logit_real": real.mean(), "logit_fake": fake[:rows].mean()}
    if again > 2:
        metrics["logit_misaligned"] = fake[rows:].mean()
    return loss, {name: value.detach() for name, value in metrics.items()}


def _logits(discriminator: Any, features: Sequence[paddle.Tensor]) -> paddle.Tensor:
    """The logits of all taps, [B, number of them]."""
    return paddle.concat([each.flatten(1) for each in discriminator(features)], axis=1)


def _repeat(cond: Mapping[str, paddle.Tensor], rows: int, times: int) -> Mapping[str, paddle.Tensor]:
    """All rows, `times` over; conditioning may be empty."""
    return Cond(cond).mask(list(range(rows)) * times) if cond else cond
