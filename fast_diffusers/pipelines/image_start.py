"""Image to image: how far into a schedule it begins, and the state there."""

from __future__ import annotations

from numbers import Real

from paddle import Tensor
from ppdiffusers import SchedulerMixin

from fast_diffusers.errors import UserError

DEFAULT_STRENGTH = 0.6
"""How much of the schedule runs when nothing is said, as in ppdiffusers and diffusers."""


def check_strength(strength: float) -> float:
    """The strength. UserError unless it is a number in [0, 1]."""
    if isinstance(strength, bool) or not isinstance(strength, Real) or not 0 <= strength <= 1:
        raise UserError(f"strength must be a number from 0 to 1, got {strength!r}")
    return strength


def first_index(scheduler: SchedulerMixin, strength: float) -> int:
    """Which of the scheduler's timesteps comes first at that strength; their number if none is left, at strength 0.

    The rule of diffusers' pipelines for flow matching: of S steps the first int(S - S * strength) are left out, so that
    every strength above 0 runs one at least. A step of a second-order scheduler is two timesteps, its last one is one.
    """
    order = getattr(scheduler, "order", 1)
    evaluations = len(scheduler.timesteps)
    steps = -(-evaluations // order)
    return min(order * int(steps - min(steps * strength, steps)), evaluations)


def state_at(scheduler: SchedulerMixin, index: int, data: Tensor, noise: Tensor) -> Tensor:
    """The state [B, C, h, w], float32, in which the step begins that asks the model at `timesteps[index]`.

    Raises:
        UserError: a scheduler that does not say how much noise there is.
    """
    if not (hasattr(scheduler, "scale_noise") and hasattr(scheduler, "sigmas")):
        raise UserError(
            f"{type(scheduler).__name__} cannot begin from an image: it has no scale_noise; "
            "use FlowMatchEulerDiscreteScheduler"
        )
    # Not the timestep, which may be another time that the model is told in place of the state's.
    sigma = scheduler.sigmas[-(-index // getattr(scheduler, "order", 1))]
    if hasattr(scheduler, "set_begin_index"):  # where ppdiffusers' own scheduler looks
        scheduler.set_begin_index(index)
    return scheduler.scale_noise(data, sigma * scheduler.config.num_train_timesteps, noise)
