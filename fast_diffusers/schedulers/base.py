"""What the flow-matching schedulers share: levels, position in them, and the ppdiffusers interface."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import paddle
from paddle import Tensor
from ppdiffusers import ConfigMixin, SchedulerMixin
from ppdiffusers.utils import BaseOutput

from fast_diffusers.random import AnyGenerator
from fast_diffusers.transports import LinearPath


@dataclass
class FlowMatchSchedulerOutput(BaseOutput):
    """`prev_sample`: the state after the step, [B, C, H, W] float32."""

    prev_sample: Tensor


class FlowMatchScheduler(SchedulerMixin, ConfigMixin):
    """Base class; a subclass gives `_levels` (which noise levels to visit) and `_advance` (one step).

    After `set_timesteps`, `sigmas` [steps + 1] holds the noise levels, the last one 0, and `timesteps` [steps] all but
    the last times `num_train_timesteps`; both are float32 tensors.
    """

    order = 1

    def _reset(self) -> None:
        self.timesteps: Tensor | None = None
        self.sigmas: Tensor | None = None
        self.num_inference_steps: int | None = None
        self._sigmas: np.ndarray | None = None
        self._timesteps: np.ndarray | None = None
        self._step_index: int | None = None
        self._begin_index: int | None = None

    def _levels(self, steps: int, sigmas: Sequence[float] | None, mu: float) -> np.ndarray:
        """Noise levels, float32 [steps + 1]."""
        raise NotImplementedError

    def _advance(
        self,
        x: Tensor,
        velocity: Tensor,
        sigma: float,
        sigma_next: float,
        generator: AnyGenerator | Sequence[AnyGenerator] | None,
    ) -> Tensor:
        """One step from sigma to sigma_next, float32."""
        raise NotImplementedError

    @classmethod
    def _get_compatibles(cls) -> list[type]:
        # ppdiffusers looks the classes up by name in its own package, where ours are not.
        return FlowMatchScheduler.__subclasses__()

    @property
    def step_index(self) -> int | None:
        """Index of the next step, None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Index of the first step, if `set_begin_index` gave it."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Say which step comes first, which saves `step` from looking its first timestep up."""
        self._begin_index = begin_index

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Choose the noise levels and go back to the start; call before every image.

        Args:
            num_inference_steps: number of steps; may be left out when sigmas are given.
            sigmas: unshifted noise levels to visit, without the final 0.
            mu: shift exponent for this image size (`time_grids.dynamic_shift_mu`), needed with `use_dynamic_shifting`;
                without it the configured constant `shift` is used and mu is ignored.

        Raises:
            ValueError: neither steps nor sigmas, steps < 1, a missing mu, or sigmas that the scheduler cannot use.
        """
        if num_inference_steps is None:
            if sigmas is None:
                raise ValueError("set_timesteps needs num_inference_steps or sigmas")
            num_inference_steps = len(sigmas)
        if not self.config.use_dynamic_shifting:
            mu = math.log(self.config.shift)
        elif mu is None:
            raise ValueError(
                "this scheduler shifts with the image size (use_dynamic_shifting): pass mu to set_timesteps, "
                "see fast_diffusers.time_grids.dynamic_shift_mu"
            )
        levels = self._levels(num_inference_steps, sigmas, mu)
        self._visit(levels, levels[:-1])

    def _visit(self, levels: np.ndarray, asked: np.ndarray) -> None:
        """Go back to the start of steps between `levels` that ask the model at the times `asked`; both float32."""
        self._sigmas = levels
        self.sigmas = paddle.to_tensor(levels)
        self._timesteps = asked * np.float32(self.config.num_train_timesteps)
        self.timesteps = paddle.to_tensor(self._timesteps)
        self.num_inference_steps = len(levels) - 1
        self._step_index = None
        self._begin_index = None

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        generator: AnyGenerator | Sequence[AnyGenerator] | None = None,
        return_dict: bool = True,
    ) -> FlowMatchSchedulerOutput | tuple[Tensor]:
        """One step.

        Args:
            model_output: velocity at (sample, timestep), [B, C, H, W] of any float dtype.
            timestep: one of `timesteps`. Only the first call after `set_timesteps` reads it, to find where to begin;
                later calls continue from there.
            sample: the state, [B, C, H, W].
            generator: source of fresh noise for a stochastic scheduler, see `fast_diffusers.random.randn`.
            return_dict: False returns a 1-tuple.

        Raises:
            ValueError: `set_timesteps` was not called, timestep is not one of its timesteps, or no step is left.
        """
        if self._sigmas is None:
            raise ValueError("call set_timesteps before step")
        if self._step_index is None:
            self._step_index = self._index_for(timestep) if self._begin_index is None else self._begin_index
        if self._step_index >= len(self._timesteps):
            raise ValueError(f"all {self.num_inference_steps} steps are taken: call set_timesteps for the next image")
        x = self._step_at(self._step_index, sample, model_output, generator)
        self._step_index += 1
        return FlowMatchSchedulerOutput(prev_sample=x) if return_dict else (x,)

    def _step_at(
        self,
        index: int,
        sample: Tensor,
        velocity: Tensor,
        generator: AnyGenerator | Sequence[AnyGenerator] | None,
    ) -> Tensor:
        """What `step` does with the velocity at `timesteps[index]`."""
        sigma, sigma_next = (float(s) for s in self._sigmas[index : index + 2])
        return self._advance(sample.astype("float32"), velocity.astype("float32"), sigma, sigma_next, generator)

    def scale_noise(self, sample: Tensor, timestep: Tensor | float, noise: Tensor) -> Tensor:
        """The state between data and noise at `timestep`, a scalar or [B] in [0, num_train_timesteps]; float32."""
        return LinearPath.interpolate(sample, noise, timestep / self.config.num_train_timesteps)

    def _index_for(self, timestep: Tensor | float) -> int:
        distance = np.abs(self._timesteps - float(timestep))
        # The last one of equals: where a second-order step ends, the next one begins.
        index = len(distance) - 1 - int(distance[::-1].argmin())
        if distance[index] > 1e-5 * self.config.num_train_timesteps:
            raise ValueError(
                f"timestep {float(timestep):g} is not one of this scheduler's timesteps {self._timesteps.tolist()}; "
                "pass the elements of scheduler.timesteps, not their indices"
            )
        return index

    def __len__(self) -> int:
        return self.config.num_train_timesteps
