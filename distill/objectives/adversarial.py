"""Adversarial distillation with heads on the features of the frozen teacher."""

from collections.abc import Sequence
from typing import Any

import paddle
import paddle.nn.functional as F

from distill.draws import Draws
from distill.objectives.consistency import consistency_target
from distill.objectives.phases import Batch, Jump, draw_cell_in_phase, lookup, renoise_from_phase_end, student_jump
from fast_diffusers.time_grids import PhaseGrid

GAN_LOSSES = ("hinge", "lsgan", "non_saturating")


def _mean_over_heads(values: Sequence[paddle.Tensor]) -> paddle.Tensor:
    return sum(value.mean() for value in values) / len(values)


def generator_loss(fake: Sequence[paddle.Tensor], gan_loss: str) -> paddle.Tensor:
    """Mean over heads of relu(1 − D) ("hinge"), (D − 1)² ("lsgan") or −D ("non_saturating", as in LADD)."""
    if gan_loss == "hinge":
        return _mean_over_heads([F.relu(1 - logits) for logits in fake])
    if gan_loss == "lsgan":
        return _mean_over_heads([(logits - 1).square() for logits in fake])
    if gan_loss == "non_saturating":
        return _mean_over_heads([-logits for logits in fake])
    raise ValueError(f"gan_loss is one of {', '.join(GAN_LOSSES)}, not {gan_loss!r}")


def discriminator_loss(real: Sequence[paddle.Tensor], fake: Sequence[paddle.Tensor], gan_loss: str) -> paddle.Tensor:
    """Mean over heads of relu(1 − D_real) + relu(1 + D_fake), or of (D_real − 1)² + D_fake² for "lsgan"."""
    if gan_loss == "lsgan":
        terms = [(r - 1).square().mean() + f.square().mean() for r, f in zip(real, fake, strict=True)]
    elif gan_loss in GAN_LOSSES:
        terms = [F.relu(1 - r).mean() + F.relu(1 + f).mean() for r, f in zip(real, fake, strict=True)]
    else:
        raise ValueError(f"gan_loss is one of {', '.join(GAN_LOSSES)}, not {gan_loss!r}")
    return _mean_over_heads(terms)


def adversarial(
    roles: Any,
    batch: Batch,
    draws: Draws,
    *,
    grid: PhaseGrid,
    side: str = "generator",
    gan_loss: str = "hinge",
    taps: Sequence[int] | None = None,
    cfg_weight: float = 0.0,
    reference_compat: bool = False,
    jump: Jump | None = None,
    target: paddle.Tensor | None = None,
) -> tuple[paddle.Tensor, dict[str, paddle.Tensor]]:
    """The student's (side="generator") or the heads' (side="discriminator") loss.

    Fake is the student's jump x̂, real the consistency target y; both are re-noised to one random σ of the phase, with
    noise of their own, and seen through the teacher's features. Uses roles student, teacher, discriminator (and target
    for the real side); draws `cell`, `noise`, `adv.cell`, `adv.fake_noise` and, for the heads, `adv.real_noise`.
    """
    if side not in ("generator", "discriminator"):
        raise ValueError(f"side is 'generator' or 'discriminator', not {side!r}")
    trains_student = side == "generator"
    if jump is None:
        with paddle.set_grad_enabled(trains_student):
            jump = student_jump(roles, batch, draws, grid)
    sigma = lookup(grid.sigma_prev, draw_cell_in_phase("adv.cell", jump, draws, grid))

    def logits(x: paddle.Tensor, noise_name: str) -> list[paddle.Tensor]:
        noisy = renoise_from_phase_end(x, jump, sigma, draws.normal(noise_name, x.shape), reference_compat)
        with paddle.set_grad_enabled(trains_student):
            features = roles.teacher.features(noisy, sigma, batch["cond"], taps, guidance=batch.get("guidance"))
        return roles.discriminator(features)

    if trains_student:
        loss = generator_loss(logits(jump.prediction, "adv.fake_noise"), gan_loss)
        return loss, {"adversarial": loss.detach()}
    if target is None:
        target = consistency_target(roles, batch, jump, grid, cfg_weight=cfg_weight)
    fake = logits(jump.prediction.detach(), "adv.fake_noise")
    real = logits(target, "adv.real_noise")
    loss = discriminator_loss(real, fake, gan_loss)
    metrics = {
        "discriminator": loss,
        "logit_real": _mean_over_heads(real),
        "logit_fake": _mean_over_heads(fake),
    }
    return loss, {name: value.detach() for name, value in metrics.items()}
