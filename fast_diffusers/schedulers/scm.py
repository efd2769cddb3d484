"""The TrigFlow consistency sampler as a scheduler."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import paddle
from paddle import Tensor
from ppdiffusers.configuration_utils import register_to_config

from fast_diffusers.random import AnyGenerator, noise_source
from fast_diffusers.samplers.loop import check_steps
from fast_diffusers.samplers.trigflow import check_angles, flow_levels, initial_scale, scm_step, trigflow_angles
from fast_diffusers.schedulers.base import FlowMatchScheduler


class SCMScheduler(FlowMatchScheduler):
    """`samplers.trigflow` step by step; reads the `scheduler_config.json` of SANA-Sprint.

    States and velocities are those of the linear path, as for all schedulers here: `timesteps` are times on it, and
    `angles` [steps + 1], float32, what diffusers' scheduler of this name calls timesteps. Noise is to be multiplied by
    `init_noise_sigma`, known after `set_timesteps`, before the first step: 1, or a little less where the first angle is
    below pi/2.

    Args:
        num_train_timesteps: factor between time and `timesteps`.
        prediction_type: "trigflow", the only one there is.
        sigma_data: deviation of the published students' states, by which their pipeline divides; states here are
            already divided by it, so that it has no effect.
        angles: those of a student that needs others than the published ones, see `samplers.trigflow.trigflow_angles`.

    Raises:
        ValueError: another prediction_type, or unusable angles.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        prediction_type: str = "trigflow",
        sigma_data: float = 0.5,
        angles: Sequence[float] | None = None,
    ):
        if prediction_type != "trigflow":
            raise ValueError(f'prediction_type must be "trigflow", got {prediction_type!r}')
        if angles is not None:
            check_angles(angles)
        self.angles: Tensor | None = None
        self.init_noise_sigma = 1.0
        self._reset()

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        timesteps: Sequence[float] | None = None,
        max_timesteps: float | None = None,
        intermediate_timesteps: float | None = None,
        mu: float | None = None,
    ) -> None:
        """Choose the angles and go back to the start; call before every image.

        Without further arguments they are those of `samplers.trigflow.trigflow_angles` for the config's `angles`.

        Args:
            num_inference_steps: number of steps; may be left out when timesteps are given.
            timesteps: the angles, steps + 1 of them, strictly descending to 0.
            max_timesteps: the first angle, pi/2 unless given; equal steps of angle lead from it to 0.
            intermediate_timesteps: the second angle; equal steps lead from it to 0. A single step has none.
            mu: without effect, angles are not shifted.

        Raises:
            ValueError: no steps, steps < 1, angles that do not descend from at most pi/2 to 0, or timesteps together
                with the other angles.
        """
        if timesteps is not None:
            if max_timesteps is not None or intermediate_timesteps is not None:
                raise ValueError("timesteps are all the angles: pass no max_timesteps or intermediate_timesteps")
            angles = check_angles(timesteps, num_inference_steps)
        elif num_inference_steps is None:
            raise ValueError("set_timesteps needs num_inference_steps or timesteps")
        elif max_timesteps is None and intermediate_timesteps is None:
            angles = trigflow_angles(num_inference_steps, self.config.angles)
        else:
            angles = _equal_steps(num_inference_steps, max_timesteps, intermediate_timesteps)
        levels = flow_levels(angles)
        self._visit(levels, levels[:-1])
        self.angles = paddle.to_tensor(angles, dtype="float32")
        self.init_noise_sigma = initial_scale(angles[0])

    def _advance(
        self,
        x: Tensor,
        velocity: Tensor,
        sigma: float,
        sigma_next: float,
        generator: AnyGenerator | Sequence[AnyGenerator] | None,
    ) -> Tensor:
        return scm_step(x, velocity, sigma, sigma_next, noise_source(x, generator, None))


def _equal_steps(steps: int, first: float | None, second: float | None) -> np.ndarray:
    """Angles in equal steps to 0 from the first (default pi/2), or from the second if there is one."""
    check_steps(steps)
    first = math.pi / 2 if first is None else first
    if second is None or steps == 1:
        return check_angles(np.linspace(first, 0, steps + 1))
    return check_angles([first, *np.linspace(second, 0, steps)])
