"""Euler's method as a scheduler, with the resolution-dependent shift that FLUX needs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from paddle import Tensor
from ppdiffusers.configuration_utils import register_to_config

from fast_diffusers.random import AnyGenerator
from fast_diffusers.samplers.euler import euler_sigmas, euler_step
from fast_diffusers.schedulers.base import FlowMatchScheduler


class FlowMatchEulerDiscreteScheduler(FlowMatchScheduler):
    """Reads the `scheduler_config.json` of FLUX.1-dev, FLUX.1-schnell and Stable Diffusion 3.

    Without explicit sigmas it visits 1, 1 - 1/steps, ..., 1/steps, shifted, and 0, as the FLUX pipeline does.

    Args:
        num_train_timesteps: factor between time and `timesteps`.
        shift: constant shift, used unless `use_dynamic_shifting`.
        use_dynamic_shifting: shift by the `mu` given to `set_timesteps`.
        base_shift, max_shift, base_image_seq_len, max_image_seq_len: for the caller, who computes mu from them with
            `time_grids.dynamic_shift_mu`.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float = 0.5,
        max_shift: float = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
    ):
        self._reset()

    def _levels(self, steps: int, sigmas: Sequence[float] | None, mu: float) -> np.ndarray:
        return euler_sigmas(steps, sigmas, mu)

    def _advance(
        self,
        x: Tensor,
        velocity: Tensor,
        sigma: float,
        sigma_next: float,
        generator: AnyGenerator | Sequence[AnyGenerator] | None,
    ) -> Tensor:
        return euler_step(x, velocity, sigma, sigma_next)
