"""The phased consistency sampler as a scheduler."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from paddle import Tensor
from ppdiffusers.configuration_utils import register_to_config

from fast_diffusers.random import AnyGenerator, randn
from fast_diffusers.samplers.euler import euler_step
from fast_diffusers.samplers.phased import phased_sigmas, renoise_step
from fast_diffusers.schedulers.base import FlowMatchScheduler
from fast_diffusers.time_grids import PhaseGrid


class PhasedConsistencyScheduler(FlowMatchScheduler):
    """Visits the phase boundaries that a student was trained on, at any image size: see `samplers.phased`.

    Args:
        num_cells, num_phases: the solver grid of the student's training.
        stochastic: put fresh noise on the predicted data at every level instead of following the velocity.
        num_train_timesteps, shift, use_dynamic_shifting, base_shift, max_shift, base_image_seq_len, max_image_seq_len:
            as in `FlowMatchEulerDiscreteScheduler`.
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
        num_cells: int = 100,
        num_phases: int = 4,
        stochastic: bool = False,
    ):
        self._reset()

    def _levels(self, steps: int, sigmas: Sequence[float] | None, mu: float) -> np.ndarray:
        if sigmas is not None:
            raise ValueError("PhasedConsistencyScheduler visits its phase boundaries: pass num_inference_steps only")
        return phased_sigmas(steps, PhaseGrid(self.config.num_cells, self.config.num_phases, mu))

    def _advance(
        self,
        x: Tensor,
        velocity: Tensor,
        sigma: float,
        sigma_next: float,
        generator: AnyGenerator | Sequence[AnyGenerator] | None,
    ) -> Tensor:
        if not self.config.stochastic or sigma_next == 0:
            return euler_step(x, velocity, sigma, sigma_next)
        return renoise_step(x, velocity, sigma, sigma_next, randn(x.shape, generator))
